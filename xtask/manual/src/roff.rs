//! Turns the blocks of a page into the language of man(7).

use std::fmt::Write as _;

use crate::markdown::Block;

/// Longest line of the source: mandoc reports longer ones than 80.
const WIDTH: usize = 78;

/// Renders blocks that are not in a list.
pub(crate) fn render(blocks: &[Block]) -> String {
    let mut out = String::new();
    let mut section = "";
    for (n, block) in blocks.iter().enumerate() {
        let follows_heading = n > 0 && matches!(blocks[n - 1], Block::Heading { .. });
        match block {
            // The title of the page is in its first macro.
            Block::Heading { level: 1, .. } => {}
            Block::Heading { level, text } => {
                section = text;
                let macro_name = if *level == 2 { "SH" } else { "SS" };
                writeln!(out, ".{macro_name} {}", inline(text)).expect("a string takes everything");
            }
            Block::Paragraph(text) => {
                if !follows_heading {
                    out.push_str(".PP\n");
                }
                let dash = if section == "NAME" { text.replacen(" - ", " \u{0} ", 1) } else { text.clone() };
                out.push_str(&paragraph(&dash).replace('\0', r"\-"));
            }
            Block::Code(lines) => out.push_str(&code(lines, if follows_heading { "" } else { ".PP\n" })),
            Block::Item { tag, body } => out.push_str(&item(tag.as_deref(), body)),
        }
    }
    out
}

/// An item of a list, with all that it contains.
fn item(tag: Option<&str>, body: &[Block]) -> String {
    let mut out = match tag {
        Some(tag) => format!(".TP\n{}", paragraph(tag)),
        None => ".IP \\(bu 3\n".to_owned(),
    };
    for (n, block) in body.iter().enumerate() {
        match block {
            Block::Paragraph(text) => {
                if n > 0 {
                    out.push_str(".IP\n");
                }
                out.push_str(&paragraph(text));
            }
            Block::Code(lines) => out.push_str(&code(lines, ".IP\n")),
            Block::Item { tag, body } => {
                writeln!(out, ".RS\n{}.RE", item(tag.as_deref(), body)).expect("a string takes everything");
            }
            Block::Heading { .. } => {}
        }
    }
    out
}

/// Lines as they are, indented; `start` begins the paragraph.
fn code(lines: &[String], start: &str) -> String {
    let lines: String = lines.iter().map(|line| format!("{}\n", protected(&continued(&literal(line))))).collect();
    format!("{start}.in +4n\n.EX\n{lines}.EE\n.in\n")
}

/// Breaks a long line of the source after a comma. The reader sees one line.
fn continued(line: &str) -> String {
    let end = line.char_indices().nth(WIDTH).map_or(line.len(), |(at, _)| at);
    match line[..end].rfind(',') {
        Some(at) if end < line.len() => format!("{}\\\n{}", &line[..=at], continued(&line[at + 1..])),
        _ => line.to_owned(),
    }
}

/// A paragraph, with a line break after each sentence, as man-pages(7) has it.
fn paragraph(text: &str) -> String {
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let lines: Vec<String> = sentences(&text).into_iter().flat_map(|line| wrapped(&inline(line))).collect();
    lines.iter().map(|line| format!("{}\n", protected(line))).collect()
}

/// Breaks a line at spaces.
fn wrapped(line: &str) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in line.split(' ') {
        let last = lines.last_mut().expect("there is a line");
        if !last.is_empty() && last.len() + 1 + word.len() > WIDTH {
            lines.push(word.into());
        } else {
            *last = format!("{last} {word}").trim_start().into();
        }
    }
    lines
}

/// Splits a line after each sentence.
fn sentences(line: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let mut rest = line;
    let mut from = 0;
    while let Some(at) = rest[from..].find(['.', '!', '?']).map(|at| from + at + 1) {
        let is_end =
            rest[at..].strip_prefix(' ').is_some_and(|next| next.starts_with(|c: char| c.is_uppercase() || c == '*'));
        if is_end {
            found.push(&rest[..at]);
            rest = &rest[at + 1..];
            from = 0;
        } else {
            from = at;
        }
    }
    found.push(rest);
    found
}

