//! CPU time of the whole machine. Limiters use it in interrupts, in timers and in the senders alike.

use std::fs;
use std::panic::resume_unwind;
use std::thread;
use std::time::{Duration, Instant};

use super::{Context, Failure, Result};

/// Left out at both ends: the first second is not steady, and at the end processes exit.
const LEFT_OUT: Duration = Duration::from_secs(1);
/// The unit of /proc/stat is USER_HZ, which is 100 wherever Rust runs on Linux.
const MILLIS_OF_A_TICK: u64 = 10;

/// A moment, and the idle time of the CPUs until then. The kernel measures idle time by the clock (`get_idle_time` in
/// fs/proc/stat.c, where the tick stops on an idle CPU). Busy time is counted for the process that runs at a tick,
/// 250 times a second, which misses timers between two ticks: 16 flows behind a policer seemed to take 0 ms in a
/// second.
#[derive(Clone, Copy)]
pub struct Cpus {
    at: Instant,
    count: f64,
    idle: Duration,
    /// Time that the host of a virtual machine has taken.
    stolen: Duration,
}

impl Cpus {
    pub fn now() -> Result<Self> {
        const STAT: &str = "/proc/stat";
        let text = fs::read_to_string(STAT).context(format_args!("read {STAT}"))?;
        let at = Instant::now();
        let line = text.lines().next().and_then(|line| line.strip_prefix("cpu "));
        let line = line.ok_or_else(|| Failure::new(format_args!("{STAT} does not begin with the CPUs' times")))?;
        // user, nice, system, idle, iowait, irq, softirq, steal; guests' time is part of user.
        let ticks: Vec<u64> = line.split_whitespace().map(|field| field.parse().unwrap_or(0)).collect();
        let [_, _, _, idle, iowait, _, _, stolen, ..] = ticks[..] else {
            return Err(Failure::new(format_args!("{STAT} has no time stolen by the host")));
        };
        // One line is the sum of all CPUs, and each CPU has a line.
        let count = text.lines().filter(|line| line.starts_with("cpu")).count() - 1;
        let time = |ticks: u64| Duration::from_millis(ticks * MILLIS_OF_A_TICK);
        Ok(Self { at, count: count as f64, idle: time(idle + iowait), stolen: time(stolen) })
    }

    /// How many CPUs have been busy since then, on average.
    fn busy_since(self, before: Self) -> f64 {
        let elapsed = (self.at - before.at).as_secs_f64();
        let spent = self.idle.saturating_sub(before.idle) + self.stolen.saturating_sub(before.stolen);
        (self.count - spent.as_secs_f64() / elapsed).max(0.0)
    }

    /// The part of the CPUs' time since then that the host of a virtual machine has taken.
    pub fn stolen_since(self, before: Self) -> f64 {
        let elapsed = (self.at - before.at).as_secs_f64();
        self.stolen.saturating_sub(before.stolen).as_secs_f64() / (elapsed * self.count)
    }
}

/// The number of busy CPUs while `measure` runs, without its first second and its last.
pub fn while_measuring<T: Send>(seconds: f64, measure: impl FnOnce() -> Result<T> + Send) -> Result<(f64, T)> {
    thread::scope(|scope| {
        let measuring = scope.spawn(measure);
        thread::sleep(LEFT_OUT);
        let before = Cpus::now()?;
        thread::sleep(Duration::from_secs_f64(seconds).saturating_sub(2 * LEFT_OUT));
        let after = Cpus::now()?;
        let measured = measuring.join().unwrap_or_else(|panic| resume_unwind(panic))?;
        Ok((after.busy_since(before), measured))
    })
}
