//! Maps errors of the client library to errors of the broker.

use std::error::Error as _;
use std::sync::Arc;

use async_nats::jetstream::context::{PublishError, PublishErrorKind};
use async_nats::jetstream::{self, ErrorCode};

use tokio::sync::broadcast;

use super::super::broker::BrokerError;
use crate::log::Seq;

/// The start of the server's error if this client may not subscribe to the answers to its requests.
const INBOX_DENIED: &str = "Subscription to \"_INBOX.";

pub(super) fn no_answer(why: &str) -> BrokerError {
    BrokerError::NoAnswer(why.into())
}

/// Maps an error in an answer of JetStream.
pub(super) fn broker_error(error: &jetstream::Error) -> BrokerError {
    match error.error_code() {
        ErrorCode::STREAM_NOT_FOUND => BrokerError::NoStream,
        ErrorCode::CONSUMER_NOT_FOUND => BrokerError::NoConsumer,
        ErrorCode::CLUSTER_NOT_AVAILABLE | ErrorCode::CLUSTER_NOT_LEADER => {
            BrokerError::NoLeader(error.to_string().into())
        }
        _ => BrokerError::Rejected(error.to_string().into()),
    }
}

pub(super) fn publish_error(error: &PublishError, expected: Option<Seq>) -> BrokerError {
    let server_error = || error.source()?.downcast_ref::<jetstream::Error>();
    match (error.kind(), server_error()) {
        (PublishErrorKind::StreamNotFound, _) => BrokerError::NoResponders(
            "the stream has no leader (failover in progress?), or does not exist".into(),
        ),
        (PublishErrorKind::WrongLastSequence, rejected) => BrokerError::WrongLastSequence {
            expected: expected.unwrap_or(0),
            // Only the text has the end: "wrong last sequence: 7 (code 400, ...)".
            end: rejected.and_then(|error| {
                let text = error.to_string();
                let (_, end) = text.split_once("sequence: ")?;
                end.split(' ').next()?.parse().ok()
            }),
        },
        (PublishErrorKind::MaxPayloadExceeded, _) => BrokerError::Rejected(
            format!("{error}; raise max_payload of nats-server to 2 MiB or more").into(),
        ),
        (_, Some(rejected)) => broker_error(rejected),
        (_, None) => no_answer(&error.to_string()),
    }
}

/// Waits until the server denies publishing to `subject` or subscribing to the answers, and returns
/// its error.
pub(super) async fn denial(denials: &mut broadcast::Receiver<Arc<str>>, subject: &str) -> Arc<str> {
    let publish = format!("\"{subject}\"");
    loop {
        match denials.recv().await {
            Ok(text) if text.contains(&publish) || text.contains(INBOX_DENIED) => return text,
            Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
            Err(broadcast::error::RecvError::Closed) => std::future::pending().await,
        }
    }
}
