//! The report: README.md and its plots, made from raw.jsonl.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::fs;
use std::ops::Range;
use std::path::Path;

use serde_json::Value;

use crate::figures::{self, Column, Figure, Plot, Unit};
use crate::harness::limiter::Limiter;
use crate::harness::{Context, Failure, Result, table};
use crate::judge::{self, Row, judge};
use crate::machine::Machine;
use crate::plot::{self, Axis, Bar, Bars, Group, Line, Lines};
use crate::record::{self, Measurement, Outcome, Parameters};

/// The time of a step in [`Plot::Steps`].
const STEP_S: f64 = 0.2;
const REPORT: &str = "README.md";
const INTRODUCTION: &str = include_str!("introduction.md");
/// Describes the limiters.
const PEERS: &str = include_str!("peers.md");

/// The measurements on one machine.
struct Data {
    machine: Machine,
    measurements: Vec<Measurement>,
}

impl Data {
    /// The time of all measurements.
    fn seconds(&self) -> f64 {
        self.measurements.iter().map(|one| one.seconds).sum()
    }
}

fn minutes(seconds: f64) -> String {
    format!("{:.1} minutes", seconds / 60.0)
}

/// Makes the report. Returns false if podshaper has failed in any measurement.
pub fn draw(directory: &Path) -> Result<bool> {
    let all = data(record::read(directory)?)?;
    remove_plots(directory)?;
    let failed = all.iter().flat_map(|data| &data.measurements).filter(|one| is_failure(one)).count();
    let (mut sections, mut compared, mut not_first) = (String::new(), 0, 0);
    for figure in figures::ALL {
        let mut has_title = false;
        for data in &all {
            let Some(section) = section(directory, figure, data)? else { continue };
            if !has_title {
                let _ = write!(sections, "\n## {}\n\n{}\n", figure.title, figure.says);
                has_title = true;
            }
            sections += &section.text;
            compared += section.compared;
            not_first += section.not_first;
        }
    }
    let judged = format!(
        "\nOf {compared} comparisons, podshaper is not the first in {not_first}. Below each table's plots they are named, with who is \
         the first. Two that are written alike are both the first; where the rounds of the two overlap, chance may have decided, and where one of \
         them has one round only, nobody can say whether it has.\n"
    );
    let path = directory.join(REPORT);
    fs::write(&path, introduction(&all, failed) + &judged + PEERS + &sections)
        .context(format_args!("write {}", path.display()))?;
    let is_ours = |one: &Measurement| one.limiter == Limiter::Podshaper;
    Ok(!all.iter().flat_map(|data| &data.measurements).any(|one| is_failure(one) && is_ours(one)))
}

fn is_failure(measurement: &Measurement) -> bool {
    matches!(measurement.outcome, Outcome::Failed(_))
}

fn data(lines: Vec<record::Line>) -> Result<Vec<Data>> {
    let mut all: Vec<Data> = vec![];
    for line in lines {
        match line {
            record::Line::Machine(machine) => match all.iter_mut().find(|data| data.machine.kernel == machine.kernel) {
                // A later run has appended to the same file.
                Some(data) => data.machine = *machine,
                None => all.push(Data { machine: *machine, measurements: vec![] }),
            },
            record::Line::Measurement(measurement) => {
                let data = all.iter_mut().find(|data| data.machine.kernel == measurement.kernel);
                let data = data.ok_or_else(|| Failure::new("a measurement comes before its machine in raw.jsonl"))?;
                data.measurements.push(measurement);
            }
        }
    }
    Ok(all)
}

/// Removes the plots of an earlier run, whose names may differ.
fn remove_plots(directory: &Path) -> Result<()> {
    for entry in fs::read_dir(directory).context(format_args!("read {}", directory.display()))?.flatten() {
        if entry.path().extension().is_some_and(|extension| extension == "svg") {
            fs::remove_file(entry.path()).context(format_args!("remove {}", entry.path().display()))?;
        }
    }
    Ok(())
}

