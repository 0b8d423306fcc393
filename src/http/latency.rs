//! How long requests took, counted by bounds.
//!
//! A histogram of the recorder keeps each sample, with a time that it asks a clock for, until all are
//! sorted in a second later. Here a request is counted at once, in the one place where it belongs. ADR 0002
//! has the measurements.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The name of the histograms.
const LATENCY_METRIC: &str = "gradestore_http_request_duration_seconds";
const HELP: &str = "Time from a request's header to its answer, by route.";

/// Upper bounds. From 50 µs, below which a request is mostly system calls, in steps of about 2, to 10 s, the
/// longest wait that is allowed by default.
const BOUNDS_NS: [u64; 18] = [
    50_000,
    100_000,
    200_000,
    400_000,
    800_000,
    1_500_000,
    3_000_000,
    6_000_000,
    12_000_000,
    25_000_000,
    50_000_000,
    100_000_000,
    250_000_000,
    500_000_000,
    1_000_000_000,
    2_500_000_000,
    5_000_000_000,
    10_000_000_000,
];
/// One for each bound, and one above.
const BUCKETS: usize = BOUNDS_NS.len() + 1;

/// How long the requests of one route took.
#[derive(Default)]
pub(super) struct Latency {
    /// Each request is in one of them.
    buckets: [AtomicU64; BUCKETS],
    sum_ns: AtomicU64,
}

impl Latency {
    #[expect(
        clippy::indexing_slicing,
        reason = "there is one bucket more than bounds"
    )]
    pub(super) fn record(&self, took: Duration) {
        let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        let bucket = BOUNDS_NS.iter().position(|bound| ns <= *bound);
        self.buckets[bucket.unwrap_or(BOUNDS_NS.len())].fetch_add(1, Ordering::Relaxed);
        self.sum_ns.fetch_add(ns, Ordering::Relaxed);
    }

    pub(super) fn counts(&self) -> Counts {
        let mut all = 0;
        Counts(self.buckets.each_ref().map(|bucket| {
            all += bucket.load(Ordering::Relaxed);
            all
        }))
    }

    fn render(&self, route: &str, out: &mut String) -> std::fmt::Result {
        let counts = self.counts();
        for (count, bound) in counts.0.iter().zip(BOUNDS_NS) {
            let bound_s = seconds(bound);
            writeln!(
                out,
                "{LATENCY_METRIC}_bucket{{route=\"{route}\",le=\"{bound_s}\"}} {count}"
            )?;
        }
        let all = counts.all();
        let sum_s = seconds(self.sum_ns.load(Ordering::Relaxed));
        writeln!(
            out,
            "{LATENCY_METRIC}_bucket{{route=\"{route}\",le=\"+Inf\"}} {all}\n\
             {LATENCY_METRIC}_sum{{route=\"{route}\"}} {sum_s}\n\
             {LATENCY_METRIC}_count{{route=\"{route}\"}} {all}"
        )
    }
}

/// Appends the histograms of those `routes` that were asked for, in Prometheus' text format.
pub(super) fn render<'a>(
    routes: impl Iterator<Item = (&'a str, &'a Latency)>,
    out: &mut String,
) -> std::fmt::Result {
    writeln!(out, "# HELP {LATENCY_METRIC} {HELP}")?;
    writeln!(out, "# TYPE {LATENCY_METRIC} histogram")?;
    for (route, latency) in routes.filter(|(_, latency)| latency.counts().all() > 0) {
        latency.render(route, out)?;
    }
    writeln!(out)
}

fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}

/// How many requests took at most as long as each bound says; the last one is all.
#[derive(Debug, Clone, Copy)]
pub(super) struct Counts([u64; BUCKETS]);

impl Counts {
    pub(super) fn all(&self) -> u64 {
        let [.., all] = self.0;
        all
    }

    /// Those that came after `before`.
    pub(super) fn since(&self, before: &Self) -> Self {
        let mut since = *self;
        for (count, before) in since.0.iter_mut().zip(before.0) {
            *count = count.saturating_sub(before);
        }
        since
    }

    /// As Prometheus' `histogram_quantile` has it, in seconds: within a bucket all values are taken to be
    /// equally likely, and what is above the last bound to be at it. `None` if there are none.
    pub(super) fn quantile_s(&self, part: f64) -> Option<f64> {
        if self.all() == 0 {
            return None;
        }
        let rank = part * self.all() as f64;
        let (mut bound_before, mut count_before) = (0.0, 0.0);
        for (bound, count) in BOUNDS_NS.into_iter().zip(self.0) {
            let (bound, count) = (seconds(bound), count as f64);
            if count >= rank {
                let within = (rank - count_before) / (count - count_before);
                return Some(bound_before + (bound - bound_before) * within);
            }
            (bound_before, count_before) = (bound, count);
        }
        Some(bound_before)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_in_the_bucket_of_the_first_bound_that_is_not_below_it() {
        let latency = Latency::default();
        for ns in [0, 50_000, 50_001, 10_000_000_000, 10_000_000_001] {
            latency.record(Duration::from_nanos(ns));
        }
        latency.record(Duration::from_secs(60));
        let mut text = String::new();
        let (asked, never) = (latency, Latency::default());
        render([("/get", &asked), ("/set", &never)].into_iter(), &mut text).unwrap();
        let line = |end: &str| {
            let line = format!("{LATENCY_METRIC}_{end}\n");
            assert!(text.contains(&line), "{line}{text}");
        };
        line("bucket{route=\"/get\",le=\"0.00005\"} 2");
        line("bucket{route=\"/get\",le=\"0.0001\"} 3");
        line("bucket{route=\"/get\",le=\"5\"} 3");
        line("bucket{route=\"/get\",le=\"10\"} 4");
        line("bucket{route=\"/get\",le=\"+Inf\"} 6");
        line("sum{route=\"/get\"} 80.000100002");
        line("count{route=\"/get\"} 6");
        assert!(!text.contains("/set"), "{text}");
    }

    #[test]
    fn quantiles_of_what_came_since() {
        let latency = Latency::default();
        let many = |count: u64, us: u64| {
            (0..count).for_each(|_| latency.record(Duration::from_micros(us)));
        };
        many(1000, 700_000);
        let before = latency.counts();
        assert!(before.since(&before).quantile_s(0.5).is_none());
        // 98 within 50 µs, one within 100 µs, one beyond all bounds.
        many(98, 10);
        many(1, 90);
        many(1, 11_000_000);
        let since = latency.counts().since(&before);
        assert_eq!(since.all(), 100);
        let near = |part, wanted: f64| (since.quantile_s(part).unwrap() - wanted).abs() < 1e-9;
        assert!(near(0.5, 0.000_05 * 50.0 / 98.0));
        assert!(near(0.99, 0.000_1));
        assert!(near(1.0, 10.0));
    }
}
