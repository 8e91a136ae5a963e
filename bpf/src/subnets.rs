//! Which traffic the configuration exempts by its remote address: `exemptSubnets` and `shapedSubnets`, longest prefix first.
//!
//! A pod without such lists pays nothing for them: to the verifier [`SUBNETS_MODE`] is a constant, and what follows is dead code.

use aya_ebpf::{Global, btf_maps::lpm_trie::Key, programs::SkBuffContext};
use podshaper_abi::{SUBNETS_EXEMPT_BY_DEFAULT, SUBNETS_NONE, SubnetAddress};

use crate::{maps, packet};

/// Whether there are lists, and what is with an address in none of them (`podshaper_abi::SUBNETS_NONE` and so on).
#[unsafe(no_mangle)]
static SUBNETS_MODE: Global<u32> = Global::new(SUBNETS_NONE);

/// Where in a packet the remote address is: IPv4, IPv6.
#[derive(Clone, Copy)]
pub struct Remote {
    ipv4_offset: u64,
    ipv6_offset: u64,
}

impl Remote {
    /// Of a packet that is sent.
    pub const DESTINATION: Self = Self { ipv4_offset: 16, ipv6_offset: 24 };
    /// Of a packet that is received.
    pub const SOURCE: Self = Self { ipv4_offset: 12, ipv6_offset: 8 };
}

/// Whether the packet is neither limited nor counted because of its remote address.
#[inline(always)]
pub fn are_exempt(ctx: &SkBuffContext, remote: Remote) -> bool {
    if SUBNETS_MODE.load() == SUBNETS_NONE {
        return false;
    }
    let first: u8 = packet::load(ctx, 0);
    is_exempt(if first >> 4 == 4 {
        podshaper_abi::ipv4_mapped(packet::load(ctx, remote.ipv4_offset))
    } else {
        packet::load(ctx, remote.ipv6_offset)
    })
}

/// Whether what goes to a remote address and comes from it is neither limited nor counted.
#[inline(always)]
pub fn is_exempt(remote: SubnetAddress) -> bool {
    let mode = SUBNETS_MODE.load();
    if mode == SUBNETS_NONE {
        return false;
    }
    match maps::subnet(&Key::new(u128::BITS, remote)) {
        Some(is_exempt) => is_exempt,
        None => mode == SUBNETS_EXEMPT_BY_DEFAULT,
    }
}
