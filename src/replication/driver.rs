//! The recovery loop: recovers a replica's state, applies the log from there, and when that ends
//! decides on the next step. On a replicated log no error is final, because the broker or a
//! peer may recover. So each step is retried, with backoff.

use std::time::Duration;

use metrics::Counter;
use tokio::time::Instant;

use super::applier::{Applier, ApplyError};
use super::bootstrap::{Bootstrap, BootstrapError, CompleteFrom, Recovered};
use super::complete_state::CompleteState;
use super::peers::Peer;
use super::snapshotter::Snapshotter;
use crate::log::{ReadError, Seq};
use crate::replication::state::{NodeState, Readiness};
use crate::sys::backoff::Backoff;

const BACKOFF_MIN: Duration = Duration::from_millis(250);
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// How often the log's end is requested while a replica catches up with it.
const FETCH_END_EVERY: Duration = Duration::from_secs(1);

/// Recovers a replica's state and keeps it up to date with the log.
pub struct ReplicaDriver {
    /// Recovers a state.
    pub bootstrap: Bootstrap,
    /// Applies the log.
    pub applier: Applier,
    /// The replica's readiness.
    pub readiness: Readiness,
    /// Writes snapshots; `None` without a data directory.
    pub snapshotter: Option<Snapshotter>,
    /// Counts the times that the log lacked the batch after the last one applied.
    pub gaps: Counter,
    /// Counts states that were discarded.
    pub resyncs: Counter,
}

#[derive(Debug, Clone, Copy)]
enum NextStep {
    /// Recover from a snapshot, a peer or the whole log, up to this position at least. The store is
    /// empty.
    Bootstrap { at_least: Seq },
    /// Read the log from the store's position. The state is complete from this position on.
    Resume { complete_from: CompleteFrom },
    /// Discard the state, then do the same as `Bootstrap`.
    Resync {
        /// Whether its state and its snapshots may be wrong.
        doubtful: bool,
        at_least: Seq,
    },
    /// Stay unready until a restart: the log of a single node is damaged.
    Stay,
}

impl ReplicaDriver {
    /// Follows the log forever. If `seeded`, the store holds the state at its position; otherwise
    /// it is empty.
    pub async fn run(self, seeded: bool) {
        let mut step = match seeded {
            true => NextStep::Resume {
                complete_from: CompleteFrom::default(),
            },
            false => NextStep::Bootstrap { at_least: 0 },
        };
        let mut backoff = new_backoff();
        let mut last_gap = None;
        let mut logged = String::new();
        loop {
            let started = Instant::now();
            let recovered = match step {
                NextStep::Stay => return std::future::pending().await,
                NextStep::Bootstrap { at_least } => self.bootstrap(at_least).await,
                NextStep::Resume { complete_from } => self.bootstrap.resume(complete_from).await,
                NextStep::Resync { doubtful, at_least } => {
                    self.discard_state(doubtful).await;
                    self.bootstrap(at_least).await
                }
            };
            step = match recovered {
                Ok(recovered) => {
                    let complete_from = recovered.complete_from;
                    let error = self.follow(recovered, &mut logged).await;
                    self.after_apply_error(&error, complete_from, &mut last_gap, &mut logged)
                        .await
                }
                Err(error) => self.after_bootstrap_error(&error, step, &mut logged),
            };
            if started.elapsed() > BACKOFF_MAX {
                backoff.reset();
            }
            backoff.pause().await;
        }
    }

    async fn bootstrap(&self, at_least: Seq) -> Result<Recovered, BootstrapError> {
        let recovered = self.bootstrap.run(&self.readiness, at_least).await;
        if recovered.is_ok() {
            // Batches that were sent meanwhile are in the state, or are delivered as another
            // writer's.
            self.applier.in_flight.forget_all();
        }
        recovered
    }

    /// Applies the log, and makes the replica ready once it has caught up. Returns why that ended.
    async fn follow(&self, recovered: Recovered, logged: &mut String) -> ApplyError {
        let Recovered {
            mut subscription,
            complete_from,
            snapshot,
        } = recovered;
        if let (Some(snapshot), Some(snapshotter)) = (snapshot, &self.snapshotter) {
            snapshotter.last.set(snapshot);
        }
        self.applier.checkpoints.begin(complete_from.seq);
        self.readiness
            .block(NodeState::CatchingUp, "applying the log up to its end");
        let applying = self
            .applier
            .run(&mut subscription, complete_from, &self.readiness);
        tokio::pin!(applying);
        let caught_up = tokio::select! {
            biased;
            error = &mut applying => return error,
            caught_up = self.catch_up(complete_from.seq) => caught_up,
        };
        if let Err(error) = caught_up {
            return error.into();
        }
        self.bootstrap.tracker.done();
        let (log, position) = (self.bootstrap.log.kind(), self.bootstrap.applied.seq());
        let records = self.bootstrap.store.len();
        match self.applier.checkpoints.caught_up() {
            None => {
                self.readiness.set_ready();
                self.bootstrap.log.check_append();
                tracing::info!(log, position, records, "ready: serving reads");
                logged.clear();
            }
            Some(mismatch) => {
                let reason = mismatch.to_string();
                log_once(&reason, "caught up, but not ready", logged);
                self.readiness.block(NodeState::Diverged, reason);
            }
        }
        applying.await
    }

