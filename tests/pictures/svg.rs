//! Text of a terminal as SVG. Only the escape sequences for bold, dim and reversed text are known, since podshaper
//! uses no others.

use std::fmt::Write;

const CHAR_WIDTH: f64 = 7.83;
const LINE_HEIGHT: f64 = 18.0;
const MARGIN: f64 = 14.0;
const TITLE_HEIGHT: f64 = 28.0;
const FONT: &str = "ui-monospace,SFMono-Regular,Menlo,Consolas,DejaVu Sans Mono,monospace";

#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Style {
    bold: bool,
    dim: bool,
    reversed: bool,
}

/// A window with a title and a terminal's lines.
pub fn terminal(title: &str, text: &str) -> String {
    let lines: Vec<Vec<(Style, String)>> = parse(text);
    let columns = lines.iter().map(|line| line.iter().map(|(_, run)| run.chars().count()).sum()).max().unwrap_or(0);
    let width = columns.max(40) as f64 * CHAR_WIDTH + 2.0 * MARGIN;
    let height = lines.len() as f64 * LINE_HEIGHT + 2.0 * MARGIN + TITLE_HEIGHT;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {height:.0}\" width=\"{width:.0}\" height=\"{height:.0}\" \
         font-family=\"{FONT}\" font-size=\"13\">\n<title>{0}</title>\n\
         <rect width=\"100%\" height=\"100%\" rx=\"8\" fill=\"#15191f\"/>\n\
         <text x=\"{MARGIN}\" y=\"20\" fill=\"#8a94a3\">$ {0}</text>\n",
        escape(title)
    );
    for (number, line) in lines.iter().enumerate() {
        let y = TITLE_HEIGHT + MARGIN + number as f64 * LINE_HEIGHT;
        let mut column = 0;
        for (style, run) in line {
            column += draw(&mut svg, *style, run, column, y);
        }
    }
    svg + "</svg>\n"
}

/// Draws a run of text in one style and returns its number of columns. textLength keeps the columns in place with any
/// font.
fn draw(svg: &mut String, style: Style, run: &str, column: usize, y: f64) -> usize {
    let count = run.chars().count();
    let start = run.chars().take_while(|c| *c == ' ').count();
    let shown = if style.reversed { run } else { run.trim() };
    let start = if style.reversed { 0 } else { start };
    if !shown.is_empty() {
        let x = MARGIN + (column + start) as f64 * CHAR_WIDTH;
        let length = shown.chars().count() as f64 * CHAR_WIDTH;
        if style.reversed {
            let _ = writeln!(
                svg,
                "<rect x=\"{x:.1}\" y=\"{:.1}\" width=\"{length:.1}\" height=\"{LINE_HEIGHT}\" fill=\"#d5dbe3\"/>",
                y - 13.0
            );
        }
        let fill = match (style.reversed, style.dim) {
            (true, _) => "#15191f",
            (_, true) => "#8a94a3",
            _ => "#d5dbe3",
        };
        let weight = if style.bold { " font-weight=\"bold\"" } else { "" };
        let _ = writeln!(
            svg,
            "<text x=\"{x:.1}\" y=\"{y:.1}\" textLength=\"{length:.1}\" lengthAdjust=\"spacingAndGlyphs\" fill=\"{fill}\"{weight} \
             xml:space=\"preserve\">{}</text>",
            escape(shown)
        );
    }
    count
}

/// Splits each line into runs of one style. A run also ends before several blanks, so that no font can move a column.
fn parse(text: &str) -> Vec<Vec<(Style, String)>> {
    let mut style = Style::default();
    let mut lines = Vec::new();
    for line in text.trim_end().lines() {
        let mut runs: Vec<(Style, String)> = Vec::new();
        let mut chars = line.chars().peekable();
        let mut blanks = 0;
        while let Some(c) = chars.next() {
            if c == '\u{1b}' {
                let sequence: String = chars.by_ref().take_while(|c| *c != 'm').collect();
                apply(&mut style, sequence.trim_start_matches('['));
                continue;
            }
            let ends = blanks > 1 && c != ' ';
            blanks = if c == ' ' { blanks + 1 } else { 0 };
            match runs.last_mut() {
                Some((last, run)) if *last == style && !ends => run.push(c),
                _ => runs.push((style, c.to_string())),
            }
        }
        lines.push(runs);
    }
    lines
}

fn apply(style: &mut Style, codes: &str) {
    for code in codes.split(';') {
        match code {
            "" | "0" => *style = Style::default(),
            "1" => style.bold = true,
            "2" => style.dim = true,
            "7" => style.reversed = true,
            "22" => (style.bold, style.dim) = (false, false),
            "27" => style.reversed = false,
            _ => {}
        }
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
