//! All the unsafe code of podshaper: cgroup links and array maps by bpf(2), a signal handler, and how names are looked up. aya 0.14 makes links, but lets none of a
//! cgroup/setsockopt program out to be pinned, and says of none which cgroup it is on. Of maps it allocates and asks more than a list
//! of 500 attachments can afford, and it takes a map for what another podshaper pinned only if every size is as it knows it.
#![expect(unsafe_code, reason = "bpf(2) is a raw system call, and libc's functions are C")]

use std::{
    ffi::CString,
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    os::unix::ffi::OsStrExt,
    path::Path,
};

use podshaper_abi::SubnetAddress;

/// Commands of bpf(2) (uapi/linux/bpf.h, `enum bpf_cmd`).
const BPF_MAP_LOOKUP_ELEM: libc::c_long = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_OBJ_PIN: libc::c_long = 6;
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_MAP_UPDATE_BATCH: libc::c_long = 26;
const BPF_LINK_CREATE: libc::c_long = 28;

/// The kernel's include/linux/errno.h. It is not meant for user space, and gets there all the same.
const ENOTSUPP: i32 = 524;

/// Where a program can be attached to a cgroup (uapi/linux/bpf.h, `enum bpf_attach_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum CgroupHook {
    /// `BPF_CGROUP_INET_INGRESS`
    InetIngress = 0,
    /// `BPF_CGROUP_INET_EGRESS`
    InetEgress = 1,
    /// `BPF_CGROUP_SOCK_OPS`
    SockOps = 3,
    /// `BPF_CGROUP_SETSOCKOPT`
    Setsockopt = 22,
}

/// `union bpf_attr`, the part for BPF_LINK_CREATE.
#[repr(C)]
#[derive(Default)]
struct LinkCreateAttr {
    prog_fd: u32,
    target_fd: u32,
    attach_type: u32,
    flags: u32,
}

/// `union bpf_attr`, the part for BPF_OBJ_PIN and BPF_OBJ_GET.
#[repr(C)]
#[derive(Default)]
struct PinAttr {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

/// `union bpf_attr`, the part for BPF_OBJ_GET_INFO_BY_FD.
#[repr(C)]
#[derive(Default)]
struct InfoAttr {
    bpf_fd: u32,
    info_len: u32,
    info: u64,
}

/// `struct bpf_link_info`, the part for cgroup links (Linux 5.8 and later).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CgroupLink {
    /// `BPF_LINK_TYPE_CGROUP` is 3.
    pub link_type: u32,
    /// The link's id in the kernel.
    pub id: u32,
    /// The id of the program it holds.
    pub program_id: u32,
    reserved: u32,
    /// Inode number of the cgroup's directory; 0 once the cgroup is gone and the link is dead.
    pub cgroup_id: u64,
    /// `enum bpf_attach_type`.
    pub attach_type: u32,
    reserved_too: u32,
}

/// `union bpf_attr`, the part for BPF_MAP_LOOKUP_ELEM and BPF_MAP_UPDATE_ELEM.
#[repr(C)]
#[derive(Default)]
struct ElementAttr {
    map_fd: u32,
    reserved: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// `union bpf_attr`, the part for BPF_MAP_UPDATE_BATCH.
#[repr(C)]
#[derive(Default)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// A key of a trie (`struct bpf_lpm_trie_key`).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct TrieKey {
    /// How many bits of the address count.
    pub bits: u32,
    /// The address.
    pub address: SubnetAddress,
}

/// `struct bpf_map_info`, its beginning.
#[repr(C)]
#[derive(Default)]
struct MapInfo {
    map_type: u32,
    id: u32,
    key_size: u32,
    value_size: u32,
}

/// How an element of a map is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Read {
    /// As it is.
    Plain = 0,
    /// All of one moment: under the `bpf_spin_lock` that is in it (`BPF_F_LOCK`), for as long as it takes to copy it.
    Locked = 4,
}

/// Opens a pinned object.
///
/// # Errors
/// What the kernel says; ENOENT where there is no pin.
pub fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    bpf_fd(BPF_OBJ_GET, &mut PinAttr { pathname: path.as_ptr() as u64, ..PinAttr::default() })
}

/// Pins an object.
///
/// # Errors
/// What the kernel says; EEXIST where there is a pin already.
pub fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let bpf_fd = object.as_raw_fd() as u32;
    bpf(BPF_OBJ_PIN, &mut PinAttr { pathname: path.as_ptr() as u64, bpf_fd, file_flags: 0 }).map(drop)
}

