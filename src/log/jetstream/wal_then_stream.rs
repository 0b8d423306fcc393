//! Reads this replica's WAL, and the stream from its end on.

use std::sync::Arc;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;

use super::shared::JetStreamShared;
use super::subscription::JetStreamSubscription;
use crate::log::wal::{ReplicaWal, WalReader};
use crate::log::{Entry, Position, ReadError, Subscription};

/// A subscription that begins in the WAL.
pub(super) struct WalThenStream {
    shared: Arc<JetStreamShared>,
    wal: Arc<ReplicaWal>,
    /// The last entry that was returned.
    last: Position,
    source: Source,
}

enum Source {
    /// `None` after a call was dropped while it read.
    Wal(Option<WalReader>),
    Stream(JetStreamSubscription),
}

impl WalThenStream {
    /// Starts after `after`.
    ///
    /// # Errors
    /// The WAL does not have the next entry, and the stream cannot be read from there.
    pub(super) async fn start(
        shared: Arc<JetStreamShared>,
        wal: Arc<ReplicaWal>,
        after: Position,
    ) -> Result<Self, ReadError> {
        shared.reads_stream.set(false);
        // Otherwise the stream would deliver what is recorded a moment later.
        wal.flush().await;
        let source = match wal.read_after(after).await {
            Some(reader) => Source::Wal(Some(reader)),
            None => Source::Stream(JetStreamSubscription::start(Arc::clone(&shared), after).await?),
        };
        Ok(Self {
            shared,
            wal,
            last: after,
            source,
        })
    }

    async fn fill(&mut self, entries: &mut Vec<Entry>) -> Result<(), ReadError> {
        loop {
            let reader = match &mut self.source {
                Source::Stream(stream) => return stream.fill(entries).await,
                Source::Wal(reader) => reader.take(),
            };
            let reader = match reader {
                Some(reader) => Some(reader),
                None => self.wal.read_after(self.last).await,
            };
            let read = match reader {
                Some(reader) => self.wal.read(reader).await,
                None => None,
            };
            match read {
                Some((reader, mut read)) => {
                    self.source = Source::Wal(Some(reader));
                    if let Some(newest) = read.last() {
                        self.last = newest.position;
                    }
                    entries.append(&mut read);
                    return Ok(());
                }
                None => {
                    let (shared, applied) = (Arc::clone(&self.shared), self.wal.known_end());
                    // After a hole in the WAL the stream must have the rest.
                    let end = shared.bounds().await?.end;
                    if end < applied {
                        return Err(ReadError::Shorter { end, applied });
                    }
                    let stream = JetStreamSubscription::start(shared, self.last).await?;
                    self.source = Source::Stream(stream);
                }
            }
        }
    }
}

impl Subscription for WalThenStream {
    fn next<'a>(&'a mut self, entries: &'a mut Vec<Entry>) -> BoxFuture<'a, Result<(), ReadError>> {
        self.fill(entries).boxed()
    }
}
