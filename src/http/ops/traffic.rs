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
    /// Requests of the read and write port that were rejected.
    pub rejected: Rejected,
}

/// Requests that were rejected: answered with an error other than 404.
#[derive(Debug, PartialEq, Serialize)]
pub struct Rejected {
    /// Client errors (4xx) since the start.
    pub client_errors: u64,
    /// Server errors (5xx) since the start.
    pub server_errors: u64,
    /// Both per second.
    pub per_s: f64,
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
    /// Client and server errors.
    rejected: [u64; 2],
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
            rejected: Rejected::between(first.rejected, last.rejected, window_s),
        })
    }

    fn sample(&self, at: Instant, metrics: &HttpMetrics) {
        let Some([reads, writes]) = metrics.reads_and_writes() else {
            return;
        };
        let rejected = metrics.rejections.counts();
        let mut samples = self.0.lock();
        if samples.len() == SAMPLES {
            samples.pop_front();
        }
        samples.push_back(Sample {
            at,
            reads,
            writes,
            rejected,
        });
    }
}

impl Rejected {
    fn between(first: [u64; 2], last: [u64; 2], window_s: f64) -> Self {
        let [client_errors, server_errors] = last;
        let recent = last.iter().sum::<u64>() - first.iter().sum::<u64>();
        Self {
            client_errors,
            server_errors,
            per_s: recent as f64 / window_s,
        }
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
    use http::StatusCode;
    use metrics::Counter;

    use super::*;
    use crate::http::route::Route;

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
        let answer = |route, status| metrics.rejections.record(route, status);
        answer(Route::Backup, StatusCode::UNAUTHORIZED);
        read(1000);
        recent.sample(at(0), &metrics);
        assert!(recent.now().is_none());
        answer(Route::SetLines, StatusCode::UNAUTHORIZED);
        answer(Route::Backup, StatusCode::SERVICE_UNAVAILABLE);
        // These do not count as rejected.
        answer(Route::Other, StatusCode::NOT_FOUND);
        answer(Route::Readyz, StatusCode::SERVICE_UNAVAILABLE);
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
        assert_eq!(
            (now.rejected.client_errors, now.rejected.server_errors),
            (2, 1)
        );
        assert!((now.rejected.per_s - 0.4).abs() < 1e-9);

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
