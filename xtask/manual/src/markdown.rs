//! The Markdown of the manual pages: headings, paragraphs, code and lists, as a tree of blocks.

/// A part of a page.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Block {
    Heading {
        level: usize,
        text: String,
    },
    Paragraph(String),
    /// Lines to show as they are.
    Code(Vec<String>),
    /// An item of a list. With a tag, it is a term and its description.
    Item {
        tag: Option<String>,
        body: Vec<Self>,
    },
}

/// Parses a page, or the content of an item.
pub(crate) fn parse(text: &str) -> Vec<Block> {
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim_start().starts_with("<!--")).collect();
    blocks(&lines)
}

fn blocks(lines: &[&str]) -> Vec<Block> {
    let mut found = Vec::new();
    let mut rest = lines;
    while let Some((first, others)) = rest.split_first() {
        if first.trim().is_empty() {
            rest = others;
            continue;
        }
        let (block, len) = if let Some(text) = first.strip_prefix('#') {
            let text = text.trim_start_matches('#');
            (Block::Heading { level: first.len() - text.len(), text: text.trim().into() }, 1)
        } else if first.starts_with("```") {
            code(rest)
        } else if first.starts_with("- ") {
            item(rest)
        } else {
            paragraph(rest)
        };
        found.push(block);
        rest = &rest[len..];
    }
    found
}

/// Code between fences: the block, and its number of lines.
fn code(lines: &[&str]) -> (Block, usize) {
    let body: Vec<String> = lines[1..].iter().take_while(|line| **line != "```").map(|line| (*line).into()).collect();
    let len = body.len() + 2;
    (Block::Code(body), len.min(lines.len()))
}

/// An item extends over all lines that are indented, and over empty lines between them.
fn item(lines: &[&str]) -> (Block, usize) {
    let belongs = |line: &&str| line.is_empty() || line.starts_with("  ");
    let len = 1 + lines[1..].iter().take_while(|line| belongs(line)).count();
    let content: Vec<&str> = lines[..len].iter().map(|line| line.get(2..).unwrap_or_default()).collect();
    let mut body = blocks(&content);
    let is_tagged = body.len() > 1 && matches!(body[1], Block::Paragraph(_) | Block::Code(_));
    let tag = match body.first() {
        Some(Block::Paragraph(text)) if is_tagged => Some(text.clone()),
        _ => None,
    };
    if tag.is_some() {
        body.remove(0);
    }
    (Block::Item { tag, body }, len)
}

fn paragraph(lines: &[&str]) -> (Block, usize) {
    let is_text = |line: &&str| !line.trim().is_empty() && !line.starts_with("- ") && !line.starts_with("```");
    let text: Vec<&str> = lines.iter().take_while(|line| is_text(line)).map(|line| line.trim_end()).collect();
    (Block::Paragraph(text.join("\n")), text.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_a_tree_of_blocks() {
        let text =
            "## A\n\ntwo\nlines\n\n```sh\n- code\n\n#x\n```\n\n- one\n- **tag**\n\n  text\n\n  - inner\n\n## B\n";
        let paragraph = |text: &str| Block::Paragraph(text.into());
        let inner = Block::Item { tag: None, body: vec![paragraph("inner")] };
        let expected = vec![
            Block::Heading { level: 2, text: "A".into() },
            paragraph("two\nlines"),
            Block::Code(["- code", "", "#x"].map(String::from).into()),
            Block::Item { tag: None, body: vec![paragraph("one")] },
            Block::Item { tag: Some("**tag**".into()), body: vec![paragraph("text"), inner] },
            Block::Heading { level: 2, text: "B".into() },
        ];
        assert_eq!(parse(text), expected);
    }
}
