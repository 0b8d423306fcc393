//! Rates and latencies of the read and write port over the last seconds.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::Serialize;

use crate::http::instrument::HttpMetrics;
use crate::http::latency::LatencyCounts;

/// How often the counters are sampled.
const SAMPLE_EVERY: Duration = Duration::from_secs(1);
/// Samples in the window: ten seconds. That is long enough to show a single request, and short enough
/// to show changes soon.
const SAMPLES: usize = 11;

/// Samples of the request counters. Clones share them.
#[derive(Clone, Default)]
pub struct RecentTraffic(Arc<Mutex<VecDeque<Sample>>>);

/// Rates and latencies over the last seconds.
#[derive(Debug, Serialize)]
pub struct Traffic {
    /// The length of the window.
    pub window_s: f64,
    /// `GET /get`.
    pub reads: RouteTraffic,
    /// `POST /set`.
    pub writes: RouteTraffic,
}

/// Rate and latencies of one route.
#[derive(Debug, PartialEq, Serialize)]
pub struct RouteTraffic {
    /// Answered requests since the start, with any status.
    pub answered: u64,
    /// Answered requests per second.
    pub per_s: f64,
    /// Median latency, interpolated; `null` without requests.
    pub latency_s_p50: Option<f64>,
    /// 99th percentile of the latency, interpolated; `null` without requests.
    pub latency_s_p99: Option<f64>,
}

struct Sample {
    at: Instant,
    reads: LatencyCounts,
    writes: LatencyCounts,
}

impl RecentTraffic {
    /// Samples `metrics` every `SAMPLE_EVERY`; never returns.
    pub async fn watch(&self, metrics: &HttpMetrics) {
        let mut every = tokio::time::interval(SAMPLE_EVERY);
        loop {
            every.tick().await;
            self.sample(Instant::now(), metrics);
        }
    }

    /// The traffic between the oldest and the newest sample; `None` until there are two samples, and
    /// if metrics are disabled.
    #[must_use]
    pub fn now(&self) -> Option<Traffic> {
        let samples = self.0.lock();
        let (first, last) = (samples.front()?, samples.back()?);
        let window_s = (last.at - first.at).as_secs_f64();
        (window_s > 0.0).then(|| Traffic {
            window_s,
            reads: RouteTraffic::between(&first.reads, &last.reads, window_s),
            writes: RouteTraffic::between(&first.writes, &last.writes, window_s),
        })
    }

    fn sample(&self, at: Instant, metrics: &HttpMetrics) {
        let Some([reads, writes]) = metrics.reads_and_writes() else {
            return;
        };
        let mut samples = self.0.lock();
        if samples.len() == SAMPLES {
            samples.pop_front();
        }
        samples.push_back(Sample { at, reads, writes });
    }
}

impl RouteTraffic {
    fn between(first: &LatencyCounts, last: &LatencyCounts, window_s: f64) -> Self {
        let recent = last.since(first);
        Self {
            answered: last.all(),
            per_s: recent.all() as f64 / window_s,
            latency_s_p50: recent.quantile_s(0.5),
            latency_s_p99: recent.quantile_s(0.99),
        }
    }
}

#[cfg(test)]
mod tests {
    use metrics::Counter;

    use super::*;

    #[test]
    fn computes_rates_and_latencies_over_ten_seconds() {
        let (recent, metrics) = (RecentTraffic::default(), HttpMetrics::disabled());
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        recent.sample(at(0), &metrics);
        recent.sample(at(1), &metrics);
        assert!(recent.now().is_none());

        let metrics = HttpMetrics::new(|_, _| Counter::noop());
        let read = |times| (0..times).for_each(|_| metrics.record_read(Duration::from_micros(10)));
        read(1000);
        recent.sample(at(0), &metrics);
        assert!(recent.now().is_none());
        read(100);
        recent.sample(at(5), &metrics);
        let now = recent.now().unwrap();
        assert!((now.window_s - 5.0).abs() < 1e-9);
        assert_eq!(now.reads.answered, 1100);
        assert!((now.reads.per_s - 20.0).abs() < 1e-9);
        let near = |found: Option<f64>, wanted: f64| (found.unwrap() - wanted).abs() < 1e-9;
        assert!(near(now.reads.latency_s_p50, 0.000_05 * 0.5));
        assert!(near(now.reads.latency_s_p99, 0.000_05 * 0.99));
        let none = RouteTraffic {
            answered: 0,
            per_s: 0.0,
            latency_s_p50: None,
            latency_s_p99: None,
        };
        assert_eq!(now.writes, none);

        // Requests before the window do not count.
        for seconds in 6..16 {
            recent.sample(at(seconds), &metrics);
        }
        let now = recent.now().unwrap();
        assert!((now.window_s - 10.0).abs() < 1e-9);
        assert!(now.reads.per_s.abs() < 1e-9 && now.reads.latency_s_p50.is_none());
        assert_eq!(now.reads.answered, 1100);
    }
}