fn introduction(all: &[Data], failed: usize) -> String {
    let mut text = INTRODUCTION.to_owned();
    if all.iter().any(|data| data.machine.is_quick) {
        text += "\n**This was a quick run** (`--quick`): few workloads, one round, short. Its numbers are not to be trusted.\n";
    }
    let all_seconds: f64 = all.iter().map(Data::seconds).sum();
    if all_seconds > 0.0 {
        let _ = write!(text, "\nThe measurements took {}.\n", minutes(all_seconds));
    }
    if failed > 0 {
        let _ = write!(text, "\n**Measurements that failed: {failed}**; the tables say which.\n");
    }
    for data in all {
        let Machine { cpu, cpus, memory_mib, date, podshaper, iproute2, congestion_controls, apps, .. } = &data.machine;
        let apps: String = apps.iter().map(|(name, version)| format!("; {name} {version}")).collect();
        let stolen: Vec<f64> = data.measurements.iter().map(|one| one.stolen * 100.0).collect();
        let mean = stolen.iter().sum::<f64>() / stolen.len().max(1) as f64;
        let took = if data.seconds() > 0.0 { format!(" in {}", minutes(data.seconds())) } else { String::new() };
        let most = stolen.iter().copied().fold(0.0, f64::max);
        let _ = write!(
            text,
            "\n**{}**: {date}; {cpus} CPUs ({cpu}), {memory_mib} MiB; podshaper of commit {podshaper}; {iproute2}{apps}; congestion controls: \
             {congestion_controls}. {} measurements{took}; the host of this virtual machine took {mean:.1} % of the CPUs' time, and {most:.1} % \
             in the worst of them.",
            data.machine.title(),
            data.measurements.len(),
        );
        let missing =
            data.machine.missing.iter().map(|(limiter, why)| format!("{} ({why})", label(*limiter, &data.machine)));
        let missing: Vec<String> = missing.collect();
        if !missing.is_empty() {
            let _ = write!(text, " Not in this kernel, or not to be had: {}.", missing.join(", "));
        }
        text.push('\n');
    }
    text
}

/// The name in plots and tables: with the version, if several versions are compared.
fn label(limiter: Limiter, machine: &Machine) -> String {
    let release = |version: &str| version.split('+').next().unwrap_or_default().to_owned();
    let has_newer = !machine.newer_bandwidth_plugin.is_empty();
    let plugin = |version: &str, burst| format!("bandwidth plugin {}, {burst}", release(version));
    match limiter {
        Limiter::Bandwidth => plugin(&machine.bandwidth_plugin, "1 Mbit"),
        Limiter::BandwidthAsKubelet => plugin(&machine.bandwidth_plugin, "no burst"),
        Limiter::BandwidthNewer if has_newer => plugin(&machine.newer_bandwidth_plugin, "1 Mbit"),
        Limiter::BandwidthNewerAsKubelet if has_newer => plugin(&machine.newer_bandwidth_plugin, "no burst"),
        Limiter::Edt => "Cilium's scheme".to_owned(),
        Limiter::Senders => "senders pace themselves".to_owned(),
        limiter => limiter.title().to_owned(),
    }
}

/// The section of one kernel: plots, the comparisons in which podshaper is not the first, and the table. None if
/// nothing was measured.
fn section(directory: &Path, figure: &Figure, data: &Data) -> Result<Option<Verdicts>> {
    let of = |name: &str| judge::rows(data.measurements.iter().filter(|one| one.workload == name));
    let rows = of(figure.workload);
    if rows.is_empty() {
        return Ok(None);
    }
    let mut text = format!("\n### {}\n\n", data.machine.title());
    let plotter =
        Plotter { directory, figure, machine: &data.machine, rows: &rows, idle: of("idle").into_iter().next() };
    for plot in figure.plots {
        for (file, title) in plotter.plot(plot)? {
            let _ = writeln!(text, "![{title}]({file})\n");
        }
    }
    let verdicts = verdicts(figure, &rows, &data.machine);
    let _ = write!(text, "{}\n<details><summary>The numbers</summary>\n\n", verdicts.text);
    text = text + &numbers(figure, &rows, &data.machine) + "\n</details>\n";
    Ok(Some(Verdicts { text, ..verdicts }))
}

/// The combinations of all parameters except one, in their order.
fn combinations(rows: &[Row], without: &str) -> Vec<Parameters> {
    let mut found: Vec<Parameters> = vec![];
    for row in rows {
        let rest = rest(&row.parameters, without);
        if !found.contains(&rest) {
            found.push(rest);
        }
    }
    found
}

