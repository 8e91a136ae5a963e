//! Medians of rounds, and the comparisons in which podshaper is not the first.

use std::collections::BTreeMap;

use crate::harness::limiter::Limiter;
use crate::record::{Measurement, Outcome, Parameters};

/// The results of all rounds of one limiter with one workload.
#[derive(Clone, Debug)]
pub struct Row {
    pub parameters: Parameters,
    pub limiter: Limiter,
    pub values: BTreeMap<String, Spread>,
    /// Medians of each point.
    pub series: BTreeMap<String, Vec<f64>>,
    /// Errors of failed rounds.
    pub failures: Vec<String>,
}

/// A number over several rounds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    pub median: f64,
    pub least: f64,
    pub most: f64,
    pub rounds: usize,
}

impl Spread {
    fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let (least, most) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 };
        Some(Self { median, least, most, rounds: values.len() })
    }
}

/// Rows in the order in which their workloads were first measured; within a workload, in the order of the limiters.
pub fn rows<'a>(measurements: impl Iterator<Item = &'a Measurement>) -> Vec<Row> {
    let mut groups: Vec<(&Parameters, Limiter, Vec<&Outcome>)> = vec![];
    for measurement in measurements {
        let Measurement { parameters, limiter, outcome, .. } = measurement;
        match groups.iter_mut().find(|(known, of, _)| *known == parameters && of == limiter) {
            Some((_, _, outcomes)) => outcomes.push(outcome),
            None => groups.push((parameters, *limiter, vec![outcome])),
        }
    }
    let mut order: Vec<&Parameters> = vec![];
    for (parameters, ..) in &groups {
        if !order.contains(parameters) {
            order.push(parameters);
        }
    }
    let place = |parameters: &Parameters| order.iter().position(|known| *known == parameters);
    groups.sort_by_key(|(parameters, limiter, _)| (place(parameters), *limiter));
    groups.into_iter().map(|(parameters, limiter, outcomes)| row(parameters.clone(), limiter, &outcomes)).collect()
}

fn row(parameters: Parameters, limiter: Limiter, outcomes: &[&Outcome]) -> Row {
    let (mut values, mut series) = (BTreeMap::<_, Vec<f64>>::new(), BTreeMap::<_, Vec<&Vec<f64>>>::new());
    let mut failures = vec![];
    for outcome in outcomes {
        match outcome {
            Outcome::Failed(why) => failures.push(why.clone()),
            Outcome::Found(found) => {
                found.metrics.iter().for_each(|(name, value)| values.entry(name.clone()).or_default().push(*value));
                found.series.iter().for_each(|(name, points)| series.entry(name.clone()).or_default().push(points));
            }
        }
    }
    let values = values.into_iter().filter_map(|(name, values)| Some((name, Spread::of(values)?))).collect();
    let series = series.into_iter().map(|(name, rounds)| (name, medians(&rounds))).collect();
    Row { parameters, limiter, values, series, failures }
}

fn medians(rounds: &[&Vec<f64>]) -> Vec<f64> {
    let points = rounds.iter().map(|points| points.len()).min().unwrap_or(0);
    let of_point = |point: usize| Spread::of(rounds.iter().map(|points| points[point]).collect());
    (0..points).filter_map(of_point).map(|spread| spread.median).collect()
}

/// Which values are better.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Better {
    Less,
    More,
    /// Values close to this one.
    Near(f64),
}

/// podshaper's place among the limiters, if it is not the first.
#[derive(Debug, PartialEq)]
pub struct Verdict {
    pub rank: usize,
    pub of: usize,
    pub own: f64,
    pub best: Limiter,
    pub best_value: f64,
    /// Whether the rounds of the two overlap, so that the result may be chance.
    pub may_be_chance: bool,
    /// Whether one of the two was measured only once, so that chance cannot be judged.
    pub has_one_round: bool,
}

/// The numbers of the rows with a limiter.
fn of_limiters(rows: &[&Row], metric: &str) -> Vec<(Limiter, Spread)> {
    let limits = |row: &&&Row| !matches!(row.limiter, Limiter::Bare | Limiter::Senders);
    rows.iter().filter(limits).filter_map(|row| Some((row.limiter, *row.values.get(metric)?))).collect()
}

/// Whether podshaper and another limiter were measured.
pub fn are_compared(rows: &[&Row], metric: &str) -> bool {
    let values = of_limiters(rows, metric);
    values.len() > 1 && values.iter().any(|(limiter, _)| *limiter == Limiter::Podshaper)
}

