//! A socket option that is longer than a page: the source filter of a multicast group. The options of iptables are
//! longer still, but this option needs no privilege, and the kernel shows what it received.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::net::{Ipv4Addr, UdpSocket};

use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};
use serde::Serialize;

use super::context;

const COUNT: usize = 2_000;
const GROUP: Ipv4Addr = Ipv4Addr::new(239, 1, 2, 3);
/// linux/in.h
const IP_MSFILTER: libc::c_int = 41;
const MCAST_INCLUDE: u32 = 1;

#[derive(clap::Args)]
pub struct Sources {
    /// Address of the interface to join the group on
    #[arg(long)]
    interface: Ipv4Addr,
}

/// `struct ip_msfilter` (linux/in.h) with room for its sources.
#[repr(C)]
#[derive(Clone, Copy)]
struct Filter {
    group: u32,
    interface: u32,
    mode: u32,
    count: u32,
    sources: [u32; COUNT],
}

#[derive(Clone, Copy)]
struct MulticastFilter;
nix::setsockopt_impl!(MulticastFilter, libc::IPPROTO_IP, IP_MSFILTER, Filter, sockopt::SetStruct<Filter>);

#[derive(Serialize)]
pub struct SourcesReport {
    /// Bytes of the option.
    bytes: usize,
    /// The error's name.
    error: Option<String>,
    /// The number of different sources that the kernel then has.
    kept: usize,
}

pub fn sources(options: &Sources) -> io::Result<SourcesReport> {
    let socket = UdpSocket::bind((GROUP, 0))?;
    socket.join_multicast_v4(&GROUP, &options.interface)?;
    let big_endian = |address: Ipv4Addr| u32::from(address).to_be();
    // A newly joined group is in exclude mode; a filter of the same mode keeps it joined.
    let mut filter = Filter {
        group: big_endian(GROUP),
        interface: big_endian(options.interface),
        mode: MCAST_INCLUDE,
        count: COUNT as u32,
        sources: [0; COUNT],
    };
    for (source, number) in filter.sources.iter_mut().zip(1u32..) {
        *source = big_endian(Ipv4Addr::from(0x0a00_0000 | number));
    }
    let result = setsockopt(&socket, MulticastFilter, &filter);
    Ok(SourcesReport {
        bytes: size_of::<Filter>(),
        error: result.err().map(|error: Errno| format!("{error:?}")),
        kept: kept(&filter)?,
    })
}

/// The number of the filter's sources in this namespace's list.
fn kept(filter: &Filter) -> io::Result<usize> {
    const LIST: &str = "/proc/thread-self/net/mcfilter";
    let list = fs::read_to_string(LIST).map_err(context(format_args!("read {LIST}")))?;
    // Index, device, group, source, ..: addresses as 0x0a000001.
    let source = |line: &str| line.split_whitespace().nth(3).map(String::from);
    let found: HashSet<String> = list.lines().filter_map(source).collect();
    let text = |source: &&u32| found.contains(&format!("{:#010x}", u32::from_be(**source)));
    Ok(filter.sources.iter().filter(text).count())
}
