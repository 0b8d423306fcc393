//! Reads the log ahead while the store is being restored.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;

use crate::log::{Entry, ReadError, Subscription};

/// The maximum number of entries that one call returns.
const RETURN_MAX: usize = 64;

/// A subscription that reads ahead, up to a number of bytes. Later entries stay in the log.
pub struct Buffered {
    log: Box<dyn Subscription>,
    held: VecDeque<Entry>,
    bytes_max: u64,
    counts: Arc<BufferCounts>,
}

/// The contents of a buffer, shared with other tasks.
#[derive(Debug, Default)]
pub struct BufferCounts {
    batches: AtomicU64,
    bytes: AtomicU64,
}

impl BufferCounts {
    /// The number of batches.
    #[must_use]
    pub fn batches(&self) -> u64 {
        self.batches.load(Ordering::Relaxed)
    }

    /// Their approximate size in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    fn add(&self, entry: &Entry) {
        self.batches.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(entry.bytes(), Ordering::Relaxed);
    }

    fn remove(&self, entry: &Entry) {
        self.batches.fetch_sub(1, Ordering::Relaxed);
        self.bytes.fetch_sub(entry.bytes(), Ordering::Relaxed);
    }
}

impl Buffered {
    /// Holds nothing yet.
    pub(super) fn new(
        log: Box<dyn Subscription>,
        bytes_max: u64,
        counts: Arc<BufferCounts>,
    ) -> Self {
        Self {
            log,
            held: VecDeque::new(),
            bytes_max,
            counts,
        }
    }

    /// Reads ahead, as far as the bound allows, until dropped.
    pub(super) async fn fill(&mut self) -> Result<Infallible, ReadError> {
        let mut entries = Vec::new();
        while self.counts.bytes() < self.bytes_max {
            self.log.next(&mut entries).await?;
            for entry in entries.drain(..) {
                self.counts.add(&entry);
                self.held.push_back(entry);
            }
        }
        future::pending().await
    }
}

impl Drop for Buffered {
    fn drop(&mut self) {
        for entry in &self.held {
            self.counts.remove(entry);
        }
    }
}

impl Subscription for Buffered {
    fn next<'a>(&'a mut self, entries: &'a mut Vec<Entry>) -> BoxFuture<'a, Result<(), ReadError>> {
        if self.held.is_empty() {
            if self.held.capacity() > 0 {
                self.held = VecDeque::new();
            }
            return self.log.next(entries);
        }
        for entry in self.held.drain(..RETURN_MAX.min(self.held.len())) {
            self.counts.remove(&entry);
            entries.push(entry);
        }
        future::ready(Ok(())).boxed()
    }
}
