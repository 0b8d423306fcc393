//! The log line of a request that failed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use http::{HeaderValue, StatusCode};
use parking_lot::Mutex;

/// How many lines a second are logged at most. While a broker is away every write fails, and a log that
/// says so a hundred thousand times a second hides the rest, and fills a disk.
const LINES_PER_S_MAX: u32 = 10;

/// What an answer tells of its failure, among its extensions.
#[derive(Debug, Clone)]
pub(super) struct Failure {
    /// The word that ends its `type`.
    pub(super) problem: &'static str,
    pub(super) detail: Arc<str>,
}

impl Failure {
    /// Whether an answer with `status` is told of: to tell costs, and most that fail are the client's
    /// mistake.
    pub(super) fn is_told(status: StatusCode) -> bool {
        is_grave(status) || tracing::enabled!(tracing::Level::DEBUG)
    }
}

fn is_grave(status: StatusCode) -> bool {
    // When the store is full that is logged once, by who measures its memory.
    let full = status == StatusCode::INSUFFICIENT_STORAGE;
    status.is_server_error() && !full || status == StatusCode::UNAUTHORIZED
}

/// Logs failures, as many as anybody can read.
#[derive(Default)]
pub(super) struct FailureLog(Mutex<Told>);

#[derive(Default)]
struct Told {
    /// When the second began that `lines` counts in.
    since: Option<Instant>,
    lines: u32,
    /// What was not logged since the last line.
    unlogged: u64,
}

/// A request that failed.
pub(super) struct Failed<'a> {
    pub(super) route: &'static str,
    pub(super) status: StatusCode,
    pub(super) request_id: &'a HeaderValue,
    pub(super) took: Duration,
    /// Whether to fail is an answer like others: a node that is asked whether it is ready.
    pub(super) expected: bool,
}

impl FailureLog {
    #[expect(clippy::expect_used, reason = "an invariant of `request_id`")]
    pub(super) fn tell(&self, failed: &Failed<'_>, failure: &Failure) {
        let Failure { problem, detail } = failure;
        let (route, status) = (failed.route, failed.status.as_u16());
        let request_id = failed.request_id.to_str();
        let request_id = request_id.expect("`request_id` takes and makes only ASCII");
        let took_ms = failed.took.as_millis() as u64;
        if failed.status == StatusCode::INTERNAL_SERVER_ERROR {
            // Each is a fault of this program.
            tracing::error!(request_id, route, status, problem, %detail, took_ms, "request failed");
        } else if failed.expected || !is_grave(failed.status) {
            tracing::debug!(request_id, route, status, problem, %detail, took_ms, "request failed");
        } else if let Some(unlogged) = self.line(Instant::now()) {
            tracing::warn!(
                request_id, route, status, problem, %detail, took_ms, unlogged, "request failed"
            );
        }
    }

    /// Whether a line may be logged now; if so, how many were not since the last one.
    fn line(&self, now: Instant) -> Option<u64> {
        let mut told = self.0.lock();
        let second = Duration::from_secs(1);
        if told
            .since
            .is_none_or(|since| now.saturating_duration_since(since) >= second)
        {
            (told.since, told.lines) = (Some(now), 0);
        }
        if told.lines == LINES_PER_S_MAX {
            told.unlogged += 1;
            return None;
        }
        told.lines += 1;
        Some(std::mem::take(&mut told.unlogged))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_too_much_to_read_is_counted() {
        let log = FailureLog::default();
        let begun = Instant::now();
        for _ in 0..LINES_PER_S_MAX {
            assert_eq!(log.line(begun), Some(0));
        }
        for _ in 0..7 {
            assert_eq!(log.line(begun + Duration::from_millis(999)), None);
        }
        assert_eq!(log.line(begun + Duration::from_secs(1)), Some(7));
        assert_eq!(log.line(begun + Duration::from_secs(1)), Some(0));
    }
}
