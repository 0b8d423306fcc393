//! The batches that this process sent and that did not come back yet.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, oneshot};
use tokio::time::Instant;

use super::writer::WriteError;
use crate::log::Seq;

/// When a batch that did not come back is forgotten, so that another may go in its place; one that
/// comes later still is read like anybody's. No log goes on trying for so long.
const LOST_AFTER: Duration = Duration::from_secs(60);

/// Where a request waits for what became of its patch.
pub(super) type Answer = oneshot::Sender<Result<Seq, WriteError>>;

/// Own batches under way, oldest first. There are very few: the writer's bound.
#[derive(Clone, Default)]
pub struct OwnBatches(Arc<Mutex<VecDeque<OwnBatch>>>);

/// One batch and who waits for it.
pub(super) struct OwnBatch {
    pub(super) number: u64,
    pub(super) answers: Vec<Answer>,
    pub(super) sent: Instant,
    /// Given back when the batch's fate is known: lets the next one go.
    pub(super) _slot: OwnedSemaphorePermit,
}

impl OwnBatch {
    /// Tells everyone who waits.
    pub(super) fn answer(self, result: &Result<Seq, WriteError>) {
        for answer in self.answers {
            // Who hung up needs no answer.
            let _ = answer.send(result.clone());
        }
    }
}

impl OwnBatches {
    pub(super) fn push(&self, batch: OwnBatch) {
        self.0.lock().push_back(batch);
    }

    pub(super) fn take(&self, number: u64) -> Option<OwnBatch> {
        let mut batches = self.0.lock();
        let at = batches.iter().position(|batch| batch.number == number)?;
        batches.remove(at)
    }

    /// The state was made anew: what was under way is in it, or will come and be read like
    /// anybody's, and who waits for it is told that the outcome is unknown.
    pub(super) fn forget(&self) {
        for batch in std::mem::take(&mut *self.0.lock()) {
            batch.answer(&Err(WriteError::OutcomeUnknown));
        }
    }

    /// Tells who waits for a batch sent more than `wait_max` ago that its outcome is unknown. The
    /// batch itself stays, in case that it comes back, until `LOST_AFTER`: a log may have taken one
    /// and lost it.
    pub fn give_up_waiting(&self, wait_max: Duration) {
        let mut late = Vec::new();
        let mut batches = self.0.lock();
        for batch in batches.iter_mut() {
            if batch.sent.elapsed() > wait_max {
                late.append(&mut batch.answers);
            }
        }
        batches.retain(|batch| batch.sent.elapsed() <= LOST_AFTER.max(wait_max));
        drop(batches);
        for answer in late {
            let _ = answer.send(Err(WriteError::OutcomeUnknown));
        }
    }
}
