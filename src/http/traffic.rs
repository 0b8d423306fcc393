//! What the data ports have answered in the last seconds: how much, and how fast.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::Serialize;

use super::observe::{LATENCY_BUCKETS_S, LATENCY_METRIC};
use crate::telemetry::Telemetry;

/// How often the histograms are looked at.
const SAMPLE_EVERY: Duration = Duration::from_secs(1);
/// Over how many looks a rate is taken: ten seconds, in which even a lone request shows, and a change
/// shows soon.
const SAMPLES: usize = 11;
/// One for each bound, and one above.
const BUCKETS: usize = LATENCY_BUCKETS_S.len() + 1;

/// Knows what was answered lately. Clones are the same.
#[derive(Clone, Default)]
pub struct RecentTraffic(Arc<Mutex<VecDeque<Sample>>>);

/// What was answered in the last seconds.
#[derive(Debug, Serialize)]
pub struct Traffic {
    /// How many seconds.
    pub window_s: f64,
    /// `GET /get`.
    pub reads: RouteTraffic,
    /// `POST /set`.
    pub writes: RouteTraffic,
}

/// One route's.
#[derive(Debug, PartialEq, Serialize)]
pub struct RouteTraffic {
    /// Requests answered since the start, with whatever status.
    pub answered: u64,
    /// Requests answered a second.
    pub per_s: f64,
    /// What half of them took at most, about; `null` if there was none.
    pub latency_s_p50: Option<f64>,
    /// What 99 of 100 of them took at most, about; `null` if there was none.
    pub latency_s_p99: Option<f64>,
}

struct Sample {
    at: Instant,
    reads: Counts,
    writes: Counts,
}

/// How many requests took at most as long as each bound says; the last one is all.
#[derive(Debug, Clone, Copy, Default)]
struct Counts([u64; BUCKETS]);

impl RecentTraffic {
    /// Looks at what `telemetry` has measured, for ever.
    pub async fn watch(&self, telemetry: &Telemetry) {
        let mut every = tokio::time::interval(SAMPLE_EVERY);
        loop {
            every.tick().await;
            self.sample(Instant::now(), &telemetry.render_metrics());
        }
    }

    /// What was answered lately; `None` until it has been looked at twice, and where nothing is
    /// counted.
    #[must_use]
    pub fn now(&self) -> Option<Traffic> {
        let samples = self.0.lock();
        let (first, last) = (samples.front()?, samples.back()?);
        let window_s = (last.at - first.at).as_secs_f64();
        (window_s > 0.0).then(|| Traffic {
            window_s,
            reads: last.reads.since(&first.reads, window_s),
            writes: last.writes.since(&first.writes, window_s),
        })
    }

    fn sample(&self, at: Instant, metrics: &str) {
        let counts = |route| Counts::of(route, metrics);
        let (Some(reads), Some(writes)) = (counts("/get"), counts("/set")) else {
            return;
        };
        let mut samples = self.0.lock();
        if samples.len() == SAMPLES {
            samples.pop_front();
        }
        samples.push_back(Sample { at, reads, writes });
    }
}

impl Counts {
    /// Those of a route in Prometheus' text format, which the recorder gives and nothing else. None
    /// is there before the route's first request, nor where nothing is counted.
    fn of(route: &str, metrics: &str) -> Option<Self> {
        let line = format!("{LATENCY_METRIC}_bucket{{route=\"{route}\",");
        let mut counts = Self::default();
        let mut lines = metrics.lines().filter(|text| text.starts_with(&line));
        for count in &mut counts.0 {
            let (_, value) = lines.next()?.rsplit_once(' ')?;
            *count = value.parse().ok()?;
        }
        Some(counts)
    }

    fn all(&self) -> u64 {
        self.0.last().copied().unwrap_or_default()
    }

