//! Rates and bursts. They are parsed, bounded, printed and converted here, so that no other file multiplies by 8 or by
//! 1000.
//!
//! A rate is in bits per second on the wire, counted at layer 3. A burst is in bytes. `request` decides which key of a
//! request has which form.

mod quantity;

use std::fmt;
use std::str::FromStr;

use quantity::{MAX_TEXT, round_up};

/// The largest packet at Ethernet's usual MTU, in bytes, including the IP header.
const FULL_PACKET_BYTES: u64 = 1500;

/// A bandwidth between [`Rate::MIN`] and [`Rate::MAX`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rate {
    bits_per_s: u64,
}

impl Rate {
    /// 1 kbit/s, the lowest rate that kubelet passes on (validateBandwidthIsReasonable in pkg/util/bandwidth/utils.go).
    pub const MIN: Self = Self { bits_per_s: 1_000 };
    /// 1 Pbit/s, the highest rate that kubelet passes on (same function).
    pub const MAX: Self = Self { bits_per_s: 1_000_000_000_000_000 };

    /// A rate in bits per second.
    ///
    /// # Errors
    /// The rate is outside of [`Rate::MIN`] to [`Rate::MAX`].
    pub fn bits_per_s(bits_per_s: u64) -> Result<Self, UnitError> {
        match (Self { bits_per_s }) {
            rate if rate < Self::MIN => Err(UnitError::RateTooSmall),
            rate if rate > Self::MAX => Err(UnitError::RateTooLarge),
            rate => Ok(rate),
        }
    }

    /// A rate in bytes per second.
    ///
    /// # Errors
    /// The rate is outside of [`Rate::MIN`] to [`Rate::MAX`].
    pub fn bytes_per_s(bytes_per_s: u64) -> Result<Self, UnitError> {
        bytes_per_s.checked_mul(8).ok_or(UnitError::RateTooLarge).and_then(Self::bits_per_s)
    }

    /// Bits per second as a Kubernetes quantity: `10M`, `1.5Gi`, `1e6`. A fraction of a bit is rounded up, as kubelet
    /// does.
    ///
    /// # Errors
    /// The text is not a quantity, or the rate is outside of [`Rate::MIN`] to [`Rate::MAX`].
    pub fn from_quantity(text: &str) -> Result<Self, UnitError> {
        match round_up(text) {
            Ok(bits_per_s) => Self::bits_per_s(bits_per_s),
            Err(UnitError::TooLarge) => Err(UnitError::RateTooLarge),
            Err(error) => Err(error),
        }
    }

    /// Megabytes (10^6 bytes) per second in the form of the project's ancestor: digits and an `M`, nothing else.
    ///
    /// # Errors
    /// The text has another form, or the rate is outside of [`Rate::MIN`] to [`Rate::MAX`].
    pub fn from_megabytes(text: &str) -> Result<Self, UnitError> {
        let digits = text.strip_suffix('M').filter(|digits| is_digits(digits) && text.len() <= MAX_TEXT);
        let digits = digits.ok_or(UnitError::NotMegabytes)?;
        // Digits alone fail to parse only if there are too many.
        let megabytes: u64 = digits.parse().map_err(|_| UnitError::RateTooLarge)?;
        megabytes.checked_mul(1_000_000).ok_or(UnitError::RateTooLarge).and_then(Self::bytes_per_s)
    }

    /// The rate in bits per second.
    pub fn as_bits_per_s(self) -> u64 {
        self.bits_per_s
    }
}

impl FromStr for Rate {
    type Err = UnitError;

    /// [`Rate::from_quantity`]. Rates are also printed in this form.
    fn from_str(text: &str) -> Result<Self, UnitError> {
        Self::from_quantity(text)
    }
}

impl fmt::Display for Rate {
    /// The shortest quantity that is exactly this rate: `10M`, `1500k`, `1234567`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // pad(), not write!(): the format string sets the column width of a table.
        f.pad(&quantity_of(self.bits_per_s))
    }
}

