//! The terminal screen of `podshaper top`, and its keys.

use std::time::{Duration, Instant};

use crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use ratatui::{
    DefaultTerminal, Frame,
    layout::{Constraint, Layout},
    style::{Modifier, Style},
    text::{Line, Text},
    widgets::{Cell, Row as Line_, Table},
};

use super::{Arguments, Row, Sort, Watch};
use crate::{
    cli::{attachments::Measured, chart, list, table::NOTHING},
    error::{Code, Error, Result},
};

const BAR_WIDTH: usize = 10;
const SPARKLINE_WIDTH: u16 = super::HISTORY as u16;

/// The state of the screen.
struct View {
    watch: Watch,
    sort: Sort,
    first: usize,
    paused: bool,
}

/// Shows the screen until a key or the number of readings ends it. The terminal is restored in every case.
pub fn run(arguments: &Arguments) -> Result<()> {
    let mut terminal = ratatui::try_init().map_err(failed)?;
    let ended = watch(&mut terminal, arguments);
    ratatui::restore();
    ended
}

fn failed(cause: std::io::Error) -> Error {
    Error::because(Code::Io, "use the terminal (--plain prints lines)", cause)
}

fn watch(terminal: &mut DefaultTerminal, arguments: &Arguments) -> Result<()> {
    let mut view = View { watch: Watch::default(), sort: arguments.sort, first: 0, paused: false };
    // The first reading has no earlier one to compare with.
    view.watch.read()?;
    let mut left = arguments.count;
    let mut next = Instant::now() + arguments.interval;
    terminal.draw(|frame| view.draw(frame)).map_err(failed)?;
    loop {
        let now = Instant::now();
        if now >= next {
            if !view.paused {
                view.watch.read()?;
            }
            next = now + arguments.interval;
            terminal.draw(|frame| view.draw(frame)).map_err(failed)?;
            left = left.map(|left| left.saturating_sub(1));
            if left == Some(0) {
                return Ok(());
            }
        }
        if event::poll(next.saturating_duration_since(Instant::now()).max(Duration::from_millis(1))).map_err(failed)? {
            let event = event::read().map_err(failed)?;
            if view.handle(&event) {
                return Ok(());
            }
            terminal.draw(|frame| view.draw(frame)).map_err(failed)?;
        }
    }
}

impl View {
    /// Handles an event. Returns whether it ends the command.
    fn handle(&mut self, event: &Event) -> bool {
        let Event::Key(KeyEvent { code, modifiers, kind: KeyEventKind::Press, .. }) = event else { return false };
        match code {
            KeyCode::Char('q') | KeyCode::Esc => return true,
            KeyCode::Char('c') if modifiers.contains(KeyModifiers::CONTROL) => return true,
            KeyCode::Char('s') => self.sort = self.sort.next(),
            KeyCode::Char('p' | ' ') => self.paused = !self.paused,
            KeyCode::Down | KeyCode::Char('j') => self.first += 1,
            KeyCode::Up | KeyCode::Char('k') => self.first = self.first.saturating_sub(1),
            KeyCode::PageDown => self.first += 20,
            KeyCode::PageUp => self.first = self.first.saturating_sub(20),
            KeyCode::Home => self.first = 0,
            _ => {}
        }
        false
    }

    fn draw(&mut self, frame: &mut Frame<'_>) {
        let [top, middle, bottom] =
            Layout::vertical([Constraint::Length(1), Constraint::Min(0), Constraint::Length(1)]).areas(frame.area());
        let rows = self.watch.rows(self.sort);
        self.first = self.first.min(rows.len().saturating_sub(1));
        let total: f64 = rows.iter().map(Row::bits_per_s).sum();
        let pause = if self.paused { ", paused" } else { "" };
        let title = format!("podshaper: {} limits, {}bit/s through them{pause}", rows.len(), chart::short(total));
        frame.render_widget(Line::from(title), top);
        // Only the visible rows are built.
        let height = usize::from(middle.height);
        let seen = rows.get(self.first..).unwrap_or_default();
        let seen = seen.get(..height).unwrap_or(seen);
        let table = Table::new(seen.iter().map(line), widths(seen)).header(header(self.sort)).column_spacing(1);
        frame.render_widget(table, middle);
        frame.render_widget(Line::from("q ends   s sorts   p pauses   arrows scroll").style(Modifier::DIM), bottom);
    }
}

fn header(sort: Sort) -> Line_<'static> {
    let text = |name, sorts| (Text::from(name), sorts);
    let number = |name, sorts| (Text::from(name).right_aligned(), sorts);
    let columns: [(Text<'static>, Option<Sort>); 13] = [
        text("POD", Some(Sort::Pod)),
        text("INTERFACE", None),
        text("DIRECTION", None),
        number("LIMIT", None),
        text("BY", None),
        number("NOW", Some(Sort::Now)),
        text("USED", Some(Sort::Used)),
        number("P99", Some(Sort::P99)),
        number("DROPS", Some(Sort::Drops)),
        number("MARKS", None),
        number("BYTES", None),
        number("OTHERS", None),
        number("LAST READINGS", None),
    ];
    let cell = |(name, sorts): (Text<'static>, Option<Sort>)| {
        let style = if sorts == Some(sort) { Modifier::BOLD | Modifier::REVERSED } else { Modifier::BOLD };
        Cell::from(name).style(Style::new().add_modifier(style))
    };
    Line_::new(columns.map(cell))
}

fn widths(rows: &[Row<'_>]) -> [Constraint; 13] {
    let longest = |length: &dyn Fn(&Row<'_>) -> usize| rows.iter().map(length).max().unwrap_or_default() as u16;
    let pod = longest(&|row| row.attachment.name().chars().count()).clamp(3, 40);
    let limit = longest(&|row| row.measured.rate.to_string().len()).clamp(6, 16);
    [
        Constraint::Length(pod),
        Constraint::Length(9),
        Constraint::Length(9),
        Constraint::Length(limit),
        Constraint::Length(9),
        Constraint::Length(6),
        Constraint::Length(BAR_WIDTH as u16 + 5),
        Constraint::Length(6),
        Constraint::Length(6),
        Constraint::Length(6),
        Constraint::Length(6),
        Constraint::Length(8),
        Constraint::Max(SPARKLINE_WIDTH),
    ]
}

fn line(row: &Row<'_>) -> Line_<'static> {
    let Measured { rate, burst: _, by, counters, others, passing: _ } = row.measured;
    let number = |text: String| Cell::from(Text::from(text).right_aligned());
    let is_whole = row.attachment.links.faults().is_empty();
    let style = if is_whole { Style::new() } else { Style::new().add_modifier(Modifier::CROSSED_OUT) };
    Line_::new([
        Cell::from(row.attachment.name()),
        Cell::from(row.attachment.place.interface.clone()),
        Cell::from(row.direction.name()),
        number(rate.to_string()),
        Cell::from(by.clone()),
        number(chart::short(row.bits_per_s())),
        Cell::from(format!("{} {:>3.0}%", chart::bar(row.used(), BAR_WIDTH), row.used() * 100.0)),
        number(row.p99_ns().map_or(NOTHING.to_owned(), |ns| format!("<{}", chart::time(ns)))),
        number(chart::short(counters.drops as f64)),
        number(chart::short(counters.marks as f64)),
        number(chart::short(counters.bytes as f64)),
        number(list::other_paths(others)),
        // The newest reading is on the right; a narrow screen cuts off the oldest ones.
        number(chart::sparkline(row.history.into_iter().flatten().copied())),
    ])
    .style(style)
}
