//! Latency histograms of requests.
//!
//! A histogram of the `metrics` recorder reads the clock for each sample and stores all samples until
//! they are sorted into buckets, once per second. These histograms count a request in its bucket at
//! once. ADR 0002 has the measurements.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const LATENCY_METRIC: &str = "gradestore_http_request_duration_seconds";
const HELP: &str = "Time from the header of a request to its response, by route.";

/// Upper bounds of the buckets: from 50 µs, below which a request is mostly system calls, in steps of
/// about 2, to 10 s, the default of `--write-timeout`.
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
/// One bucket for each bound, and one above the last.
const BUCKETS: usize = BOUNDS_NS.len() + 1;

/// The latency histogram of one route.
#[derive(Default)]
pub(super) struct Latency {
    /// Not cumulative: each request is in one of them.
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

    pub(super) fn counts(&self) -> LatencyCounts {
        let mut all = 0;
        LatencyCounts(self.buckets.each_ref().map(|bucket| {
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

/// Appends the histograms of all `routes` that have had a request, in Prometheus' text format.
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

/// Cumulative counts of requests by bound. The last one counts all requests.
#[derive(Debug, Clone, Copy)]
pub(super) struct LatencyCounts([u64; BUCKETS]);

impl LatencyCounts {
    pub(super) fn all(&self) -> u64 {
        let [.., all] = self.0;
        all
    }

    /// The counts of the requests after `before`.
    pub(super) fn since(&self, before: &Self) -> Self {
        let mut since = *self;
        for (count, before) in since.0.iter_mut().zip(before.0) {
            *count = count.saturating_sub(before);
        }
        since
    }

    /// A quantile in seconds, computed as in Prometheus' `histogram_quantile`: values are uniformly
    /// distributed within a bucket, and values above the last bound count as that bound. `None`
    /// without requests.
    pub(super) fn quantile_s(&self, quantile: f64) -> Option<f64> {
        if self.all() == 0 {
            return None;
        }
        let rank = quantile * self.all() as f64;
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
    fn counts_a_request_in_the_bucket_of_the_lowest_bound_that_includes_it() {
        let latency = Latency::default();
        for ns in [0, 50_000, 50_001, 10_000_000_000, 10_000_000_001] {
            latency.record(Duration::from_nanos(ns));
        }
        latency.record(Duration::from_secs(60));
        let mut text = String::new();
        let unused = Latency::default();
        let routes = [("/get", &latency), ("/set", &unused)];
        render(routes.into_iter(), &mut text).unwrap();
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
    fn computes_quantiles_of_recent_requests() {
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
        let near =
            |quantile, wanted: f64| (since.quantile_s(quantile).unwrap() - wanted).abs() < 1e-9;
        assert!(near(0.5, 0.000_05 * 50.0 / 98.0));
        assert!(near(0.99, 0.000_1));
        assert!(near(1.0, 10.0));
    }
}
