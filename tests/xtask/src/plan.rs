//! Which tests run on which kernel, in which order, and the approximate time with two cores.

use crate::lane::Lane;
use crate::stages::{self, Session};
use crate::{lints, nodes};

/// Tests that send traffic or measure times: they run one after the other, without anything beside them.
pub const ALONE: &[&str] = &[
    "chain::",
    "conflist_examples::",
    "selftest::",
    "operator::delegate::what_delegation_costs",
    "operator::scale::",
    "operator::set::",
    "operator::upgrade::running",
    "a_node_of_250",
];

/// Tests that compare a rate or a time with a bound. A small and busy machine disturbs such tests, so they may be
/// tried again.
const MEASURING: &[&str] = &[
    "chain::beside::",
    "chain::flows::",
    "chain::foes::a",
    "chain::foes::what_comes",
    "chain::ingress::",
    "chain::links::",
    "chain::mptcp::",
    "chain::paths::",
    "chain::rate::",
    "chain::scope::",
    "chain::subnets::",
    "chain::unpaced::",
    "chain::web::",
    "conflist_examples::the_",
    "selftest::the_bandwidth_plugin",
    "operator::cgroups::run_limits",
    "operator::cgroups::what_a_limited_cgroup",
    "operator::delegate::what_delegation_costs",
    "operator::scale::five_hundred",
    "operator::set::a_change_is_in_force",
    "operator::upgrade::running",
    "a_node_of_250",
];

/// Exceptions among these tests, which measure nothing.
const NOT_MEASURING: &[&str] =
    &["chain::foes::an_option_longer", "chain::paths::filters_of_others", "chain::scope::large_packets"];

/// Tests of hundreds of pods. In User Mode Linux they take minutes, but other tests would not disturb them there.
pub const MANY_PODS: &[&str] = &["operator::scale::", "two_hundred_pods", "a_node_of_250"];
/// Those of them that run in User Mode Linux. The time of commands beside hundreds of pods is measured on this
/// machine's kernel only.
pub const MANY_PODS_IN_UML: &[&str] = &["two_hundred_pods", "a_node_of_250"];

/// Tests that depend on no feature in which the kernels differ: they run on this machine's kernel only, and not in
/// User Mode Linux.
pub const SAME_EVERYWHERE: &[&str] = &[
    "plain::",
    "install::",
    "labels::",
    "kernel::cgroups::",
    "operator::delegate::",
    "operator::follow::",
    "operator::sync::",
    "operator::upgrade::a_new_add_moves",
    "no_signal_to_run_is_lost",
    "replay::",
    "selftest::",
    "conflist_examples::the_examples_of_other",
    "an_add_that_does_not_get_the_lock",
    "pods_that_find_no_bpffs",
];

/// User Mode Linux has not enough CPU time for so many connections a second.
pub const TOO_MUCH_FOR_UML: &[&str] = &["short_connections_at_a_hundred"];

/// Tests of features that a kernel may lack, each with a script that succeeds, in a network namespace of its own, if
/// the kernel has the feature. Neither this machine's kernel nor User Mode Linux has all of the features; Debian's
/// newest kernel has.
pub const MAY_BE_LACKING: &[(&str, &str)] = &[
    (
        "interfaces_that_are_no_veth_are_limited",
        "ip link add m link v0 type macvlan && ip link add i link v1 type ipvlan mode l2",
    ),
    ("chain::mptcp::", "test -e /proc/sys/net/mptcp/enabled"),
    ("paths::a_tunnel_of_a_program", "grep -q tun /proc/misc"),
    ("paths::a_tunnel_by_gre", "ip link add t0 type gre remote 192.0.2.1"),
    ("paths::a_tunnel_by_ipip", "ip link add t0 type ipip remote 192.0.2.1"),
    ("paths::a_tunnel_by_wireguard", "ip link add t0 type wireguard"),
    ("paths::a_macvlan", "ip link add m link v0 type macvlan"),
    ("paths::an_ipvlan", "ip link add i link v0 type ipvlan mode l2"),
    ("paths::frames_of_af_xdp", "grep -q ^XDP /proc/net/protocols"),
];

/// The traffic tests that show podshaper on this machine's kernel, whatever its features are: the rate in both
/// directions, replies beside bulk flows, UDP, short connections, traffic of no socket of the pod, and a network's
/// conflist.
pub const TRAFFIC_HERE: &[&str] = &[
    "chain::counters::every_byte_of_tcp",
    "chain::ingress::ten_mbit",
    "chain::paths::frames_are_held",
    "chain::rate::a_full_pod",
    "chain::rate::a_hundred_mbit",
    "chain::rate::ten_mbit",
    "chain::unpaced::udp_above_the_limit",
    "chain::web::short_connections_at_ten",
    "conflist_examples::the_bridge",
    "operator::set::a_change_is_in_force",
    "operator::upgrade::running",
];