/// The shortest quantity that is exactly this number.
fn quantity_of(number: u64) -> String {
    let units = [(1_000_000_000_000_000, "P"), (1_000_000_000_000, "T"), (1_000_000_000, "G"), (1_000_000, "M")];
    let fits = |(unit, _): &(u64, &str)| number.is_multiple_of(*unit);
    let (unit, suffix) = units.into_iter().chain([(1_000, "k")]).find(fits).unwrap_or((1, ""));
    format!("{}{suffix}", number / unit)
}

/// How many bytes an idle pod may send at once before the rate limits it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Burst {
    bytes: u64,
}

impl Burst {
    /// The largest burst that can be asked for, 4 GiB less one byte, as in the CNI bandwidth plugin. At 1 kbit/s this
    /// burst takes about a year, in nanoseconds: far too little to overflow a clock in the kernel.
    pub const MAX_ASKED: Self = Self { bytes: u32::MAX as u64 };

    /// The burst of a limit that names none: 5 ms at the rate, since a pacing timer that fires late must be able to
    /// catch up, and at least 10 full packets.
    pub fn default_for(rate: Rate) -> Self {
        let five_ms_bytes = rate.as_bits_per_s() / 8 / 200;
        Self { bytes: five_ms_bytes.max(10 * FULL_PACKET_BYTES) }
    }

    /// A burst in bits, the unit of every key that other programs define for it. A part of a byte counts as a byte.
    ///
    /// # Errors
    /// The burst is zero or above [`Burst::MAX_ASKED`].
    pub fn bits(bits: u64) -> Result<Self, UnitError> {
        match (Self { bytes: bits.div_ceil(8) }) {
            Self { bytes: 0 } => Err(UnitError::BurstZero),
            burst if burst > Self::MAX_ASKED => Err(UnitError::BurstTooLarge),
            burst => Ok(burst),
        }
    }

    /// A burst in bits as a Kubernetes quantity.
    ///
    /// # Errors
    /// The text is not a quantity, or the burst is zero or above [`Burst::MAX_ASKED`].
    pub fn from_quantity(text: &str) -> Result<Self, UnitError> {
        match round_up(text) {
            Ok(bits) => Self::bits(bits),
            Err(UnitError::TooLarge) => Err(UnitError::BurstTooLarge),
            Err(error) => Err(error),
        }
    }

    /// The burst that takes `ns` nanoseconds at a rate: the inverse of [`Burst::as_ns_at`], as exactly as whole
    /// nanoseconds allow.
    pub fn of_ns_at(ns: u64, rate: Rate) -> Self {
        let bytes = (u128::from(ns) * u128::from(rate.as_bits_per_s())).div_ceil(8 * 1_000_000_000);
        Self { bytes: u64::try_from(bytes).unwrap_or(u64::MAX) }
    }

    /// The part of a burst that bulk flows leave to packets that must not wait: four full packets, or half of a small
    /// burst. Bulk flows use the rest to catch up when their timers fire late.
    pub fn kept(self) -> Self {
        Self { bytes: (4 * FULL_PACKET_BYTES).min(self.bytes / 2) }
    }

    /// The burst in bytes.
    pub fn as_bytes(self) -> u64 {
        self.bytes
    }

    /// How many nanoseconds the burst takes at `rate`, rounded down; saturating.
    pub fn as_ns_at(self, rate: Rate) -> u64 {
        let ns = u128::from(self.bytes) * 8 * 1_000_000_000 / u128::from(rate.as_bits_per_s());
        u64::try_from(ns).unwrap_or(u64::MAX)
    }
}

impl FromStr for Burst {
    type Err = UnitError;

    /// [`Burst::from_quantity`]. Bursts are also printed in this form.
    fn from_str(text: &str) -> Result<Self, UnitError> {
        Self::from_quantity(text)
    }
}

impl fmt::Display for Burst {
    /// Prints bits, the unit in which a burst is asked for.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&quantity_of(self.bytes.saturating_mul(8)))
    }
}

