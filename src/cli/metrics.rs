//! `podshaper metrics`: every attachment in Prometheus' text format, most often for node_exporter's textfile
//! collector.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use clap::Args;
use podshaper_abi::{BACKLOG_BUCKETS, Counters, backlog_bucket_end_ns};

use super::{
    attachments::{self, Attachment, Measured},
    directories::Directories,
    doctor::conflists,
    install, output,
    sync::{self, Failure, LastRun},
};
use crate::error::{Code, Error, Result};

/// The numbers of the histogram's buckets that are exported: 0.13 ms, 1, 4, 8, 17, 67, 268 ms and 1.1 s. All buckets
/// would be 32 series for each direction.
const BUCKETS: [usize; 8] = [7, 10, 12, 13, 14, 16, 18, 20];
/// Nanoseconds in a second.
const SECOND: f64 = 1e9;

#[derive(Args)]
pub struct Arguments {
    /// Write to this file, all at once, instead of stdout: a *.prom in the directory of node_exporter's textfile
    /// collector
    #[arg(long, value_name = "FILE")]
    textfile: Option<PathBuf>,
    /// Where the runtime reads its network configuration [default: what containerd, k3s or RKE2 says, else
    /// /etc/cni/net.d]
    #[arg(long, value_name = "DIRECTORY")]
    conf_dir: Option<PathBuf>,
    /// Directory in which the runtime's CNI library keeps the results of its calls
    #[arg(long, value_name = "DIRECTORY", default_value = sync::CACHE_DIR)]
    cache_dir: PathBuf,
}

impl Arguments {
    pub fn run(self) -> Result<()> {
        let mut found = attachments::read()?;
        attachments::look_whether_held(&mut found);
        for attachment in &found {
            if let Some(problem) = &attachment.problem {
                log::warn!("leave out {} {}: {problem}", attachment.place.pod, attachment.place.interface);
            }
        }
        let conf_dir = Directories::of_this_node(self.conf_dir.as_deref(), None).conf;
        let text = text(&found)
            + &of_node(&conf_dir, &self.cache_dir)
            + &LastRun::recall().map(|run| of_sync(&run)).unwrap_or_default();
        match &self.textfile {
            None => output::print(&text),
            Some(path) => write(path, &text),
        }
    }
}

