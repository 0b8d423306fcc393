//! A log in memory, which passes batches from the writer to the reader in order and keeps none.

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use tokio::sync::mpsc;

use super::codec::FORMAT;
use super::{
    AppendError, Batch, BatchId, ChainEntry, Entry, Log, LogId, Position, RandomId, ReadError, Seq,
    StoredBatch, Subscription, now_ns,
};

/// Batches between writer and reader: the reader applies one while the next one fills; see
/// [`Log::in_flight_max`].
const IN_FLIGHT_MAX: usize = 2;

/// A log in memory, with one reader. Nothing survives the process.
pub struct MemoryLog {
    id: LogId,
    /// This process, as the writer of all batches.
    writer: RandomId,
    /// The position before the first batch.
    base: Seq,
    /// The last position; locked while an entry is put into the channel. Its chain leaves out the
    /// payloads: no other process has this log, and batches are never encoded.
    last: Mutex<Position>,
    entries: mpsc::Sender<Entry>,
    reader: Mutex<Option<mpsc::Receiver<Entry>>>,
}

impl MemoryLog {
    /// An empty log, identified by `node` because it ends with the process. Its first batch is
    /// `base` + 1.
    #[must_use]
    pub fn new(node: RandomId, base: Seq) -> Self {
        let (entries, reader) = mpsc::channel(IN_FLIGHT_MAX);
        let id = LogId(format!("memory-{node}").into());
        Self {
            last: Mutex::new(Position::base(&id, base, now_ns())),
            id,
            writer: node,
            base,
            entries,
            reader: Mutex::new(Some(reader)),
        }
    }
}

impl Log for MemoryLog {
    fn kind(&self) -> &'static str {
        "memory"
    }

    fn id(&self) -> LogId {
        self.id.clone()
    }

    fn first(&self) -> Seq {
        // The log keeps no batches: those in the channel belong to its reader.
        self.end() + 1
    }

    fn end(&self) -> Seq {
        self.last.lock().seq
    }

    fn in_flight_max(&self) -> usize {
        IN_FLIGHT_MAX
    }

    fn append(&self, batch: Batch) -> BoxFuture<'_, Result<(), AppendError>> {
        async {
            let permit = self.entries.reserve().await;
            let permit = permit.map_err(|_closed| AppendError::Closed)?;
            let mut last = self.last.lock();
            let id = BatchId {
                writer: self.writer,
                seq: last.seq - self.base + 1,
            };
            let stored = StoredBatch {
                format: FORMAT,
                id,
                payload: &[],
            };
            *last = last.next(now_ns(), ChainEntry::Batch(stored));
            let position = *last;
            permit.send(Entry {
                position,
                batch,
                message: None,
            });
            Ok(())
        }
        .boxed()
    }

    fn subscribe(
        &self,
        after: Position,
    ) -> BoxFuture<'_, Result<Box<dyn Subscription>, ReadError>> {
        async move {
            // No batches are kept, so there is only one start position and one reader.
            let wanted = after.seq + 1;
            let reader = match after.seq == self.base {
                true => self.reader.lock().take(),
                false => None,
            };
            let reader = reader.ok_or(ReadError::NotHeld { wanted })?;
            Ok(Box::new(MemorySubscription(reader)) as Box<dyn Subscription>)
        }
        .boxed()
    }
}

struct MemorySubscription(mpsc::Receiver<Entry>);

impl Subscription for MemorySubscription {
    fn next<'a>(&'a mut self, entries: &'a mut Vec<Entry>) -> BoxFuture<'a, Result<(), ReadError>> {
        async {
            match self.0.recv_many(entries, IN_FLIGHT_MAX).await {
                0 => Err(ReadError::Closed),
                _ => Ok(()),
            }
        }
        .boxed()
    }
}
