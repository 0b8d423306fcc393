//! The write port: `POST /set`. Its other route is in [`super::backup`].

use std::sync::Arc;
use std::time::Duration;

use axum::body::HttpBody;
use axum::extract::{Request, State};
use axum::response::Response;
use axum::routing::post;
use axum::{BoxError, Router};
use bytes::Bytes;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use http::{HeaderMap, Method, StatusCode};
use http_body_util::{BodyExt, LengthLimitError, Limited};

use super::answer::{Answer, AnswerBody, boxed};
use super::error::ApiError;
use super::listener::{Direct, Directly};
use super::{Credentials, GRADE_POSITION, parse_patch};
use crate::readiness::Readiness;
use crate::replication::Writer;

/// The largest body of `POST /set`, in bytes.
pub const BODY_BYTES_MAX: usize = 64 * 1024;

/// What the write port works with.
#[derive(Clone)]
pub struct WriteState {
    /// Where patches go.
    pub writer: Writer,
    /// Whether they may.
    pub readiness: Readiness,
    /// What a request must bring.
    pub credentials: Credentials,
    /// How long a body may take to arrive.
    pub body_wait_max: Duration,
}

/// The port's routes.
pub fn routes(state: WriteState) -> Router {
    Router::new()
        .route(
            "/set",
            post(set_grade).fallback(|| async { ApiError::MethodNotAllowed("POST") }),
        )
        .fallback(|| async { ApiError::RouteUnknown("POST /set, GET /backup") })
        .with_state(state)
}

/// The way past the router for `POST /set`: one boxed future where axum makes several. What it is
/// worth stands in `load/README.md`.
pub fn direct(state: WriteState) -> Direct {
    let state = Arc::new(state);
    Arc::new(move |request| {
        if request.method() != Method::POST || request.uri().path() != "/set" {
            return Directly::Router(request);
        }
        let state = Arc::clone(&state);
        Directly::Later(Box::pin(async move {
            set(&state, request).await.unwrap_or_else(Answer::from)
        }))
    })
}

async fn set_grade(
    State(state): State<WriteState>,
    request: Request,
) -> Result<Response, ApiError> {
    set(&state, request).await.map(boxed)
}

async fn set<B>(state: &WriteState, request: Request<B>) -> Result<Answer, ApiError>
where
    B: HttpBody<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    state.credentials.check(request.headers())?;
    state.readiness.writes()?;
    if !is_json(request.headers()) {
        return Err(ApiError::UnsupportedMediaType);
    }
    let body = read_body(request, state.body_wait_max).await?;
    let seq = state.writer.write(parse_patch(&body)?).await?;
    let mut answer = Answer::new(AnswerBody::Whole(None));
    *answer.status_mut() = StatusCode::NO_CONTENT;
    answer.headers_mut().insert(GRADE_POSITION, seq.into());
    Ok(answer)
}

/// Whether the content type is `application/json`, with or without parameters.
fn is_json(headers: &HeaderMap) -> bool {
    let content_type = headers
        .get(CONTENT_TYPE)
        .and_then(|value| value.to_str().ok());
    content_type.is_some_and(|value| {
        let essence = value.split_once(';').map_or(value, |(essence, _)| essence);
        essence.trim().eq_ignore_ascii_case("application/json")
    })
}

async fn read_body<B>(request: Request<B>, wait_max: Duration) -> Result<Bytes, ApiError>
where
    B: HttpBody<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    let too_large = ApiError::BodyTooLarge {
        limit_bytes: BODY_BYTES_MAX,
    };
    let announced = request.headers().get(CONTENT_LENGTH);
    let announced = announced.and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|bytes| bytes > BODY_BYTES_MAX as u64) {
        return Err(too_large);
    }
    let body = Limited::new(request.into_body(), BODY_BYTES_MAX).collect();
    match tokio::time::timeout(wait_max, body).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large),
        Ok(Err(_)) => Err(ApiError::BodyBroken),
        Err(_elapsed) => Err(ApiError::BodySlow {
            seconds: wait_max.as_secs(),
        }),
    }
}
