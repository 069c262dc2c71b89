//! `--config`: reads exports and options from a TOML file. Every error has its line and column.
//!
//! Each setting has the name of an option of `nbdblk serve`, and the same parser, so the file and the command line have the same
//! settings. Exports are tables, because they have more settings than fit an argument.

use std::{
    ffi::OsString,
    fmt,
    io::{self, Read},
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use anyhow::{Context, anyhow, ensure};
use blkdev_drivers::{Settings, Spec, find, nearest};
use clap::{ArgAction, CommandFactory, Parser, parser::ValueSource};
use nbd_server_core::{Removal, Rule};
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use crate::{
    cli::{self, Cli},
    exports::{ExportSpec, NAME_MAX},
    files::open_regular,
    logger::Detail,
};

/// Options for one run of the program, which a file cannot set.
const NOT_IN_FILES: &[&str] =
    &["config", "exit-with-parent", "foreground", "help", "print-uri", "ready-fd", "run", "single"];

/// What the value of an option that is repeated on the command line must be.
const COUNT: &str = "a number from 0 to 3";

/// Longest file, in bytes: enough for tens of thousands of exports.
const SIZE_MAX: u64 = 16 << 20;

/// The settings of an export.
pub(crate) const EXPORT_WORDS: [&str; 9] =
    ["name", "description", "device", "read-only", "tls-only", "block-size-required", "allow", "on-remove", "wait"];

/// The content of a file.
#[derive(Debug)]
pub(crate) struct File {
    pub(crate) source: Source,
    pub(crate) settings: Vec<Setting>,
    pub(crate) exports: Vec<ExportSpec>,
}

/// An option that the file sets.
#[derive(Debug)]
pub(crate) struct Setting {
    /// Its long name.
    pub(crate) key: String,
    /// As on the command line; empty for a flag that is off.
    pub(crate) words: Vec<String>,
    pub(crate) at: usize,
}

/// The text of a file, for errors.
#[derive(Debug)]
pub(crate) struct Source {
    path: PathBuf,
    text: String,
}

impl Source {
    /// An error at a byte of the text: file, line and column, the reason, and the line.
    pub(crate) fn wrong(&self, at: usize, what: impl fmt::Display) -> anyhow::Error {
        let before = self.text.get(..at).unwrap_or(&self.text);
        let start = before.rfind('\n').map_or(0, |end| end + 1);
        let (line, column) = (before.matches('\n').count() + 1, before[start..].chars().count() + 1);
        let text = self.text[start..].lines().next().unwrap_or_default().trim();
        let place = format!("{}:{line}:{column}", self.path.display());
        if text.is_empty() { anyhow!("{place}: {what}") } else { anyhow!("{place}: {what} (in \"{text:.120}\")") }
    }
}

impl File {
    /// Reads and checks a file. Opens nothing.
    pub(crate) fn read(path: &Path) -> anyhow::Result<Self> {
        let read = || {
            let mut text = String::new();
            open_regular(path)?.take(SIZE_MAX + 1).read_to_string(&mut text)?;
            Ok(text)
        };
        let text = read().map_err(|error: io::Error| error).with_context(|| format!("reading {}", path.display()))?;
        ensure!(text.len() as u64 <= SIZE_MAX, "{} is longer than {SIZE_MAX} bytes", path.display());
        Self::parse(path, text)
    }

    /// Checks the text of a file.
    pub(crate) fn parse(path: &Path, text: String) -> anyhow::Result<Self> {
        let source = Source { path: path.into(), text };
        let document = DeTable::parse(&source.text).map_err(|error| {
            let what = error.message().trim().replace('\n', ", ");
            source.wrong(error.span().map_or(0, |span| span.start), what)
        })?;
        let (mut settings, mut exports) = (Vec::new(), Vec::new());
        for (key, value) in in_order(document.get_ref()) {
            match key.get_ref().as_ref() {
                "export" => exports = source.exports(value)?,
                name => settings.push(source.setting(name, key.span().start, value)?),
            }
        }
        if exports.is_empty() {
            return Err(source.wrong(source.text.len(), "nothing to serve: there is no [[export]]"));
        }
        Ok(Self { source, settings, exports })
    }

    /// Combines the arguments of the command line with those of this file.
    pub(crate) fn merge(&self, own: &[OsString]) -> anyhow::Result<(cli::Serve, Detail)> {
        let given = Cli::command().try_get_matches_from(own)?;
        let given = given.subcommand_matches("serve").expect("only serve reads a file");
        for Setting { key, at, .. } in &self.settings {
            let command = options();
            let option = command.get_arguments().find(|option| option.get_long() == Some(key)).expect("it was checked");
            if given.value_source(option.get_id().as_str()) == Some(ValueSource::CommandLine) {
                let what = format!("{key} is given on the command line as well, with --{key}");
                return Err(self.source.wrong(*at, what));
            }
        }
        let words = self.settings.iter().flat_map(|setting| &setting.words).map(OsString::from);
        match Cli::try_parse_from(own.iter().cloned().chain(words)) {
            Ok(Cli { command: cli::Command::Serve(args), verbose, log_format, .. }) => {
                Ok((*args, Detail { verbose, format: log_format }))
            }
            Ok(_) => unreachable!("only serve reads a file"),
            Err(error) => {
                let text = crate::one_line(&error);
                let what = self.settings.iter().fold(text.clone(), |what, setting| as_setting(&what, &setting.key));
                Err(match blamed(&self.settings, &text) {
                    Some(setting) => self.source.wrong(setting.at, what),
                    None => anyhow!("{}: {what}", self.source.path.display()),
                })
            }
        }
    }
}

/// The options of `nbdblk serve`.
fn options() -> clap::Command {
    let mut command = Cli::command();
    // Only then can options be printed, and the subcommand has the global ones.
    command.build();
    command.find_subcommand("serve").expect("nbdblk has it").clone()
}

/// Whether a file can set an option.
fn is_setting(option: &clap::Arg) -> bool {
    option.get_long().is_some_and(|name| !NOT_IN_FILES.contains(&name))
}

/// The names of the options that a file can set.
fn known(command: &clap::Command) -> impl Iterator<Item = &str> {
    command.get_arguments().filter(|option| is_setting(option)).filter_map(clap::Arg::get_long)
}

/// The options that a file can set.
pub(crate) fn settings() -> Vec<clap::Arg> {
    options().get_arguments().filter(|option| is_setting(option)).cloned().collect()
}

/// What the value of an option may be in a file.
pub(crate) fn value_kind(option: &clap::Arg) -> String {
    match option.get_action() {
        ArgAction::SetTrue => "true or false".into(),
        ArgAction::Append => "a string, or a list of strings".into(),
        ArgAction::Count => COUNT.into(),
        _ => kinds(option),
    }
}

/// A text of clap, with the name of an option as a file writes it: `threads`, not `'--threads <N>'`.
fn as_setting(text: &str, key: &str) -> String {
    let command = options();
    match command.get_arguments().find(|option| option.get_long() == Some(key)) {
        Some(option) => text.replace(&format!("the argument '{option}'"), key).replace(&format!("'{option}'"), key),
        None => text.to_owned(),
    }
}

/// The options that a text names, such as `--tls-only`, with their positions.
fn named(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.match_indices("--").map(|(at, dashes)| {
        let rest = &text[at + dashes.len()..];
        let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '-').unwrap_or(rest.len());
        (at, &rest[..end])
    })
}

