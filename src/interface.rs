//! Owns everything that podshaper changes on a pod's interface and in its network namespace: fq or htb, tbf at the host
//! end, and the sizes and sysctls that decide how large packets are.
//!
//! The state of an interface follows from the attachments on it. Each attachment brings its needs ([`Need`]), and
//! [`Interface::settle`] makes the interface so. A setting that no attachment needs is put back as it was before
//! podshaper. So an ADD adds its needs to those of the other attachments, a DEL leaves its needs out, and a failed ADD
//! counts the needs of the attachment that stays.
//!
//! A namespace is entered once for all changes. `qdisc` and `packets` have the steps in the namespace. `attachment`
//! knows which attachments share an interface.

pub mod host_end;
mod mechanism;
mod packets;
mod peer;
mod record;

use std::{
    io,
    path::{Path, PathBuf},
};

use netlink_packet_route::tc::TcHandle;

use crate::{
    error::{self, Code, Error, Result},
    netlink,
    netns::{self, Entered, Namespace},
    qdisc::{self, htb},
    request::{Limit, Limits},
};

pub use mechanism::{IngressBy, Queue};
use packets::Sysctls;
pub use packets::min_tso_segs;
use peer::{HostsEnd, Peer};
use record::Found;
pub use record::{HeldAt, Need, Record, is_zero};

/// An interface in a network namespace that was entered.
pub struct Interface {
    inside: Entered,
    /// Its number in its namespace.
    pub index: u32,
    /// The number (nsid) that its namespace has for itself. 0: none yet.
    pub namespace: u64,
    netns: PathBuf,
    netns_inode: u64,
    ifname: String,
    /// Its other end, if it is a veth.
    peer: Option<Peer>,
    /// Its host end, once that has been looked for.
    host_end: Option<Option<HostsEnd>>,
}

/// The result of [`Interface::settle`]. Each part is tried, even if the other one fails.
#[must_use]
pub struct Settled {
    /// The sizes of packets.
    pub packets: Result<()>,
    /// fq, htb and tbf.
    pub qdiscs: Result<()>,
}

impl Settled {
    /// All errors together.
    ///
    /// # Errors
    /// Everything that the kernel refused.
    pub fn all(self) -> Result<()> {
        error::all([self.packets, self.qdiscs])
    }
}

/// The results of the steps in the namespace.
struct Inside {
    packets: Result<()>,
    fq: Result<()>,
    /// `None`: htb is not wanted.
    htb: Option<Result<()>>,
}

impl Interface {
    /// Enters the namespace and finds the interface; changes nothing.
    ///
    /// # Errors
    /// [`Code::Netns`]: no such namespace or interface. [`Code::Kernel`]: podshaper may not enter the namespace.
    pub fn enter(netns: &Path, ifname: &str) -> Result<Self> {
        Self::find(Namespace::open(netns)?, netns, ifname)?
    }

    /// Enters the namespace of an attachment's record and finds the interface. `None`: there is nothing to put back any
    /// more, because the interface is gone, or the path names another namespace now.
    ///
    /// # Errors
    /// [`Code::Kernel`]: the namespace is there, and podshaper may not enter it.
    pub fn of(record: &Record) -> Result<Option<Self>> {
        let Some(netns) = record.path() else { return Ok(None) };
        let found = match Namespace::open(netns) {
            Ok(opened) if record.netns_inode.is_none_or(|inode| inode == opened.inode) => {
                Self::find(opened, netns, &record.ifname)?
            }
            Ok(_) => Err(another(netns)),
            Err(error) => Err(error),
        };
        // Most often the namespace is gone, and with it all changes in it.
        Ok(found.inspect_err(|error| log::debug!("{error}")).ok())
    }

    /// Enters the namespace. The inner error: the namespace has no such interface.
    fn find(opened: Namespace, netns: &Path, ifname: &str) -> Result<Result<Self>> {
        let netns_inode = opened.inode;
        let (inside, link) = opened.enter(|| netns::link(ifname, netns))?;
        let (netns, ifname) = (netns.to_path_buf(), ifname.to_owned());
        Ok(link.map(|link| Self {
            inside,
            index: link.header.index,
            namespace: 0,
            netns,
            netns_inode,
            ifname,
            peer: Peer::of(&link),
            host_end: None,
        }))
    }

