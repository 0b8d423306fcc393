//! Ordered apply: from the log's entries to records.

use metrics::{Counter, Histogram};

use super::applied::{Applied, Position};
use super::checkpoint::{Checkpoints, Heard, Verdict};
use super::own::OwnBatches;
use crate::grade::Digest;
use crate::log::{Checkpoint, Entry, Origin, ReadError, Seq, Subscription};
use crate::readiness::{DIVERGED, Latch, Readiness, Scope};
use crate::store::Store;

/// After so many writes others have their turn, however much there is to apply: requests share the
/// thread, and a log that was read ahead never waits.
const TURN_WRITES: usize = 1024;

/// Why the reader stopped.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ReaderError {
    /// The log can't be read on.
    #[error(transparent)]
    Log(#[from] ReadError),
    /// Batches are missing between two that came.
    #[error("batch {got} came after batch {applied}: the ones between are missing")]
    Gap {
        /// The last batch applied.
        applied: Seq,
        /// The one that came.
        got: Seq,
    },
    /// Other replicas held something else at one position, and more of them.
    #[error(
        "at batch {position} this replica's digest was {own} and the others' {agreed}: its state is \
         wrong"
    )]
    Diverged {
        /// Where.
        position: Seq,
        /// What this replica held.
        own: Digest,
        /// What the others did.
        agreed: Digest,
    },
}

/// Applies a log to a store.
pub struct Reader {
    /// Where the records are.
    pub store: Store,
    /// How far the store has come.
    pub applied: Applied,
    /// This process's batches under way, and its origin.
    pub own: OwnBatches,
    /// What marks them.
    pub origin: Origin,
    /// What is heard of the peers' states.
    pub checkpoints: Checkpoints,
    /// Counts patches applied.
    pub patches: Counter,
    /// Counts deletions applied.
    pub deletions: Counter,
    /// Times own batches from being sent to being applied.
    pub round_trip: Histogram,
}

impl Reader {
    /// Applies what `subscription` gives until it ends. Returns why it ended. While a peer says that
    /// it holds something else, `disputed` keeps the replica unready.
    pub async fn run(
        &self,
        subscription: &mut dyn Subscription,
        readiness: &Readiness,
        disputed: &mut Option<Latch>,
    ) -> ReaderError {
        let mut entries = Vec::new();
        let mut since_turn = 0;
        loop {
            if let Err(error) = subscription.next(&mut entries).await {
                return error.into();
            }
            for entry in entries.drain(..) {
                since_turn += entry.batch.writes.len().max(1);
                if let Err(error) = self.take(entry, readiness, disputed) {
                    return error;
                }
                if since_turn >= TURN_WRITES {
                    since_turn = 0;
                    self.applied.announce();
                    tokio::task::yield_now().await;
                }
            }
            self.applied.announce();
        }
    }

    /// Applies one entry and answers who waits for it.
    fn take(
        &self,
        entry: Entry,
        readiness: &Readiness,
        disputed: &mut Option<Latch>,
    ) -> Result<(), ReaderError> {
        let applied = self.applied.seq();
        if entry.seq <= applied {
            return Ok(());
        }
        if entry.seq != applied + 1 {
            return Err(ReaderError::Gap {
                applied,
                got: entry.seq,
            });
        }
        let own = match entry.batch.origin == self.origin {
            true => self.own.take(entry.batch.number),
            false => None,
        };
        let writes = &entry.batch.writes;
        let to = Position {
            seq: entry.seq,
            time_ns: entry.time_ns,
        };
        self.applied.advance(to, || self.store.apply_all(writes));
        let deletions = writes.iter().filter(|write| write.deletes()).count() as u64;
        self.patches.increment(writes.len() as u64 - deletions);
        self.deletions.increment(deletions);
        if !writes.is_empty() {
            self.checkpoints.changed();
        }
        if let Some(own) = own {
            self.round_trip.record(own.sent.elapsed().as_secs_f64());
            own.answer(&Ok(entry.seq));
        }
        let Some(checkpoint) = entry.batch.checkpoint else {
            return Ok(());
        };
        let heard = Heard {
            seq: entry.seq,
            time_ns: entry.time_ns,
            origin: entry.batch.origin,
            checkpoint,
        };
        self.hear(heard, readiness, disputed)
    }

    fn hear(
        &self,
        heard: Heard,
        readiness: &Readiness,
        disputed: &mut Option<Latch>,
    ) -> Result<(), ReaderError> {
        let Checkpoint { position, .. } = heard.checkpoint;
        match self.checkpoints.hear(heard, || self.store.digest()) {
            Verdict::Nothing => {}
            Verdict::Disputed { own, other } => {
                let peer = heard.origin;
                tracing::error!(position, %own, %other, %peer, "a peer holds something else");
                let reason = format!(
                    "at batch {position} this replica's digest was {own} and that of replica {peer} \
                     {other}: one of them is wrong"
                );
                *disputed = Some(readiness.hold(Scope::All, DIVERGED, reason));
            }
            Verdict::Upheld => {
                tracing::warn!(position, "most hold what this replica holds");
                *disputed = None;
            }
            Verdict::Overruled {
                position,
                own,
                agreed,
            } => {
                return Err(ReaderError::Diverged {
                    position,
                    own,
                    agreed,
                });
            }
        }
        Ok(())
    }
}