/// Why a text or a number is not a valid rate or burst. Stands at the end of an error text, after a colon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnitError {
    /// The text has more than 64 characters.
    TooLong,
    /// The text starts with a minus sign.
    Negative,
    /// There are no digits where digits are expected, or there are two points.
    NotANumber,
    /// The text after the digits is neither a suffix nor an exponent of a Kubernetes quantity.
    Suffix,
    /// The text is not digits followed by an `M`.
    NotMegabytes,
    /// The value is a JSON number with a sign, a fraction or an exponent, or with too many digits.
    NotWhole,
    /// The value is JSON, but not a string.
    NotText,
    /// The quantity is larger than any rate or burst can be.
    TooLarge,
    /// Below [`Rate::MIN`].
    RateTooSmall,
    /// Above [`Rate::MAX`].
    RateTooLarge,
    /// The burst is zero; no packet could be sent.
    BurstZero,
    /// Above [`Burst::MAX_ASKED`].
    BurstTooLarge,
}

impl fmt::Display for UnitError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TooLong => "longer than 64 characters",
            Self::Negative => "negative",
            Self::NotANumber => "does not start with a number",
            Self::Suffix => "the number is followed by something else than k, M, G, T, P, Ki, Mi, Gi or an exponent",
            Self::NotMegabytes => "not digits followed by M",
            Self::NotWhole => "neither a string nor a whole number",
            Self::NotText => "not a string",
            Self::TooLarge => "too large",
            Self::RateTooSmall => "less than 1 kbit/s",
            Self::RateTooLarge => "more than 1 Pbit/s",
            Self::BurstZero => "a burst of nothing",
            Self::BurstTooLarge => "a burst of 4 GiB or more",
        })
    }
}

impl std::error::Error for UnitError {}

