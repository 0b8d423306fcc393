//! The write port: `POST` and `DELETE /set`. Its other route is in [`crate::http::backup`].

pub mod ndjson;
pub mod patch;

use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use http::StatusCode;

use crate::grade::{Patch, Write};
use crate::http::body::{self, JSON, NDJSON, content_type};
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
        .fallback(|| async {
            ApiError::RouteUnknown("POST /set, DELETE /set, GET /backup, GET /readyz")
        })
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
    if content_type(request.headers(), &[JSON, NDJSON])? == NDJSON {
        // Boxed, because this future is many times larger than that of a single patch.
        let response = Box::pin(set_lines(&state, request.into_body())).await;
        let mut response = response.into_response();
        response.extensions_mut().insert(Route::SetLines);
        return Ok(response);
    }
    let body = body::read(request, state.body_wait_max).await?;
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
