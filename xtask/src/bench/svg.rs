//! Bar charts, readable in light and dark: no picture needs more than this.

use std::fmt::Write;

/// A bar in each of two panels.
#[derive(Debug)]
pub(crate) struct Bar {
    pub(crate) label: String,
    pub(crate) kind: Kind,
    pub(crate) values: [f64; 2],
}

/// Whose it is, which gives its colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Ours,
    Rival,
    Floor,
}

/// Bars under a heading.
pub(crate) type Group = (String, Vec<Bar>);

const WIDTH: f64 = 880.0;
const ROW: f64 = 19.0;
/// Where the panels begin, and how long the longest bar is: its number stands to the right of it.
const PANELS: [f64; 2] = [180.0, 550.0];
const LONGEST: f64 = 270.0;

const STYLE: &str = "text{font:12px system-ui,sans-serif;fill:#1f2328}.b{fill:#fff}.h{font-weight:600}.t{font-size:15px}\
.l{text-anchor:end}.o{fill:#1f6feb}.r{fill:#afb8c1}.f{fill:#dcdfe3}\
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.b{fill:#0d1117}.o{fill:#58a6ff}.r{fill:#6e7681}.f{fill:#3d444d}}";

/// Draws groups of bars, two panels side by side. `heads`: what each panel shows.
pub(crate) fn bars(title: &str, heads: [&str; 2], groups: &[Group]) -> String {
    let max = [0, 1].map(|panel| {
        let values = groups.iter().flat_map(|(_, bars)| bars).map(|bar| bar.values[panel]);
        values.fold(f64::MIN_POSITIVE, f64::max)
    });
    let (mut body, mut y) = (String::new(), 60.0);
    for (name, bars) in groups {
        y += ROW;
        let _ = writeln!(body, "<text class='h l' x='{}' y='{y}'>{}</text>", PANELS[0] - 8.0, escape(name));
        for bar in bars {
            y += ROW;
            let _ = writeln!(body, "<text class='l' x='{}' y='{y}'>{}</text>", PANELS[0] - 8.0, escape(&bar.label));
            let class = match bar.kind {
                Kind::Ours => "o",
                Kind::Rival => "r",
                Kind::Floor => "f",
            };
            for panel in [0, 1] {
                let (x, value) = (PANELS[panel], bar.values[panel]);
                let width = (value / max[panel] * LONGEST).max(1.0);
                let (top, height, end) = (y - 11.0, ROW - 5.0, x + width + 5.0);
                let _ = writeln!(
                    body,
                    "<rect class='{class}' x='{x}' y='{top}' width='{width:.1}' height='{height}' rx='2'/>\
                     <text x='{end:.1}' y='{y}'>{}</text>",
                    number(value)
                );
            }
        }
    }
    let height = y + ROW;
    let mut out = format!(
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {height}' width='{WIDTH}' height='{height}'>\n\
         <style>{STYLE}</style>\n<rect class='b' width='100%' height='100%'/>\n\
         <text class='h t' x='16' y='28'>{}</text>\n",
        escape(title)
    );
    for (x, head) in PANELS.iter().zip(heads) {
        let _ = writeln!(out, "<text class='h' x='{x}' y='54'>{}</text>", escape(head));
    }
    out + &body + "</svg>\n"
}

/// A number with three digits that matter, and a blank between thousands.
pub(crate) fn number(value: f64) -> String {
    match value {
        v if v >= 99.95 => {
            let digits = format!("{v:.0}");
            let first = (digits.len() - 1) % 3 + 1;
            let (mut out, rest) = (digits[..first].to_owned(), &digits[first..]);
            for thousands in rest.as_bytes().chunks(3) {
                // A narrow blank, which no line breaks at.
                out.push('\u{202f}');
                out.extend(thousands.iter().map(|&digit| char::from(digit)));
            }
            out
        }
        v if v >= 9.995 => format!("{v:.1}"),
        v => format!("{v:.2}"),
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Every element that begins ends, in order, and every attribute is quoted.
    pub(crate) fn assert_well_formed(text: &str) {
        let mut open = Vec::new();
        for tag in text.split('<').skip(1) {
            let (tag, _) = tag.split_once('>').unwrap_or_else(|| panic!("a tag does not end: {tag}"));
            assert!(tag.matches('\'').count() % 2 == 0, "a quote does not end: {tag}");
            let name = tag.split([' ', '/']).find(|name| !name.is_empty()).unwrap_or_default();
            match tag {
                _ if tag.starts_with('/') => assert_eq!(open.pop(), Some(name), "{text}"),
                _ if tag.ends_with('/') => {}
                _ => open.push(name),
            }
        }
        assert!(open.is_empty() && text.starts_with("<svg "), "{open:?} do not end: {text}");
    }

    #[test]
    fn a_picture_is_well_formed() {
        let bar = |kind, value| Bar { label: "a < b & c".into(), kind, values: [value, 0.0] };
        let bars_of = |value| vec![bar(Kind::Ours, value), bar(Kind::Rival, 1.0), bar(Kind::Floor, 0.0)];
        let picture = bars("title", ["left", "right"], &[("one".into(), bars_of(2.0)), ("two".into(), bars_of(0.0))]);
        assert_well_formed(&picture);
        assert_eq!(picture.matches("a &lt; b &amp; c").count(), 6);
        assert_well_formed(&bars("nothing", ["", ""], &[]));
    }

    #[test]
    fn numbers_have_the_digits_that_matter() {
        for (value, text) in [
            (0.0, "0.00"),
            (0.123, "0.12"),
            (9.994, "9.99"),
            (9.996, "10.0"),
            (99.94, "99.9"),
            (99.96, "100"),
            (1234.4, "1\u{202f}234"),
            (123456.0, "123\u{202f}456"),
            (1234567.0, "1\u{202f}234\u{202f}567"),
        ] {
            assert_eq!(number(value), text);
        }
    }
}
