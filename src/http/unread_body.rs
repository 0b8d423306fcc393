//! The rest of a request's body, if the response comes before its end.
//!
//! hyper closes a connection whose request was not read to its end. A client that does not know would
//! send its next request into the closed connection and lose it. So the rest of a short body is
//! discarded and the connection stays open. Otherwise the response has `Connection: close`.

use std::time::Duration;

use axum::body::HttpBody;
use http_body_util::BodyExt;
use hyper::body::Incoming;

/// How much of a body is discarded, in bytes, and for how long, before its connection is closed.
const DISCARDED_BYTES_MAX: u64 = 256 * 1024;
const DISCARD_WAIT_MAX: Duration = Duration::from_millis(500);

/// How far a body was read.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum BodyState {
    /// The client sends it once something reads it: `Expect: 100-continue`.
    Awaited,
    /// It may have more to read.
    Open,
    /// It is incomplete or malformed.
    Broken,
}

/// The rest of a body that no handler reads.
pub(super) struct UnreadBody {
    pub(super) body: Incoming,
    pub(super) state: BodyState,
}

impl UnreadBody {
    /// Discards the rest. Returns false if the connection has to be closed, because the rest is too
    /// long, does not arrive, or can't be read.
    pub(super) async fn discard(mut self) -> bool {
        let known_bytes = self.body.size_hint().lower();
        if self.state != BodyState::Open || known_bytes > DISCARDED_BYTES_MAX {
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
