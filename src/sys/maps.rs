//! The elements of maps.

use std::{
    io,
    marker::PhantomData,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    thread,
    time::Duration,
};

use podshaper_abi::ListedAddress;

use super::{BPF_OBJ_GET_INFO_BY_FD, InfoAttr, bpf, bpf_fd};

/// Commands of bpf(2) for maps (uapi/linux/bpf.h, `enum bpf_cmd`).
const BPF_MAP_CREATE: libc::c_long = 0;
const BPF_MAP_LOOKUP_ELEM: libc::c_long = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_MAP_DELETE_ELEM: libc::c_long = 3;
const BPF_MAP_GET_NEXT_KEY: libc::c_long = 4;
const BPF_MAP_UPDATE_BATCH: libc::c_long = 26;

/// `enum bpf_map_type`
const BPF_MAP_TYPE_ARRAY: u32 = 2;

/// The kernel's include/linux/errno.h. This error is not meant for user space, but it gets there.
const ENOTSUPP: i32 = 524;

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

/// `union bpf_attr`, the part for one element of a map. BPF_MAP_GET_NEXT_KEY has the next key in the place of the
/// value.
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
    /// How many bits of the key count.
    pub bits: u32,
    /// The number of a list, and an address.
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

/// A map with keys and values of these types.
pub struct Map<K, V> {
    fd: OwnedFd,
    types: PhantomData<(K, V)>,
}

/// How an element of a map is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Read {
    /// Without a lock.
    Plain = 0,
    /// All of one moment: under the `bpf_spin_lock` in the element (`BPF_F_LOCK`), which is held while the element is
    /// copied.
    Locked = 4,
}

impl<K: Copy + Default, V: aya::Pod + Default> Map<K, V> {
    /// Takes the descriptor of a map.
    ///
    /// # Errors
    /// The kernel's error; `InvalidData`: the keys or elements have other sizes, so the map is another podshaper's.
    pub fn of(fd: OwnedFd) -> io::Result<Self> {
        let info = map_info(fd.as_fd())?;
        // The kernel relies on the caller for the sizes.
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
    /// The kernel's error.
    pub fn get(&self, key: &K, read: Read) -> io::Result<Option<V>> {
        let mut value = V::default();
        let attr = self.attr(key, (&raw mut value) as u64, read as u64);
        found(self.element(BPF_MAP_LOOKUP_ELEM, attr)).map(|found| found.map(|()| value))
    }

    /// Writes the element of a key.
    ///
    /// # Errors
    /// The kernel's error; E2BIG where the map is full.
    pub fn set(&self, key: &K, value: &V) -> io::Result<()> {
        /// Since Linux 6.1 each CPU has a few elements in stock. The kernel fills the stock up in the background
        /// (kernel/bpf/memalloc.c). A call that finds the stock empty gets ENOMEM, however much memory there is.
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
    /// The kernel's error.
    pub fn remove(&self, key: &K) -> io::Result<()> {
        found(self.element(BPF_MAP_DELETE_ELEM, self.attr(key, 0, 0))).map(drop)
    }

    /// Whether the map has no element.
    ///
    /// # Errors
    /// The kernel's error.
    pub fn is_empty(&self) -> io::Result<bool> {
        let mut next = K::default();
        let (map_fd, value) = (self.fd.as_raw_fd() as u32, (&raw mut next) as u64);
        let attr = ElementAttr { map_fd, value, ..ElementAttr::default() };
        found(self.element(BPF_MAP_GET_NEXT_KEY, attr)).map(|found| found.is_none())
    }

    /// All keys.
    ///
    /// # Errors
    /// The kernel's error.
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

/// `None` if the kernel's error is that there is no such element.
fn found(result: io::Result<()>) -> io::Result<Option<()>> {
    match result {
        Err(cause) if cause.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        result => result.map(Some),
    }
}

/// Makes an array map of one element, with these bytes.
///
/// # Errors
/// The kernel's error.
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

/// The first element of an array map, whatever its size.
///
/// # Errors
/// The kernel's error.
pub fn element_bytes(map: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    // The kernel copies elements in units of eight bytes.
    let mut value = vec![0; element_size(map)?.next_multiple_of(8)];
    let (map_fd, key) = (map.as_raw_fd() as u32, 0u32);
    let value_at = value.as_mut_ptr() as u64;
    let mut attr = ElementAttr { map_fd, key: &raw const key as u64, value: value_at, ..ElementAttr::default() };
    bpf(BPF_MAP_LOOKUP_ELEM, &mut attr)?;
    Ok(value)
}

/// Writes these bytes into the first element of an array map, with zeros behind them.
///
/// # Errors
/// The kernel's error; `InvalidData`: the map's elements are shorter than these bytes.
pub fn set_element_bytes(map: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<()> {
    let size = element_size(map)?;
    if bytes.len() > size {
        let text = format!("its elements have {size} bytes, and this takes {}", bytes.len());
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    write_element(map, bytes, size)
}

/// Writes the element of an array map whose elements have `size` bytes, with zeros behind these bytes.
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
/// The kernel's error.
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

/// Writes all these elements of a trie whose values have 32 bits. There must be as many keys as values. Where the
/// kernel can, this is one call, because a thousand calls take milliseconds.
///
/// # Errors
/// The kernel's error.
pub fn insert_all(map: BorrowedFd<'_>, keys: &[TrieKey], values: &[u32]) -> io::Result<()> {
    let map_fd = map.as_raw_fd() as u32;
    let count = keys.len().min(values.len()) as u32;
    let (all_keys, all_values) = (keys.as_ptr() as u64, values.as_ptr() as u64);
    let mut attr = BatchAttr { keys: all_keys, values: all_values, count, map_fd, ..BatchAttr::default() };
    match bpf(BPF_MAP_UPDATE_BATCH, &mut attr) {
        // Linux before 5.14 has no such call for tries.
        Err(cause) if cause.raw_os_error() == Some(ENOTSUPP) => keys.iter().zip(values).try_for_each(|(key, value)| {
            let (key, value) = (&raw const *key as u64, &raw const *value as u64);
            bpf(BPF_MAP_UPDATE_ELEM, &mut ElementAttr { map_fd, key, value, ..ElementAttr::default() }).map(drop)
        }),
        written => written.map(drop),
    }
}

/// The bytes of an element, from the kernel. Also checks that the object is an array map with 32-bit keys.
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
