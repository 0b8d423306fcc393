//! Fetches one stored message with its header block as bytes.
//!
//! `$JS.API.STREAM.MSG.GET.<stream>` returns the header block in base64, so the answer can be read
//! even if no client can parse the block. `get_raw_message` of async-nats does not help: it parses
//! the block.

use std::time::Duration;

use async_nats::client::RequestErrorKind;
use async_nats::{Client, datetime};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Deserialize;

use crate::log::Seq;

/// The API's error code for a sequence number that no message has.
const NO_MESSAGE_FOUND: u64 = 10037;

/// A message of a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawMessage {
    /// Its sequence number.
    pub seq: Seq,
    /// When the stream stored it, in nanoseconds since 1970.
    pub time_ns: u64,
    /// Its header block as it was published; none if it was published without one.
    pub header_block: Option<Vec<u8>>,
    /// Its payload.
    pub payload: Vec<u8>,
}

/// Why a message could not be fetched.
#[derive(Debug, thiserror::Error)]
pub enum RawMessageError {
    /// No answer in time.
    #[error("no answer from JetStream within {0:?}")]
    TimedOut(Duration),
    /// JetStream is not available there.
    #[error("JetStream is not available on this NATS server or account")]
    NoResponders,
    /// The request was not sent.
    #[error("request to JetStream failed: {0}")]
    Request(#[source] async_nats::client::RequestError),
    /// JetStream rejected the request.
    #[error("JetStream rejected the request: {description} (error {err_code})")]
    Api {
        /// JetStream's error code, such as 10059 for a missing stream.
        err_code: u64,
        /// JetStream's description.
        description: String,
    },
    /// The answer does not match the API.
    #[error("invalid answer from JetStream: {0}")]
    Invalid(Box<str>),
}

/// Fetches message `seq` of `stream`; `None` if there is none.
///
/// # Errors
/// See [`RawMessageError`].
pub async fn get(
    client: &Client,
    stream: &str,
    seq: Seq,
    timeout: Duration,
) -> Result<Option<RawMessage>, RawMessageError> {
    let subject = format!("$JS.API.STREAM.MSG.GET.{stream}");
    let request = client.request(subject, format!(r#"{{"seq":{seq}}}"#).into());
    let answer = tokio::time::timeout(timeout, request)
        .await
        .map_err(|_| RawMessageError::TimedOut(timeout))?
        .map_err(|error| match error.kind() {
            RequestErrorKind::TimedOut => RawMessageError::TimedOut(timeout),
            RequestErrorKind::NoResponders => RawMessageError::NoResponders,
            _ => RawMessageError::Request(error),
        })?;
    let message = parse(&answer.payload)?;
    match &message {
        Some(message) if message.seq != seq => {
            let why = format!("message {} instead of {seq}", message.seq);
            Err(RawMessageError::Invalid(why.into()))
        }
        _ => Ok(message),
    }
}

/// Parses the answer to such a request; `None` if there is no message with that number.
///
/// # Errors
/// The answer is an error, or does not match the API.
pub fn parse(answer: &[u8]) -> Result<Option<RawMessage>, RawMessageError> {
    #[derive(Deserialize)]
    struct GetResponse {
        message: Option<StoredMessage>,
        error: Option<GetError>,
    }

    #[derive(Deserialize)]
    struct StoredMessage {
        seq: Seq,
        time: String,
        hdrs: Option<String>,
        #[serde(default)]
        data: String,
    }

    #[derive(Deserialize)]
    struct GetError {
        #[serde(default)]
        err_code: u64,
        #[serde(default)]
        description: String,
    }

    let invalid = |why: &str| RawMessageError::Invalid(why.into());
    let answer: GetResponse =
        serde_json::from_slice(answer).map_err(|error| invalid(&error.to_string()))?;
    let message = match answer {
        GetResponse {
            error: Some(error), ..
        } => {
            return match error.err_code {
                NO_MESSAGE_FOUND => Ok(None),
                err_code => Err(RawMessageError::Api {
                    err_code,
                    description: error.description,
                }),
            };
        }
        GetResponse {
            message: Some(message),
            ..
        } => message,
        _ => return Err(invalid("neither a message nor an error")),
    };
    let base64 = |text: &str| BASE64.decode(text).map_err(|_| invalid("invalid base64"));
    let time = datetime::parse_rfc3339(&message.time).ok();
    let time_ns = time.and_then(|time| time.unix_timestamp_nanos().try_into().ok());
    Ok(Some(RawMessage {
        seq: message.seq,
        time_ns: time_ns.ok_or_else(|| invalid("invalid time"))?,
        header_block: message.hdrs.as_deref().map(base64).transpose()?,
        payload: base64(&message.data)?,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An answer with a message that has these members.
    fn answer(members: &str) -> Result<Option<RawMessage>, RawMessageError> {
        let kind = "io.nats.jetstream.api.v1.stream_msg_get_response";
        parse(format!(r#"{{"type":"{kind}","message":{{{members}}}}}"#).as_bytes())
    }

    #[test]
    fn a_message_is_parsed() {
        let found = answer(
            r#""subject":"grades.set","seq":7,"hdrs":"TkFUUy8xLjANCkE6IOkNCg0K","data":"WwBd",
               "time":"2026-11-23T05:41:43.623302489Z""#,
        );
        let wanted = RawMessage {
            seq: 7,
            time_ns: 1_795_412_503_623_302_489,
            header_block: Some(b"NATS/1.0\r\nA: \xe9\r\n\r\n".to_vec()),
            payload: b"[\0]".to_vec(),
        };
        assert_eq!(found.unwrap(), Some(wanted));
    }

    #[test]
    fn headers_and_payload_may_be_missing_and_a_time_has_the_digits_that_it_needs() {
        for (time, time_ns) in [
            ("1970-01-01T00:00:00Z", 0),
            ("2026-11-23T05:41:43Z", 1_795_412_503_000_000_000),
            ("2026-11-23T05:41:43.6Z", 1_795_412_503_600_000_000),
            ("2026-11-23T06:41:43.6+01:00", 1_795_412_503_600_000_000),
        ] {
            let found = answer(&format!(r#""subject":"x","seq":1,"time":"{time}""#));
            let wanted = RawMessage {
                seq: 1,
                time_ns,
                header_block: None,
                payload: Vec::new(),
            };
            assert_eq!(found.unwrap(), Some(wanted), "{time}");
        }
    }

    #[test]
    fn errors_are_distinguished() {
        let error = |code: u64| {
            parse(
                format!(
                    r#"{{"type":"x","error":{{"code":404,"err_code":{code},"description":"why"}}}}"#
                )
                .as_bytes(),
            )
        };
        assert_eq!(error(10037).unwrap(), None);
        let why = error(10059).unwrap_err().to_string();
        assert!(why.contains("10059") && why.contains("why"), "{why}");
        for invalid in [
            "",
            "[]",
            "{}",
            r#"{"message":{"seq":1}}"#,
            r#"{"message":{"seq":-1,"time":"2026-11-23T05:41:43Z"}}"#,
            r#"{"message":{"seq":1,"time":"1969-12-31T23:59:59Z"}}"#,
            r#"{"message":{"seq":1,"time":"2026-11-23"}}"#,
            r#"{"message":{"seq":1,"time":"2026-11-23T05:41:43Z","hdrs":"*"}}"#,
            r#"{"message":{"seq":1,"time":"2026-11-23T05:41:43Z","data":"QQ"}}"#,
        ] {
            let found = parse(invalid.as_bytes());
            assert!(
                matches!(found, Err(RawMessageError::Invalid(_))),
                "{invalid}"
            );
        }
    }
}
