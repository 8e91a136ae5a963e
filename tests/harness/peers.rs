//! Limiters that are no plugins: queues that people configure by hand, and eBPF programs of other designs.

use std::fs::File;
use std::process::Command;

use aya::programs::cgroup_skb::CgroupSkbAttachType;
use aya::programs::tc::{NlOptions, TcAttachOptions, qdisc_add_clsact};
use aya::programs::{CgroupAttachMode, CgroupSkb, SchedClassifier, TcAttachType};
use aya::{Ebpf, EbpfLoader, include_bytes_aligned};

use super::limiter::{Limiter, Limits};
use super::netns::Netns;
use super::pod::{INTERFACE, Pod};
use super::{Context, Failure, Result, process};

/// ../report/bpf/src/main.rs
static OBJECT: &[u8] = include_bytes_aligned!("../report/bpf/peers.bpf.o");

/// A direction of the pod, held at the egress of a device.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Out,
    In,
}

/// Limits a pod that is already in its node's network.
pub fn limit(limiter: Limiter, pod: &mut Pod, limits: Limits) -> Result<()> {
    for (direction, rate) in [(Direction::Out, limits.egress), (Direction::In, limits.ingress)] {
        let Some(rate) = rate else { continue };
        match limiter {
            Limiter::FqCodel => fq_codel(pod, direction, rate)?,
            Limiter::Cake => {
                let device = device(pod, direction)?;
                let arguments = ["qdisc", "add", "dev", &device, "root", "cake", "bandwidth", &bits(rate)];
                netns(pod, direction).run("tc", &arguments)?;
            }
            Limiter::Edt => edt(pod, direction, rate)?,
            Limiter::Policer => police(pod, direction, rate)?,
            _ => {}
        }
    }
    Ok(())
}

/// What a limiter needs and this kernel lacks.
pub fn missing(limiter: Limiter) -> Option<String> {
    let qdiscs: &[&str] = match limiter {
        Limiter::FqCodel => &["htb", "fq_codel"],
        Limiter::Cake => &["cake"],
        Limiter::Edt => &["fq"],
        _ => &[],
    };
    let lacks = |qdisc: &&&str| {
        let add = format!("ip link set lo up && tc qdisc add dev lo root {qdisc}");
        process::run(Command::new("unshare").args(["--net", "sh", "-c", &add])).is_err()
    };
    qdiscs.iter().find(lacks).map(|qdisc| format!("no {qdisc}"))
}

fn netns<'a>(pod: &'a Pod, direction: Direction) -> &'a Netns {
    match direction {
        Direction::Out => &pod.netns,
        Direction::In => &pod.host.netns,
    }
}

fn device(pod: &Pod, direction: Direction) -> Result<String> {
    match direction {
        Direction::Out => Ok(INTERFACE.to_owned()),
        Direction::In => pod.host_end(),
    }
}

fn bits(rate: u64) -> String {
    format!("{rate}bit")
}

/// htb with one class for everything, and fq_codel below.
fn fq_codel(pod: &Pod, direction: Direction, rate: u64) -> Result<()> {
    let device = device(pod, direction)?;
    let rate = bits(rate);
    for arguments in [
        &["qdisc", "add", "dev", &device, "root", "handle", "1:", "htb", "default", "1"][..],
        &["class", "add", "dev", &device, "parent", "1:", "classid", "1:1", "htb", "rate", &rate],
        &["qdisc", "add", "dev", &device, "parent", "1:1", "fq_codel"],
    ] {
        netns(pod, direction).run("tc", arguments)?;
    }
    Ok(())
}

/// Cilium's scheme: departure times and fq for egress, a token bucket for ingress.
fn edt(pod: &mut Pod, direction: Direction, rate: u64) -> Result<()> {
    let device = device(pod, direction)?;
    if direction == Direction::Out {
        pod.netns.run("tc", &["qdisc", "replace", "dev", &device, "root", "fq"])?;
    }
    let mut object = load(rate)?;
    let name = if direction == Direction::Out { "depart" } else { "admit" };
    netns(pod, direction).inside(|| -> Result<()> {
        let doing = || format!("attach {name} to {device}");
        // Without podshaper nothing else has made it.
        qdisc_add_clsact(&device).context(doing())?;
        let program: &mut SchedClassifier = program(&mut object, name)?;
        program.load().context(doing())?;
        let by_netlink = TcAttachOptions::Netlink(NlOptions::default());
        let id = program.attach_with_options(&device, TcAttachType::Egress, by_netlink).context(doing())?;
        // The link is removed with the device. Dropping it would look for the device in the namespace of the dropping
        // thread.
        std::mem::forget(program.take_link(id).context(doing())?);
        Ok(())
    })??;
    pod.keep(object);
    Ok(())
}

fn police(pod: &mut Pod, direction: Direction, rate: u64) -> Result<()> {
    let mut object = load(rate)?;
    let (name, hook) = match direction {
        Direction::Out => ("police_out", CgroupSkbAttachType::Egress),
        Direction::In => ("police_in", CgroupSkbAttachType::Ingress),
    };
    let doing = || format!("attach {name} to {}", pod.cgroup.path().display());
    let cgroup = File::open(pod.cgroup.path()).context(doing())?;
    let program: &mut CgroupSkb = program(&mut object, name)?;
    program.load().context(doing())?;
    program.attach(cgroup, hook, CgroupAttachMode::Single).context(doing())?;
    pod.keep(object);
    Ok(())
}

fn load(rate: u64) -> Result<Ebpf> {
    let bytes_per_s = rate / 8;
    EbpfLoader::new().override_global("BYTES_PER_S", &bytes_per_s, true).load(OBJECT).context("load peers.bpf.o")
}

fn program<'a, T>(object: &'a mut Ebpf, name: &str) -> Result<&'a mut T>
where
    &'a mut T: TryFrom<&'a mut aya::programs::Program>,
    <&'a mut T as TryFrom<&'a mut aya::programs::Program>>::Error: std::fmt::Display,
{
    let program = object.program_mut(name).ok_or_else(|| Failure::new(format_args!("no {name} in peers.bpf.o")))?;
    program.try_into().context(format_args!("take {name} of peers.bpf.o"))
}