fn rest(parameters: &Parameters, without: &str) -> Parameters {
    parameters.iter().filter(|(name, _)| *name != without).map(|(name, value)| (name.clone(), value.clone())).collect()
}

fn write_parameter(name: &str, value: &Value) -> String {
    match value.as_f64() {
        Some(number) => match name {
            "limit" => Unit::Rate.write(number),
            "rtt_ms" => format!("{number} ms"),
            "loss_percent" => format!("{number} % lost"),
            "pods" | "flows" | "clients" if number == 1.0 => format!("1 {}", name.trim_end_matches('s')),
            "pods" | "flows" | "clients" => format!("{number} {name}"),
            _ => number.to_string(),
        },
        None => value.as_str().unwrap_or_default().to_owned(),
    }
}

/// "out, 100 Mbit/s, 4 flows".
fn write_parameters(parameters: &Parameters) -> String {
    let words: Vec<String> = parameters.iter().map(|(name, value)| write_parameter(name, value)).collect();
    words.join(", ")
}

/// The comparisons in which podshaper is not the first.
#[derive(Default)]
struct Verdicts {
    compared: usize,
    not_first: usize,
    text: String,
}

fn verdicts(figure: &Figure, rows: &[Row], machine: &Machine) -> Verdicts {
    let mut verdicts = Verdicts::default();
    let mut list = String::new();
    for column in figure.columns {
        let places = verdicts_of(column, rows, machine, &mut verdicts.compared);
        verdicts.not_first += places.len();
        if !places.is_empty() {
            let _ = writeln!(list, "- {}: {}", column.title, places.join("; "));
        }
    }
    let Verdicts { compared, not_first, .. } = verdicts;
    verdicts.text = match not_first {
        _ if compared == 0 => String::new(),
        0 => format!("podshaper is the first in all {compared} comparisons of this table.\n"),
        _ => {
            format!("podshaper is not the first in {not_first} of the {compared} comparisons of this table:\n\n{list}")
        }
    };
    verdicts
}

/// The verdicts of one column: one for each combination of parameters in which podshaper is not the first.
fn verdicts_of(column: &Column, rows: &[Row], machine: &Machine, compared: &mut usize) -> Vec<String> {
    let mut places = vec![];
    for parameters in combinations(rows, "") {
        let rows: Vec<&Row> = rows.iter().filter(|row| row.parameters == parameters).collect();
        let Some(better) = column.better.filter(|_| judge::are_compared(&rows, column.metric)) else { continue };
        *compared += 1;
        if let Some(verdict) = judge(&rows, column.metric, better, column.unit.digits()) {
            places.push(write_verdict(&parameters, column, &verdict, &rows, machine));
        }
    }
    places
}

fn write_verdict(
    parameters: &Parameters,
    column: &Column,
    verdict: &judge::Verdict,
    rows: &[&Row],
    machine: &Machine,
) -> String {
    /// Outside of this range, in percent, the share of the limit is mentioned: a limiter that passes less or more has
    /// an advantage in the other numbers.
    const HELD: Range<f64> = 90.0..110.0;
    let row = rows.iter().find(|row| row.limiter == verdict.best);
    let percent = row.and_then(|row| row.values.get("percent")).filter(|percent| !HELD.contains(&percent.median));
    let at = percent.map(|percent| format!(" at {} of the limit", Unit::Percent.write(percent.median)));
    let chance = match verdict {
        judge::Verdict { has_one_round: true, .. } => ", one round",
        judge::Verdict { may_be_chance: true, .. } => ", rounds overlap",
        _ => "",
    };
    let of = write_parameters(parameters);
    format!(
        "{of}{}{} of {} ({}; {} {}{}{chance})",
        if of.is_empty() { "" } else { " " },
        ordinal(verdict.rank),
        verdict.of,
        column.unit.write(verdict.own),
        label(verdict.best, machine),
        column.unit.write(verdict.best_value),
        at.unwrap_or_default(),
    )
}

fn ordinal(number: usize) -> String {
    match number {
        1 => "1st".to_owned(),
        2 => "2nd".to_owned(),
        3 => "3rd".to_owned(),
        _ => format!("{number}th"),
    }
}

