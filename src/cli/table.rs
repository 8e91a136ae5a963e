//! The only table printer: aligned columns under a header, no colour, no lines.

use super::output;
use crate::error::printable;

/// The alignment of a column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Align {
    /// Text.
    Left,
    /// Numbers.
    Right,
}
pub use Align::{Left, Right};

/// The content of a cell without a value.
pub const NOTHING: &str = "-";

const GAP: &str = "  ";
/// The minimum width of a shortened cell.
const NARROWEST: usize = 16;

/// A table that is being built.
pub struct Table {
    header: Vec<(&'static str, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table without rows.
    pub fn new(header: &[(&'static str, Align)]) -> Self {
        Self { header: header.to_vec(), rows: Vec::new() }
    }

    /// Adds a row, with a cell for each column.
    pub fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells.iter().map(|cell| printable(cell)).collect());
    }

    /// The table as text for stdout. If the terminal is too narrow, the cells of the last column are shortened in the
    /// middle.
    pub fn text(&self) -> String {
        self.text_within(output::terminal_width())
    }

    /// The table with no cell shortened.
    pub fn whole_text(&self) -> String {
        self.text_within(None)
    }

    fn text_within(&self, limit: Option<usize>) -> String {
        let mut widths: Vec<usize> = self.header.iter().map(|(name, _)| name.len()).collect();
        for row in &self.rows {
            widths.iter_mut().zip(row).for_each(|(width, cell)| *width = (*width).max(cell.chars().count()));
        }
        if let (Some(limit), Some((last, others))) = (limit, widths.split_last_mut()) {
            let before = others.iter().map(|width| width + GAP.len()).sum();
            *last = (*last).min(limit.saturating_sub(before).max(NARROWEST));
        }
        let header = self.header.iter().map(|(name, _)| (*name).to_owned()).collect();
        let lines = std::iter::once(&header).chain(&self.rows).map(|row| self.line(row, &widths));
        lines.collect()
    }

    fn line(&self, cells: &[String], widths: &[usize]) -> String {
        let cells = cells.iter().zip(widths).zip(&self.header).map(|((cell, &width), (_, align))| {
            let cell = without_middle(cell, width);
            match align {
                Left => format!("{cell:<width$}"),
                Right => format!("{cell:>width$}"),
            }
        });
        cells.collect::<Vec<_>>().join(GAP).trim_end().to_owned() + "\n"
    }
}

/// Shortens a text to `width`. The middle is removed: the beginning and the end of a path say most.
fn without_middle(text: &str, width: usize) -> String {
    let count = text.chars().count();
    if count <= width || width == 0 {
        return text.to_owned();
    }
    let (head, tail) = ((width - 1) / 3, width - 1 - (width - 1) / 3);
    text.chars().take(head).chain(['…']).chain(text.chars().skip(count - tail)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_the_last_one_gives_way() {
        let mut table = Table::new(&[("POD", Left), ("RATE", Right), ("CGROUP", Left)]);
        table.row(vec!["default/web".into(), "10M".into(), "kubepods/burstable/pod1234".into()]);
        table.row(vec!["é".into(), "1500k".into(), NOTHING.into()]);
        assert_eq!(
            table.text_within(None),
            "POD           RATE  CGROUP\n\
             default/web    10M  kubepods/burstable/pod1234\n\
             é            1500k  -\n"
        );
        assert_eq!(table.text_within(Some(40)).lines().nth(1), Some("default/web    10M  kubepo…table/pod1234"));
        assert_eq!(table.text_within(Some(10)).lines().nth(1), Some("default/web    10M  kubep…le/pod1234"));
    }

    #[test]
    fn a_cell_writes_nothing_to_a_terminal_but_itself() {
        let mut table = Table::new(&[("FOUND", Left)]);
        table.row(vec!["a\u{1b}[2J\nb\u{202e}".into()]);
        assert_eq!(table.whole_text(), "FOUND\na\\u{1b}[2J\\nb\\u{202e}\n");
    }
}
