//! `gradestore import`: imports a backup, or another gzip CSV, into a running node.
//!
//! One thread reads the file and converts rows to lines of patches. The lines are sent in chunks, one
//! request after the other. If the node accepts a chunk in part only, because its queue is full or its
//! log is unavailable, the import resumes after the last accepted line. Accepted rows are not rolled
//! back after an error.

use std::io::{self, IsTerminal, Read, Write};
use std::panic::resume_unwind;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::backup::{BackupError, ReadProgress, Summary, read_in_order};
use crate::cli::ImportArgs;
use crate::cli::backup::open;
use crate::grade::{Changes, Patch};
use crate::log::Seq;
use crate::replication::peer_client::{
    Client, ClientCredentials, Compression, ErrorResponse, RemoteError,
};
use crate::store::RecordBatch;
use crate::sys::cancellable_reader::CancellableReader;
use crate::sys::progress::Bar;

/// The rows or bytes of a chunk: several groups of the node, so that neither side waits long for the
/// other.
const CHUNK_ROWS: usize = 4000;
const CHUNK_BYTES: usize = 1 << 20;
/// Chunks that are read ahead.
const CHUNKS_WAITING_MAX: usize = 2;
/// How long the node may take to respond, which it does after the last group of a chunk.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// The pause before a retry if the response has no `Retry-After`.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// How often a line with the progress is printed if there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Why a file was not imported completely.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The file can't be read, or is damaged.
    #[error("{}; {}", error.in_file(file), imported_rows(*.accepted))]
    File {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        error: BackupError,
        /// Rows that the node has accepted.
        accepted: u64,
    },
    /// The node rejected a row.
    #[error("{file}: row {row}, line {line}, was rejected: {what}; {}", imported_rows(*.accepted))]
    Row {
        /// The file.
        file: PathBuf,
        /// The number of the row, from 1, without the header row.
        row: u64,
        /// The number of its line in the text.
        line: u64,
        /// The error of the node.
        what: String,
        /// Rows that the node has accepted.
        accepted: u64,
    },
    /// The node rejected a request.
    #[error("{to} answered {}: {}; {}", .refusal.status, .refusal.detail, imported_rows(*.accepted))]
    Refused {
        /// The node.
        to: String,
        /// The response.
        refusal: ErrorResponse,
        /// Rows that the node has accepted.
        accepted: u64,
    },
    /// The node may or may not have accepted some rows.
    #[error(
        "{error}; {}; rows {} to {until} may or may not have been imported",
        imported_rows(*.accepted), .accepted + 1
    )]
    Unknown {
        /// The error.
        error: Box<str>,
        /// Rows that the node has accepted.
        accepted: u64,
        /// The last row that was sent.
        until: u64,
    },
    /// The node can't be reached.
    #[error("{error}; {}", imported_rows(*.accepted))]
    Remote {
        /// The error.
        error: RemoteError,
        /// Rows that the node has accepted.
        accepted: u64,
    },
}

/// How many rows were imported before an error.
fn imported_rows(accepted: u64) -> String {
    match accepted {
        0 => "no row was imported".to_owned(),
        _ => {
            format!("the first {accepted} rows were imported; it is safe to import the file again")
        }
    }
}

/// The result of an import.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Imported {
    /// Imported rows.
    pub rows: u64,
    /// The position of the last row; `None` if the file has no rows.
    pub position: Option<Seq>,
}

/// Sends the rows of a file to a node. `accepted` counts the rows that the node has accepted.
///
/// # Errors
/// See [`ImportError`].
pub async fn import(
    args: &ImportArgs,
    password: &str,
    accepted: Arc<AtomicU64>,
) -> Result<Imported, ImportError> {
    let remote = |error| ImportError::Remote { error, accepted: 0 };
    let account = ClientCredentials::new(&args.credentials.username, password);
    let client = Client::new(account, SILENCE_MAX, Compression::Always);
    let client = client.map_err(|error| {
        remote(RemoteError::Http {
            url: args.to.clone(),
            error: error.to_string(),
        })
    })?;
    let file = |error| ImportError::File {
        file: args.file.clone(),
        error,
        accepted: accepted.load(Ordering::Relaxed),
    };
    let (source, bytes_total) = open(&args.file).map_err(file)?;
    let mut reader = ReaderThread::start(source);
    let sender = ChunkSender {
        client,
        args,
        accepted: &accepted,
        display: ProgressDisplay::new(bytes_total),
        progress: Arc::clone(&reader.progress),
    };
    let mut position = None;
    while let Some(chunk) = reader.chunks.recv().await {
        position = Some(sender.send(&chunk).await?);
    }
    let summary = reader.join().map_err(file)?;
    Ok(Imported {
        rows: summary.rows,
        position,
    })
}

