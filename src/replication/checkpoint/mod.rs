//! Decides when this replica votes, and which checkpoints of others count.
//!
//! During writes each replica votes once on every [comparison point](super::votes), an interval
//! after it last sent a checkpoint. After the last write all replicas vote once more, on the last
//! point, and then stop. While replicas disagree on a point, they vote on it every half second,
//! until it is settled.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use metrics::Counter;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::votes::{
    CheckpointBatch, Comparison, DigestMismatch, NextCheckpoint, Verdict, VoteOutcome, Votes,
};
use crate::grade::Digest;
use crate::log::{Chain, Checkpoint, ClusterKey, LogId, Mac, Position, RandomId, Seq};

/// How often a replica votes while replicas disagree.
const DISPUTE_INTERVAL: Duration = Duration::from_millis(500);
/// How often a replica with a mismatch votes while no point is disputed; more often if the
/// configured interval is shorter.
const MISMATCH_INTERVAL_MAX: Duration = Duration::from_secs(2);
/// The least time between two log lines about rejected checkpoints.
const LOG_EVERY: Duration = Duration::from_secs(10);

/// The votes of all replicas, and the time of this replica's next vote. Clones share it.
#[derive(Clone)]
pub struct Checkpoints(Arc<CheckpointsInner>);

struct CheckpointsInner {
    me: RandomId,
    log: LogId,
    key: ClusterKey,
    /// How often this replica votes; `None` if there are no others.
    interval: Option<Duration>,
    /// Whether writes have been applied since the last point.
    changed: AtomicBool,
    state: Mutex<VotingState>,
    /// Notified when the next vote is due sooner.
    sooner: Notify,
    metrics: CheckpointMetrics,
}

/// The metrics of checkpoints.
#[derive(Clone)]
pub struct CheckpointMetrics {
    /// Votes of other replicas that were compared with this replica's digest.
    pub compared: Counter,
    /// Those that differed.
    pub divergences: Counter,
    /// Checkpoints that do not count, because they are not signed with the cluster's key.
    pub rejected: Counter,
}

impl CheckpointMetrics {
    /// Counters that discard their counts.
    #[must_use]
    pub fn noop() -> Self {
        Self {
            compared: Counter::noop(),
            divergences: Counter::noop(),
            rejected: Counter::noop(),
        }
    }
}

struct VotingState {
    votes: Votes,
    /// The state is complete from here on. Before, a restored store may hold effects of later
    /// batches. `None` while there is no state.
    complete_from: Option<Seq>,
    /// Whether the log's end was applied. A replica that catches up does not vote on old batches.
    caught_up: bool,
    /// When this replica votes next.
    next: Instant,
    /// The point at which it waits for the votes of others.
    waited_at: Option<Seq>,
    /// How many pauses there have been.
    pauses: u64,
    rejected_logged_at: Option<Instant>,
}

impl Checkpoints {
    /// For replica `me` on `log`, which votes every `interval`; `None` if there are no others.
    #[must_use]
    pub fn new(
        me: RandomId,
        log: LogId,
        key: ClusterKey,
        interval: Option<Duration>,
        metrics: CheckpointMetrics,
    ) -> Self {
        Self(Arc::new(CheckpointsInner {
            me,
            log,
            key,
            interval,
            changed: AtomicBool::new(false),
            state: Mutex::new(VotingState {
                votes: Votes::new(me),
                complete_from: None,
                caught_up: false,
                next: Instant::now(),
                waited_at: None,
                pauses: 0,
                rejected_logged_at: None,
            }),
            sooner: Notify::new(),
            metrics,
        }))
    }

    /// Called before the log is applied. The state is complete from batch `complete_from` on.
    pub fn begin(&self, complete_from: Seq) {
        let mut state = self.0.state.lock();
        state.complete_from = Some(complete_from);
        state.caught_up = false;
        // A restored state is compared even if there are no more writes.
        self.0.changed.store(complete_from > 0, Ordering::Relaxed);
    }

    /// Called when the log's end is reached. Returns why the state may be wrong, if the votes so
    /// far contradict it.
    pub(super) fn caught_up(&self) -> Option<DigestMismatch> {
        let mut state = self.0.state.lock();
        state.caught_up = true;
        match state.votes.is_disputed() || state.votes.mismatch().is_some() {
            true => state.next = Instant::now(),
            false => state.pause(self.0.me, self.0.interval),
        }
        self.0.sooner.notify_one();
        state.votes.mismatch()
    }

    /// Called when the state is discarded. This replica does not vote until [`begin`](Self::begin).
    pub(super) fn end(&self) {
        let mut state = self.0.state.lock();
        state.votes = Votes::new(self.0.me);
        state.complete_from = None;
        state.caught_up = false;
        self.0.changed.store(false, Ordering::Relaxed);
    }

    /// Called when a batch with writes was applied.
    pub(super) fn changed(&self) {
        self.0.changed.store(true, Ordering::Relaxed);
    }

