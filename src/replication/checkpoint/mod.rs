//! Decides when this replica votes, and which checkpoints of others count.
//!
//! During writes each replica votes on every mark once, an interval after it last sent a
//! checkpoint. After the last write all replicas vote on the last mark once more and are then
//! silent. While replicas disagree, they vote on that mark every half second, until it is
//! [settled](super::votes).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use metrics::Counter;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::votes::{Ballot, Comparison, Doubt, Marked, Observed, Turn, Verdict, Votes};
use crate::grade::Digest;
use crate::log::{Chain, Checkpoint, ClusterKey, LogId, Mac, Position, RandomId, Seq};

/// How often a replica votes while replicas disagree.
const DISPUTE_INTERVAL: Duration = Duration::from_millis(500);
/// How often a replica whose state is in doubt votes while there is no dispute; more often if the
/// configured interval is shorter.
const DOUBT_INTERVAL_MAX: Duration = Duration::from_secs(2);
/// The least time between two log lines about rejected checkpoints.
const LOG_EVERY: Duration = Duration::from_secs(10);

/// The votes of all replicas, and the time of this replica's next vote. Clones share it.
#[derive(Clone)]
pub struct Checkpoints(Arc<Inner>);

struct Inner {
    me: RandomId,
    log: LogId,
    key: ClusterKey,
    /// How often this replica votes; `None` where there are no others.
    interval: Option<Duration>,
    /// Whether writes have been applied since the last mark.
    changed: AtomicBool,
    state: Mutex<State>,
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
    /// Handles that count nothing.
    #[must_use]
    pub fn noop() -> Self {
        Self {
            compared: Counter::noop(),
            divergences: Counter::noop(),
            rejected: Counter::noop(),
        }
    }
}

struct State {
    votes: Votes,
    /// The state is complete from here on. Before, a restored store may hold effects of later
    /// batches. `None` while there is no state.
    complete_from: Option<Seq>,
    /// Whether the log's end was reached: a replica that catches up does not vote on old batches.
    caught_up: bool,
    /// When this replica votes next.
    next: Instant,
    /// The mark at which it waits for the votes of others.
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
        Self(Arc::new(Inner {
            me,
            log,
            key,
            interval,
            changed: AtomicBool::new(false),
            state: Mutex::new(State {
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
    pub(super) fn caught_up(&self) -> Option<Doubt> {
        let mut state = self.0.state.lock();
        state.caught_up = true;
        match state.votes.is_disputed() || state.votes.doubt().is_some() {
            true => state.next = Instant::now(),
            false => state.pause(self.0.me, self.0.interval),
        }
        self.0.sooner.notify_one();
        state.votes.doubt()
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
    ) -> Observed {
        let authentic = self.0.key.verify_checkpoint(&self.0.log, checkpoint);
        let mut state = self.0.state.lock();
        if !authentic {
            self.0.metrics.rejected.increment(1);
            state.log_rejected(position.seq, checkpoint.replica);
            return Observed::NOTHING;
        }
        let complete = state.complete_from.is_some_and(|from| from <= position.seq);
        let marked = Marked {
            seq: position.seq,
            chain: position.chain,
            own: complete.then(digest),
            changed: complete && self.0.changed.swap(false, Ordering::Relaxed),
            checkpoint: *checkpoint,
        };
        let observed = state.votes.observe(&marked);
        match observed.comparison {
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
            observed.verdict,
            Verdict::Contradicted(_) | Verdict::Undecided(_)
        ) {
            state.next = state.next.min(Instant::now() + DISPUTE_INTERVAL);
            self.0.sooner.notify_one();
        }
        observed
    }

    /// Resolves when it is this replica's turn to send a checkpoint. Cancel-safe.
    pub(super) async fn due(&self) {
        let Some(interval) = self.0.interval else {
            return std::future::pending().await;
        };
        loop {
            let next = {
                let mut state = self.0.state.lock();
                if state.next <= Instant::now() {
                    if state.turn(self.has_changed()) != Turn::Silent {
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

    /// The checkpoint for the next batch, if it is this replica's turn.
    pub(super) fn next(&self) -> Option<Checkpoint> {
        let interval = self.0.interval?;
        let mut state = self.0.state.lock();
        let now = Instant::now();
        if state.next > now {
            return None;
        }
        let turn = state.turn(self.has_changed());
        if state.votes.is_disputed() {
            state.next = now + DISPUTE_INTERVAL;
        } else if state.votes.doubt().is_some() {
            state.next = now + interval.min(DOUBT_INTERVAL_MAX);
        } else {
            state.pause(self.0.me, Some(interval));
        }
        let ballot = match turn {
            Turn::Silent => return None,
            Turn::Wait(position) => {
                state.waited_at = Some(position);
                return None;
            }
            Turn::Vote(ballot) => ballot,
            Turn::Mark => Ballot {
                position: 0,
                chain: Chain::default(),
                digest: Digest::default(),
                round: 0,
            },
        };
        drop(state);
        Some(self.signed(ballot))
    }

    fn signed(&self, ballot: Ballot) -> Checkpoint {
        let mut checkpoint = Checkpoint {
            replica: self.0.me,
            position: ballot.position,
            chain: ballot.chain,
            digest: ballot.digest,
            round: ballot.round,
            mac: Mac::default(),
        };
        checkpoint.mac = self.0.key.sign_checkpoint(&self.0.log, &checkpoint);
        checkpoint
    }

    fn has_changed(&self) -> bool {
        self.0.changed.load(Ordering::Relaxed)
    }
}

impl State {
    fn turn(&self, changed: bool) -> Turn {
        match self.caught_up {
            true => self.votes.turn(changed, self.waited_at),
            false => Turn::Silent,
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
