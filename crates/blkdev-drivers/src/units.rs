//! Sizes and times as people write them: `1.5T`, `500ms`. Exact, or refused.

use std::time::Duration;

/// A size in bytes: decimal, with `K`, `M`, `G`, `T`, `P` or `E` (in either case) for powers of 1024.
///
/// # Errors
/// A sentence that says what a size looks like: not a number, not a whole number of bytes, or 16 exbibytes and more.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let exponent = match text.chars().last().map(|c| c.to_ascii_uppercase()) {
        Some(c @ ('K' | 'M' | 'G' | 'T' | 'P' | 'E')) => 1 + "KMGTPE".find(c).unwrap_or_default(),
        _ => 0,
    };
    let digits = if exponent > 0 { &text[..text.len() - 1] } else { text };
    scaled(digits, 1 << (10 * exponent))
        .ok_or_else(|| "Value must be a size in whole bytes, such as 512, 64K or 1.5T".into())
}

/// A time: seconds, or with the suffix `s` or `ms`; not finer than a millisecond.
///
/// # Errors
/// A sentence that says what a time looks like.
pub fn parse_time(text: &str) -> Result<Duration, String> {
    let (digits, millis) = match text.strip_suffix("ms") {
        Some(digits) => (digits, 1),
        None => (text.strip_suffix('s').unwrap_or(text), 1000),
    };
    scaled(digits, millis)
        .map(Duration::from_millis)
        .ok_or_else(|| "Value must be a time in whole milliseconds, such as 5, 0.5s or 500ms".into())
}

/// `digits` (with a decimal point or without) times `unit`, if that is a whole number that fits.
fn scaled(digits: &str, unit: u64) -> Option<u64> {
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, "0"));
    let number = |text: &str| text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse::<u64>().ok())?;
    let scale = 10u128.checked_pow(fraction.len().try_into().ok()?)?;
    let parts = u128::from(number(fraction)?).checked_mul(unit.into())?;
    let rest = (parts % scale == 0).then_some(parts / scale)?;
    u64::try_from((u128::from(number(whole)?) * u128::from(unit)).checked_add(rest)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        let check = |text, size: Option<u64>| assert_eq!(parse_size(text).ok(), size, "{text}");
        check("0", Some(0));
        check("512", Some(512));
        check("1K", Some(1024));
        check("1k", Some(1024));
        check("64M", Some(64 << 20));
        check("1.5T", Some(3 << 39));
        check("0.5K", Some(512));
        check("1.00E", Some(1 << 60));
        check("15.5E", Some(31 << 59));
        check("18446744073709551615", Some(u64::MAX));
        check("18446744073709551616", None);
        check("16E", None);
        for wrong in
            ["", "K", ".", "1.", ".5", "-1", "+1", "1.5", "0.1G", "1KB", "1 K", "0x10", "1.5.5M", "1e3", "1\u{212A}"]
        {
            check(wrong, None);
        }
        check("0.00000000000000000000000000000000000000000000001E", None);
    }

    #[test]
    fn times() {
        let check =
            |text, millis: Option<u64>| assert_eq!(parse_time(text).ok(), millis.map(Duration::from_millis), "{text}");
        check("5", Some(5000));
        check("5s", Some(5000));
        check("0.25", Some(250));
        check("1.5s", Some(1500));
        check("500ms", Some(500));
        check("0", Some(0));
        for wrong in ["", "s", "ms", "1m", "-1", "0.5ms", "0.0001s", "5 s", "inf"] {
            check(wrong, None);
        }
    }
}
