//! The body of a request, which leaves its rest to the connection if the handler does not read it.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::body::HttpBody;
use bytes::Bytes;
use http::Request;
use http::header::EXPECT;
use hyper::body::{Frame, Incoming, SizeHint};

use super::connection::ConnectionState;
use super::unread_body::{BodyState, UnreadBody};

/// A request's body. It tells the connection when it was read to its end, and leaves it the rest
/// otherwise.
pub(super) struct RequestBody {
    /// `None` once it was left to the connection.
    body: Option<Incoming>,
    connection: Arc<ConnectionState>,
    state: BodyState,
}

impl RequestBody {
    pub(super) fn of(
        request: Request<Incoming>,
        connection: &Arc<ConnectionState>,
    ) -> Request<Self> {
        let state = match request.headers().contains_key(EXPECT) {
            true => BodyState::Awaited,
            false => BodyState::Open,
        };
        request.map(|body| Self {
            body: Some(body),
            connection: Arc::clone(connection),
            state,
        })
    }
}

impl Drop for RequestBody {
    fn drop(&mut self) {
        if let Some(body) = self.body.take().filter(|body| !body.is_end_stream()) {
            let state = self.state;
            self.connection.leave_unread(UnreadBody { body, state });
        }
    }
}

impl HttpBody for RequestBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let this = &mut *self;
        let Some(body) = &mut this.body else {
            return Poll::Ready(None);
        };
        this.state = BodyState::Open;
        let frame = std::task::ready!(Pin::new(&mut *body).poll_frame(cx));
        match &frame {
            Some(Err(_)) => this.state = BodyState::Broken,
            Some(Ok(_)) if !body.is_end_stream() => {}
            _ => {
                this.body = None;
                this.connection.request_read();
            }
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Incoming::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        let ended = || SizeHint::with_exact(0);
        self.body.as_ref().map_or_else(ended, Incoming::size_hint)
    }
}
