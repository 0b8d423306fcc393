//! What can go wrong with a request, and how it is said: RFC 9457 problem details.

use std::sync::Arc;

use axum::response::{IntoResponse, Response};
use http::header::{ALLOW, CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderValue, StatusCode};
use serde::Serialize;

use super::failures::Failure;
use crate::grade::{USER_ID, UserIdError};
use crate::replication::WriteError;
use crate::replication::memory::StoreFull;
use crate::replication::state::Unready;

/// Seconds a client should wait before it tries again, in `Retry-After`.
const RETRY_AFTER_S: HeaderValue = HeaderValue::from_static("1");

/// One cause each; its [`Display`](std::fmt::Display) is the `detail` and says what to do.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ApiError {
    /// The body is no JSON text.
    #[error(
        "the body is not JSON: {0}; send one object such as {{\"user_id\":\"alice\",\"spp\":5}}"
    )]
    NotJson(String),
    /// The body is not UTF-8.
    #[error("the body is not UTF-8 from byte {at} on; encode it as UTF-8")]
    BodyNotUtf8 {
        /// The first byte that is wrong.
        at: usize,
    },
    /// The body could not be read to its end.
    #[error(
        "the body ended early or is wrongly framed; send as many bytes as Content-Length says, or whole chunks"
    )]
    BodyBroken,
    /// The body is JSON but not a patch.
    #[error("the body is no patch: {0}")]
    NotAPatch(String),
    /// No `user_id` in the query.
    #[error("the query has no {USER_ID}; put ?{USER_ID}=alice behind the path")]
    UserIdMissing,
    /// More than one `user_id` in the query.
    #[error("the query has {USER_ID} more than once; send it once")]
    UserIdRepeated,
    /// `user_id` and `user_ids` in one query.
    #[error("the query has both {USER_ID} and user_ids; send one {USER_ID}, or user_ids alone")]
    UserIdAndIds,
    /// `user_ids` where there may be one user only.
    #[error("the query has user_ids, which only GET /get takes; send one {USER_ID}")]
    UserIdsHere,
    /// More `user_ids` than may be asked for at once.
    #[error(
        "the query has {found} user_ids; send {} at most, and ask for the others next",
        super::get::USER_IDS_MAX
    )]
    UserIdsTooMany {
        /// How many.
        found: usize,
    },
    /// A `user_id` that no user can have.
    #[error(transparent)]
    UserIdInvalid(UserIdError),
    /// The query's percent-encoding is broken.
    #[error("the query is wrongly percent-encoded: {0}")]
    QueryEncoding(&'static str),
    /// A `Grade-Position` that is no number.
    #[error(
        "Grade-Position must be one decimal number, as an answer to POST /set or DELETE /set gave it"
    )]
    PositionInvalid,
    /// No or wrong credentials.
    #[error(
        "send the user name and password by HTTP Basic authentication, as curl -u NAME:PASSWORD does"
    )]
    Unauthorized,
    /// No record under this id.
    #[error("no grade is stored for this {USER_ID}")]
    UserUnknown,
    /// No such route on this port.
    #[error("this port has no such path; it has {0}")]
    RouteUnknown(&'static str),
    /// The route takes another method.
    #[error("this path takes {0}")]
    MethodNotAllowed(&'static str),
    /// The body did not come in time.
    #[error("the body did not arrive within {seconds} s; send it at once")]
    BodySlow {
        /// The limit.
        seconds: u64,
    },
    /// The body is too large.
    #[error("the body has more than {limit_bytes} bytes; one patch is far smaller")]
    BodyTooLarge {
        /// The limit.
        limit_bytes: usize,
    },
    /// Neither `application/json` nor `application/x-ndjson`.
    #[error(
        "Content-Type must be application/json for one patch, or application/x-ndjson for a patch a line"
    )]
    UnsupportedMediaType,
    /// One of many lines is no patch.
    #[error(
        "line {line}: {what}; {accepted} lines were accepted and stay, nothing after them was \
         written; mend it and go on from line {}", .accepted + 1
    )]
    BadLine {
        /// Which one, from 1.
        line: u64,
        /// Lines up to the last group that was written.
        accepted: u64,
        /// What is wrong with it.
        what: String,
    },
    /// There is no memory for a new user.
    #[error(transparent)]
    StoreFull(#[from] StoreFull),
    /// There is none for that of one of many lines.
    #[error(
        "line {line} is for a new user, and {full}; {accepted} lines were accepted and stay, \
         nothing after them was written; go on from line {} when the store is no longer full",
        .accepted + 1
    )]
    LineStoreFull {
        /// Which one, from 1.
        line: u64,
        /// Lines up to the last group that was written.
        accepted: u64,
        /// Why it is refused.
        full: StoreFull,
    },
    /// Something ended a body of many lines before it was written to its end.
    #[error("{cause}; {accepted} lines were accepted and stay, go on from line {}", .accepted + 1)]
    InPart {
        /// Lines up to the last group that was written.
        accepted: u64,
        /// What it was.
        cause: Box<ApiError>,
    },
    /// This replica may not answer now.
    #[error("not ready ({}): {}; try again, or ask another replica", .0.state, .0.reason)]
    NotReady(Unready),
    /// The position asked for was not reached in time.
    #[error(
        "this replica has applied {applied} and not yet {wanted}; try again, or ask another replica"
    )]
    PositionNotReached {
        /// What was asked for.
        wanted: u64,
        /// How far this replica is.
        applied: u64,
    },
    /// The position asked for is too far past the log's end to wait for.
    #[error(
        "Grade-Position {wanted} is more than {} past the end of the log, {end}; send the \
         Grade-Position of an acknowledged write, or ask another replica",
        super::get::POSITION_AHEAD_MAX
    )]
    PositionTooFar {
        /// What was asked for.
        wanted: u64,
        /// The last batch of the log that this replica knows of.
        end: u64,
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
    #[error("the write queue is full and nothing was written; try again later, or slower")]
    QueueFull,
    /// As many backups run as may at once.
    #[error("as many backups are being sent as may be at once; try again later")]
    BackupsRunning,
    /// The log did not take the write.
    #[error("nothing was written: {0}; try again")]
    NotWritten(Arc<str>),
    /// The write may or may not have happened.
    #[error("outcome unknown: {0}; read the grade back, or send the write again")]
    OutcomeUnknown(WriteError),
    /// A fault of this program.
    #[error("a fault in gradestore, which its log describes; please report it")]
    Internal,
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
    /// What is wrong with a line, if that is what this says of a body.
    #[must_use]
    pub fn of_line(&self) -> String {
        let said = match self {
            Self::NotJson(why) => format!("it is not JSON: {why}"),
            Self::BodyNotUtf8 { at } => format!("it is not UTF-8 from byte {at} on"),
            Self::NotAPatch(why) => format!("it is no patch: {why}"),
            other => other.to_string(),
        };
        // Which line it is among its kind is known better.
        said.replace(" at line 1 column ", " at column ")
    }

    /// The status, and the word that names the cause in `type`.
    #[must_use]
    pub fn kind(&self) -> (StatusCode, &'static str) {
        use StatusCode as S;
        match self {
            Self::NotJson(_) => (S::BAD_REQUEST, "not-json"),
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
            Self::Unauthorized => (S::UNAUTHORIZED, "unauthorized"),
            Self::UserUnknown => (S::NOT_FOUND, "user-unknown"),
            Self::RouteUnknown(_) => (S::NOT_FOUND, "route-unknown"),
            Self::MethodNotAllowed(_) => (S::METHOD_NOT_ALLOWED, "method-not-allowed"),
            Self::BodySlow { .. } => (S::REQUEST_TIMEOUT, "body-slow"),
            Self::BodyTooLarge { .. } => (S::PAYLOAD_TOO_LARGE, "body-too-large"),
            Self::UnsupportedMediaType => (S::UNSUPPORTED_MEDIA_TYPE, "unsupported-media-type"),
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

    /// The line that is wrong, and how many are accepted, where a body has many.
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
            _ => {}
        }
        headers
    }
}

/// RFC 9457, section 3.1; `line` and `accepted` are extensions by its section 3.2.
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
    /// The body of its response.
    pub(super) fn to_json(&self) -> Vec<u8> {
        self.to_json_with(&self.to_string())
    }

    #[expect(clippy::expect_used, reason = "it can't fail")]
    fn to_json_with(&self, detail: &str) -> Vec<u8> {
        let (status, cause) = self.kind();
        let (line, accepted) = self.lines();
        let problem = Problem {
            r#type: format!("urn:gradestore:problem:{cause}"),
            title: status.canonical_reason().unwrap_or_default(),
            status: status.as_u16(),
            detail,
            line,
            accepted,
        };
        serde_json::to_vec(&problem).expect("texts and numbers are JSON")
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let (status, cause) = self.kind();
        let detail = self.to_string();
        let body = self.to_json_with(&detail);
        let mut headers = self.headers(status);
        let problem_json = HeaderValue::from_static("application/problem+json");
        headers.insert(CONTENT_TYPE, problem_json);
        let mut response = (status, headers, body).into_response();
        if Failure::is_told(status) {
            let (problem, detail) = (cause, detail.into());
            response
                .extensions_mut()
                .insert(Failure { problem, detail });
        }
        response
    }
}
