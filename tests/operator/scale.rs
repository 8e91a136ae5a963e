//! Many pods, and the costs of looking at them. The bounds allow for a busy machine and a build without optimisation.
//! To get the numbers:
//!
//! ```sh
//! cargo test --release --test tests -- --ignored --nocapture --test-threads=1 operator::scale
//! ```

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use serde_json::Value;

use super::{alone, podshaper, says};
use crate::harness::measure;
use crate::harness::pod::container_id;
use crate::harness::process;
use crate::sandbox::{Objects, PINS, Sandbox, netns_with, ok, within};

/// How many times longer than promised a build without optimisation may take.
const SLACK: f64 = if cfg!(debug_assertions) { 10.0 } else { 1.0 };
const PARALLEL: usize = 8;
const PODS: usize = 500;

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn five_hundred_attachments_are_listed_in_a_moment() {
    let _alone = measure::alone();
    alone(|| {
        let netns = Arc::new(netns_with(&["eth0"]));
        let pods: Vec<Sandbox> = (0..PODS).map(|_| Sandbox::with_netns(Arc::clone(&netns))).collect();
        // On this thread, since the calls share its mounts.
        for some in pods.chunks(PARALLEL) {
            add_all(some);
        }
        let list = |_| {
            let start = Instant::now();
            let text = says(&["list", "--sample", "0"]);
            let elapsed = start.elapsed();
            assert_eq!(text.lines().count(), PODS + 1);
            (elapsed, walk())
        };
        let (mut times, walks): (Vec<Duration>, Vec<Duration>) = (0..11).map(list).unzip();
        times.sort();
        let (best, median) = (times[0], times[times.len() / 2]);
        let json = says(&["list", "-o", "json", "--sample", "0"]);
        assert_eq!(serde_json::from_str::<Value>(&json).unwrap().as_array().unwrap().len(), PODS);
        let slack = SLACK * slowness(walks.into_iter().min().unwrap());
        eprintln!(
            "list of {PODS}: {best:?} at best, {median:?} in the middle; {slack:.1} times the promised are allowed"
        );
        assert!(best < Duration::from_millis(100).mul_f64(slack), "{best:?}, {slack} times the promised are allowed");
        let (share, walk) = cpu_of_top();
        let slack = SLACK * slowness(walk);
        eprintln!("top of {PODS}: {:.2} % of a core; {slack:.1} times the promised are allowed", share * 100.0);
        assert!(share < 0.02 * slack, "top took {share} of a core, {slack} times the promised are allowed");
        pods.iter().for_each(|pod| drop(pod.call("DEL")));
    });
}

/// The factor, at least 1, for a kernel that takes this long for a [`walk`], compared with a usual kernel. In User
/// Mode Linux each system call is a switch of processes, and which system calls are slowest differs.
pub(super) fn slowness(walk: Duration) -> f64 {
    const USUAL: Duration = Duration::from_micros(2500);
    let times = walk.div_duration_f64(USUAL);
    if times <= 1.0 { 1.0 } else { 2.0 * times }
}

/// The CPU time, including what a virtual machine's host takes of it, for a walk through the directories of the pins,
/// which `list` reads as well.
pub(super) fn walk() -> Duration {
    let cpu_time = || {
        let usage = getrusage(UsageWho::RUSAGE_THREAD).unwrap();
        let time = usage.user_time() + usage.system_time();
        Duration::from_micros(time.num_microseconds().unsigned_abs())
    };
    let start = cpu_time();
    let pods = fs::read_dir(PINS).unwrap().flatten().filter(|pod| pod.path().is_dir());
    let found: usize = pods.map(|pod| fs::read_dir(pod.path()).unwrap().count()).sum();
    assert!(found >= PODS);
    cpu_time() - start
}

/// Makes calls that run at the same time, all started by this thread.
fn add_all(pods: &[Sandbox]) {
    let calls: Vec<_> = pods
        .iter()
        .map(|pod| {
            let mut child = pod.cni("ADD").command().stdout(std::process::Stdio::null()).spawn().unwrap();
            let stdin = Value::Object(pod.stdin.clone()).to_string();
            std::io::Write::write_all(&mut child.stdin.take().unwrap(), stdin.as_bytes()).unwrap();
            child
        })
        .collect();
    for mut call in calls {
        assert!(call.wait().unwrap().success());
    }
}

