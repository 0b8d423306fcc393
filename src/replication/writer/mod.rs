//! Group commit: collects waiting writes into batches and appends them to the log.

mod appends;
mod queue;

use std::future::{self, Future};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use metrics::Histogram;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::appends::PendingAppends;
use self::queue::{QueueUsage, QueuedRequest, RequestWrites, fitting};
use super::checkpoint::Checkpoints;
use crate::grade::Write;
use crate::log::{AppendError, Batch, InFlight, Log, Seq, Ticket, WaitingRequest};

/// The bounds of the write path.
#[derive(Debug, Clone, Copy)]
pub struct WriterLimits {
    /// Requests that may wait for a batch; one more is rejected. A group of a [`BulkWriter`] counts
    /// as one.
    pub queue_requests_max: usize,
    /// Bytes of the writes that may wait.
    pub queue_bytes_max: usize,
    /// Writes per batch. A write is less than 800 bytes of JSON, so 1,024 of them stay below the 1
    /// MiB that NATS accepts by default.
    pub batch_writes_max: usize,
    /// The timeout for the acknowledgement of a write, in the queue and in the log.
    pub wait_max: Duration,
    /// Concurrent bulk writers; one more is rejected.
    pub bulks_max: usize,
}

/// The most writes in a group of a [`BulkWriter`]; fewer where a batch is smaller.
const GROUP_WRITES_MAX: usize = 1000;

/// How many scheduler turns a batch waits for more writes. Measurements: ADR 0001 and 0009.
const TURNS: usize = 3;

/// How often writes that have waited too long are rejected.
const EXPIRE_EVERY: Duration = Duration::from_millis(250);

/// Why a write was not acknowledged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WriteError {
    /// Too many writes wait already, or there are too many bulk writers. Nothing was written.
    #[error("the write queue is full")]
    QueueFull,
    /// The replica is stopping. Nothing was written.
    #[error("the replica is stopping")]
    Stopping,
    /// The log rejected the batch. Nothing was written.
    #[error("{0}")]
    NotWritten(Arc<str>),
    /// The batch was sent and not acknowledged in time. It may still be applied.
    #[error("timed out waiting for the log to acknowledge the write")]
    OutcomeUnknown,
}

impl From<AppendError> for WriteError {
    fn from(error: AppendError) -> Self {
        match error {
            AppendError::Unknown => Self::OutcomeUnknown,
            AppendError::Closed => Self::NotWritten(error.to_string().into()),
            AppendError::Refused(why) => Self::NotWritten(why),
        }
    }
}

/// Submits the writes of requests. Clones share the queue.
#[derive(Clone)]
pub struct Writer {
    sender: mpsc::UnboundedSender<QueuedRequest>,
    queue: Arc<QueueUsage>,
    log: Arc<dyn Log>,
    bulks: Arc<Semaphore>,
    group_writes_max: usize,
}

/// Submits groups of writes. All writes of a group go into one batch.
pub struct BulkWriter {
    writer: Writer,
    permit: Arc<OwnedSemaphorePermit>,
}

impl BulkWriter {
    /// The most writes in a group.
    #[must_use]
    pub fn group_max(&self) -> usize {
        self.writer.group_writes_max
    }

    /// Submits `writes`, at most [`group_max`](Self::group_max) of them, and waits until this
    /// replica has applied them. Returns their batch's sequence number.
    ///
    /// Dropping the future does not cancel the writes.
    ///
    /// # Errors
    /// See [`WriteError`]: each variant says whether anything was written.
    pub async fn write(&self, writes: Vec<Write>) -> Result<Seq, WriteError> {
        let _permit = Arc::clone(&self.permit);
        let writes = RequestWrites::Group { writes, _permit };
        self.writer.submit(writes)?.await
    }
}