/// A line that begins with a dot or an apostrophe is not a macro.
fn protected(line: &str) -> String {
    if line.starts_with(['.', '\'']) { format!("\\&{line}") } else { line.to_owned() }
}

/// Text with `**strong**`, `*emphasis*`, code and links.
fn inline(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let spans: [(&str, &str); 3] = [("**", "\\fB"), ("*", "\\fI"), ("`", "\\fB")];
        let span = spans.iter().find_map(|(mark, font)| {
            let inner = rest.strip_prefix(mark)?;
            let end = inner.find(mark)?;
            Some((*font, &inner[..end], &inner[end + mark.len()..]))
        });
        if let Some((font, inner, after)) = span {
            write!(out, "{font}{}\\fP", literal(&unescaped(inner))).expect("a string takes everything");
            rest = after;
        } else if let Some((label, after)) = link(rest) {
            out.push_str(&reference(label));
            rest = after;
        } else {
            // A backslash takes the meaning from the next character.
            let (plain, len) = match (c, rest[c.len_utf8()..].chars().next()) {
                ('\\', Some(next)) => (next, 1 + next.len_utf8()),
                _ => (c, c.len_utf8()),
            };
            out.push_str(&escaped(plain));
            rest = &rest[len..];
            // An ellipsis does not end a sentence.
            if out.ends_with("...") && !rest.starts_with('.') {
                out.push_str("\\&");
            }
        }
    }
    out
}

/// Code has no backslashes to remove, but strong text may: `**a\*b**`.
fn unescaped(text: &str) -> String {
    text.replace("\\*", "*").replace("\\_", "_").replace("\\[", "[").replace("\\]", "]")
}

/// A link at the start of the text: its label, and what follows.
fn link(text: &str) -> Option<(&str, &str)> {
    let (label, rest) = text.strip_prefix('[')?.split_once("](")?;
    let (_, after) = rest.split_once(')')?;
    // A file name may end with a section in parentheses, the target never does.
    (!label.contains(['[', '\n'])).then_some((label, after))
}

/// A reference to another page: `name(1)`.
fn reference(label: &str) -> String {
    match label.split_once('(') {
        Some((name, section)) => format!("\\fB{}\\fP({section}", literal(name)),
        None => literal(label),
    }
}

/// Text that readers copy: each dash is the one of ASCII.
fn literal(text: &str) -> String {
    text.chars().map(|c| if c == '-' { "\\-".to_owned() } else { escaped(c) }).collect()
}

fn escaped(c: char) -> String {
    match c {
        '\\' => "\\e".into(),
        '\'' => "\\(aq".into(),
        '`' => "\\(ga".into(),
        '^' => "\\(ha".into(),
        '~' => "\\(ti".into(),
        '"' => "\\(dq".into(),
        c => c.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::markdown::parse;

    #[test]
    fn text_becomes_roff() {
        let check = |text: &str, expected: &str| assert_eq!(render(&parse(text)), expected, "{text}");
        check("## NAME\n\na-b - c-d\n", ".SH NAME\na-b \\- c-d\n");
        check("One. Two **--x** *Y*.\n", ".PP\nOne.\nTwo \\fB\\-\\-x\\fP \\fIY\\fP.\n");
        check("[nbdblk(1)](nbdblk.1.md), `a\\b`\n", ".PP\n\\fBnbdblk\\fP(1), \\fBa\\eb\\fP\n");
        check("- **-x**\n\n  Text.\n", ".TP\n\\fB\\-x\\fP\nText.\n");
        check("- text\n", ".IP \\(bu 3\ntext\n");
        check("```sh\n.a 'b'\n```\n", ".PP\n.in +4n\n.EX\n\\&.a \\(aqb\\(aq\n.EE\n.in\n");
        check(".x\n", ".PP\n\\&.x\n");
    }
}
