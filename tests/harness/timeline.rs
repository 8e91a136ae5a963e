//! What arrived, and when.

use serde::{Deserialize, Serialize};

/// What arrived, cumulative; as the sinks of `traffic` report it.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Timeline {
    pub sample_us: Vec<u64>,
    /// None where an interface was watched, whose packets are not looked into.
    #[serde(default)]
    pub payload_bytes: Vec<u64>,
    /// Layer 3. For TCP everything the receiving namespace got: requests, replies and retransmits are in it.
    pub wire_bytes: Vec<u64>,
    /// Payload of each TCP flow.
    #[serde(default)]
    pub flows: Vec<u64>,
    /// UDP packets that passed the limiter and found no room in the receiver's socket.
    #[serde(default)]
    pub buffer_errors: u64,
    /// UDP packets that came with a congestion mark.
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

    /// Wire bits per second in the busiest second after the first, wherever between two samples of the first `seconds` it begins.
    pub fn busiest_second(&self, seconds: f64) -> f64 {
        // Between two samples: a sum of two fractions is not quite the time of the sample that is meant.
        const BEFORE: f64 = 0.01;
        let starts = self.sample_us.iter().map(|us| *us as f64 / 1e6);
        let starts = starts.filter(|start| *start > 1.0 - BEFORE && *start + 1.0 < seconds + BEFORE);
        starts.map(|start| self.wire_rate(start - BEFORE, start + 1.0 - BEFORE)).fold(0.0, f64::max)
    }

    pub fn first_second(&self) -> f64 {
        self.wire_rate(0.0, 1.0)
    }

    /// Jain's index of the flows' payload: 1 where all have the same, 1/n where one of n has all.
    pub fn jain(&self) -> f64 {
        let sum: f64 = self.flows.iter().map(|bytes| *bytes as f64).sum();
        let squares: f64 = self.flows.iter().map(|bytes| (*bytes as f64).powi(2)).sum();
        sum.powi(2) / (self.flows.len() as f64 * squares)
    }

    /// Taken between the first samples at or after the times asked for, over the time that really lies between them: a late
    /// sample is then no error.
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