    /// Waits until the log is applied up to the end that it had at the call, so that the state
    /// includes every write acknowledged before. If the log loses that end, the target is lowered.
    async fn catch_up(&self, complete_from: Seq) -> Result<(), ReadError> {
        let (log, applied) = (&self.bootstrap.log, &self.bootstrap.applied);
        // Until then the log may be one that has lost batches, or report an outdated end.
        log.wal_replayed().await;
        let mut target = log.fetch_bounds().await?.end.max(complete_from);
        loop {
            let reached = tokio::time::timeout(FETCH_END_EVERY, applied.wait_for(target));
            if reached.await.is_ok() {
                return Ok(());
            }
            let end = log.fetch_bounds().await?.end;
            if end < complete_from {
                let applied = complete_from;
                return Err(ReadError::Shorter { end, applied });
            }
            target = target.min(end);
        }
    }

    /// The step after applying ended with `error`. `last_gap` is the position of the last gap.
    async fn after_apply_error(
        &self,
        error: &ApplyError,
        complete_from: CompleteFrom,
        last_gap: &mut Option<Seq>,
        logged: &mut String,
    ) -> NextStep {
        let was_complete = self.bootstrap.applied.seq() >= complete_from.seq;
        let state = match error {
            ApplyError::Diverged { .. } => NodeState::Diverged,
            ApplyError::Log(ReadError::Replaced { .. }) => NodeState::OtherLog,
            _ => NodeState::Gap,
        };
        self.readiness.block(state, error.to_string());
        log_once(&error.to_string(), "stopped applying the log", logged);
        if !self.bootstrap.log.is_replicated() {
            return NextStep::Stay;
        }
        let resync = |doubtful, at_least| NextStep::Resync { doubtful, at_least };
        let resume = NextStep::Resume { complete_from };
        match error {
            ApplyError::Diverged { .. } => resync(true, 0),
            // The log lacks these batches, so only a backup that includes them helps.
            ApplyError::Gap { applied, .. }
            | ApplyError::Log(ReadError::NotHeld { wanted: applied }) => {
                self.gaps.increment(1);
                match last_gap.replace(*applied) == Some(*applied) {
                    true => resync(false, self.after_gap(error)),
                    false => resume,
                }
            }
            ApplyError::Log(ReadError::Trimmed { first, .. }) => {
                resync(false, first.saturating_sub(1))
            }
            // A restored state that includes lost batches is discarded, and so are the snapshots:
            // the same one would be restored again.
            ApplyError::IncludesLost { .. } => resync(true, 0),
            ApplyError::Log(ReadError::Shorter { .. }) if !was_complete => resync(false, 0),
            ApplyError::Log(_) => {
                if was_complete {
                    self.keep_state().await;
                }
                resume
            }
        }
    }

    /// The position that a backup must reach to include the batches that the log lacks.
    fn after_gap(&self, error: &ApplyError) -> Seq {
        match error {
            ApplyError::Gap { got, .. } => got.saturating_sub(1),
            _ => self.bootstrap.applied.seq() + 1,
        }
    }

    fn after_bootstrap_error(
        &self,
        error: &BootstrapError,
        step: NextStep,
        logged: &mut String,
    ) -> NextStep {
        let state = match error {
            BootstrapError::OtherLog { .. } | BootstrapError::Log(ReadError::Replaced { .. }) => {
                NodeState::OtherLog
            }
            BootstrapError::Log(_) | BootstrapError::LogBehind { .. } => NodeState::Gap,
            _ => NodeState::NoSource,
        };
        let text = error.to_string();
        self.readiness.block(state, text.as_str());
        log_once(
            &text,
            "cannot recover a complete state; staying unready",
            logged,
        );
        if !self.bootstrap.log.is_replicated() {
            return NextStep::Stay;
        }
        match (step, error) {
            (NextStep::Resume { .. }, BootstrapError::Log(ReadError::Trimmed { first, .. })) => {
                let at_least = first.saturating_sub(1);
                NextStep::Resync {
                    doubtful: false,
                    at_least,
                }
            }
            (NextStep::Resume { complete_from }, _) => NextStep::Resume { complete_from },
            // No source has the missing batches. The log may deliver them by now, or fail there
            // again.
            _ => NextStep::Bootstrap { at_least: 0 },
        }
    }

    /// Writes a snapshot of the state. If the log is lost, this may be the only copy of the writes
    /// since the last snapshot.
    async fn keep_state(&self) {
        if let Some(snapshotter) = &self.snapshotter {
            let state = CompleteState::known(&self.bootstrap.store);
            snapshotter.write_if_changed(state).await;
        }
    }

    /// Empties the store. A state that may be wrong is kept until there is another source, because
    /// it may be the only one.
    async fn discard_state(&self, doubtful: bool) {
        self.applier.checkpoints.end();
        if doubtful {
            self.wait_for_source().await;
        }
        self.resyncs.increment(1);
        self.applier.in_flight.forget_all();
        // The store first: a snapshot that is being written then fails, so that none is left when
        // all are quarantined.
        self.bootstrap.store.clear();
        self.bootstrap.applied.cleared();
        if doubtful {
            self.bootstrap.log.quarantine_wal("diverged").await;
            if let Some(snapshotter) = &self.snapshotter {
                snapshotter.quarantine_all("diverged").await;
            }
        }
    }

    async fn wait_for_source(&self) {
        let mut backoff = new_backoff();
        loop {
            // Not from the replica's WAL, which will be quarantined.
            let log = &self.bootstrap.log;
            let whole = log.fetch_bounds().await.is_ok() && log.first() == 1;
            if whole || self.bootstrap.peers.ask().await.iter().any(Peer::ready) {
                return;
            }
            backoff.pause().await;
        }
    }
}

fn log_once(error: &str, message: &'static str, logged: &mut String) {
    if error != logged {
        tracing::error!(error, "{message}");
        error.clone_into(logged);
    }
}

/// Short at first, because a peer is often ready soon.
fn new_backoff() -> Backoff {
    Backoff::new(BACKOFF_MIN, BACKOFF_MAX)
}