/// One metric: its name without "podshaper_", its type, its help text, and its value for a direction, if there is one.
type Metric = (&'static str, &'static str, &'static str, fn(&Measured) -> Option<f64>);

const METRICS: [Metric; 10] = [
    ("limit_bytes_per_second", "gauge", "Rate of the limit, in bytes at layer 3.", |direction| {
        Some(direction.rate.as_bits_per_s() as f64 / 8.0)
    }),
    ("burst_bytes", "gauge", "What may be sent at once.", |direction| Some(direction.burst.as_bytes() as f64)),
    ("bytes_total", "counter", "Bytes at layer 3 that passed.", |direction| Some(direction.counters.bytes as f64)),
    ("packets_total", "counter", "Packets that passed.", |direction| Some(direction.counters.packets as f64)),
    ("dropped_packets_total", "counter", "Packets dropped for being over the limit.", |direction| {
        Some(direction.counters.drops as f64)
    }),
    ("marked_packets_total", "counter", "Packets that passed with a congestion mark.", |direction| {
        Some(direction.counters.marks as f64)
    }),
    (
        "other_paths_held",
        "gauge",
        "0 where what passes by other paths than the pod's sockets is not held; none where the limit is for sockets alone.",
        |direction| direction.others.are_held().map(|held| f64::from(u8::from(held))),
    ),
    ("other_paths_bytes_total", "counter", "Bytes that passed and no socket of the pod sent or got.", |direction| {
        Some(direction.others.counted().map_or(0.0, |others| others.bytes as f64))
    }),
    (
        "other_paths_dropped_packets_total",
        "counter",
        "Packets of that kind dropped for being over the limit.",
        |direction| Some(direction.others.counted().map_or(0.0, |others| others.drops as f64)),
    ),
    ("max_backlog_seconds", "gauge", "Largest virtual backlog a packet found.", |direction| {
        Some(direction.counters.max_backlog_ns as f64 / SECOND)
    }),
];

fn head(text: &mut String, name: &str, kind: &str, help: &str) {
    *text += &format!("# HELP podshaper_{name} {help}\n# TYPE podshaper_{name} {kind}\n");
}

fn text(found: &[Attachment]) -> String {
    let mut text = String::new();
    head(&mut text, "build_info", "gauge", "The podshaper that wrote this.");
    text += &format!("podshaper_build_info{{version=\"{}\"}} 1\n", env!("CARGO_PKG_VERSION"));
    head(&mut text, "attachment_info", "gauge", "What is attached, with what holds it.");
    found.iter().for_each(|attachment| text += &info(attachment));
    head(
        &mut text,
        "attachment_live",
        "gauge",
        "Whether all programs of the attachment are on its cgroup, and its network namespace is the one it was made in.",
    );
    for attachment in found {
        let is_live = u8::from(attachment.is_whole() && !attachment.has_lost_namespace());
        text += &format!("podshaper_attachment_live{{{}}} {is_live}\n", labels(attachment));
    }
    let help = "0 where somebody has taken off a filter or a queue that holds the attachment.";
    head(&mut text, "attachment_held", "gauge", help);
    for attachment in found {
        let is_held = u8::from(attachment.not_held.is_none());
        text += &format!("podshaper_attachment_held{{{}}} {is_held}\n", labels(attachment));
    }
    for (name, kind, help, value) in METRICS {
        head(&mut text, name, kind, help);
        for (labels, direction) in directions(found) {
            text +=
                &value(direction).map_or_else(String::new, |value| format!("podshaper_{name}{{{labels}}} {value}\n"));
        }
    }
    let help = "Virtual backlog that packets found; the sum is reckoned from the middles of the kernel's buckets.";
    head(&mut text, "backlog_seconds", "histogram", help);
    directions(found).for_each(|(labels, direction)| text += &histogram(&labels, &direction.counters));
    text
}

/// The metrics of the node: whether pods of this node get their limits.
fn of_node(conf_dir: &Path, cache_dir: &Path) -> String {
    let mut text = String::new();
    let mut gauge = |name: &str, help: &str, value: usize| {
        head(&mut text, name, "gauge", help);
        text += &format!("podshaper_{name} {value}\n");
    };
    if let Some(is_in_it) = conflists::has_podshaper(conf_dir) {
        let help = "Whether podshaper is in the conflist by which pods are made; none where that cannot be read.";
        gauge("in_conflist", help, is_in_it.into());
    }
    let are_enabled = install::not_enabled().is_empty();
    gauge("units_enabled", "Whether systemd, where it runs, has podshaper's units enabled.", are_enabled.into());
    match sync::unlimited(conf_dir, cache_dir) {
        Ok(names) => gauge("unlimited_pods", "Interfaces of pods without the limit that they ask for.", names.len()),
        Err(error) => log::warn!("leave out podshaper_unlimited_pods: {error}"),
    }
    text
}

/// The metrics of the last `podshaper sync`.
fn of_sync(LastRun { ended_at_s, failures, error }: &LastRun) -> String {
    let mut text = String::new();
    head(&mut text, "sync_timestamp_seconds", "gauge", "When podshaper sync last ended.");
    text += &format!("podshaper_sync_timestamp_seconds {ended_at_s}\n");
    head(&mut text, "sync_failed", "gauge", "Whether it knew or did less than it should have.");
    text += &format!("podshaper_sync_failed {}\n", u8::from(error.is_some() || !failures.is_empty()));
    head(
        &mut text,
        "pod_not_limited_as_asked",
        "gauge",
        "The pods whose limits podshaper sync could not make what they ask for.",
    );
    for Failure { namespace, pod, uid, interface, error: _ } in failures {
        let [namespace, pod] = [namespace, pod].map(|name| name.as_deref().unwrap_or_default());
        let labels = [("namespace", namespace), ("pod", pod), ("uid", uid), ("interface", interface)];
        let labels = labels.map(|(name, value)| format!("{name}=\"{}\"", escape(value))).join(",");
        text += &format!("podshaper_pod_not_limited_as_asked{{{labels}}} 1\n");
    }
    text
}

fn directions(found: &[Attachment]) -> impl Iterator<Item = (String, &Measured)> {
    found.iter().flat_map(|attachment| {
        attachment
            .directions()
            .map(|(direction, measured)| (format!("{},direction=\"{direction}\"", labels(attachment)), measured))
    })
}

/// The labels of an attachment. The UID is one of them: a pod that was made again may have the name of one that is
/// still being removed.
fn labels(attachment: &Attachment) -> String {
    let owner = &attachment.owner;
    let namespace = owner.pod_namespace.as_deref().unwrap_or_default();
    let name = attachment.name();
    let pod = owner.pod_name.as_deref().unwrap_or(&name);
    let labels = [
        ("namespace", namespace),
        ("pod", pod),
        ("uid", &attachment.place.pod),
        ("interface", &attachment.place.interface),
    ];
    labels.map(|(name, value)| format!("{name}=\"{}\"", escape(value))).join(",")
}

fn info(attachment: &Attachment) -> String {
    let by =
        |direction: &Option<Measured>| direction.as_ref().map(|direction| direction.by.clone()).unwrap_or_default();
    format!(
        "podshaper_attachment_info{{{},network=\"{}\",cgroup=\"{}\",egress_by=\"{}\",ingress_by=\"{}\"}} 1\n",
        labels(attachment),
        escape(&attachment.owner.network),
        escape(&attachment.owner.cgroup),
        escape(&by(&attachment.egress)),
        escape(&by(&attachment.ingress)),
    )
}

fn histogram(labels: &str, counters: &Counters) -> String {
    let name = "podshaper_backlog_seconds";
    let packets: u64 = counters.backlog.iter().sum();
    let mut text = String::new();
    for bucket in BUCKETS {
        let below: u64 = counters.backlog.iter().take(bucket + 1).sum();
        let end = backlog_bucket_end_ns(bucket).map_or(f64::INFINITY, |ns| ns as f64 / SECOND);
        text += &format!("{name}_bucket{{{labels},le=\"{end}\"}} {below}\n");
    }
    let middles =
        (0..BACKLOG_BUCKETS).map(|bucket| backlog_bucket_end_ns(bucket).map_or(1 << 41, |end_ns| end_ns * 3 / 4));
    let sum: f64 = counters.backlog.iter().zip(middles).map(|(count, ns)| *count as f64 * ns as f64 / SECOND).sum();
    text += &format!("{name}_bucket{{{labels},le=\"+Inf\"}} {packets}\n");
    text + &format!("{name}_sum{{{labels}}} {sum}\n{name}_count{{{labels}}} {packets}\n")
}

/// Escapes a label's value for the text format.
fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// Writes a file under another name, which the collector does not read, and renames it. So no reader sees a part of
/// the file.
fn write(path: &Path, text: &str) -> Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}", std::process::id()));
    let beside = PathBuf::from(name);
    let written = write_whole(&beside, text).and_then(|()| fs::rename(&beside, path));
    written.map_err(|cause| {
        let _ = fs::remove_file(&beside);
        Error::because(Code::Io, format!("write {} (its directory must exist)", path.display()), cause)
    })
}

