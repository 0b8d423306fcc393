//! Sending a batch until it is known what became of it.

use std::error::Error as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use async_nats::jetstream;
use async_nats::jetstream::context::{PublishError, PublishErrorKind};
use async_nats::jetstream::message::PublishMessage;
use tokio::time::Instant;

use super::link::Session;
use super::stream::duplicate_window;
use super::{SUBJECT, Shared, message};
use crate::log::{AppendError, Batch};

/// What the broker said to a batch.
enum Verdict {
    /// It is stored, now or before.
    Stored,
    /// It is not.
    Refused(Arc<str>),
    /// Nothing, or nothing that tells.
    Unknown,
}

impl Shared {
    /// Sends `batch`. After silence, or when the connection breaks, it is sent again over another
    /// one, under the same name, until the broker answers or the batch comes back.
    pub(super) async fn publish(&self, batch: Batch) -> Result<(), AppendError> {
        let mut session = self.session().map_err(AppendError::Refused)?;
        let message = PublishMessage::build()
            .payload(message::payload(&batch.writes))
            .headers(message::headers(&batch));
        let number = batch.number;
        let mut came_back = self.under_way.add(number, batch.writes);
        // Far from where the broker would not know the batch again and would store it twice.
        let give_up_at = Instant::now() + duplicate_window(&self.config) / 4;
        let mut resent = false;
        loop {
            let verdict = tokio::select! {
                biased;
                _ = &mut came_back => return Ok(()),
                verdict = send(&session, message.clone()) => verdict,
            };
            match verdict {
                Verdict::Stored => return Ok(()),
                // Of the first try only: a refused second one says nothing of the first.
                Verdict::Refused(why) if !resent => {
                    self.under_way.give_up(number);
                    return Err(AppendError::Refused(why));
                }
                Verdict::Refused(_) | Verdict::Unknown => {}
            }
            // A connection that swallowed this would swallow the next one too.
            session.ended.cancel();
            let next = tokio::time::timeout_at(give_up_at, self.next_session());
            session = tokio::select! {
                biased;
                _ = &mut came_back => return Ok(()),
                next = next => match next {
                    Ok(Ok(next)) if Instant::now() < give_up_at => next,
                    _ => {
                        self.under_way.give_up(number);
                        return Err(AppendError::Unknown);
                    }
                },
            };
            resent = true;
            self.counts.resends.fetch_add(1, Ordering::Relaxed);
            tracing::debug!(number, "batch sent again");
        }
    }
}

async fn send(session: &Session, message: PublishMessage) -> Verdict {
    let stored = async {
        let answer = session.context.send_publish(SUBJECT, message).await?;
        answer.await.map(drop)
    };
    tokio::select! {
        stored = stored => match stored {
            Ok(()) => Verdict::Stored,
            Err(error) => judge(&error),
        },
        () = session.ended.cancelled() => Verdict::Unknown,
    }
}

fn judge(error: &PublishError) -> Verdict {
    let by_the_broker = || {
        let source = error.source()?;
        source.downcast_ref::<jetstream::Error>()
    };
    match error.kind() {
        PublishErrorKind::StreamNotFound => {
            Verdict::Refused("no stream of the broker takes batches; is it still starting?".into())
        }
        PublishErrorKind::MaxPayloadExceeded => Verdict::Refused(
            format!("{error}; raise max_payload of the broker to 1 MiB or more").into(),
        ),
        _ => match by_the_broker() {
            Some(refusal) => Verdict::Refused(format!("the broker says: {refusal}").into()),
            None => Verdict::Unknown,
        },
    }
}
