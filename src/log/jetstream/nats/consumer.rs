//! A JetStream pull consumer.

use std::sync::Arc;

use async_nats::jetstream;
use async_nats::jetstream::consumer::pull::{self, Stream as PullStream};
use futures_util::future::BoxFuture;
use futures_util::{FutureExt, StreamExt};
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;

use super::super::broker::{BrokerError, Consumer, Delivered};
use super::errors::{denial, no_answer};

pub(super) struct NatsConsumer {
    pub(super) messages: PullStream,
    /// Errors that the server sends outside of answers.
    pub(super) denials: broadcast::Receiver<Arc<str>>,
    /// The subject of pull requests.
    pub(super) pull: String,
    /// Cancelled when the connection has ended.
    pub(super) ended: CancellationToken,
}

impl NatsConsumer {
    /// `None` for a message without JetStream's metadata, which no stream sends.
    fn read(
        ended: &CancellationToken,
        next: Option<Result<jetstream::Message, pull::MessagesError>>,
    ) -> Option<Result<Delivered, BrokerError>> {
        match next {
            Some(Ok(message)) => {
                let info = message.info().ok()?;
                let time_ns = u64::try_from(info.published.unix_timestamp_nanos()).unwrap_or(0);
                let (seq, pending) = (info.stream_sequence, info.pending);
                let (message, _) = message.split();
                Some(Ok(Delivered {
                    seq,
                    time_ns,
                    pending,
                    headers: message.headers,
                    payload: message.payload,
                }))
            }
            Some(Err(error)) => Some(Err(no_answer(&error.to_string()))),
            // The client library's task has ended, for example after a panic.
            None => {
                ended.cancel();
                Some(Err(no_answer("the connection to NATS was lost")))
            }
        }
    }
}

impl Consumer for NatsConsumer {
    fn next(&mut self) -> BoxFuture<'_, Result<Delivered, BrokerError>> {
        async {
            loop {
                let next = tokio::select! {
                    biased;
                    next = self.messages.next() => next,
                    text = denial(&mut self.denials, &self.pull) => {
                        return Err(BrokerError::Rejected(text));
                    }
                    () = self.ended.cancelled() => {
                        return Err(no_answer("the connection to NATS ended"));
                    }
                };
                if let Some(delivered) = Self::read(&self.ended, next) {
                    return delivered;
                }
            }
        }
        .boxed()
    }

    fn try_next(&mut self) -> Option<Result<Delivered, BrokerError>> {
        loop {
            let next = self.messages.next().now_or_never()?;
            if let Some(delivered) = Self::read(&self.ended, next) {
                return Some(delivered);
            }
        }
    }
}
