//! A list of objects, read as it arrives. Each object is handed on before the next one is read, and fields that are not
//! needed are not kept.
//!
//! The size of each object is bounded, and not the size of the list: the objects belong to many tenants, and no tenant
//! must be able to make the list too long for the others.

use std::cell::Cell;
use std::fmt;
use std::io::{self, BufReader, Read};
use std::marker::PhantomData;

use serde::de::{DeserializeOwned, DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// How much is read of one object. etcd accepts no object above 1.5 MiB; the JSON is up to six times as long where Go
/// escapes each byte (`<`).
const MAX_OBJECT_BYTES: u64 = 16 << 20;
/// The size of the read buffer.
const BUFFER_BYTES: usize = 64 << 10;

/// Reads a list of objects of one kind. The inner error means that the answer is not such a list.
///
/// # Errors
/// Those of the reader.
pub(super) fn read<T: DeserializeOwned>(
    body: &mut dyn Read,
    kind: &str,
    take: &mut dyn FnMut(T),
) -> io::Result<Result<(), String>> {
    let left = Cell::new(MAX_OBJECT_BYTES);
    let bounded = Bounded { body, left: &left };
    let mut json = serde_json::Deserializer::from_reader(BufReader::with_capacity(BUFFER_BYTES, bounded));
    let list = List { left: &left, take, of: PhantomData };
    match json.deserialize_map(list).and_then(|()| json.end()) {
        Ok(()) => Ok(Ok(())),
        Err(cause) if left.get() == 0 => Ok(Err(format!("an object in its list of {kind} is too long: {cause}"))),
        Err(cause) if cause.is_io() => Err(cause.into()),
        Err(cause) => Ok(Err(format!("its answer is no list of {kind}: {cause}"))),
    }
}

/// A reader that returns at most the given number of further bytes.
struct Bounded<'a> {
    body: &'a mut dyn Read,
    left: &'a Cell<u64>,
}

impl Read for Bounded<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.left.get() == 0 {
            return Err(io::Error::other(format!("more than {MAX_OBJECT_BYTES} bytes")));
        }
        let most = usize::try_from(self.left.get()).unwrap_or(usize::MAX).min(buffer.len());
        let read = self.body.read(&mut buffer[..most])?;
        self.left.set(self.left.get().saturating_sub(read as u64));
        Ok(read)
    }
}

/// The list; its `items` are handed on one by one.
struct List<'a, T> {
    left: &'a Cell<u64>,
    take: &'a mut dyn FnMut(T),
    of: PhantomData<T>,
}

impl<'de, T: DeserializeOwned> Visitor<'de> for List<'_, T> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut has_items = false;
        while let Some(key) = map.next_key::<String>()? {
            if key == "items" {
                has_items = true;
                map.next_value_seed(Items(&mut *self.take, self.left))?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        if has_items { Ok(()) } else { Err(A::Error::missing_field("items")) }
    }
}

struct Items<'a, T>(&'a mut dyn FnMut(T), &'a Cell<u64>);

impl<'de, T: DeserializeOwned> DeserializeSeed<'de> for Items<'_, T> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, items: D) -> Result<(), D::Error> {
        items.deserialize_option(self)
    }
}

impl<'de, T: DeserializeOwned> Visitor<'de> for Items<'_, T> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("objects")
    }

    /// An API server writes null for an empty list.
    fn visit_none<E: Error>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_some<D: Deserializer<'de>>(self, items: D) -> Result<(), D::Error> {
        items.deserialize_seq(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        let Self(take, left) = self;
        while let Some(object) = items.next_element()? {
            take(object);
            left.set(MAX_OBJECT_BYTES);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Deserialize)]
    struct Named {
        name: String,
    }

    fn names(body: &mut dyn Read) -> Result<Vec<String>, String> {
        let mut names = Vec::new();
        read(body, "things", &mut |Named { name }| names.push(name)).unwrap()?;
        Ok(names)
    }

    #[test]
    fn objects_are_handed_on_and_the_rest_is_left() {
        let text = r#"{"kind": "L", "items": [{"name": "a", "x": {"y": [1]}}, {"name": "b"}], "metadata": {}}"#;
        assert_eq!(names(&mut text.as_bytes()), Ok(vec!["a".to_owned(), "b".to_owned()]));
        for none in [r#"{"items": null}"#, r#"{"items": []}"#] {
            assert_eq!(names(&mut none.as_bytes()), Ok(vec![]), "{none}");
        }
        for wrong in ["{}", "[]", "", r#"{"items": {}}"#, r#"{"items": [{}]}"#, r#"{"items": []} x"#, r#"{"items": ["#]
        {
            let refused = names(&mut wrong.as_bytes()).unwrap_err();
            assert!(refused.starts_with("its answer is no list of things: "), "{wrong}: {refused}");
        }
    }

    #[test]
    fn the_bound_is_one_of_each_object() {
        let object = |bytes: u64| io::Cursor::new(&br#"{"name": "a", "x": ""#[..]).chain(io::repeat(b'x').take(bytes));
        let end = |text: &'static [u8]| io::Cursor::new(text);
        let begin = || end(br#"{"items": ["#);
        let two = object(10 << 20).chain(end(br#""}, "#)).chain(object(10 << 20)).chain(end(br#""}]}"#));
        assert_eq!(names(&mut begin().chain(two)).unwrap().len(), 2);
        let refused = names(&mut begin().chain(object(u64::MAX))).unwrap_err();
        assert!(
            refused.starts_with("an object in its list of things is too long: more than 16777216 bytes"),
            "{refused}"
        );
    }

    #[test]
    fn what_the_reader_says_is_not_the_lists_fault() {
        struct Broken;
        impl Read for Broken {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                Err(io::ErrorKind::TimedOut.into())
            }
        }
        let mut body = io::Cursor::new(br#"{"items": ["#).chain(Broken);
        let read = read(&mut body, "things", &mut |_: Named| {});
        assert_eq!(read.unwrap_err().kind(), io::ErrorKind::TimedOut);
    }
}