    /// The record of an attachment that has changed nothing yet.
    pub fn record(&self) -> Record {
        Record {
            ifname: self.ifname.clone(),
            netns: Some(self.netns.to_string_lossy().into_owned()),
            netns_inode: Some(self.netns_inode),
            ..Record::default()
        }
    }

    /// The host end of the interface, if it has one in podshaper's own namespace.
    ///
    /// # Errors
    /// [`Code::Kernel`] with the kernel's error.
    pub fn host_end(&mut self) -> Result<Option<HostsEnd>> {
        if let Some(known) = self.host_end {
            return Ok(known);
        }
        let home = self.inside.home();
        let found = match self.peer {
            Some(peer) if self.inside.run(|| peer.is_in(home))? => peer.look(self.index)?,
            _ => None,
        };
        self.host_end = Some(found);
        Ok(found)
    }

    /// Whether this is the interface on which the attachment of a record was made, whose number in the namespace was
    /// `index`. A pod that may configure its network can give the name of that interface to another one. If the
    /// recorded interface is gone, the interface that has its name now is accepted.
    ///
    /// # Errors
    /// [`Code::Kernel`] with the kernel's error.
    pub fn is_that_of(&mut self, record: &Record, index: u32) -> Result<bool> {
        let is_there = |index: u32| {
            let found = netlink::link(index).map(|link| link.is_some());
            found.map_err(|cause| Error::because(Code::Kernel, format!("look for the interface {index}"), cause))
        };
        match record.held_at {
            Some(at) if is_there(at.ifindex)? => Ok(self.host_end()?.is_some_and(|end| end.ifindex == at.ifindex)),
            _ if index == 0 || index == self.index => Ok(true),
            _ => Ok(!self.inside.run(|| is_there(index))?),
        }
    }

    /// Gives the namespace its number and puts fq on the interface. Whether fq is there decides which mechanisms hold
    /// the limits. fq serves both directions: held acknowledgements leave it at their departure time, and so do egress
    /// packets whose senders have not waited. Where there is no fq, the latter wait in htb, which [`Interface::change`]
    /// puts on.
    ///
    /// # Errors
    /// [`Code::Kernel`]: the kernel has no fq, or the interface has another tool's qdisc.
    pub fn prepare(&mut self) -> Result<()> {
        let (index, there, inode) = (self.index, self.inside.there(), self.netns_inode);
        let (named, fq) = self.inside.run(|| (peer::name_namespace(there, inode), qdisc::put_fq(index)));
        // Without the number, packets of a namespace that is made in the pod may be charged twice. The pod is not made
        // to fail for this.
        self.namespace = named.unwrap_or_else(|cause| {
            log::warn!("the pod's namespace cannot be told from those that are made in the pod: {cause}");
            0
        });
        fq
    }

    /// Makes the interface what an attachment with these limits needs, beside the attachments that are `there`.
    /// `others` are those of them that it does not replace, and `fq` is the result of [`Interface::prepare`]. The
    /// changes are in `record`, also after an error.
    ///
    /// # Errors
    /// [`Code::Kernel`]: fq is gone again, and another one cannot be put on.
    pub fn change(
        &mut self,
        record: &mut Record,
        limits: &Limits,
        fq: &Result<()>,
        there: &[Need],
        others: &[Need],
    ) -> Result<()> {
        let (index, has_fq) = (self.index, fq.is_ok());
        let mine = record.clone();
        let (found, inside) = self.inside.run(|| change_inside(index, mine, limits, has_fq, there, others));
        record.found = found;
        record.htb = matches!(inside.htb, Some(Ok(())));
        if let (Err(no_fq), Some(Err(no_htb))) = (fq, &inside.htb) {
            log::warn!("what the pod sends without having waited has no queue: {no_fq}; {no_htb}");
        }
        // If this fails, the rate holds and the latency does not. The pod is not made to fail for this.
        warn("TCP may send large packets in bursts", inside.packets);
        inside.fq?;
        record.ingress_by = limits.ingress.map(|_| if has_fq { IngressBy::HeldAcks } else { IngressBy::HeldData });
        Ok(())
    }

