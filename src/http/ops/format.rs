//! Numbers as people read them. All are taken by reference, as a template gives them.

use std::time::Duration;

use indicatif::{BinaryBytes, HumanCount};

use crate::http::ops::status::RestoreStatus;
use crate::http::ops::traffic::RouteTraffic;

/// With a comma between thousands.
pub(super) fn count(count: &u64) -> HumanCount {
    HumanCount(*count)
}

/// As `1.50 MiB`.
pub(super) fn bytes(bytes: &u64) -> BinaryBytes {
    BinaryBytes(*bytes)
}

/// The same in three digits, as `1.50` and `MiB`, for where there is little room.
pub(super) fn amount(bytes: &u64) -> (String, &'static str) {
    let mut amount = *bytes as f64;
    for unit in ["B", "KiB", "MiB"] {
        if amount < 1000.0 {
            return (digits(amount), unit);
        }
        amount /= 1024.0;
    }
    (digits(amount), "GiB")
}

/// Three of them, or more where they stand before the point.
fn digits(number: f64) -> String {
    let after_point = match number {
        few if few < 10.0 => 2,
        some if some < 100.0 => 1,
        _ => 0,
    };
    format!("{number:.after_point$}")
}

/// The word for so many.
pub(super) fn plural(count: &u64, one: &'static str, more: &'static str) -> &'static str {
    if *count == 1 { one } else { more }
}

/// How many a second.
pub(super) fn per_s(per_s: &f64) -> String {
    match *per_s {
        few if few < 10.0 && few > 0.0 => format!("{few:.1}"),
        many => HumanCount(many.round() as u64).to_string(),
    }
}

/// How many requests a second.
pub(super) fn rate(route: &Option<&RouteTraffic>) -> String {
    route.map_or_else(|| "–".to_owned(), |route| per_s(&route.per_s))
}

/// What they took.
pub(super) fn latencies(route: &Option<&RouteTraffic>) -> String {
    let Some(route) = route else {
        return "not measured yet".to_owned();
    };
    match (route.latency_s_p50, route.latency_s_p99) {
        (Some(p50), Some(p99)) => format!("p50\u{a0}{}, p99\u{a0}{}", short(&p50), short(&p99)),
        _ => "none lately".to_owned(),
    }
}

/// In whole seconds, as `1h 2m 3s`.
pub(super) fn duration(seconds: &f64) -> String {
    self::seconds(&(*seconds as u64))
}

/// The same.
pub(super) fn seconds(seconds: &u64) -> String {
    humantime::format_duration(Duration::from_secs(*seconds)).to_string()
}

/// With the unit that fits, as `81.3 µs`; a line does not end within it.
pub(super) fn short(seconds: &f64) -> String {
    let (value, unit) = match *seconds {
        s if s < 0.001 => (s * 1e6, "µs"),
        s if s < 1.0 => (s * 1e3, "ms"),
        s => (s, "s"),
    };
    format!("{}\u{a0}{unit}", digits(value))
}

/// How much of a restore whose size is known is done.
pub(super) fn percent(restore: &RestoreStatus) -> Option<u64> {
    let share = (restore.rows * 100).checked_div(restore.rows_expected)?;
    (!restore.done).then_some(share.min(100))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_the_unit_that_fits() {
        for (seconds, wanted) in [
            (0.0, "0.00 µs"),
            (0.000_081_26, "81.3 µs"),
            (0.000_999, "999 µs"),
            (0.001, "1.00 ms"),
            (0.25, "250 ms"),
            (1.0, "1.00 s"),
            (10.0, "10.0 s"),
        ] {
            assert_eq!(short(&seconds).replace('\u{a0}', " "), wanted);
        }
        assert_eq!(duration(&3723.9), "1h 2m 3s");
        assert_eq!(count(&1_234_567).to_string(), "1,234,567");
        assert_eq!(bytes(&(3 << 19)).to_string(), "1.50 MiB");
        assert_eq!(amount(&(3 << 19)), ("1.50".to_owned(), "MiB"));
        assert_eq!(amount(&1023), ("1.00".to_owned(), "KiB"));
        assert_eq!(amount(&(5 << 40)), ("5120".to_owned(), "GiB"));
        let at = |per_s| RouteTraffic {
            answered: 1,
            per_s,
            latency_s_p50: Some(0.000_1),
            latency_s_p99: Some(0.002),
        };
        for (per_s, wanted) in [
            (0.0, "0"),
            (0.04, "0.0"),
            (2.25, "2.2"),
            (98_765.4, "98,765"),
        ] {
            assert_eq!(rate(&Some(&at(per_s))), wanted);
        }
        assert_eq!(rate(&None), "–");
        let said = latencies(&Some(&at(1.0))).replace('\u{a0}', " ");
        assert_eq!(said, "p50 100 µs, p99 2.00 ms");
    }
}
