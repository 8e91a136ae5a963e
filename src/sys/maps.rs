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

/// Commands of bpf(2) for them (uapi/linux/bpf.h, `enum bpf_cmd`).
const BPF_MAP_CREATE: libc::c_long = 0;
const BPF_MAP_LOOKUP_ELEM: libc::c_long = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_MAP_DELETE_ELEM: libc::c_long = 3;
const BPF_MAP_GET_NEXT_KEY: libc::c_long = 4;
const BPF_MAP_UPDATE_BATCH: libc::c_long = 26;

/// `enum bpf_map_type`
const BPF_MAP_TYPE_ARRAY: u32 = 2;

/// The kernel's include/linux/errno.h. It is not meant for user space, and gets there all the same.
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