/// The traffic tests that show fq, in User Mode Linux.
pub const TRAFFIC_IN_UML: &[&str] = &[
    "chain::ingress::requests_beside",
    "chain::ingress::ten_mbit",
    "chain::paths::frames_are_held",
    "chain::paths::other_paths_and",
    "chain::paths::they_are_held",
    "chain::rate::a_full_pod",
    "chain::rate::ten_mbit",
    "chain::web::short_connections_at_ten",
];

/// Debian's kernels, from the oldest, and the tests that run on each of them: the kernels differ in features and in
/// permissions. `tests/lab/vm` also has 6.1 and 6.18; User Mode Linux is 6.1, and runs all tests except those named
/// above.
pub const KERNELS: &[&str] = &["5.10", "6.12", "newest"];
pub const ASKED_OF_KERNELS: &[&str] = &[
    "kernel::attach::an_add_pins",
    "kernel::attach::a_replaced",
    "kernel::attach::no_qdisc",
    "kernel::failures::",
    "kernel::verbs::",
    "conflist_examples::the_bridge",
    "chain::rate::ten_mbit",
    "chain::ingress::ten_mbit",
    "chain::web::short_connections_at_two",
    "chain::web::probes",
    "operator::set::limits_change",
    "operator::set::packets_are",
];

/// The oldest and the newest of these kernels, and further tests for them.
pub const BOTH_ENDS: &[&str] = &["5.10", "newest"];
pub const ASKED_OF_BOTH_ENDS: &[&str] = &[
    "chain::paths::a_socket_of_another_cgroup",
    "chain::paths::a_tunnel_by_wireguard",
    "chain::paths::a_tunnel_made_in_the_pod",
    "chain::paths::frames_are_held",
];

/// Whether a test may be tried again.
pub fn measures(test: &str) -> bool {
    let is_in = |names: &[&str]| names.iter().any(|name| test.contains(name));
    is_in(MEASURING) && !is_in(NOT_MEASURING)
}

/// A test that alters its kernel until the kernel ends. It runs last, in a kernel of its own, which still has the
/// fault that the test looks for.
pub const ALTERS_THE_KERNEL: &str = "a_kernel_that_forgets_the_cgroup_of_sockets";
pub const KERNEL_TO_ALTER: &str = "5.10";

/// The requested runs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Verb {
    /// `tests/run`: shows podshaper in some minutes.
    Short,
    All,
    Lint,
    Uml,
    Node,
    Cluster,
}

pub struct Stage {
    pub what: &'static str,
    /// The approximate time on a machine with two cores and without earlier builds.
    pub minutes: f64,
    pub run: fn(&Session, &mut Lane),
}

pub enum Step {
    One(Stage),
    /// The stages of both lists at the same time, each list in its order.
    Beside(Vec<Stage>, Vec<Stage>),
}

pub fn steps(verb: Verb) -> Vec<Step> {
    let stage = |what, minutes, run| Stage { what, minutes, run };
    let one = |what, minutes, run| Step::One(stage(what, minutes, run));
    let lint =
        || one("lints: rustfmt, clippy, shellcheck, cargo-deny, the oldest Rust, the eBPF object", 2.5, lints::all);
    let build_debug = || one("build", 2.5, stages::build_debug);
    let build_optimised = || one("build, optimised", 3.5, stages::build_optimised);
    match verb {
        Verb::Lint => vec![lint()],
        Verb::Short => vec![
            lint(),
            build_debug(),
            one("this kernel: unit tests, ADD to GC, the commands", 2.2, stages::functional_here),
            one("this kernel: a choice of the tests of traffic", 1.5, stages::some_traffic_here),
            one("User Mode Linux, which has fq: a choice of the tests of traffic", 2.0, stages::some_traffic_in_uml),
        ],
        Verb::Uml => vec![
            build_optimised(),
            one("User Mode Linux: all tests", 22.0, stages::all_in_uml),
            one("User Mode Linux: hundreds of pods", 5.0, stages::many_pods_in_uml),
        ],
        Verb::Node => vec![build_optimised(), one("nodes in User Mode Linux", 25.5, nodes::nodes)],
        Verb::Cluster => vec![build_optimised(), one("a cluster of one node", 20.0, nodes::cluster)],
        Verb::All => vec![
            one("compilers for the eBPF object", 2.5, stages::install_bpf_compilers),
            lint(),
            build_debug(),
            one("this kernel: unit tests, ADD to GC, the commands", 3.5, stages::functional_here),
            one("this kernel: the tests of traffic", 17.0, stages::all_traffic_here),
            build_optimised(),
            // A kernel of User Mode Linux is bound to one CPU, and QEMU without KVM is one thread.
            Step::Beside(
                vec![
                    stage("User Mode Linux: all tests", 24.0, stages::all_in_uml),
                    stage("Debian's newer kernels in QEMU", 10.0, stages::on_newer_kernels),
                ],
                vec![
                    stage("what nodes and a cluster are made of is built", 13.0, nodes::parts),
                    stage("nodes in User Mode Linux", 15.0, nodes::nodes),
                    stage("Debian's oldest kernel, 5.10, in QEMU", 6.0, stages::on_the_oldest_kernel),
                ],
            ),
            one("a cluster of one node", 8.0, nodes::cluster),
        ],
    }
}

