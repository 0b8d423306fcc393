//! The errors of requests, and their responses: RFC 9457 problem details.

use std::sync::Arc;

use axum::response::{IntoResponse, Response};
use http::header::{
    ACCEPT, ACCEPT_ENCODING, ALLOW, CONNECTION, CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE,
};
use http::{HeaderMap, HeaderValue, StatusCode};
use serde::Serialize;

use super::error_log::ErrorDetail;
use crate::grade::{USER_ID, UserIdError};
use crate::replication::WriteError;
use crate::replication::memory::StoreFull;
use crate::replication::state::Unready;

/// How much of a header's value an error repeats, in bytes.
const EXCERPT_BYTES_MAX: usize = 100;
/// `Retry-After`, in seconds.
const RETRY_AFTER_S: HeaderValue = HeaderValue::from_static("1");

/// An error of a request. Its [`Display`](std::fmt::Display) is the `detail` of the response: the
/// cause, and how to fix it.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ApiError {
    /// The body is not JSON.
    #[error(
        "the body is not JSON: {0}; send one object such as {{\"user_id\":\"alice\",\"spp\":5}}"
    )]
    NotJson(String),
    /// The body begins with a byte order mark.
    #[error("the body begins with a byte order mark (EF BB BF); send it without these three bytes")]
    ByteOrderMark,
    /// The body is not a list of user ids.
    #[error("the body is not a JSON array of user ids: {0}; send one such as [\"alice\",\"bob\"]")]
    NotUserIds(String),
    /// The body is not UTF-8.
    #[error("the body is not UTF-8 at byte {at}; encode it as UTF-8")]
    BodyNotUtf8 {
        /// The offset of the first invalid byte.
        at: usize,
    },
    /// The body could not be read to its end.
    #[error(
        "the body is incomplete or malformed; send exactly Content-Length bytes, or complete chunks"
    )]
    BodyBroken,
    /// The body is JSON but not a patch.
    #[error("the body is not a patch: {0}")]
    NotAPatch(String),
    /// No `user_id` in the query.
    #[error("the query has no {USER_ID}; append ?{USER_ID}=alice to the path")]
    UserIdMissing,
    /// More than one `user_id` in the query.
    #[error("the query has {USER_ID} more than once; send it once")]
    UserIdRepeated,
    /// `user_id` and `user_ids` in one query.
    #[error("the query has both {USER_ID} and user_ids; send one {USER_ID}, or only user_ids")]
    UserIdAndIds,
    /// `user_ids` on a route that accepts a single `user_id`.
    #[error("the query has user_ids, which only GET /get accepts; send one {USER_ID}")]
    UserIdsHere,
    /// More ids than one request may have.
    #[error("the request has {found} user ids; send at most {limit} per request")]
    UserIdsTooMany {
        /// The number of ids.
        found: usize,
        /// The limit.
        limit: usize,
    },
    /// An invalid `user_id`.
    #[error(transparent)]
    UserIdInvalid(UserIdError),
    /// The query's percent-encoding is invalid.
    #[error("the query has invalid percent-encoding: {0}")]
    QueryEncoding(&'static str),
    /// `Grade-Position` is not a number.
    #[error(
        "Grade-Position must be one decimal number, as in the response to a POST /set or DELETE /set"
    )]
    PositionInvalid,
    /// `Host` is missing, repeated or invalid.
    #[error("the request needs exactly one valid Host header, such as Host: localhost:8081")]
    HostInvalid,
    /// A port on a loopback address does not answer for this host.
    #[error(
        "this port listens on a loopback address and does not answer for the host {0:?}; use \
         localhost, or add the name to --allowed-host"
    )]
    HostUnknown(String),
    /// A transfer coding other than one `chunked`.
    #[error("Transfer-Encoding must be chunked, once; send the body without other codings")]
    TransferEncoding,
    /// The body is compressed.
    #[error("Content-Encoding {0:?} is not supported; send the body without compression")]
    ContentEncoding(String),
    /// Missing or wrong credentials.
    #[error(
        "missing or wrong user name or password; use HTTP Basic authentication (curl -u NAME:PASSWORD)"
    )]
    Unauthorized,
    /// No record with this id.
    #[error("no grade is stored for this {USER_ID}")]
    UserUnknown,
    /// No such route on this port.
    #[error("this port has no such path; it serves {0}")]
    RouteUnknown(&'static str),
    /// The route does not support the method.
    #[error("this path accepts only {0}")]
    MethodNotAllowed(&'static str),
    /// The body did not arrive in time.
    #[error("the body did not arrive within {seconds} s; send it faster")]
    BodySlow {
        /// The limit.
        seconds: u64,
    },
    /// The body is too large.
    #[error("the body is limited to {limit_bytes} bytes; send a smaller one")]
    BodyTooLarge {
        /// The limit.
        limit_bytes: usize,
    },
    /// The route does not accept the content type.
    #[error("Content-Type is {found:?}; it must be {}", .accepted.join(" or "))]
    UnsupportedMediaType {
        /// The content type of the request; empty if it has none.
        found: String,
        /// The content types that the route accepts.
        accepted: &'static [&'static str],
    },
    /// One of many lines is not a patch.
    #[error(
        "line {line}: {what}; {accepted} lines were accepted, and nothing after them was written; fix \
         the line and resume from line {}", .accepted + 1
    )]
    BadLine {
        /// The number of the line, from 1.
        line: u64,
        /// Lines up to the last group that was written.
        accepted: u64,
        /// What is wrong with the line.
        what: String,
    },
    /// There is no memory for a new user.
    #[error(transparent)]
    StoreFull(#[from] StoreFull),
    /// There is no memory for the new user of one of many lines.
    #[error(
        "line {line} is for a new user, and {full}; {accepted} lines were accepted, and nothing after \
         them was written; resume from line {} when the store is no longer full",
        .accepted + 1
    )]
    LineStoreFull {
        /// The number of the line, from 1.
        line: u64,
        /// Lines up to the last group that was written.
        accepted: u64,
        /// Why new users are rejected.
        full: StoreFull,
    },
    /// A body of many lines was written in part only.
    #[error("{cause}; {accepted} lines were accepted; resume from line {}", .accepted + 1)]
    InPart {
        /// Lines up to the last group that was written.
        accepted: u64,
        /// Why the rest was not written.
        cause: Box<ApiError>,
    },
    /// This replica does not serve requests now.
    #[error("not ready ({}): {}; try again, or ask another replica", .0.state, .0.reason)]
    NotReady(Unready),
    /// This replica did not apply the requested position in time.
    #[error(
        "this replica has applied position {applied}, and not yet {wanted}; try again, or ask another \
         replica"
    )]
    PositionNotReached {
        /// The requested position.
        wanted: u64,
        /// The position of this replica.
        applied: u64,
    },
    /// The requested position is too far past the log's end to wait for.
    #[error(
        "Grade-Position {wanted} is more than {ahead_max} past the end of the log, {end}; send the \
         Grade-Position of an acknowledged write, or ask another replica"
    )]
    PositionTooFar {
        /// The requested position.
        wanted: u64,
        /// The last batch of the log that this replica knows of.
        end: u64,
        /// The limit of the distance.
        ahead_max: u64,
    },
    /// The maximum number of reads wait for a position.
    #[error(
        "too many reads wait for a Grade-Position (limit {waits_max}); try again later, or ask \
         another replica"
    )]
    PositionWaitsFull {
        /// The limit.
        waits_max: usize,
    },
    /// The write queue is full.
    #[error("not written: the write queue is full; try again later, or write more slowly")]
    QueueFull,
    /// The maximum number of backups is being sent.
    #[error("the maximum number of backups is being sent; try again later")]
    BackupsRunning,
    /// The log rejected the write.
    #[error("not written: {0}; safe to retry")]
    NotWritten(Arc<str>),
    /// The write may or may not have been applied.
    #[error("write status unknown: {0}; read the grade back, or send the write again")]
    OutcomeUnknown(WriteError),
    /// A bug in this program.
    #[error("internal error in gradestore; see its log, and please report it")]
    Internal,
}

