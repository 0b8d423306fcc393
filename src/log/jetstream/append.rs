//! Appends a batch, and sends it again only if the earlier attempt cannot be in the stream.
//!
//! An attempt that is answered with "no responders" was not stored, and is repeated. If an attempt
//! gets no answer, its outcome is unknown. A *fence* decides it: an empty batch under a new id,
//! which the broker accepts only at the known end of the stream. Once the fence is delivered, a
//! batch that was not delivered before it is not in the stream, and is sent again under its old id.
//! This does not depend on a clock, so it also works for a process that was suspended for longer
//! than the broker remembers message ids.
//!
//! The fence is sent before the attempt has timed out. If any other client subscribes to the
//! subject, NATS does not report "no responders", and a batch sent while the stream has no leader
//! is lost silently. Fences are small, and the broker stores at most one for each end of the
//! stream, so they are repeated until one is answered. The batch itself is not.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::broker::{BrokerConnection, BrokerError, Outgoing, Stored};
use super::message;
use super::probe::UNANSWERED;
use super::shared::JetStreamShared;
use crate::log::{AppendError, Batch, BatchId, Seq};

/// How often a batch is sent again while the stream has no leader.
const RETRY_EVERY: Duration = Duration::from_millis(200);
/// How long a batch waits for an answer before a fence is sent.
const FENCE_AFTER: Duration = Duration::from_millis(300);
/// How long after its first attempt a batch times out.
const TIMEOUT: Duration = Duration::from_secs(30);
/// If the consumer does not deliver a stored batch in this time, it is replaced.
const DELIVERY_WAIT_MAX: Duration = Duration::from_millis(400);

/// The outcome of one attempt.
enum Attempt {
    /// The batch is in the stream.
    Stored,
    /// The batch is not in the stream, for this reason.
    NotStored(Arc<str>),
    /// The broker rejected the batch. Sending it again would not help.
    Rejected(Arc<str>),
    /// A fence was delivered and the batch was not, so the batch is not in the stream.
    Fenced,
    /// The broker reports a duplicate: a message with this id was stored before.
    IdTaken,
    /// The broker did not answer.
    Unknown,
}

impl JetStreamShared {
    /// Appends `batch` and waits until it is delivered.
    pub(super) async fn append(&self, batch: Batch) -> Result<(), AppendError> {
        let _one_at_a_time = self.appending.lock().await;
        let id = self.next_batch_id();
        let payload = message::payload(&batch.writes);
        let mut headers = message::headers(id);
        if let Some(checkpoint) = &batch.checkpoint {
            message::add_checkpoint(&mut headers, checkpoint);
        }
        let delivered = match batch.ticket {
            Some(ticket) => self.in_flight.sending(ticket, id, payload.clone()),
            None => oneshot::channel().1,
        };
        let message = Outgoing {
            headers,
            payload,
            expected_last: None,
        };
        tokio::select! {
            biased;
            // An error means that the state was replaced: no request waits for the batch any more.
            _ = delivered => Ok(()),
            result = self.send_until_known(id, message) => result,
        }
    }

    /// Sends `message` until its outcome is known. Once it is stored this does not resolve before
    /// it times out: the delivery decides.
    async fn send_until_known(&self, id: BatchId, message: Outgoing) -> Result<(), AppendError> {
        let deadline = Instant::now() + TIMEOUT;
        let (mut in_doubt, mut fenced, mut attempts) = (false, false, 0);
        loop {
            let resending = in_doubt || fenced;
            fenced = false;
            attempts += 1;
            if attempts > 1 {
                self.counts.resends.fetch_add(1, Ordering::Relaxed);
            }
            let sent = self.send_once(&message, &mut in_doubt);
            let attempt = match tokio::time::timeout_at(deadline, sent).await {
                Ok(attempt) => attempt,
                Err(_elapsed) if in_doubt => return Err(AppendError::Unknown),
                Err(_elapsed) => return Err(AppendError::Refused(self.down_reason())),
            };
            match attempt {
                // An earlier attempt with an unknown outcome was stored.
                Attempt::IdTaken if resending => self.await_delivery(deadline).await?,
                Attempt::Stored => self.await_delivery(deadline).await?,
                Attempt::IdTaken => {
                    let writer = self.renew_writer();
                    tracing::error!(
                        batch_id = %id,
                        new_writer_id = %writer,
                        "another publisher used a message id of this replica"
                    );
                    let why = format!(
                        "not written: another publisher used message id {id}; retry (this replica \
                         has a new writer id)"
                    );
                    return Err(AppendError::Refused(why.into()));
                }
                Attempt::Rejected(why) => {
                    self.health.rejected(id, Arc::clone(&why));
                    return Err(AppendError::Refused(why));
                }
                Attempt::NotStored(why) => {
                    self.health.waiting(Some(Arc::clone(&why)));
                    if Instant::now() + RETRY_EVERY >= deadline {
                        return Err(AppendError::Refused(why));
                    }
                    tokio::time::sleep(RETRY_EVERY).await;
                }
                Attempt::Fenced => fenced = true,
                Attempt::Unknown => self.health.unanswered(UNANSWERED, false),
            }
        }
    }

