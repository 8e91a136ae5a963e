//! All the unsafe code of podshaper: cgroup links and array maps by bpf(2), descriptors of other processes, the signals of a command that is
//! started and its end, and how names are looked up. aya 0.14 makes links, but lets none of a cgroup/setsockopt program out to be pinned, and says of none
//! which cgroup it is on. Of maps it allocates and asks more than a list of 500 attachments can afford, and it takes a map for what another
//! podshaper pinned only if every size is as it knows it.
#![expect(unsafe_code, reason = "bpf(2) is a raw system call, and libc's functions are C")]

use std::{
    ffi::CString,
    io,
    marker::PhantomData,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    os::unix::ffi::OsStrExt,
    os::unix::process::CommandExt,
    path::Path,
    process::Command,
    thread,
    time::Duration,
};

use nix::sys::signal::SigSet;
use podshaper_abi::ListedAddress;

/// Commands of bpf(2) (uapi/linux/bpf.h, `enum bpf_cmd`).
const BPF_MAP_CREATE: libc::c_long = 0;
const BPF_MAP_LOOKUP_ELEM: libc::c_long = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_MAP_DELETE_ELEM: libc::c_long = 3;
const BPF_MAP_GET_NEXT_KEY: libc::c_long = 4;
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_OBJ_PIN: libc::c_long = 6;
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_PROG_QUERY: libc::c_long = 16;
const BPF_MAP_UPDATE_BATCH: libc::c_long = 26;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_LINK_UPDATE: libc::c_long = 29;

/// `enum bpf_map_type`
const BPF_MAP_TYPE_ARRAY: u32 = 2;

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

/// `union bpf_attr`, the part for BPF_PROG_LOAD.
#[repr(C)]
#[derive(Default)]
struct ProgLoadAttr {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
}

