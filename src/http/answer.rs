//! What a port answers: most bodies are whole and short, and need no box of axum's.

use std::pin::Pin;
use std::task::{Context, Poll};

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use hyper::body::{Body as HttpBody, Frame, SizeHint};

use super::error::ApiError;

/// An answer of a port.
pub type Answer = http::Response<AnswerBody>;

/// Its body.
#[derive(Debug)]
pub enum AnswerBody {
    /// All of it; nothing once it has been taken.
    Whole(Option<Bytes>),
    /// One of a route.
    Routed(Body),
}

/// A route's answer as a port's.
pub(super) fn routed(response: Response) -> Answer {
    response.map(AnswerBody::Routed)
}

impl From<ApiError> for Answer {
    fn from(error: ApiError) -> Self {
        routed(error.into_response())
    }
}

/// A port's answer as a route's.
pub(super) fn boxed(answer: Answer) -> Response {
    answer.map(|body| match body {
        AnswerBody::Whole(bytes) => bytes.map_or_else(Body::empty, Body::from),
        AnswerBody::Routed(body) => body,
    })
}

impl HttpBody for AnswerBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        match self.get_mut() {
            Self::Whole(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Routed(body) => Pin::new(body).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Whole(bytes) => bytes.is_none(),
            Self::Routed(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, Bytes::len) as u64),
            Self::Routed(body) => body.size_hint(),
        }
    }
}
