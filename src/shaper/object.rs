//! The eBPF object: loads its maps and programs into the kernel.

use std::{
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixDatagram,
    },
    panic::resume_unwind,
    path::Path,
    thread,
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{Map, MapData},
    programs::{Program, ProgramError},
};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::{program_names, refusal::refused};
use crate::{
    error::{Code, Error, Result},
    pins::{FLOWS, HOST_ENDS, LIMITS, METERS, OTHERS, REQUESTS, SCOPES, SUBNETS},
    sys,
};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/podshaper.bpf.o"));

/// The identity of the object: two objects with the same identity have the same programs.
pub const IDENTITY: &str = env!("PODSHAPER_BPF_IDENTITY");

/// The object's maps.
pub const MAPS: [&str; 8] = [LIMITS, METERS, SCOPES, SUBNETS, FLOWS, OTHERS, HOST_ENDS, REQUESTS];

/// Maps and programs, which stay in the kernel as long as this lives or they are pinned.
pub struct Object(Ebpf);

impl Object {
    /// Loads all maps and programs. `attachments`: for how many the maps have room; `None`: as many as a node may have.
    ///
    /// # Errors
    /// [`Code::Kernel`]: the kernel refuses a map or program, and why.
    pub fn load(attachments: Option<u32>) -> Result<Self> {
        let mut loader = without_kernel_btf(EbpfLoader::new);
        if let Some(attachments) = attachments {
            for name in [LIMITS, METERS, OTHERS, HOST_ENDS] {
                loader.map_max_entries(name, attachments);
            }
        }
        Self::finish(&mut loader)
    }

    /// Loads the programs, with the maps that are pinned in a directory.
    ///
    /// # Errors
    /// [`Code::Kernel`]: the kernel refuses a program, and why.
    pub fn load_beside(maps: &Path) -> Result<Self> {
        let mut loader = without_kernel_btf(EbpfLoader::new);
        for name in MAPS {
            loader.map_pin_path(name, maps.join(name));
        }
        Self::finish(&mut loader)
    }

    fn finish(loader: &mut EbpfLoader<'_>) -> Result<Self> {
        let mut object = loader.load(OBJECT).map_err(|cause| refused("load podshaper's eBPF maps", &cause))?;
        load_programs(&mut object)?;
        try_flows(&object)?;
        Ok(Self(object))
    }

    /// A map by its name.
    ///
    /// # Errors
    /// [`Code::Kernel`]: podshaper was built wrong, or the process has no descriptors left.
    pub fn map(&self, name: &str) -> Result<OwnedFd> {
        owned(map_data(&self.0, name)?.fd().as_fd(), name)
    }

    /// A program by its name.
    ///
    /// # Errors
    /// Those of [`Object::map`].
    pub fn program(&self, name: &str) -> Result<OwnedFd> {
        let program = self.0.program(name).ok_or_else(|| not_in_object(name))?;
        owned(program.fd().map_err(|cause| refused(format!("open the eBPF program {name}"), &cause))?.as_fd(), name)
    }
}

fn owned(fd: BorrowedFd<'_>, name: &str) -> Result<OwnedFd> {
    fd.try_clone_to_owned().map_err(|cause| Error::because(Code::Kernel, format!("keep {name} open"), cause))
}

/// `EbpfLoader::new` parses all of /sys/kernel/btf/vmlinux (20 MB, 30 ms) for relocations that this object does not
/// have, and there is no other constructor. If the process may open no descriptor, `new` cannot open the file and goes
/// on without it.
fn without_kernel_btf<T>(new: impl FnOnce() -> T) -> T {
    let limit = getrlimit(Resource::RLIMIT_NOFILE);
    if let Ok((_, hard)) = limit {
        // If this fails, it costs time, not correctness.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, 0, hard);
    }
    let made = new();
    if let Ok((soft, hard)) = limit {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, soft, hard);
    }
    made
}

/// Loads the programs in parallel: the verifier takes most of the time, and a pod waits for it.
fn load_programs(object: &mut Ebpf) -> Result<()> {
    let place = |name: &str| program_names().position(|wanted| wanted == name);
    let mut programs: Vec<_> =
        object.programs_mut().filter_map(|(name, program)| Some((place(name)?, name, program))).collect();
    programs.sort_by_key(|(place, ..)| *place);
    thread::scope(|scope| {
        let mut programs = programs.into_iter();
        // The first program is the largest. This thread loads it, so that it does not wait for a thread to start.
        let largest = programs.next();
        let loading: Vec<_> =
            programs.map(|(_, name, program)| scope.spawn(move || load_program(name, program))).collect();
        largest.map_or(Ok(()), |(_, name, program)| load_program(name, program))?;
        loading.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic)))
    })
}

fn load_program(name: &str, program: &mut Program) -> Result<()> {
    let loaded = match program {
        Program::CgroupSkb(program) => program.load(),
        Program::SockOps(program) => program.load(),
        Program::CgroupSockopt(program) => program.load(),
        Program::SchedClassifier(program) => program.load(),
        _ => Err(ProgramError::UnexpectedProgramType),
    };
    loaded.map_err(|cause| refused(format!("load the eBPF program {name}"), &cause))
}

/// Tries to keep the programs' state with a socket. A kernel that cannot do so accepts the programs anyway, and then
/// nothing is ever paced. Its allocator may need a CPU that exchanges 16 bytes at once (`kmalloc_nolock` in Linux 7.3),
/// or net.core.optmem_max may leave no room.
fn try_flows(object: &Ebpf) -> Result<()> {
    let map = map_data(object, FLOWS)?;
    let kept = UnixDatagram::unbound().and_then(|socket| {
        let bytes = map.info().map_err(std::io::Error::other)?.value_size();
        sys::keep_with_socket(map.fd().as_fd(), socket.as_fd(), bytes as usize)
    });
    kept.map_err(|cause| {
        let text = "keep a flow's state with its socket, without which nothing is paced (net.core.optmem_max may be too small, \
                    or this kernel has no lock-free allocator for this CPU)";
        Error::because(Code::Kernel, text, cause)
    })
}

fn map_data<'a>(object: &'a Ebpf, name: &str) -> Result<&'a MapData> {
    match object.map(name) {
        Some(
            Map::Array(data)
            | Map::HashMap(data)
            | Map::LpmTrie(data)
            | Map::SkStorage(data)
            | Map::CgroupStorage(data),
        ) => Ok(data),
        _ => Err(not_in_object(name)),
    }
}

fn not_in_object(name: &str) -> Error {
    Error::new(Code::Kernel, format!("this podshaper was built wrong: its eBPF object has no {name}"))
}
