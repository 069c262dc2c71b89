//! From the texts of `--help` to the Markdown of the manual.

/// Longest line, as in the other documents.
const WIDTH: usize = 140;

/// A help text as a paragraph: commands and options strong, `values` emphasised, defaults as sentences.
pub(crate) fn paragraph(help: &str, values: &[String]) -> String {
    let help = sentence(&help.split_whitespace().collect::<Vec<_>>().join(" "));
    let names_commands = help.contains("\"nbdblk");
    let mark_all = |text: &str| text.split(' ').map(|word| marked(word, values)).collect::<Vec<_>>().join(" ");
    let mut out = String::new();
    for (n, part) in help.split('"').enumerate() {
        let is_quoted = n % 2 == 1;
        let is_command = part.starts_with("nbdblk")
            || (names_commands && part.len() > 1 && part.bytes().all(|byte| byte.is_ascii_lowercase()));
        out += &match is_quoted {
            true if is_command => format!("**{part}**"),
            true => format!("\"{}\"", mark_all(part)),
            false => mark_all(part),
        };
    }
    out
}

/// Turns `text [default: x]` into two sentences.
fn sentence(help: &str) -> String {
    let help = help.trim();
    let (text, default) =
        match help.rsplit_once('[').filter(|(_, rest)| rest.starts_with("default") && rest.ends_with(']')) {
            Some((text, default)) => (text.trim_end(), default.trim_end_matches(']')),
            None => (help, ""),
        };
    [text, &capitalised(default)]
        .iter()
        .filter(|part| !part.is_empty())
        .map(|part| ended(part))
        .collect::<Vec<_>>()
        .join(" ")
}

/// The text with a full stop.
pub(crate) fn ended(text: &str) -> String {
    if text.ends_with(['.', ':', '!', '?']) { text.into() } else { format!("{text}.") }
}

/// The text with a capital at its start.
pub(crate) fn capitalised(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map(|first| first.to_uppercase().chain(chars).collect()).unwrap_or_default()
}

/// One word: strong if it is an option, emphasised if it is a value.
fn marked(word: &str, values: &[String]) -> String {
    let is_edge = |c: char| "\"(),.;:".contains(c);
    let core = word.trim_matches(is_edge);
    let Some(at) = word.find(core).filter(|_| !core.is_empty()) else { return escaped(word) };
    let (before, after) = (&word[..at], &word[at + core.len()..]);
    let is_option =
        core.strip_prefix('-').is_some_and(|rest| rest.starts_with(|c: char| c == '-' || c.is_alphabetic()));
    let core = match core {
        core if is_option => format!("**{core}**"),
        core if values.iter().any(|value| value == core) => format!("*{core}*"),
        core => escaped(core),
    };
    format!("{before}{core}{after}")
}

/// Text without special characters of Markdown.
fn escaped(text: &str) -> String {
    let special = |c: char| "*<\\".contains(c);
    text.chars().flat_map(|c| special(c).then_some('\\').into_iter().chain([c])).collect()
}

/// Breaks a paragraph into lines, which begin with `indent` spaces.
pub(crate) fn wrapped(text: &str, indent: usize) -> String {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let last = lines.last_mut().expect("there is a line");
        if !last.is_empty() && indent + last.chars().count() + 1 + word.chars().count() > WIDTH {
            lines.push(word.to_owned());
        } else {
            *last = format!("{last} {word}").trim_start().to_owned();
        }
    }
    lines.iter().map(|line| format!("{}{line}", " ".repeat(indent))).collect::<Vec<_>>().join("\n")
}

/// A term and its description, of one or more paragraphs.
pub(crate) fn entry(tag: &str, paragraphs: &[String]) -> String {
    let body: Vec<String> = paragraphs.iter().map(|text| wrapped(text, 2)).collect();
    format!("- {tag}\n\n{}\n", body.join("\n\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn help_becomes_markdown() {
        let check = |help: &str, expected: &str| assert_eq!(paragraph(help, &["PATH".into()]), expected);
        check("Listen at PATH", "Listen at *PATH*.");
        check("Number [default: 10, without -U]", "Number. Default: 10, without **-U**.");
        check("See \"nbdblk a --b\", or \"reload\".", "See **nbdblk a --b**, or **reload**.");
        check("\"-\": PATH", "\"-\": *PATH*.");
        check("[default: ~/.pki]", "Default: ~/.pki.");
    }
}
