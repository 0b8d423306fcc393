//! Batches that this process has appended and not yet applied.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, oneshot};
use tokio::time::Instant;

use super::{AppendError, BatchId, Seq};
use crate::grade::Write;

/// When an undelivered batch is forgotten, which frees its slot. A later delivery is treated as
/// another writer's batch. No log retries for this long.
const FORGET_AFTER: Duration = Duration::from_secs(60);

/// Identifies a batch within this process, between append and apply.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ticket(pub u64);

/// A request that waits for the outcome of its writes.
pub struct WaitingRequest {
    /// Sends the outcome to it.
    pub outcome: oneshot::Sender<Result<Seq, AppendError>>,
    /// When it submitted its writes.
    pub submitted: Instant,
}

impl WaitingRequest {
    /// Answers the request.
    pub fn answer(self, result: Result<Seq, AppendError>) {
        // The client may have disconnected.
        let _ = self.outcome.send(result);
    }
}

/// Batches in flight, oldest first; the writer bounds their number. Clones share the same batches.
#[derive(Clone, Default)]
pub struct InFlight(Arc<Mutex<VecDeque<InFlightBatch>>>);

/// One batch and the requests that wait for it.
pub struct InFlightBatch {
    ticket: Ticket,
    writes: Arc<[Write]>,
    /// Oldest first.
    requests: Vec<WaitingRequest>,
    appended: Instant,
    /// The identity and the bytes with which the batch was sent, if it was.
    sent: Option<(BatchId, Bytes)>,
    /// Tells the task that sends the batch that it was delivered.
    delivered: Option<oneshot::Sender<()>>,
    /// Frees a slot for another batch when this one is dropped.
    _slot: OwnedSemaphorePermit,
}

impl InFlightBatch {
    /// How long ago it was appended.
    #[must_use]
    pub fn age(&self) -> Duration {
        self.appended.elapsed()
    }

    /// Frees its slot. The requests still wait.
    #[must_use]
    pub fn into_answers(self) -> Answers {
        Answers(self.requests)
    }

    /// Answers every request that waits for it.
    pub fn answer(self, result: &Result<Seq, AppendError>) {
        self.into_answers().send(result);
    }
}

/// The requests that wait for a batch.
pub struct Answers(Vec<WaitingRequest>);

impl Answers {
    /// Answers each.
    pub fn send(self, result: &Result<Seq, AppendError>) {
        for request in self.0 {
            request.answer(result.clone());
        }
    }
}

impl InFlight {
    /// Registers a batch before it is appended, and the requests that wait for it, oldest first.
    pub fn add(
        &self,
        ticket: Ticket,
        writes: Arc<[Write]>,
        requests: Vec<WaitingRequest>,
        slot: OwnedSemaphorePermit,
    ) {
        self.0.lock().push_back(InFlightBatch {
            ticket,
            writes,
            requests,
            appended: Instant::now(),
            sent: None,
            delivered: None,
            _slot: slot,
        });
    }

    /// Records how a batch is sent. The receiver resolves once the batch is applied or forgotten.
    pub fn sending(&self, ticket: Ticket, id: BatchId, payload: Bytes) -> oneshot::Receiver<()> {
        let (delivered, was_delivered) = oneshot::channel();
        let mut batches = self.0.lock();
        if let Some(batch) = batches.iter_mut().find(|batch| batch.ticket == ticket) {
            batch.sent = Some((id, payload));
            batch.delivered = Some(delivered);
        }
        was_delivered
    }

    /// This process' batch that was sent as `id` with exactly these bytes. It needs no decoding.
    #[must_use]
    pub fn find(&self, id: BatchId, payload: &[u8]) -> Option<(Ticket, Arc<[Write]>)> {
        let batches = self.0.lock();
        let batch = batches.iter().find(|batch| {
            let sent = batch.sent.as_ref();
            sent.is_some_and(|(sent, bytes)| *sent == id && **bytes == *payload)
        })?;
        Some((batch.ticket, Arc::clone(&batch.writes)))
    }

    /// Removes a batch whose outcome is known.
    #[must_use]
    pub fn take(&self, ticket: Ticket) -> Option<InFlightBatch> {
        let mut batches = self.0.lock();
        let at = batches.iter().position(|batch| batch.ticket == ticket)?;
        let mut batch = batches.remove(at)?;
        if let Some(delivered) = batch.delivered.take() {
            // The task that sent the batch may have ended.
            let _ = delivered.send(());
        }
        Some(batch)
    }

    /// Forgets all batches, because the state is replaced: the new one includes them, or they are
    /// delivered later as another writer's. Their requests get "outcome unknown".
    pub fn forget_all(&self) {
        let forgotten = std::mem::take(&mut *self.0.lock());
        for batch in forgotten {
            batch.answer(&Err(AppendError::Unknown));
        }
    }

    /// Answers "outcome unknown" to requests that have waited longer than `wait_max`. The batch
    /// stays for `FORGET_AFTER`, as it may still be delivered.
    pub fn expire(&self, wait_max: Duration) {
        let mut expired = Vec::new();
        let mut batches = self.0.lock();
        for batch in batches.iter_mut() {
            let requests = &mut batch.requests;
            let count = requests.partition_point(|request| request.submitted.elapsed() > wait_max);
            expired.extend(requests.drain(..count));
        }
        batches.retain(|batch| batch.appended.elapsed() <= FORGET_AFTER.max(wait_max));
        drop(batches);
        for request in expired {
            request.answer(Err(AppendError::Unknown));
        }
    }

    /// When the oldest batch in flight was appended.
    #[must_use]
    pub fn oldest(&self) -> Option<Instant> {
        self.0.lock().front().map(|batch| batch.appended)
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::Semaphore;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_timeout_includes_the_time_before_the_append() {
        const WAIT_MAX: Duration = Duration::from_secs(10);
        let request = || {
            let (outcome, answered) = oneshot::channel();
            let submitted = Instant::now();
            (WaitingRequest { outcome, submitted }, answered)
        };
        let (early, mut early_answer) = request();
        tokio::time::advance(WAIT_MAX / 2).await;
        let (late, mut late_answer) = request();
        let slot = Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
        let in_flight = InFlight::default();
        in_flight.add(Ticket(1), Arc::from([]), vec![early, late], slot);
        in_flight.expire(WAIT_MAX);
        assert!(early_answer.try_recv().is_err());
        tokio::time::advance(WAIT_MAX * 3 / 4).await;
        in_flight.expire(WAIT_MAX);
        assert_eq!(early_answer.try_recv(), Ok(Err(AppendError::Unknown)));
        assert!(late_answer.try_recv().is_err());
        assert!(in_flight.take(Ticket(1)).is_some());
    }
}
