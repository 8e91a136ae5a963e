//! The costs of a node with many limited pods: the time of an ADD and of `podshaper list`, the kernel's memory for
//! each pod, and the time that each program takes for a packet.

use std::{path::PathBuf, process::Command, time::Instant};

use crate::{
    Options, Table, Title, check_stop,
    harness::{
        Result,
        host::Host,
        idle::{Idle, RATE, kernel_kib},
        limiter::{Limiter, Limits},
        measure::{self, Bulk, Way},
        note,
        pod::Pod,
        process, programs,
    },
    table,
};

/// ADDs and DELs that are timed beside the pods that are there already.
const CALLS: usize = 100;

pub fn many(options: &Options, table: &mut Table) -> Result<Title> {
    let program = table.programs.directory()?.join("podshaper");
    let host = Host::new()?;
    let mut there = Vec::new();
    let result = grow(options, table, &host, &program, &mut there);
    for pod in &there {
        pod.call(&program, "DEL")?;
    }
    result?;
    let header = &[
        "pods there",
        "ADD p50",
        "p99",
        "DEL p50",
        "p99",
        "list",
        "kernel memory for each pod",
        "count_egress",
        "pace_tcp",
        "count_ingress",
        "out_of_pod",
    ];
    Ok((format!("Many pods, both directions limited: {CALLS} ADDs and DELs beside them"), header))
}

fn grow<'a>(
    options: &Options,
    table: &mut Table,
    host: &'a Host,
    program: &PathBuf,
    there: &mut Vec<Idle<'a>>,
) -> Result<()> {
    for &count in &options.pods {
        note(format_args!("{count} pods .."));
        let mut fresh = Vec::new();
        while there.len() + fresh.len() < count {
            check_stop()?;
            fresh.push(Idle::new(host)?);
        }
        let before = kernel_kib()?;
        for pod in &fresh {
            check_stop()?;
            pod.call(program, "ADD")?;
        }
        let grown = kernel_kib()?.saturating_sub(before);
        let memory = format!("{:.1} KiB", grown as f64 / fresh.len().max(1) as f64);
        there.append(&mut fresh);
        let pod = Idle::new(host)?;
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
        let costs = costs(table, host)?;
        table.rows.push([vec![count.to_string()], cells.concat(), vec![list, memory], costs].concat());
    }
    Ok(())
}

/// The time of each run of the programs, while one more pod sends and then receives: all pods share the same
/// programs.
fn costs(table: &Table, host: &Host) -> Result<Vec<String>> {
    let mut pod = Pod::new(host, "bench")?;
    Limiter::Podshaper.add(&mut pod, Limits { egress: Some(RATE), ingress: Some(RATE) }, &table.programs)?;
    let run_ns = programs::run_ns(|| {
        for way in [Way::Out, Way::In] {
            measure::bulk(&pod, &Bulk { way, flows: 8, seconds: 3.0, ..Bulk::default() })?;
        }
        Ok(())
    })?;
    Ok(run_ns.map(|ns| format!("{ns:.0} ns")).to_vec())
}
