//! The body of the fuzz target, as a plain function: the fuzzer calls it, and an ordinary test replays the corpus through it.

use std::{ffi::OsStr, os::unix::ffi::OsStrExt};

use blkdev_drivers::{Access, Error, Spec, parse_size, parse_time};

/// A spec is refused with one line, or has the same meaning when it is written out and parsed again. It opens nothing.
pub(crate) fn spec(data: &[u8]) {
    let text = OsStr::from_bytes(data);
    let spec = match Spec::parse(text) {
        Ok(spec) => spec,
        Err(error) => return refused(data, &error),
    };
    let Some(text) = text.to_str() else { return };
    let driver = spec.settings.driver();
    let mut again = format!("{}:{}", spec.name, driver.name);
    for property in driver.properties().filter(|property| property.access != Access::ReadOnly) {
        // Some have no default before the device is open.
        let Ok(value) = spec.settings.get(property.name) else { continue };
        // Paths and names may be empty by default, but cannot be set to nothing.
        let mut alone = spec.settings.clone();
        if alone.set(property.name, &value).is_ok() {
            again.push_str(&format!(",{}={}", property.name, value.replace(',', ",,")));
            assert_eq!(alone, again_with(&alone, property.name, &value), "{text}");
        } else {
            assert_eq!(
                property.default,
                Some(value.as_str()),
                "{text}: {}: a value that was set can be set",
                property.name
            );
        }
    }
    let second = Spec::parse(OsStr::new(&again)).unwrap_or_else(|error| panic!("{text}: {again}: {error}"));
    assert_eq!(second.name, spec.name, "{text}: {again}");
    for property in driver.properties().filter(|property| property.access != Access::ReadOnly) {
        let [first, second] = [&spec, &second].map(|spec| spec.settings.get(property.name));
        assert_eq!(first, second, "{text}: {again}");
    }
    // The same text as a size and as a time: no overflow.
    let _ = (parse_size(text), parse_time(text));
}

fn again_with(settings: &blkdev_drivers::Settings, name: &str, value: &str) -> blkdev_drivers::Settings {
    let mut settings = settings.clone();
    settings.set(name, value).expect("the same value as before");
    settings
}

fn refused(data: &[u8], error: &Error) {
    let line = error.to_string();
    assert!(error.errno() > 0 && !line.is_empty(), "{line}");
    assert!(!line.contains('\n') || data.contains(&b'\n'), "an error is one line: {line}");
}
