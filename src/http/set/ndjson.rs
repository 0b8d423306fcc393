//! `POST /set` with many patches, one per line, as `application/x-ndjson`.
//!
//! The body is a stream of any length. Its lines are written in groups. A group is one batch of the
//! log, so it is atomic, and the next one starts once this replica has applied it. Memory holds only
//! one group and the rest of the received frame.
//!
//! If an error ends the body early, the groups before it remain written. The response has their number
//! of lines, so the client can resume after them.

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

/// The longest line, in bytes, without its newline.
pub const LINE_BYTES_MAX: usize = crate::http::body::BODY_BYTES_MAX;
/// The maximum size of a group's lines, in bytes.
pub const GROUP_BYTES_MAX: usize = 256 * 1024;

/// The body of the response if all lines were written.
#[derive(Serialize)]
struct LinesAccepted {
    /// Lines, including empty ones.
    accepted: u64,
    /// The batch of the last group.
    position: Seq,
}

/// Writes the lines of `body`.
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
    let mut lines = LineWriter {
        state,
        group_max: bulk.group_max(),
        bulk,
        parsed: 0,
        accepted: 0,
        position: state.applied.seq(),
        group: Vec::new(),
        group_bytes: 0,
    };
    if let Err(error) = lines.write_all(body, state.body_wait_max).await {
        return Err(match error {
            LinesError::InvalidLine(what) => ApiError::BadLine {
                line: lines.parsed,
                accepted: lines.accepted,
                what,
            },
            LinesError::StoreFull(full) => ApiError::LineStoreFull {
                line: lines.parsed,
                accepted: lines.accepted,
                full,
            },
            LinesError::Other(cause) => in_part(lines.accepted, cause),
        });
    }
    let LineWriter {
        accepted, position, ..
    } = lines;
    let json = serde_json::to_vec(&LinesAccepted { accepted, position });
    let json = json.expect("numbers are JSON");
    let mut response = Response::new(Body::from(json));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(GRADE_POSITION, position.into());
    Ok(response)
}

/// Why the rest of a body is not written.
enum LinesError {
    /// The last parsed line is invalid, with the reason.
    InvalidLine(String),
    /// The last parsed line would create a record, and there is no memory for it.
    StoreFull(StoreFull),
    /// The error does not depend on the line.
    Other(ApiError),
}

impl<E: Into<ApiError>> From<E> for LinesError {
    fn from(error: E) -> Self {
        Self::Other(error.into())
    }
}

/// Parses the lines of a body and writes them in groups.
struct LineWriter<'a> {
    state: &'a WriteState,
    bulk: BulkWriter,
    group_max: usize,
    /// Lines parsed.
    parsed: u64,
    /// Lines up to the last group that was written.
    accepted: u64,
    /// The position of the last group that was written.
    position: Seq,
    group: Vec<Write>,
    group_bytes: usize,
}

impl LineWriter<'_> {
    async fn write_all<B>(&mut self, mut body: B, silence_max: Duration) -> Result<(), LinesError>
    where
        B: HttpBody<Data = Bytes> + Unpin,
    {
        // The beginning of a line whose end has not arrived.
        let mut partial = BytesMut::new();
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
                match partial.is_empty() {
                    true => self.add(&line).await?,
                    false => {
                        partial.extend_from_slice(&line);
                        self.add(&partial.split()).await?;
                    }
                }
            }
            partial.extend_from_slice(&data);
            if partial.len() > LINE_BYTES_MAX {
                break;
            }
        }
        // The last line needs no newline.
        if !partial.is_empty() {
            self.add(&partial).await?;
        }
        self.write_group().await
    }

    /// Adds one line to the group, and writes the group if it is full.
    async fn add(&mut self, line: &[u8]) -> Result<(), LinesError> {
        if self.group_bytes + line.len() > GROUP_BYTES_MAX {
            self.write_group().await?;
        }
        self.parsed += 1;
        if line.len() > LINE_BYTES_MAX {
            let what = format!("it has more than {LINE_BYTES_MAX} bytes");
            return Err(LinesError::InvalidLine(what));
        }
        // The whitespace of JSON, so that lines may end in \r\n.
        if line.iter().all(|byte| matches!(byte, b' ' | b'\t' | b'\r')) {
            return Ok(());
        }
        let patch =
            parse_patch(line).map_err(|error| LinesError::InvalidLine(error.line_text()))?;
        self.state.admit(&patch).map_err(LinesError::StoreFull)?;
        self.group.push(patch.into());
        self.group_bytes += line.len();
        if self.group.len() == self.group_max {
            self.write_group().await?;
        }
        Ok(())
    }

    async fn write_group(&mut self) -> Result<(), LinesError> {
        if !self.group.is_empty() {
            self.state.readiness.check()?;
            let group = std::mem::take(&mut self.group);
            self.position = self.bulk.write(group).await?;
            self.group_bytes = 0;
        }
        self.accepted = self.parsed;
        Ok(())
    }
}
