//! A memory log that delays deliveries, rejects appends, loses batches or panics when a test says
//! so, as a broker can do to a node.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use gradestore::log::{
    AppendError, Batch, Entry, Log, LogId, MemoryLog, Position, RandomId, ReadError, Seq,
    Subscription,
};
use gradestore::node::config::Config;
use tokio::sync::watch;

use super::InProcessNode;

/// The queue length of a node on a [`GatedLog`].
pub(crate) const QUEUE_PATCHES_MAX: usize = 3;

/// A memory log whose deliveries wait for a gate.
pub(crate) struct GatedLog {
    inner: MemoryLog,
    open: watch::Sender<bool>,
    refusing: AtomicBool,
    losing: Arc<AtomicBool>,
    crashing: Arc<AtomicBool>,
}

impl GatedLog {
    pub(crate) fn new(origin: RandomId) -> Arc<Self> {
        Arc::new(Self {
            inner: MemoryLog::new(origin, 0),
            open: watch::Sender::new(false),
            refusing: AtomicBool::new(false),
            losing: Arc::default(),
            crashing: Arc::default(),
        })
    }

    /// Opens the gate for good.
    pub(crate) fn open(&self) {
        self.open.send_replace(true);
    }

    /// Rejects appends from now on.
    pub(crate) fn reject_appends(&self) {
        self.refusing.store(true, Ordering::Relaxed);
    }

    /// Panics in the task that reads the log, at the next batch.
    pub(crate) fn panic_on_next_batch(&self) {
        self.crashing.store(true, Ordering::Relaxed);
    }

    /// Skips a sequence number from now on, as if a batch had been lost.
    pub(crate) fn skip_batches(&self) {
        self.losing.store(true, Ordering::Relaxed);
    }
}

impl Log for GatedLog {
    fn kind(&self) -> &'static str {
        self.inner.kind()
    }

    fn id(&self) -> LogId {
        self.inner.id()
    }

    fn first(&self) -> Seq {
        self.inner.first()
    }

    fn end(&self) -> Seq {
        self.inner.end()
    }

    fn in_flight_max(&self) -> usize {
        self.inner.in_flight_max()
    }

    fn append(&self, batch: Batch) -> BoxFuture<'_, Result<(), AppendError>> {
        match self.refusing.load(Ordering::Relaxed) {
            true => async { Err(AppendError::Closed) }.boxed(),
            false => self.inner.append(batch),
        }
    }

    fn subscribe(
        &self,
        after: Position,
    ) -> BoxFuture<'_, Result<Box<dyn Subscription>, ReadError>> {
        async move {
            Ok(Box::new(GatedSubscription {
                inner: self.inner.subscribe(after).await?,
                open: self.open.subscribe(),
                losing: Arc::clone(&self.losing),
                crashing: Arc::clone(&self.crashing),
            }) as Box<dyn Subscription>)
        }
        .boxed()
    }
}

struct GatedSubscription {
    inner: Box<dyn Subscription>,
    open: watch::Receiver<bool>,
    losing: Arc<AtomicBool>,
    crashing: Arc<AtomicBool>,
}

impl Subscription for GatedSubscription {
    fn next<'a>(&'a mut self, entries: &'a mut Vec<Entry>) -> BoxFuture<'a, Result<(), ReadError>> {
        async {
            let opened = self.open.wait_for(|open| *open).await;
            opened.map_err(|_| ReadError::Closed)?;
            self.inner.next(entries).await?;
            assert!(!self.crashing.load(Ordering::Relaxed), "a broken invariant");
            if self.losing.load(Ordering::Relaxed) {
                for entry in entries {
                    entry.position.seq += 1;
                }
            }
            Ok(())
        }
        .boxed()
    }
}

/// A node on a closed [`GatedLog`], with a short queue and batches of one patch.
pub(crate) async fn start_node(wait_max: Duration) -> (Arc<GatedLog>, InProcessNode) {
    start_node_with(|config| config.writer.wait_max = wait_max).await
}

/// The same with more changes of the configuration.
pub(crate) async fn start_node_with(
    adjust: impl FnOnce(&mut Config),
) -> (Arc<GatedLog>, InProcessNode) {
    let origin = RandomId::random().unwrap();
    let log = GatedLog::new(origin);
    let node = InProcessNode::start_on_log(log.clone(), origin, |config| {
        config.writer.queue_requests_max = QUEUE_PATCHES_MAX;
        config.writer.batch_writes_max = 1;
        adjust(config);
    });
    let node = node.await;
    (log, node)
}