fn write_whole(path: &Path, text: &str) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(text.as_bytes())?;
    // Without the sync the new name could stand for an empty file after a power cut.
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn label_values_cannot_end_early() {
        assert_eq!(escape("a\"b\\c\nd"), r#"a\"b\\c\nd"#);
    }

    #[test]
    fn the_histogram_is_cumulative_and_ends_with_all() {
        let mut counters = Counters::default();
        counters.backlog[0] = 3;
        counters.backlog[13] = 4;
        counters.backlog[BACKLOG_BUCKETS - 1] = 1;
        let text = histogram("pod=\"a\"", &counters);
        let values: Vec<_> = text.lines().filter_map(|line| line.rsplit(' ').next()).collect();
        assert_eq!(values[..9], ["3", "3", "3", "7", "7", "7", "7", "7", "8"], "{text}");
        assert_eq!(values[10], "8");
        assert!(text.starts_with("podshaper_backlog_seconds_bucket{pod=\"a\",le=\"0.000131072\"} 3\n"), "{text}");
    }

    #[test]
    fn a_file_is_replaced_whole_and_nothing_is_left_beside_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("podshaper.prom");
        write(&path, "old").unwrap();
        write(&path, "new").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "new");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
        let nowhere = directory.path().join("none/podshaper.prom");
        assert_eq!(
            write(&nowhere, "").unwrap_err().to_string(),
            format!("write {} (its directory must exist): No such file or directory (os error 2)", nowhere.display())
        );
    }
}
