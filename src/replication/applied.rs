//! How far this replica has come in its log.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::watch;

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
    reached: watch::Sender<Seq>,
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

impl Applied {
    /// At `seq`: everything up to it is in the store.
    #[must_use]
    pub fn at(seq: Seq) -> Self {
        Self(Arc::new(Inner {
            gate: Mutex::new(()),
            seq: AtomicU64::new(seq),
            reached: watch::Sender::new(seq),
        }))
    }

    /// The last batch applied.
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

    /// Waits until `seq` is applied, `wait_max` at most; says whether it is.
    pub async fn wait_for(&self, seq: Seq, wait_max: Duration) -> bool {
        if self.seq() >= seq {
            return true;
        }
        let mut reached = self.0.reached.subscribe();
        let reached = reached.wait_for(|applied| *applied >= seq);
        matches!(tokio::time::timeout(wait_max, reached).await, Ok(Ok(_)))
    }

    /// Runs `apply`, which puts the batch at `seq` into the store, as one step to who takes a
    /// [`snapshot`](Self::snapshot). Only the log's reader calls this.
    pub(super) fn advance(&self, seq: Seq, apply: impl FnOnce()) {
        let _whole = self.0.gate.lock();
        apply();
        self.0.seq.store(seq, Ordering::Release);
    }

    /// Wakes who waits for what was advanced to.
    pub(super) fn announce(&self) {
        self.0.reached.send_replace(self.seq());
    }
}