    /// Holds ingress where there is no fq and packets cannot wait at the host end: by tbf, or else by drops. If it is
    /// not tbf, the log says why. `others`: the other attachments in the namespace.
    pub fn hold_ingress(&mut self, record: &Record, limit: &Limit, others: &[Need], all_traffic: bool) -> IngressBy {
        let here = |other: &&Need| other.record.shares_interface(record);
        let is_taken = others.iter().filter(here).any(|other| other.record.ingress_by.is_some());
        match self.hold_by_tbf(limit, is_taken, all_traffic) {
            Ok(()) => IngressBy::Tbf,
            Err(error) => {
                log::warn!("{error}");
                IngressBy::Drops
            }
        }
    }

    /// Puts tbf on the host end. tbf queues everything that the interface receives, so it cannot hold a limit on a part
    /// of the traffic.
    fn hold_by_tbf(&mut self, limit: &Limit, is_taken: bool, all_traffic: bool) -> Result<()> {
        let no = |why| Err(Error::new(Code::Kernel, why));
        match self.host_end()? {
            _ if !all_traffic => no("exemptSubnets and shapedSubnets leave drops: tbf would limit what they exempt"),
            _ if is_taken => {
                no("another limit of this interface holds ingress, which leaves drops: there is room for one")
            }
            None => no("the pod's interface is no veth with an end on this host to put tbf on"),
            Some(end) => qdisc::put_tbf(end.ifindex, limit),
        }
    }

    /// Brings the interface to what the attachments of `needs` need. Changes in the record `own` that no attachment
    /// needs are undone.
    pub fn settle(&mut self, own: &Record, needs: &[Need]) -> Settled {
        let index = self.index;
        let Inside { packets, fq, htb } = self.inside.run(|| settle_inside(index, own, needs));
        let tbf = match needs.iter().find(|need| need.record.has_tbf() && need.record.shares_interface(own)) {
            // Its limits have another layout: its tbf stays as it is.
            Some(Need { limits: None, .. }) => Ok(()),
            Some(Need { limits: Some(limits), .. }) => self.host_end().and_then(|end| match (end, &limits.ingress) {
                (Some(end), Some(limit)) => qdisc::put_tbf(end.ifindex, limit),
                (None, Some(_)) => {
                    let text = "change tbf: the pod's interface has no end on this host any more";
                    Err(Error::new(Code::Kernel, text))
                }
                (_, None) => Ok(()),
            }),
            None if own.has_tbf() => {
                self.host_end().and_then(|end| end.map_or(Ok(()), |end| qdisc::take_off(end.ifindex)))
            }
            None => Ok(()),
        };
        Settled { packets, qdiscs: error::all([fq, htb.unwrap_or(Ok(())), tbf]) }
    }
}

/// Brings the interface of an attachment that ends to what the attachments that stay need. Errors go to the log:
/// changes that are left must not keep the pod from ending.
pub fn undo(ended: &Record, staying: &[Need]) {
    if ended.is_unchanged() {
        return;
    }
    match Interface::of(ended) {
        Ok(Some(mut interface)) => warn(LEFT, interface.settle(ended, staying).all()),
        Ok(None) => {}
        Err(error) => log::warn!("{LEFT}: {error}"),
    }
}

/// The warning before the error, where something could not be put back.
pub const LEFT: &str = "not all that was changed on the pod's interface could be put back";

/// Logs an error for which a pod is not made to fail.
pub fn warn(what: &str, result: Result<()>) {
    if let Err(error) = result {
        log::warn!("{what}: {error}");
    }
}

/// Checks that the queues that were put on the interfaces for an attachment are still there. `index`: the number of the
/// pod's interface in its namespace, where the pod can rename the interface; 0: not known.
///
/// # Errors
/// [`Code::Mismatch`] names the queue that is gone. [`Code::Netns`] or [`Code::Kernel`]: it cannot be looked at.
pub fn check(record: &Record, index: u32) -> Result<()> {
    let Some(netns) = record.path() else { return Ok(()) };
    let gone = |what: &str| {
        let text =
            format!("{what} has been taken off {} of {}: podshaper put it there", record.ifname, netns.display());
        Err(Error::new(Code::Mismatch, text))
    };
    match Queue::of(record) {
        Queue::Fq if !has_queue(record, netns, index, "fq")? => return gone("fq"),
        Queue::Htb if !has_queue(record, netns, index, "htb")? => return gone("htb"),
        _ => {}
    }
    if record.has_tbf() {
        let mut interface = Interface::find(open(record, netns)?, netns, &record.ifname)??;
        if !interface.host_end()?.map_or(Ok(false), |end| qdisc::has(end.ifindex, "tbf"))? {
            return gone("tbf, at the host's end,");
        }
    }
    Ok(())
}