/// The beginning of a header's value, for an error.
pub(super) fn excerpt(value: &[u8]) -> String {
    let shown = value.get(..EXCERPT_BYTES_MAX).unwrap_or(value);
    String::from_utf8_lossy(shown).into_owned()
}

impl From<WriteError> for ApiError {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::QueueFull => Self::QueueFull,
            WriteError::Stopping => Self::NotWritten("the replica is stopping".into()),
            WriteError::NotWritten(why) => Self::NotWritten(why),
            WriteError::OutcomeUnknown => Self::OutcomeUnknown(error),
        }
    }
}

impl From<Unready> for ApiError {
    fn from(unready: Unready) -> Self {
        Self::NotReady(unready)
    }
}

impl ApiError {
    /// The text of an error in the body of a patch, for a patch that is one of many lines.
    #[must_use]
    pub fn line_text(&self) -> String {
        let text = match self {
            Self::NotJson(why) => format!("it is not JSON: {why}"),
            Self::BodyNotUtf8 { at } => format!("it is not UTF-8 at byte {at}"),
            Self::NotAPatch(why) => format!("it is not a patch: {why}"),
            Self::ByteOrderMark => {
                "it is not JSON: it begins with a byte order mark (EF BB BF)".to_owned()
            }
            other => other.to_string(),
        };
        // The parser sees one line only.
        text.replace(" at line 1 column ", " at column ")
    }

