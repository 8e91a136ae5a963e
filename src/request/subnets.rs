//! `exemptSubnets` and `shapedSubnets`: the remote addresses that a limit applies to. The longest listed subnet that
//! contains an address decides. An address in no listed subnet is shaped, unless `shapedSubnets` is given.

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash, Hasher},
};

use ipnetwork::IpNetwork;
use podshaper_abi::{MAX_SUBNETS, SUBNET_EXEMPT, SUBNET_SHAPED, SubnetAddress, ipv4_mapped};
use serde_json::value::RawValue;

use crate::error::{Code, Error, Result, quoted};

/// The number of bits in front of an IPv4 address that is mapped to IPv6.
const MAPPED_BITS: u32 = 96;

/// The listed subnets in the form that the eBPF programs use.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Subnets {
    listed: BTreeMap<(u32, SubnetAddress), u32>,
    unlisted_are_exempt: bool,
}

impl Subnets {
    /// Reads both lists.
    ///
    /// # Errors
    /// [`Code::Config`]: not a list of subnets, too many subnets, or a subnet that is in both lists.
    pub(super) fn read(exempt: Option<Box<RawValue>>, shaped: Option<Box<RawValue>>) -> Result<Self> {
        let mut subnets = Self { unlisted_are_exempt: shaped.is_some(), ..Self::default() };
        for (key, raw, kind) in [("exemptSubnets", exempt, SUBNET_EXEMPT), ("shapedSubnets", shaped, SUBNET_SHAPED)] {
            for network in raw.map_or(Ok(Vec::new()), |raw| list(key, &raw))? {
                if subnets.listed.insert(prefix(network), kind).is_some_and(|other| other != kind) {
                    let text =
                        format!("configuration keys \"exemptSubnets\" and \"shapedSubnets\": {network} is in both");
                    return Err(Error::new(Code::Config, text));
                }
            }
        }
        match subnets.listed.len() {
            0..=MAX_SUBNETS => Ok(subnets),
            count => {
                let text = format!("configuration keys \"exemptSubnets\" and \"shapedSubnets\": {count} subnets");
                Err(Error::new(Code::Config, format!("{text}, more than the {MAX_SUBNETS} there can be")))
            }
        }
    }

    /// Whether there is no list, so that every address is shaped.
    pub fn is_empty(&self) -> bool {
        self.listed.is_empty() && !self.unlisted_are_exempt
    }

    /// A number that identifies the list: equal lists have the same number, different lists have different ones. 0
    /// means no list.
    pub fn number(&self) -> u64 {
        if self.is_empty() {
            return 0;
        }
        let mut hasher = DefaultHasher::new();
        self.hash(&mut hasher);
        hasher.finish().max(1)
    }

    /// Prefix length in bits, address and kind of each listed subnet. The last one has prefix length 0 and contains
    /// every address.
    pub fn entries(&self) -> impl Iterator<Item = (u32, SubnetAddress, u32)> {
        const EVERY: (u32, SubnetAddress) = (0, [0; 16]);
        let unlisted = if self.unlisted_are_exempt { SUBNET_EXEMPT } else { SUBNET_SHAPED };
        let unlisted = (!self.listed.contains_key(&EVERY)).then_some((0, EVERY.1, unlisted));
        self.listed.iter().rev().map(|(&(bits, address), &kind)| (bits, address, kind)).chain(unlisted)
    }
}

fn list(key: &str, raw: &RawValue) -> Result<Vec<IpNetwork>> {
    let wrong = |shown: String| {
        let remedy = "is not a subnet; write a list such as [\"10.0.0.0/8\", \"fd00::/8\"]";
        Error::new(Code::Config, format!("configuration key {key:?}: {shown} {remedy}"))
    };
    let texts: Vec<String> = serde_json::from_str(raw.get()).map_err(|_| wrong(quoted(raw.get())))?;
    texts.iter().map(|text| text.parse().map_err(|_| wrong(quoted(text)))).collect()
}

