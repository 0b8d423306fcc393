//! `GET /backup` on the write port: the whole store, read while it is sent.
//!
//! The server makes no chunks ahead of the client: at most as many are in flight as the machine has
//! cores, and a new one starts when the client has taken one. While other requests are answered,
//! only one is in flight, with a pause between two. So a client that stops reading occupies these
//! chunks and no lock, until the port closes its connection because it is idle.
//!
//! Few backups run at once, so that reads stay fast while many replicas start from this one. A few
//! more requests wait for their turn, first come, first served.

use std::io;
use std::mem;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use futures_util::stream::{Stream, StreamExt, unfold};
use http::Method;
use http::header::{CONTENT_DISPOSITION, CONTENT_TYPE};
use metrics::{
    Counter, Gauge, Histogram, counter, describe_counter, describe_gauge, describe_histogram,
    gauge, histogram,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use super::connection::ConnectionState;
use super::error::ApiError;
use super::instrument::RequestCount;
use super::ops::StartupProgress;
use super::{Credentials, GRADE_NODE, GRADE_POSITION};
use crate::backup::{BackupWriter, Chunk, ChunkPipeline, ChunkSource, HeadRecord, file_name};
use crate::log::{Log, RandomId};
use crate::replication::peer_client::{GRADE_COMPRESSION, IF_SLOW};
use crate::replication::state::{NodeState, Readiness};
use crate::replication::{AppliedIndex, CompleteState, backup_head};
use crate::store::Store;
use crate::sys::exec::Blocking;

/// Above this rate, compression would not speed up the transfer: the client or the making of chunks
/// is the bottleneck, not the network.
const FAST_CLIENT_BYTES_PER_S: f64 = 16e6;
/// Before this, the rate is unknown: the first chunks only fill the system's buffers.
const RATE_KNOWN_AFTER: Duration = Duration::from_millis(500);

/// The most bytes sent in one turn, because requests on the same thread wait for them. A replica
/// that starts gets whole members: with pieces of 64 KiB it was ready after 1.7 s instead of 1.4 s
/// (ADR 0006).
const PIECE_BYTES_MAX: usize = 32 * 1024;
/// The pause between two chunks while requests are answered. The scheduler takes long to preempt a
/// core that is never idle, whatever the priority of its thread (ADR 0007).
const PAUSE: Duration = Duration::from_millis(1);

/// The routes of the port while the log is being opened. They only report that the node is not
/// ready, and its id.
pub fn routes_while_opening(progress: StartupProgress, node: RandomId) -> Router {
    Router::new().fallback(move || async move {
        let node = [(GRADE_NODE, node.to_string())];
        (node, ApiError::NotReady(progress.unready()))
    })
}

/// The state of the route.
#[derive(Clone)]
pub struct BackupState {
    /// The records.
    pub store: Store,
    /// The position of the records.
    pub applied: AppliedIndex,
    /// The log they come from.
    pub log: Arc<dyn Log>,
    /// Whether the node serves them.
    pub readiness: Readiness,
    /// The required user name and password.
    pub credentials: Credentials,
    /// One permit per running backup.
    pub slots: Arc<Semaphore>,
    /// One permit per waiting request.
    pub queue: Arc<Semaphore>,
    /// How long a request may wait.
    pub queue_wait_max: Duration,
    /// The size of a chunk before compression.
    pub chunk_text_bytes: usize,
    /// Threads that make chunks for most clients.
    pub pool: Blocking,
    /// Threads that make chunks for replicas that start, whose clients wait for them.
    pub replica_pool: Blocking,
    /// Counts the answered requests.
    pub answered: RequestCount,
    /// The id of this process.
    pub node: Arc<str>,
    /// The metrics of backups.
    pub metrics: BackupMetrics,
}

/// The metrics of backups.
#[derive(Clone)]
pub struct BackupMetrics {
    running: Gauge,
    whole: Counter,
    broken: Counter,
    rows: Counter,
    bytes: Counter,
    duration_s: Histogram,
}

/// The name of the duration histogram.
pub(crate) const DURATION_METRIC: &str = "gradestore_backup_duration_seconds";
/// Its upper bounds: from a small store to an hour with a slow client.
pub(crate) const DURATION_BUCKETS_S: &[f64] =
    &[0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3600.0];

impl BackupMetrics {
    /// Registers the metrics with the current recorder.
    #[must_use]
    pub fn new() -> Self {
        describe_gauge!("gradestore_backups_running", "Backups that are being sent.");
        describe_counter!(
            "gradestore_backups_total",
            "Backups, by result: whole or broken."
        );
        describe_counter!("gradestore_backup_rows_total", "Rows sent in backups.");
        describe_counter!("gradestore_backup_bytes_total", "Bytes sent in backups.");
        describe_histogram!(DURATION_METRIC, "Duration of a complete backup.");
        Self {
            running: gauge!("gradestore_backups_running"),
            whole: counter!("gradestore_backups_total", "result" => "whole"),
            broken: counter!("gradestore_backups_total", "result" => "broken"),
            rows: counter!("gradestore_backup_rows_total"),
            bytes: counter!("gradestore_backup_bytes_total"),
            duration_s: histogram!(DURATION_METRIC),
        }
    }
}

impl Default for BackupMetrics {
    fn default() -> Self {
        Self::new()
    }
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
    state.readiness.check()?;
    let is_head = request.method() == Method::HEAD;
    let slot = match is_head {
        true => None,
        false => Some(acquire_slot(&state).await?),
    };
    let complete = CompleteState::of(&state.store, &state.readiness)?;
    let head = backup_head(&complete, &state.applied, &*state.log);
    let name = format!("attachment; filename=\"{}\"", file_name(head.created_ns));
    let headers = [
        (CONTENT_TYPE, "application/gzip".to_owned()),
        (CONTENT_DISPOSITION, name),
        (GRADE_POSITION, head.position.to_string()),
        (GRADE_NODE, state.node.to_string()),
    ];
    let Some(slot) = slot else {
        // A body of unknown length, so that the headers equal those of GET.
        let empty = futures_util::stream::empty::<io::Result<Bytes>>();
        return Ok((headers, Body::from_stream(empty)).into_response());
    };
    let connection = request.extensions().get::<Arc<ConnectionState>>().cloned();
    let compression = request.headers().get(GRADE_COMPRESSION);
    let for_replica = compression.is_some_and(|compression| compression == IF_SLOW);
    let body = RunningBackup::start(state, complete, &head, for_replica, slot, connection);
    Ok((headers, Body::from_stream(body)).into_response())
}

/// Waits until the backup may start.
async fn acquire_slot(state: &BackupState) -> Result<OwnedSemaphorePermit, ApiError> {
    if let Ok(slot) = Arc::clone(&state.slots).try_acquire_owned() {
        return Ok(slot);
    }
    let _waiting = state
        .queue
        .try_acquire()
        .map_err(|_full| ApiError::BackupsRunning)?;
    let slot = Arc::clone(&state.slots).acquire_owned();
    match tokio::time::timeout(state.queue_wait_max, slot).await {
        Ok(Ok(slot)) => Ok(slot),
        _ => Err(ApiError::BackupsRunning),
    }
}

/// A running backup. Dropped when the client has received it or has disconnected.
struct RunningBackup {
    chunks: ChunkPipeline,
    /// The rest of the member that is being sent.
    rest: Bytes,
    /// Whether the client is a replica that starts. Then requests do not take precedence, and
    /// chunks are compressed only for a slow client.
    for_replica: bool,
    answered: RequestCount,
    /// The count of `answered` at the last look.
    answered_before: u64,
    /// Bytes of chunks so far.
    bytes: u64,
    /// `None` after the end or an error.
    writer: Option<BackupWriter>,
    is_complete: bool,
    started: Instant,
    metrics: BackupMetrics,
    complete: CompleteState,
    readiness: Readiness,
    applied: AppliedIndex,
    connection: Option<Arc<ConnectionState>>,
    _slot: OwnedSemaphorePermit,
}

impl RunningBackup {
    fn start(
        state: BackupState,
        complete: CompleteState,
        head: &HeadRecord,
        for_replica: bool,
        slot: OwnedSemaphorePermit,
        connection: Option<Arc<ConnectionState>>,
    ) -> impl Stream<Item = io::Result<Bytes>> + use<> {
        let (writer, first) = BackupWriter::start(head);
        let source = ChunkSource::with_chunk_text(complete.store(), state.chunk_text_bytes);
        let pool = match for_replica {
            true => state.replica_pool,
            false => state.pool,
        };
        let stream = Self {
            chunks: ChunkPipeline::new(source, pool),
            rest: Bytes::new(),
            for_replica,
            answered_before: state.answered.count(),
            answered: state.answered,
            bytes: 0,
            writer: Some(writer),
            is_complete: false,
            started: Instant::now(),
            metrics: state.metrics,
            complete,
            readiness: state.readiness,
            applied: state.applied,
            connection,
            _slot: slot,
        };
        stream.metrics.running.increment(1.0);
        if let Some(connection) = &stream.connection {
            connection.stream(true);
        }
        let first = futures_util::stream::iter([Ok(Bytes::from(first))]);
        first.chain(unfold(stream, |mut stream| async {
            let next = stream.next_piece().await?;
            Some((next, stream))
        }))
    }

    /// Whether the client reads faster than compression would help; true while unknown.
    fn client_is_fast(&self) -> bool {
        let elapsed = self.started.elapsed();
        elapsed < RATE_KNOWN_AFTER
            || self.bytes as f64 / elapsed.as_secs_f64() > FAST_CLIENT_BYTES_PER_S
    }

    /// Whether requests were answered since the last call, and take precedence.
    fn must_yield(&mut self) -> bool {
        let answered = self.answered.count();
        mem::replace(&mut self.answered_before, answered) != answered && !self.for_replica
    }

    /// Fails if the scanned state was replaced, or may be wrong.
    fn check_state(&self) -> io::Result<()> {
        self.complete.check().map_err(io::Error::other)?;
        match self.readiness.check() {
            Err(unready) if unready.state == NodeState::Diverged => {
                Err(io::Error::other("this replica has diverged"))
            }
            _ => Ok(()),
        }
    }

    /// The next bytes to send: a part of a member, so that requests on the same thread do not wait
    /// long.
    async fn next_piece(&mut self) -> Option<io::Result<Bytes>> {
        if let Some(connection) = &self.connection {
            connection.end();
        }
        match self.rest.is_empty() {
            true => match self.next_member().await? {
                Ok(member) => self.rest = member,
                error => return Some(error),
            },
            false => tokio::task::yield_now().await,
        }
        let piece_bytes = match self.for_replica {
            true => self.rest.len(),
            false => PIECE_BYTES_MAX.min(self.rest.len()),
        };
        Some(Ok(self.rest.split_to(piece_bytes)))
    }

    /// The next member. An error aborts the response, so that it cannot look complete.
    async fn next_member(&mut self) -> Option<io::Result<Bytes>> {
        self.writer.as_ref()?;
        let chunk = self.next_chunk().await;
        let chunk = chunk.and_then(|chunk| self.check_state().map(|()| chunk));
        let mut writer = self.writer.take()?;
        match chunk {
            Ok(Some(chunk)) => {
                writer.add(&chunk);
                self.writer = Some(writer);
                self.metrics.rows.increment(chunk.rows().into());
                self.metrics.bytes.increment(chunk.bytes.len() as u64);
                self.bytes += chunk.bytes.len() as u64;
                Some(Ok(chunk.bytes.into()))
            }
            Ok(None) => Some(Ok(self.finish(writer))),
            Err(error) => {
                let rows = writer.rows();
                tracing::error!(rows, %error, "backup aborted");
                Some(Err(error))
            }
        }
    }

    async fn next_chunk(&mut self) -> io::Result<Option<Chunk>> {
        self.chunks
            .store_only(self.for_replica && self.client_is_fast());
        let in_flight_max = match self.must_yield() {
            true => {
                tokio::time::sleep(PAUSE).await;
                1
            }
            false => std::thread::available_parallelism().map_or(2, usize::from),
        };
        self.chunks.next(in_flight_max).await
    }

    /// The last member.
    fn finish(&mut self, writer: BackupWriter) -> Bytes {
        let rows = writer.rows();
        let last = writer.end(&self.applied.position());
        let took = self.started.elapsed();
        self.is_complete = true;
        self.metrics.duration_s.record(took.as_secs_f64());
        tracing::info!(rows, took_ms = took.as_millis() as u64, "backup sent");
        last.into()
    }
}

impl Drop for RunningBackup {
    fn drop(&mut self) {
        self.metrics.running.decrement(1.0);
        if let Some(connection) = &self.connection {
            connection.stream(false);
        }
        match self.is_complete {
            true => self.metrics.whole.increment(1),
            false => {
                self.metrics.broken.increment(1);
                // Without a writer, an error was logged.
                if let Some(writer) = &self.writer {
                    let rows = writer.rows();
                    tracing::warn!(rows, "backup aborted: the connection closed");
                }
            }
        }
    }
}
