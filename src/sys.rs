//! All unsafe code of podshaper: cgroup links and array maps by bpf(2), descriptors of other processes, the signals and
//! the end of a command that podshaper starts, and how names are looked up.
//!
//! aya 0.14 makes links, but it does not let the link of a cgroup/setsockopt program out to be pinned, and tells for no
//! link which cgroup it is on. For maps, aya allocates more memory and asks the kernel more often than a list of 500
//! attachments can afford. It accepts a map that another podshaper pinned only if every size is the one that it knows.
#![expect(unsafe_code, reason = "bpf(2) is a raw system call, and libc's functions are C")]

mod maps;
mod process;

use std::{
    ffi::CString,
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    os::unix::ffi::OsStrExt,
    path::Path,
};

pub use maps::{Map, Read, TrieKey, element_bytes, insert_all, keep_with_socket, new_element, set_element_bytes};
pub use process::{descriptor_of, kill_with_parent, look_up_names_without_plugins, open_process, unblock_before_exec};

/// Commands of bpf(2) (uapi/linux/bpf.h, `enum bpf_cmd`).
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_OBJ_PIN: libc::c_long = 6;
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_PROG_QUERY: libc::c_long = 16;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_LINK_UPDATE: libc::c_long = 29;

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

/// Opens a pinned object.
///
/// # Errors
/// The kernel's error; ENOENT where there is no pin.
pub fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    bpf_fd(BPF_OBJ_GET, &mut PinAttr { pathname: path.as_ptr() as u64, ..PinAttr::default() })
}

/// Pins an object.
///
/// # Errors
/// The kernel's error; EEXIST where there is a pin already.
pub fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let bpf_fd = object.as_raw_fd() as u32;
    bpf(BPF_OBJ_PIN, &mut PinAttr { pathname: path.as_ptr() as u64, bpf_fd, file_flags: 0 }).map(drop)
}

/// A program that refuses every packet that the sockets of a cgroup send: sendto() fails with EPERM.
///
/// # Errors
/// The kernel's error.
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

/// Whether a cgroup has programs that a program on a cgroup below displaces: they were attached with
/// `BPF_F_ALLOW_OVERRIDE`.
///
/// # Errors
/// The kernel's error.
pub fn has_displaceable(cgroup: BorrowedFd<'_>, hook: CgroupHook) -> io::Result<bool> {
    const BPF_F_ALLOW_OVERRIDE: u32 = 1;
    let mut attr = QueryAttr { target_fd: cgroup.as_raw_fd() as u32, attach_type: hook as u32, ..QueryAttr::default() };
    bpf(BPF_PROG_QUERY, &mut attr)?;
    Ok(attr.prog_cnt > 0 && attr.attach_flags == BPF_F_ALLOW_OVERRIDE)
}

/// How many programs an interface of the calling thread's namespace runs before its filters (tcx), for ingress or
/// egress. 0 before Linux 6.6.
///
/// # Errors
/// The kernel's error.
pub fn programs_before_filters(ifindex: u32, is_ingress: bool) -> io::Result<u32> {
    const BPF_TCX_INGRESS: u32 = 46;
    const BPF_TCX_EGRESS: u32 = 47;
    let attach_type = if is_ingress { BPF_TCX_INGRESS } else { BPF_TCX_EGRESS };
    let mut attr = QueryAttr { target_fd: ifindex, attach_type, ..QueryAttr::default() };
    match bpf(BPF_PROG_QUERY, &mut attr) {
        Ok(_) => Ok(attr.prog_cnt),
        // The interface has no such program, or the kernel has no tcx.
        Err(cause) if matches!(cause.raw_os_error(), Some(libc::ENOENT | libc::EINVAL)) => Ok(0),
        Err(cause) => Err(cause),
    }
}

/// Attaches a program to a cgroup, beside the programs that are attached there (a link always is `BPF_F_ALLOW_MULTI`).
/// The program is detached when the link's last descriptor and pin are gone.
///
/// # Errors
/// The kernel's error.
pub fn link_to_cgroup(program: BorrowedFd<'_>, cgroup: BorrowedFd<'_>, hook: CgroupHook) -> io::Result<OwnedFd> {
    let mut attr = LinkCreateAttr {
        prog_fd: program.as_raw_fd() as u32,
        target_fd: cgroup.as_raw_fd() as u32,
        attach_type: hook as u32,
        flags: 0,
    };
    bpf_fd(BPF_LINK_CREATE, &mut attr)
}

/// Makes a link run another program from now on. Every packet runs the old program or the new one.
///
/// # Errors
/// The kernel's error; ENOLINK where the cgroup is gone.
pub fn update_link(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let (link_fd, new_prog_fd) = (link.as_raw_fd() as u32, program.as_raw_fd() as u32);
    bpf(BPF_LINK_UPDATE, &mut LinkUpdateAttr { link_fd, new_prog_fd, ..LinkUpdateAttr::default() }).map(drop)
}

/// The kernel's information about a cgroup link.
///
/// # Errors
/// The kernel's error.
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

/// Runs a command that opens a descriptor.
fn bpf_fd<T>(command: libc::c_long, attr: &mut T) -> io::Result<OwnedFd> {
    let fd = bpf(command, attr)?;
    // SAFETY: the kernel has just opened this descriptor for us (close-on-exec, as all descriptors of bpf(2)).
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// bpf(2) itself.
fn bpf<T>(command: libc::c_long, attr: &mut T) -> io::Result<i32> {
    // SAFETY: `attr` is the command's part of `union bpf_attr`, and everything that it points to outlives the call. The
    // kernel takes the missing rest of the union as zeros.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *attr, size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as i32) }
}
