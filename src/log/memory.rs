//! The log of one process that keeps nothing: batches go from the writer to the reader in order.

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use tokio::sync::mpsc;

use super::{AppendError, Batch, Entry, Log, LogId, Origin, ReadError, Seq, Subscription, now_ns};

/// Batches between writer and reader. One is taken while the next one fills; see
/// [`Log::in_flight_max`].
const IN_FLIGHT_MAX: usize = 2;

/// A log in memory, with one reader. Nothing survives the process.
pub struct MemoryLog {
    id: LogId,
    /// Where numbering began.
    base: Seq,
    /// The last sequence number, held while an entry takes its place in the channel.
    end: Mutex<Seq>,
    entries: mpsc::Sender<Entry>,
    reader: Mutex<Option<mpsc::Receiver<Entry>>>,
}

impl MemoryLog {
    /// An empty log that is known by `origin`: it lives as long as the process does. Its first
    /// batch is `base` + 1.
    #[must_use]
    pub fn new(origin: Origin, base: Seq) -> Self {
        let (entries, reader) = mpsc::channel(IN_FLIGHT_MAX);
        Self {
            id: LogId(format!("memory-{origin}").into()),
            base,
            end: Mutex::new(base),
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
        // Nothing is held: what is under way is its reader's alone.
        self.end() + 1
    }

    fn end(&self) -> Seq {
        *self.end.lock()
    }

    fn in_flight_max(&self) -> usize {
        IN_FLIGHT_MAX
    }

    fn append(&self, batch: Batch) -> BoxFuture<'_, Result<(), AppendError>> {
        async {
            let permit = self.entries.reserve().await;
            let permit = permit.map_err(|_closed| AppendError::Closed)?;
            let mut end = self.end.lock();
            *end += 1;
            permit.send(Entry {
                seq: *end,
                time_ns: now_ns(),
                batch,
            });
            Ok(())
        }
        .boxed()
    }

    fn subscribe(&self, after: Seq) -> BoxFuture<'_, Result<Box<dyn Subscription>, ReadError>> {
        async move {
            // Nothing is kept, so there is one place to start and one reader to have.
            let wanted = after + 1;
            let reader = match after == self.base {
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
