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
};

use anyhow::{Context, anyhow, ensure};
use blkdev_drivers::{Settings, Spec, find, nearest};
use clap::{ArgAction, Args, CommandFactory, Parser, error::ContextKind, error::ContextValue, parser::ValueSource};
use nbd_server_core::{Removal, Rule};
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use crate::{
    cli::{self, Cli},
    exports::{NAME_MAX, Wanted},
    files::open_regular,
};

/// Options for one run of the program, which a file cannot set.
const NOT_IN_FILES: &[&str] =
    &["config", "exit-with-parent", "foreground", "help", "print-uri", "ready-fd", "run", "single", "verbose"];

/// Longest file, in bytes: enough for tens of thousands of exports.
const SIZE_MAX: u64 = 16 << 20;

/// The settings of an export.
const EXPORT_WORDS: [&str; 8] =
    ["name", "description", "device", "read-only", "tls-only", "block-size-required", "allow", "on-remove"];

/// The content of a file.
#[derive(Debug)]
pub(crate) struct File {
    pub(crate) source: Source,
    pub(crate) settings: Vec<Setting>,
    pub(crate) exports: Vec<Wanted>,
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
    pub(crate) fn merge(&self, own: &[OsString]) -> anyhow::Result<cli::Serve> {
        let given = Cli::command().try_get_matches_from(own)?;
        let given = given.subcommand_matches("serve").expect("only serve reads a file");
        for Setting { key, at, .. } in &self.settings {
            let command = options();
            let option = command.get_arguments().find(|option| option.get_long() == Some(key)).expect("it was checked");
            if given.value_source(option.get_id().as_str()) == Some(ValueSource::CommandLine) {
                return Err(self.source.wrong(*at, format!("--{key} is given on the command line as well")));
            }
        }
        let words = self.settings.iter().flat_map(|setting| &setting.words).map(OsString::from);
        match Cli::try_parse_from(own.iter().cloned().chain(words)) {
            Ok(Cli { command: cli::Command::Serve(args), .. }) => Ok(*args),
            Ok(_) => unreachable!("only serve reads a file"),
            Err(error) => {
                let named = error.get(ContextKind::InvalidArg).map(ContextValue::to_string).unwrap_or_default();
                let whose = |setting: &&Setting| named.split(['=', ' ']).next() == Some(&format!("--{}", setting.key));
                let what = crate::one_line(&error);
                Err(match self.settings.iter().find(whose) {
                    Some(setting) => self.source.wrong(setting.at, what),
                    None => anyhow!("{}: {what}", self.source.path.display()),
                })
            }
        }
    }
}