fn numbers(figure: &Figure, rows: &[Row], machine: &Machine) -> String {
    let columns: Vec<&Column> =
        figure.columns.iter().filter(|column| rows.iter().any(|row| row.values.contains_key(column.metric))).collect();
    let cells = |row: &Row| {
        let mut cells = vec![write_parameters(&row.parameters), label(row.limiter, machine)];
        cells.extend(columns.iter().map(|column| cell(row, column)));
        cells
    };
    let mut header = vec!["", "limiter"];
    header.extend(columns.iter().map(|column| column.title));
    table::markdown(&header, &rows.iter().map(cells).collect::<Vec<_>>())
}

fn cell(row: &Row, column: &Column) -> String {
    match row.values.get(column.metric) {
        Some(_) if is_of_a_limit(column) && row.limiter == Limiter::Bare => table::NONE.to_owned(),
        Some(value) if row.failures.is_empty() => column.unit.write(value.median),
        Some(value) => format!("{} ({} failed)", column.unit.write(value.median), row.failures.len()),
        None if row.failures.is_empty() => table::NONE.to_owned(),
        None => "failed".to_owned(),
    }
}

/// Whether the column has no meaning for a pod without a limit.
fn is_of_a_limit(column: &Column) -> bool {
    column.unit == Unit::Percent
}

/// Draws the plots of one figure on one kernel.
struct Plotter<'a> {
    directory: &'a Path,
    figure: &'a Figure,
    machine: &'a Machine,
    rows: &'a [Row],
    /// The values of an idle pod.
    idle: Option<Row>,
}

