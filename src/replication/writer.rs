//! Group commit: from writes that wait to batches in the log.

use std::future::{self, Future};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use metrics::Histogram;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::checkpoint::Checkpoints;
use super::own::{Answer, OwnBatch, OwnBatches};
use crate::grade::Write;
use crate::log::{AppendError, Batch, Log, Origin, Seq};

/// The bounds of the write path.
#[derive(Debug, Clone, Copy)]
pub struct WriterLimits {
    /// Requests that may wait for a batch; one more is refused. A group of a [`Bulk`] is one of them.
    pub queue_patches_max: usize,
    /// Writes a batch. As JSON a write stays under 800 bytes, so 1,024 of them stay under the
    /// 1 MiB that a message broker takes by default.
    pub batch_patches_max: usize,
    /// How long a write may wait for the log.
    pub wait_max: Duration,
    /// Bulks at once; one more is refused. With the size of a group this bounds what all of them
    /// hold.
    pub bulks_max: usize,
}

/// The most writes in a group of a [`Bulk`]; fewer where a batch is smaller.
const GROUP_WRITES_MAX: usize = 1000;

/// How many turns a batch waits for more. Three in place of one made a disk log that syncs in 0.1 ms
/// 5 % quicker (64 connections); with the other logs there was no difference.
const TURNS: usize = 3;

/// Why a write was not answered with a position.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WriteError {
    /// Too many writes wait already, or there are too many bulks. Nothing was written.
    #[error("the write queue is full")]
    QueueFull,
    /// The replica is stopping. Nothing was written.
    #[error("the replica is stopping")]
    Stopping,
    /// The log did not take the batch. Nothing was written.
    #[error("{0}")]
    NotWritten(Arc<str>),
    /// The batch was sent and did not come back in time. It may still be applied.
    #[error("the log did not say in time whether it took the write")]
    OutcomeUnknown,
}

struct Waiting {
    writes: Writes,
    answer: Answer,
}

enum Writes {
    One(Write),
    /// All for one batch.
    Group {
        writes: Vec<Write>,
        /// Of whoever handed it in, and may be gone since.
        _place: Arc<OwnedSemaphorePermit>,
    },
}

impl Writes {
    fn len(&self) -> usize {
        match self {
            Self::One(_) => 1,
            Self::Group { writes, .. } => writes.len(),
        }
    }

    fn append_to(self, batch: &mut Vec<Write>) {
        match self {
            Self::One(write) => batch.push(write),
            Self::Group { writes, .. } => batch.extend(writes),
        }
    }
}

/// Where requests hand in their writes. Clones feed the same queue.
#[derive(Clone)]
pub struct Writer {
    queue: mpsc::Sender<Waiting>,
    log: Arc<dyn Log>,
    bulks: Arc<Semaphore>,
    group_writes_max: usize,
}

/// Hands in writes by the group, of which all go into one batch.
pub struct Bulk {
    writer: Writer,
    place: Arc<OwnedSemaphorePermit>,
}

impl Bulk {
    /// The most writes of a group.
    #[must_use]
    pub fn group_max(&self) -> usize {
        self.writer.group_writes_max
    }

    /// Hands `writes` in, at most [`group_max`](Self::group_max) of them, and waits until this
    /// replica has applied all; their batch's sequence number.
    ///
    /// Dropping the future does not take them back.
    ///
    /// # Errors
    /// See [`WriteError`]: each variant says whether anything was written.
    pub async fn write(&self, writes: Vec<Write>) -> Result<Seq, WriteError> {
        let place = Arc::clone(&self.place);
        let writes = Writes::Group {
            writes,
            _place: place,
        };
        self.writer.hand_in(writes)?.await
    }
}

impl Writer {
    /// A queue, and the task that empties it into `log`.
    #[must_use]
    pub fn new(
        log: Arc<dyn Log>,
        origin: Origin,
        own: OwnBatches,
        checkpoints: Checkpoints,
        limits: WriterLimits,
        batch_patches: Histogram,
    ) -> (Self, WriterTask) {
        let (sender, queue) = mpsc::channel(limits.queue_patches_max);
        let in_flight_max = log.in_flight_max();
        let writer = Self {
            queue: sender,
            log: Arc::clone(&log),
            bulks: Arc::new(Semaphore::new(limits.bulks_max)),
            group_writes_max: limits.batch_patches_max.min(GROUP_WRITES_MAX),
        };
        let task = WriterTask {
            log,
            origin,
            own,
            checkpoints,
            limits,
            queue,
            in_flight_max,
            slots: Arc::new(Semaphore::new(in_flight_max)),
            number: 0,
            batch_patches,
        };
        (writer, task)
    }

