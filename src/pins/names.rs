//! Writes names of pods and interfaces as names of directories. bpffs refuses names with a dot, and an interface may be
//! called eth0.100. So every byte that is not a letter, a digit, '-' or '_' is written as %XX.

/// A name in a form that a directory on bpffs may have.
pub fn encode(name: &str) -> String {
    name.bytes().fold(String::new(), |mut encoded, byte| {
        if byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_' {
            encoded.push(byte.into());
        } else {
            encoded.push_str(&format!("%{byte:02x}"));
        }
        encoded
    })
}

/// The name that was encoded. `None`: the name of an unfinished attachment, or of anything else that podshaper did not
/// make.
pub fn decode(encoded: &str) -> Option<String> {
    let mut bytes = Vec::new();
    let mut rest = encoded.as_bytes();
    while let [first, tail @ ..] = rest {
        rest = tail;
        bytes.push(if *first == b'%' {
            let digits = std::str::from_utf8(rest.get(..2)?).ok()?;
            rest = &rest[2..];
            u8::from_str_radix(digits, 16).ok()?
        } else {
            *first
        });
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_no_dot_on_bpffs_and_come_back_as_they_were() {
        for (name, encoded) in
            [("eth0", "eth0"), ("eth0.100", "eth0%2e100"), ("a%b", "a%25b"), ("net_1-é", "net_1-%c3%a9")]
        {
            assert_eq!(encode(name), encoded);
            assert_eq!(decode(encoded).as_deref(), Some(name));
        }
    }

    #[test]
    fn unfinished_attachments_are_not_listed() {
        for name in ["eth0%new", "eth0%old", "eth0%", "eth0%2", "%ff"] {
            assert_eq!(decode(name), None, "{name}");
        }
    }
}
