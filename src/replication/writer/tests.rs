use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;

use super::*;
use crate::grade::{Changes, Patch};
use crate::log::{ClusterKey, LogId, Position, RandomId, ReadError, Subscription};
use crate::replication::checkpoint::CheckpointMetrics;

/// A log whose appends end when the test sends their outcomes.
#[derive(Default)]
struct SlowLog(Mutex<Vec<(Batch, AppendOutcome)>>);

type AppendOutcome = oneshot::Sender<Result<(), AppendError>>;

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
            let (outcome, given) = oneshot::channel();
            self.0.lock().push((batch, outcome));
            given.await.unwrap()
        }
        .boxed()
    }
    fn subscribe(&self, _: Position) -> BoxFuture<'_, Result<Box<dyn Subscription>, ReadError>> {
        async { Err(ReadError::Closed) }.boxed()
    }
}

fn writer_of(log: &Arc<SlowLog>, batch_writes_max: usize) -> (Writer, WriterTask, InFlight) {
    let limits = WriterLimits {
        queue_requests_max: 8,
        queue_bytes_max: 4096,
        batch_writes_max,
        wait_max: Duration::from_secs(60),
        bulks_max: 2,
    };
    let own = InFlight::default();
    let log = Arc::clone(log) as Arc<dyn Log>;
    let key = ClusterKey::derive("");
    let metrics = CheckpointMetrics::noop();
    let silent = Checkpoints::new(RandomId::of(1), log.id(), key, None, metrics);
    let (writer, task) = Writer::new(log, own.clone(), silent, limits, Histogram::noop());
    (writer, task, own)
}

/// A distinct write for each number.
fn numbered(number: usize) -> Write {
    Write::Delete(number.to_string().into())
}

#[tokio::test]
async fn a_group_is_never_split_and_the_order_is_kept() {
    let log = Arc::new(SlowLog::default());
    let (writer, task, own) = writer_of(&log, 5);
    let bulks = [writer.bulk().unwrap(), writer.bulk().unwrap()];
    assert!(matches!(writer.bulk(), Err(WriteError::QueueFull)));
    assert_eq!(bulks[0].group_max(), 5);
    let group = |from, to| (from..to).map(numbered).collect::<Vec<_>>();
    // All are queued before the first batch: 2 + 1 + 1, 5, 1.
    let mut waiting = [
        bulks[0].write(group(0, 2)).boxed(),
        writer.write(numbered(2)).boxed(),
        writer.write(numbered(3)).boxed(),
        bulks[1].write(group(4, 9)).boxed(),
        writer.write(numbered(9)).boxed(),
    ];
    for write in &mut waiting {
        assert!(write.now_or_never().is_none());
    }
    assert_eq!(writer.queue_requests(), 5);
    let stop = CancellationToken::new();
    stop.cancel();
    let task = tokio::spawn(task.run(stop));
    let mut batches = Vec::new();
    while !task.is_finished() {
        tokio::task::yield_now().await;
        for (batch, outcome) in std::mem::take(&mut *log.0.lock()) {
            outcome.send(Ok(())).unwrap();
            batches.push(batch.writes);
            let ticket = batch.ticket.unwrap();
            own.take(ticket).unwrap().answer(&Ok(ticket.0));
        }
    }
    let lengths: Vec<_> = batches.iter().map(|writes| writes.len()).collect();
    assert_eq!(lengths, [4, 5, 1]);
    assert_eq!(batches.concat(), group(0, 10));
    let mut answers = Vec::new();
    for write in waiting {
        answers.push(write.await.unwrap());
    }
    assert_eq!(answers, [1, 1, 1, 2, 3]);
    task.await.unwrap();
}

#[tokio::test]
async fn a_group_stays_in_the_queue_when_its_request_is_dropped() {
    let log = Arc::new(SlowLog::default());
    let (writer, task, _own) = writer_of(&log, 5);
    let others = writer.bulk().unwrap();
    let bulk = writer.bulk().unwrap();
    assert!(bulk.write(vec![numbered(1)]).now_or_never().is_none());
    drop(bulk);
    assert!(matches!(writer.bulk(), Err(WriteError::QueueFull)));
    let stop = CancellationToken::new();
    let task = tokio::spawn(task.run(stop));
    while log.0.lock().is_empty() {
        tokio::task::yield_now().await;
    }
    writer.bulk().unwrap();
    drop(others);
    task.abort();
}

#[tokio::test]
async fn batches_are_appended_concurrently_and_a_rejected_one_has_a_reason() {
    let log = Arc::new(SlowLog::default());
    let (writer, task, own) = writer_of(&log, 1);
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
        let numbers: Vec<_> = log
            .0
            .lock()
            .iter()
            .map(|(batch, _)| batch.ticket.unwrap().0)
            .collect();
        numbers
    };
    // Two at once, the third waits for a slot.
    assert_eq!(appended(2).await, [1, 2]);
    let (_, outcome) = log.0.lock().remove(1);
    let why: Arc<str> = "disk full".into();
    outcome
        .send(Err(AppendError::Refused(Arc::clone(&why))))
        .unwrap();
    assert_eq!(appended(2).await, [1, 3]);
    let (_, outcome) = log.0.lock().remove(0);
    outcome.send(Ok(())).unwrap();
    own.take(Ticket(1)).unwrap().answer(&Ok(1));
    assert_eq!(appended(2).await, [3, 4]);
    let (_, outcome) = log.0.lock().remove(0);
    outcome.send(Err(AppendError::Unknown)).unwrap();
    let (_, outcome) = log.0.lock().remove(0);
    stop.cancel();
    outcome.send(Err(AppendError::Closed)).unwrap();
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