    /// Hands `write` in and waits until this replica has applied it; its batch's sequence number.
    ///
    /// Dropping the future does not take the write back.
    ///
    /// # Errors
    /// See [`WriteError`]: each variant says whether anything was written.
    pub async fn write(&self, write: Write) -> Result<Seq, WriteError> {
        self.hand_in_one(write)?.await
    }

    /// Hands `write` in. What is given back waits for it as [`write`](Self::write) does; dropping that does
    /// not take the write back.
    ///
    /// # Errors
    /// It was not taken; nothing was written.
    pub fn hand_in_one(&self, write: Write) -> Result<HandedIn, WriteError> {
        self.hand_in(Writes::One(write))
    }

    /// Begins to hand in many.
    ///
    /// # Errors
    /// There are too many bulks already.
    pub fn bulk(&self) -> Result<Bulk, WriteError> {
        let place = Arc::clone(&self.bulks).try_acquire_owned();
        let place = place.map_err(|_none_free| WriteError::QueueFull)?;
        Ok(Bulk {
            writer: self.clone(),
            place: Arc::new(place),
        })
    }

    fn hand_in(&self, writes: Writes) -> Result<HandedIn, WriteError> {
        if let Some(why) = self.log.away() {
            return Err(WriteError::NotWritten(why));
        }
        let (answer, answered) = oneshot::channel();
        self.queue
            .try_send(Waiting { writes, answer })
            .map_err(|error| match error {
                mpsc::error::TrySendError::Full(_) => WriteError::QueueFull,
                mpsc::error::TrySendError::Closed(_) => WriteError::Stopping,
            })?;
        Ok(HandedIn(answered))
    }

    /// Requests that wait for a batch; a group is one.
    #[must_use]
    pub fn queue_patches(&self) -> usize {
        self.queue.max_capacity() - self.queue.capacity()
    }
}

/// What was handed in: waits until this replica has applied it, and is its batch's sequence number.
#[must_use = "whether it was applied is known only once it has been waited for"]
pub struct HandedIn(oneshot::Receiver<Result<Seq, WriteError>>);

impl Future for HandedIn {
    type Output = Result<Seq, WriteError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        // An answer that was dropped belongs to a batch that was sent and never came back.
        let answered = Pin::new(&mut self.0).poll(cx);
        answered.map(|answer| answer.unwrap_or(Err(WriteError::OutcomeUnknown)))
    }
}

/// Collects what waits into batches and appends them.
pub struct WriterTask {
    log: Arc<dyn Log>,
    origin: Origin,
    own: OwnBatches,
    checkpoints: Checkpoints,
    limits: WriterLimits,
    queue: mpsc::Receiver<Waiting>,
    in_flight_max: usize,
    slots: Arc<Semaphore>,
    number: u64,
    batch_patches: Histogram,
}

impl WriterTask {
    /// Runs until `stop` is cancelled, what waits is appended and what was appended came back.
    pub async fn run(mut self, stop: CancellationToken) {
        let log = Arc::clone(&self.log);
        let mut appends = Appends::new(&self.own);
        // What is left of it when a batch has been made has no room in that one, and begins the next.
        let mut waiting: Vec<Waiting> = Vec::with_capacity(self.limits.batch_patches_max);
        loop {
            // The slot first: what arrives while all are taken makes the next batch larger.
            let acquired = Arc::clone(&self.slots).acquire_owned();
            let acquired = tokio::time::timeout(self.limits.wait_max, acquired);
            let slot = match appends.beside(acquired).await {
                Ok(Ok(slot)) => slot,
                Ok(Err(_closed)) => break,
                Err(_elapsed) => {
                    self.refuse(std::mem::take(&mut waiting));
                    continue;
                }
            };
            let patches_max = self.limits.batch_patches_max;
            let open = !self.queue.is_closed();
            let left = !waiting.is_empty();
            let woken = appends.beside(async {
                tokio::select! {
                    biased;
                    () = future::ready(()), if left => Woken::Writes,
                    received = self.queue.recv_many(&mut waiting, patches_max) => match received {
                        0 => Woken::Closed,
                        _ => Woken::Writes,
                    },
                    () = stop.cancelled(), if open => Woken::Stop,
                    () = self.checkpoints.due() => Woken::Checkpoint,
                }
            });
            match woken.await {
                Woken::Closed => break,
                Woken::Writes => {
                    // Some turns for the tasks that are ready to run: what they hand in goes along.
                    // A batch then holds dozens of patches where it held one or two, and a writer
                    // that is alone waits for nobody.
                    for _ in 0..TURNS {
                        tokio::task::yield_now().await;
                    }
                    while waiting.len() < patches_max
                        && let Ok(another) = self.queue.try_recv()
                    {
                        waiting.push(another);
                    }
                }
                Woken::Checkpoint => {}
                Woken::Stop => {
                    self.queue.close();
                    continue;
                }
            }
            let checkpoint = self.checkpoints.speak();
            if waiting.is_empty() && (checkpoint.is_none() || log.away().is_some()) {
                continue;
            }
            self.number += 1;
            let number = self.number;
            let fitting = fitting(&waiting, patches_max);
            let mut writes = Vec::with_capacity(fitting);
            let answers = waiting.drain(..fitting).map(|waiting| {
                waiting.writes.append_to(&mut writes);
                waiting.answer
            });
            let answers: Vec<Answer> = answers.collect();
            if !writes.is_empty() {
                self.batch_patches.record(writes.len() as f64);
            }
            let writes: Arc<[Write]> = writes.into();
            self.own.push(OwnBatch {
                number,
                answers,
                sent: Instant::now(),
                _slot: slot,
            });
            let batch = Batch {
                origin: self.origin,
                number,
                writes,
                checkpoint,
            };
            appends.begin(number, log.append(batch)).await;
        }
        // All slots are back when every batch is.
        let all = u32::try_from(self.in_flight_max).unwrap_or(u32::MAX);
        let _ = appends.beside(self.slots.acquire_many(all)).await;
    }