/// The first setting of a file whose option a text names.
pub(crate) fn blamed<'a>(settings: &'a [Setting], text: &str) -> Option<&'a Setting> {
    named(text).find_map(|(_, name)| settings.iter().find(|setting| setting.key == name))
}

/// A text with the names that options have in a file: without dashes.
pub(crate) fn in_words_of_files(text: &str) -> String {
    let command = options();
    let mut said = text.to_owned();
    let dashes: Vec<usize> =
        named(text).filter(|(_, name)| known(&command).any(|k| k == *name)).map(|(at, _)| at).collect();
    for at in dashes.into_iter().rev() {
        said.replace_range(at..at + 2, "");
    }
    said
}

/// The entries in their order in the file.
fn in_order<'a, 'i>(table: &'a DeTable<'i>) -> Vec<(&'a Spanned<std::borrow::Cow<'i, str>>, &'a Spanned<DeValue<'i>>)> {
    let mut all: Vec<_> = table.iter().collect();
    all.sort_by_key(|(key, _)| key.span().start);
    all
}

type Value<'i> = Spanned<DeValue<'i>>;

impl Source {
    fn setting(&self, key: &str, at: usize, value: &Value<'_>) -> anyhow::Result<Setting> {
        let command = options();
        if NOT_IN_FILES.contains(&key) {
            return Err(self.wrong(at, format!("{key} is only valid on the command line")));
        }
        let Some(option) = command.get_arguments().find(|option| option.get_long() == Some(key)) else {
            return Err(self.wrong(at, unknown("setting", key, known(&command).chain(["export"]))));
        };
        let words = match (option.get_action(), value.get_ref()) {
            // Permissions are octal, but a TOML number is octal only with a prefix.
            (_, DeValue::Integer(mode)) if key == "socket-mode" => match mode.radix() {
                8 => vec![format!("--{key}={}", mode.as_str())],
                _ => return Err(self.kind(key, value, "a string, \"0660\", or octal, 0o660")),
            },
            (ArgAction::SetTrue, DeValue::Boolean(on)) => on.then(|| format!("--{key}")).into_iter().collect(),
            (ArgAction::SetTrue, _) => return Err(self.kind(key, value, "true or false")),
            (ArgAction::Count, DeValue::Integer(count)) => match count.as_str().parse() {
                Ok(count @ 0..=3) => vec![format!("--{key}"); count],
                _ => return Err(self.wrong(value.span().start, format!("{key} must be {COUNT}"))),
            },
            (ArgAction::Count, _) => return Err(self.kind(key, value, COUNT)),
            (ArgAction::Append, DeValue::Array(list)) => {
                let item = format!("an item of {key}");
                let word = |value| Ok(format!("--{key}={}", self.string(&item, value)?));
                list.iter().map(word).collect::<anyhow::Result<_>>()?
            }
            (ArgAction::Append, DeValue::String(text)) => vec![format!("--{key}={text}")],
            (ArgAction::Append, _) => return Err(self.kind(key, value, "a string, or a list of them")),
            // An option whose value is optional.
            (_, DeValue::Boolean(true)) if option.get_num_args().is_some_and(|n| n.min_values() == 0) => {
                vec![format!("--{key}")]
            }
            (_, DeValue::String(_) | DeValue::Integer(_)) => vec![format!("--{key}={}", self.word(key, value)?)],
            _ => return Err(self.kind(key, value, &kinds(option))),
        };
        // Check each one individually, so that the error has its place.
        for word in &words {
            if let Err(error) = Cli::try_parse_from(["nbdblk", "serve", "null=1", word]) {
                return Err(self.wrong(value.span().start, as_setting(&crate::one_line(&error), key)));
            }
        }
        Ok(Setting { key: key.into(), words, at })
    }

