//! How much arrived, and when.

use serde::{Deserialize, Serialize};

/// Cumulative counts of arrivals, as the sinks of `traffic` report them.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Timeline {
    pub sample_us: Vec<u64>,
    /// Empty where an interface was watched, whose packets are not parsed for payload.
    #[serde(default)]
    pub payload_bytes: Vec<u64>,
    /// Layer 3. For TCP, everything that the receiving namespace got, including requests, replies and retransmits.
    pub wire_bytes: Vec<u64>,
    /// Payload of each TCP flow.
    #[serde(default)]
    pub flows: Vec<u64>,
    /// UDP packets that passed the limiter and found no room in the receiver's socket.
    #[serde(default)]
    pub buffer_errors: u64,
    /// UDP packets that arrived with a congestion mark.
    #[serde(default)]
    pub marked: u64,
}

impl Timeline {
    /// Wire bits per second between two times, in seconds since the first byte.
    pub fn wire_rate(&self, from: f64, to: f64) -> f64 {
        self.rate(&self.wire_bytes, from, to)
    }

    pub fn payload_rate(&self, from: f64, to: f64) -> f64 {
        self.rate(&self.payload_bytes, from, to)
    }

    /// Wire bits per second after the first second.
    pub fn steady_rate(&self) -> f64 {
        self.wire_rate(1.0, f64::INFINITY)
    }

    /// Wire bits per second in each whole second of the first `seconds`.
    pub fn each_second(&self, seconds: f64) -> Vec<f64> {
        (0..seconds as u32).map(|second| self.wire_rate(f64::from(second), f64::from(second + 1))).collect()
    }

    /// Wire bits per second in the busiest second after the first, which may begin at any sample of the first
    /// `seconds`.
    pub fn busiest_second(&self, seconds: f64) -> f64 {
        // Just before the sample: because of rounding, the sum of two fractions may differ from the time of the
        // intended sample.
        const BEFORE: f64 = 0.01;
        let starts = self.sample_us.iter().map(|us| *us as f64 / 1e6);
        let starts = starts.filter(|start| *start > 1.0 - BEFORE && *start + 1.0 < seconds + BEFORE);
        starts.map(|start| self.wire_rate(start - BEFORE, start + 1.0 - BEFORE)).fold(0.0, f64::max)
    }

    pub fn first_second(&self) -> f64 {
        self.wire_rate(0.0, 1.0)
    }

    /// Jain's index of the flows' payload: 1 if all flows have the same, 1/n if one of n flows has everything.
    pub fn jain(&self) -> f64 {
        let sum: f64 = self.flows.iter().map(|bytes| *bytes as f64).sum();
        let squares: f64 = self.flows.iter().map(|bytes| (*bytes as f64).powi(2)).sum();
        sum.powi(2) / (self.flows.len() as f64 * squares)
    }

    /// Taken between the first samples at or after the requested times, and divided by the real time between these
    /// samples, so that a late sample causes no error.
    fn rate(&self, bytes: &[u64], from: f64, to: f64) -> f64 {
        let sample = |seconds: f64| {
            let at = self.sample_us.partition_point(|us| (*us as f64) < seconds * 1e6);
            let at = at.min(self.sample_us.len().saturating_sub(1));
            Some((*self.sample_us.get(at)? as f64, *bytes.get(at)? as f64))
        };
        match (sample(from), sample(to)) {
            (Some((start_us, start)), Some((end_us, end))) if end_us > start_us => {
                (end - start) * 8.0 / ((end_us - start_us) / 1e6)
            }
            _ => 0.0,
        }
    }
}