/// `union bpf_attr`, the part for BPF_PROG_QUERY.
#[repr(C)]
#[derive(Default)]
struct QueryAttr {
    target_fd: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    prog_ids: u64,
    prog_cnt: u32,
    reserved: u32,
    prog_attach_flags: u64,
    link_ids: u64,
    link_attach_flags: u64,
    revision: u64,
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

/// `union bpf_attr`, the part for BPF_LINK_UPDATE.
#[repr(C)]
#[derive(Default)]
struct LinkUpdateAttr {
    link_fd: u32,
    new_prog_fd: u32,
    flags: u32,
    old_prog_fd: u32,
}

/// `union bpf_attr`, the part for BPF_MAP_CREATE.
#[repr(C)]
#[derive(Default)]
struct MapCreateAttr {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
    inner_map_fd: u32,
    numa_node: u32,
    map_name: [u8; 16],
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

/// `union bpf_attr`, the part for one element of a map. BPF_MAP_GET_NEXT_KEY has the next key where the others have the value.
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
#[derive(Clone, Copy, Debug, Default)]
pub struct TrieKey {
    /// How many bits of it count.
    pub bits: u32,
    /// The address in its list.
    pub address: ListedAddress,
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

/// A map, of keys and values of these types.
pub struct Map<K, V> {
    fd: OwnedFd,
    types: PhantomData<(K, V)>,
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

/// A program for packets that the sockets of a cgroup send, which refuses each: sendto() says EPERM.
///
/// # Errors
/// What the kernel says.
pub fn refusing_program() -> io::Result<OwnedFd> {
    const BPF_PROG_TYPE_CGROUP_SKB: u32 = 8;
    /// r0 = 0; exit.
    const REFUSE: [u64; 2] = [0xb7, 0x95];
    let mut attr = ProgLoadAttr {
        prog_type: BPF_PROG_TYPE_CGROUP_SKB,
        insn_cnt: REFUSE.len() as u32,
        insns: REFUSE.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        expected_attach_type: CgroupHook::InetEgress as u32,
        ..ProgLoadAttr::default()
    };
    bpf_fd(BPF_PROG_LOAD, &mut attr)
}

/// Whether a cgroup has programs that those below it displace: attached with `BPF_F_ALLOW_OVERRIDE`.
///
/// # Errors
/// What the kernel says.
pub fn has_displaceable(cgroup: BorrowedFd<'_>, hook: CgroupHook) -> io::Result<bool> {
    const BPF_F_ALLOW_OVERRIDE: u32 = 1;
    let mut attr = QueryAttr { target_fd: cgroup.as_raw_fd() as u32, attach_type: hook as u32, ..QueryAttr::default() };
    bpf(BPF_PROG_QUERY, &mut attr)?;
    Ok(attr.prog_cnt > 0 && attr.attach_flags == BPF_F_ALLOW_OVERRIDE)
}

/// How many programs an interface of the calling thread's namespace has in front of its filters (tcx), on the way in or out. None before Linux 6.6.
///
/// # Errors
/// What the kernel says.
pub fn programs_before_filters(ifindex: u32, is_ingress: bool) -> io::Result<u32> {
    const BPF_TCX_INGRESS: u32 = 46;
    const BPF_TCX_EGRESS: u32 = 47;
    let attach_type = if is_ingress { BPF_TCX_INGRESS } else { BPF_TCX_EGRESS };
    let mut attr = QueryAttr { target_fd: ifindex, attach_type, ..QueryAttr::default() };
    match bpf(BPF_PROG_QUERY, &mut attr) {
        Ok(_) => Ok(attr.prog_cnt),
        // It has none, or the kernel knows of none.
        Err(cause) if matches!(cause.raw_os_error(), Some(libc::ENOENT | libc::EINVAL)) => Ok(0),
        Err(cause) => Err(cause),
    }
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

/// Has a link run another program from now on. No packet passes in between that neither program sees.
///
/// # Errors
/// What the kernel says; ENOLINK where the cgroup is gone.
pub fn update_link(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let (link_fd, new_prog_fd) = (link.as_raw_fd() as u32, program.as_raw_fd() as u32);
    bpf(BPF_LINK_UPDATE, &mut LinkUpdateAttr { link_fd, new_prog_fd, ..LinkUpdateAttr::default() }).map(drop)
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

impl<K: Copy + Default, V: aya::Pod + Default> Map<K, V> {
    /// Takes a descriptor for that of a map.
    ///
    /// # Errors
    /// What the kernel says; `InvalidData` if the map's elements have other sizes: it is another podshaper's.
    pub fn of(fd: OwnedFd) -> io::Result<Self> {
        let info = map_info(fd.as_fd())?;
        // The kernel trusts the caller with the sizes.
        if info.key_size as usize != size_of::<K>() || info.value_size as usize != size_of::<V>() {
            let (found, own) = ((info.key_size, info.value_size), (size_of::<K>(), size_of::<V>()));
            let text = format!("its keys and elements have {found:?} bytes and not {own:?}: it is another podshaper's");
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        Ok(Self { fd, types: PhantomData })
    }

    /// The element of a key; `None` where there is none.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn get(&self, key: &K, read: Read) -> io::Result<Option<V>> {
        let mut value = V::default();
        let attr = self.attr(key, (&raw mut value) as u64, read as u64);
        found(self.element(BPF_MAP_LOOKUP_ELEM, attr)).map(|found| found.map(|()| value))
    }

    /// Writes the element of a key.
    ///
    /// # Errors
    /// What the kernel says; E2BIG where the map is full.
    pub fn set(&self, key: &K, value: &V) -> io::Result<()> {
        /// Since Linux 6.1 each CPU has a few elements in stock, and fills the stock up in the background (kernel/bpf/memalloc.c): a call
        /// that finds none is told ENOMEM, whatever memory there is.
        const ATTEMPTS: u32 = 20;
        const PAUSE: Duration = Duration::from_millis(2);
        let write = || self.element(BPF_MAP_UPDATE_ELEM, self.attr(key, (&raw const *value) as u64, 0));
        for _ in 1..ATTEMPTS {
            match write() {
                Err(cause) if cause.raw_os_error() == Some(libc::ENOMEM) => thread::sleep(PAUSE),
                written => return written,
            }
        }
        write()
    }

    /// Removes the element of a key, if there is one.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn remove(&self, key: &K) -> io::Result<()> {
        found(self.element(BPF_MAP_DELETE_ELEM, self.attr(key, 0, 0))).map(drop)
    }

    /// Whether there is no element.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn is_empty(&self) -> io::Result<bool> {
        let mut next = K::default();
        let (map_fd, value) = (self.fd.as_raw_fd() as u32, (&raw mut next) as u64);
        let attr = ElementAttr { map_fd, value, ..ElementAttr::default() };
        found(self.element(BPF_MAP_GET_NEXT_KEY, attr)).map(|found| found.is_none())
    }

    /// All keys.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn keys(&self) -> io::Result<Vec<K>> {
        let mut keys = Vec::new();
        loop {
            let mut next = K::default();
            let last = keys.last().map_or(0, |last| &raw const *last as u64);
            let attr = ElementAttr {
                map_fd: self.fd.as_raw_fd() as u32,
                key: last,
                value: (&raw mut next) as u64,
                ..ElementAttr::default()
            };
            match found(self.element(BPF_MAP_GET_NEXT_KEY, attr))? {
                Some(()) => keys.push(next),
                None => return Ok(keys),
            }
        }
    }

    fn attr(&self, key: &K, value: u64, flags: u64) -> ElementAttr {
        let map_fd = self.fd.as_raw_fd() as u32;
        ElementAttr { map_fd, key: &raw const *key as u64, value, flags, ..ElementAttr::default() }
    }

