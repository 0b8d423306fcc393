//! Write health: whether writes are acknowledged, judged by the outcome of appends.
//!
//! A rejection with a reason (storage full, no permission, a revoked user) makes the log unwritable
//! at once. Missing acknowledgements do so after [`WriteHealth::silence_max`], so that a load
//! balancer does not remove all nodes during an election. The next delivered batch makes the log
//! writable again; while no client writes, that is an empty batch. Until the first delivery a
//! replica is not ready for writes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use crate::log::BatchId;

/// Tracks whether writes are acknowledged, and the known reason if they are not.
pub(super) struct WriteHealth {
    /// How long an append may wait before the log counts as unwritable.
    silence_max: Duration,
    /// Whether the log is unwritable. Each write checks this without a lock.
    unwritable: AtomicBool,
    /// Writes rejected since the log became unwritable.
    rejected: AtomicU64,
    state: Mutex<HealthState>,
}

/// The reason until the first batch is delivered.
const NONE_ACKNOWLEDGED: &str = "the stream has not acknowledged a batch of this replica yet";

#[derive(Default)]
struct HealthState {
    /// Whether a batch of this process was ever delivered. Until then the replica accepts writes,
    /// but does not report that it is ready for them: the stream may be full.
    acknowledged: bool,
    /// Since when appends have waited without a delivery, or the stream has been unreachable.
    waiting_since: Option<Instant>,
    /// Whether an append failed or was rejected since the last delivery. If so, only a delivery
    /// shows that writes are acknowledged.
    append_failed: bool,
    /// The last error.
    problem: Option<Arc<str>>,
    /// Whether `problem` is that the stream is unreachable.
    unreachable: bool,
    /// Why the log is unwritable, and since when.
    unwritable: Option<(Arc<str>, Instant)>,
    /// The last batch that the broker rejected. A batch that was sent before it may still be
    /// delivered, which does not show that writes are accepted again.
    last_rejected: Option<BatchId>,
}

impl WriteHealth {
    pub(super) fn new(silence_max: Duration) -> Self {
        Self {
            silence_max,
            unwritable: AtomicBool::new(false),
            rejected: AtomicU64::new(0),
            state: Mutex::default(),
        }
    }

    /// Why writes are not acknowledged; counts the caller's write as rejected.
    pub(super) fn reject(&self) -> Option<Arc<str>> {
        if !self.unwritable.load(Ordering::Acquire) {
            return None;
        }
        let reason = self.reason()?;
        self.rejected.fetch_add(1, Ordering::Relaxed);
        Some(reason)
    }

    /// Why writes are not acknowledged, or not known to be.
    pub(super) fn reason(&self) -> Option<Arc<str>> {
        let state = self.state.lock();
        match &state.unwritable {
            Some((why, _)) => Some(Arc::clone(why)),
            None => (!state.acknowledged).then(|| NONE_ACKNOWLEDGED.into()),
        }
    }

    /// Whether a batch of this process was ever delivered.
    pub(super) fn acknowledged(&self) -> bool {
        self.state.lock().acknowledged
    }

    /// Records that an append waits, and its last error if there was one.
    pub(super) fn waiting(&self, problem: Option<Arc<str>>) {
        let mut state = self.state.lock();
        state.waiting_since.get_or_insert_with(Instant::now);
        state.append_failed |= problem.is_some();
        if problem.is_some() {
            state.problem = problem;
            state.unreachable = false;
        }
    }

    /// Records that an append got no answer. `why` is used if no other reason is known. If
    /// `reached`, the stream is reachable, so "unreachable" is no longer the reason.
    pub(super) fn unanswered(&self, why: &str, reached: bool) {
        let mut state = self.state.lock();
        state.waiting_since.get_or_insert_with(Instant::now);
        state.append_failed = true;
        if state.problem.is_none() || (reached && state.unreachable) {
            state.problem = Some(why.into());
            state.unreachable = false;
        }
    }

    /// Records that the stream is unreachable.
    pub(super) fn unreachable(&self, problem: Arc<str>) {
        let mut state = self.state.lock();
        state.waiting_since.get_or_insert_with(Instant::now);
        state.problem = Some(problem);
        state.unreachable = true;
    }

    /// Records that the broker rejects this process.
    pub(super) fn not_allowed(&self, why: Arc<str>) {
        let mut state = self.state.lock();
        state.waiting_since.get_or_insert_with(Instant::now);
        self.set_unwritable(&mut state, why);
    }

    /// Why appends wait; `None` while there was no error.
    pub(super) fn problem(&self) -> Option<Arc<str>> {
        let state = self.state.lock();
        let unwritable = state.unwritable.as_ref().map(|(why, _)| why);
        unwritable.or(state.problem.as_ref()).map(Arc::clone)
    }

    /// Whether appends have waited for longer than `max`.
    pub(super) fn waits_longer_than(&self, max: Duration) -> bool {
        let since = self.state.lock().waiting_since;
        since.is_some_and(|since| since.elapsed() > max)
    }

