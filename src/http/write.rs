//! The write port: `POST /set`. Its other route is in [`super::backup`].

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use axum::Router;
use axum::body::HttpBody;
use axum::extract::{Request, State};
use axum::response::Response;
use axum::routing::post;
use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use http::{HeaderMap, Method, StatusCode};
use http_body_util::BodyExt;

use super::answer::{Answer, AnswerBody, boxed};
use super::error::ApiError;
use super::listener::{Direct, Directly};
use super::{Credentials, GRADE_POSITION, parse_patch};
use crate::readiness::Readiness;
use crate::replication::Writer;

/// The largest body of `POST /set`, in bytes.
pub const BODY_BYTES_MAX: usize = 64 * 1024;

const TOO_LARGE: ApiError = ApiError::BodyTooLarge {
    limit_bytes: BODY_BYTES_MAX,
};

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
    B: HttpBody<Data = Bytes> + Unpin,
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
    B: HttpBody<Data = Bytes> + Unpin,
{
    let announced = request.headers().get(CONTENT_LENGTH);
    let announced = announced.and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|bytes| bytes > BODY_BYTES_MAX as u64) {
        return Err(TOO_LARGE);
    }
    let mut whole = pin!(whole(request.into_body()));
    if let Some(whole) = at_once(whole.as_mut()).await {
        return whole;
    }
    let in_time = tokio::time::timeout(wait_max, whole).await;
    in_time.unwrap_or(Err(ApiError::BodySlow {
        seconds: wait_max.as_secs(),
    }))
}

/// What `future` gives in its first two polls. A short body comes with the second one: hyper passes
/// it on once it has been asked for. No timer is made for it.
async fn at_once<T>(mut future: Pin<&mut impl Future<Output = T>>) -> Option<T> {
    let mut asked = false;
    poll_fn(|cx| match future.as_mut().poll(cx) {
        Poll::Ready(done) => Poll::Ready(Some(done)),
        Poll::Pending if asked => Poll::Ready(None),
        Poll::Pending => {
            asked = true;
            cx.waker().wake_by_ref();
            Poll::Pending
        }
    })
    .await
}

async fn whole<B>(mut body: B) -> Result<Bytes, ApiError>
where
    B: HttpBody<Data = Bytes> + Unpin,
{
    // Nearly every body comes in one part, which needs no copy.
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
