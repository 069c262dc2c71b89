//! Whether a device that was opened again can take the place of the one that died.

use crate::device::{Caps, Info};

/// Checks that users who know the device as `old` can go on with `new`.
///
/// # Errors
/// Why they cannot.
pub(super) fn fits(old: &Info, capacity: u64, new: &Info, new_capacity: u64, queues: usize) -> Result<(), String> {
    if new_capacity < capacity {
        return Err(format!("it came back with {new_capacity} bytes, but clients rely on {capacity}"));
    }
    if new.block_size != old.block_size {
        return Err(format!("it came back with blocks of {} bytes instead of {}", new.block_size, old.block_size));
    }
    if new.caps.read_only && !old.caps.read_only {
        return Err("it came back read-only".into());
    }
    if new.serial != old.serial && !old.serial.is_empty() {
        return Err(format!("it came back with the serial number {:?} instead of {:?}", new.serial, old.serial));
    }
    if new.name != old.name && !old.name.is_empty() {
        return Err(format!("there is the device {:?} instead of {:?}", new.name, old.name));
    }
    if usize::from(new.queues_max) < queues {
        return Err(format!("it came back with {} queues, but {queues} are in use", new.queues_max));
    }
    if let Some(what) = lacks(&old.caps, &new.caps) {
        return Err(format!("it came back without {what}, which clients rely on"));
    }
    if new.caps.flush && !old.caps.flush {
        return Err("it came back with a volatile write cache, for which clients do not flush".into());
    }
    let limits = [
        ("longest transfer", u64::from(old.transfer_max), u64::from(new.transfer_max)),
        ("longest write of zeroes", if old.caps.zero { old.zero_max } else { 0 }, new.zero_max),
        ("longest discard", if old.caps.discard { old.discard_max } else { 0 }, new.discard_max),
    ];
    match limits.into_iter().find(|(_, old, new)| new < old) {
        Some((what, old, new)) => Err(format!("it came back with a {what} of {new} bytes instead of {old}")),
        None => Ok(()),
    }
}

/// What the new device lacks.
fn lacks(old: &Caps, new: &Caps) -> Option<&'static str> {
    let all = [
        ("flush", old.flush, new.flush),
        ("FUA", old.fua, new.fua),
        ("write zeroes", old.zero, new.zero),
        ("discard", old.discard, new.discard),
        ("block status", old.status, new.status),
        ("prefetch", old.prefetch, new.prefetch),
    ];
    all.into_iter().find(|(_, old, new)| *old && !new).map(|(what, ..)| what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_lacks_something_is_refused_and_one_that_has_more_is_not() {
        let mut old = Info::new("test", "here");
        (old.serial, old.name) = ("one".into(), "one".into());
        (old.zero_max, old.transfer_max) = (1 << 20, 1 << 20);
        (old.caps.zero, old.caps.flush) = (true, true);
        let fits = |change: &dyn Fn(&mut Info), capacity| {
            let mut new = old.clone();
            change(&mut new);
            fits(&old, 1 << 20, &new, capacity, 2)
        };
        assert_eq!(fits(&|_| {}, 1 << 20), Ok(()));
        assert_eq!(fits(&|new| (new.caps.fua, new.transfer_max) = (true, 2 << 20), 2 << 20), Ok(()));
        let refuses = |change: &dyn Fn(&mut Info), capacity, why: &str| {
            let refused = fits(change, capacity).unwrap_err();
            assert!(refused.contains(why), "{refused}");
        };
        refuses(&|_| {}, 4096, "4096 bytes, but clients rely on 1048576");
        refuses(&|new| new.block_size = 512, 1 << 20, "blocks of 512 bytes instead of 1");
        refuses(&|new| new.caps.read_only = true, 1 << 20, "read-only");
        refuses(&|new| new.serial = "two".into(), 1 << 20, "the serial number \"two\" instead of \"one\"");
        refuses(&|new| new.name = "two".into(), 1 << 20, "there is the device \"two\" instead of \"one\"");
        refuses(&|new| new.queues_max = 1, 1 << 20, "1 queues, but 2 are in use");
        refuses(&|new| new.caps.flush = false, 1 << 20, "without flush");
        refuses(&|new| new.transfer_max = 4096, 1 << 20, "a longest transfer of 4096 bytes instead of 1048576");
        refuses(&|new| new.zero_max = 4096, 1 << 20, "a longest write of zeroes of 4096 bytes");
        let old = Info::new("test", "here");
        let mut new = old.clone();
        new.caps.flush = true;
        assert!(super::fits(&old, 0, &new, 0, 1).unwrap_err().contains("volatile write cache"));
    }
}
