//! What can go wrong with a request, and how it is said: RFC 9457 problem details.

use std::sync::Arc;

use axum::response::{IntoResponse, Response};
use http::header::{ALLOW, CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderValue, StatusCode};
use serde::Serialize;

use super::failures::Failure;
use crate::grade::{USER_ID, UserIdError};
use crate::readiness::Unready;
use crate::replication::WriteError;

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
    #[error("the query has no {USER_ID}; ask as /get?{USER_ID}=alice")]
    UserIdMissing,
    /// More than one `user_id` in the query.
    #[error("the query has {USER_ID} more than once; send it once")]
    UserIdRepeated,
    /// A `user_id` that no user can have.
    #[error(transparent)]
    UserIdInvalid(UserIdError),
    /// The query's percent-encoding is broken.
    #[error("the query is wrongly percent-encoded: {0}")]
    QueryEncoding(&'static str),
    /// A `Grade-Position` that is no number.
    #[error("Grade-Position must be one decimal number, as an answer to POST /set gave it")]
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
    /// Not `application/json`.
    #[error("Content-Type must be application/json")]
    UnsupportedMediaType,
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
            Self::NotReady(_) => (S::SERVICE_UNAVAILABLE, "not-ready"),
            Self::PositionNotReached { .. } => (S::SERVICE_UNAVAILABLE, "position-not-reached"),
            Self::QueueFull => (S::SERVICE_UNAVAILABLE, "queue-full"),
            Self::BackupsRunning => (S::SERVICE_UNAVAILABLE, "backups-running"),
            Self::NotWritten(_) => (S::SERVICE_UNAVAILABLE, "not-written"),
            Self::OutcomeUnknown(_) => (S::GATEWAY_TIMEOUT, "outcome-unknown"),
            Self::Internal => (S::INTERNAL_SERVER_ERROR, "internal"),
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

/// RFC 9457, section 3.1.
#[derive(Serialize)]
struct Problem<'a> {
    r#type: String,
    title: &'a str,
    status: u16,
    detail: &'a str,
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let (status, cause) = self.kind();
        let detail = self.to_string();
        let problem = Problem {
            r#type: format!("urn:gradestore:problem:{cause}"),
            title: status.canonical_reason().unwrap_or_default(),
            status: status.as_u16(),
            detail: &detail,
        };
        let body = serde_json::to_vec(&problem).unwrap_or_default();
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
