//! With the real programs: promtool checks the text, and Prometheus scrapes node_exporter, which reads the file.

use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use super::{call, limited_both_ways, listed, refuses, says};
use crate::api::{ApiServer, Reply};
use crate::chain::{Bed, MBIT};
use crate::harness::limiter::{Limiter, Limits};
use crate::harness::process;
use crate::kernel::mounts;
use crate::sandbox::{Sandbox, within};

/// A process that is killed and reaped on drop.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Daemon {
    fn start(program: &str, arguments: &[String], log: &Path) -> Self {
        let log = fs::File::create(log).unwrap();
        let child = Command::new(program).args(arguments).stdout(Stdio::null()).stderr(log).spawn();
        Self(child.unwrap_or_else(|error| panic!("start {program}: {error}")))
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn promtool(arguments: &[&str], stdin: &str) -> (bool, String) {
    let mut child = Command::new("promtool")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(stdin.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    (output.status.success(), String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
}

#[test]
#[ignore = "needs root, bpffs and prometheus"]
fn promtool_finds_nothing_to_say() {
    let pod = limited_both_ways(None);
    pod.call("ADD");
    let text = says(&["metrics"]);
    let series = format!("podshaper_limit_bytes_per_second{{namespace=\"default\",pod=\"web\",uid=\"{}\"", pod.uid);
    assert!(text.contains(&format!("{series},interface=\"eth0\",direction=\"egress\"}} 1250000\n")), "{text}");
    assert_eq!(promtool(&["check", "metrics"], &text), (true, String::new()), "{text}");
    pod.call("DEL");
}

#[test]
#[ignore = "needs root, bpffs and prometheus"]
fn prometheus_gets_them_by_node_exporter() {
    let pod = limited_both_ways(None);
    pod.call("ADD");
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).display().to_string();
    fs::create_dir(at("textfile")).unwrap();
    let file = at("textfile/podshaper.prom");
    assert_eq!(says(&["metrics", "--textfile", &file]), "");
    assert!(refuses(&["metrics", "--textfile", &at("nowhere/podshaper.prom")]).contains("its directory must exist"));

    let (exporter, server) = (free_port(), free_port());
    let config = format!(
        "scrape_configs: [{{ job_name: node, scrape_interval: 1s, scrape_timeout: 1s, \
         static_configs: [{{ targets: [\"127.0.0.1:{exporter}\"] }}] }}]"
    );
    fs::write(at("prometheus.yml"), config).unwrap();
    let _exporter = Daemon::start(
        "prometheus-node-exporter",
        &[
            format!("--web.listen-address=127.0.0.1:{exporter}"),
            "--collector.disable-defaults".into(),
            "--collector.textfile".into(),
            format!("--collector.textfile.directory={}", at("textfile")),
        ],
        Path::new(&at("exporter.log")),
    );
    let _server = Daemon::start(
        "prometheus",
        &[
            format!("--config.file={}", at("prometheus.yml")),
            format!("--storage.tsdb.path={}", at("data")),
            format!("--web.listen-address=127.0.0.1:{server}"),
        ],
        Path::new(&at("prometheus.log")),
    );
    let url = format!("http://127.0.0.1:{server}");
    let query = |expression: &str| -> Option<Value> {
        let answer = process::run(Command::new("promtool").args(["query", "instant", "-o", "json", &url, expression]));
        serde_json::from_str(&answer.ok()?).ok()
    };
    let value = |expression: &str| {
        let answer = query(expression)?;
        answer.get(0)?.get("value")?.get(1)?.as_str()?.parse::<f64>().ok()
    };
    let of_pod = format!("{{uid=\"{}\",direction=\"ingress\"}}", pod.uid);
    let limit = format!("podshaper_limit_bytes_per_second{of_pod}");
    let logs =
        || ["exporter.log", "prometheus.log"].map(|name| fs::read_to_string(at(name)).unwrap_or_default()).join("\n");
    assert!(within(Duration::from_secs(40), || value(&limit) == Some(2_500_000.0)), "{}", logs());
    // Prometheus recognises the histogram, and the scrape had no error.
    let quantile = format!("count(podshaper_backlog_seconds_bucket{of_pod})");
    assert_eq!(value(&quantile), Some(9.0), "{}", logs());
    assert_eq!(value("node_textfile_scrape_error"), Some(0.0), "{}", logs());
    assert_eq!(value(&format!("podshaper_attachment_live{{uid=\"{}\"}}", pod.uid)), Some(1.0));

    // Prometheus can answer every query of the dashboard.
    for expression in dashboard_expressions() {
        let (parses, said) = promtool(&["query", "instant", &url, &expression], "");
        assert!(parses, "{expression}: {said}");
    }
    pod.call("DEL");
    says(&["metrics", "--textfile", &file]);
    let current = || query(&limit).is_some_and(|answer| answer.as_array().is_some_and(Vec::is_empty));
    assert!(within(Duration::from_secs(20), current), "still there: {:?}", query(&limit));
}

/// 1 where the host end of a veth holds traffic by other paths, 0 where nothing does, and no series where the limit
/// is for sockets only.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn other_paths_are_held_or_not_or_there_are_none() {
    let both = Limits { egress: Some(MBIT), ingress: Some(MBIT) };
    let series = |key: &str| -> Vec<String> {
        let label = format!("uid=\"{key}\"");
        let text = says(&["metrics"]);
        let lines =
            text.lines().filter(|line| line.starts_with("podshaper_other_paths_held{") && line.contains(&label));
        lines.map(|line| line.rsplit(' ').next().unwrap().to_owned()).collect()
    };
    let bed = Bed::new();
    for (keys, expected) in [(json!({}), "1"), (json!({ "otherPaths": false }), "0")] {
        // Without an ingress limit: without fq, a tbf at the host end would hold ingress in any case.
        let pod = bed.pod_of(bed.host.bridge_chain().unwrap(), keys, Limits { ingress: None, ..both });
        assert_eq!(series(&pod.uid), [expected]);
    }
    let pod = bed.pod(Limiter::Bare, MBIT);
    let path = pod.cgroup.path().to_str().unwrap();
    says(&["attach", "--cgroup", path, "--egress", "1M", "--ingress", "1M"]);
    let key = format!("cgroup-{}", fs::metadata(path).unwrap().ino());
    assert!(listed(&key).is_some());
    assert_eq!(series(&key), [""; 0]);
    says(&["detach", "--cgroup", path]);
}

/// 1 if both units are enabled, else 0. Without systemd there are no units to enable, which counts as 1.
#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn units_are_enabled_or_not() {
    mounts::with_own(|| {
        ["/run", "/etc"].iter().for_each(|path| mounts::empty(Path::new(path)));
        let is = |expected: u8| {
            let text = says(&["metrics"]);
            assert!(text.contains(&format!("\npodshaper_units_enabled {expected}\n")), "not {expected}: {text}");
        };
        is(1);
        fs::create_dir_all("/run/systemd/system").unwrap();
        is(0);
        for (enabled, expected) in
            [("paths.target.wants/podshaper.path", 0), ("timers.target.wants/podshaper.timer", 1)]
        {
            let unit = Path::new("/etc/systemd/system").join(enabled);
            fs::create_dir_all(unit.parent().unwrap()).unwrap();
            fs::write(unit, "").unwrap();
            is(expected);
        }
    });
}