impl Writer {
    /// Makes a queue, and the task that appends its writes to `log`.
    #[must_use]
    pub fn new(
        log: Arc<dyn Log>,
        in_flight: InFlight,
        checkpoints: Checkpoints,
        limits: WriterLimits,
        batch_writes: Histogram,
    ) -> (Self, WriterTask) {
        let (sender, submitted) = mpsc::unbounded_channel();
        let queue = Arc::new(QueueUsage {
            requests: AtomicUsize::new(0),
            bytes: AtomicUsize::new(0),
            requests_max: limits.queue_requests_max,
            bytes_max: limits.queue_bytes_max,
        });
        let in_flight_max = log.in_flight_max();
        let writer = Self {
            sender,
            queue: Arc::clone(&queue),
            log: Arc::clone(&log),
            bulks: Arc::new(Semaphore::new(limits.bulks_max)),
            group_writes_max: limits.batch_writes_max.min(GROUP_WRITES_MAX),
        };
        let task = WriterTask {
            log,
            in_flight,
            checkpoints,
            limits,
            submitted,
            queue,
            waiting: Vec::with_capacity(limits.batch_writes_max),
            in_flight_max,
            slots: Arc::new(Semaphore::new(in_flight_max)),
            tickets: 0,
            batch_writes,
        };
        (writer, task)
    }

    /// Submits `write` and waits until this replica has applied it. Returns its batch's sequence
    /// number.
    ///
    /// Dropping the future does not cancel the write.
    ///
    /// # Errors
    /// See [`WriteError`]: each variant says whether anything was written.
    pub async fn write(&self, write: Write) -> Result<Seq, WriteError> {
        self.submit_one(write)?.await
    }

    /// Submits `write`. The returned future waits for it as [`write`](Self::write) does; dropping
    /// it does not cancel the write.
    ///
    /// # Errors
    /// The write was rejected. Nothing was written.
    pub fn submit_one(&self, write: Write) -> Result<PendingWrite, WriteError> {
        self.submit(RequestWrites::One(write))
    }

    /// Starts a bulk writer.
    ///
    /// # Errors
    /// There are too many already.
    pub fn bulk(&self) -> Result<BulkWriter, WriteError> {
        let permit = Arc::clone(&self.bulks).try_acquire_owned();
        let permit = permit.map_err(|_none_free| WriteError::QueueFull)?;
        Ok(BulkWriter {
            writer: self.clone(),
            permit: Arc::new(permit),
        })
    }

    fn submit(&self, writes: RequestWrites) -> Result<PendingWrite, WriteError> {
        if let Some(why) = self.log.reject() {
            return Err(WriteError::NotWritten(why));
        }
        self.queue.admit(&writes)?;
        let (outcome, answered) = oneshot::channel();
        let request = WaitingRequest {
            outcome,
            submitted: Instant::now(),
        };
        let waiting = QueuedRequest { writes, request };
        self.sender.send(waiting).map_err(|closed| {
            self.queue.release(1, closed.0.writes.bytes());
            WriteError::Stopping
        })?;
        Ok(PendingWrite(answered))
    }

    /// The number of requests that wait for a batch; a group counts as one.
    #[must_use]
    pub fn queue_requests(&self) -> usize {
        self.queue.requests.load(Ordering::Relaxed)
    }
}

/// A submitted write: waits until this replica has applied it, and resolves to its batch's sequence
/// number.
#[must_use = "whether it was applied is known only once it has been waited for"]
pub struct PendingWrite(oneshot::Receiver<Result<Seq, AppendError>>);

impl Future for PendingWrite {
    type Output = Result<Seq, WriteError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        // An answer that was dropped belongs to a batch that was sent and never delivered.
        let answered = Pin::new(&mut self.0).poll(cx);
        answered.map(|answer| Ok(answer.unwrap_or(Err(AppendError::Unknown))?))
    }
}

/// Collects waiting writes into batches and appends them.
pub struct WriterTask {
    log: Arc<dyn Log>,
    in_flight: InFlight,
    checkpoints: Checkpoints,
    limits: WriterLimits,
    submitted: mpsc::UnboundedReceiver<QueuedRequest>,
    queue: Arc<QueueUsage>,
    /// The oldest waiting writes.
    waiting: Vec<QueuedRequest>,
    in_flight_max: usize,
    slots: Arc<Semaphore>,
    tickets: u64,
    batch_writes: Histogram,
}

