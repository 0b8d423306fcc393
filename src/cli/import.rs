//! `gradestore import`: a backup, or another gzip CSV, into a node that runs.
//!
//! One thread reads the file and turns rows into lines; they go to the node in parts, one after the
//! other, each a request of its own. A part that the node takes in part only, because it is full or
//! its log is away, goes on where it ended. What has been sent stays sent, whatever comes after it.

use std::fs::File;
use std::io::{self, BufReader, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::backup::{BackupError, Progress, Summary, read_in_order};
use crate::cli::ImportArgs;
use crate::grade::{Changes, Patch};
use crate::log::Seq;
use crate::replication::peer_client::{
    Client, ClientCredentials, Compression, ErrorResponse, RemoteError,
};
use crate::store::Piece;
use crate::sys::cancellable_reader::CancellableReader;
use crate::sys::progress::Bar;

/// A part is sent when it has so many rows, or so many bytes: some groups of the node's, so that
/// neither waits long for the other.
const PART_ROWS: usize = 4000;
const PART_BYTES: usize = 1 << 20;
/// Parts that may wait to be sent.
const PARTS_WAITING_MAX: usize = 2;
/// How long the node may be silent: it answers a part when the last of its groups is written.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// How long a node that does not say is left alone before it is asked again.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// How often it is said how far it is, where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Why a file was not imported to its end. `accepted` are the rows that the node has.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The file can't be read on, or is no whole and unchanged backup.
    #[error("{file}: {error}; {}", stay(*.accepted))]
    File {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        error: BackupError,
        /// Rows that the node has.
        accepted: u64,
    },
    /// The node refused a row.
    #[error("{file}: row {row}, line {line}, was refused: {what}; {}", stay(*.accepted))]
    Row {
        /// The file.
        file: PathBuf,
        /// Which row, the header row not counted.
        row: u64,
        /// Its line in the text.
        line: u64,
        /// What the node said.
        what: String,
        /// Rows that the node has.
        accepted: u64,
    },
    /// The node refused what was sent.
    #[error("{to} answered {}: {}; {}", .refusal.status, .refusal.detail, stay(*.accepted))]
    Refused {
        /// The node.
        to: String,
        /// What it said.
        refusal: ErrorResponse,
        /// Rows that it has.
        accepted: u64,
    },
    /// Nobody knows what became of some rows.
    #[error(
        "{error}; {}; of rows {} to {until} some or all may be there as well",
        stay(*.accepted), .accepted + 1
    )]
    Unknown {
        /// What went wrong.
        error: Box<str>,
        /// Rows that the node has.
        accepted: u64,
        /// The last row that was sent.
        until: u64,
    },
    /// The node can't be asked.
    #[error("{error}; {}", stay(*.accepted))]
    Remote {
        /// What went wrong.
        error: RemoteError,
        /// Rows that the node has.
        accepted: u64,
    },
}

/// What has become of the rows that were accepted.
fn stay(accepted: u64) -> String {
    match accepted {
        0 => "no row was accepted before".to_owned(),
        _ => format!(
            "{accepted} rows before were accepted and stay; to import it again sets them once more, \
             to the same"
        ),
    }
}

/// A file that was imported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Imported {
    /// Rows.
    pub rows: u64,
    /// The position of the last of them; `None` if there was none.
    pub position: Option<Seq>,
}

/// Sends the rows of a file to a node. `accepted` counts those that it has.
///
/// # Errors
/// See [`ImportError`].
pub async fn import(
    args: &ImportArgs,
    password: &str,
    accepted: Arc<AtomicU64>,
) -> Result<Imported, ImportError> {
    let remote = |error| ImportError::Remote { error, accepted: 0 };
    let account = ClientCredentials {
        username: args.credentials.username.as_str().into(),
        password: password.into(),
    };
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
    let (source, bytes_total) = open(&args.file).map_err(|error| {
        let at = 0;
        file(BackupError::Io { at, error })
    })?;
    let mut reading = Reading::begin(source);
    let sender = Sender {
        client,
        args,
        accepted: &accepted,
        told: Told::new(bytes_total),
        progress: Arc::clone(&reading.progress),
    };
    let mut position = None;
    while let Some(part) = reading.parts.recv().await {
        position = Some(sender.send(&part).await?);
    }
    let summary = reading.ended().map_err(file)?;
    Ok(Imported {
        rows: summary.rows,
        position,
    })
}

