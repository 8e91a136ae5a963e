//! Percentiles of times.

use std::time::Duration;

use serde::Serialize;

#[derive(Serialize)]
pub struct Times {
    p50_us: f64,
    p99_us: f64,
    max_us: f64,
}

impl Times {
    pub fn of(mut times: Vec<Duration>) -> Self {
        times.sort_unstable();
        Self { p50_us: percentile(&times, 0.50), p99_us: percentile(&times, 0.99), max_us: percentile(&times, 1.0) }
    }
}

/// The percentiles from 0 to 100.
pub fn percentiles(times: &[Duration]) -> Vec<f64> {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    (0..=100).map(|percent| percentile(&sorted, f64::from(percent) / 100.0)).collect()
}

/// The smallest time that is not exceeded by a part `share` of all times (nearest rank); 0 if there are none.
fn percentile(sorted: &[Duration], share: f64) -> f64 {
    let rank = (sorted.len() as f64 * share).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).map_or(0.0, |time| micros(*time))
}

/// The time at which the sorted waits have added up to half of the sum of all waits; 0 if there are none.
pub fn median_of_time(times: &[Duration]) -> f64 {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    let half = sorted.iter().sum::<Duration>() / 2;
    let mut waited = Duration::ZERO;
    let median = sorted.iter().find(|time| {
        waited += **time;
        waited >= half
    });
    median.map_or(0.0, |time| micros(*time))
}

pub fn micros(time: Duration) -> f64 {
    time.as_nanos() as f64 / 1000.0
}