/// The text that the command prints at the end.
#[must_use]
pub fn describe(imported: &Imported) -> String {
    let Imported { rows, position } = imported;
    let position = position.map_or("none (the file has no rows)".to_owned(), |seq| {
        seq.to_string()
    });
    format!("rows      {rows}\nposition  {position}\n")
}

/// Consecutive rows of the file, as lines of patches.
struct RowChunk {
    /// The number of the first row.
    first_row: u64,
    lines: Bytes,
    /// The end of each line in `lines`.
    ends: Vec<usize>,
    /// Rows and their line numbers in the file. Between two entries the line numbers are consecutive;
    /// an empty line in the file starts a new entry.
    row_lines: Vec<(u64, u64)>,
}

impl RowChunk {
    /// The lines after the first `lines`.
    fn after(&self, lines: u64) -> Bytes {
        let lines = usize::try_from(lines).unwrap_or(usize::MAX);
        let from = lines.checked_sub(1).and_then(|last| self.ends.get(last));
        self.lines.slice(from.copied().unwrap_or(0)..)
    }

    /// The number of lines after the first `lines`.
    fn lines_after(&self, lines: u64) -> u64 {
        (self.ends.len() as u64).saturating_sub(lines)
    }

    /// The row of line `line` of this chunk, counted from 1, and its line number in the file.
    fn locate(&self, line: u64) -> (u64, u64) {
        let row = self.first_row + line.saturating_sub(1);
        let mut row_lines = self.row_lines.iter().rev();
        let nearest = row_lines.find(|(from, _)| *from <= row);
        (row, nearest.map_or(0, |(from, line)| line + row - from))
    }

    fn last_row(&self) -> u64 {
        self.first_row + (self.ends.len() as u64).saturating_sub(1)
    }
}

/// A thread that reads the file and passes chunks on. Dropping this stops it.
struct ReaderThread {
    progress: Arc<ReadProgress>,
    chunks: mpsc::Receiver<RowChunk>,
    _stop: DropGuard,
    thread: JoinHandle<Result<Summary, BackupError>>,
}

impl ReaderThread {
    fn start(source: impl Read + Unpin + Send + 'static) -> Self {
        let progress = Arc::<ReadProgress>::default();
        let stop = CancellationToken::new();
        let (sender, chunks) = mpsc::channel(CHUNKS_WAITING_MAX);
        let source = CancellableReader {
            source,
            cancel: stop.clone(),
        };
        let (read, stopped) = (Arc::clone(&progress), stop.clone());
        let thread = thread::spawn(move || {
            let builder = Mutex::new(ChunkBuilder::default());
            let pass_on = |chunk| {
                // Without a receiver there is no reason to continue.
                if sender.blocking_send(chunk).is_err() {
                    stopped.cancel();
                }
            };
            let sink = |rows: &RecordBatch| {
                let mut builder = builder.lock();
                builder.add(rows, &read);
                if builder.is_full() {
                    pass_on(builder.take());
                }
                rows.digest()
            };
            let summary = read_in_order(source, &sink, &read)?;
            let mut rest = builder.lock();
            if !rest.ends.is_empty() {
                pass_on(rest.take());
            }
            Ok(summary)
        });
        Self {
            progress,
            chunks,
            _stop: stop.drop_guard(),
            thread,
        }
    }

    /// Waits for the thread, after the last chunk.
    fn join(self) -> Result<Summary, BackupError> {
        let joined = self.thread.join();
        joined.unwrap_or_else(|panic| resume_unwind(panic))
    }
}

/// Collects rows into a chunk.
#[derive(Default)]
struct ChunkBuilder {
    rows_before: u64,
    lines: Vec<u8>,
    ends: Vec<usize>,
    row_lines: Vec<(u64, u64)>,
}

