//! CPU time of the whole machine, which pays for what limiters do in interrupts, timers and the senders themselves alike.

use std::fs;
use std::panic::resume_unwind;
use std::thread;
use std::time::Duration;

use super::{Context, Failure, Result};

/// The first second is another matter, and at the end processes exit.
const LEFT_OUT: Duration = Duration::from_secs(1);

/// Ticks since the machine started, of all CPUs.
#[derive(Clone, Copy)]
pub struct Ticks {
    busy: u64,
    /// What the host of a virtual machine has taken.
    stolen: u64,
    all: u64,
}

impl Ticks {
    pub fn now() -> Result<Self> {
        const STAT: &str = "/proc/stat";
        let text = fs::read_to_string(STAT).context(format_args!("read {STAT}"))?;
        let line = text.lines().next().and_then(|line| line.strip_prefix("cpu "));
        let line = line.ok_or_else(|| Failure::new(format_args!("{STAT} does not begin with the CPUs' times")))?;
        // user, nice, system, idle, iowait, irq, softirq, steal; guests' are in user.
        let ticks: Vec<u64> = line.split_whitespace().take(8).map(|field| field.parse().unwrap_or(0)).collect();
        let idle: u64 = ticks.iter().skip(3).take(2).sum();
        let stolen = ticks.get(7).copied().unwrap_or(0);
        let all = ticks.iter().sum();
        Ok(Self { busy: all - idle - stolen, stolen, all })
    }

    /// The part of the CPUs' time since then that the host of a virtual machine has taken.
    pub fn stolen_since(self, before: Self) -> f64 {
        (self.stolen - before.stolen) as f64 / (self.all - before.all).max(1) as f64
    }
}

/// CPUs at work between the first second and the last of what `measure` takes.
pub fn while_measuring<T: Send>(seconds: f64, measure: impl FnOnce() -> Result<T> + Send) -> Result<(f64, T)> {
    let cpus = thread::available_parallelism().context("count the CPUs")?.get() as f64;
    thread::scope(|scope| {
        let measuring = scope.spawn(measure);
        thread::sleep(LEFT_OUT);
        let before = Ticks::now()?;
        thread::sleep(Duration::from_secs_f64(seconds).saturating_sub(2 * LEFT_OUT));
        let after = Ticks::now()?;
        let measured = measuring.join().unwrap_or_else(|panic| resume_unwind(panic))?;
        let share = (after.busy - before.busy) as f64 / (after.all - before.all).max(1) as f64;
        Ok((share * cpus, measured))
    })
}
