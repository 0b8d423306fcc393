//! Formats values for the status page. All take references, because templates pass references.

use std::time::Duration;

use indicatif::{BinaryBytes, HumanCount};

use crate::http::ops::status::RestoreStatus;
use crate::http::ops::traffic::RouteTraffic;

/// `1,234,567`.
pub(super) fn count(count: &u64) -> HumanCount {
    HumanCount(*count)
}

/// `1.50 MiB`.
pub(super) fn bytes(bytes: &u64) -> BinaryBytes {
    BinaryBytes(*bytes)
}

/// A size in three digits and its unit: `1.50` and `MiB`.
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

/// At least three digits.
fn digits(number: f64) -> String {
    let decimals = match number {
        number if number < 10.0 => 2,
        number if number < 100.0 => 1,
        _ => 0,
    };
    format!("{number:.decimals$}")
}

/// A name such as `catching-up` as a title: `Catching up`. The names of states have no other form on
/// the page.
pub(super) fn title(name: &str) -> String {
    let mut chars = name.chars();
    let first = chars.next().into_iter().flat_map(char::to_uppercase);
    first.chain(chars).collect::<String>().replace('-', " ")
}

pub(super) fn plural(count: &u64, one: &'static str, more: &'static str) -> &'static str {
    if *count == 1 { one } else { more }
}

/// A rate: `2.2`, or `98,765`.
pub(super) fn per_s(per_s: &f64) -> String {
    match *per_s {
        rate if rate < 10.0 && rate > 0.0 => format!("{rate:.1}"),
        rate => HumanCount(rate.round() as u64).to_string(),
    }
}

/// Requests per second.
pub(super) fn rate(route: &Option<&RouteTraffic>) -> String {
    route.map_or_else(|| "–".to_owned(), |route| per_s(&route.per_s))
}

/// The window of a rate: `in the last 10 s`.
pub(super) fn window(window_s: &Option<f64>) -> String {
    window_s.map_or_else(String::new, |window_s| {
        format!("in the last {window_s:.0}\u{a0}s")
    })
}

/// A time as [`rfc3339`](crate::backup::rfc3339) prints it: `2026-01-31 23:59:59 UTC`.
pub(super) fn utc(rfc3339: &str) -> String {
    rfc3339.replace('T', " ").replace('Z', " UTC")
}

/// The latencies of recent requests.
pub(super) fn latencies(route: &Option<&RouteTraffic>) -> String {
    let Some(route) = route else {
        return "not measured yet".to_owned();
    };
    match (route.latency_s_p50, route.latency_s_p99) {
        (Some(p50), Some(p99)) => format!("p50\u{a0}{}, p99\u{a0}{}", short(&p50), short(&p99)),
        _ => "no requests".to_owned(),
    }
}

/// Whole seconds, as `1h 2m 3s`.
pub(super) fn duration(seconds: &f64) -> String {
    self::seconds(&(*seconds as u64))
}

/// Seconds, as `1h 2m 3s`.
pub(super) fn seconds(seconds: &u64) -> String {
    humantime::format_duration(Duration::from_secs(*seconds)).to_string()
}

/// A short time with its unit, as `81.3 µs`, with a no-break space.
pub(super) fn short(seconds: &f64) -> String {
    let (value, unit) = match *seconds {
        s if s < 0.001 => (s * 1e6, "µs"),
        s if s < 1.0 => (s * 1e3, "ms"),
        s => (s, "s"),
    };
    format!("{}\u{a0}{unit}", digits(value))
}

/// The progress of a restore; `None` if it is done or its size is unknown.
pub(super) fn percent(restore: &RestoreStatus) -> Option<u64> {
    let share = restore
        .rows
        .saturating_mul(100)
        .checked_div(restore.rows_expected)?;
    (!restore.done).then_some(share.min(100))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_numbers_with_units() {
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
        let window = |window_s| window(&window_s).replace('\u{a0}', " ");
        assert_eq!(window(Some(9.98)), "in the last 10 s");
        assert_eq!(window(None), "");
        assert_eq!(utc("2026-01-31T23:59:59Z"), "2026-01-31 23:59:59 UTC");
        let text = latencies(&Some(&at(1.0))).replace('\u{a0}', " ");
        assert_eq!(text, "p50 100 µs, p99 2.00 ms");
    }

    #[test]
    fn formats_names_as_titles() {
        for (name, wanted) in [("catching-up", "Catching up"), ("éa", "Éa"), ("", "")] {
            assert_eq!(title(name), wanted);
        }
    }
}