impl Plotter<'_> {
    /// Draws the files and returns them with their titles.
    fn plot(&self, plot: &Plot) -> Result<Vec<(String, String)>> {
        let (title, aside) = match plot {
            Plot::Cdf { title, .. } | Plot::Steps { title, .. } => (title, ""),
            Plot::Over { parameter, title, .. } | Plot::Bars { parameter, title, .. } => (title, *parameter),
        };
        let mut drawn = vec![];
        for parameters in combinations(self.rows, aside) {
            let rows: Vec<&Row> = self.rows.iter().filter(|row| rest(&row.parameters, aside) == parameters).collect();
            let of = if parameters.is_empty() { String::new() } else { format!(", {}", write_parameters(&parameters)) };
            let title = format!("{title}{of} (Linux {})", self.machine.release());
            let file = format!("{}.svg", slug(&title));
            let path = self.directory.join(&file);
            let is_drawn = match plot {
                Plot::Cdf { series, .. } => self.cdf(&path, &title, &rows, series)?,
                Plot::Over { parameter, metric, .. } => self.over(&path, &title, &rows, parameter, metric)?,
                Plot::Steps { series, .. } => self.steps(&path, &title, &rows, series)?,
                Plot::Bars { parameter, metric, .. } => self.bars(&path, &title, &rows, parameter, metric)?,
            };
            if is_drawn {
                drawn.push((file, title));
            }
        }
        Ok(drawn)
    }

    fn line(&self, limiter: Limiter, points: Vec<(f64, f64)>) -> Line {
        Line { name: label(limiter, self.machine), limiter: Some(limiter), points }
    }

    fn cdf(&self, path: &Path, title: &str, rows: &[&Row], series: &str) -> Result<bool> {
        let points = |row: &Row| -> Option<Vec<(f64, f64)>> {
            let times = row.series.get(series)?;
            Some(times.iter().zip(0..).map(|(ms, percent)| (*ms, f64::from(percent))).collect())
        };
        let mut lines: Vec<Line> = rows.iter().filter_map(|row| Some(self.line(row.limiter, points(row)?))).collect();
        if lines.is_empty() {
            return Ok(false);
        }
        if let Some(points) = self.idle.as_ref().and_then(points) {
            lines.push(Line { name: "an idle pod".to_owned(), limiter: None, points });
        }
        let x = Axis::of("until the reply, ms", lines.iter().flat_map(xs), Unit::Millis);
        let y = Axis::linear("part of the replies", 0.0, 100.0, Unit::Percent);
        plot::lines(path, &Lines { title: title.to_owned(), x, y, lines, has_marks: false, limit: None })?;
        Ok(true)
    }

    fn over(&self, path: &Path, title: &str, rows: &[&Row], parameter: &str, metric: &str) -> Result<bool> {
        let unit = self.figure.unit(metric);
        let limiters: BTreeSet<Limiter> = rows.iter().map(|row| row.limiter).collect();
        // Without a limit there is no share of a limit.
        let is_shown = |limiter: &&Limiter| unit != Unit::Percent || **limiter != Limiter::Bare;
        let point = |row: &&&Row| Some((row.parameters.get(parameter)?.as_f64()?, row.values.get(metric)?.median));
        let points = |limiter: &Limiter| -> Vec<(f64, f64)> {
            rows.iter().filter(|row| row.limiter == *limiter).filter_map(|row| point(&row)).collect()
        };
        let lines = limiters.iter().filter(is_shown).map(|limiter| self.line(*limiter, points(limiter)));
        let lines: Vec<Line> = lines.filter(|line| !line.points.is_empty()).collect();
        let mut ticks: Vec<f64> = lines.iter().flat_map(xs).collect();
        ticks.sort_by(f64::total_cmp);
        ticks.dedup();
        if ticks.len() < 2 {
            return Ok(false);
        }
        let x = Axis::through(parameter_title(parameter), &ticks, Unit::of_parameter(parameter));
        let limit = (unit == Unit::Percent).then_some(100.0);
        let values = lines.iter().flat_map(ys).chain(limit);
        let y = Axis::of(&self.metric_title(metric), values, unit);
        plot::lines(path, &Lines { title: title.to_owned(), x, y, lines, has_marks: true, limit })?;
        Ok(true)
    }

    fn steps(&self, path: &Path, title: &str, rows: &[&Row], series: &str) -> Result<bool> {
        let points = |row: &Row| -> Option<Vec<(f64, f64)>> {
            let parts = row.series.get(series)?;
            Some(
                parts
                    .iter()
                    .zip(0..)
                    .map(|(percent, step)| (f64::from(step) * STEP_S + STEP_S / 2.0, *percent))
                    .collect(),
            )
        };
        let limited = rows.iter().filter(|row| row.limiter != Limiter::Bare);
        let lines: Vec<Line> = limited.filter_map(|row| Some(self.line(row.limiter, points(row)?))).collect();
        if lines.is_empty() {
            return Ok(false);
        }
        let end = lines.iter().flat_map(xs).fold(0.0, f64::max) + STEP_S / 2.0;
        let x = Axis::linear("since the first byte", 0.0, end, Unit::Seconds);
        let y = Axis::of("on the wire, of the limit", lines.iter().flat_map(ys).chain([100.0]), Unit::Percent);
        let limit = Some(100.0);
        plot::lines(path, &Lines { title: title.to_owned(), x, y, lines, has_marks: false, limit })?;
        Ok(true)
    }

    fn bars(&self, path: &Path, title: &str, rows: &[&Row], parameter: &str, metric: &str) -> Result<bool> {
        let unit = self.figure.unit(metric);
        let mut groups: Vec<Group> = vec![];
        for row in rows {
            let (Some(of), Some(value)) = (row.parameters.get(parameter), row.values.get(metric)) else { continue };
            let name = write_parameter(parameter, of);
            let name_of_bar = label(row.limiter, self.machine);
            let bar = Bar { limiter: row.limiter, name: name_of_bar, value: value.median };
            match groups.iter_mut().find(|group| group.name == name) {
                Some(group) => group.bars.push(bar),
                None => groups.push(Group { name, bars: vec![bar] }),
            }
        }
        let values: Vec<f64> = groups.iter().flat_map(|group| group.bars.iter().map(|bar| bar.value)).collect();
        if values.is_empty() {
            return Ok(false);
        }
        let limit = (unit == Unit::Percent).then_some(100.0);
        // Bars begin at zero.
        let axis = match Axis::of(&self.metric_title(metric), values.iter().copied().chain(limit), unit) {
            axis if axis.scale == plot::Scale::Linear => Axis::linear(&axis.title, 0.0, axis.most, unit),
            axis => axis,
        };
        plot::bars(path, &Bars { title: title.to_owned(), axis, groups, limit })?;
        Ok(true)
    }

    fn metric_title(&self, metric: &str) -> String {
        let column = self.figure.columns.iter().find(|column| column.metric == metric);
        column.map_or(metric, |column| column.title).to_owned()
    }
}

fn parameter_title(parameter: &str) -> &str {
    match parameter {
        "rtt_ms" => "round trip",
        name => name,
    }
}

