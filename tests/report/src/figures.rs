//! The contents of the report: a section for each workload, with its plots and the columns of its table.

use crate::harness::table;
use crate::judge::Better;

/// A section.
pub struct Figure {
    pub workload: &'static str,
    pub title: &'static str,
    /// Describes the measurement and the numbers.
    pub says: &'static str,
    pub plots: &'static [Plot],
    pub columns: &'static [Column],
}

/// A plot for each combination of the other parameters.
pub enum Plot {
    /// The number of replies that took no longer than a time.
    Cdf { series: &'static str, title: &'static str },
    /// A number over a parameter.
    Over { parameter: &'static str, metric: &'static str, title: &'static str },
    /// Parts of the limit, each over a fifth of a second.
    Steps { series: &'static str, title: &'static str },
    /// A number for each value of a non-numeric parameter.
    Bars { parameter: &'static str, metric: &'static str, title: &'static str },
}

/// How a number is written.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Unit {
    Percent,
    Millis,
    Count,
    /// Jain's index.
    Index,
    Kib,
    Nanos,
    /// A number with two digits behind the point.
    Hundredths,
    Seconds,
    /// Bits per second.
    Rate,
}

pub struct Column {
    pub metric: &'static str,
    pub title: &'static str,
    pub unit: Unit,
    pub better: Option<Better>,
}

const fn column(metric: &'static str, title: &'static str, unit: Unit, better: Option<Better>) -> Column {
    Column { metric, title, unit, better }
}

const LIMIT: Option<Better> = Some(Better::Near(100.0));
const LESS: Option<Better> = Some(Better::Less);
const MORE: Option<Better> = Some(Better::More);

const PERCENT: Column = column("percent", "of the limit", Unit::Percent, LIMIT);
const REQUESTS: Column = column("requests_percent", "requests in it", Unit::Percent, None);
const FIRST_SECOND: Column = column("first_second_percent", "first second", Unit::Percent, LIMIT);
const MOST: Column = column("most_second_percent", "largest later second", Unit::Percent, LIMIT);
const LEAST: Column = column("least_second_percent", "least later second", Unit::Percent, LIMIT);
const RETRANSMITS: Column = column("retransmits", "retransmits", Unit::Count, LESS);
const JAIN: Column = column("jain", "Jain's index", Unit::Index, MORE);
const CPU: Column = column("cpu_ms_per_gbit", "CPU of a Gbit", Unit::Millis, LESS);
const REPLY_P50: Column = column("reply_p50_ms", "reply p50", Unit::Millis, LESS);
const REPLY_P99: Column = column("reply_p99_ms", "reply p99", Unit::Millis, LESS);
const REPLY_LONGEST: Column = column("reply_longest_ms", "longest reply", Unit::Millis, LESS);

const ADD_P50: Column = column("add_p50_ms", "ADD p50", Unit::Millis, LESS);
const DEL_P50: Column = column("del_p50_ms", "DEL p50", Unit::Millis, LESS);

const PERCENTILES: &str = "reply_percentiles_ms";

/// The first plot of each figure is the most important one.
pub const ALL: &[Figure] = &[
    Figure {
        workload: "replies",
        title: "Replies beside bulk TCP",
        says: "Bulk TCP flows fill the limit. Meanwhile a request of 100 bytes is sent every millisecond on a connection of its own, \
               the same way as they. The plot shows which part of the replies came within which time. A request is a packet of the pod like \
               any other, which the limit counts, and so does the part of the limit: \"requests in it\" is what they are of it. Who \
               answers sooner is asked more often.",
        plots: &[
            Plot::Cdf { series: PERCENTILES, title: "Replies beside bulk TCP" },
            Plot::Steps { series: "percent_by_step", title: "How bulk TCP begins" },
        ],
        columns: &[
            REPLY_P50,
            REPLY_P99,
            REPLY_LONGEST,
            PERCENT,
            REQUESTS,
            FIRST_SECOND,
            LEAST,
            MOST,
            RETRANSMITS,
            JAIN,
            CPU,
        ],
    },
    Figure {
        workload: "by-limit",
        title: "Four flows of bulk TCP, by limit",
        says: "All bytes on the wire at layer 3, after the first second, as a part of the limit; and replies beside them. \
               Their requests are in that part, at most a twentieth of the limit and at most one each millisecond. 100 Mbit/s out of the \
               pod is in the section before.",
        plots: &[
            Plot::Over { parameter: "limit", metric: "percent", title: "After the first second" },
            Plot::Over { parameter: "limit", metric: "first_second_percent", title: "The first second" },
            Plot::Over { parameter: "limit", metric: "reply_p99_ms", title: "Replies beside them, p99" },
        ],
        columns: &[PERCENT, REQUESTS, FIRST_SECOND, LEAST, MOST, RETRANSMITS, JAIN, REPLY_P50, REPLY_P99],
    },
    Figure {
        workload: "by-flows",
        title: "Bulk TCP, by the number of flows",
        says: "Jain's index is 1 where all flows have had the same. The CPU time is that of the whole machine, senders and receivers \
        included.",
        plots: &[
            Plot::Over { parameter: "flows", metric: "percent", title: "After the first second" },
            Plot::Over { parameter: "flows", metric: "jain", title: "Jain's index of the flows" },
            Plot::Over { parameter: "flows", metric: "cpu_ms_per_gbit", title: "CPU time of a Gbit" },
        ],
        columns: &[PERCENT, FIRST_SECOND, MOST, RETRANSMITS, JAIN, CPU],
    },
    Figure {
        workload: "congestion-control",
        title: "Other congestion controls",
        says: "Four flows from the pod. All other sections are of cubic without ECN.",
        plots: &[Plot::Bars { parameter: "control", metric: "reply_p99_ms", title: "Replies beside them, p99" }],
        columns: &[PERCENT, FIRST_SECOND, MOST, RETRANSMITS, JAIN, REPLY_P50, REPLY_P99],
    },
    Figure {
        workload: "mptcp",
        title: "MPTCP",
        says: "Four flows of MPTCP out of the pod or into it, and replies by MPTCP beside them.",
        plots: &[Plot::Cdf { series: PERCENTILES, title: "Replies beside bulk MPTCP" }],
        columns: &[PERCENT, FIRST_SECOND, MOST, RETRANSMITS, REPLY_P50, REPLY_P99],
    },
    Figure {
        workload: "short-connections",
        title: "Short connections",
        says: "Clients of a web server in the pod that all begin at once. Each request of 10 kB has a connection of its own (out: \
               GET, in: POST). Beside them a small request every 2 ms on one connection.",
        plots: &[
            Plot::Bars {
                parameter: "direction",
                metric: "from_connect_p99_ms",
                title: "From connect() to the last byte, p99",
            },
            Plot::Cdf { series: PERCENTILES, title: "Replies beside short connections" },
        ],
        columns: &[
            column("responses_per_s", "responses a second", Unit::Count, MORE),
            column("from_connect_p50_ms", "from connect() p50", Unit::Millis, LESS),
            column("from_connect_p99_ms", "from connect() p99", Unit::Millis, LESS),
            column("longest_ms", "longest", Unit::Millis, LESS),
            REPLY_P50,
            REPLY_P99,
            PERCENT,
            MOST,
            RETRANSMITS,
            column("failed", "failed", Unit::Count, LESS),
        ],
    },
    Figure {
        workload: "voice",
        title: "Voice beside bulk TCP",
        says: "Four calls of 64 kbit/s each way, beside four bulk flows that fill the limit of one direction. The numbers are of that \
               direction. Out: the pod calls, from a socket for each call. In: it is called, and has one socket for all.",
        plots: &[],
        columns: &[
            column("lost_percent", "lost", Unit::Percent, LESS),
            column("delay_p50_ms", "delay p50", Unit::Millis, LESS),
            column("delay_p99_ms", "delay p99", Unit::Millis, LESS),
            column("jitter_ms", "jitter", Unit::Millis, LESS),
            PERCENT,
        ],
    },
    Figure {
        workload: "names",
        title: "Look-ups of names beside bulk TCP",
        says: "One after the other, each by a datagram from a socket of its own, beside four bulk flows that fill the limit of one \
               direction. Out: the pod asks. In: it is asked.",
        plots: &[Plot::Cdf { series: PERCENTILES, title: "Look-ups beside bulk TCP" }],
        columns: &[REPLY_P50, REPLY_P99, REPLY_LONGEST, column("lost", "lost", Unit::Count, LESS), PERCENT],
    },
    Figure {
        workload: "quic",
        title: "QUIC",
        says: "Four bulk transfers by QUIC out of the pod or into it, and a small request every 2 ms on another connection by QUIC, the same way.",
        plots: &[Plot::Cdf { series: PERCENTILES, title: "Replies by QUIC beside bulk by QUIC" }],
        columns: &[REPLY_P50, REPLY_P99, PERCENT, MOST, column("lost_percent", "lost", Unit::Percent, LESS)],
    },
    Figure {
        workload: "servers",
        title: "Servers in the pod",
        says: "nginx with wrk, nghttpd with h2load, redis with its benchmark. Out: they get 10 kB with each response, of redis 100 bytes. \
               In: they post as much, and set it.",
        plots: &[Plot::Bars { parameter: "server", metric: "response_p99_ms", title: "Responses, p99" }],
        columns: &[
            column("responses_per_s", "responses a second", Unit::Count, MORE),
            column("response_p50_ms", "response p50", Unit::Millis, LESS),
            column("response_p99_ms", "response p99", Unit::Millis, LESS),
            column("longest_ms", "longest", Unit::Millis, LESS),
            REPLY_P99,
            MOST,
            RETRANSMITS,
            column("failed", "failed", Unit::Count, LESS),
        ],
    },
    Figure {
        workload: "far",
        title: "Long paths",
        says: "Four flows to a machine behind the pod's node, through netem. The loss is that of what the pod sends. A reply takes at \
               least the round trip.",
        plots: &[
            Plot::Over { parameter: "rtt_ms", metric: "percent", title: "After the first second" },
            Plot::Over { parameter: "rtt_ms", metric: "reply_p99_ms", title: "Replies beside them, p99" },
        ],
        columns: &[PERCENT, FIRST_SECOND, MOST, RETRANSMITS, REPLY_P50, REPLY_P99],
    },
    Figure {
        workload: "other-paths",
        title: "Other paths",
        says: "What passes the pod's interface and no socket of its cgroup: two TCP flows, or UDP at 1.3 times the limit (AF_PACKET: \
               as fast as it goes, and out of the pod alone). Counted on the wire behind the limiter, after the first second: the mean, and \
               the busiest second wherever it begins. Multicast into the pod is what its socket gets.",
        plots: &[Plot::Bars { parameter: "path", metric: "percent", title: "Other paths" }],
        columns: &[PERCENT, MOST],
    },
    Figure {
        workload: "pods-at-once",
        title: "Many pods that send at once",
        says: "One flow from each. The CPU time is that of the whole machine, senders and receivers included.",
        plots: &[Plot::Over { parameter: "pods", metric: "cpu_ms_per_gbit", title: "CPU time of a Gbit" }],
        columns: &[PERCENT, CPU],
    },
    Figure {
        workload: "unlimited",
        title: "A pod without a limit",
        says: "Four flows from a pod that nothing limits, and replies beside them. Another pod of the node has a limit and sends nothing. \
               The CPU time is that of the whole machine.",
        plots: &[],
        columns: &[column("gbit_per_s", "Gbit/s", Unit::Hundredths, MORE), CPU, REPLY_P50, REPLY_P99],
    },
    Figure {
        workload: "programs",
        title: "podshaper's programs",
        says: "What each eBPF program takes on the mean of its runs (kernel.bpf_stats_enabled, which is a part of it), while eight flows \
               go out of the pod and eight into it: count_egress and count_ingress for each packet of the pod's sockets, pace_tcp for each \
               segment, out_of_pod for each packet at the host's end of the veth.",
        plots: &[],
        columns: &[
            column("count_egress_ns", "count_egress", Unit::Nanos, None),
            column("pace_tcp_ns", "pace_tcp", Unit::Nanos, None),
            column("count_ingress_ns", "count_ingress", Unit::Nanos, None),
            column("out_of_pod_ns", "out_of_pod", Unit::Nanos, None),
        ],
    },
    Figure {
        workload: "calls-at-once",
        title: "ADD and DEL, so many at once",
        says: "The whole process, both directions limited, five times. Each pod's call begins at the same moment.",
        plots: &[Plot::Over { parameter: "calls", metric: "add_p50_ms", title: "ADD at once, p50" }],
        columns: &[
            ADD_P50,
            column("add_longest_ms", "longest ADD", Unit::Millis, LESS),
            DEL_P50,
            column("del_longest_ms", "longest DEL", Unit::Millis, LESS),
        ],
    },
    Figure {
        workload: "calls",
        title: "ADD and DEL, beside so many limited pods",
        says: "The whole process, as a runtime calls it, both directions limited. The memory is what the kernel's grew by (slab, \
        per-CPU, vmalloc). Beside 1000 pods one version of the bandwidth plugin is measured. `tests/run bench --parts many` has 5000 \
        pods. Where making the pods, which is not measured, takes more than 45 s, there is no number.",
        plots: &[
            Plot::Over { parameter: "pods", metric: "add_p50_ms", title: "ADD, p50" },
            Plot::Over { parameter: "pods", metric: "del_p50_ms", title: "DEL, p50" },
        ],
        columns: &[
            ADD_P50,
            column("add_longest_ms", "longest ADD", Unit::Millis, None),
            DEL_P50,
            column("del_longest_ms", "longest DEL", Unit::Millis, None),
            column("kib_per_pod", "memory for each pod", Unit::Kib, LESS),
        ],
    },
];

impl Unit {
    /// The decimal places that are written. Numbers that are written alike count as equal.
    pub fn digits(self) -> i32 {
        match self {
            Self::Percent | Self::Kib => 1,
            Self::Millis | Self::Seconds | Self::Hundredths => 2,
            Self::Index => 3,
            Self::Count | Self::Rate | Self::Nanos => 0,
        }
    }