/// What an import says when it is done, a line each, for people.
#[must_use]
pub fn describe(imported: &Imported) -> String {
    let Imported { rows, position } = imported;
    let position = position.map_or("none, there was no row".to_owned(), |seq| seq.to_string());
    format!("rows      {rows}\nposition  {position}\n")
}

/// The file, and its size if that is known.
fn open(path: &Path) -> io::Result<(Box<dyn Read + Unpin + Send>, u64)> {
    if path == Path::new("-") {
        return Ok((Box::new(io::stdin()), 0));
    }
    let file = File::open(path)?;
    let bytes_total = file.metadata().map_or(0, |metadata| metadata.len());
    Ok((Box::new(BufReader::new(file)), bytes_total))
}

/// Rows as lines.
struct Part {
    /// Which row of the file the first one is.
    first_row: u64,
    lines: Bytes,
    /// Where each line ends in `lines`.
    ends: Vec<usize>,
    /// From which of its rows on the file's lines are counted from which: rows follow each other but
    /// where a line of the file is empty.
    places: Vec<(u64, u64)>,
}

impl Part {
    /// The lines after the first `lines`.
    fn after(&self, lines: u64) -> Bytes {
        let lines = usize::try_from(lines).unwrap_or(usize::MAX);
        let from = lines.checked_sub(1).and_then(|last| self.ends.get(last));
        self.lines.slice(from.copied().unwrap_or(0)..)
    }

    /// The row of the file that line `line` of this part is, counted from 1, and its line there.
    fn place(&self, line: u64) -> (u64, u64) {
        let row = self.first_row + line.saturating_sub(1);
        let mut places = self.places.iter().rev();
        let place = places.find(|(from, _)| *from <= row);
        (row, place.map_or(0, |(from, line)| line + row - from))
    }

    fn last_row(&self) -> u64 {
        self.first_row + (self.ends.len() as u64).saturating_sub(1)
    }
}

/// A file that is being read, by a thread of its own.
struct Reading {
    progress: Arc<Progress>,
    parts: mpsc::Receiver<Part>,
    stop: CancellationToken,
    thread: Option<JoinHandle<Result<Summary, BackupError>>>,
}

impl Reading {
    fn begin(source: impl Read + Unpin + Send + 'static) -> Self {
        let progress = Arc::<Progress>::default();
        let stop = CancellationToken::new();
        let (sender, parts) = mpsc::channel(PARTS_WAITING_MAX);
        let source = CancellableReader {
            source,
            cancel: stop.clone(),
        };
        let (read, stopped) = (Arc::clone(&progress), stop.clone());
        let thread = thread::spawn(move || {
            let gathered = Mutex::new(Gathered::default());
            let pass_on = |part| {
                // Nobody sends any more: there is no use in reading on.
                if sender.blocking_send(part).is_err() {
                    stopped.cancel();
                }
            };
            let sink = |rows: &Piece| {
                let mut gathered = gathered.lock();
                gathered.add(rows, &read);
                if gathered.is_full() {
                    pass_on(gathered.take());
                }
                rows.digest()
            };
            let summary = read_in_order(source, &sink, &read)?;
            let mut rest = gathered.lock();
            if !rest.ends.is_empty() {
                pass_on(rest.take());
            }
            Ok(summary)
        });
        Self {
            progress,
            parts,
            stop,
            thread: Some(thread),
        }
    }

