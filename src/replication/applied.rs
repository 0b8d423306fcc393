//! How far this replica has come in its log.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use super::waiters::{TooManyWaiters, Waiters};
use crate::grade::Digest;
use crate::log::{Chain, Position, Seq};
use crate::store::Store;

/// The position, and what waits for it. Clones are the same.
#[derive(Clone)]
pub struct Applied(Arc<Inner>);

struct Inner {
    /// The position. Held while a batch is applied, so that whoever holds it sees no half of one.
    position: Mutex<Position>,
    /// Its sequence number, for those that don't wait for that.
    seq: AtomicU64,
    /// Before the first batch.
    base: Position,
    waiters: Waiters,
}

/// Facts that belong together: what the store held at one position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AtPosition {
    /// The last batch applied.
    pub seq: Seq,
    /// The history up to it.
    pub chain: Chain,
    /// Records at that position.
    pub records: usize,
    /// Their digest.
    pub digest: Digest,
}

/// Why [`Applied::wait_for`] returned before the position was applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WaitError {
    /// The position was not applied in time.
    TimedOut,
    /// The maximum number of waiters is reached.
    TooManyWaiters,
}

impl Applied {
    /// At `base`, before the first batch.
    #[must_use]
    pub fn new(base: Position) -> Self {
        Self(Arc::new(Inner {
            position: Mutex::new(base),
            seq: AtomicU64::new(base.seq),
            base,
            waiters: Waiters::new(),
        }))
    }

    /// The store has just been cleared.
    pub(super) fn cleared(&self) {
        self.restored(self.0.base);
    }

    /// The store has just been restored to `position`: the log goes on after it.
    pub fn restored(&self, position: Position) {
        self.advance(position, || {});
        self.notify();
    }

    /// The last batch applied, between two batches.
    #[must_use]
    pub fn position(&self) -> Position {
        *self.0.position.lock()
    }

    /// Before the first batch.
    #[must_use]
    pub fn base(&self) -> Position {
        self.0.base
    }

    /// The last batch applied. A scan may have seen some of the next one: what it ends at is
    /// [`position`](Self::position), which waits for that.
    #[must_use]
    pub fn seq(&self) -> Seq {
        self.0.seq.load(Ordering::Acquire)
    }

    /// Position, count and digest as of one moment between two batches.
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
    pub async fn wait_for(
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

    /// Waits until `seq` is applied. The number of other waiters does not matter.
    pub async fn reach(&self, seq: Seq) {
        let wait = self.0.waiters.wait(seq, usize::MAX, || self.seq() >= seq);
        assert_eq!(
            wait.await,
            Ok(()),
            "a wait without a bound is never refused"
        );
    }

    /// Runs `apply`, which puts the batch at `to` into the store, as one step to who takes a
    /// [`snapshot`](Self::snapshot). Only the log's reader calls this.
    pub(super) fn advance(&self, to: Position, apply: impl FnOnce()) {
        let mut position = self.0.position.lock();
        apply();
        *position = to;
        self.0.seq.store(to.seq, Ordering::Release);
    }

    /// Wakes the waiters for what was advanced to.
    pub(super) fn notify(&self) {
        self.0.waiters.wake(self.seq());
    }
}

#[cfg(test)]
mod tests;
