//! The maps, and all access to them. What is pinned and read by user space is laid out in `podshaper_abi`; [`Flow`] is the
//! programs' own.
//!
//! They are BTF maps because two of them cannot be anything else: the verifier finds the lock in `METERS` by its type, and
//! socket storage must be described.

use core::ptr::NonNull;

use aya_ebpf::{
    bindings::{
        BPF_F_CLONE, BPF_F_NO_PREALLOC, BPF_SK_STORAGE_GET_F_CREATE, bpf_map_type::BPF_MAP_TYPE_SK_STORAGE, bpf_sock,
    },
    btf_maps::{Array, LpmTrie, lpm_trie::Key},
    helpers::bpf_sk_storage_get,
    macros::btf_map,
};
use podshaper_abi::{DIRECTIONS, Limit, MOST_SUBNETS, Meter, OWNER_SIZE, SUBNET_SHAPED, SubnetAddress};

use crate::flow::Flow;

#[btf_map]
static LIMITS: Array<Limit, { DIRECTIONS as usize }> = Array::new();
#[btf_map]
static METERS: Array<Meter, { DIRECTIONS as usize }> = Array::new();
/// Not used by any program: whose attachment this is, in JSON, written and read by user space. It lives and dies with the pins.
#[btf_map]
static OWNER: Array<[u8; OWNER_SIZE], 1> = Array::new();
/// The subnets of the configuration. Made with room for as many as there are.
#[btf_map]
static SUBNETS: LpmTrie<SubnetAddress, u32, MOST_SUBNETS> = LpmTrie::new();
#[btf_map]
static FLOWS: FlowStorage = FlowStorage::new();

/// Declares the socket storage map as libbpf does in C, with `BPF_F_CLONE`, which aya's own type cannot: a socket that
/// accept() makes inherits the listener's entry, as it inherits its pacing rate (net/core/bpf_sk_storage.c,
/// `bpf_sk_storage_clone`).
#[repr(C)]
struct FlowStorage {
    r#type: *const [i32; BPF_MAP_TYPE_SK_STORAGE as usize],
    key: *const i32,
    value: *const Flow,
    max_entries: *const [i32; 0],
    map_flags: *const [i32; (BPF_F_NO_PREALLOC | BPF_F_CLONE) as usize],
}

// SAFETY: the fields are never read: the loader replaces the whole by a map's address.
unsafe impl Sync for FlowStorage {}

impl FlowStorage {
    const fn new() -> Self {
        use core::ptr::null;
        Self { r#type: null(), key: null(), value: null(), max_entries: null(), map_flags: null() }
    }
}

/// The limit of a direction; `None` while there is none. A copy, so that one packet sees one limit (user space may write
/// between two fields, which are each one load).
#[inline(always)]
pub fn limit(direction: u32) -> Option<Limit> {
    // Both or neither are 0; the one that is divided by is seen not to be.
    LIMITS.get(direction).copied().filter(|limit| limit.rate_bits_per_s != 0 && limit.link_bits_per_s != 0)
}

/// Whether the longest listed subnet around an address is exempt; `None` where there is none.
#[inline(always)]
pub fn subnet(address: &Key<SubnetAddress>) -> Option<bool> {
    SUBNETS.get(address).map(|kind| *kind != SUBNET_SHAPED)
}

/// The meter of a direction. Whoever changes it holds its lock; see `clock`.
#[inline(always)]
pub fn meter(direction: u32) -> Option<*mut Meter> {
    METERS.get_ptr_mut(direction)
}

/// The socket's flow, made if there is none yet. `None` when memory is short (the storage counts against the socket's
/// `optmem_max`).
///
/// # Safety
/// `socket` is a full socket that a program's context or `bpf_sk_fullsock` gave.
#[inline(always)]
pub unsafe fn flow_or_new<'a>(socket: NonNull<bpf_sock>) -> Option<&'a mut Flow> {
    // SAFETY: the caller's duty.
    unsafe { storage(socket, BPF_SK_STORAGE_GET_F_CREATE.into()) }
}

/// The socket's flow, if it has one.
///
/// # Safety
/// As for [`flow_or_new`].
#[inline(always)]
pub unsafe fn flow<'a>(socket: NonNull<bpf_sock>) -> Option<&'a mut Flow> {
    // SAFETY: the caller's duty.
    unsafe { storage(socket, 0) }
}

#[inline(always)]
unsafe fn storage<'a>(socket: NonNull<bpf_sock>, flags: u64) -> Option<&'a mut Flow> {
    let map = (&raw const FLOWS).cast_mut().cast();
    // SAFETY: the helper's entry is as large as `Flow` and lives as long as the program runs (RCU). Programs of two CPUs may
    // hold it at once for a socket that is not locked (UDP): its fields are integers, and a lost update costs a credit.
    unsafe { bpf_sk_storage_get(map, socket.as_ptr().cast(), core::ptr::null_mut(), flags).cast::<Flow>().as_mut() }
}
