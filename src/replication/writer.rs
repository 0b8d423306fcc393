//! Group commit: from writes that wait to batches in the log.

use std::future::{self, Future};
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use metrics::Histogram;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::checkpoint::Checkpoints;
use super::own::{Answer, OwnBatch, OwnBatches};
use crate::grade::Write;
use crate::log::{AppendError, Batch, Log, Origin, Seq};

/// The bounds of the write path.
#[derive(Debug, Clone, Copy)]
pub struct WriterLimits {
    /// Writes that may wait for a batch; one more is refused.
    pub queue_patches_max: usize,
    /// Writes a batch. As JSON a write stays under 800 bytes, so 1,024 of them stay under the
    /// 1 MiB that a message broker takes by default.
    pub batch_patches_max: usize,
    /// How long a write may wait for the log.
    pub wait_max: Duration,
}

/// Why a write was not answered with a position.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WriteError {
    /// Too many writes wait already. Nothing was written.
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
    write: Write,
    answer: Answer,
}

/// Where requests hand in their writes. Clones feed the same queue.
#[derive(Clone)]
pub struct Writer {
    queue: mpsc::Sender<Waiting>,
    log: Arc<dyn Log>,
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
        if let Some(why) = self.log.away() {
            return Err(WriteError::NotWritten(why));
        }
        let (answer, answered) = oneshot::channel();
        self.queue
            .try_send(Waiting { write, answer })
            .map_err(|error| match error {
                mpsc::error::TrySendError::Full(_) => WriteError::QueueFull,
                mpsc::error::TrySendError::Closed(_) => WriteError::Stopping,
            })?;
        // An answer that was dropped belongs to a batch that was sent and never came back.
        answered.await.unwrap_or(Err(WriteError::OutcomeUnknown))
    }

    /// Writes that wait for a batch.
    #[must_use]
    pub fn queue_patches(&self) -> usize {
        self.queue.max_capacity() - self.queue.capacity()
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
        let mut waiting = Vec::with_capacity(self.limits.batch_patches_max);
        loop {
            // The slot first: what arrives while all are taken makes the next batch larger.
            let acquired = Arc::clone(&self.slots).acquire_owned();
            let acquired = tokio::time::timeout(self.limits.wait_max, acquired);
            let slot = match appends.beside(acquired).await {
                Ok(Ok(slot)) => slot,
                Ok(Err(_closed)) => break,
                Err(_elapsed) => {
                    self.refuse_waiting();
                    continue;
                }
            };
            let patches_max = self.limits.batch_patches_max;
            let open = !self.queue.is_closed();
            let woken = appends.beside(async {
                tokio::select! {
                    biased;
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
                    // One turn for the tasks that are ready to run: what they hand in goes along.
                    // A batch then holds dozens of patches where it held one or two, and a writer
                    // that is alone waits for nobody.
                    tokio::task::yield_now().await;
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
            let (writes, answers): (Vec<Write>, Vec<Answer>) = waiting
                .drain(..)
                .map(|waiting| (waiting.write, waiting.answer))
                .unzip();
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
    fn refuse_waiting(&mut self) {
        let mut refused = 0;
        while let Ok(waiting) = self.queue.try_recv() {
            let why = "the log gave back no batch in time".into();
            let _ = waiting.answer.send(Err(WriteError::NotWritten(why)));
            refused += 1;
        }
        tracing::warn!(refused, "log stalled");
    }
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
mod tests {
    use futures_util::FutureExt;
    use parking_lot::Mutex;

    use super::super::checkpoint::CheckpointMetrics;
    use super::*;
    use crate::grade::{Changes, Patch};
    use crate::log::{LogId, ReadError, Subscription};

    /// Takes batches in order and says what became of them when told to.
    #[derive(Default)]
    struct SlowLog(Mutex<Vec<(Batch, Verdict)>>);

    type Verdict = oneshot::Sender<Result<(), AppendError>>;

    impl Log for SlowLog {
        fn kind(&self) -> &'static str {
            "slow"
        }
        fn id(&self) -> LogId {
            LogId("slow".into())
        }
        fn first(&self) -> Seq {
            1
        }
        fn end(&self) -> Seq {
            0
        }
        fn in_flight_max(&self) -> usize {
            2
        }
        fn append(&self, batch: Batch) -> BoxFuture<'_, Result<(), AppendError>> {
            async {
                let (verdict, given) = oneshot::channel();
                self.0.lock().push((batch, verdict));
                given.await.unwrap()
            }
            .boxed()
        }
        fn subscribe(&self, _: Seq) -> BoxFuture<'_, Result<Box<dyn Subscription>, ReadError>> {
            async { Err(ReadError::Closed) }.boxed()
        }
    }

    #[tokio::test]
    async fn batches_go_side_by_side_and_a_refused_one_says_why() {
        let log = Arc::new(SlowLog::default());
        let limits = WriterLimits {
            queue_patches_max: 8,
            batch_patches_max: 1,
            wait_max: Duration::from_secs(60),
        };
        let (origin, own) = (Origin::random().unwrap(), OwnBatches::default());
        let as_log = Arc::clone(&log) as Arc<dyn Log>;
        let silent = Checkpoints::new(origin, None, CheckpointMetrics::noop());
        let (writer, task) = Writer::new(
            as_log,
            origin,
            own.clone(),
            silent,
            limits,
            Histogram::noop(),
        );
        let stop = CancellationToken::new();
        let task = tokio::spawn(task.run(stop.clone()));
        let writes: Vec<_> = (0..4)
            .map(|user| {
                let writer = writer.clone();
                let patch = Patch {
                    user_id: user.to_string().into(),
                    changes: Changes::default(),
                };
                tokio::spawn(async move { writer.write(patch.into()).await })
            })
            .collect();
        let appended = async |count: usize| {
            while log.0.lock().len() < count {
                tokio::task::yield_now().await;
            }
            tokio::task::yield_now().await;
            let numbers: Vec<_> = log.0.lock().iter().map(|(batch, _)| batch.number).collect();
            numbers
        };
        // Two at once, the third waits for a slot.
        assert_eq!(appended(2).await, [1, 2]);
        let (_, verdict) = log.0.lock().remove(1);
        let why: Arc<str> = "no room".into();
        verdict
            .send(Err(AppendError::Refused(Arc::clone(&why))))
            .unwrap();
        assert_eq!(appended(2).await, [1, 3]);
        let (_, verdict) = log.0.lock().remove(0);
        verdict.send(Ok(())).unwrap();
        own.take(1).unwrap().answer(&Ok(1));
        assert_eq!(appended(2).await, [3, 4]);
        let (_, verdict) = log.0.lock().remove(0);
        verdict.send(Err(AppendError::Unknown)).unwrap();
        let (_, verdict) = log.0.lock().remove(0);
        stop.cancel();
        verdict.send(Err(AppendError::Closed)).unwrap();
        let mut results = Vec::new();
        for write in writes {
            results.push(write.await.unwrap());
        }
        assert_eq!(results[0], Ok(1));
        assert_eq!(results[1], Err(WriteError::NotWritten(why)));
        assert_eq!(results[2], Err(WriteError::OutcomeUnknown));
        assert!(matches!(results[3], Err(WriteError::NotWritten(_))));
        task.await.unwrap();
    }
}