impl Step {
    pub fn minutes(&self) -> f64 {
        let all = |stages: &[Stage]| stages.iter().map(|stage| stage.minutes).sum::<f64>();
        match self {
            Self::One(stage) => stage.minutes,
            Self::Beside(here, there) => all(here).max(all(there)),
        }
    }
}

/// The plan as text: a line for each stage, with its minutes.
pub fn described(steps: &[Step]) -> String {
    let line = |stage: &Stage, beside: &str| format!("  {:4.1} min  {}{beside}\n", stage.minutes, stage.what);
    let mut text = String::new();
    for step in steps {
        match step {
            Step::One(stage) => text += &line(stage, ""),
            Step::Beside(here, there) => {
                here.iter().for_each(|stage| text += &line(stage, ""));
                there.iter().for_each(|stage| text += &line(stage, " (beside these)"));
            }
        }
    }
    text + &format!("  {:4.1} min  in all, on two cores", steps.iter().map(Step::minutes).sum::<f64>())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    fn sources(directory: &Path) -> String {
        let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
        let text = |path: std::path::PathBuf| match path.extension() {
            Some(extension) if extension == "rs" => fs::read_to_string(path).unwrap(),
            _ if path.is_dir() && !path.ends_with("xtask") => sources(&path),
            _ => String::new(),
        };
        entries.map(text).collect()
    }

    #[test]
    fn every_name_is_that_of_a_test() {
        let sources = sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join(".."));
        let lacking: Vec<&str> = MAY_BE_LACKING.iter().map(|(tests, _)| *tests).collect();
        let lists = [
            ALONE,
            MEASURING,
            NOT_MEASURING,
            MANY_PODS,
            MANY_PODS_IN_UML,
            SAME_EVERYWHERE,
            TOO_MUCH_FOR_UML,
            TRAFFIC_HERE,
            TRAFFIC_IN_UML,
            ASKED_OF_KERNELS,
            ASKED_OF_BOTH_ENDS,
            &[ALTERS_THE_KERNEL],
            &lacking[..],
        ];
        for name in lists.concat() {
            let last = name.rsplit("::").next().unwrap();
            let module = name.trim_end_matches("::").rsplit("::").next().unwrap();
            let found = if last.is_empty() { format!("mod {module};") } else { format!("fn {last}") };
            assert!(sources.contains(&found), "there is no test {name}: no {found:?} in tests/");
        }
    }

    #[test]
    fn what_measures_is_among_what_runs_alone_but_for_rates_of_other_cgroups() {
        for name in MEASURING.iter().filter(|name| !name.starts_with("operator::cgroups::")) {
            assert!(ALONE.iter().any(|alone| name.contains(alone)), "{name} would run beside others");
        }
    }

    #[test]
    fn right_and_wrong_are_so_at_the_first_try() {
        for name in
            ["chain::rate::ten_mbit_are_ten_mbit", "operator::sync::a_node_of_250_pods", "chain::foes::a_socket"]
        {
            assert!(measures(name), "{name}");
        }
        for name in [
            "kernel::attach::an_add_pins",
            "chain::counters::every_byte_of_tcp_is_counted",
            "chain::foes::an_option_longer_than_a_page_is_as_without_podshaper",
            "selftest::a_panic_leaves_nothing",
            "operator::set::limits_change_and_say_what_they_were",
            "plain::errors_are_whole",
        ] {
            assert!(!measures(name), "{name}");
        }
    }

    #[test]
    fn the_short_run_ends_within_twelve_minutes_and_all_within_cis_ninety() {
        let minutes = |verb| steps(verb).iter().map(Step::minutes).sum::<f64>();
        assert!(minutes(Verb::Short) <= 12.0, "{}", minutes(Verb::Short));
        assert!(minutes(Verb::All) <= 78.0, "{}", minutes(Verb::All));
    }

    #[test]
    fn stages_beside_each_other_take_as_long_as_the_longer_list() {
        let stage = |minutes| Stage { what: "x", minutes, run: |_, _| () };
        let steps = [Step::One(stage(1.0)), Step::Beside(vec![stage(2.0), stage(3.0)], vec![stage(4.0)])];
        assert_eq!(steps.iter().map(Step::minutes).sum::<f64>(), 6.0);
        let text = described(&steps);
        assert!(text.contains("x (beside these)") && text.ends_with("6.0 min  in all, on two cores"), "{text}");
    }
}