fn is_digits(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn quantities_are_what_kubelet_reads_in_them() {
        for (text, bits_per_s) in [
            ("1000", 1_000),
            ("10M", 10_000_000),
            ("1.5M", 1_500_000),
            (".5M", 500_000),
            ("5.M", 5_000_000),
            ("+5M", 5_000_000),
            ("00010k", 10_000),
            ("1e6", 1_000_000),
            ("1E6", 1_000_000),
            ("1.5e+6", 1_500_000),
            ("1500000e-2", 15_000),
            ("64Ki", 65_536),
            ("1.5Mi", 1_572_864),
            ("1Gi", 1 << 30),
            ("0.0009765625Ti", 1 << 30),
            ("0.001Pi", 1_125_899_906_843),
            ("0.0001Ei", 115_292_150_460_685),
            ("0.001E", 1_000_000_000_000_000),
            ("1P", 1_000_000_000_000_000),
            ("999.0000000001", 1_000),
            ("1000.5", 1_001),
            ("1000001m", 1_001),
            ("1000000001u", 1_001),
            ("1000000000001n", 1_001),
            ("1.00000000000000000000000000000000000000000000000000000000001k", 1_001),
            ("123456789012345", 123_456_789_012_345),
        ] {
            assert_eq!(Rate::from_quantity(text).map(Rate::as_bits_per_s), Ok(bits_per_s), "{text}");
        }
    }

    #[test]
    fn what_is_no_rate_is_refused_with_the_reason() {
        use UnitError::*;
        let long = "1".repeat(65);
        for (text, reason) in [
            ("", NotANumber),
            ("M", NotANumber),
            ("+", NotANumber),
            (".", NotANumber),
            ("1.2.3", NotANumber),
            ("+-5M", NotANumber),
            ("NaN", NotANumber),
            ("inf", NotANumber),
            (" 10M", NotANumber),
            ("\u{661}\u{660}M", NotANumber),
            ("-5M", Negative),
            ("10MB", Suffix),
            ("10 M", Suffix),
            ("10M ", Suffix),
            ("10K", Suffix),
            ("0x10", Suffix),
            ("1_000", Suffix),
            ("1,5M", Suffix),
            ("1e", Suffix),
            ("1e1.5", Suffix),
            ("1e2M", Suffix),
            ("1e99999999999999999999", Suffix),
            ("10\u{661}", Suffix),
            (&long, TooLong),
            ("0", RateTooSmall),
            ("0M", RateTooSmall),
            ("999", RateTooSmall),
            ("1e-9223372036854775808", RateTooSmall),
            (".1e-9223372036854775808", RateTooSmall),
            ("0.1m", RateTooSmall),
            ("1000000000000001", RateTooLarge),
            ("1Ei", RateTooLarge),
            ("99999999999999999Ei", RateTooLarge),
            ("1e30", RateTooLarge),
            ("1e9223372036854775807", RateTooLarge),
        ] {
            assert_eq!(Rate::from_quantity(text), Err(reason), "{text:?}");
        }
    }

    #[test]
    fn the_ancestors_form_is_whole_megabytes() {
        for (text, expected) in [
            ("1M", Ok("8M")),
            ("125M", Ok("1G")),
            ("007M", Ok("56M")),
            ("125000000M", Ok("1P")),
            ("125000001M", Err(UnitError::RateTooLarge)),
            ("99999999999999999999999M", Err(UnitError::RateTooLarge)),
            ("0M", Err(UnitError::RateTooSmall)),
            ("", Err(UnitError::NotMegabytes)),
            ("M", Err(UnitError::NotMegabytes)),
            ("1", Err(UnitError::NotMegabytes)),
            ("+1M", Err(UnitError::NotMegabytes)),
            ("1.5M", Err(UnitError::NotMegabytes)),
            ("1MM", Err(UnitError::NotMegabytes)),
            ("1m", Err(UnitError::NotMegabytes)),
        ] {
            let rate = Rate::from_megabytes(text).map(|rate| rate.to_string());
            assert_eq!(rate, expected.map(String::from), "{text:?}");
        }
    }

    #[test]
    fn rates_print_short_and_exact_and_padded() {
        let print = |bits| Rate::bits_per_s(bits).unwrap().to_string();
        assert_eq!([10_000_000, 1_500_000, 1_234_567, 1_000].map(print), ["10M", "1500k", "1234567", "1k"]);
        assert_eq!(format!("[{:>5}]", Rate::MAX), "[   1P]");
    }

    #[test]
    fn bursts_default_to_5_ms_or_10_packets_and_are_bounded() {
        let rate = |text| Rate::from_quantity(text).unwrap();
        for (text, bytes, ns) in [
            ("1k", 15_000, 120_000_000_000),
            ("10M", 15_000, 12_000_000),
            ("24M", 15_000, 5_000_000),
            ("100M", 62_500, 5_000_000),
            ("1P", 625_000_000_000, 5_000_000),
        ] {
            let burst = Burst::default_for(rate(text));
            assert_eq!((burst.as_bytes(), burst.as_ns_at(rate(text))), (bytes, ns), "{text}");
        }
        for (text, shown) in [("10M", "120k"), ("100M", "500k"), ("1G", "5M"), ("1234567", "120k")] {
            let burst = Burst::default_for(rate(text));
            assert_eq!(Burst::of_ns_at(burst.as_ns_at(rate(text)), rate(text)), burst, "{text}");
            assert_eq!(burst.to_string(), shown, "{text}");
        }
        assert_eq!(Burst::default_for(rate("1M")).kept().as_bytes(), 6_000);
        assert_eq!(Burst::bits(80_000).map(|burst| burst.kept().as_bytes()), Ok(5_000));
        assert_eq!(Burst::bits(9).map(Burst::as_bytes), Ok(2));
        assert_eq!(Burst::from_quantity("80k").map(Burst::as_bytes), Ok(10_000));
        assert_eq!(Burst::bits(0), Err(UnitError::BurstZero));
        assert_eq!(Burst::bits(u64::from(u32::MAX) * 8), Ok(Burst::MAX_ASKED));
        assert_eq!(Burst::bits(u64::from(u32::MAX) * 8 + 1), Err(UnitError::BurstTooLarge));
        assert_eq!(Burst::from_quantity("1e30"), Err(UnitError::BurstTooLarge));
        assert!(Burst::MAX_ASKED.as_ns_at(Rate::MIN) < u64::MAX / 2);
    }

    proptest! {
        #[test]
        fn what_is_printed_is_read_back(bits in Rate::MIN.bits_per_s..=Rate::MAX.bits_per_s) {
            let rate = Rate { bits_per_s: bits };
            prop_assert_eq!(rate.to_string().parse(), Ok(rate));
        }

        #[test]
        fn no_text_makes_the_parsers_panic(text in "(?s).{0,70}", number in "[+-]?[0-9.]{0,40}[eE]?[+-]?[0-9]{0,20}[kMGTPEinum]{0,2}") {
            for text in [text, number] {
                let _ = (Rate::from_quantity(&text), Rate::from_megabytes(&text), Burst::from_quantity(&text));
            }
        }
    }
}
