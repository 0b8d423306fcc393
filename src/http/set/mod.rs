//! The write port: `POST` and `DELETE /set`. Its other route is in [`crate::http::backup`].

pub mod body;
pub mod ndjson;

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::task::Poll;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, HttpBody};
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use http::{HeaderMap, StatusCode};
use http_body_util::BodyExt;

use crate::grade::{Patch, Write};
use crate::http::error::ApiError;
use crate::http::fast::SetRoute;
use crate::http::get::parse_user_id;
use crate::http::route::Route;
use crate::http::set::ndjson::set_lines;
use crate::http::{Credentials, GRADE_POSITION, parse_patch};
use crate::log::Seq;
use crate::replication::memory::{MemoryGuard, StoreFull};
use crate::replication::state::Readiness;
use crate::replication::{AppliedIndex, PendingWrite, Writer};
use crate::store::Store;

/// The largest body of `POST /set` with one patch, in bytes.
pub const BODY_BYTES_MAX: usize = 64 * 1024;

const TOO_LARGE: ApiError = ApiError::BodyTooLarge {
    limit_bytes: BODY_BYTES_MAX,
};

/// The state of the write port.
#[derive(Clone)]
pub struct WriteState {
    /// The records. Writes for existing records need no memory.
    pub store: Store,
    /// Whether writes may create records.
    pub memory: MemoryGuard,
    /// Submits writes.
    pub writer: Writer,
    /// Whether the replica accepts writes.
    pub readiness: Readiness,
    /// The position of this replica.
    pub applied: AppliedIndex,
    /// The credentials that a request must have.
    pub credentials: Credentials,
    /// How long a body may take to arrive, or the next part of a body of many lines.
    pub body_wait_max: Duration,
}

impl WriteState {
    /// Checks that there is memory for the record of `patch`.
    pub(super) fn admit(&self, patch: &Patch) -> Result<(), StoreFull> {
        self.memory.admit(&self.store, &patch.user_id)
    }
}

/// The port's routes.
pub fn routes(state: WriteState) -> Router {
    Router::new()
        .route(
            "/set",
            post(set_grade)
                .delete(delete_grade)
                .fallback(|| async { ApiError::MethodNotAllowed("POST, DELETE") }),
        )
        .fallback(|| async { ApiError::RouteUnknown("POST /set, DELETE /set, GET /backup") })
        .with_state(state)
}

impl SetRoute for WriteState {
    fn admits(&self, authorization: Option<&[u8]>) -> bool {
        self.credentials.matches(authorization) && self.readiness.check().is_ok()
    }

    fn submit(&self, body: &[u8]) -> Option<PendingWrite> {
        let patch = parse_patch(body).ok()?;
        self.admit(&patch).ok()?;
        self.writer.submit_one(patch.into()).ok()
    }
}

async fn set_grade(
    State(state): State<WriteState>,
    request: Request,
) -> Result<Response, ApiError> {
    state.credentials.check(request.headers())?;
    state.readiness.check()?;
    match body_format(request.headers())? {
        BodyFormat::Patch => {}
        // Boxed, because this future is many times larger than that of a single patch.
        BodyFormat::Ndjson => {
            let response = Box::pin(set_lines(&state, request.into_body())).await;
            let mut response = response.into_response();
            response.extensions_mut().insert(Route::SetLines);
            return Ok(response);
        }
    }
    let body = read_body(request, state.body_wait_max).await?;
    let patch = parse_patch(&body)?;
    state.admit(&patch)?;
    let seq = state.writer.write(patch.into()).await?;
    Ok(written(seq))
}

/// Deletes a grade. Deleting an unknown user is not an error: whether the user exists is known only
/// once the log has ordered the deletion among the writes of other replicas.
async fn delete_grade(
    State(state): State<WriteState>,
    request: Request,
) -> Result<Response, ApiError> {
    state.credentials.check(request.headers())?;
    state.readiness.check()?;
    let user_id = parse_user_id(request.uri().query().unwrap_or_default())?;
    let delete = Write::Delete(user_id.into());
    let seq = state.writer.write(delete).await?;
    Ok(written(seq))
}

/// The response to a write that was applied with batch `seq`.
fn written(seq: Seq) -> Response {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::NO_CONTENT;
    response.headers_mut().insert(GRADE_POSITION, seq.into());
    response
}

/// The format of a body.
enum BodyFormat {
    /// One patch.
    Patch,
    /// One patch per line.
    Ndjson,
}

/// The format that `Content-Type` names, with or without parameters.
fn body_format(headers: &HeaderMap) -> Result<BodyFormat, ApiError> {
    let content_type = headers
        .get(CONTENT_TYPE)
        .and_then(|value| value.to_str().ok());
    let value = content_type.unwrap_or_default();
    let essence = value.split_once(';').map_or(value, |(essence, _)| essence);
    let essence = essence.trim();
    if essence.eq_ignore_ascii_case("application/json") {
        return Ok(BodyFormat::Patch);
    }
    match essence.eq_ignore_ascii_case("application/x-ndjson") {
        true => Ok(BodyFormat::Ndjson),
        false => Err(ApiError::UnsupportedMediaType),
    }
}

async fn read_body<B>(request: Request<B>, wait_max: Duration) -> Result<Bytes, ApiError>
where
    B: HttpBody<Data = Bytes> + Unpin,
{
    let length = request.headers().get(CONTENT_LENGTH);
    let length = length.and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if length.is_some_and(|bytes| bytes > BODY_BYTES_MAX as u64) {
        return Err(TOO_LARGE);
    }
    let mut body = pin!(collect(request.into_body()));
    if let Some(body) = poll_twice(body.as_mut()).await {
        return body;
    }
    let in_time = tokio::time::timeout(wait_max, body).await;
    in_time.unwrap_or(Err(ApiError::BodySlow {
        seconds: wait_max.as_secs(),
    }))
}

/// The output of `future` if it completes within two polls. A short body completes at the second one,
/// because hyper passes it on after the first. This saves a timer.
async fn poll_twice<T>(mut future: Pin<&mut impl Future<Output = T>>) -> Option<T> {
    let mut polled = false;
    poll_fn(|cx| match future.as_mut().poll(cx) {
        Poll::Ready(done) => Poll::Ready(Some(done)),
        Poll::Pending if polled => Poll::Ready(None),
        Poll::Pending => {
            polled = true;
            cx.waker().wake_by_ref();
            Poll::Pending
        }
    })
    .await
}

async fn collect<B>(mut body: B) -> Result<Bytes, ApiError>
where
    B: HttpBody<Data = Bytes> + Unpin,
{
    // Nearly every body arrives in one frame, which needs no copy.
    let (mut first, mut whole) = (Bytes::new(), BytesMut::new());
    while !body.is_end_stream()
        && let Some(frame) = body.frame().await
    {
        let frame = frame.map_err(|_| ApiError::BodyBroken)?;
        let Ok(data) = frame.into_data() else {
            continue;
        };
        if first.len().max(whole.len()) + data.len() > BODY_BYTES_MAX {
            return Err(TOO_LARGE);
        }
        if first.is_empty() {
            first = data;
            continue;
        }
        if whole.is_empty() {
            whole.extend_from_slice(&first);
        }
        whole.extend_from_slice(&data);
    }
    Ok(match whole.is_empty() {
        true => first,
        false => whole.freeze(),
    })
}
