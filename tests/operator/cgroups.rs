use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{call, limited_both_ways, listed, podshaper, refuses, says};
use crate::chain::scope::call_alone;
use crate::chain::{Attachment, Bed, MBIT, assert_rate, has_fq, move_away};
use crate::harness::cgroup::{self, PodCgroup};
use crate::harness::limiter::{Limiter, Limits};
use crate::harness::measure::{self, Bulk, Way};
use crate::harness::pod::Pod;
use crate::harness::process::{self, Running};
use crate::harness::{traffic_program, unique};
use crate::sandbox::within;

fn cgroup(prefix: &str) -> PodCgroup {
    PodCgroup::new(cgroup::mount().unwrap().join(unique(prefix))).unwrap()
}

fn key(cgroup: &PodCgroup) -> String {
    use std::os::unix::fs::MetadataExt;
    format!("cgroup-{}", std::fs::metadata(cgroup.path()).unwrap().ino())
}

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn a_cgroup_is_limited_changed_and_let_go() {
    let slice = cgroup("slice");
    let path = slice.path().to_str().unwrap();
    // The path below the mount is accepted as well.
    let short = format!("/{}", slice.path().file_name().unwrap().to_str().unwrap());
    let (code, stdout, stderr) = call(&["attach", "--cgroup", &short, "--egress", "10M", "--ingress", "20M"]);
    assert_eq!(
        (code, stdout),
        (0, format!("{path} *: egress 10Mbit/s, burst 120kbit\n{path} *: ingress 20Mbit/s, burst 120kbit\n"))
    );
    assert!(stderr.contains("limited by drops") && stderr.contains("connections that exist already"), "{stderr}");
    let entry = listed(&key(&slice)).unwrap();
    assert_eq!(
        (&entry["interface"], &entry["links"], &entry["name"]),
        (&"*".into(), &"live".into(), &short.clone().into())
    );
    assert_eq!(entry["ingress"]["by"], "drops");

    says(&["set", &short, "--egress", "1M", "--ingress", "2M"]);
    assert_eq!(listed(&key(&slice)).unwrap()["egress"]["limitBitsPerS"], 1_000_000);
    // A second attach replaces the first.
    says(&["attach", "--cgroup", path, "--egress", "5M"]);
    let entry = listed(&key(&slice)).unwrap();
    assert!(entry["egress"]["limitBitsPerS"] == 5_000_000 && entry["ingress"].is_null(), "{entry}");
    // The beginning of a path is another cgroup.
    let (beginning, _) = path.split_at(path.len() - 1);
    assert!(refuses(&["detach", "--cgroup", beginning]).contains("no such pod is limited"));
    assert_eq!(says(&["detach", "--cgroup", path]), format!("{short} *: no limit any more\n"));
    assert_eq!(listed(&key(&slice)), None);
}

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn a_limit_in_a_limit_and_a_cgroup_that_is_none_are_refused() {
    let pod = limited_both_ways(None);
    pod.call("ADD");
    let path = pod.cgroup.path().to_str().unwrap();
    let container = pod.cgroup.container("c1").unwrap();
    for cgroup in [path, container.to_str().unwrap(), pod.cgroup.path().parent().unwrap().to_str().unwrap()] {
        let text = refuses(&["attach", "--cgroup", cgroup, "--egress", "1M"]);
        assert!(text.contains("is limited already") && text.contains("podshaper set"), "{text}");
    }
    let mount = cgroup::mount().unwrap().display().to_string();
    for (cgroup, why) in [
        (mount.as_str(), "it is the whole node"),
        ("/", "it is the whole node"),
        ("/no/such/slice", "No such file or directory"),
        ("/cgroup.procs", "No such file or directory"),
    ] {
        let text = refuses(&["attach", "--cgroup", cgroup, "--egress", "1M"]);
        assert!(text.contains(why) || cgroup == "/cgroup.procs", "{cgroup}: {text}");
    }
    let slice = cgroup("interface");
    let text =
        refuses(&["attach", "--cgroup", slice.path().to_str().unwrap(), "--interface", "nosuch0", "--egress", "1M"]);
    assert!(text.contains("find the interface \"nosuch0\""), "{text}");
    pod.call("DEL");
}

