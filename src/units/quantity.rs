//! Kubernetes quantities (`10M`, `1.5Gi`, `1e6`, `500m`) as whole numbers: rounded up, and exact at any length.
//!
//! Podshaper has its own parser because kube_quantity 0.9 computed in floating point and cut fractions off when it was
//! tried: "1.5M" became 1000000, 9007199254740993 lost its last digit, "1E" was refused, and "M" and "--5" were
//! accepted as numbers.

use super::{UnitError, is_digits};

/// The longest text that is accepted as a number. The longest reasonable one, 1P in bits with nine decimals, has 26
/// characters.
pub(super) const MAX_TEXT: usize = 64;

/// A Kubernetes quantity as a whole number, rounded up. The result is that of apimachinery's
/// `ParseQuantity(text).Value()`, except that a sign must be followed by digits and that large values are not capped.
pub(super) fn round_up(text: &str) -> Result<u64, UnitError> {
    if text.len() > MAX_TEXT {
        return Err(UnitError::TooLong);
    }
    if text.starts_with('-') {
        return Err(UnitError::Negative);
    }
    let text = text.strip_prefix('+').unwrap_or(text);
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let (integer, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits = [integer, fraction].concat();
    if !is_digits(&digits) {
        return Err(UnitError::NotANumber);
    }
    let (exponent, doublings) = scale(suffix)?;
    let zeros = digits.bytes().take_while(|digit| *digit == b'0').count();
    let digits: Vec<u8> = digits.bytes().skip(zeros).map(|digit| digit - b'0').collect();
    // Both are at most 64, so the conversions do not overflow.
    let point = (integer.len() as i64 - zeros as i64).saturating_add(exponent);
    round_up_scaled(Decimal { digits, point }, doublings)
}

/// The number in front of a quantity's suffix, without leading zeros: `0.d1 d2 d3 .. * 10^point`.
struct Decimal {
    digits: Vec<u8>,
    point: i64,
}

/// The power of ten and the power of two that a suffix stands for.
fn scale(suffix: &str) -> Result<(i64, u32), UnitError> {
    Ok(match suffix {
        "n" => (-9, 0),
        "u" => (-6, 0),
        "m" => (-3, 0),
        "" => (0, 0),
        "k" => (3, 0),
        "M" => (6, 0),
        "G" => (9, 0),
        "T" => (12, 0),
        "P" => (15, 0),
        "E" => (18, 0),
        "Ki" => (0, 10),
        "Mi" => (0, 20),
        "Gi" => (0, 30),
        "Ti" => (0, 40),
        "Pi" => (0, 50),
        "Ei" => (0, 60),
        _ => {
            let exponent = suffix.strip_prefix(['e', 'E']).ok_or(UnitError::Suffix)?;
            (exponent.parse().map_err(|_| UnitError::Suffix)?, 0)
        }
    })
}

/// The number times 2^`doublings`, rounded up; exact at any length.
fn round_up_scaled(number: Decimal, doublings: u32) -> Result<u64, UnitError> {
    let Decimal { digits, point } = number;
    if digits.is_empty() {
        return Ok(0);
    }
    // 10^17 is above every bound, and its product with 2^60 still fits into 128 bits.
    if point > 17 {
        return Err(UnitError::TooLarge);
    }
    // 64 places below the point are enough. An exponent moves no digit of a binary quantity, and any other number this
    // small is rounded up to 1.
    let leading = usize::try_from(point.saturating_neg().clamp(0, MAX_TEXT as i64)).unwrap_or(0);
    let in_front = usize::try_from(point).unwrap_or(0);
    let mut whole = 0u128;
    for place in 0..in_front {
        whole = whole * 10 + u128::from(digits.get(place).copied().unwrap_or(0));
    }
    let mut fraction = vec![0; leading];
    fraction.extend(digits.iter().skip(in_front));
    for _ in 0..doublings {
        let mut carry = 0;
        for digit in fraction.iter_mut().rev() {
            let doubled = *digit * 2 + carry;
            (*digit, carry) = (doubled % 10, doubled / 10);
        }
        whole = whole * 2 + u128::from(carry);
    }
    let rest = u128::from(fraction.iter().any(|digit| *digit != 0));
    u64::try_from(whole + rest).map_err(|_| UnitError::TooLarge)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_parser_agrees_with_128_bit_arithmetic(
            number in 0u64..1_000_000_000_000,
            places in 0usize..=11,
            unit in prop::sample::select(vec![
                ("", 1u128), ("k", 1_000), ("M", 1_000_000), ("G", 1_000_000_000), ("e3", 1_000), ("E+6", 1_000_000),
                ("Ki", 1 << 10), ("Mi", 1 << 20), ("Gi", 1 << 30), ("Ti", 1 << 40), ("Pi", 1 << 50), ("Ei", 1 << 60),
            ]),
        ) {
            let digits = format!("{number:012}");
            let (integer, fraction) = digits.split_at(12 - places);
            let text = format!("{integer}.{fraction}{}", unit.0);
            let expected = (u128::from(number) * unit.1).div_ceil(10u128.pow(places as u32));
            // The parser gives up before multiplying at 17 digits in front of the point.
            let in_reach = expected <= 10_000_000_000_000_000;
            prop_assert_eq!(round_up(&text).ok().filter(|_| in_reach), in_reach.then_some(expected as u64), "{}", text);
        }
    }
}