    fn since(&self, before: &Self, window_s: f64) -> RouteTraffic {
        let mut recent = Self::default();
        let both = self.0.iter().zip(&before.0);
        for (recent, (now, before)) in recent.0.iter_mut().zip(both) {
            *recent = now.saturating_sub(*before);
        }
        RouteTraffic {
            answered: self.all(),
            per_s: recent.all() as f64 / window_s,
            latency_s_p50: recent.quantile(0.5),
            latency_s_p99: recent.quantile(0.99),
        }
    }

    /// As Prometheus' `histogram_quantile` has it: within a bucket all values are taken to be
    /// equally likely, and what is above the last bound to be at it.
    fn quantile(&self, part: f64) -> Option<f64> {
        if self.all() == 0 {
            return None;
        }
        let rank = part * self.all() as f64;
        let (mut bound_before, mut count_before) = (0.0, 0.0);
        for (bound, count) in LATENCY_BUCKETS_S.iter().zip(self.0) {
            let count = count as f64;
            if count >= rank {
                let within = (rank - count_before) / (count - count_before);
                return Some(bound_before + (bound - bound_before) * within);
            }
            (bound_before, count_before) = (*bound, count);
        }
        Some(bound_before)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the recorder gives of `/get` and `/set` with so many requests up to each bound.
    fn metrics(reads: &[u64], writes: &[u64]) -> String {
        let of = |route: &str, counts: &[u64]| -> String {
            let last = counts.last().copied().unwrap();
            let bounds = LATENCY_BUCKETS_S.iter().map(f64::to_string);
            let bounds = bounds.chain(["+Inf".to_owned()]).enumerate();
            let line = |(index, bound)| {
                let count = counts.get(index).copied().unwrap_or(last);
                format!("{LATENCY_METRIC}_bucket{{route=\"{route}\",le=\"{bound}\"}} {count}\n")
            };
            bounds.map(line).collect()
        };
        format!("# TYPE x\n{}{}", of("/get", reads), of("/set", writes))
    }

    #[test]
    fn rates_and_latencies_are_those_of_the_last_ten_seconds() {
        let recent = RecentTraffic::default();
        let begun = Instant::now();
        let at = |seconds| begun + Duration::from_secs(seconds);
        recent.sample(at(0), "nothing is counted");
        assert!(recent.now().is_none());
        recent.sample(at(0), &metrics(&[1000], &[0]));
        assert!(recent.now().is_none());

        // 98 within 50 µs, one within 100 µs, one beyond all bounds.
        let mut slow = vec![1098];
        slow.resize(BUCKETS - 1, 1099);
        slow.push(1100);
        recent.sample(at(5), &metrics(&slow, &[0]));
        let now = recent.now().unwrap();
        assert!((now.window_s - 5.0).abs() < 1e-9);
        assert_eq!(now.reads.answered, 1100);
        assert!((now.reads.per_s - 20.0).abs() < 1e-9);
        let near = |found: Option<f64>, wanted: f64| (found.unwrap() - wanted).abs() < 1e-9;
        assert!(near(now.reads.latency_s_p50, 0.000_05 * 50.0 / 98.0));
        assert!(near(now.reads.latency_s_p99, 0.000_1));
        let none = RouteTraffic {
            answered: 0,
            per_s: 0.0,
            latency_s_p50: None,
            latency_s_p99: None,
        };
        assert_eq!(now.writes, none);

        // What was before does not count any more.
        for seconds in 6..16 {
            recent.sample(at(seconds), &metrics(&slow, &[0]));
        }
        let now = recent.now().unwrap();
        assert!((now.window_s - 10.0).abs() < 1e-9);
        assert!(now.reads.per_s.abs() < 1e-9 && now.reads.latency_s_p50.is_none());
        assert_eq!(now.reads.answered, 1100);
        let beyond = Counts(
            [0; BUCKETS - 1]
                .into_iter()
                .chain([1])
                .collect::<Vec<_>>()
                .try_into()
                .unwrap(),
        );
        assert!(near(beyond.quantile(0.5), 10.0));
    }
}
