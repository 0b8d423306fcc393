//! Logs failed requests, at a limited rate.

use std::sync::Arc;
use std::time::{Duration, Instant};

use http::{HeaderValue, StatusCode};
use parking_lot::Mutex;

/// The maximum number of log lines per second. While NATS is unreachable every write fails: 100,000
/// lines per second would hide all others and fill the disk.
const LINES_PER_S_MAX: u32 = 10;

/// An error in the extensions of its response, for the log.
#[derive(Debug, Clone)]
pub(super) struct ErrorDetail {
    /// The last part of the `type` of the response.
    pub(super) problem: &'static str,
    pub(super) detail: Arc<str>,
}

impl ErrorDetail {
    /// Whether a response with `status` carries an error for the log. Most errors are mistakes of
    /// clients, and are not worth the cost.
    pub(super) fn is_logged(status: StatusCode) -> bool {
        is_warning(status) || tracing::enabled!(tracing::Level::DEBUG)
    }
}

fn is_warning(status: StatusCode) -> bool {
    // `MemoryGuard` logs once that the store is full.
    let full = status == StatusCode::INSUFFICIENT_STORAGE;
    status.is_server_error() && !full || status == StatusCode::UNAUTHORIZED
}

/// Logs failed requests, up to [`LINES_PER_S_MAX`].
#[derive(Default)]
pub(super) struct ErrorLog(Mutex<LogBudget>);

#[derive(Default)]
struct LogBudget {
    /// The beginning of the current second; `None` before the first line.
    since: Option<Instant>,
    /// Lines in the current second.
    lines: u32,
    /// Lines omitted since the last one.
    unlogged: u64,
}

/// The log fields of a failed request.
pub(super) struct FailedRequest<'a> {
    pub(super) route: &'static str,
    pub(super) status: StatusCode,
    pub(super) request_id: &'a HeaderValue,
    pub(super) took: Duration,
    /// Whether an error is a normal response, as for a readiness check.
    pub(super) expected: bool,
}

impl ErrorLog {
    #[expect(clippy::expect_used, reason = "an invariant of `request_id`")]
    pub(super) fn log(&self, failed: &FailedRequest<'_>, error: &ErrorDetail) {
        let ErrorDetail { problem, detail } = error;
        let (route, status) = (failed.route, failed.status.as_u16());
        let request_id = failed.request_id.to_str();
        let request_id = request_id.expect("request ids are ASCII");
        let took_ms = failed.took.as_millis() as u64;
        if failed.status == StatusCode::INTERNAL_SERVER_ERROR {
            // Each is a bug.
            tracing::error!(request_id, route, status, problem, %detail, took_ms, "request failed");
        } else if failed.expected || !is_warning(failed.status) {
            tracing::debug!(request_id, route, status, problem, %detail, took_ms, "request failed");
        } else if let Some(unlogged) = self.line(Instant::now()) {
            tracing::warn!(
                request_id, route, status, problem, %detail, took_ms, unlogged, "request failed"
            );
        }
    }

    /// Takes a line from the budget. Returns how many lines were omitted since the last one, or `None`
    /// if the budget is used up.
    fn line(&self, now: Instant) -> Option<u64> {
        let mut budget = self.0.lock();
        let second = Duration::from_secs(1);
        if budget
            .since
            .is_none_or(|since| now.saturating_duration_since(since) >= second)
        {
            (budget.since, budget.lines) = (Some(now), 0);
        }
        if budget.lines == LINES_PER_S_MAX {
            budget.unlogged += 1;
            return None;
        }
        budget.lines += 1;
        Some(std::mem::take(&mut budget.unlogged))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_the_lines_that_it_omits() {
        let log = ErrorLog::default();
        let start = Instant::now();
        for _ in 0..LINES_PER_S_MAX {
            assert_eq!(log.line(start), Some(0));
        }
        for _ in 0..7 {
            assert_eq!(log.line(start + Duration::from_millis(999)), None);
        }
        assert_eq!(log.line(start + Duration::from_secs(1)), Some(7));
        assert_eq!(log.line(start + Duration::from_secs(1)), Some(0));
    }
}
