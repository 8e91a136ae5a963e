use std::fs;
use std::path::Path;
use std::process::Command;

use super::{listed, refuses, says};
use crate::harness::cgroup::{self, PodCgroup};
use crate::harness::netns::Netns;
use crate::harness::{process, unique};
use crate::sandbox::{builds_large_packets, netns_with_host_end, own_qdiscs, sizes};

/// A cgroup whose processes could be in a network namespace with an interface of its own.
struct Limited<'a> {
    cgroup: PodCgroup,
    netns: &'a Netns,
}

impl<'a> Limited<'a> {
    fn new(netns: &'a Netns) -> Self {
        Self { cgroup: PodCgroup::new(cgroup::mount().unwrap().join(unique("namespace"))).unwrap(), netns }
    }

    fn path(&self) -> &str {
        self.cgroup.path().to_str().unwrap()
    }

    /// The arguments of an attach with these limits, and with this path of the namespace.
    fn arguments<'b>(&'b self, netns: &'b str, limits: &[&'b str]) -> Vec<&'b str> {
        [&["attach", "--cgroup", self.path(), "--netns", netns, "--interface", "eth0"], limits].concat()
    }

    fn attach(&self, limits: &[&str]) {
        let netns = self.netns.path().display().to_string();
        says(&self.arguments(&netns, limits));
    }

    fn detach(&self) {
        says(&["detach", "--cgroup", self.path()]);
    }

    fn ingress_by(&self) -> serde_json::Value {
        self.by("ingress")
    }

    fn egress_by(&self) -> serde_json::Value {
        self.by("egress")
    }

    fn by(&self, direction: &str) -> serde_json::Value {
        listed(&key(self.cgroup.path())).unwrap()[direction]["by"].clone()
    }
}

fn key(cgroup: &Path) -> String {
    use std::os::unix::fs::MetadataExt;
    format!("cgroup-{}", fs::metadata(cgroup).unwrap().ino())
}

fn qdiscs(netns: &Netns, host_end: &str) -> String {
    let outside = process::run(Command::new("tc").args(["qdisc", "show", "dev", host_end])).unwrap();
    outside + &netns.run("tc", &["qdisc", "show", "dev", "eth0"]).unwrap()
}

/// The second attach fails after it has changed the interface, since the namespace's path is too long for the record.
#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn a_failed_attach_leaves_the_limit_before_it_whole() {
    let (netns, host_end) = netns_with_host_end();
    let cgroup = Limited::new(&netns);
    let before = sizes(&netns);
    cgroup.attach(&["--egress", "100M", "--ingress", "100M"]);
    let limited = (sizes(&netns), qdiscs(&netns, &host_end));
    let too_long = format!("{}{}", "/./".repeat(1350), netns.path().display());
    let text = refuses(&cgroup.arguments(&too_long, &["--egress", "10M", "--ingress", "10M"]));
    assert!(text.contains("record whose attachment this is"), "{text}");
    assert_eq!((sizes(&netns), qdiscs(&netns, &host_end)), limited);
    cgroup.detach();
    assert_eq!((sizes(&netns), own_qdiscs(&netns, &host_end)), (before, 0));
}

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn attached_again_for_egress_alone_no_queue_of_before_is_left() {
    let (netns, host_end) = netns_with_host_end();
    let cgroup = Limited::new(&netns);
    cgroup.attach(&["--ingress", "10M"]);
    let by = cgroup.ingress_by();
    assert_eq!(own_qdiscs(&netns, &host_end), usize::from(by != "drops"), "{by}");
    cgroup.attach(&["--egress", "10M"]);
    // fq also paces egress; htb serves egress only.
    let own = usize::from(cgroup.egress_by() != "pacing");
    assert_eq!(own_qdiscs(&netns, &host_end), own, "{}", qdiscs(&netns, &host_end));
    assert!(!qdiscs(&netns, &host_end).contains("qdisc tbf"), "{}", qdiscs(&netns, &host_end));
    cgroup.detach();
    assert_eq!(own_qdiscs(&netns, &host_end), 0);
}

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn of_two_limits_on_one_interface_each_goes_alone() {
    let (netns, host_end) = netns_with_host_end();
    let (first, second) = (Limited::new(&netns), Limited::new(&netns));
    let before = sizes(&netns);
    first.attach(&["--egress", "10M", "--ingress", "10M"]);
    let limited = (sizes(&netns), qdiscs(&netns, &host_end));
    second.attach(&["--egress", "10M", "--ingress", "20M"]);
    // tbf limits everything that an interface receives, so there is only the first limit's tbf.
    assert_eq!((sizes(&netns), qdiscs(&netns, &host_end)), limited);
    // There is also only the first limit's htb.
    assert_eq!(second.egress_by(), if first.egress_by() == "pacing+fq" { "pacing+fq" } else { "pacing" });
    assert_eq!(second.ingress_by(), if first.ingress_by() == "held-acks" { "held-acks" } else { "drops" });
    second.detach();
    assert_eq!((sizes(&netns), qdiscs(&netns, &host_end)), limited);
    second.attach(&["--egress", "10M"]);
    first.detach();
    if builds_large_packets() {
        assert_eq!(sizes(&netns), limited.0);
    }
    let fq = |text: &str| text.contains("qdisc fq 7064:");
    assert_eq!(fq(&qdiscs(&netns, &host_end)), fq(&limited.1));
    second.detach();
    assert_eq!((sizes(&netns), own_qdiscs(&netns, &host_end)), (before, 0));
}
