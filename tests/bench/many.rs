//! What a node with many limited pods pays: the time of an ADD and of `podshaper list`, and the kernel's memory for each pod.

use std::{
    fs,
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use serde_json::json;

use crate::{
    Options, Table, Title, check_stop,
    harness::{
        Context, Result,
        cgroup::{self, Driver, PodCgroup},
        cni::Cni,
        netns::Netns,
        note,
        pod::{container_id, uuid},
        process, unique,
    },
    table,
};

/// ADDs and DELs that are timed beside the pods that are there.
const CALLS: usize = 100;
const RATE: u64 = 100_000_000;

/// A pod of one interface that leads nowhere.
struct Idle {
    uid: String,
    container_id: String,
    netns: Netns,
    _cgroup: PodCgroup,
}

impl Idle {
    fn new() -> Result<Self> {
        let netns = Netns::new(&unique("many"))?;
        netns.run("ip", &["link", "add", "eth0", "type", "veth", "peer", "name", "peer"])?;
        let uid = uuid()?;
        let path = cgroup::mount()?.join(&Driver::Cgroupfs.path(&uid)[1..]);
        Ok(Self { _cgroup: PodCgroup::new(path)?, container_id: container_id()?, netns, uid })
    }

    fn call(&self, program: &PathBuf, verb: &str) -> Result<Duration> {
        let stdin = json!({
            "cniVersion": "1.0.0", "name": "many", "type": "podshaper",
            "prevResult": { "cniVersion": "1.0.0", "ips": [] },
            "runtimeConfig": {
                "cgroupPath": Driver::Cgroupfs.path(&self.uid),
                "bandwidth": { "egressRate": RATE, "ingressRate": RATE },
            },
        });
        let call = Cni::new(program, verb)
            .env("CNI_CONTAINERID", &self.container_id)
            .env("CNI_NETNS", self.netns.path().display().to_string())
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", "/opt/cni/bin")
            .env("CNI_ARGS", format!("IgnoreUnknown=1;K8S_POD_UID={}", self.uid))
            .stdin(stdin.to_string())
            .call()?;
        call.success()?;
        Ok(call.elapsed)
    }
}

/// The kernel's own memory that grows with objects, in KiB.
fn kernel_kib() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo").context("read /proc/meminfo")?;
    let value = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or_default()
    };
    Ok(value("Slab:") + value("Percpu:") + value("VmallocUsed:"))
}

pub fn many(options: &Options, table: &mut Table) -> Result<Title> {
    let program = table.programs.directory()?.join("podshaper");
    let mut there: Vec<Idle> = Vec::new();
    let result = grow(options, table, &program, &mut there);
    for pod in &there {
        pod.call(&program, "DEL")?;
    }
    result?;
    let header = &["pods there", "ADD p50", "p99", "DEL p50", "p99", "list", "kernel memory for each pod"];
    Ok((format!("Many pods, both directions limited: {CALLS} ADDs and DELs beside them"), header))
}

fn grow(options: &Options, table: &mut Table, program: &PathBuf, there: &mut Vec<Idle>) -> Result<()> {
    for &count in &options.pods {
        note(format_args!("{count} pods .."));
        let mut fresh = Vec::new();
        while there.len() + fresh.len() < count {
            check_stop()?;
            fresh.push(Idle::new()?);
        }
        let before = kernel_kib()?;
        for pod in &fresh {
            check_stop()?;
            pod.call(program, "ADD")?;
        }
        let grown = kernel_kib()?.saturating_sub(before);
        let memory = format!("{:.1} KiB", grown as f64 / fresh.len().max(1) as f64);
        there.append(&mut fresh);
        let pod = Idle::new()?;
        let mut elapsed = [vec![], vec![]];
        for _ in 0..CALLS {
            for (verb, elapsed) in ["ADD", "DEL"].into_iter().zip(&mut elapsed) {
                elapsed.push(pod.call(program, verb)?);
            }
        }
        let cells = elapsed.map(|mut elapsed| {
            elapsed.sort();
            [CALLS / 2, CALLS * 99 / 100].map(|at| table::millis(elapsed[at].as_secs_f64() * 1e6))
        });
        let start = Instant::now();
        process::run(Command::new(program).args(["list", "--sample", "0"]))?;
        let list = table::millis(start.elapsed().as_secs_f64() * 1e6);
        table.rows.push([vec![count.to_string()], cells.concat(), vec![list, memory]].concat());
    }
    Ok(())
}