/// Compares the limiters by their values as they are written. None if podshaper is the first or was not measured.
pub fn judge(rows: &[&Row], metric: &str, better: Better, digits: i32) -> Option<Verdict> {
    let factor = 10f64.powi(digits);
    let distance = |value: f64| match better {
        Better::Less => (value * factor).round(),
        Better::More => -(value * factor).round(),
        Better::Near(wanted) => ((value - wanted).abs() * factor).round(),
    };
    let values = of_limiters(rows, metric);
    let (_, own) = values.iter().find(|(limiter, _)| *limiter == Limiter::Podshaper)?;
    let rank = 1 + values.iter().filter(|(_, value)| distance(value.median) < distance(own.median)).count();
    if rank == 1 {
        return None;
    }
    let (best, value) =
        values.iter().min_by(|one, other| distance(one.1.median).total_cmp(&distance(other.1.median)))?;
    let several_rounds = own.least < own.most || value.least < value.most;
    let may_be_chance = several_rounds && own.least <= value.most && value.least <= own.most;
    let has_one_round = own.rounds.min(value.rounds) == 1;
    let (best, best_value) = (*best, value.median);
    Some(Verdict { rank, of: values.len(), own: own.median, best, best_value, may_be_chance, has_one_round })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use crate::record::Found;

    fn measurement(limiter: Limiter, value: f64) -> Measurement {
        let mut found = Found::default();
        found.put("time", value);
        found.put_series("points", [value, 2.0 * value]);
        Measurement {
            kernel: String::new(),
            workload: String::new(),
            parameters: Parameters::new(),
            limiter,
            round: 0,
            stolen: 0.0,
            seconds: 90.0,
            outcome: Outcome::Found(found),
        }
    }

    fn rows_of(values: &[(Limiter, f64)]) -> Vec<Row> {
        let measurements: Vec<_> = values.iter().map(|(limiter, value)| measurement(*limiter, *value)).collect();
        rows(measurements.iter())
    }

    #[test]
    fn rounds_have_their_median() {
        let rows = rows_of(&[3.0, 1.0, 2.0].map(|value| (Limiter::Cake, value)));
        assert_eq!(rows[0].values["time"], Spread { median: 2.0, least: 1.0, most: 3.0, rounds: 3 });
        assert_eq!(rows[0].series["points"], [2.0, 4.0]);
        let rows = rows_of(&[3.0, 1.0].map(|value| (Limiter::Cake, value)));
        assert_eq!(rows[0].values["time"].median, 2.0);
    }

    #[test]
    fn who_limits_nothing_is_not_compared() {
        let rows =
            rows_of(&[(Limiter::Bare, 0.1), (Limiter::Senders, 0.1), (Limiter::Podshaper, 1.0), (Limiter::Cake, 2.0)]);
        assert_eq!(judge(&rows.iter().collect::<Vec<_>>(), "time", Better::Less, 1), None);
    }

    #[test]
    fn alone_podshaper_is_not_the_first() {
        use Limiter::{Bare, Cake, Edt, Podshaper};
        for (limiters, compared) in [(&[Podshaper, Bare][..], false), (&[Cake, Edt], false), (&[Podshaper, Cake], true)]
        {
            let rows = rows_of(&limiters.iter().map(|limiter| (*limiter, 1.0)).collect::<Vec<_>>());
            assert_eq!(are_compared(&rows.iter().collect::<Vec<_>>(), "time"), compared, "{limiters:?}");
        }
    }

    #[test]
    fn who_is_better_is_named() {
        let rows = rows_of(&[(Limiter::Podshaper, 2.0), (Limiter::Cake, 1.0), (Limiter::Edt, 3.0)]);
        let rows: Vec<_> = rows.iter().collect();
        let verdict = judge(&rows, "time", Better::Less, 1).unwrap();
        assert_eq!((verdict.rank, verdict.of, verdict.best, verdict.may_be_chance), (2, 3, Limiter::Cake, false));
        assert!(verdict.has_one_round);
        assert_eq!(judge(&rows, "time", Better::More, 1).unwrap().best, Limiter::Edt);
        assert_eq!(judge(&rows, "time", Better::Near(2.1), 1), None);
        assert_eq!(judge(&rows, "another", Better::Less, 1), None);
    }

    #[test]
    fn rounds_that_overlap_may_be_chance() {
        use Limiter::{Cake, Podshaper};
        let rows = rows_of(&[(Podshaper, 2.0), (Podshaper, 4.0), (Cake, 1.0), (Cake, 3.0)]);
        let verdict = judge(&rows.iter().collect::<Vec<_>>(), "time", Better::Less, 1).unwrap();
        assert!(verdict.may_be_chance && !verdict.has_one_round);
    }
}
