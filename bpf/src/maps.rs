//! The maps, and all access to them. `podshaper_abi` has the layout of the values that user space reads and writes;
//! only the programs use [`Flow`].
//!
//! The maps are BTF maps because some of them must be: the verifier finds the lock in `METERS` by its BTF type, and
//! socket storage needs a BTF description.

use core::ptr::NonNull;

use aya_ebpf::{
    bindings::{
        BPF_F_CLONE, BPF_F_NO_PREALLOC, BPF_SK_STORAGE_GET_F_CREATE,
        bpf_map_type::{BPF_MAP_TYPE_CGROUP_STORAGE, BPF_MAP_TYPE_SK_STORAGE},
        bpf_sock,
    },
    btf_maps::{Array, HashMap, LpmTrie, lpm_trie::Key},
    helpers::{bpf_get_local_storage, bpf_sk_storage_get},
    macros::btf_map,
};
use podshaper_abi::{
    HostEnd, LOOPBACK_IFINDEX, Limits, ListedAddress, MAX_ATTACHMENTS, MAX_LISTED_SUBNETS, Meters, OtherPaths, Others,
    REQUEST_PLACES, SUBNET_EXEMPT, Scope, Scopes, Waited,
};

use crate::flow::Flow;

/// A hash map of attachments, by slot. Not preallocated: most nodes have a hundred attachments, and room for thousands
/// would take megabytes. A changed element is a new element to the kernel, so a program sees one limit from its
/// beginning to its end.
type BySlot<V> = HashMap<u32, V, MAX_ATTACHMENTS, { BPF_F_NO_PREALLOC as usize }>;

#[btf_map]
static LIMITS: BySlot<Limits> = BySlot::new();
#[btf_map]
static METERS: BySlot<Meters> = BySlot::new();
/// Packets that took other paths than the cgroup's sockets.
#[btf_map]
static OTHERS: BySlot<OtherPaths> = BySlot::new();
/// The host ends of the pods' veths, by interface number.
#[btf_map]
static HOST_ENDS: BySlot<HostEnd> = BySlot::new();
/// The attachments of each cgroup, in the cgroup's own storage.
#[btf_map]
static SCOPES: CgroupStorage = CgroupStorage::new();
/// The subnets of all configurations; each list is below a number of its own.
#[btf_map]
static SUBNETS: LpmTrie<ListedAddress, u32, MAX_LISTED_SUBNETS> = LpmTrie::new();
/// How long SYNs have waited, by client. If two clients share a place, the later one remains.
#[btf_map]
static REQUESTS: Array<Waited, { REQUEST_PLACES as usize }> = Array::new();
#[btf_map]
static FLOWS: FlowStorage = FlowStorage::new();

