//! Sends frames by AF_XDP in generic mode: they bypass every hook of the sender's own namespace, including qdisc and
//! tc.
#![expect(unsafe_code, reason = "rings in memory that is shared with the kernel, which no crate here has")]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};

use super::context;

const FRAMES: u32 = 64;
const FRAME_BYTES: u32 = 2048;

/// A socket with frames to send, which are all the same.
pub struct Sender {
    socket: OwnedFd,
    transmit: Ring,
    completed: Ring,
    frame_bytes: u32,
    /// Frames that the kernel does not own.
    free: Vec<u64>,
}

/// A ring that is shared with the kernel.
struct Ring {
    memory: *mut u8,
    offsets: libc::xdp_ring_offset,
}

impl Ring {
    fn map(socket: &OwnedFd, offsets: libc::xdp_ring_offset, entry_bytes: usize, place: u64) -> io::Result<Self> {
        let bytes = offsets.desc as usize + FRAMES as usize * entry_bytes;
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_POPULATE);
        // SAFETY: a new mapping of the socket's own ring, with the ring's length.
        let memory =
            unsafe { libc::mmap(ptr::null_mut(), bytes, protection, flags, socket.as_raw_fd(), place as libc::off_t) };
        if memory == libc::MAP_FAILED {
            Err(io::Error::last_os_error())
        } else {
            Ok(Self { memory: memory.cast(), offsets })
        }
    }

    fn counter(&self, offset: u64) -> &AtomicU32 {
        // SAFETY: according to the kernel, the word is there and aligned, in the mapping, which stays until the
        // process ends.
        unsafe { &*self.memory.add(offset as usize).cast::<AtomicU32>() }
    }

    fn producer(&self) -> &AtomicU32 {
        self.counter(self.offsets.producer)
    }

    fn consumer(&self) -> &AtomicU32 {
        self.counter(self.offsets.consumer)
    }

    fn entry<T>(&self, number: u32) -> *mut T {
        // SAFETY: the mask keeps the number below that of the entries.
        unsafe { self.memory.add(self.offsets.desc as usize).cast::<T>().add((number & (FRAMES - 1)) as usize) }
    }
}

impl Sender {
    pub fn new(ifindex: u32, frame: &[u8]) -> io::Result<Self> {
        // SAFETY: the call makes a descriptor, which nothing else owns.
        let socket = unsafe {
            let socket = libc::socket(libc::AF_XDP, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0);
            if socket < 0 {
                return Err(context("make a socket of AF_XDP")(io::Error::last_os_error()));
            }
            OwnedFd::from_raw_fd(socket)
        };
        let memory = frames(frame)?;
        let area = libc::xdp_umem_reg {
            addr: memory as u64,
            len: u64::from(FRAMES * FRAME_BYTES),
            chunk_size: FRAME_BYTES,
            headroom: 0,
            flags: 0,
            tx_metadata_len: 0,
        };
        set(&socket, libc::XDP_UMEM_REG, &area).map_err(context("register the frames"))?;
        for ring in [libc::XDP_UMEM_FILL_RING, libc::XDP_UMEM_COMPLETION_RING, libc::XDP_TX_RING] {
            set(&socket, ring, &FRAMES).map_err(context("make a ring"))?;
        }
        let offsets = offsets(&socket).map_err(context("ask where the rings are"))?;
        let transmit = Ring::map(&socket, offsets.tx, size_of::<libc::xdp_desc>(), libc::XDP_PGOFF_TX_RING as u64)?;
        let completed = Ring::map(&socket, offsets.cr, size_of::<u64>(), libc::XDP_UMEM_PGOFF_COMPLETION_RING)?;
        bind(&socket, ifindex).map_err(context("bind it to the interface"))?;
        let free = (0..u64::from(FRAMES)).map(|number| number * u64::from(FRAME_BYTES)).collect();
        Ok(Self { socket, transmit, completed, frame_bytes: frame.len() as u32, free })
    }

    /// Gives the kernel as many frames as it takes. Returns how many earlier frames it has sent.
    pub fn send(&mut self) -> u64 {
        let first = self.transmit.producer().load(Ordering::Relaxed);
        let frames = self.free.drain(..);
        let mut next = first;
        for addr in frames {
            // SAFETY: the kernel does not read an entry of the ring before the producer index is advanced.
            unsafe {
                self.transmit.entry::<libc::xdp_desc>(next).write(libc::xdp_desc {
                    addr,
                    len: self.frame_bytes,
                    options: 0,
                })
            };
            next = next.wrapping_add(1);
        }
        self.transmit.producer().store(next, Ordering::Release);
        // SAFETY: no memory is read: the call only wakes the kernel.
        unsafe { libc::sendto(self.socket.as_raw_fd(), ptr::null(), 0, libc::MSG_DONTWAIT, ptr::null(), 0) };
        let (start, end) =
            (self.completed.consumer().load(Ordering::Relaxed), self.completed.producer().load(Ordering::Acquire));
        for number in 0..end.wrapping_sub(start) {
            // SAFETY: the kernel wrote the entry before it advanced the producer index.
            self.free.push(unsafe { self.completed.entry::<u64>(start.wrapping_add(number)).read() });
        }
        self.completed.consumer().store(end, Ordering::Release);
        u64::from(end.wrapping_sub(start))
    }
}

/// Memory for the frames, all with the same contents. It stays until the process ends.
fn frames(frame: &[u8]) -> io::Result<*mut u8> {
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping. Each frame is written within it, and is shorter than its slot.
    unsafe {
        let memory = libc::mmap(ptr::null_mut(), (FRAMES * FRAME_BYTES) as usize, protection, flags, -1, 0);
        if memory == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let memory: *mut u8 = memory.cast();
        for number in 0..FRAMES {
            let room = memory.add((number * FRAME_BYTES) as usize);
            ptr::copy_nonoverlapping(frame.as_ptr(), room, frame.len().min(FRAME_BYTES as usize));
        }
        Ok(memory)
    }
}

fn set<T>(socket: &OwnedFd, option: libc::c_int, value: &T) -> io::Result<()> {
    let bytes = size_of::<T>() as libc::socklen_t;
    // SAFETY: the value has the given length.
    let answer =
        unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_XDP, option, ptr::from_ref(value).cast(), bytes) };
    if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn offsets(socket: &OwnedFd) -> io::Result<libc::xdp_mmap_offsets> {
    let mut bytes = size_of::<libc::xdp_mmap_offsets>() as libc::socklen_t;
    // SAFETY: integers, for which all bytes are valid, in a buffer of the given length.
    unsafe {
        let mut offsets: libc::xdp_mmap_offsets = std::mem::zeroed();
        let (option, to) = (libc::XDP_MMAP_OFFSETS, (&raw mut offsets).cast());
        let answer = libc::getsockopt(socket.as_raw_fd(), libc::SOL_XDP, option, to, &raw mut bytes);
        if answer == 0 { Ok(offsets) } else { Err(io::Error::last_os_error()) }
    }
}

fn bind(socket: &OwnedFd, ifindex: u32) -> io::Result<()> {
    let address = libc::sockaddr_xdp {
        sxdp_family: libc::AF_XDP as u16,
        sxdp_flags: libc::XDP_COPY,
        sxdp_ifindex: ifindex,
        sxdp_queue_id: 0,
        sxdp_shared_umem_fd: 0,
    };
    let bytes = size_of_val(&address) as libc::socklen_t;
    // SAFETY: the address has the given length.
    let answer = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), bytes) };
    if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