    /// The status, and the last part of `type`.
    #[must_use]
    pub fn kind(&self) -> (StatusCode, &'static str) {
        use StatusCode as S;
        match self {
            Self::NotJson(_) | Self::ByteOrderMark => (S::BAD_REQUEST, "not-json"),
            Self::NotUserIds(_) => (S::BAD_REQUEST, "not-user-ids"),
            Self::BodyNotUtf8 { .. } => (S::BAD_REQUEST, "body-not-utf8"),
            Self::BodyBroken => (S::BAD_REQUEST, "body-broken"),
            Self::UserIdMissing => (S::BAD_REQUEST, "user-id-missing"),
            Self::UserIdRepeated => (S::BAD_REQUEST, "user-id-repeated"),
            Self::UserIdAndIds => (S::BAD_REQUEST, "user-id-and-ids"),
            Self::UserIdsHere => (S::BAD_REQUEST, "user-ids-here"),
            Self::UserIdsTooMany { .. } => (S::BAD_REQUEST, "user-ids-too-many"),
            Self::UserIdInvalid(_) => (S::BAD_REQUEST, "user-id-invalid"),
            Self::QueryEncoding(_) => (S::BAD_REQUEST, "query-encoding"),
            Self::PositionInvalid => (S::BAD_REQUEST, "position-invalid"),
            Self::HostInvalid => (S::BAD_REQUEST, "host-invalid"),
            Self::HostUnknown(_) => (S::BAD_REQUEST, "host-unknown"),
            Self::TransferEncoding => (S::BAD_REQUEST, "transfer-encoding"),
            Self::Unauthorized => (S::UNAUTHORIZED, "unauthorized"),
            Self::UserUnknown => (S::NOT_FOUND, "user-unknown"),
            Self::RouteUnknown(_) => (S::NOT_FOUND, "route-unknown"),
            Self::MethodNotAllowed(_) => (S::METHOD_NOT_ALLOWED, "method-not-allowed"),
            Self::BodySlow { .. } => (S::REQUEST_TIMEOUT, "body-slow"),
            Self::BodyTooLarge { .. } => (S::PAYLOAD_TOO_LARGE, "body-too-large"),
            Self::UnsupportedMediaType { .. } => {
                (S::UNSUPPORTED_MEDIA_TYPE, "unsupported-media-type")
            }
            Self::ContentEncoding(_) => (S::UNSUPPORTED_MEDIA_TYPE, "content-encoding"),
            Self::NotAPatch(_) => (S::UNPROCESSABLE_ENTITY, "not-a-patch"),
            Self::BadLine { .. } => (S::UNPROCESSABLE_ENTITY, "bad-line"),
            Self::InPart { cause, .. } => cause.kind(),
            Self::StoreFull(_) | Self::LineStoreFull { .. } => {
                (S::INSUFFICIENT_STORAGE, "store-full")
            }
            Self::NotReady(_) => (S::SERVICE_UNAVAILABLE, "not-ready"),
            Self::PositionNotReached { .. }
            | Self::PositionTooFar { .. }
            | Self::PositionWaitsFull { .. } => (S::SERVICE_UNAVAILABLE, "position-not-reached"),
            Self::QueueFull => (S::SERVICE_UNAVAILABLE, "queue-full"),
            Self::BackupsRunning => (S::SERVICE_UNAVAILABLE, "backups-running"),
            Self::NotWritten(_) => (S::SERVICE_UNAVAILABLE, "not-written"),
            Self::OutcomeUnknown(_) => (S::GATEWAY_TIMEOUT, "outcome-unknown"),
            Self::Internal => (S::INTERNAL_SERVER_ERROR, "internal"),
        }
    }

