//! All the unsafe code of the plugin: cgroup links by bpf(2). aya 0.14 makes them, but lets no link of a cgroup/setsockopt
//! program out to be pinned, and says of no link which cgroup it is on.
#![expect(unsafe_code, reason = "bpf(2) is a raw system call")]

use std::{
    ffi::CString,
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    os::unix::ffi::OsStrExt,
    path::Path,
};

/// Commands of bpf(2) (uapi/linux/bpf.h, `enum bpf_cmd`).
const BPF_OBJ_PIN: libc::c_long = 6;
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_LINK_CREATE: libc::c_long = 28;

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