    /// Counts the vote in the batch at `position`, which was applied last; `digest` is this
    /// replica's right after it.
    pub(super) fn observe(
        &self,
        position: &Position,
        checkpoint: &Checkpoint,
        digest: impl FnOnce() -> Digest,
    ) -> VoteOutcome {
        let authentic = self.0.key.verify_checkpoint(&self.0.log, checkpoint);
        let mut state = self.0.state.lock();
        if !authentic {
            self.0.metrics.rejected.increment(1);
            state.log_rejected(position.seq, checkpoint.replica);
            return VoteOutcome::NONE;
        }
        let complete = state.complete_from.is_some_and(|from| from <= position.seq);
        let batch = CheckpointBatch {
            seq: position.seq,
            chain: position.chain,
            own: complete.then(digest),
            changed: complete && self.0.changed.swap(false, Ordering::Relaxed),
            checkpoint: *checkpoint,
        };
        let outcome = state.votes.observe(&batch);
        match outcome.comparison {
            Comparison::Same => self.0.metrics.compared.increment(1),
            Comparison::Different { .. } => {
                self.0.metrics.compared.increment(1);
                self.0.metrics.divergences.increment(1);
                // Let the others see the difference at once.
                state.next = Instant::now();
                self.0.sooner.notify_one();
            }
            Comparison::None | Comparison::Fork { .. } | Comparison::Equivocation { .. } => {}
        }
        if matches!(
            outcome.verdict,
            Verdict::Contradicted(_) | Verdict::Undecided(_)
        ) {
            state.next = state.next.min(Instant::now() + DISPUTE_INTERVAL);
            self.0.sooner.notify_one();
        }
        outcome
    }

    /// Resolves when this replica's next checkpoint is due. Cancel-safe.
    pub(super) async fn due(&self) {
        let Some(interval) = self.0.interval else {
            return std::future::pending().await;
        };
        loop {
            let next = {
                let mut state = self.0.state.lock();
                if state.next <= Instant::now() {
                    if state.next_checkpoint(self.has_changed()) != NextCheckpoint::Nothing {
                        return;
                    }
                    state.pause(self.0.me, Some(interval));
                }
                state.next
            };
            tokio::select! {
                biased;
                () = tokio::time::sleep_until(next) => {}
                () = self.0.sooner.notified() => {}
            }
        }
    }

    /// The checkpoint for the next batch, if one is due.
    pub(super) fn next(&self) -> Option<Checkpoint> {
        let interval = self.0.interval?;
        let mut state = self.0.state.lock();
        let now = Instant::now();
        if state.next > now {
            return None;
        }
        let next = state.next_checkpoint(self.has_changed());
        if state.votes.is_disputed() {
            state.next = now + DISPUTE_INTERVAL;
        } else if state.votes.mismatch().is_some() {
            state.next = now + interval.min(MISMATCH_INTERVAL_MAX);
        } else {
            state.pause(self.0.me, Some(interval));
        }
        let unsigned = match next {
            NextCheckpoint::Nothing => return None,
            NextCheckpoint::Wait(position) => {
                state.waited_at = Some(position);
                return None;
            }
            NextCheckpoint::Vote(vote) => vote,
            NextCheckpoint::NewPoint => Checkpoint {
                replica: self.0.me,
                position: 0,
                chain: Chain::default(),
                digest: Digest::default(),
                round: 0,
                mac: Mac::default(),
            },
        };
        drop(state);
        let mac = self.0.key.sign_checkpoint(&self.0.log, &unsigned);
        Some(Checkpoint { mac, ..unsigned })
    }

    fn has_changed(&self) -> bool {
        self.0.changed.load(Ordering::Relaxed)
    }
}

impl VotingState {
    fn next_checkpoint(&self, changed: bool) -> NextCheckpoint {
        match self.caught_up {
            true => self.votes.next_checkpoint(changed, self.waited_at),
            false => NextCheckpoint::Nothing,
        }
    }

    /// 0.75 to 1.25 times `interval`, different each time, so that replicas that started together
    /// do not vote together. The replica's id is the random seed.
    fn jittered(&mut self, me: RandomId, interval: Duration) -> Duration {
        self.pauses += 1;
        let part = xxh3_64_with_seed(&me.bytes(), self.pauses) as f64;
        interval.mul_f64(0.75 + part / u64::MAX as f64 / 2.0)
    }

    fn pause(&mut self, me: RandomId, interval: Option<Duration>) {
        let pause = interval.map(|interval| self.jittered(me, interval));
        self.next = Instant::now() + pause.unwrap_or_default();
    }

    fn log_rejected(&mut self, position: Seq, replica: RandomId) {
        let now = Instant::now();
        let due = |at: Instant| now.saturating_duration_since(at) >= LOG_EVERY;
        if self.rejected_logged_at.is_none_or(due) {
            self.rejected_logged_at = Some(now);
            tracing::warn!(
                position,
                %replica,
                "ignored a checkpoint that is not signed with this cluster's password"
            );
        }
    }
}

#[cfg(test)]
mod tests;