    /// The log has taken nothing for too long: who waits is told that nothing was written.
    fn refuse(&mut self, mut waiting: Vec<Waiting>) {
        while let Ok(another) = self.queue.try_recv() {
            waiting.push(another);
        }
        tracing::warn!(refused = waiting.len(), "log stalled");
        for waiting in waiting {
            let why = "the log gave back no batch in time".into();
            let _ = waiting.answer.send(Err(WriteError::NotWritten(why)));
        }
    }
}

/// How many of `waiting` go into one batch: as many as there is room for, and the first in any case.
fn fitting(waiting: &[Waiting], writes_max: usize) -> usize {
    let mut writes = 0;
    let fit = waiting.iter().take_while(|waiting| {
        writes += waiting.writes.len();
        writes <= writes_max
    });
    fit.count().max(waiting.len().min(1))
}

/// What ended the wait for something to send.
enum Woken {
    /// Writes came.
    Writes,
    /// It is time for a checkpoint.
    Checkpoint,
    /// No more writes are to be taken in.
    Stop,
    /// None will come.
    Closed,
}

/// The appends that the log has begun and not ended.
struct Appends<'a> {
    under_way: FuturesUnordered<BoxFuture<'a, (u64, Result<(), AppendError>)>>,
    own: OwnBatches,
    /// Whether the last one failed: a log that refuses everything is told of once.
    failing: bool,
}

impl<'a> Appends<'a> {
    fn new(own: &OwnBatches) -> Self {
        Self {
            under_way: FuturesUnordered::new(),
            own: own.clone(),
            failing: false,
        }
    }

    /// Starts an append. It takes its place now, before any that is started later; most logs end
    /// it at once as well.
    async fn begin(&mut self, number: u64, mut append: BoxFuture<'a, Result<(), AppendError>>) {
        let polled = future::poll_fn(|context| Poll::Ready(append.as_mut().poll(context))).await;
        match polled {
            Poll::Ready(result) => self.end(number, result),
            Poll::Pending => {
                let append = async move { (number, append.await) };
                self.under_way.push(Box::pin(append));
            }
        }
    }

    /// `wait`, while the appends go on.
    async fn beside<T>(&mut self, wait: impl Future<Output = T>) -> T {
        let mut wait = pin!(wait);
        // A log that ends its appends at once pays nothing for those that don't.
        while !self.under_way.is_empty() {
            tokio::select! {
                biased;
                Some((number, result)) = self.under_way.next() => self.end(number, result),
                waited = &mut wait => return waited,
            }
        }
        wait.await
    }

    /// Tells who waits for a batch that the log did not take, or may not have. One that it took
    /// comes back.
    fn end(&mut self, number: u64, result: Result<(), AppendError>) {
        match &result {
            Err(error) if !self.failing => tracing::error!(number, %error, "batch not written"),
            Ok(()) if self.failing => tracing::info!(number, "batches written again"),
            _ => {}
        }
        self.failing = result.is_err();
        if let Err(error) = result
            && let Some(batch) = self.own.take(number)
        {
            batch.answer(&Err(match error {
                AppendError::Unknown => WriteError::OutcomeUnknown,
                AppendError::Closed | AppendError::Refused(_) => {
                    WriteError::NotWritten(error.to_string().into())
                }
            }));
        }
    }
}

#[cfg(test)]
mod tests;
