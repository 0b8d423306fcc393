//! `POST /set` with many patches, a line each, as `application/x-ndjson`.
//!
//! The body is taken as it comes and may be of any length. Its lines go in groups: a group goes into
//! one batch of the log, so all of it is written or none, and the next one is begun when this replica
//! has applied it. What is held meanwhile is a group, the rest of what has arrived, and no more.
//!
//! Whatever ends a body early, the groups before stay, and the answer says how many lines those are:
//! who sends the lines after them goes on where it ended.

use std::time::Duration;

use axum::body::{Body, HttpBody};
use axum::response::Response;
use bytes::{Buf, Bytes, BytesMut};
use http::HeaderValue;
use http::header::CONTENT_TYPE;
use http_body_util::BodyExt;
use serde::Serialize;

use crate::grade::Write;
use crate::http::error::ApiError;
use crate::http::set::WriteState;
use crate::http::{GRADE_POSITION, parse_patch};
use crate::log::Seq;
use crate::replication::BulkWriter;
use crate::replication::memory::StoreFull;

/// The longest line, in bytes, without what ends it.
pub const LINE_BYTES_MAX: usize = crate::http::set::BODY_BYTES_MAX;
/// The most bytes of lines in a group.
pub const GROUP_BYTES_MAX: usize = 256 * 1024;

/// What is answered when all of it was written.
#[derive(Serialize)]
struct Accepted {
    /// Lines, empty ones too.
    accepted: u64,
    /// The batch of the last group.
    position: Seq,
}

/// Takes the lines of `body`.
#[expect(clippy::expect_used, reason = "it can't fail")]
pub(super) async fn set_lines<B>(state: &WriteState, body: B) -> Result<Response, ApiError>
where
    B: HttpBody<Data = Bytes> + Unpin,
{
    let in_part = |accepted, cause| ApiError::InPart {
        accepted,
        cause: Box::new(cause),
    };
    let bulk = state.writer.bulk();
    let bulk = bulk.map_err(|error| in_part(0, error.into()))?;
    let mut lines = Lines {
        state,
        group_max: bulk.group_max(),
        bulk,
        taken: 0,
        accepted: 0,
        position: state.applied.seq(),
        group: Vec::new(),
        group_bytes: 0,
    };
    if let Err(error) = lines.take_all(body, state.body_wait_max).await {
        return Err(match error {
            Stopped::Line(what) => ApiError::BadLine {
                line: lines.taken,
                accepted: lines.accepted,
                what,
            },
            Stopped::Full(full) => ApiError::LineStoreFull {
                line: lines.taken,
                accepted: lines.accepted,
                full,
            },
            Stopped::By(cause) => in_part(lines.accepted, cause),
        });
    }
    let Lines {
        accepted, position, ..
    } = lines;
    let json = serde_json::to_vec(&Accepted { accepted, position });
    let json = json.expect("numbers are JSON");
    let mut response = Response::new(Body::from(json));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(GRADE_POSITION, position.into());
    Ok(response)
}

/// Why a body is not taken further.
enum Stopped {
    /// Its last line is wrong; what is wrong with it.
    Line(String),
    /// Its last line would create a record, for which there is no memory.
    Full(StoreFull),
    /// Something else.
    By(ApiError),
}

impl<E: Into<ApiError>> From<E> for Stopped {
    fn from(error: E) -> Self {
        Self::By(error.into())
    }
}

/// A body that is being taken.
struct Lines<'a> {
    state: &'a WriteState,
    bulk: BulkWriter,
    group_max: usize,
    /// Lines looked at.
    taken: u64,
    /// Those up to the last group that was written.
    accepted: u64,
    /// That group's.
    position: Seq,
    group: Vec<Write>,
    group_bytes: usize,
}

impl Lines<'_> {
    async fn take_all<B>(&mut self, mut body: B, silence_max: Duration) -> Result<(), Stopped>
    where
        B: HttpBody<Data = Bytes> + Unpin,
    {
        // The beginning of a line whose end has not arrived.
        let mut begun = BytesMut::new();
        loop {
            let frame = tokio::time::timeout(silence_max, body.frame()).await;
            let frame = frame.map_err(|_elapsed| ApiError::BodySlow {
                seconds: silence_max.as_secs(),
            })?;
            let Some(frame) = frame else {
                break;
            };
            let Ok(mut data) = frame.map_err(|_| ApiError::BodyBroken)?.into_data() else {
                continue;
            };
            while let Some(end) = data.iter().position(|byte| *byte == b'\n') {
                let line = data.split_to(end);
                data.advance(1);
                match begun.is_empty() {
                    true => self.take(&line).await?,
                    false => {
                        begun.extend_from_slice(&line);
                        self.take(&begun.split()).await?;
                    }
                }
            }
            begun.extend_from_slice(&data);
            if begun.len() > LINE_BYTES_MAX {
                break;
            }
        }
        // The last line may do without its end.
        if !begun.is_empty() {
            self.take(&begun).await?;
        }
        self.write().await
    }

    /// Takes one line; writes its group if that is full.
    async fn take(&mut self, line: &[u8]) -> Result<(), Stopped> {
        if self.group_bytes + line.len() > GROUP_BYTES_MAX {
            self.write().await?;
        }
        self.taken += 1;
        if line.len() > LINE_BYTES_MAX {
            let what = format!("it has more than {LINE_BYTES_MAX} bytes");
            return Err(Stopped::Line(what));
        }
        // As JSON has it, so that lines may end in \r\n.
        if line.iter().all(|byte| matches!(byte, b' ' | b'\t' | b'\r')) {
            return Ok(());
        }
        let patch = parse_patch(line).map_err(|error| Stopped::Line(error.of_line()))?;
        self.state.admit(&patch).map_err(Stopped::Full)?;
        self.group.push(patch.into());
        self.group_bytes += line.len();
        if self.group.len() == self.group_max {
            self.write().await?;
        }
        Ok(())
    }

    /// Writes the group.
    async fn write(&mut self) -> Result<(), Stopped> {
        if !self.group.is_empty() {
            self.state.readiness.check()?;
            let group = std::mem::take(&mut self.group);
            self.position = self.bulk.write(group).await?;
            self.group_bytes = 0;
        }
        self.accepted = self.taken;
        Ok(())
    }
}
