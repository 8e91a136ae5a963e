//! The traffic that the configuration exempts by its remote address: `exemptSubnets` and `shapedSubnets`, where the
//! longest prefix wins.

use aya_ebpf::programs::SkBuffContext;
use podshaper_abi::{ListedAddress, SubnetAddress};

use crate::{maps, packet};

/// The offset of the remote address in a packet, for IPv4 and for IPv6.
#[derive(Clone, Copy)]
pub struct Remote {
    start: u64,
    ipv4_offset: u64,
    ipv6_offset: u64,
}

impl Remote {
    /// The remote address of a packet that is sent.
    pub const DESTINATION: Self = Self { start: 0, ipv4_offset: 16, ipv6_offset: 24 };
    /// The remote address of a packet that is received.
    pub const SOURCE: Self = Self { start: 0, ipv4_offset: 12, ipv6_offset: 8 };

    /// The same address behind a link header of so many bytes, as at tc.
    #[inline(always)]
    pub const fn after(self, link_bytes: u64) -> Self {
        Self { start: link_bytes, ..self }
    }
}

/// Whether the packet is neither limited nor counted, because of its remote address.
#[inline(always)]
pub fn are_exempt(ctx: &SkBuffContext, list: u64, remote: Remote) -> bool {
    // Most pods have no list, and need no lookup.
    if list == 0 {
        return false;
    }
    let first: u8 = packet::load(ctx, remote.start);
    is_exempt(
        list,
        if first >> 4 == 4 {
            podshaper_abi::ipv4_mapped(packet::load(ctx, remote.start + remote.ipv4_offset))
        } else {
            packet::load(ctx, remote.start + remote.ipv6_offset)
        },
    )
}

/// Whether traffic to and from a remote address is neither limited nor counted.
#[inline(always)]
pub fn is_exempt(list: u64, address: SubnetAddress) -> bool {
    list != 0 && maps::is_exempt(ListedAddress { list: list.to_ne_bytes(), address })
}