/// Attaches a program to a cgroup, beside whatever is attached there (a link always is what is called "multi" otherwise). It is
/// detached when the link's last descriptor and pin are gone.
///
/// # Errors
/// What the kernel says.
pub fn link_to_cgroup(program: BorrowedFd<'_>, cgroup: BorrowedFd<'_>, hook: CgroupHook) -> io::Result<OwnedFd> {
    let mut attr = LinkCreateAttr {
        prog_fd: program.as_raw_fd() as u32,
        target_fd: cgroup.as_raw_fd() as u32,
        attach_type: hook as u32,
        flags: 0,
    };
    bpf_fd(BPF_LINK_CREATE, &mut attr)
}

/// What the kernel knows of a cgroup link.
///
/// # Errors
/// What the kernel says.
pub fn cgroup_link(link: BorrowedFd<'_>) -> io::Result<CgroupLink> {
    let mut info = CgroupLink::default();
    let mut attr = InfoAttr {
        bpf_fd: link.as_raw_fd() as u32,
        info_len: size_of::<CgroupLink>() as u32,
        info: &raw mut info as u64,
    };
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr)?;
    Ok(info)
}

/// The first two elements of an array map, which are all that podshaper's have.
///
/// # Errors
/// What the kernel says; `InvalidData` if the map's elements have another size: it is another podshaper's.
pub fn both_elements<V: aya::Pod + Default>(map: BorrowedFd<'_>, read: Read) -> io::Result<[V; 2]> {
    check_size::<V>(map)?;
    let mut values = [V::default(), V::default()];
    for (index, value) in (0..).zip(&mut values) {
        look_up(map, index, (&raw mut *value).cast(), read)?;
    }
    Ok(values)
}

/// An element of an array map of any size of elements.
///
/// # Errors
/// What the kernel says.
pub fn element_bytes(map: BorrowedFd<'_>, index: u32) -> io::Result<Vec<u8>> {
    // The kernel copies elements in units of eight bytes.
    let mut value = vec![0; value_size(map)?.next_multiple_of(8)];
    look_up(map, index, value.as_mut_ptr(), Read::Plain)?;
    Ok(value)
}

/// Writes an element of an array map.
///
/// # Errors
/// What the kernel says; `InvalidData` if the map's elements have another size.
pub fn set_element<V: aya::Pod>(map: BorrowedFd<'_>, index: u32, value: &V) -> io::Result<()> {
    check_size::<V>(map)?;
    let mut attr = ElementAttr {
        map_fd: map.as_raw_fd() as u32,
        key: &raw const index as u64,
        value: &raw const *value as u64,
        ..ElementAttr::default()
    };
    bpf(BPF_MAP_UPDATE_ELEM, &mut attr).map(drop)
}

/// Keeps an element of zeros with a socket, in a map of socket storage whose elements have this many bytes.
///
/// # Errors
/// What the kernel says.
pub fn keep_with_socket(map: BorrowedFd<'_>, socket: BorrowedFd<'_>, value_bytes: usize) -> io::Result<()> {
    let (key, value) = (socket.as_raw_fd(), vec![0u8; value_bytes.next_multiple_of(8)]);
    let mut attr = ElementAttr {
        map_fd: map.as_raw_fd() as u32,
        key: &raw const key as u64,
        value: value.as_ptr() as u64,
        ..ElementAttr::default()
    };
    bpf(BPF_MAP_UPDATE_ELEM, &mut attr).map(drop)
}

/// Writes all these elements of a trie whose values have 32 bits, as many keys as values: in one call where the kernel can, since a
/// thousand calls take milliseconds.
///
/// # Errors
/// What the kernel says.
pub fn insert_all(map: BorrowedFd<'_>, keys: &[TrieKey], values: &[u32]) -> io::Result<()> {
    let map_fd = map.as_raw_fd() as u32;
    let count = keys.len().min(values.len()) as u32;
    let (all_keys, all_values) = (keys.as_ptr() as u64, values.as_ptr() as u64);
    let mut attr = BatchAttr { keys: all_keys, values: all_values, count, map_fd, ..BatchAttr::default() };
    match bpf(BPF_MAP_UPDATE_BATCH, &mut attr) {
        // Linux before 5.14 does not know it of tries.
        Err(cause) if cause.raw_os_error() == Some(ENOTSUPP) => keys.iter().zip(values).try_for_each(|(key, value)| {
            let (key, value) = (&raw const *key as u64, &raw const *value as u64);
            bpf(BPF_MAP_UPDATE_ELEM, &mut ElementAttr { map_fd, key, value, ..ElementAttr::default() }).map(drop)
        }),
        written => written.map(drop),
    }
}

