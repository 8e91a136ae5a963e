//! Formats numbers for people: short numbers, durations, bars and sparklines.

use std::time::Duration;

use podshaper_abi::{BACKLOG_BUCKETS, backlog_bucket_end_ns};

const EIGHTHS: [char; 8] = ['▏', '▎', '▍', '▌', '▋', '▊', '▉', '█'];
const LEVELS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// Three digits and a unit: `99.8M`, `1.02G`, `0`.
pub fn short(number: f64) -> String {
    let mut scaled = number;
    for unit in ["", "k", "M", "G", "T"] {
        if scaled < 999.5 {
            let digits = match scaled {
                0.0 => 0,
                ..9.995 => 2,
                ..99.95 => 1,
                _ => 0,
            };
            let digits = if unit.is_empty() { 0 } else { digits };
            return format!("{scaled:.digits$}{unit}");
        }
        scaled /= 1000.0;
    }
    format!("{scaled:.0}P")
}

/// A duration with its largest unit: `3d`, `5h`, `12m`, `40s`.
pub fn age(age: Duration) -> String {
    let seconds = age.as_secs();
    let units = [(86_400, 'd'), (3_600, 'h'), (60, 'm')];
    let found = units.into_iter().find(|(length, _)| seconds >= 2 * length);
    let (length, unit) = found.unwrap_or((1, 's'));
    format!("{}{unit}", seconds / length)
}

/// Nanoseconds as `8.4ms`.
pub fn time(ns: u64) -> String {
    let ns = ns as f64;
    let (scaled, unit) = match ns {
        ..1e3 => (ns, "ns"),
        ..1e6 => (ns / 1e3, "us"),
        ..1e9 => (ns / 1e6, "ms"),
        _ => (ns / 1e9, "s"),
    };
    let digits = usize::from(scaled < 9.95 && unit != "ns");
    format!("{scaled:.digits$}{unit}")
}

/// A fraction of one as a bar of `width` characters, with a resolution of eighths.
pub fn bar(share: f64, width: usize) -> String {
    let eighths = (share.clamp(0.0, 1.0) * width as f64 * 8.0).round() as usize;
    let rest = (eighths % 8).checked_sub(1).and_then(|index| EIGHTHS.get(index));
    let bar: String = std::iter::repeat_n('█', eighths / 8).chain(rest.copied()).collect();
    format!("{bar:<width$}")
}

/// Fractions of one over time, one character each.
pub fn sparkline(shares: impl Iterator<Item = f64>) -> String {
    let level = |share: f64| (share.clamp(0.0, 1.0) * (LEVELS.len() - 1) as f64).round() as usize;
    shares.map(|share| LEVELS.get(level(share)).copied().unwrap_or(' ')).collect()
}

/// The backlog below which the given fraction of packets lies, as the upper end of its bucket; `None` without packets.
pub fn percentile_ns(backlog: &[u64; BACKLOG_BUCKETS], share: f64) -> Option<u64> {
    let packets: u64 = backlog.iter().sum();
    let rank = (packets as f64 * share).ceil() as u64;
    let mut below = 0;
    let bucket = backlog.iter().position(|count| {
        below += count;
        below >= rank && below > 0
    })?;
    Some(backlog_bucket_end_ns(bucket).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits() {
        let numbers = [0.0, 7.0, 999.0, 999.6, 1_024.0, 99_940.0, 99_960.0, 100_000_000.0, 1.234e9, 1e15, 5e17];
        let shown = ["0", "7", "999", "1.00k", "1.02k", "99.9k", "100k", "100M", "1.23G", "1P", "500P"];
        assert_eq!(numbers.map(short), shown);
    }

    #[test]
    fn times_are_short() {
        assert_eq!(
            [999, 1_024, 8_388_608, 134_217_728, 2_147_483_648].map(time),
            ["999ns", "1.0us", "8.4ms", "134ms", "2.1s"]
        );
        let seconds = [0, 119, 120, 7_199, 7_200, 172_800].map(Duration::from_secs);
        assert_eq!(seconds.map(age), ["0s", "119s", "2m", "119m", "2h", "2d"]);
    }

    #[test]
    fn bars_are_as_wide_as_asked_whatever_the_share() {
        assert_eq!([0.0, 0.5, 0.51, 1.0, 3.0].map(|share| bar(share, 4)), ["    ", "██  ", "██  ", "████", "████"]);
        assert_eq!(bar(0.55, 4), "██▎ ");
        assert_eq!(bar(f64::NAN, 4), "    ");
        assert_eq!(sparkline([0.0, 0.5, 1.0, 2.0].into_iter()), "▁▅██");
    }

    #[test]
    fn the_percentile_is_the_end_of_its_bucket() {
        let mut backlog = [0; BACKLOG_BUCKETS];
        assert_eq!(percentile_ns(&backlog, 0.99), None);
        backlog[0] = 98;
        backlog[13] = 2;
        assert_eq!(percentile_ns(&backlog, 0.5), Some(1 << 10));
        assert_eq!(percentile_ns(&backlog, 0.99), Some(1 << 23));
        backlog[BACKLOG_BUCKETS - 1] = 1000;
        assert_eq!(percentile_ns(&backlog, 0.99), Some(u64::MAX));
    }
}
