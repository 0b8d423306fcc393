//! Ordered apply: from the log's entries to records.

use metrics::{Counter, Histogram};

use super::applied::{Applied, Position};
use super::own::OwnBatches;
use crate::log::{Entry, Origin, ReadError, Seq, Subscription};
use crate::store::Store;

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
    /// Counts patches applied.
    pub patches: Counter,
    /// Times own batches from being sent to being applied.
    pub round_trip: Histogram,
}

impl Reader {
    /// Applies what `subscription` gives until it ends. Returns why it ended.
    pub async fn run(&self, subscription: &mut dyn Subscription) -> ReaderError {
        let mut entries = Vec::new();
        loop {
            if let Err(error) = subscription.next(&mut entries).await {
                return error.into();
            }
            for entry in entries.drain(..) {
                if let Err(gap) = self.take(entry) {
                    return gap;
                }
            }
            self.applied.announce();
        }
    }

    /// Applies one entry and answers who waits for it.
    fn take(&self, entry: Entry) -> Result<(), ReaderError> {
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
        let patches = match &own {
            Some(own) => &own.patches,
            None => &entry.batch.patches,
        };
        let to = Position {
            seq: entry.seq,
            time_ns: entry.time_ns,
        };
        self.applied.advance(to, || {
            for patch in patches.iter() {
                self.store.apply(patch);
            }
        });
        self.patches.increment(patches.len() as u64);
        if let Some(own) = own {
            self.round_trip.record(own.sent.elapsed().as_secs_f64());
            own.answer(&Ok(entry.seq));
        }
        Ok(())
    }
}