/// The options of `nbdblk serve`.
fn options() -> clap::Command {
    cli::Serve::augment_args(clap::Command::new("serve"))
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
        let known = || command.get_arguments().filter_map(clap::Arg::get_long).filter(|n| !NOT_IN_FILES.contains(n));
        if NOT_IN_FILES.contains(&key) {
            return Err(self.wrong(at, format!("{key} is only valid on the command line")));
        }
        let Some(option) = command.get_arguments().find(|option| option.get_long() == Some(key)) else {
            return Err(self.wrong(at, unknown("setting", key, known().chain(["export"]))));
        };
        let words = match (option.get_action(), value.get_ref()) {
            // Permissions are octal, but a TOML number is octal only with a prefix.
            (_, DeValue::Integer(mode)) if key == "socket-mode" => match mode.radix() {
                8 => vec![format!("--{key}={}", mode.as_str())],
                _ => return Err(self.kind(value, "a string, \"0660\", or octal, 0o660")),
            },
            (ArgAction::SetTrue, DeValue::Boolean(on)) => on.then(|| format!("--{key}")).into_iter().collect(),
            (ArgAction::SetTrue, _) => return Err(self.kind(value, "true or false")),
            (ArgAction::Append, DeValue::Array(list)) => {
                let word = |value| Ok(format!("--{key}={}", self.string(value)?));
                list.iter().map(word).collect::<anyhow::Result<_>>()?
            }
            (ArgAction::Append, DeValue::String(text)) => vec![format!("--{key}={text}")],
            (ArgAction::Append, _) => return Err(self.kind(value, "a string, or a list of them")),
            // An option whose value is optional.
            (_, DeValue::Boolean(true)) if option.get_num_args().is_some_and(|n| n.min_values() == 0) => {
                vec![format!("--{key}")]
            }
            (_, DeValue::String(_) | DeValue::Integer(_)) => vec![format!("--{key}={}", self.word(value)?)],
            _ => return Err(self.kind(value, "a string or a number")),
        };
        // Check each one individually, so that the error has its place.
        for word in &words {
            if let Err(error) = Cli::try_parse_from(["nbdblk", "serve", "null=1", word]) {
                return Err(self.wrong(value.span().start, crate::one_line(&error)));
            }
        }
        Ok(Setting { key: key.into(), words, at })
    }

    fn exports(&self, value: &Value<'_>) -> anyhow::Result<Vec<Wanted>> {
        let DeValue::Array(tables) = value.get_ref() else { return Err(self.kind(value, "[[export]]")) };
        let mut exports: Vec<Wanted> = Vec::new();
        for value in tables.iter() {
            let DeValue::Table(table) = value.get_ref() else { return Err(self.kind(value, "[[export]]")) };
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

    fn export(&self, table: &DeTable<'_>, at: usize) -> anyhow::Result<Wanted> {
        let mut device = None;
        let (mut name, mut description) = (String::new(), None);
        let (mut read_only, mut tls_only, mut block_size_required) = (false, false, false);
        let (mut rules, mut on_remove) = (Vec::new(), Removal::default());
        for (key, value) in in_order(table) {
            match key.get_ref().as_ref() {
                "name" => name = self.told(value)?,
                "description" => description = Some(self.told(value)?),
                "device" => device = Some((self.device(value)?, value.span().start)),
                "read-only" => read_only = self.boolean(value)?,
                "tls-only" => tls_only = self.boolean(value)?,
                "block-size-required" => block_size_required = self.boolean(value)?,
                "allow" => {
                    let list = match value.get_ref() {
                        DeValue::Array(list) => list.iter().collect(),
                        _ => vec![value],
                    };
                    for value in list {
                        rules.push(self.parsed::<Rule>(value)?);
                    }
                }
                "on-remove" => on_remove = self.parsed(value)?,
                other => {
                    return Err(self.wrong(key.span().start, unknown("setting of an export", other, EXPORT_WORDS)));
                }
            }
        }
        let Some((settings, at)) = device else { return Err(self.wrong(at, "the export has no device")) };
        Ok(Wanted { name, description, settings, read_only, rules, tls_only, block_size_required, on_remove, at })
    }

    fn boolean(&self, value: &Value<'_>) -> anyhow::Result<bool> {
        match value.get_ref() {
            DeValue::Boolean(on) => Ok(*on),
            _ => Err(self.kind(value, "true or false")),
        }
    }

    /// A text that clients get.
    fn told(&self, value: &Value<'_>) -> anyhow::Result<String> {
        let text = self.string(value)?;
        match text.len() > NAME_MAX || text.contains('\0') {
            true => Err(self.wrong(value.span().start, format!("it can have at most {NAME_MAX} bytes, and no NUL"))),
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
            _ => return Err(self.kind(value, "a string or a table")),
        };
        let Some(driver) = table.get("driver") else {
            return Err(self.wrong(value.span().start, "the device has no driver"));
        };
        let found = find(self.string(driver)?).map_err(|error| self.wrong(driver.span().start, error))?;
        let mut settings = Settings::new(found);
        for (key, value) in in_order(table).into_iter().filter(|(key, _)| key.get_ref() != "driver") {
            settings.set(key.get_ref(), &self.word(value)?).map_err(|error| {
                let value_is_wrong = error.errno() == nix::libc::EINVAL;
                self.wrong(if value_is_wrong { value.span().start } else { key.span().start }, error)
            })?;
        }
        Ok(settings)
    }

    /// The value as it would be on the command line.
    fn word(&self, value: &Value<'_>) -> anyhow::Result<String> {
        match value.get_ref() {
            DeValue::String(text) => Ok(text.as_ref().into()),
            DeValue::Boolean(on) => Ok(on.to_string()),
            DeValue::Integer(number) => i64::from_str_radix(number.as_str(), number.radix())
                .map(|number| number.to_string())
                .map_err(|_| self.wrong(value.span().start, "the number is too large")),
            _ => Err(self.kind(value, "a string, a number, true or false")),
        }
    }

    fn string<'a>(&self, value: &'a Value<'_>) -> anyhow::Result<&'a str> {
        value.get_ref().as_str().ok_or_else(|| self.kind(value, "a string"))
    }

    fn parsed<T: FromStr<Err = io::Error>>(&self, value: &Value<'_>) -> anyhow::Result<T> {
        self.string(value)?.parse().map_err(|error| self.wrong(value.span().start, error))
    }

    fn kind(&self, value: &Value<'_>, wanted: &str) -> anyhow::Error {
        self.wrong(value.span().start, format!("this is a TOML {}, and must be {wanted}", value.get_ref().type_str()))
    }
}

fn unknown<'a>(kind: &str, name: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    let hint = nearest(name, known).map(|near| format!("; did you mean {near}?")).unwrap_or_default();
    format!("unknown {kind} \"{name}\"{hint}")
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXPORT: &str = "\n[[export]]\ndevice = \"null=1M\"\n";

    fn own(words: &[&str]) -> Vec<OsString> {
        ["nbdblk", "serve", "--config", "f.toml"].iter().chain(words).map(OsString::from).collect()
    }

    fn parse(text: &str, words: &[&str]) -> anyhow::Result<(File, cli::Serve)> {
        let file = File::parse(Path::new("f.toml"), text.into())?;
        let args = file.merge(&own(words))?;
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
    fn wrong_kinds() {
        refuse("port = [1]", "1:8", "this is a TOML array, and must be a string or a number");
        refuse("port = true", "1:8", "TOML boolean");
        refuse("port = 1.5", "1:8", "TOML float");
        refuse("read-only = \"yes\"", "1:13", "must be true or false");
        refuse("unix = 1", "1:8", "a string, or a list of them");
        refuse("unix = [\"a\", [\"b\"]]", "1:14", "TOML array");
        refuse("[export]\nname = \"a\"", "1:1", "must be [[export]]");
        refuse("export = [1]", "1:11", "must be [[export]]");
        refuse("[[export]]\nname = 1", "2:8", "must be a string");
        refuse("[[export]]\ndevice = 1", "2:10", "a string or a table");
        refuse("[[export]]\nread-only = 1", "2:13", "true or false");
        refuse("[[export]]\nallow = [1]", "2:10", "must be a string");
        refuse("[[export]]\ndevice = { driver = \"null\", size = 1.5 }", "2:36", "TOML float");
    }

    #[test]
    fn wrong_values() {
        refuse("threads = 1\nport = 65536", "2:8", "65536");
        refuse("threads = 0", "1:11", "--threads");
        refuse("memory = \"64K\"", "1:10", "at least 1M");
        refuse("port = 99999999999999999999", "1:8", "");
        refuse("[[export]]\nallow = [\"uid=0\", \"uid=x\"]", "2:19", "\"uid=x\": the value must be a number");
        refuse("[[export]]\non-remove = \"gently\"", "2:13", "\"gently\" is none of \"hide\", \"soft\" and \"hard\"");
        refuse("[[export]]\ndevice = \"null=x\"", "2:10", "null: size=x");
        refuse("[[export]]\ndevice = \"a:null=1\"", "2:10", "with name, not here");
        refuse("[[export]]\ndevice = { driver = \"null\", size = \"x\" }", "2:36", "null: size=x");
        refuse("[[export]]\ndevice = { size = 1 }", "2:10", "no driver");
        refuse("[[export]]\nname = \"a\\u0000\"", "2:8", "no NUL");
        refuse(&format!("[[export]]\nname = \"{}\"", "a".repeat(4097)), "2:8", "4096 bytes");
    }

    #[test]
    fn missing_and_duplicate_settings() {
        refuse("port = 1\n", "2:1", "nothing to serve: there is no [[export]]");
        refuse("export = []", "1:12", "nothing to serve");
        refuse("\n[[export]]\nname = \"a\"", "2:1", "no device");
        refuse(&format!("{EXPORT}{EXPORT}"), "5:1", "needs a name");
        refuse(&format!("{EXPORT}name = \"a\"{EXPORT}name = \"a\""), "7:8", "two exports with the name \"a\"");
        let error = parse(&format!("port = 1{EXPORT}"), &["--port", "2"]).expect_err("twice").to_string();
        assert_eq!(error, "f.toml:1:1: --port is given on the command line as well (in \"port = 1\")");
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
