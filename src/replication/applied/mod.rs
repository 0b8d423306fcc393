//! The position up to which this replica has applied its log.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use super::waiters::{TooManyWaiters, Waiters};
use crate::grade::Digest;
use crate::log::{Chain, Position, Seq};
use crate::store::Store;

/// The position and the tasks that wait for it. Clones share it.
#[derive(Clone)]
pub struct AppliedIndex(Arc<AppliedIndexInner>);

struct AppliedIndexInner {
    /// The position. Locked while a batch is applied, so that a holder sees no partly applied
    /// batch.
    position: Mutex<Position>,
    /// Its sequence number, readable without the lock.
    seq: AtomicU64,
    /// The position before the first batch.
    base: Position,
    waiters: Waiters,
}

/// The contents of the store at one position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AtPosition {
    /// The last batch applied.
    pub seq: Seq,
    /// The chain at that position.
    pub chain: Chain,
    /// Records at that position.
    pub records: usize,
    /// Their digest.
    pub digest: Digest,
}

/// Why [`AppliedIndex::wait_for_timeout`] returned before the position was applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WaitError {
    /// The position was not applied in time.
    TimedOut,
    /// The maximum number of waiters is reached.
    TooManyWaiters,
}

impl AppliedIndex {
    /// Starts at `base`, the position before the first batch.
    #[must_use]
    pub fn new(base: Position) -> Self {
        Self(Arc::new(AppliedIndexInner {
            position: Mutex::new(base),
            seq: AtomicU64::new(base.seq),
            base,
            waiters: Waiters::new(),
        }))
    }

    /// Resets the position after the store was cleared.
    pub(super) fn cleared(&self) {
        self.restored(self.0.base);
    }

    /// Sets the position after the store was restored to it.
    pub fn restored(&self, position: Position) {
        self.advance(position, || {});
        self.notify();
    }

    /// The last batch applied. Waits while a batch is being applied.
    #[must_use]
    pub fn position(&self) -> Position {
        *self.0.position.lock()
    }

    /// The position before the first batch.
    #[must_use]
    pub fn base(&self) -> Position {
        self.0.base
    }

    /// The last batch applied. A scan of the store may have seen a part of the next one, so its end
    /// is [`position`](Self::position), which waits for that batch.
    #[must_use]
    pub fn seq(&self) -> Seq {
        self.0.seq.load(Ordering::Acquire)
    }

    /// Position, count and digest at one moment between two batches.
    #[must_use]
    pub fn snapshot(&self, store: &Store) -> AtPosition {
        let position = self.0.position.lock();
        AtPosition {
            seq: position.seq,
            chain: position.chain,
            records: store.len(),
            digest: store.digest(),
        }
    }

    /// Waits until `seq` is applied, `wait_max` at most.
    ///
    /// # Errors
    /// `seq` was not applied in time, or there are `waiters_max` waiters already.
    pub async fn wait_for_timeout(
        &self,
        seq: Seq,
        wait_max: Duration,
        waiters_max: usize,
    ) -> Result<(), WaitError> {
        if self.seq() >= seq {
            return Ok(());
        }
        let wait = self.0.waiters.wait(seq, waiters_max, || self.seq() >= seq);
        match tokio::time::timeout(wait_max, wait).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(TooManyWaiters)) => Err(WaitError::TooManyWaiters),
            Err(_elapsed) => Err(WaitError::TimedOut),
        }
    }

    /// Waits until `seq` is applied, without a limit on the number of waiters.
    pub async fn wait_for(&self, seq: Seq) {
        let wait = self.0.waiters.wait(seq, usize::MAX, || self.seq() >= seq);
        assert_eq!(
            wait.await,
            Ok(()),
            "a wait without a bound is never refused"
        );
    }

    /// Runs `apply`, which puts the batch at `to` into the store. The step is atomic for a
    /// [`snapshot`](Self::snapshot). Only the applier, and a restore, call this.
    pub(super) fn advance(&self, to: Position, apply: impl FnOnce()) {
        let mut position = self.0.position.lock();
        apply();
        *position = to;
        self.0.seq.store(to.seq, Ordering::Release);
    }

    /// Wakes the waiters whose position is applied.
    pub(super) fn notify(&self) {
        self.0.waiters.wake(self.seq());
    }
}

#[cfg(test)]
mod tests;