    fn exports(&self, value: &Value<'_>) -> anyhow::Result<Vec<ExportSpec>> {
        let DeValue::Array(tables) = value.get_ref() else { return Err(self.kind("export", value, "[[export]]")) };
        let mut exports: Vec<ExportSpec> = Vec::new();
        for value in tables.iter() {
            let DeValue::Table(table) = value.get_ref() else { return Err(self.kind("export", value, "[[export]]")) };
            let export = self.export(table, value.span().start)?;
            if table.get("name").is_none() && !exports.is_empty() {
                return Err(self.wrong(value.span().start, "the export needs a name: only the first one can have none"));
            }
            if exports.iter().any(|other| other.name == export.name) {
                let at = table.get("name").map_or(value, |name| name).span().start;
                return Err(self.wrong(at, format!("there are two exports with the name \"{}\"", export.name)));
            }
            exports.push(export);
        }
        Ok(exports)
    }

    fn export(&self, table: &DeTable<'_>, at: usize) -> anyhow::Result<ExportSpec> {
        let mut device = None;
        let (mut name, mut description) = (String::new(), None);
        let (mut read_only, mut tls_only, mut block_size_required) = (false, false, false);
        let (mut rules, mut on_remove, mut wait) = (Vec::new(), Removal::default(), Duration::ZERO);
        for (key, value) in in_order(table) {
            match key.get_ref().as_ref() {
                "name" => name = self.told("name", value)?,
                "description" => description = Some(self.told("description", value)?),
                "device" => device = Some((self.device(value)?, value.span().start)),
                "read-only" => read_only = self.boolean("read-only", value)?,
                "tls-only" => tls_only = self.boolean("tls-only", value)?,
                "block-size-required" => block_size_required = self.boolean("block-size-required", value)?,
                "allow" => {
                    let list = match value.get_ref() {
                        DeValue::Array(list) => list.iter().collect(),
                        _ => vec![value],
                    };
                    for value in list {
                        rules.push(self.parsed::<Rule>("allow", value)?);
                    }
                }
                "on-remove" => on_remove = self.parsed("on-remove", value)?,
                "wait" => wait = self.time("wait", value)?,
                other => {
                    let mut text = unknown("setting of an export", other, EXPORT_WORDS);
                    if known(&options()).any(|setting| setting == other) {
                        text += "; it is a setting of the server, so write it before the first [[export]]";
                    }
                    return Err(self.wrong(key.span().start, text));
                }
            }
        }
        let Some((settings, at)) = device else { return Err(self.wrong(at, "the export has no device")) };
        Ok(ExportSpec {
            name,
            description,
            settings,
            read_only,
            rules,
            tls_only,
            block_size_required,
            on_remove,
            wait,
            at,
        })
    }