    /// Makes one attempt. Keeps `in_doubt` true, even if this is dropped, while an attempt may be
    /// in the stream; the next attempt then begins with a fence.
    async fn send_once(&self, message: &Outgoing, in_doubt: &mut bool) -> Attempt {
        if *in_doubt {
            self.fence().await;
            *in_doubt = false;
        }
        // A fence that was delivered has shown that writes are acknowledged; this one waits again.
        self.health.waiting(None);
        let connection = self.connection_to_append().await;
        *in_doubt = true;
        let fence = async {
            tokio::time::sleep(FENCE_AFTER).await;
            self.fence().await;
        };
        let attempt = tokio::select! {
            biased;
            attempt = attempt(&*connection, message.clone()) => attempt,
            () = fence => Attempt::Fenced,
        };
        *in_doubt = matches!(attempt, Attempt::Unknown | Attempt::Stored);
        attempt
    }

    /// Waits until `deadline` for the delivery of a stored batch; the delivery drops this future.
    /// Requests a new consumer after [`DELIVERY_WAIT_MAX`].
    async fn await_delivery(&self, deadline: Instant) -> Result<(), AppendError> {
        tokio::time::sleep(DELIVERY_WAIT_MAX).await;
        self.replace_consumer.notify_one();
        let why = "NATS stored a batch and does not deliver it";
        self.health.waiting(Some(why.into()));
        tokio::time::sleep_until(deadline).await;
        Err(AppendError::Unknown)
    }

    /// Appends an empty batch at the known end of the stream and waits until it is delivered. A
    /// batch that this process sent before is in the stream by then, or will never be.
    pub(super) async fn fence(&self) {
        // The end of the stream, according to a leader that rejected a fence. It counts messages
        // that it has proposed to its followers and may still lose, so this does not raise the
        // known end. Only a delivery or the stream's info does.
        let mut claimed = None;
        loop {
            let connection = self.connection_to_append().await;
            let known = self.end.load(Ordering::Acquire);
            let end = claimed.map_or(known, |claimed| known.max(claimed));
            let (id, sent) = match claimed {
                // A leader answers, so one fence at a time is enough.
                Some(_) => self.send_fence(&*connection, end).await,
                None => self.send_fences(&*connection, end).await,
            };
            match sent {
                Ok(stored) if !stored.duplicate => {
                    self.await_delivered(stored.seq).await;
                    self.health.delivered(id);
                    return;
                }
                Ok(_duplicate) => {
                    self.renew_writer();
                }
                Err(BrokerError::WrongLastSequence { end: Some(is), .. }) if is > end => {
                    claimed = Some(is);
                    continue;
                }
                Err(error) => {
                    let why: Arc<str> = error.to_string().into();
                    claimed = None;
                    match error {
                        BrokerError::Rejected(_) => self.health.rejected(id, why),
                        BrokerError::NoAnswer(_) => self.health.unanswered(UNANSWERED, false),
                        _ => self.health.waiting(Some(why)),
                    }
                }
            }
            tokio::time::sleep(RETRY_EVERY).await;
        }
    }

    /// Sends a fence at `end`.
    async fn send_fence(
        &self,
        connection: &dyn BrokerConnection,
        end: Seq,
    ) -> (BatchId, Result<Stored, BrokerError>) {
        let id = self.next_batch_id();
        let empty = Outgoing {
            headers: message::headers(id),
            payload: Bytes::from_static(b"[]"),
            expected_last: Some(end),
        };
        (id, connection.publish(empty).await)
    }

    /// Sends fences at `end`, each under a new id, until one is answered. A new leader does not
    /// receive fences that were sent while the stream had no leader.
    async fn send_fences(
        &self,
        connection: &dyn BrokerConnection,
        end: Seq,
    ) -> (BatchId, Result<Stored, BrokerError>) {
        let mut sent = FuturesUnordered::new();
        loop {
            sent.push(self.send_fence(connection, end));
            if let Ok(Some(answer)) = tokio::time::timeout(RETRY_EVERY, sent.next()).await {
                return answer;
            }
        }
    }

    /// Waits until the batch at `seq` is delivered. Requests a new consumer after
    /// [`DELIVERY_WAIT_MAX`].
    async fn await_delivered(&self, seq: Seq) {
        let is_delivered = |last| (last >= seq).then_some(());
        let delivered = self.delivered.wait_for(is_delivered);
        if tokio::time::timeout(DELIVERY_WAIT_MAX, delivered)
            .await
            .is_ok()
        {
            return;
        }
        self.replace_consumer.notify_one();
        self.delivered.wait_for(is_delivered).await;
    }
}

async fn attempt(connection: &dyn BrokerConnection, message: Outgoing) -> Attempt {
    match connection.publish(message).await {
        Ok(stored) if stored.duplicate => Attempt::IdTaken,
        Ok(_) => Attempt::Stored,
        Err(BrokerError::NoResponders(why)) => Attempt::NotStored(why),
        Err(BrokerError::Rejected(why)) => Attempt::Rejected(why),
        Err(
            error @ (BrokerError::NoStream
            | BrokerError::NoConsumer
            | BrokerError::WrongLastSequence { .. }),
        ) => Attempt::Rejected(error.to_string().into()),
        Err(BrokerError::NoLeader(why)) => Attempt::NotStored(why),
        Err(BrokerError::NoAnswer(_)) => Attempt::Unknown,
    }
}
