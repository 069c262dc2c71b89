//! The sizes of product code: a function is short enough to be read at once.
//!
//! `cargo test -p nbdblk-tests --test sizes -- --nocapture` prints the largest files and functions.

use std::cmp::Reverse;

use nbdblk_tests::files;

/// Most lines of a function, from `fn` to its closing brace.
const LINES_MAX: usize = 60;

/// Longer functions: file, function, and why it is better in one piece, such as a table of cases.
const ARGUED: &[(&str, &str, &str)] = &[];

/// Words that may stand before `fn`.
const QUALIFIERS: [&str; 6] = ["pub", "const", "async", "unsafe", "extern", "\"C\""];

/// A function of product code.
struct Function {
    file: String,
    name: String,
    lines: usize,
}

/// The product code of the project: each file without its tests. A model of a device is a test, too.
fn product() -> Vec<(String, String)> {
    let is_product = |name: &str| {
        let mut parts = name.split('/');
        match parts.next() {
            Some("crates" | "bins") => parts.nth(1) == Some("src") && !name.ends_with("/model.rs"),
            Some("xtask") => parts.any(|part| part == "src"),
            _ => false,
        }
    };
    let files = files(&[".rs"]).into_iter().filter(|(name, _)| is_product(name));
    files.map(|(name, text)| (name, without_tests(&text).to_owned())).collect()
}

/// A module of tests is the last item of its file.
fn without_tests(text: &str) -> &str {
    text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default()
}

/// Returns name and number of lines of each function with a body. In formatted code, a body ends with the first closing brace
/// at the indentation of its `fn`.
fn functions(text: &str) -> Vec<(String, usize)> {
    let lines: Vec<&str> = text.lines().collect();
    let mut found = Vec::new();
    for (start, line) in lines.iter().enumerate() {
        let Some(name) = function_name(line.trim_start()) else { continue };
        let indent = &line[..line.len() - line.trim_start().len()];
        // The first line at this indentation that ends a body or a declaration.
        let ends = |line: &&str| {
            line.strip_prefix(indent).is_some_and(|rest| !rest.starts_with(' ') && rest.ends_with(['}', ';']))
        };
        let end = lines[start..].iter().position(ends).unwrap_or_else(|| panic!("{name} does not end"));
        if lines[start + end].ends_with('}') {
            found.push((name.to_owned(), end + 1));
        }
    }
    found
}

/// The name of the function that a line begins.
fn function_name(line: &str) -> Option<&str> {
    let (before, after) = line.split_once("fn ")?;
    let mut words = before.split_whitespace();
    let is_function = words.all(|word| QUALIFIERS.contains(&word) || word.starts_with("pub("));
    let name = after.split(|c: char| !c.is_alphanumeric() && c != '_').next()?;
    (is_function && !name.is_empty()).then_some(name)
}

#[test]
fn functions_are_short() {
    let mut files = product();
    let mut all = Vec::new();
    for (file, text) in &files {
        let found = functions(text).into_iter();
        all.extend(found.map(|(name, lines)| Function { file: file.clone(), name, lines }));
    }
    all.sort_by_key(|function| Reverse(function.lines));
    files.sort_by_key(|(_, text)| Reverse(text.lines().count()));

    println!("{} files of product code; the largest, without their tests:", files.len());
    for (file, text) in files.iter().take(10) {
        println!("{:6} {file}", text.lines().count());
    }
    println!("{} functions; the longest:", all.len());
    for Function { file, name, lines } in all.iter().take(10) {
        println!("{lines:6} {file}: {name}");
    }

    let is_argued = |function: &&Function| ARGUED.iter().any(|a| (a.0, a.1) == (&*function.file, &*function.name));
    let (argued, long): (Vec<_>, Vec<_>) =
        all.iter().filter(|function| function.lines > LINES_MAX).partition(is_argued);
    for Function { file, name, lines } in &long {
        println!("{file}: {name} has {lines} lines, more than {LINES_MAX}");
    }
    assert!(long.is_empty(), "split {} functions along their steps, or give a reason in ARGUED", long.len());
    assert_eq!(argued.len(), ARGUED.len(), "a function in ARGUED is short now: remove it from the table");
}

#[test]
fn functions_are_found_and_measured() {
    let text = "\
pub(crate) const fn short() -> u8 { 1 }

impl Thing {
    /// Not a function: fn doc() {
    async fn long(
        &self,
    ) -> u8
    where
        Self: Sized,
    {
        if self.is_set() {
            inner();
        }
        let call = fn_pointer as fn (u8);
    }
}

trait Promise {
    fn declared(&self);
    fn declared_in_lines(
        &self,
    ) -> u8;
    extern \"C\" fn given(&self) {
        fn nested() {
        }
    }
}

#[cfg(test)]
mod tests {
    fn test() {}
}
";
    let found = functions(without_tests(text));
    let found: Vec<_> = found.iter().map(|(name, lines)| (name.as_str(), *lines)).collect();
    assert_eq!(found, [("short", 1), ("long", 11), ("given", 4), ("nested", 2)]);
}