    fn boolean(&self, key: &str, value: &Value<'_>) -> anyhow::Result<bool> {
        match value.get_ref() {
            DeValue::Boolean(on) => Ok(*on),
            _ => Err(self.kind(key, value, "true or false")),
        }
    }

    fn time(&self, key: &str, value: &Value<'_>) -> anyhow::Result<Duration> {
        let text = self.string(key, value)?;
        let wrong =
            |error: String| self.wrong(value.span().start, format!("{key}: {}", error.replacen("Value", "it", 1)));
        blkdev_drivers::parse_time(text).map_err(wrong)
    }

    /// A text that clients get.
    fn told(&self, key: &str, value: &Value<'_>) -> anyhow::Result<String> {
        let text = self.string(key, value)?;
        match text.len() > NAME_MAX || text.contains('\0') {
            true => Err(self.wrong(value.span().start, format!("{key} can have at most {NAME_MAX} bytes, and no NUL"))),
            false => Ok(text.into()),
        }
    }

    fn device(&self, value: &Value<'_>) -> anyhow::Result<Settings> {
        let table = match value.get_ref() {
            DeValue::String(text) => {
                let spec: Spec = text.parse().map_err(|error| self.wrong(value.span().start, error))?;
                return match spec.name.is_empty() {
                    true => Ok(spec.settings),
                    false => Err(self.wrong(value.span().start, "set the export's name with name, not here")),
                };
            }
            DeValue::Table(table) => table,
            _ => return Err(self.kind("device", value, "a string or a table")),
        };
        let Some(driver) = table.get("driver") else {
            return Err(self.wrong(value.span().start, "the device has no driver"));
        };
        let found = find(self.string("driver", driver)?).map_err(|error| self.wrong(driver.span().start, error))?;
        let mut settings = Settings::new(found);
        for (key, value) in in_order(table).into_iter().filter(|(key, _)| key.get_ref() != "driver") {
            settings.set(key.get_ref(), &self.word(key.get_ref(), value)?).map_err(|error| {
                let value_is_wrong = error.errno() == nix::libc::EINVAL;
                self.wrong(if value_is_wrong { value.span().start } else { key.span().start }, error)
            })?;
        }
        Ok(settings)
    }