#[test]
#[ignore = "needs root and the CNI plugins"]
fn what_a_limited_cgroup_sends_has_its_rate_and_no_other_after_detach() {
    let bed = Bed::new();
    let pod = bed.pod(Limiter::Bare, MBIT);
    let path = pod.cgroup.path().to_str().unwrap().to_owned();
    let send = || measure::bulk(&pod, &Bulk { flows: 4, seconds: 3.0, ..Bulk::default() }).unwrap();
    says(&["attach", "--cgroup", &path, "--egress", "20M"]);
    let limited = send();
    assert_rate("a cgroup at 20 Mbit/s", limited.timeline.steady_rate(), 20 * MBIT, 0.05);
    assert_eq!(limited.retransmits, 0);
    says(&["detach", "--cgroup", &path]);
    let free = send().timeline.steady_rate();
    assert!(free > 200e6, "{free} bit/s after detach");
}

/// Limited as a container's traffic can be: on the interface of its own namespace, which may then get a qdisc.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn a_container_with_a_namespace_of_its_own_is_limited_by_its_interface() {
    let bed = Bed::new();
    let pod = bed.pod(Limiter::Bare, MBIT);
    let path = pod.cgroup.path().to_str().unwrap().to_owned();
    let container = pod.cgroup.container("c1").unwrap();
    let _process = Running::start(pod.command("sleep").unwrap().arg("60")).unwrap();
    let in_netns = || {
        let id = std::fs::read_to_string(container.join("cgroup.procs")).unwrap().trim().to_owned();
        let comm = std::fs::read_to_string(format!("/proc/{id}/comm"));
        comm.is_ok_and(|name| name.trim() == "sleep")
    };
    assert!(within(Duration::from_secs(5), in_netns));
    let limits = ["--egress", "20M", "--ingress", "20M", "--interface"];
    // The process is in the container's cgroup, which is below the pod's.
    for cgroup in [container.to_str().unwrap(), &path] {
        let text = refuses(&[&["attach", "--cgroup", cgroup], &limits[..], &["lo"]].concat());
        assert!(text.contains("--netns /proc/"), "{cgroup}: {text}");
    }
    let netns = pod.netns.path().display().to_string();
    // Run on its node, where the other end of the veth is.
    on_node(&pod, &[&["attach", "--cgroup", &path], &limits[..], &["eth0", "--netns", &netns]].concat());
    let by = listed(&key(&pod.cgroup)).unwrap()["ingress"]["by"].clone();
    assert_ne!(by, "drops");
    for way in [Way::Out, Way::In] {
        let result = measure::bulk(&pod, &Bulk { way, flows: 2, seconds: 3.0, ..Bulk::default() }).unwrap();
        let rate = result.timeline.steady_rate();
        eprintln!("{way:?}: {rate} bit/s, ingress by {by}");
        assert!((14e6..22e6).contains(&rate), "{way:?}: {rate} bit/s");
    }
    on_node(&pod, &["detach", "--cgroup", &path]);
    let qdiscs =
        bed.host.netns.run("tc", &["qdisc", "show"]).unwrap() + &pod.netns.run("tc", &["qdisc", "show"]).unwrap();
    assert!(!qdiscs.contains(" 7064: "), "{qdiscs}");
}

#[test]
#[ignore = "needs root and the CNI plugins"]
fn connections_are_let_go_by_detach() {
    let bed = Bed::new();
    let pod = bed.pod(Limiter::Bare, MBIT);
    let path = pod.cgroup.path().to_str().unwrap().to_owned();
    says(&["attach", "--cgroup", &path, "--egress", "10M"]);
    let timeline = std::thread::scope(|scope| {
        let sending = scope.spawn(|| measure::bulk(&pod, &Bulk { seconds: 5.0, ..Bulk::default() }).unwrap());
        std::thread::sleep(Duration::from_secs(1));
        says(&["detach", "--cgroup", &path]);
        sending.join().unwrap().timeline
    });
    let after = timeline.wire_rate(4.0, 5.0);
    assert!(after > 200e6, "{after} bit/s of a connection whose limit is gone");
}