    pub fn write(self, value: f64) -> String {
        match self {
            Self::Percent if value >= 1000.0 => format!("{value:.0} %"),
            Self::Percent => format!("{value:.1} %"),
            Self::Millis if value >= 100.0 => format!("{value:.0} ms"),
            Self::Millis if value >= 9.95 => format!("{value:.1} ms"),
            Self::Millis => format!("{value:.2} ms"),
            Self::Count => format!("{value:.0}"),
            Self::Index => format!("{value:.3}"),
            Self::Kib => format!("{value:.1} KiB"),
            Self::Nanos => format!("{value:.0} ns"),
            Self::Hundredths => format!("{value:.2}"),
            Self::Seconds => format!("{value:.2} s"),
            Self::Rate => table::limit(value.round() as u64),
        }
    }

    /// The number at a tick of an axis, with as few digits as possible.
    pub fn tick(self, value: f64) -> String {
        let number = (value * 1e6).round() / 1e6;
        match self {
            Self::Percent => format!("{number} %"),
            Self::Millis => format!("{number} ms"),
            Self::Kib => format!("{number} KiB"),
            Self::Nanos => format!("{number} ns"),
            Self::Seconds => format!("{number} s"),
            Self::Count | Self::Index | Self::Hundredths => number.to_string(),
            Self::Rate => self.write(value),
        }
    }

    /// The unit of a parameter.
    pub fn of_parameter(name: &str) -> Self {
        match name {
            "limit" => Self::Rate,
            "rtt_ms" => Self::Millis,
            "loss_percent" => Self::Percent,
            _ => Self::Count,
        }
    }
}

impl Figure {
    /// The unit of a metric.
    pub fn unit(&self, metric: &str) -> Unit {
        self.columns.iter().find(|column| column.metric == metric).map_or(Unit::Count, |column| column.unit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_drawn_is_in_the_table_as_well() {
        for figure in ALL {
            for plot in figure.plots {
                if let Plot::Over { metric, .. } | Plot::Bars { metric, .. } = plot {
                    assert!(figure.columns.iter().any(|column| column.metric == *metric), "{}: {metric}", figure.title);
                }
            }
        }
    }
}
