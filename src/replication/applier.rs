//! Applies the log's entries to the store, in order.

use std::sync::Arc;

use metrics::{Counter, Histogram};

use super::applied::AppliedIndex;
use super::bootstrap::CompleteFrom;
use super::checkpoint::Checkpoints;
use super::votes::{Comparison, DigestMismatch, Verdict};
use crate::grade::Digest;
use crate::log::{Checkpoint, Entry, InFlight, Log, Position, ReadError, Seq, Subscription};
use crate::replication::state::{NodeState, Readiness};
use crate::store::Store;

/// The applier yields after this many writes, because requests share its thread, and a log that was
/// read ahead never makes it wait.
const WRITES_PER_TURN: usize = 1024;

/// Why the applier stopped.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ApplyError {
    /// Reading the log failed.
    #[error(transparent)]
    Log(#[from] ReadError),
    /// Batches are missing between two deliveries.
    #[error("gap in the log: batch {got} was delivered after batch {applied}")]
    Gap {
        /// The last batch applied.
        applied: Seq,
        /// The batch that was delivered.
        got: Seq,
    },
    /// The log has lost batches that the restored state includes, and holds others in their place.
    #[error(
        "the log has lost batches that the restored state includes: it holds a different batch at \
         position {position}; restoring from another source"
    )]
    IncludesLost {
        /// The batch at which the restored state would have been complete.
        position: Seq,
    },
    /// A majority of the replicas had another digest at one position.
    #[error(
        "digest mismatch with a majority at batch {position}: this replica has {own}, the majority \
         {agreed}; discarding the state and restoring from another source"
    )]
    Diverged {
        /// The position.
        position: Seq,
        /// This replica's digest.
        own: Digest,
        /// The majority's digest.
        agreed: Digest,
    },
}

/// Applies a log to a store.
pub struct Applier {
    /// The log.
    pub log: Arc<dyn Log>,
    /// The records.
    pub store: Store,
    /// The position that the store is at.
    pub applied: AppliedIndex,
    /// This process' batches that are not applied yet.
    pub in_flight: InFlight,
    /// The votes of all replicas on their states.
    pub checkpoints: Checkpoints,
    /// Counts patches applied.
    pub patches: Counter,
    /// Counts deletions applied.
    pub deletions: Counter,
    /// Measures the time from append to apply of batches of this process.
    pub round_trip: Histogram,
}

impl Applier {
    /// Applies the entries of `subscription` until it ends, and returns why it ended. The state is
    /// complete from `complete_from` on.
    pub async fn run(
        &self,
        subscription: &mut dyn Subscription,
        complete_from: CompleteFrom,
        readiness: &Readiness,
    ) -> ApplyError {
        let mut entries = Vec::new();
        let mut since_turn = 0;
        loop {
            if let Err(error) = subscription.next(&mut entries).await {
                return error.into();
            }
            for entry in entries.drain(..) {
                since_turn += entry.batch.writes.len().max(1);
                if let Err(error) = self.apply(entry, complete_from, readiness) {
                    return error;
                }
                if since_turn >= WRITES_PER_TURN {
                    since_turn = 0;
                    self.applied.notify();
                    tokio::task::yield_now().await;
                }
            }
            self.applied.notify();
        }
    }

    /// Applies one entry and answers the requests that wait for it.
    fn apply(
        &self,
        entry: Entry,
        complete_from: CompleteFrom,
        readiness: &Readiness,
    ) -> Result<(), ApplyError> {
        let (applied, position) = (self.applied.seq(), entry.position);
        if position.seq <= applied {
            return Ok(());
        }
        if position.seq != applied + 1 {
            let got = position.seq;
            return Err(ApplyError::Gap { applied, got });
        }
        if position.seq == complete_from.seq && position.chain != complete_from.chain {
            let position = position.seq;
            return Err(ApplyError::IncludesLost { position });
        }
        let own = entry.batch.ticket.and_then(|own| self.in_flight.take(own));
        let previous = self.applied.position();
        let writes = &entry.batch.writes;
        self.applied
            .advance(position, || self.store.apply_all(writes));
        let deletions = writes.iter().filter(|write| write.is_delete()).count() as u64;
        self.patches.increment(writes.len() as u64 - deletions);
        self.deletions.increment(deletions);
        if !writes.is_empty() {
            self.checkpoints.changed();
        }
        let own = own.map(|own| {
            self.round_trip.record(own.age().as_secs_f64());
            own.into_answers()
        });
        self.log.record(&previous, &entry, own);
        match &entry.batch.checkpoint {
            Some(checkpoint) => self.observe(&position, checkpoint, readiness),
            None => Ok(()),
        }
    }

    /// Counts the vote in the batch at `at`, which was applied last.
    fn observe(
        &self,
        at: &Position,
        checkpoint: &Checkpoint,
        readiness: &Readiness,
    ) -> Result<(), ApplyError> {
        let outcome = self
            .checkpoints
            .observe(at, checkpoint, || self.store.digest());
        if outcome.same_history && !self.log.is_verified() {
            self.log.set_verified();
        }
        log_difference(&outcome.comparison, checkpoint);
        match outcome.verdict {
            Verdict::Unchanged => {}
            Verdict::Contradicted(mismatch) | Verdict::Undecided(mismatch) => {
                // A replica that catches up is unready anyway. The driver checks for a mismatch at
                // the log's end.
                if matches!(readiness.state(), NodeState::Ready | NodeState::Diverged) {
                    let reason = mismatch.to_string();
                    tracing::error!(reason, "not ready: the state may be wrong");
                    readiness.block(NodeState::Diverged, reason);
                }
            }
            Verdict::Upheld(position) => {
                if readiness.state() == NodeState::Diverged {
                    tracing::warn!(position, "a majority agrees with this replica: ready again");
                    readiness.set_ready();
                }
            }
            Verdict::Overruled(DigestMismatch {
                position,
                own,
                other: agreed,
                ..
            }) => {
                return Err(ApplyError::Diverged {
                    position,
                    own,
                    agreed,
                });
            }
        }
        Ok(())
    }
}

/// Logs how the vote of another replica differs from this replica.
fn log_difference(comparison: &Comparison, vote: &Checkpoint) {
    let Checkpoint {
        replica,
        position,
        digest: other,
        ..
    } = vote;
    match comparison {
        Comparison::None | Comparison::Same => {}
        Comparison::Different { own } => {
            tracing::error!(
                position,
                own_digest = %own,
                other_digest = %other,
                %replica,
                "digest mismatch with a replica"
            );
        }
        Comparison::Fork { own } => {
            let other = vote.chain;
            tracing::error!(
                position,
                own_chain = %own,
                other_chain = %other,
                %replica,
                "chain mismatch with a replica: it has read another history"
            );
        }
        Comparison::Equivocation { first } => {
            tracing::error!(
                position,
                first_digest = %first,
                other_digest = %other,
                %replica,
                "a replica voted for two digests"
            );
        }
    }
}