/// Ends the limit of a connection while nothing is sent on it, so that no program is called at that time. The backlog
/// has left by then.
#[track_caller]
fn assert_let_go_in_silence(pod: &Pod, way: Way, end: impl FnOnce() + Send) {
    const SILENCE: [f64; 2] = [2.0, 8.0];
    let bulk = Bulk { way, silence: Some(SILENCE), seconds: 11.0, ..Bulk::default() };
    let timeline = std::thread::scope(|scope| {
        let sending = scope.spawn(|| measure::bulk(pod, &bulk).unwrap());
        std::thread::sleep(Duration::from_secs(6));
        end();
        sending.join().unwrap().timeline
    });
    let [during, silent, after] =
        [(0.5, 1.5), (5.0, 7.5), (8.5, 11.0)].map(|(from, to)| timeline.payload_rate(from, to) / 1e6);
    let what = format!("{way:?}: {during:.1} Mbit/s, {silent:.1} when the limit ended, {after:.1} after that");
    eprintln!("{what}");
    // Emulated kernels send no more than twice the limit. In the other direction, a window that is still small would
    // allow that much.
    let least = if way == Way::Out { 15.0 } else { 50.0 };
    assert!((1.0..15.0).contains(&during) && silent == 0.0 && after > least, "{what}");
}

fn on_node(pod: &Pod, arguments: &[&str]) {
    let mut command = pod.host.command(env!("CARGO_BIN_EXE_podshaper"));
    process::run(command.args(arguments)).unwrap();
}

#[test]
#[ignore = "needs root and the CNI plugins"]
fn a_silent_connection_sends_freely_after_detach() {
    let bed = Bed::new();
    let pod = bed.pod(Limiter::Podshaper, 10 * MBIT);
    assert_let_go_in_silence(&pod, Way::Out, || on_node(&pod, &["detach", &pod.uid]));
}

#[test]
#[ignore = "needs root and the CNI plugins"]
fn a_silent_connection_receives_freely_after_detach() {
    let bed = Bed::new();
    let pod = bed.limited(Limits { egress: None, ingress: Some(10 * MBIT) });
    if has_fq(&pod) {
        // On a short path even the smallest window limits nothing.
        move_away(&pod);
    }
    assert_let_go_in_silence(&pod, Way::In, || on_node(&pod, &["detach", &pod.uid]));
}

#[test]
#[ignore = "needs root and the CNI plugins"]
fn a_silent_connection_sends_freely_after_del() {
    let bed = Bed::new();
    let pod = bed.pod(Limiter::Bare, MBIT);
    let limit = Attachment::add(call_alone(&pod, 10 * MBIT));
    assert_let_go_in_silence(&pod, Way::Out, || drop(limit));
}

#[test]
#[ignore = "needs root and the CNI plugins"]
fn a_silent_connection_is_let_go_by_a_limit_of_the_other_direction_alone() {
    let bed = Bed::new();
    let pod = bed.pod(Limiter::Bare, MBIT);
    let path = pod.cgroup.path().to_str().unwrap().to_owned();
    let attach = |direction, rate| says(&["attach", "--cgroup", &path, direction, rate]);
    attach("--egress", "10M");
    assert_let_go_in_silence(&pod, Way::Out, || drop(attach("--ingress", "500M")));
    says(&["detach", "--cgroup", &path]);
}

