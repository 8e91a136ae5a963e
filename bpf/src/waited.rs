//! How long SYNs have waited ([`crate::requests`]), by client: the first round trip that a client measures is as long.

use aya_ebpf::programs::SockOpsContext;
use podshaper_abi::{REQUEST_PLACES, Waited};

use crate::{maps, tcp};

/// The client that opens a connection: a hash of the last word of its address and of its port, in host byte order.
/// Other clients may have the same hash.
#[derive(Clone, Copy)]
pub struct Client(u32);

impl Client {
    #[inline(always)]
    pub fn new((address, port): (u32, u16)) -> Self {
        Self(address ^ u32::from(port) << 16 ^ u32::from(port))
    }

    /// The client of one attachment: as a client of another pod it has another hash.
    #[inline(always)]
    fn of(self, slot: u32) -> Self {
        Self(self.0 ^ slot)
    }

    /// The place that notes how long the client's SYN has waited.
    #[inline(always)]
    fn waited<'a>(self) -> Option<&'a mut Waited> {
        /// 2^32 divided by the golden ratio: spreads hashes that differ in few bits (Knuth).
        const SPREAD: u32 = 0x9e37_79b9;
        maps::waited(self.0.wrapping_mul(SPREAD) >> (u32::BITS - REQUEST_PLACES.ilog2()))
    }

    /// Notes how long the client's SYN to an attachment waits.
    #[inline(always)]
    pub fn note(self, slot: u32, wait_ns: u64) {
        let client = self.of(slot);
        if let Some(waited) = client.waited() {
            *waited = Waited { client: client.0, us: (wait_ns / 1000) as u32 };
        }
    }
}

/// How long the SYN of a connection that a remote has opened has waited. 0 if that is no longer known.
#[inline(always)]
pub fn waited_ns(ctx: &SockOpsContext, slot: u32) -> u64 {
    let client = Client::new(tcp::remote(ctx)).of(slot);
    client.waited().filter(|waited| waited.client == client.0).map_or(0, |waited| u64::from(waited.us) * 1000)
}
