//! How long the requests for connections have waited ([`crate::requests`]), by who asked: the first round trip that a client sees is as long.

use aya_ebpf::programs::SockOpsContext;
use podshaper_abi::{REQUEST_PLACES, Waited};

use crate::{maps, tcp};

/// Whoever asks for a connection: the last word of its address, and its port, in the order of the machine. Others may be the same.
#[derive(Clone, Copy)]
pub struct Client(u32);

impl Client {
    #[inline(always)]
    pub fn new((address, port): (u32, u16)) -> Self {
        Self(address ^ u32::from(port) << 16 ^ u32::from(port))
    }

    /// The same as the client of one attachment: another pod's is another one.
    #[inline(always)]
    fn of(self, slot: u32) -> Self {
        Self(self.0 ^ slot)
    }

    /// Where it is noted how long its request has waited.
    #[inline(always)]
    fn waited<'a>(self) -> Option<&'a mut Waited> {
        /// 2^32 by the golden ratio: spreads what differs in few bits (Knuth).
        const SPREAD: u32 = 0x9e37_79b9;
        maps::waited(self.0.wrapping_mul(SPREAD) >> (u32::BITS - REQUEST_PLACES.ilog2()))
    }

    /// Notes how long its request to an attachment waits.
    #[inline(always)]
    pub fn note(self, slot: u32, wait_ns: u64) {
        let client = self.of(slot);
        if let Some(waited) = client.waited() {
            *waited = Waited { client: client.0, us: (wait_ns / 1000) as u32 };
        }
    }
}

/// How long the request has waited of a connection that a remote has opened. 0 where that is not known any more.
#[inline(always)]
pub fn waited_ns(ctx: &SockOpsContext, slot: u32) -> u64 {
    let client = Client::new(tcp::remote(ctx)).of(slot);
    client.waited().filter(|waited| waited.client == client.0).map_or(0, |waited| u64::from(waited.us) * 1000)
}