/// Bits after the prefix do not count: 10.1.2.3/8 is 10.0.0.0/8.
fn prefix(network: IpNetwork) -> (u32, SubnetAddress) {
    match network {
        IpNetwork::V4(v4) => (u32::from(v4.prefix()) + MAPPED_BITS, ipv4_mapped(v4.network().octets())),
        IpNetwork::V6(v6) => (v6.prefix().into(), v6.network().octets()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(text: &str) -> Option<Box<RawValue>> {
        (!text.is_empty()).then(|| serde_json::from_str(text).unwrap())
    }

    fn read(exempt: &str, shaped: &str) -> Result<Subnets> {
        Subnets::read(raw(exempt), raw(shaped))
    }

    #[test]
    fn an_address_in_no_list_is_shaped_unless_it_is_said_which_are() {
        for (exempt, shaped, unlisted) in [
            ("", "", None),
            ("[]", "", None),
            (r#"["10.0.0.0/8"]"#, "", Some(SUBNET_SHAPED)),
            ("", r#"["0.0.0.0/0"]"#, Some(SUBNET_EXEMPT)),
            ("", "[]", Some(SUBNET_EXEMPT)),
            (r#"["10.0.0.0/8"]"#, r#"["10.1.0.0/16"]"#, Some(SUBNET_EXEMPT)),
            (r#"["10.0.0.0/8"]"#, r#"["::/0"]"#, Some(SUBNET_SHAPED)),
        ] {
            let subnets = read(exempt, shaped).unwrap();
            assert_eq!(subnets.is_empty(), unlisted.is_none(), "{exempt} {shaped}");
            assert_eq!(subnets.number() == 0, unlisted.is_none(), "{exempt} {shaped}");
            let every: Vec<_> = subnets.entries().filter(|(bits, ..)| *bits == 0).collect();
            assert_eq!(every.len(), 1, "{exempt} {shaped}");
            assert!(unlisted.is_none_or(|kind| every[0].2 == kind && subnets.entries().last() == Some(every[0])));
        }
    }

    #[test]
    fn a_list_has_a_number_of_its_own() {
        let lists = [(r#"["10.0.0.0/8"]"#, ""), ("", r#"["10.0.0.0/8"]"#), (r#"["10.0.0.0/9"]"#, "")];
        let numbers = lists.map(|(exempt, shaped)| read(exempt, shaped).unwrap().number());
        assert!(numbers[0] != numbers[1] && numbers[1] != numbers[2] && numbers[0] != numbers[2], "{numbers:?}");
        assert_eq!(read(r#"["10.1.2.3/8"]"#, "").unwrap().number(), numbers[0]);
    }

    #[test]
    fn prefixes_are_of_ipv6_and_without_the_bits_behind_them() {
        let subnets = read(r#"["10.1.2.3/8", "10.0.0.0/8", "fd00::1/8", "192.0.2.1"]"#, r#"["fd00:1::/32"]"#).unwrap();
        let entries: Vec<_> = subnets.entries().collect();
        let address = |text: &str| text.parse::<std::net::Ipv6Addr>().unwrap().octets();
        let expected = [
            (128, address("::ffff:192.0.2.1"), SUBNET_EXEMPT),
            (104, address("::ffff:10.0.0.0"), SUBNET_EXEMPT),
            (32, address("fd00:1::"), SUBNET_SHAPED),
            (8, address("fd00::"), SUBNET_EXEMPT),
            (0, address("::"), SUBNET_EXEMPT),
        ];
        assert_eq!(entries, expected);
    }

    #[test]
    fn what_is_no_list_of_subnets_is_named() {
        let too_many: Vec<String> = (0..=MAX_SUBNETS).map(|i| format!("10.{}.{}.0/24", i / 256, i % 256)).collect();
        for (exempt, shaped, why) in [
            (r#""10.0.0.0/8""#, "", r#"key "exemptSubnets": "\"10.0.0.0/8\"" is not a subnet"#),
            ("", r#"["10.0.0.0/33"]"#, r#"key "shapedSubnets": "10.0.0.0/33" is not a subnet"#),
            (r#"["10.0.0.0/8"]"#, r#"["10.1.0.0/8"]"#, "10.1.0.0/8 is in both"),
            (&serde_json::to_string(&too_many).unwrap(), "", "16385 subnets, more than the 16384 there can be"),
        ] {
            let error = read(exempt, shaped).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }
}
