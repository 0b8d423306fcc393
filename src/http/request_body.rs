//! The body of a request, and its rest if the response comes before its end.
//!
//! hyper closes a connection whose request was not read to its end. A client that does not know would
//! send its next request into the closed connection and lose it. So the rest of a short body is
//! discarded and the connection stays open. Otherwise the response has `Connection: close`.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::HttpBody;
use bytes::Bytes;
use http::Request;
use http::header::EXPECT;
use http_body_util::BodyExt;
use hyper::body::{Frame, Incoming, SizeHint};

use super::connection::ConnectionState;

/// How much of a body is discarded, in bytes, and for how long, before its connection is closed.
const DISCARDED_BYTES_MAX: u64 = 256 * 1024;
const DISCARD_WAIT_MAX: Duration = Duration::from_millis(500);

/// A request's body. It tells the connection when it was read to its end, and leaves it the rest
/// otherwise.
pub(super) struct RequestBody {
    /// `None` once it was left to the connection.
    body: Option<Incoming>,
    connection: Arc<ConnectionState>,
    state: ReadState,
}

/// How far a body was read.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ReadState {
    /// The client sends it once something reads it: `Expect: 100-continue`.
    Awaited,
    /// It may have more to read.
    Open,
    /// It is incomplete or malformed.
    Broken,
}

impl RequestBody {
    pub(super) fn of(
        request: Request<Incoming>,
        connection: &Arc<ConnectionState>,
    ) -> Request<Self> {
        let state = match request.headers().contains_key(EXPECT) {
            true => ReadState::Awaited,
            false => ReadState::Open,
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
        this.state = ReadState::Open;
        let frame = std::task::ready!(Pin::new(&mut *body).poll_frame(cx));
        match &frame {
            Some(Err(_)) => this.state = ReadState::Broken,
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

/// The rest of a body that no handler reads.
pub(super) struct UnreadBody {
    body: Incoming,
    state: ReadState,
}

impl UnreadBody {
    /// Discards the rest. Returns false if the connection has to be closed, because the rest is too
    /// long, does not arrive, or can't be read.
    pub(super) async fn discard(mut self) -> bool {
        let known_bytes = self.body.size_hint().lower();
        if self.state != ReadState::Open || known_bytes > DISCARDED_BYTES_MAX {
            return false;
        }
        let rest = async {
            let mut discarded = 0;
            while let Some(frame) = self.body.frame().await {
                let Ok(frame) = frame else {
                    return false;
                };
                discarded += frame.data_ref().map_or(0, |data| data.len() as u64);
                if discarded > DISCARDED_BYTES_MAX {
                    return false;
                }
            }
            true
        };
        let rest = tokio::time::timeout(DISCARD_WAIT_MAX, rest).await;
        rest.unwrap_or(false)
    }
}