    /// The value as it would be on the command line.
    fn word(&self, key: &str, value: &Value<'_>) -> anyhow::Result<String> {
        match value.get_ref() {
            DeValue::String(text) => Ok(text.as_ref().into()),
            DeValue::Boolean(on) => Ok(on.to_string()),
            // The parser of the option knows the range.
            DeValue::Integer(number) if number.radix() == 10 => Ok(number.as_str().into()),
            DeValue::Integer(number) => i64::from_str_radix(number.as_str(), number.radix())
                .map(|number| number.to_string())
                .map_err(|_| self.wrong(value.span().start, format!("{key}: the number is too large"))),
            _ => Err(self.kind(key, value, "a string, a number, true or false")),
        }
    }

    fn string<'a>(&self, key: &str, value: &'a Value<'_>) -> anyhow::Result<&'a str> {
        value.get_ref().as_str().ok_or_else(|| self.kind(key, value, "a string"))
    }

    fn parsed<T: FromStr<Err = io::Error>>(&self, key: &str, value: &Value<'_>) -> anyhow::Result<T> {
        let text = self.string(key, value)?;
        text.parse().map_err(|error| self.wrong(value.span().start, format!("{key}: {error}")))
    }

    /// An error about the type of a setting.
    fn kind(&self, key: &str, value: &Value<'_>, wanted: &str) -> anyhow::Error {
        let kind = value.get_ref().type_str();
        self.wrong(value.span().start, format!("{key} is a TOML {kind}, and must be {wanted}"))
    }
}

/// What the value of an option must be, for an error about its type.
fn kinds(option: &clap::Arg) -> String {
    let values = option.get_possible_values();
    let names: Vec<_> = values.iter().map(|value| format!("\"{}\"", value.get_name())).collect();
    if names.is_empty() { "a string or a number".into() } else { format!("one of {}", names.join(", ")) }
}