    /// The invalid line and the number of accepted lines, for a body of many lines.
    fn lines(&self) -> (Option<u64>, Option<u64>) {
        match self {
            Self::BadLine { line, accepted, .. } | Self::LineStoreFull { line, accepted, .. } => {
                (Some(*line), Some(*accepted))
            }
            Self::InPart { accepted, .. } => (None, Some(*accepted)),
            _ => (None, None),
        }
    }

    fn headers(&self, status: StatusCode) -> HeaderMap {
        let mut headers = HeaderMap::with_capacity(2);
        if status == StatusCode::SERVICE_UNAVAILABLE {
            headers.insert(RETRY_AFTER, RETRY_AFTER_S);
        }
        match self {
            Self::Unauthorized => {
                let challenge = r#"Basic realm="gradestore", charset="UTF-8""#;
                headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static(challenge));
            }
            Self::MethodNotAllowed(allowed) => {
                headers.insert(ALLOW, HeaderValue::from_static(allowed));
            }
            // RFC 9110, section 15.5.16: how to send the body instead.
            Self::ContentEncoding(_) => {
                let identity = HeaderValue::from_static("identity");
                headers.insert(ACCEPT_ENCODING, identity);
            }
            Self::UnsupportedMediaType { accepted, .. } => {
                let accepted = HeaderValue::try_from(accepted.join(", "));
                headers.extend(accepted.map(|accepted| (ACCEPT, accepted)));
            }
            // Where the request ends may be disputed.
            Self::TransferEncoding => {
                headers.insert(CONNECTION, HeaderValue::from_static("close"));
            }
            _ => {}
        }
        headers
    }
}

/// RFC 9457, section 3.1; `line` and `accepted` are extension members (section 3.2).
#[derive(Serialize)]
struct Problem<'a> {
    r#type: String,
    title: &'a str,
    status: u16,
    detail: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    line: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    accepted: Option<u64>,
}

impl ApiError {
    /// The body of the response.
    pub(super) fn to_json(&self) -> Vec<u8> {
        self.to_json_with(&self.to_string())
    }

    #[expect(clippy::expect_used, reason = "it can't fail")]
    fn to_json_with(&self, detail: &str) -> Vec<u8> {
        let (status, problem) = self.kind();
        let (line, accepted) = self.lines();
        let problem = Problem {
            r#type: format!("urn:gradestore:problem:{problem}"),
            title: status.canonical_reason().unwrap_or_default(),
            status: status.as_u16(),
            detail,
            line,
            accepted,
        };
        serde_json::to_vec(&problem).expect("strings and numbers are JSON")
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let (status, problem) = self.kind();
        let detail = self.to_string();
        let body = self.to_json_with(&detail);
        let mut headers = self.headers(status);
        let problem_json = HeaderValue::from_static("application/problem+json");
        headers.insert(CONTENT_TYPE, problem_json);
        let mut response = (status, headers, body).into_response();
        if ErrorDetail::is_logged(status) {
            let detail = detail.into();
            response
                .extensions_mut()
                .insert(ErrorDetail { problem, detail });
        }
        response
    }
}