/// No series where it is not known. Nobody is asked for it: a collector reads the metrics every few seconds.
#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn podshaper_is_in_the_conflist_or_not_or_that_is_not_known() {
    let directory = tempfile::tempdir().unwrap();
    let server = ApiServer::start(Reply::status("403 Forbidden", "no")).unwrap();
    let kubeconfig = server.kubeconfig(&json!({}), &json!({})).unwrap();
    let rules = json!([{ "labels": { "tier": "free" }, "max": { "egress": "5M" } }]);
    let podshaper = json!({ "type": "podshaper", "kubeconfig": kubeconfig, "namespaces": rules });
    let list = |plugins: &[&Value]| json!({ "cniVersion": "1.0.0", "name": "net", "plugins": plugins }).to_string();
    let series = |conf: &Path| {
        let text = says(&["metrics", "--conf-dir", conf.to_str().unwrap()]);
        text.contains("podshaper_in_conflist").then(|| text.contains("\npodshaper_in_conflist 1\n"))
    };
    let bridge = json!({ "type": "bridge" });
    assert_eq!(series(directory.path()), None, "an empty directory");
    assert_eq!(series(&directory.path().join("nowhere")), None);
    for (text, expected) in
        [("{".to_owned(), None), (list(&[&bridge]), Some(false)), (list(&[&bridge, &podshaper]), Some(true))]
    {
        fs::write(directory.path().join("10-net.conflist"), &text).unwrap();
        assert_eq!(series(directory.path()), expected, "{text}");
    }
    assert_eq!(server.requests(), [""; 0]);
}

/// All expressions of the Grafana dashboard, with values for its variables.
fn dashboard_expressions() -> Vec<String> {
    let text = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/install/grafana-dashboard.json")).unwrap();
    let dashboard: Value = serde_json::from_str(&text).unwrap();
    let panels = dashboard["panels"].as_array().unwrap().iter();
    let targets = panels.filter_map(|panel| panel["targets"].as_array()).flatten();
    let expressions = targets.map(|target| target["expr"].as_str().unwrap().to_owned());
    let filled = |text: String| {
        let text = text.replace("$__rate_interval", "1m").replace("$__range", "1h");
        ["namespace", "pod", "instance"].iter().fold(text, |text, name| text.replace(&format!("${name}"), ".*"))
    };
    let found: Vec<_> = expressions.map(filled).collect();
    assert!(found.len() > 5 && found.iter().all(|text| text.contains("podshaper_")), "{found:?}");
    found
}

/// If two attachments had the same labels, the collector would refuse the whole file: the older pod of the same name
/// may still exist.
#[test]
#[ignore = "needs root, bpffs and prometheus"]
fn pods_of_one_name_are_told_apart() {
    let pods: Vec<Sandbox> = (0..2).map(|_| limited_both_ways(None)).collect();
    pods.iter().for_each(|pod| drop(pod.call("ADD")));
    let (code, text, _) = call(&["metrics"]);
    let series: Vec<&str> =
        text.lines().filter(|line| !line.starts_with('#')).map(|line| line.rsplit_once(' ').unwrap().0).collect();
    let mut unique = series.clone();
    unique.sort_unstable();
    unique.dedup();
    assert_eq!((code, unique.len()), (0, series.len()));
}