/// `value` has room for an element.
fn look_up(map: BorrowedFd<'_>, index: u32, value: *mut u8, read: Read) -> io::Result<()> {
    let map_fd = map.as_raw_fd() as u32;
    let mut attr =
        ElementAttr { map_fd, key: &raw const index as u64, value: value as u64, flags: read as u64, reserved: 0 };
    bpf(BPF_MAP_LOOKUP_ELEM, &mut attr).map(drop)
}

/// The kernel trusts the caller with the size.
fn check_size<V>(map: BorrowedFd<'_>) -> io::Result<()> {
    match value_size(map)? {
        size if size == size_of::<V>() => Ok(()),
        size => {
            let text = format!("its elements have {size} bytes and not {}: it is another podshaper's", size_of::<V>());
            Err(io::Error::new(io::ErrorKind::InvalidData, text))
        }
    }
}

/// Bytes of an element, from the kernel; that the object is an array map with 32-bit keys is checked with it.
fn value_size(map: BorrowedFd<'_>) -> io::Result<usize> {
    const BPF_MAP_TYPE_ARRAY: u32 = 2;
    let mut info = MapInfo::default();
    let info_len = size_of::<MapInfo>() as u32;
    let mut attr = InfoAttr { bpf_fd: map.as_raw_fd() as u32, info_len, info: &raw mut info as u64 };
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr)?;
    match info {
        MapInfo { map_type: BPF_MAP_TYPE_ARRAY, key_size: 4, value_size, .. } => Ok(value_size as usize),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "it is no array map: not podshaper's")),
    }
}

/// Has a signal do nothing, where it would end the process. Unlike one that is ignored, it is back to normal in a program that is
/// started.
///
/// # Errors
/// What the kernel says.
pub fn survive(signal: libc::c_int) -> io::Result<()> {
    extern "C" fn nothing(_: libc::c_int) {}
    // SAFETY: a handler that does nothing may interrupt anything.
    let before = unsafe { libc::signal(signal, nothing as extern "C" fn(libc::c_int) as libc::sighandler_t) };
    if before == libc::SIG_ERR { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Has getaddrinfo look into /etc/hosts and ask the servers of /etc/resolv.conf, each for one second, and nobody else.
///
/// glibc (2.34 and later) has these two ways in itself. For any other that the node's nsswitch.conf names (`resolve`, `mymachines`,
/// ..) it loads the node's library into the process, and a static binary has another glibc than that library was made for. The second
/// is for a server that is down: with glibc's 5 the next one would be asked too late.
#[cfg(target_env = "gnu")]
pub fn look_up_names_without_plugins() {
    unsafe extern "C" {
        /// nss.h
        fn __nss_configure_lookup(database: *const libc::c_char, services: *const libc::c_char) -> libc::c_int;
    }
    // SAFETY: both are C strings, which glibc copies; no other thread of this process looks up names or reads the environment.
    // It fails only for want of memory, or where these services are unknown, and then nsswitch.conf counts.
    unsafe {
        __nss_configure_lookup(c"hosts".as_ptr(), c"files dns".as_ptr());
        libc::setenv(c"RES_OPTIONS".as_ptr(), c"timeout:1 attempts:2".as_ptr(), 0);
    }
}

/// Other libcs have no plugins.
#[cfg(not(target_env = "gnu"))]
pub fn look_up_names_without_plugins() {}

/// A command that opens a descriptor.
fn bpf_fd<T>(command: libc::c_long, attr: &mut T) -> io::Result<OwnedFd> {
    let fd = bpf(command, attr)?;
    // SAFETY: the kernel just opened it for us (close-on-exec, as all of bpf(2)'s).
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// bpf(2) itself.
fn bpf<T>(command: libc::c_long, attr: &mut T) -> io::Result<i32> {
    // SAFETY: `attr` is the command's part of `union bpf_attr`, and all it points to outlives the call; the kernel takes what is
    // missing from the union as zero.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *attr, size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as i32) }
}