    /// How reading ended, once there are no more parts.
    fn ended(mut self) -> Result<Summary, BackupError> {
        let ended = self.thread.take().and_then(|thread| thread.join().ok());
        ended.unwrap_or(Err(BackupError::Damaged {
            at: 0,
            what: "the thread that reads it has ended",
        }))
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// Rows on their way into a part.
#[derive(Default)]
struct Gathered {
    rows_before: u64,
    lines: Vec<u8>,
    ends: Vec<usize>,
    places: Vec<(u64, u64)>,
}

impl Gathered {
    fn add(&mut self, rows: &Piece, progress: &Progress) {
        if rows.is_empty() {
            return;
        }
        let first_row = self.rows_before + self.ends.len() as u64 + 1;
        self.places.push((first_row, progress.line()));
        for (user_id, values) in rows.iter() {
            let mut changes = Changes::default();
            // What the file does not say stays as it is.
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
        self.ends.len() >= PART_ROWS || self.lines.len() >= PART_BYTES
    }

    fn take(&mut self) -> Part {
        let first_row = self.rows_before + 1;
        self.rows_before += self.ends.len() as u64;
        Part {
            first_row,
            lines: std::mem::take(&mut self.lines).into(),
            ends: std::mem::take(&mut self.ends),
            places: std::mem::take(&mut self.places),
        }
    }
}

/// Sends parts to a node.
struct Sender<'a> {
    client: Client,
    args: &'a ImportArgs,
    accepted: &'a AtomicU64,
    told: Told,
    progress: Arc<Progress>,
}

impl Sender<'_> {
    /// Sends `part` until the node has all of it; the position of its last row.
    async fn send(&self, part: &Part) -> Result<Seq, ImportError> {
        let rows_before = part.first_row - 1;
        let to = &self.args.to;
        let mut moved = Instant::now();
        let mut taken = 0;
        loop {
            let accepted = rows_before + taken;
            let unknown = |error: String| ImportError::Unknown {
                error: error.into(),
                accepted,
                until: part.last_row(),
            };
            let sent = self.client.set_lines(to, part.after(taken)).await;
            let sent = sent.map_err(|error| match error {
                RemoteError::Unreachable { .. } => ImportError::Remote { error, accepted },
                error => unknown(error.to_string()),
            })?;
            let refusal = match sent {
                Ok(position) => {
                    self.tell(rows_before + part.ends.len() as u64);
                    return Ok(position);
                }
                Err(refusal) => refusal,
            };
            if refusal.accepted > 0 {
                taken += refusal.accepted;
                moved = Instant::now();
                self.tell(rows_before + taken);
            }
            let accepted = rows_before + taken;
            let pause = refusal.retry_after.unwrap_or(RETRY_AFTER);
            match refusal.status {
                503 if moved.elapsed() + pause <= self.args.wait => {
                    tokio::time::sleep(pause).await;
                }
                504 => {
                    return Err(ImportError::Unknown {
                        error: format!("{to} answered 504: {}", refusal.detail).into(),
                        accepted,
                        until: part.last_row(),
                    });
                }
                _ => {
                    let Some(line) = refusal.line else {
                        let to = to.clone();
                        return Err(ImportError::Refused {
                            to,
                            refusal,
                            accepted,
                        });
                    };
                    // It counted from the first line that it was sent this time.
                    let (row, line) = part.place(taken - refusal.accepted + line);
                    return Err(ImportError::Row {
                        file: self.args.file.clone(),
                        row,
                        line,
                        what: refusal.detail,
                        accepted,
                    });
                }
            }
        }
    }

    fn tell(&self, accepted: u64) {
        self.accepted.store(accepted, Ordering::Relaxed);
        self.told.tell(accepted, self.progress.bytes());
    }
}

/// How far an import is, for people: a bar on a terminal, a line now and then where there is none.
struct Told {
    bar: Option<Bar>,
    next: Mutex<Instant>,
}

impl Told {
    fn new(bytes_total: u64) -> Self {
        let now = Instant::now();
        let terminal = io::stderr().is_terminal();
        Self {
            bar: terminal.then(|| Bar::new(bytes_total, now)),
            next: Mutex::new(now + LINE_EVERY),
        }
    }

    fn tell(&self, rows: u64, bytes: u64) {
        if let Some(bar) = &self.bar {
            return bar.set(rows, bytes);
        }
        let mut next = self.next.lock();
        if *next <= Instant::now() {
            *next = Instant::now() + LINE_EVERY;
            // Who closed it does not want it.
            let _ = writeln!(io::stderr(), "{rows} rows accepted");
        }
    }
}