impl ChunkBuilder {
    fn add(&mut self, rows: &RecordBatch, progress: &ReadProgress) {
        if rows.is_empty() {
            return;
        }
        let first_row = self.rows_before + self.ends.len() as u64 + 1;
        self.row_lines.push((first_row, progress.line()));
        for (user_id, values) in rows.iter() {
            let mut changes = Changes::default();
            // Fields without a column keep their values.
            for (index, value) in values.iter().enumerate() {
                if progress.has_field(index) {
                    changes.set(index, *value);
                }
            }
            Patch { user_id, changes }.write_json(&mut self.lines);
            self.lines.push(b'\n');
            self.ends.push(self.lines.len());
        }
    }

    fn is_full(&self) -> bool {
        self.ends.len() >= CHUNK_ROWS || self.lines.len() >= CHUNK_BYTES
    }

    fn take(&mut self) -> RowChunk {
        let first_row = self.rows_before + 1;
        self.rows_before += self.ends.len() as u64;
        RowChunk {
            first_row,
            lines: std::mem::take(&mut self.lines).into(),
            ends: std::mem::take(&mut self.ends),
            row_lines: std::mem::take(&mut self.row_lines),
        }
    }
}

/// Sends chunks to a node.
struct ChunkSender<'a> {
    client: Client,
    args: &'a ImportArgs,
    accepted: &'a AtomicU64,
    display: ProgressDisplay,
    progress: Arc<ReadProgress>,
}

impl ChunkSender<'_> {
    /// Sends `chunk` until the node has accepted all of it. Returns the position of its last row.
    async fn send(&self, chunk: &RowChunk) -> Result<Seq, ImportError> {
        let rows_before = chunk.first_row - 1;
        let to = &self.args.to;
        let mut last_progress = Instant::now();
        let mut sent = 0;
        loop {
            let accepted = rows_before + sent;
            let unknown = |error: String, accepted| ImportError::Unknown {
                error: error.into(),
                accepted,
                until: chunk.last_row(),
            };
            let response = self.client.set_lines(to, chunk.after(sent)).await;
            let response = response.map_err(|error| match error {
                RemoteError::Unreachable { .. } => ImportError::Remote { error, accepted },
                error => unknown(error.to_string(), accepted),
            })?;
            let refusal = match response {
                Ok(position) => {
                    self.report(chunk.last_row());
                    return Ok(position);
                }
                Err(refusal) => refusal,
            };
            // A node can't have accepted more lines than it was sent.
            let newly_accepted = refusal.accepted.min(chunk.lines_after(sent));
            let line = refusal.line.map(|line| line.min(chunk.lines_after(sent)));
            if newly_accepted > 0 {
                sent += newly_accepted;
                last_progress = Instant::now();
                self.report(rows_before + sent);
            }
            let accepted = rows_before + sent;
            let pause = refusal.retry_after.unwrap_or(RETRY_AFTER);
            match (refusal.status, line) {
                (503, _) if last_progress.elapsed().saturating_add(pause) <= self.args.wait => {
                    tokio::time::sleep(pause).await;
                }
                (504, _) => {
                    let error = format!("{to} answered 504: {}", refusal.detail);
                    return Err(unknown(error, accepted));
                }
                (_, Some(line)) => {
                    // The node counts from the first line of this request.
                    let (row, line) = chunk.locate(sent - newly_accepted + line);
                    return Err(ImportError::Row {
                        file: self.args.file.clone(),
                        row,
                        line,
                        what: refusal.detail,
                        accepted,
                    });
                }
                (_, None) => {
                    return Err(ImportError::Refused {
                        to: to.clone(),
                        refusal,
                        accepted,
                    });
                }
            }
        }
    }

    fn report(&self, accepted: u64) {
        self.accepted.store(accepted, Ordering::Relaxed);
        self.display.update(accepted, self.progress.bytes());
    }
}

/// Shows the progress of an import: a bar on a terminal, otherwise lines.
struct ProgressDisplay {
    bar: Option<Bar>,
    next_line: Mutex<Instant>,
}

impl ProgressDisplay {
    fn new(bytes_total: u64) -> Self {
        let now = Instant::now();
        let terminal = io::stderr().is_terminal();
        Self {
            bar: terminal.then(|| Bar::new(bytes_total, now)),
            next_line: Mutex::new(now + LINE_EVERY),
        }
    }

    fn update(&self, rows: u64, bytes: u64) {
        if let Some(bar) = &self.bar {
            return bar.set(rows, bytes);
        }
        let mut next_line = self.next_line.lock();
        if *next_line <= Instant::now() {
            *next_line = Instant::now() + LINE_EVERY;
            // stderr may be closed.
            let _ = writeln!(io::stderr(), "{rows} rows imported");
        }
    }
}