    fn element(&self, command: libc::c_long, mut attr: ElementAttr) -> io::Result<()> {
        bpf(command, &mut attr).map(drop)
    }
}

impl<K, V> AsFd for Map<K, V> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// `None` where the kernel says that there is no such element.
fn found(result: io::Result<()>) -> io::Result<Option<()>> {
    match result {
        Err(cause) if cause.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        result => result.map(Some),
    }
}

/// Makes an array map of one element, which is these bytes.
///
/// # Errors
/// What the kernel says.
pub fn new_element(name: &str, bytes: &[u8]) -> io::Result<OwnedFd> {
    // Before Linux 5.11 maps count against this limit, which is 64 KiB on many nodes. Root may raise it.
    let unlimited = libc::RLIM_INFINITY;
    let _ = nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_MEMLOCK, unlimited, unlimited);
    let mut map_name = [0; 16];
    map_name.iter_mut().zip(name.bytes().take(15)).for_each(|(to, from)| *to = from);
    let mut attr = MapCreateAttr {
        map_type: BPF_MAP_TYPE_ARRAY,
        key_size: 4,
        value_size: bytes.len() as u32,
        max_entries: 1,
        map_name,
        ..MapCreateAttr::default()
    };
    let map = bpf_fd(BPF_MAP_CREATE, &mut attr)?;
    write_element(map.as_fd(), bytes, bytes.len())?;
    Ok(map)
}

/// The first element of an array map of any size of elements.
///
/// # Errors
/// What the kernel says.
pub fn element_bytes(map: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    // The kernel copies elements in units of eight bytes.
    let mut value = vec![0; element_size(map)?.next_multiple_of(8)];
    let (map_fd, key) = (map.as_raw_fd() as u32, 0u32);
    let value_at = value.as_mut_ptr() as u64;
    let mut attr = ElementAttr { map_fd, key: &raw const key as u64, value: value_at, ..ElementAttr::default() };
    bpf(BPF_MAP_LOOKUP_ELEM, &mut attr)?;
    Ok(value)
}

/// Writes the first element of an array map, with zeros behind these bytes.
///
/// # Errors
/// What the kernel says; `InvalidData` if the map's elements are shorter.
pub fn set_element_bytes(map: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<()> {
    let size = element_size(map)?;
    if bytes.len() > size {
        let text = format!("its elements have {size} bytes, and this takes {}", bytes.len());
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    write_element(map, bytes, size)
}

/// Writes the element of an array map whose elements have `size` bytes, with zeros at its end.
fn write_element(map: BorrowedFd<'_>, bytes: &[u8], size: usize) -> io::Result<()> {
    let mut value = bytes.to_vec();
    value.resize(size.next_multiple_of(8), 0);
    let (map_fd, key) = (map.as_raw_fd() as u32, 0u32);
    let value_at = value.as_ptr() as u64;
    let mut attr = ElementAttr { map_fd, key: &raw const key as u64, value: value_at, ..ElementAttr::default() };
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

/// Bytes of an element, from the kernel; that the object is an array map with 32-bit keys is checked with it.
fn element_size(map: BorrowedFd<'_>) -> io::Result<usize> {
    match map_info(map)? {
        MapInfo { map_type: BPF_MAP_TYPE_ARRAY, key_size: 4, value_size, .. } => Ok(value_size as usize),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "it is no array map: not podshaper's")),
    }
}

fn map_info(map: BorrowedFd<'_>) -> io::Result<MapInfo> {
    let mut info = MapInfo::default();
    let info_len = size_of::<MapInfo>() as u32;
    bpf(
        BPF_OBJ_GET_INFO_BY_FD,
        &mut InfoAttr { bpf_fd: map.as_raw_fd() as u32, info_len, info: &raw mut info as u64 },
    )?;
    Ok(info)
}

/// Has a command start without these signals blocked: it would inherit what is blocked here.
pub fn unblock_before_exec(command: &mut Command, signals: SigSet) {
    // SAFETY: between fork and exec it makes one system call, and allocates nothing.
    unsafe { command.pre_exec(move || signals.thread_unblock().map_err(io::Error::from)) };
}

/// Has a command killed when the thread that starts it ends.
pub fn kill_with_parent(command: &mut Command) {
    let parent = std::process::id();
    let ask = move || {
        // SAFETY: both are one system call each, which takes no pointer. Between fork and exec nothing is allocated.
        let (asked, found) = unsafe { (libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL), libc::getppid()) };
        match asked {
            0 if u32::try_from(found) == Ok(parent) => Ok(()),
            // It has ended already, so that no signal will come.
            0 => Err(io::Error::from_raw_os_error(libc::ESRCH)),
            _ => Err(io::Error::last_os_error()),
        }
    };
    // SAFETY: see above.
    unsafe { command.pre_exec(ask) };
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

/// A handle of a process, which is not another's when that one has its number.
///
/// # Errors
/// What the kernel says; ESRCH where there is no such process.
pub fn open_process(id: libc::pid_t) -> io::Result<OwnedFd> {
    // SAFETY: a process id and no flags: nothing of this process's memory is touched.
    opened(unsafe { libc::syscall(libc::SYS_pidfd_open, id, 0) })
}

/// A descriptor of another process, as one of this process: the same open file or socket (Linux 5.6). Takes the right to trace it.
///
/// # Errors
/// What the kernel says; EBADF where it has no such descriptor.
pub fn descriptor_of(process: BorrowedFd<'_>, number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: numbers alone, as in `open_process`.
    opened(unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), number, 0) })
}

/// What a call that opens a descriptor (close-on-exec) has returned.
fn opened(result: libc::c_long) -> io::Result<OwnedFd> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just opened it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(result as RawFd) })
}

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
