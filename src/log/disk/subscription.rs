//! Reading: from the disk while far behind, from memory while close.
//!
//! There is no hand-over to get wrong. A reader knows the one batch it wants; when that is among
//! the few newest it comes from memory, undecoded, else from the disk. The thread that writes
//! never waits for a reader: what a slow one misses in memory is on the disk.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::sync::watch;

use super::{Shared, format};
use crate::log::{Entry, ReadError, Seq, Subscription};

/// Entries kept in memory: enough that a reader that keeps up never goes to the disk.
const RECENT_MAX: usize = 8;
/// How often a reader looks whether the database is open again.
const REOPENED_POLL_EVERY: Duration = Duration::from_millis(50);

/// The newest entries, without a gap.
#[derive(Default)]
pub(super) struct Recent(VecDeque<Entry>);

impl Recent {
    /// Adds the entry after the last.
    pub(super) fn push(&mut self, entry: Entry) {
        if self.0.len() == RECENT_MAX {
            self.0.pop_front();
        }
        self.0.push_back(entry);
    }

    /// Copies the entries from `from` on; `false` if that one is not here.
    fn copy(&self, from: Seq, out: &mut Vec<Entry>) -> bool {
        let held = self.0.front().is_some_and(|first| first.seq <= from)
            && self.0.back().is_some_and(|last| from <= last.seq);
        if held {
            out.extend(self.0.iter().filter(|entry| entry.seq >= from).cloned());
        }
        held
    }
}

/// A reader's place.
pub(super) struct DiskSubscription {
    pub(super) shared: Arc<Shared>,
    /// The last durable batch.
    pub(super) end: watch::Receiver<Seq>,
    /// The batch to give next.
    pub(super) wanted: Seq,
}

impl DiskSubscription {
    async fn give(&mut self, entries: &mut Vec<Entry>) -> Result<(), ReadError> {
        let wanted = self.wanted;
        let ended = self.end.wait_for(|end| *end >= wanted).await;
        let end = *ended.map_err(|_closed| ReadError::Closed)?;
        let before = entries.len();
        if !self.shared.recent.lock().copy(wanted, entries) {
            entries.append(&mut self.read(end).await?);
        }
        self.wanted += (entries.len() - before) as u64;
        Ok(())
    }

    /// Reads and decodes a piece off the disk, on a thread that may block.
    async fn read(&self, end: Seq) -> Result<Vec<Entry>, ReadError> {
        loop {
            let (shared, wanted) = (Arc::clone(&self.shared), self.wanted);
            let piece = tokio::task::spawn_blocking(move || {
                let stored = match shared.shelf.read().as_ref() {
                    Some(shelf) => shelf.read(wanted, end)?,
                    None => return Ok(None),
                };
                let entries = stored.iter().map(|(seq, value)| format::read(*seq, value));
                entries.collect::<Result<Vec<Entry>, _>>().map(Some)
            });
            // A thread that panicked, or a runtime that is going away.
            let piece = piece.await.map_err(|_| ReadError::Closed)?;
            match piece? {
                Some(entries) => return Ok(entries),
                None if self.end.has_changed().is_err() => return Err(ReadError::Closed),
                None => tokio::time::sleep(REOPENED_POLL_EVERY).await,
            }
        }
    }
}

impl Subscription for DiskSubscription {
    fn next<'a>(&'a mut self, entries: &'a mut Vec<Entry>) -> BoxFuture<'a, Result<(), ReadError>> {
        self.give(entries).boxed()
    }
}