/// Declares a map as libbpf does in C, which aya's own types cannot do for these two maps.
macro_rules! declare_map {
    ($(#[$doc:meta])* $name:ident, $type:ident, $flags:expr, $key:ty, $value:ty) => {
        $(#[$doc])*
        #[repr(C)]
        struct $name {
            r#type: *const [i32; $type as usize],
            key: *const $key,
            value: *const $value,
            max_entries: *const [i32; 0],
            map_flags: *const [i32; $flags as usize],
        }

        // SAFETY: the fields are never read: the loader replaces the whole structure by a map's address.
        unsafe impl Sync for $name {}

        impl $name {
            const fn new() -> Self {
                use core::ptr::null;
                Self { r#type: null(), key: null(), value: null(), max_entries: null(), map_flags: null() }
            }
        }
    };
}

declare_map!(
    /// Socket storage with `BPF_F_CLONE`: a socket that accept() makes inherits the listener's entry, as it inherits
    /// the listener's pacing rate (net/core/bpf_sk_storage.c, `bpf_sk_storage_clone`).
    FlowStorage, BPF_MAP_TYPE_SK_STORAGE, (BPF_F_NO_PREALLOC | BPF_F_CLONE), i32, Flow
);
declare_map!(
    /// The storage of a cgroup to which a program is attached. With a key of 64 bits all programs of the cgroup share
    /// the storage (since Linux 5.9, kernel/bpf/local_storage.c, `cgroup_storage_get_btf`).
    CgroupStorage, BPF_MAP_TYPE_CGROUP_STORAGE, 0, u64, Scopes
);

/// The attachment of an interface, on the cgroup for which the program runs. Loopback has none: over loopback the pod
/// talks to itself.
#[inline(always)]
pub fn scope(ifindex: u32) -> Option<Scope> {
    if ifindex == LOOPBACK_IFINDEX {
        return None;
    }
    let found = scopes().0.iter().find(|scope| scope.slot != 0 && (scope.ifindex == 0 || scope.ifindex == ifindex));
    found.copied()
}

/// The only attachment on the cgroup for which the program runs; `None` where there are several.
#[inline(always)]
pub fn only_scope() -> Option<Scope> {
    let [first, second, ..] = scopes().0;
    (first.slot != 0 && second.slot == 0).then_some(first)
}

#[inline(always)]
fn scopes<'a>() -> &'a Scopes {
    let map = (&raw const SCOPES).cast_mut().cast();
    // SAFETY: the helper cannot fail in a program that is attached to a cgroup: the kernel made the storage at that
    // time. User space replaces the value as a whole, and the value that a program holds stays until the program ends
    // (RCU).
    unsafe { &*bpf_get_local_storage(map, 0).cast::<Scopes>() }
}

/// The limits of an attachment; `None` if the attachment is gone.
#[inline(always)]
pub fn limits<'a>(slot: u32) -> Option<&'a Limits> {
    // SAFETY: no process writes into an element: user space replaces elements. An element that a program holds is not
    // freed until the program ends. Since Linux 6.1 the element may become another attachment's meanwhile: one packet
    // is then paced by a limit that is not its own.
    unsafe { LIMITS.get(slot) }
}

/// The meters of an attachment. Code that changes them holds their lock; see `clock`.
#[inline(always)]
pub fn meters(slot: u32) -> Option<NonNull<Meters>> {
    METERS.get_ptr_mut(slot).and_then(NonNull::new)
}

/// The record of the host end of a pod's veth, by interface number.
#[inline(always)]
pub fn host_end<'a>(ifindex: u32) -> Option<&'a HostEnd> {
    // SAFETY: as in `limits`.
    unsafe { HOST_ENDS.get(ifindex) }
}

/// The record of an attachment's packets of other paths, in one direction. Many CPUs add to it.
#[inline(always)]
pub fn others<'a>(slot: u32, direction: u32) -> Option<&'a mut Others> {
    let paths = OTHERS.get_ptr_mut(slot)?;
    // SAFETY: the verifier checked the pointer to the map's value, and the direction is one of two. Fields are either
    // added to atomically (see `covered::add`) or stored whole.
    unsafe { (&raw mut (*paths).of).cast::<Others>().add(direction as usize).as_mut() }
}

/// How long a SYN has waited, by its place.
#[inline(always)]
pub fn waited<'a>(place: u32) -> Option<&'a mut Waited> {
    // SAFETY: the verifier checked the pointer. The value is two integers, and two CPUs may mix two values: the wait is
    // then that of another SYN, which is about as long.
    REQUESTS.get_ptr_mut(place).and_then(|waited| unsafe { waited.as_mut() })
}

/// Whether an address is exempt: the longest subnet of its list that contains the address decides.
#[inline(always)]
pub fn is_exempt(address: ListedAddress) -> bool {
    let bits = 8 * size_of::<ListedAddress>() as u32;
    SUBNETS.get(&Key::new(bits, address)).is_some_and(|kind| *kind == SUBNET_EXEMPT)
}

/// The socket's flow, which is made if there is none yet. `None` when memory is short (the storage counts against the
/// socket's `optmem_max`).
///
/// # Safety
/// `socket` is a full socket, from a program's context or from `bpf_sk_fullsock`.
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
    // SAFETY: the helper's entry is as large as `Flow` and lives as long as the program runs (RCU). Programs of two
    // CPUs may hold it at once for a socket that is not locked (UDP): its fields are integers, and a lost update costs
    // a credit.
    unsafe { bpf_sk_storage_get(map, socket.as_ptr().cast(), core::ptr::null_mut(), flags).cast::<Flow>().as_mut() }
}