#[test]
#[ignore = "needs root and the CNI plugins"]
fn run_limits_its_command_and_nothing_is_left() {
    let bed = Bed::new();
    let traffic = traffic_program().unwrap();
    let pod = bed.pod(Limiter::Bare, MBIT);
    let gateway = bed.host.gateway_v4();
    let mut sink = bed.host.command(&traffic);
    let (sink, address) = Running::start_server(sink.args([
        "sink",
        "--listen",
        &format!("{gateway}:0"),
        "--seconds",
        "3",
        "--flows",
        "2",
    ]))
    .unwrap();
    let mut run = podshaper(&["run", "--egress", "20M", "--", "nsenter"]);
    run.arg(format!("--net={}", pod.netns.path().display())).arg("--").arg(&traffic);
    run.args(["send", "--to", &address.to_string(), "--flows", "2", "--seconds", "4"]);
    let mut run = run.stdout(Stdio::null()).spawn().unwrap();
    let timeline: measure::Timeline = serde_json::from_value(sink.json(Duration::from_secs(30)).unwrap()).unwrap();
    assert_rate("a command at 20 Mbit/s", timeline.steady_rate(), 20 * MBIT, 0.05);
    let id = run.id();
    assert!(run.wait().unwrap().success());
    assert_gone(id);
}

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn run_passes_the_exit_status_and_signals_on() {
    let status = |script: &str| call(&["run", "--egress", "10M", "--", "sh", "-c", script]).0;
    assert_eq!(["exit 0", "exit 7", "kill -TERM $$", "kill -KILL $$"].map(status), [0, 7, 143, 137]);
    assert_eq!(call(&["run", "--egress", "10M", "--", "no-such-command"]).0, 127);
    // Processes that the command leaves running end with the command.
    assert_eq!(status("sleep 1000 & exit 3"), 3);

    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        let mut run = podshaper(&["run", "--egress", "10M", "--", "sleep", "1000"]).spawn().unwrap();
        let directory = own_cgroup_of(run.id());
        // podshaper leaves the cgroup once the command has started.
        let is_started =
            || !is_empty(&directory) && !processes(&directory).lines().any(|id| id == run.id().to_string());
        assert!(within(Duration::from_secs(30), is_started));
        kill(Pid::from_raw(run.id() as i32), signal).unwrap();
        assert_eq!(run.wait().unwrap().code(), Some(128 + signal as i32));
        assert_gone(run.id());
    }
}

/// A signal may come at any time: with a long PATH the command is searched for in hundreds of directories while it is
/// being started.
#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn no_signal_to_run_is_lost() {
    let path = "/no:".repeat(500) + &std::env::var("PATH").unwrap();
    let mut last = None;
    for delay in (0..200).step_by(4).map(Duration::from_millis) {
        let mut command = podshaper(&["run", "--egress", "10M", "--", "sleep", "1000"]);
        let mut run = command.env("PATH", &path).spawn().unwrap();
        std::thread::sleep(delay);
        kill(Pid::from_raw(run.id() as i32), Signal::SIGTERM).unwrap();
        let has_ended = || run.try_wait().unwrap().is_some();
        if !within(Duration::from_secs(20), has_ended) {
            kill(Pid::from_raw(run.id() as i32), Signal::SIGTERM).unwrap();
            run.wait().unwrap();
            panic!("a signal {delay:?} after the start is lost");
        }
        // At first podshaper has not set up its signal handling, and the signal ends podshaper itself.
        let status = run.wait().unwrap();
        assert!(status.code() == Some(143) || status.signal() == Some(15), "{delay:?}: {status}");
        assert_gone(run.id());
        last = status.code();
    }
    assert_eq!(last, Some(143));
}

fn own_cgroup_of(id: u32) -> std::path::PathBuf {
    let own = std::fs::read_to_string("/proc/self/cgroup").unwrap();
    let own = own.lines().find_map(|line| line.strip_prefix("0::/")).unwrap();
    cgroup::mount().unwrap().join(own).join(format!("podshaper-run-{id}"))
}

fn processes(directory: &Path) -> String {
    std::fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default()
}

fn is_empty(directory: &Path) -> bool {
    processes(directory).is_empty()
}

#[track_caller]
fn assert_gone(id: u32) {
    assert!(!own_cgroup_of(id).exists(), "its cgroup is left");
    let list = says(&["list", "--sample", "0"]);
    assert!(!list.contains(&format!("podshaper-run-{id}")), "{list}");
    let left = Command::new("pgrep").args(["-f", &format!("podshaper-run-{id}")]).output().unwrap();
    assert_eq!(left.stdout, b"");
}