fn has_queue(record: &Record, netns: &Path, index: u32, kind: &str) -> Result<bool> {
    let find = || match index {
        0 => netns::link(&record.ifname, netns).map(|link| link.header.index),
        index => Ok(index),
    };
    let look = || qdisc::qdisc_at(find()?, TcHandle::ROOT).map_err(|cause| looking(record, netns, cause));
    let (_, found) = open(record, netns)?.enter(look)?;
    Ok(found?.is_some_and(|(found, _)| found == kind))
}

fn looking(record: &Record, netns: &Path, cause: io::Error) -> Error {
    let code = if cause.raw_os_error() == Some(libc::ENODEV) { Code::Netns } else { Code::Kernel };
    Error::because(code, format!("look at the qdiscs of {} in {}", record.ifname, netns.display()), cause)
}

/// The namespace of a record, if the path still names that namespace.
fn open(record: &Record, netns: &Path) -> Result<Namespace> {
    let opened = Namespace::open(netns)?;
    if record.netns_inode.is_some_and(|inode| inode != opened.inode) {
        return Err(another(netns));
    }
    Ok(opened)
}

fn another(netns: &Path) -> Error {
    let text = format!("{} names another network namespace than when the limit was put there", netns.display());
    Error::new(Code::Mismatch, text)
}

/// The steps of [`Interface::change`] in the namespace. Also returns the settings from before podshaper.
fn change_inside(
    index: u32,
    mut mine: Record,
    limits: &Limits,
    has_fq: bool,
    there: &[Need],
    others: &[Need],
) -> (Found, Inside) {
    let mut packets = Ok(());
    if limits.egress.is_some() {
        let sysctls = Sysctls::here();
        let sizes = packets::Sizes::read(index, &sysctls);
        mine.found = packets::find(&mine, there, sizes.as_ref().ok().and_then(Option::as_ref), &sysctls);
        let mut needs = others.to_vec();
        needs.push(Need { record: mine.clone(), limits: Some(*limits) });
        packets = packets::settle(index, &mine, &needs, sizes, sysctls);
    }
    let fq = if has_fq { keep_fq(index) } else { Ok(()) };
    let htb = limits.egress.filter(|_| !has_fq).map(|limit| put_htb(index, &mine, &limit, others));
    (mine.found, Inside { packets, fq, htb })
}

/// The steps of [`Interface::settle`] in the namespace.
fn settle_inside(index: u32, own: &Record, needs: &[Need]) -> Inside {
    let here = || needs.iter().filter(|need| need.record.shares_interface(own));
    // A size that was not recorded is not put back, and need not be read.
    let sysctls = Sysctls::here();
    let sizes = own.found.gso_max_size.map_or(Ok(None), |_| packets::Sizes::read(index, &sysctls));
    let packets = packets::settle(index, own, needs, sizes, sysctls);
    let (mut fq, mut htb) = (Ok(()), None);
    if here().any(|need| need.record.fq) {
        fq = keep_fq(index);
    } else if let Some(need) = here().find(|need| need.record.htb) {
        // The htb of an attachment of another layout stays as it is.
        htb = need.limits.and_then(|limits| limits.egress).map(|limit| htb::put(index, &limit));
    } else if own.fq || own.htb {
        fq = qdisc::take_off(index);
    }
    Inside { packets, fq, htb }
}

/// Puts htb with this limit on the interface, unless the queue is another attachment's.
fn put_htb(index: u32, own: &Record, limit: &Limit, others: &[Need]) -> Result<()> {
    if others.iter().any(|other| (other.record.htb || other.record.fq) && other.record.shares_interface(own)) {
        let text = "another limit of this interface has its queue, which leaves drops: there is room for one";
        return Err(Error::new(Code::Kernel, text));
    }
    let put = htb::put(index, limit);
    if put.is_err() {
        // htb without its classes is of no use, and no record would name it.
        warn(LEFT, qdisc::take_off(index));
    }
    put
}

/// Puts fq on the interface if it is not there: a DEL may have taken it off in between.
fn keep_fq(index: u32) -> Result<()> {
    if qdisc::has(index, "fq")? { Ok(()) } else { qdisc::put_fq(index) }
}
