//! The write port's other route: `GET /backup`, the whole store as it is read.
//!
//! Nothing is made ahead of the client: as many chunks are in work as the machine has cores, or, while
//! requests are answered, one with a pause before the next; and the next begins when one has been
//! taken. A client that stops reading therefore costs those chunks and no lock, until the port cuts
//! its connection for doing nothing.
//!
//! Few are sent at once, so that reads stay quick while many replicas start from this one; some more
//! wait for their turn, in the order in which they came.

use std::io;
use std::mem;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use futures_util::stream::{FuturesUnordered, Stream, StreamExt, unfold};
use http::Method;
use http::header::{CONTENT_DISPOSITION, CONTENT_TYPE};
use metrics::{
    Counter, Gauge, Histogram, counter, describe_counter, describe_gauge, describe_histogram,
    gauge, histogram,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use super::connection::Connection;
use super::error::ApiError;
use super::instrument::Answered;
use super::ops::OpeningProgress;
use super::{Credentials, GRADE_NODE, GRADE_POSITION};
use crate::backup::{BackupWriter, Chunk, ChunkSource, Head, file_name};
use crate::log::{Log, RandomId};
use crate::replication::peer_client::{GRADE_COMPRESSION, IF_SLOW};
use crate::replication::state::{NodeState, Readiness};
use crate::replication::{AppliedIndex, CompleteState, backup_head};
use crate::store::Store;
use crate::sys::exec::Blocking;

/// A client that takes more bytes a second than this is limited by its own work or by the making of
/// chunks, not by the way to it.
const QUICK_BYTES_PER_S: f64 = 16e6;
/// How long the first chunks, which go into the system's buffers, say nothing of the pace.
const PACE_KNOWN_AFTER: Duration = Duration::from_millis(500);

/// So many bytes are sent in one turn: requests on the same thread wait for them. A replica that
/// starts has whole members: in pieces of 64 KiB it was ready after 1.7 s in place of 1.4.
const PIECE_BYTES_MAX: usize = 32 * 1024;
/// While requests are answered, one chunk is made at a time, and the next one begun so long after
/// it. A core that is never idle is had back later, however low the priority of what it does.
const PAUSE: Duration = Duration::from_millis(1);

/// The port's routes while the log is being opened: there is nothing to give yet, but the answer
/// says which node this is.
pub fn routes_while_opening(progress: OpeningProgress, node: RandomId) -> Router {
    Router::new().fallback(move || async move {
        let node = [(GRADE_NODE, node.to_string())];
        (node, ApiError::NotReady(progress.unready()))
    })
}

/// What a backup is made from.
#[derive(Clone)]
pub struct BackupState {
    /// The records.
    pub store: Store,
    /// How far they have come.
    pub applied: AppliedIndex,
    /// Which log that is a place in.
    pub log: Arc<dyn Log>,
    /// Whether they may be shown.
    pub readiness: Readiness,
    /// What a request must bring.
    pub credentials: Credentials,
    /// A permit a backup that may run at once.
    pub slots: Arc<Semaphore>,
    /// A permit a request that may wait for its turn.
    pub queue: Arc<Semaphore>,
    /// How long one may wait.
    pub queue_wait_max: Duration,
    /// Rows go in chunks of about so many bytes, before compression.
    pub chunk_text_bytes: usize,
    /// Where chunks are made.
    pub blocking: Blocking,
    /// Where they are made for a replica that starts, which somebody waits for.
    pub urgent: Blocking,
    /// Tells whether requests come meanwhile.
    pub answered: Answered,
    /// This process start's name.
    pub node: Arc<str>,
    /// What is measured about backups.
    pub metrics: BackupMetrics,
}

/// Handles of what is measured about backups, made once.
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
/// Its upper bounds in seconds: from a small store to a slow client's hour.
pub(crate) const DURATION_BUCKETS_S: &[f64] =
    &[0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3600.0];

impl BackupMetrics {
    /// Registers the handles with the current recorder.
    #[must_use]
    pub fn new() -> Self {
        describe_gauge!("gradestore_backups_running", "Backups that are being sent.");
        describe_counter!(
            "gradestore_backups_total",
            "Backups sent, whole or broken off."
        );
        describe_counter!("gradestore_backup_rows_total", "Rows sent in backups.");
        describe_counter!("gradestore_backup_bytes_total", "Bytes sent in backups.");
        describe_histogram!(DURATION_METRIC, "Time that a whole backup took to be sent.");
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
    let asked_only = request.method() == Method::HEAD;
    let slot = match asked_only {
        true => None,
        false => Some(turn(&state).await?),
    };
    let complete = CompleteState::of(&state.store, &state.readiness)?;
    let head = backup_head(&complete, &state.applied, &*state.log);
    let name = format!("attachment; filename=\"{}\"", file_name(head.time_ns));
    let headers = [
        (CONTENT_TYPE, "application/gzip".to_owned()),
        (CONTENT_DISPOSITION, name),
        (GRADE_POSITION, head.position.to_string()),
        (GRADE_NODE, state.node.to_string()),
    ];
    let Some(slot) = slot else {
        // As GET's, of a length that is not known.
        let nothing = futures_util::stream::empty::<io::Result<Bytes>>();
        return Ok((headers, Body::from_stream(nothing)).into_response());
    };
    let connection = request.extensions().get::<Arc<Connection>>().cloned();
    let wanted = request.headers().get(GRADE_COMPRESSION);
    let urgent = wanted.is_some_and(|wanted| wanted == IF_SLOW);
    let body = Body::from_stream(members(state, complete, &head, urgent, slot, connection));
    Ok((headers, body).into_response())
}

/// Waits until a backup may begin.
async fn turn(state: &BackupState) -> Result<OwnedSemaphorePermit, ApiError> {
    if let Ok(slot) = Arc::clone(&state.slots).try_acquire_owned() {
        return Ok(slot);
    }
    let _place = state
        .queue
        .try_acquire()
        .map_err(|_full| ApiError::BackupsRunning)?;
    let slot = Arc::clone(&state.slots).acquire_owned();
    match tokio::time::timeout(state.queue_wait_max, slot).await {
        Ok(Ok(slot)) => Ok(slot),
        _ => Err(ApiError::BackupsRunning),
    }
}

/// A backup under way. What it holds is given back when the client has it all or is gone.
struct Running {
    source: Arc<ChunkSource>,
    chunks: FuturesUnordered<BoxFuture<'static, io::Result<Option<Chunk>>>>,
    blocking: Blocking,
    exhausted: bool,
    /// What is left of the member that is being sent.
    rest: Bytes,
    /// Whether it is for a replica that starts: its clients wait as well. Chunks are compressed only
    /// while it is slow.
    urgent: bool,
    answered: Answered,
    /// As many as there were when that was last looked at.
    answered_before: u64,
    bytes: u64,
    /// Taken when the end is sent, or when it never will be.
    writer: Option<BackupWriter>,
    whole: bool,
    begun: Instant,
    metrics: BackupMetrics,
    /// The state that is sent.
    complete: CompleteState,
    readiness: Readiness,
    applied: AppliedIndex,
    connection: Option<Arc<Connection>>,
    _slot: OwnedSemaphorePermit,
}

fn members(
    state: BackupState,
    complete: CompleteState,
    head: &Head,
    urgent: bool,
    slot: OwnedSemaphorePermit,
    connection: Option<Arc<Connection>>,
) -> impl Stream<Item = io::Result<Bytes>> + use<> {
    let (writer, first) = BackupWriter::begin(head);
    let running = Running {
        source: Arc::new(ChunkSource::with_chunk_text(
            complete.store(),
            state.chunk_text_bytes,
        )),
        chunks: FuturesUnordered::new(),
        blocking: match urgent {
            true => state.urgent,
            false => state.blocking,
        },
        exhausted: false,
        rest: Bytes::new(),
        urgent,
        answered_before: state.answered.count(),
        answered: state.answered,
        bytes: 0,
        writer: Some(writer),
        whole: false,
        begun: Instant::now(),
        metrics: state.metrics,
        complete,
        readiness: state.readiness,
        applied: state.applied,
        connection,
        _slot: slot,
    };
    running.metrics.running.increment(1.0);
    if let Some(connection) = &running.connection {
        connection.stream(true);
    }
    let first = futures_util::stream::iter([Ok(Bytes::from(first))]);
    first.chain(unfold(running, |mut running| async {
        let next = running.next_piece().await?;
        Some((next, running))
    }))
}

impl Running {
    /// Whether the client takes more than compressing would bring it; at first nobody knows.
    fn quick(&self) -> bool {
        let elapsed = self.begun.elapsed();
        elapsed < PACE_KNOWN_AFTER || self.bytes as f64 / elapsed.as_secs_f64() > QUICK_BYTES_PER_S
    }

    /// Whether requests were answered since this was last asked, and come first.
    fn gives_way(&mut self) -> bool {
        let answered = self.answered.count();
        mem::replace(&mut self.answered_before, answered) != answered && !self.urgent
    }

    /// Whether what was read so far is one state, and not one that is in doubt.
    fn sound(&self) -> io::Result<()> {
        self.complete.check().map_err(io::Error::other)?;
        match self.readiness.check() {
            Err(unready) if unready.state == NodeState::Diverged => {
                Err(io::Error::other("the state is in doubt"))
            }
            _ => Ok(()),
        }
    }

    /// The next bytes to send, not so many that requests on the same thread wait for them long.
    async fn next_piece(&mut self) -> Option<io::Result<Bytes>> {
        if let Some(connection) = &self.connection {
            connection.end();
        }
        match self.rest.is_empty() {
            true => match self.next().await? {
                Ok(member) => self.rest = member,
                error => return Some(error),
            },
            false => tokio::task::yield_now().await,
        }
        let piece_bytes = match self.urgent {
            true => self.rest.len(),
            false => PIECE_BYTES_MAX.min(self.rest.len()),
        };
        Some(Ok(self.rest.split_to(piece_bytes)))
    }

    /// The next member's bytes; an error breaks the answer off, so that it can't look whole.
    async fn next(&mut self) -> Option<io::Result<Bytes>> {
        self.source.store_only(self.urgent && self.quick());
        let at_once = match self.gives_way() {
            true => {
                tokio::time::sleep(PAUSE).await;
                1
            }
            false => std::thread::available_parallelism().map_or(2, usize::from),
        };
        while !self.exhausted && self.chunks.len() < at_once {
            let source = Arc::clone(&self.source);
            let chunk = self.blocking.run(move || source.next());
            self.chunks.push(chunk.boxed());
        }
        while let Some(made) = self.chunks.next().await {
            if let Err(error) = self.sound() {
                tracing::error!(%error, "backup broken off");
                self.writer = None;
                return Some(Err(error));
            }
            match made {
                Ok(Some(chunk)) => {
                    if let Some(writer) = &mut self.writer {
                        writer.add(&chunk);
                    }
                    self.metrics.rows.increment(chunk.rows().into());
                    self.metrics.bytes.increment(chunk.bytes.len() as u64);
                    self.bytes += chunk.bytes.len() as u64;
                    return Some(Ok(chunk.bytes.into()));
                }
                // The others may still be at the last ones.
                Ok(None) => self.exhausted = true,
                Err(error) => {
                    tracing::error!(%error, "backup broken off");
                    self.writer = None;
                    self.exhausted = true;
                    return Some(Err(error));
                }
            }
        }
        let writer = self.writer.take()?;
        let rows = writer.rows();
        let last = writer.end(&self.applied.position());
        let took = self.begun.elapsed();
        self.whole = true;
        self.metrics.duration_s.record(took.as_secs_f64());
        tracing::info!(rows, took_ms = took.as_millis() as u64, "backup sent");
        Some(Ok(last.into()))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.metrics.running.decrement(1.0);
        if let Some(connection) = &self.connection {
            connection.stream(false);
        }
        match self.whole {
            true => self.metrics.whole.increment(1),
            false => {
                self.metrics.broken.increment(1);
                let rows = self.writer.as_ref().map(BackupWriter::rows);
                tracing::warn!(rows, "backup not taken to its end");
            }
        }
    }
}
