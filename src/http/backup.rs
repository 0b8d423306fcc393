//! The write port's other route: `GET /backup`, the whole store as it is read.
//!
//! Nothing is made ahead of the client: as many chunks are in work as the machine has cores, and
//! the next begins when one has been taken. A client that stops reading therefore costs those
//! chunks and no lock, until the port cuts its connection for doing nothing.

use std::io;
use std::sync::Arc;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use futures_util::stream::{FuturesUnordered, Stream, StreamExt, unfold};
use http::header::{CONTENT_DISPOSITION, CONTENT_TYPE};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinHandle;

use super::error::ApiError;
use super::listener::Connection;
use super::{Credentials, GRADE_POSITION};
use crate::backup::{BackupWriter, Chunk, ChunkSource, FORMAT, Head, file_name};
use crate::log::Log;
use crate::readiness::Readiness;
use crate::replication::Applied;
use crate::store::Store;

/// What a backup is made from.
#[derive(Clone)]
pub struct BackupState {
    /// The records.
    pub store: Store,
    /// How far they have come.
    pub applied: Applied,
    /// Which log that is a place in.
    pub log: Arc<dyn Log>,
    /// Whether they may be shown.
    pub readiness: Readiness,
    /// What a request must bring.
    pub credentials: Credentials,
    /// A permit a backup that may run at once.
    pub slots: Arc<Semaphore>,
}

/// The route.
pub fn routes(state: BackupState) -> Router {
    Router::new()
        .route(
            "/backup",
            get(get_backup).fallback(|| async { ApiError::MethodNotAllowed("GET, HEAD") }),
        )
        .with_state(state)
}

async fn get_backup(
    State(state): State<BackupState>,
    request: Request,
) -> Result<Response, ApiError> {
    state.credentials.check(request.headers())?;
    state.readiness.reads()?;
    let slot = Arc::clone(&state.slots).try_acquire_owned();
    let slot = slot.map_err(|_none_left| ApiError::BackupsRunning)?;
    let position = state.applied.position();
    let head = Head {
        format: FORMAT,
        log_id: state.log.id().0,
        position: position.seq,
        time_ns: position.time_ns,
        rows_expected: state.store.len() as u64,
    };
    let name = format!("attachment; filename=\"{}\"", file_name(head.time_ns));
    let headers = [
        (CONTENT_TYPE, "application/gzip".to_owned()),
        (CONTENT_DISPOSITION, name),
        (GRADE_POSITION, position.seq.to_string()),
    ];
    let connection = request.extensions().get::<Arc<Connection>>().cloned();
    let body = Body::from_stream(members(state, &head, slot, connection));
    Ok((headers, body).into_response())
}

/// A backup under way. What it holds is given back when the client has it all or is gone.
struct Running {
    source: Arc<ChunkSource>,
    chunks: FuturesUnordered<JoinHandle<Option<Chunk>>>,
    exhausted: bool,
    writer: Option<BackupWriter>,
    applied: Applied,
    connection: Option<Arc<Connection>>,
    _slot: OwnedSemaphorePermit,
}

fn members(
    state: BackupState,
    head: &Head,
    slot: OwnedSemaphorePermit,
    connection: Option<Arc<Connection>>,
) -> impl Stream<Item = io::Result<Bytes>> + use<> {
    let (writer, first) = BackupWriter::begin(head);
    let running = Running {
        source: Arc::new(ChunkSource::new(&state.store)),
        chunks: FuturesUnordered::new(),
        exhausted: false,
        writer: Some(writer),
        applied: state.applied,
        connection,
        _slot: slot,
    };
    let first = futures_util::stream::iter([Ok(Bytes::from(first))]);
    first.chain(unfold(running, |mut running| async {
        let next = running.next().await?;
        Some((next, running))
    }))
}

impl Running {
    /// The next member's bytes; an error breaks the answer off, so that it can't look whole.
    async fn next(&mut self) -> Option<io::Result<Bytes>> {
        if let Some(connection) = &self.connection {
            connection.end();
        }
        let at_once = std::thread::available_parallelism().map_or(2, usize::from);
        while !self.exhausted && self.chunks.len() < at_once {
            let source = Arc::clone(&self.source);
            let chunk = tokio::task::spawn_blocking(move || source.next());
            self.chunks.push(chunk);
        }
        while let Some(made) = self.chunks.next().await {
            match made {
                Ok(Some(chunk)) => {
                    if let Some(writer) = &mut self.writer {
                        writer.add(&chunk);
                    }
                    return Some(Ok(chunk.bytes.into()));
                }
                // The others may still be at the last ones.
                Ok(None) => self.exhausted = true,
                Err(error) => {
                    tracing::error!(%error, "backup broken off");
                    self.writer = None;
                    self.exhausted = true;
                    return Some(Err(io::Error::other(error)));
                }
            }
        }
        let writer = self.writer.take()?;
        let rows = writer.rows();
        let last = writer.end(self.applied.seq());
        tracing::info!(rows, "backup sent");
        Some(Ok(last.into()))
    }
}