/// The share of a core that `top` takes on a terminal after its start, and the mean time of a [`walk`] meanwhile.
fn cpu_of_top() -> (f64, Duration) {
    const WALKS: u32 = 10;
    let program = env!("CARGO_BIN_EXE_podshaper");
    let line = format!("stty rows 50 cols 160; exec {program} top");
    let mut script = Command::new("script");
    script.args(["-qec", &line, "/dev/null"]).stdout(std::process::Stdio::null());
    let mut script = script.stdin(std::process::Stdio::piped()).spawn().unwrap();
    let mut top = None;
    let found = within(Duration::from_secs(5), || {
        let children = format!("/proc/{0}/task/{0}/children", script.id());
        top = fs::read_to_string(children).ok().and_then(|ids| ids.split(' ').next()?.parse::<u32>().ok());
        top.is_some_and(|id| {
            fs::read_to_string(format!("/proc/{id}/comm")).is_ok_and(|name| name.trim() == "podshaper")
        })
    });
    assert!(found, "top did not start");
    let ticks = || {
        let stat = fs::read_to_string(format!("/proc/{}/stat", top.unwrap())).unwrap();
        let fields: Vec<u64> =
            stat.rsplit(") ").next().unwrap().split(' ').filter_map(|field| field.parse().ok()).collect();
        // utime and stime are the 14th and 15th of all fields. The fields before ") " and the state letter are left
        // out here.
        fields[10] + fields[11]
    };
    thread::sleep(Duration::from_millis(1200));
    let (before, start) = (ticks(), Instant::now());
    let walks = (0..WALKS).map(|_| {
        thread::sleep(Duration::from_millis(500));
        walk()
    });
    let walk = walks.sum::<Duration>() / WALKS;
    let share = (ticks() - before) as f64 / 100.0 / start.elapsed().as_secs_f64();
    let _ = std::io::Write::write_all(&mut script.stdin.take().unwrap(), b"q");
    assert!(script.wait().unwrap().success());
    (share, walk)
}

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn a_thousand_adds_and_dels_leave_nothing() {
    const CALLS: usize = 1000;
    let _alone = measure::alone();
    let (programs, memory) = (loaded(), kernel_kib());
    let netns = Arc::new(netns_with(&["eth0"]));
    let pods: Vec<Sandbox> = (0..PARALLEL).map(|_| Sandbox::with_netns(Arc::clone(&netns))).collect();
    let start = Instant::now();
    thread::scope(|scope| {
        for pod in &pods {
            scope.spawn(|| {
                let mut objects = Objects::default();
                for round in 0..CALLS / PARALLEL {
                    let id = container_id().unwrap();
                    ok(&pod.cni_of("ADD", &id));
                    // bpftool takes longer than both calls.
                    if round % 25 == 0 {
                        objects.extend(pod.objects());
                    }
                    ok(&pod.cni_of("DEL", &id));
                }
                pod.assert_unlimited();
                objects.assert_freed();
            });
        }
    });
    let elapsed = start.elapsed();
    // Other tests and other pods may load programs meanwhile, but not as many as a thousand leaks would be: three
    // thousand programs and 40 MB.
    let more = || loaded().difference(&programs).count();
    let lost = || kernel_kib() - memory;
    within(Duration::from_secs(10), || more() == 0 && lost() < 1024);
    let (left, lost) = (more(), lost());
    eprintln!(
        "{CALLS} ADDs and DELs, {PARALLEL} at once: {elapsed:?}; {left} programs and {lost} KiB of the kernel's more than before"
    );
    assert!(left < 300, "{left} programs are left");
    assert!(lost < 20 * 1024, "{lost} KiB are lost");
}

/// Ids of podshaper's programs in the kernel.
fn loaded() -> BTreeSet<u64> {
    let show = || process::run(Command::new("bpftool").args(["-j", "prog", "show"])).ok();
    let text = (0..5).find_map(|_| show()).unwrap();
    let all: Value = serde_json::from_str(&text).unwrap();
    let ours = ["count_egress", "count_ingress", "pace_tcp", "hold_acks", "note_setsockopt"];
    let is_ours = |program: &&Value| {
        ours.iter().any(|name| program["name"].as_str().unwrap_or_default().starts_with(&name[..name.len().min(15)]))
    };
    all.as_array().unwrap().iter().filter(is_ours).map(|program| program["id"].as_u64().unwrap()).collect()
}

/// The kernel's own memory: objects, per-CPU memory, and vmalloc pages such as those of programs and maps.
fn kernel_kib() -> i64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap();
    let kib = |name: &str| -> i64 {
        let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split_whitespace().next().unwrap().parse().unwrap()
    };
    ["SUnreclaim:", "Percpu:", "VmallocUsed:"].map(kib).iter().sum()
}

/// `list` succeeds while other pods come and go.
#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn reading_while_pods_come_and_go_fails_never() {
    let netns = Arc::new(netns_with(&["eth0"]));
    let pods: Vec<Sandbox> = (0..4).map(|_| Sandbox::with_netns(Arc::clone(&netns))).collect();
    thread::scope(|scope| {
        for pod in &pods {
            scope.spawn(|| {
                for _ in 0..20 {
                    pod.call("ADD");
                    pod.call("DEL");
                }
            });
        }
        for _ in 0..40 {
            let output = podshaper(&["list", "--sample", "0"]).output().unwrap();
            assert!(output.status.success() && output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
            assert!(podshaper(&["metrics"]).output().unwrap().status.success());
        }
    });
}
