//! [`Target`]: a controller and one of its namespaces, `0000:01:00.0/2`.

use std::{io, str::FromStr};

/// Location of a namespace: `CONTROLLER[/NSID]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The controller's PCI address, or its path in sysfs.
    pub controller: String,
    /// The namespace identifier; `None`: the first active namespace.
    pub nsid: Option<u32>,
}

impl FromStr for Target {
    type Err = io::Error;

    fn from_str(text: &str) -> io::Result<Self> {
        let invalid = |why: &str| io::Error::new(io::ErrorKind::InvalidInput, format!("{text:?}: {why}"));
        let text = text.trim_end_matches('/');
        let (controller, nsid) = match text.rsplit_once('/') {
            // The last component of a path in sysfs is a PCI address, which contains a colon.
            Some((front, last)) if !last.contains(':') => (front, Some(last)),
            _ => (text, None),
        };
        let nsid = nsid.map(|digits| match digits.parse() {
            Ok(nsid @ 1..=0xffff_fffe) => Ok(nsid),
            _ => Err(invalid("expected a namespace identifier, 1 or more, after the last slash")),
        });
        if controller.is_empty() {
            return Err(invalid("expected a PCI address, optionally with a namespace: 0000:01:00.0 or 0000:01:00.0/1"));
        }
        Ok(Self { controller: controller.to_owned(), nsid: nsid.transpose()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_may_follow_the_controller() {
        let check = |text: &str, controller: &str, nsid| {
            let expected = Target { controller: controller.to_owned(), nsid };
            assert_eq!(text.parse::<Target>().unwrap(), expected, "{text}");
        };
        check("0000:01:00.0", "0000:01:00.0", None);
        check("01:00.0/2", "01:00.0", Some(2));
        check("/sys/bus/pci/devices/0000:01:00.0/", "/sys/bus/pci/devices/0000:01:00.0", None);
        check("/sys/bus/pci/devices/0000:01:00.0/17", "/sys/bus/pci/devices/0000:01:00.0", Some(17));
        for wrong in ["", "/", "/1", "01:00.0/0", "01:00.0/x", "01:00.0/4294967295", "01:00.0/-1"] {
            assert!(wrong.parse::<Target>().is_err(), "{wrong}");
        }
    }
}
