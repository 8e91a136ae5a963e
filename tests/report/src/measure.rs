//! Runs the workloads in rounds. In each round the limiters take turns, so that a slow moment of the machine affects
//! all of them.

use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::Measure;
use crate::harness::cpu::Cpus;
use crate::harness::limiter::{Limiter, Programs};
use crate::harness::{Context, Failure, Result, check_stop, note, stopped};
use crate::machine::Machine;
use crate::record::{self, Found, Line, Measurement, Outcome, Sink};
use crate::workloads::{self, Workload};

/// More time than all measurements take there.
const LONGEST_IN_UML_S: u32 = 2400;

/// Returns false if podshaper could not be measured somewhere; all else is measured nevertheless. A reply of another
/// limiter that does not come within half a minute is a result, which the report mentions.
pub fn measure(options: &Measure) -> Result<bool> {
    if !nix::unistd::geteuid().is_root() {
        return Err(Failure::new("it makes network namespaces and loads eBPF programs: run it as root"));
    }
    let programs = Programs::find(None, &[Limiter::Podshaper])?.with_newer_bandwidth(options.newer_bandwidth.clone());
    let machine = Machine::of(&programs, &options.commit, options.newer_bandwidth.as_deref(), options.quick);
    let mut list = workloads::all(&machine, options.quick);
    list.retain(|workload| options.only.is_empty() || options.only.iter().any(|name| name == workload.name));
    let turns = turns(&list);
    let mut progress = Progress::new(turns.iter().map(|turn| turn.workload.seconds).collect());
    for (limiter, why) in &machine.missing {
        note(format_args!("without {}: {why}", limiter.title()));
    }
    note(format_args!("{}: {} measurements, about {}", machine.title(), turns.len(), progress.left()));
    if !machine.is_uml {
        say_what_follows(&machine, options, progress.seconds.iter().sum());
    }
    if options.plan {
        return Ok(true);
    }
    let mut sink = Sink::open(&options.out)?;
    sink.put(&Line::Machine(Box::new(machine.clone())))?;
    let mut complete = true;
    for turn in turns {
        check_stop()?;
        progress.say(&turn);
        let (start, before) = (Instant::now(), Cpus::now()?);
        let found = turn.workload.measure(turn.limiter, &programs);
        // A stop signal shows up as a failure of the running measurement.
        check_stop()?;
        complete &= found.is_ok() || turn.limiter != Limiter::Podshaper;
        let stolen = Cpus::now()?.stolen_since(before);
        let seconds = start.elapsed().as_secs_f64();
        sink.put(&Line::Measurement(turn.measurement(&machine.kernel, stolen, seconds, found)))?;
        progress.done();
    }
    note(format_args!("{}: measured in {}", machine.title(), minutes(progress.start.elapsed().as_secs_f64())));
    Ok(complete)
}

/// `tests/run report` measures in User Mode Linux afterwards.
fn say_what_follows(machine: &Machine, options: &Measure, seconds_here: f64) {
    let there = workloads::all(&machine.as_uml(), options.quick);
    let seconds_there: f64 = there.iter().map(Workload::seconds_in_all).sum();
    note(format_args!(
        "User Mode Linux after it: about {}, and both together {}",
        minutes(seconds_there),
        minutes(seconds_here + seconds_there)
    ));
}

/// One planned measurement.
struct Turn<'a> {
    workload: &'a Workload,
    limiter: Limiter,
    round: usize,
}

impl Turn<'_> {
    fn measurement(&self, kernel: &str, stolen: f64, seconds: f64, found: Result<Found>) -> Measurement {
        let outcome = found.map_or_else(
            |error| {
                note(format_args!("failed: {error}"));
                Outcome::Failed(error.to_string())
            },
            Outcome::Found,
        );
        Measurement {
            kernel: kernel.to_owned(),
            workload: self.workload.name.to_owned(),
            parameters: self.workload.parameters.clone(),
            limiter: self.limiter,
            round: self.round,
            stolen,
            seconds,
            outcome,
        }
    }
}

/// Each round begins with another limiter.
fn turns(list: &[Workload]) -> Vec<Turn<'_>> {
    let rounds = list.iter().map(|workload| workload.rounds).max().unwrap_or(0);
    let of_round = |round: usize| {
        let takes_part = move |workload: &&Workload| workload.rounds > round;
        list.iter().filter(takes_part).flat_map(move |workload| {
            let peers = workload.peers.iter().copied().cycle().skip(round).take(workload.peers.len());
            peers.map(move |limiter| Turn { workload, limiter, round })
        })
    };
    (0..rounds).flat_map(of_round).collect()
}

/// The remaining time, estimated from the measurements so far.
struct Progress {
    start: Instant,
    /// The estimated time of each measurement.
    seconds: Vec<f64>,
    done: usize,
}

impl Progress {
    fn new(seconds: Vec<f64>) -> Self {
        Self { start: Instant::now(), seconds, done: 0 }
    }

    fn done(&mut self) {
        self.done += 1;
    }

    fn left(&self) -> String {
        let (done, left) = self.seconds.split_at(self.done);
        let thought: f64 = done.iter().sum();
        // The first few measurements are no basis for an estimate.
        let factor = if self.done < 5 { 1.0 } else { self.start.elapsed().as_secs_f64() / thought };
        minutes(left.iter().sum::<f64>() * factor)
    }

    fn say(&self, turn: &Turn) {
        let Turn { workload, limiter, .. } = turn;
        let (number, all) = (self.done + 1, self.seconds.len());
        note(format_args!("[{number}/{all}, {} left] {}: {}", self.left(), workload.title(), limiter.title()));
    }
}

fn minutes(seconds: f64) -> String {
    format!("{}:{:02} min", seconds as u64 / 60, seconds as u64 % 60)
}

/// Runs this program in User Mode Linux. Its stdout is passed back; its files are lost.
pub fn in_uml(options: &Measure) -> Result<bool> {
    const POLL: Duration = Duration::from_millis(200);
    let own = std::env::current_exe().context("find this program's own path")?;
    let mut uml = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("../lab/uml"));
    uml.args(["--memory", "2560", "--seconds", &LONGEST_IN_UML_S.to_string(), "--"]).arg(own);
    uml.args(["measure", "--out", "-", "--commit", &options.commit]);
    uml.args(options.quick.then_some("--quick")).args(options.plan.then_some("--plan"));
    if !options.only.is_empty() {
        uml.args(["--only", &options.only.join(",")]);
    }
    if let Some(directory) = &options.newer_bandwidth {
        uml.arg("--newer-bandwidth").arg(directory);
    }
    let mut child = uml
        .stdin(Stdio::null())
        .stdout(record::append(&options.out)?)
        .spawn()
        .context("start User Mode Linux (tests/lab/uml)")?;
    loop {
        if let Some(status) = child.try_wait().context("wait for User Mode Linux")? {
            check_stop()?;
            return match status.code() {
                Some(0) => Ok(true),
                Some(1) => Ok(false),
                _ => Err(Failure::new(format_args!("measure in User Mode Linux: {status}"))),
            };
        }
        if stopped() {
            // SIGTERM ends the kernel with all its processes.
            let id = Pid::from_raw(child.id().cast_signed());
            kill(id, Signal::SIGTERM).context("end User Mode Linux")?;
            child.wait().context("wait for User Mode Linux")?;
        }
        thread::sleep(POLL);
    }
}