fn xs(line: &Line) -> impl Iterator<Item = f64> + use<'_> {
    line.points.iter().map(|(x, _)| *x)
}

fn ys(line: &Line) -> impl Iterator<Item = f64> + use<'_> {
    line.points.iter().map(|(_, y)| *y)
}

/// For a file's name: letters, digits and hyphens.
fn slug(title: &str) -> String {
    let letters = title.to_lowercase().replace(|letter: char| !letter.is_ascii_alphanumeric(), "-");
    let words: Vec<&str> = letters.split('-').filter(|word| !word.is_empty()).collect();
    words.join("-")
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use crate::record::{Found, Sink};

    fn measurement(limiter: Limiter, percent: f64) -> Measurement {
        let mut found = Found::default();
        found.put("percent", percent);
        found.put("reply_p99_ms", percent / 100.0);
        found.put_series("reply_percentiles_ms", (0..=100).map(|at| f64::from(at) * percent / 1e4 + 0.01));
        let parameters = [("direction", "out".into()), ("limit", 100_000_000.into()), ("flows", 4.into())];
        Measurement {
            kernel: "6.18".into(),
            workload: "replies".into(),
            parameters: parameters.map(|(name, value): (&str, Value)| (name.to_owned(), value)).into(),
            limiter,
            round: 0,
            stolen: 0.0,
            seconds: 90.0,
            outcome: Outcome::Found(found),
        }
    }

    fn draw_all(measurements: Vec<Measurement>) -> (bool, String, String) {
        let directory = tempfile::tempdir().unwrap();
        let mut sink = Sink::open(directory.path()).unwrap();
        let apps = [("wrk".to_owned(), "4.1.0-3".to_owned())].into();
        let machine = Machine { kernel: "6.18".into(), iproute2: "iproute2-6".into(), apps, ..Machine::default() };
        sink.put(&record::Line::Machine(Box::new(machine))).unwrap();
        for measurement in measurements {
            sink.put(&record::Line::Measurement(measurement)).unwrap();
        }
        let passed = draw(directory.path()).unwrap();
        let read = |name: &str| fs::read_to_string(directory.path().join(name)).unwrap_or_default();
        (passed, read(REPORT), read("replies-beside-bulk-tcp-out-4-flows-100-mbit-s-linux-6-18.svg"))
    }

    #[test]
    fn the_report_says_where_podshaper_is_not_the_first() {
        let (passed, report, plot) =
            draw_all(vec![measurement(Limiter::Podshaper, 99.0), measurement(Limiter::Cake, 98.0)]);
        assert!(passed);
        assert!(report.contains("not the first in 1 of the 2 comparisons"), "{report}");
        assert!(report.contains("The measurements took 3.0 minutes."), "{report}");
        assert!(report.contains("2 measurements in 3.0 minutes; the host"), "{report}");
        assert!(report.contains("iproute2-6; wrk 4.1.0-3; congestion controls"), "{report}");
        assert!(
            report.contains("- reply p99: out, 4 flows, 100 Mbit/s 2nd of 2 (0.99 ms; cake 0.98 ms, one round)"),
            "{report}"
        );
        assert!(plot.contains("cake") && plot.contains("part of the replies"), "{plot}");
        let (_, report, _) = draw_all(vec![measurement(Limiter::Podshaper, 99.0), measurement(Limiter::Cake, 50.0)]);
        assert!(report.contains("cake 0.50 ms at 50.0 % of the limit, one round)"), "{report}");
    }

    #[test]
    fn what_has_failed_is_seen_and_is_a_failure_of_the_report_if_it_is_podshapers() {
        for (failing, other) in [(Limiter::Podshaper, Limiter::Cake), (Limiter::Cake, Limiter::Podshaper)] {
            let mut failed = measurement(failing, 1.0);
            failed.outcome = Outcome::Failed("no such thing".into());
            let (passed, report, _) = draw_all(vec![measurement(other, 99.0), failed]);
            assert_eq!(passed, failing != Limiter::Podshaper, "{failing:?}");
            assert!(report.contains("failed: 1**") && report.contains(" failed |"), "{report}");
        }
    }

    #[test]
    fn names_of_files_have_no_spaces() {
        assert_eq!(slug("How it begins, in, 0.1 % (Linux 6.1)"), "how-it-begins-in-0-1-linux-6-1");
    }
}