    /// Records that the stream is reachable while nothing is appended. Returns whether only an
    /// append can show that writes are acknowledged.
    pub(super) fn reachable(&self) -> bool {
        let mut state = self.state.lock();
        if !state.append_failed {
            self.clear(&mut state);
        }
        state.append_failed
    }

    /// Records that the broker rejected batch `id`.
    pub(super) fn rejected(&self, id: BatchId, why: Arc<str>) {
        let mut state = self.state.lock();
        state.last_rejected = Some(id);
        state.waiting_since.get_or_insert_with(Instant::now);
        state.append_failed = true;
        self.set_unwritable(&mut state, why);
    }

    /// Records that batch `id` of this process was delivered.
    pub(super) fn delivered(&self, id: BatchId) {
        let mut state = self.state.lock();
        state.acknowledged = true;
        let before = |rejected: BatchId| rejected.writer == id.writer && rejected.seq >= id.seq;
        if !state.last_rejected.is_some_and(before) {
            self.clear(&mut state);
        }
    }

    fn clear(&self, state: &mut HealthState) {
        state.waiting_since = None;
        state.append_failed = false;
        state.problem = None;
        state.unreachable = false;
        state.last_rejected = None;
        if let Some((_, since)) = state.unwritable.take() {
            self.unwritable.store(false, Ordering::Release);
            let rejected = self.rejected.swap(0, Ordering::Relaxed);
            let down_s = since.elapsed().as_secs_f64();
            tracing::info!(
                down_s,
                rejected_writes = rejected,
                "stream accepts writes again"
            );
        }
    }

    /// Makes the log unwritable if appends have waited for too long.
    pub(super) fn check(&self) {
        let mut state = self.state.lock();
        let Some(since) = state.waiting_since else {
            return;
        };
        if state.unwritable.is_none() && since.elapsed() > self.silence_max {
            let silence_s = self.silence_max.as_secs();
            let why = match &state.problem {
                Some(problem) => Arc::clone(problem),
                None => format!("no acknowledgement from the stream for {silence_s} s").into(),
            };
            self.set_unwritable(&mut state, why);
        }
    }

    fn set_unwritable(&self, state: &mut HealthState, why: Arc<str>) {
        let since = match state.unwritable.take() {
            Some((before, since)) => {
                if before != why {
                    tracing::warn!(%why, "stream still accepts no writes");
                }
                since
            }
            None => {
                tracing::error!(%why, "stream accepts no writes: rejecting writes, reads continue");
                Instant::now()
            }
        };
        state.unwritable = Some((why, since));
        self.unwritable.store(true, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::RandomId;

    const SILENCE: Duration = Duration::from_secs(12);

    fn id(seq: u64) -> BatchId {
        let writer = RandomId::of(1);
        BatchId { writer, seq }
    }

    fn writable() -> WriteHealth {
        let health = WriteHealth::new(SILENCE);
        health.delivered(id(0));
        health
    }

    #[test]
    fn the_first_delivery_shows_that_writes_are_acknowledged() {
        let health = WriteHealth::new(SILENCE);
        assert_eq!(health.reason().as_deref(), Some(NONE_ACKNOWLEDGED));
        // Nothing shows the contrary either.
        assert_eq!(health.reject(), None);
        health.rejected(id(1), "full".into());
        assert_eq!(health.reject().as_deref(), Some("full"));
        health.delivered(id(2));
        assert_eq!(health.reason(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn silence_counts_from_the_first_append_that_waits() {
        let health = writable();
        health.waiting(None);
        tokio::time::advance(SILENCE / 2).await;
        health.waiting(Some("no leader".into()));
        health.check();
        assert_eq!(health.reason(), None);
        tokio::time::advance(SILENCE).await;
        health.check();
        assert_eq!(health.reason().as_deref(), Some("no leader"));
        // Only a delivery shows that writes are acknowledged.
        assert!(health.reachable());
        assert!(health.reject().is_some());
        health.delivered(id(9));
        assert_eq!(health.reason(), None);
        tokio::time::advance(SILENCE * 2).await;
        health.check();
        assert_eq!(health.reason(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_rejection_counts_at_once() {
        let health = writable();
        health.rejected(id(1), "full".into());
        assert_eq!(health.reason().as_deref(), Some("full"));
        health.rejected(id(2), "no right".into());
        assert_eq!(health.reason().as_deref(), Some("no right"));
        // It was stored before.
        health.delivered(id(1));
        assert_eq!(health.reason().as_deref(), Some("no right"));
        health.delivered(id(3));
        assert_eq!(health.reason(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_log_is_writable_again_once_it_is_reachable() {
        let health = writable();
        health.unreachable("no connection".into());
        tokio::time::advance(SILENCE / 2).await;
        assert!(!health.reachable());
        tokio::time::advance(SILENCE).await;
        health.check();
        assert_eq!(health.reason(), None);
        health.unreachable("no connection".into());
        tokio::time::advance(SILENCE * 2).await;
        health.check();
        assert_eq!(health.reason().as_deref(), Some("no connection"));
        assert!(!health.reachable());
        assert_eq!(health.reason(), None);
    }
}
