//! How far this replica has come in its log.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use super::waiters::{TooManyWaiters, Waiters};
use crate::grade::Digest;
use crate::log::Seq;
use crate::store::Store;

/// The position, and what waits for it. Clones are the same.
#[derive(Clone)]
pub struct Applied(Arc<Inner>);

struct Inner {
    /// Held while a batch is applied, so that who holds it sees no half of one.
    gate: Mutex<()>,
    seq: AtomicU64,
    /// When the log took the batch at `seq`.
    time_ns: AtomicU64,
    began_ns: u64,
    waiters: Waiters,
}

/// Facts that belong together: what the store held at one position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AtPosition {
    /// The last batch applied.
    pub seq: Seq,
    /// Records at that position.
    pub records: usize,
    /// Their digest.
    pub digest: Digest,
}

/// A position and its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// The last batch applied.
    pub seq: Seq,
    /// When the log took it, in nanoseconds since 1970; before the first one, when this node began.
    pub time_ns: u64,
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
    /// Before the first batch, for a node that began at `began_ns`.
    #[must_use]
    pub fn new(began_ns: u64) -> Self {
        Self(Arc::new(Inner {
            gate: Mutex::new(()),
            seq: AtomicU64::new(0),
            time_ns: AtomicU64::new(began_ns),
            began_ns,
            waiters: Waiters::new(),
        }))
    }

    /// The store has just been cleared.
    pub(super) fn cleared(&self) {
        let time_ns = self.0.began_ns;
        self.restored(Position { seq: 0, time_ns });
    }

    /// The store has just been restored to `position`: the log goes on after it.
    pub fn restored(&self, position: Position) {
        self.advance(position, || {});
        self.announce();
    }

    /// Where the log is, and since when.
    #[must_use]
    pub fn position(&self) -> Position {
        let _between_batches = self.0.gate.lock();
        Position {
            seq: self.seq(),
            time_ns: self.0.time_ns.load(Ordering::Relaxed),
        }
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
        let _between_batches = self.0.gate.lock();
        AtPosition {
            seq: self.seq(),
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
        let _whole = self.0.gate.lock();
        apply();
        self.0.time_ns.store(to.time_ns, Ordering::Relaxed);
        self.0.seq.store(to.seq, Ordering::Release);
    }

    /// Wakes the waiters for what was advanced to.
    pub(super) fn announce(&self) {
        self.0.waiters.wake(self.seq());
    }
}

#[cfg(test)]
mod tests;
