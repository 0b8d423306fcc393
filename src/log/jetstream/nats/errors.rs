//! Maps errors of the client library to errors of the broker.

use std::error::Error as _;

use async_nats::jetstream::context::{PublishError, PublishErrorKind};
use async_nats::jetstream::{self, ErrorCode};

use super::super::broker::BrokerError;
use crate::log::Seq;

pub(super) fn no_answer(why: &str) -> BrokerError {
    BrokerError::NoAnswer(why.into())
}

/// Maps an error in an answer of JetStream.
pub(super) fn refusal(error: &jetstream::Error) -> BrokerError {
    match error.error_code() {
        ErrorCode::STREAM_NOT_FOUND => BrokerError::NoStream,
        ErrorCode::CONSUMER_NOT_FOUND => BrokerError::NoConsumer,
        ErrorCode::CLUSTER_NOT_AVAILABLE | ErrorCode::CLUSTER_NOT_LEADER => {
            BrokerError::NoLeader(error.to_string().into())
        }
        _ => BrokerError::Refused(error.to_string().into()),
    }
}

pub(super) fn publish_error(error: &PublishError, expected: Option<Seq>) -> BrokerError {
    let by_the_broker = || error.source()?.downcast_ref::<jetstream::Error>();
    match (error.kind(), by_the_broker()) {
        (PublishErrorKind::StreamNotFound, _) => BrokerError::NoResponders(
            "the stream has no leader (failover in progress?), or does not exist".into(),
        ),
        (PublishErrorKind::WrongLastSequence, refused) => BrokerError::WrongLastSequence {
            expected: expected.unwrap_or(0),
            // Only the text has the end: "wrong last sequence: 7 (code 400, ...)".
            end: refused.and_then(|error| {
                let text = error.to_string();
                let (_, end) = text.split_once("sequence: ")?;
                end.split(' ').next()?.parse().ok()
            }),
        },
        (PublishErrorKind::MaxPayloadExceeded, _) => BrokerError::Refused(
            format!("{error}; raise max_payload of nats-server to 2 MiB or more").into(),
        ),
        (_, Some(refused)) => refusal(refused),
        (_, None) => no_answer(&error.to_string()),
    }
}