impl WriterTask {
    /// Runs until `stop` is cancelled, all waiting writes are appended, and all batches are
    /// applied.
    pub async fn run(mut self, stop: CancellationToken) {
        let log = Arc::clone(&self.log);
        let mut appends = PendingAppends::new(&self.in_flight);
        loop {
            // The slot first: writes that arrive while all slots are in use join the next batch.
            let acquired = Arc::clone(&self.slots).acquire_owned();
            let acquired = tokio::time::timeout(EXPIRE_EVERY, acquired);
            let slot = match appends.drive_while(acquired).await {
                Ok(Ok(slot)) => slot,
                Ok(Err(_closed)) => break,
                Err(_elapsed) => {
                    self.expire();
                    continue;
                }
            };
            let writes_max = self.limits.batch_writes_max;
            let open = !self.submitted.is_closed();
            let left = !self.waiting.is_empty();
            let wake_reason = appends.drive_while(async {
                tokio::select! {
                    biased;
                    () = future::ready(()), if left => WakeReason::Writes,
                    received = self.submitted.recv_many(&mut self.waiting, writes_max) => {
                        match received {
                            0 => WakeReason::Closed,
                            _ => WakeReason::Writes,
                        }
                    }
                    () = stop.cancelled(), if open => WakeReason::Stop,
                    () = self.checkpoints.due() => WakeReason::Checkpoint,
                }
            });
            match wake_reason.await {
                WakeReason::Closed => break,
                WakeReason::Writes => self.collect(writes_max).await,
                WakeReason::Checkpoint => {}
                WakeReason::Stop => {
                    self.submitted.close();
                    continue;
                }
            }
            let checkpoint = self.checkpoints.next();
            if self.waiting.is_empty() && (checkpoint.is_none() || log.unwritable().is_some()) {
                continue;
            }
            let (writes, requests) = self.next_batch();
            if !writes.is_empty() {
                self.batch_writes.record(writes.len() as f64);
            }
            self.tickets += 1;
            let ticket = Ticket(self.tickets);
            self.in_flight
                .add(ticket, Arc::clone(&writes), requests, slot);
            let batch = Batch {
                ticket: Some(ticket),
                writes,
                checkpoint,
            };
            appends.begin(ticket, log.append(batch)).await;
        }
        // All slots are free once every batch is answered or forgotten.
        let all = u32::try_from(self.in_flight_max).unwrap_or(u32::MAX);
        let _ = appends.drive_while(self.slots.acquire_many(all)).await;
    }

    /// Collects more writes for the next batch. Yields to the tasks that are ready to run, so that
    /// their writes join this batch. It then holds dozens of patches instead of one or two. A
    /// single client loses no time by it.
    async fn collect(&mut self, writes_max: usize) {
        for _ in 0..TURNS {
            tokio::task::yield_now().await;
        }
        while self.waiting.len() < writes_max
            && let Ok(another) = self.submitted.try_recv()
        {
            self.waiting.push(another);
        }
    }

    /// Removes as many waiting writes as fit into one batch.
    fn next_batch(&mut self) -> (Arc<[Write]>, Vec<WaitingRequest>) {
        let fitting = fitting(&self.waiting, self.limits.batch_writes_max);
        let (mut writes, mut bytes) = (Vec::with_capacity(fitting), 0);
        let requests = self.waiting.drain(..fitting).map(|waiting| {
            bytes += waiting.writes.bytes();
            waiting.writes.append_to(&mut writes);
            waiting.request
        });
        let requests: Vec<WaitingRequest> = requests.collect();
        self.queue.release(requests.len(), bytes);
        (writes.into(), requests)
    }

    /// Rejects writes that have waited too long while no batch could be appended.
    fn expire(&mut self) {
        while let Ok(another) = self.submitted.try_recv() {
            self.waiting.push(another);
        }
        let wait_max = self.limits.wait_max;
        let expired = self
            .waiting
            .partition_point(|waiting| waiting.request.submitted.elapsed() > wait_max);
        if expired == 0 {
            return;
        }
        let why = self.log.problem().unwrap_or_else(|| {
            format!(
                "no acknowledgement from the log within {} s",
                wait_max.as_secs()
            )
            .into()
        });
        for waiting in self.waiting.drain(..expired) {
            self.queue.release(1, waiting.writes.bytes());
            let refused = AppendError::Refused(Arc::clone(&why));
            waiting.request.answer(Err(refused));
        }
        let wait_max_s = wait_max.as_secs();
        tracing::warn!(rejected_requests = expired, wait_max_s, %why, "rejected queued writes");
    }
}

/// Why the writer woke up.
enum WakeReason {
    /// Writes wait.
    Writes,
    /// A checkpoint is due.
    Checkpoint,
    /// The writer must stop: it accepts no more writes.
    Stop,
    /// The queue is closed and empty.
    Closed,
}

#[cfg(test)]
mod tests;