fn unknown<'a>(kind: &str, name: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    let hint = nearest(name, known).map(|near| format!("; did you mean {near}?")).unwrap_or_default();
    format!("unknown {kind} \"{name}\"{hint}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::LogFormat;

    const EXPORT: &str = "\n[[export]]\ndevice = \"null=1M\"\n";

    fn own(words: &[&str]) -> Vec<OsString> {
        ["nbdblk", "serve", "--config", "f.toml"].iter().chain(words).map(OsString::from).collect()
    }

    fn parse(text: &str, words: &[&str]) -> anyhow::Result<(File, cli::Serve)> {
        let file = File::parse(Path::new("f.toml"), text.into())?;
        let (args, _) = file.merge(&own(words))?;
        Ok((file, args))
    }

    /// Expects an error at this place; its text ends with the whole line.
    fn refuse(text: &str, place: &str, words: &str) {
        let error = parse(text, &[]).map(drop).expect_err(text).to_string();
        assert!(error.starts_with(&format!("f.toml:{place}: ")) && error.contains(words), "{text}\n=> {error}");
        let line: usize = place.split(':').next().expect("a line").parse().expect("a number");
        let line = text.lines().nth(line - 1).unwrap_or_default().trim();
        assert!(line.is_empty() || error.ends_with(&format!(" (in \"{line:.120}\")")), "{error}");
    }

    #[test]
    fn settings_are_options() {
        let text =
            format!("unix = [\"/a\", \"/b\"]\nport = 1_0\nthreads = 0x2\nmemory = \"1M\"\nread-only = true{EXPORT}");
        let (_, args) = parse(&text, &["--print-uri"]).expect(&text);
        assert_eq!(args.unix, [Path::new("/a"), Path::new("/b")]);
        assert_eq!((args.port, args.threads, args.memory), (Some(10), Some(2), Some(1 << 20)));
        assert!(args.read_only && args.print_uri);
        for mode in ["\"0660\"", "\"660\"", "0o660"] {
            let (_, args) = parse(&format!("unix = \"/a\"\nsocket-mode = {mode}{EXPORT}"), &[]).expect(mode);
            assert_eq!(args.socket_mode, Some(0o660), "{mode}");
        }
        refuse(&format!("socket-mode = 660{EXPORT}"), "1:15", "0o660");
        let (_, args) = parse(&format!("unix = \"/a\"\nread-only = false{EXPORT}"), &[]).expect("good");
        assert_eq!((args.unix, args.read_only), (vec![PathBuf::from("/a")], false));
    }

    #[test]
    fn exports_are_tables() {
        let text = r#"
            [[export]]
            device = "io_uring=/srv/a,,b.img,direct=true"
            [[export]]
            name = "b/c: d"
            block-size-required = true
            description = "Größe"
            device = { driver = "io-uring", path = "/srv/a,b.img", direct = true, num_entries = 64 }
            read-only = true
            allow = ["uid=0", "ip=10.0.0.0/8"]
            on-remove = "soft"
            [[export]]
            name = "e"
            allow = "gid=7"
            on-remove = "hard"
            [export.device]
            driver = "memory"
            size = "1G"
        "#;
        let (file, _) = parse(text, &[]).expect("good");
        let [a, b, e] = &file.exports[..] else { panic!("{:?}", file.exports) };
        assert_eq!((a.name.as_str(), &a.description, a.read_only, a.on_remove), ("", &None, false, Removal::Hide));
        assert_eq!(a.settings.get("path").as_deref(), Ok("/srv/a,b.img"));
        assert_eq!((b.name.as_str(), b.description.as_deref()), ("b/c: d", Some("Größe")));
        assert_eq!((b.read_only, b.on_remove, b.rules.len()), (true, Removal::Soft, 2));
        assert!(b.block_size_required && !a.block_size_required);
        assert_eq!(b.settings.get("path"), a.settings.get("path"));
        assert_eq!(b.settings.get("num-entries").as_deref(), Ok("64"));
        assert_eq!((e.settings.get("size").as_deref(), e.on_remove), (Ok("1073741824"), Removal::Hard));
    }

    #[test]
    fn invalid_toml() {
        refuse("port = \n[[export]]", "1:8", "");
        refuse("port = 1\nport = 2\n", "2:1", "duplicate");
        refuse("[[export]]\nname = \"a\ndevice = \"null=1\"", "2:10", "");
        refuse("é = 1", "1:1", "");
    }

    #[test]
    fn unknown_settings() {
        refuse("\nprot = 1\n", "2:1", "unknown setting \"prot\"; did you mean port?");
        refuse("  exprot = 1", "1:3", "did you mean export?");
        refuse("colour = 1", "1:1", "unknown setting \"colour\" (in");
        refuse("run = \"true\"", "1:1", "run is only valid on the command line");
        refuse("config = \"x\"", "1:1", "only valid on the command line");
        refuse("[[export]]\nname = \"ä\"; x = 1", "2:11", "");
        refuse("[[export]]\ndevcie = \"null=1\"", "2:1", "did you mean device?");
        refuse("[[export]]\ndevice = { driver = \"nul\", size = 1 }", "2:21", "did you mean null?");
        refuse("[[export]]\ndevice = { driver = \"null\", siez = 1 }", "2:29", "did you mean size?");
    }

    #[test]
    fn a_file_says_what_is_logged() {
        let detail = |text: &str, words: &[&str]| {
            let file = File::parse(Path::new("f.toml"), format!("{text}\n[[export]]\ndevice = \"null=1\"")).unwrap();
            file.merge(&own(words)).map(|(_, detail)| detail).map_err(|error| error.to_string())
        };
        let is = |verbose, format| Ok(Detail { verbose, format });
        assert_eq!(detail("", &["-v"]), is(1, LogFormat::Text));
        assert_eq!(detail("verbose = 2\nlog-format = \"json\"", &[]), is(2, LogFormat::Json));
        assert_eq!(detail("verbose = 0", &["--log-format=json"]), is(0, LogFormat::Json));
        assert!(detail("verbose = 2", &["-v"]).unwrap_err().contains("verbose is given on the command line as well"));
        refuse("verbose = 4", "1:11", "verbose must be a number from 0 to 3");
        refuse("verbose = true", "1:11", "verbose is a TOML boolean, and must be a number from 0 to 3");
    }

    #[test]
    fn wrong_kinds() {
        refuse("port = [1]", "1:8", "port is a TOML array, and must be a string or a number");
        refuse("tls = true", "1:7", "tls is a TOML boolean, and must be one of \"off\", \"on\", \"require\"");
        refuse("port = true", "1:8", "TOML boolean");
        refuse("port = 1.5", "1:8", "TOML float");
        refuse("read-only = \"yes\"", "1:13", "must be true or false");
        refuse("unix = 1", "1:8", "a string, or a list of them");
        refuse("unix = [\"a\", [\"b\"]]", "1:14", "an item of unix is a TOML array");
        refuse("[export]\nname = \"a\"", "1:1", "must be [[export]]");
        refuse("export = [1]", "1:11", "must be [[export]]");
        refuse("[[export]]\nname = 1", "2:8", "name is a TOML integer, and must be a string");
        refuse("[[export]]\ndevice = 1", "2:10", "a string or a table");
        refuse("[[export]]\nread-only = 1", "2:13", "true or false");
        refuse("[[export]]\nallow = [1]", "2:10", "must be a string");
        refuse("[[export]]\ndevice = { driver = \"null\", size = 1.5 }", "2:36", "TOML float");
    }

    #[test]
    fn wrong_values() {
        refuse("threads = 1\nport = 65536", "2:8", "65536");
        refuse("threads = 0", "1:11", ": invalid value '0' for threads: it must be a number from 1 to 1024 (in");
        refuse("memory = \"64K\"", "1:10", "at least 1M");
        refuse("port = 99999999999999999999", "1:8", "for port: it must be a number from 0 to 65535");
        refuse("port = 0xffffffffffffffffffff", "1:8", "port: the number is too large");
        refuse("[[export]]\nallow = [\"uid=0\", \"uid=x\"]", "2:19", "\"uid=x\": the value must be a number");
        refuse("[[export]]\non-remove = \"gently\"", "2:13", "\"gently\" is none of \"hide\", \"soft\" and \"hard\"");
        refuse("[[export]]\ndevice = \"null=x\"", "2:10", "null: size=x");
        refuse("[[export]]\ndevice = \"a:null=1\"", "2:10", "with name, not here");
        refuse("[[export]]\ndevice = { driver = \"null\", size = \"x\" }", "2:36", "null: size=x");
        refuse("[[export]]\ndevice = { size = 1 }", "2:10", "no driver");
        refuse("[[export]]\nname = \"a\\u0000\"", "2:8", "no NUL");
        refuse(&format!("[[export]]\nname = \"{}\"", "a".repeat(4097)), "2:8", "4096 bytes");
    }

    /// An error names a setting as the file does, not as the command line does.
    #[test]
    fn settings_are_named_as_in_the_file() {
        // Settings, each with an invalid value. For those without one, the type is wrong.
        let bad = [
            ("allow", "\"bad\""),
            ("block-size-required", "1"),
            ("connections", "0"),
            ("control", "true"),
            ("group", "\"no such group\""),
            ("handshake-timeout", "0"),
            ("ip-addr", "true"),
            ("ipv4-only", "1"),
            ("ipv6-only", "1"),
            ("listen", "\"here\""),
            ("log-format", "\"xml\""),
            ("memory", "\"64K\""),
            ("metrics", "\"vsock:5\""),
            ("pidfile", "\"\""),
            ("poll", "-1"),
            ("port", "65536"),
            ("read-only", "\"yes\""),
            ("sandbox", "\"maybe\""),
            ("slow", "\"soon\""),
            ("socket-group", "\"no such group\""),
            ("socket-mode", "\"0999\""),
            ("socket-owner", "\"no such user\""),
            ("threads", "0"),
            ("tls", "\"maybe\""),
            ("tls-certificates", "true"),
            ("tls-only", "1"),
            ("tls-psk", "true"),
            ("tls-verify-peer", "1"),
            ("unix", "1"),
            ("user", "\"no such user\""),
            ("verbose", "4"),
            ("vsock", "-1"),
            ("wait", "0"),
        ];
        let command = options();
        let all: std::collections::BTreeSet<&str> = known(&command).collect();
        assert_eq!(bad.map(|(key, _)| key).into_iter().collect::<std::collections::BTreeSet<_>>(), all);
        for (key, value) in bad {
            let text = format!("{key} = {value}{EXPORT}");
            let error = File::parse(Path::new("f.toml"), text.clone()).expect_err(&text).to_string();
            let (what, _) = error.split_once(" (in \"").expect("it shows the line");
            assert!(what.starts_with("f.toml:1:") && what.contains(key) && !what.contains("--"), "{error}");
            assert!(!what.contains("in string") && !what.contains("non-zero type"), "{error}");
        }
    }

    #[test]
    fn settings_that_exclude_each_other() {
        let psk = "tls-psk = \"p\"\ntls-certificates = \"c\"";
        refuse(&format!("{psk}{EXPORT}"), "1:1", ": tls-psk cannot be used with tls-certificates (in");
        let with = |words: &[&str]| parse(&format!("tls-psk = \"p\"{EXPORT}"), words).expect_err("both").to_string();
        let error = with(&["--tls-certificates", "c"]);
        assert!(
            error.starts_with("f.toml:1:1: ") && error.contains("tls-psk") && !error.contains("--tls-psk"),
            "{error}"
        );
        assert!(error.contains("'--tls-certificates <DIR>'"), "{error}");
    }

    #[test]
    fn missing_and_duplicate_settings() {
        refuse("port = 1\n", "2:1", "nothing to serve: there is no [[export]]");
        refuse("export = []", "1:12", "nothing to serve");
        refuse("\n[[export]]\nname = \"a\"", "2:1", "no device");
        refuse(&format!("{EXPORT}{EXPORT}"), "5:1", "needs a name");
        refuse(&format!("{EXPORT}name = \"a\"{EXPORT}name = \"a\""), "7:8", "two exports with the name \"a\"");
        let error = parse(&format!("port = 1{EXPORT}"), &["--port", "2"]).expect_err("twice").to_string();
        assert_eq!(error, "f.toml:1:1: port is given on the command line as well, with --port (in \"port = 1\")");
    }

    #[test]
    fn the_example_is_valid() {
        let text = include_str!("../../../docs/nbdblk.toml");
        let (file, args) = parse(text, &[]).unwrap_or_else(|error| panic!("docs/nbdblk.toml: {error}"));
        assert!(file.exports.len() > 1 && file.exports.iter().any(|export| !export.rules.is_empty()));
        assert!(args.control.is_some());
        // The settings that are commented out must be valid too.
        let all: String = text.lines().map(|line| line.strip_prefix("#:").unwrap_or(line).to_owned() + "\n").collect();
        parse(&all, &[]).unwrap_or_else(|error| panic!("docs/nbdblk.toml, with all settings: {error}"));
    }
}
