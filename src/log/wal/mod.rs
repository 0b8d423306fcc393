//! The write-ahead log of a single node: an acknowledged write survives kill -9 and power loss.
//!
//! A batch is written and synced before readers see it. It is acknowledged once it is applied, so
//! never before it is synced. Each batch has one sync; the next batch fills meanwhile (group
//! commit).
//!
//! The log is a sequence of [segments](segment), files of [records](record). Batches are appended
//! to the last segment, and trimming removes whole segments from the front.
//!
//! The format is our own, because only the owner of a file can overwrite zeros that were synced in
//! advance: a sync then costs 104 us instead of 192 (ADR 0001). The log only appends
//! and removes whole files, without an index or background work, and syncs each batch before the
//! next. So a crash can tear a log at one place only. The tests truncate and zero that place at
//! every 8 bytes and every page, flip bits elsewhere, fail writes and syncs, and compare with a
//! `Vec`.
//!
//! # A full disk
//!
//! Space is zeroed and synced in [steps](WalSizes). Before each batch the writer checks the free
//! space. With less than the reserve, or less than the next step where it needs one, it rejects the
//! batch before it has written any of it. Reads continue, and writes continue once there is space
//! again. A segment can be trimmed once the next one exists, so the log grows to 17 MiB before a
//! trim can free anything: a disk needs about 20 MiB plus the snapshots.

pub mod format;
mod reader;
mod record;
mod recovery;
mod replica;
mod segment;
#[cfg(test)]
mod tests;
mod writer;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, SyncSender, TrySendError};
use std::thread::{self, JoinHandle};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use tokio::sync::{oneshot, watch};

use self::reader::{DiskSubscription, RecentEntries};
use self::recovery::RecoveredLog;
pub(in crate::log) use self::replica::{ReplicaWal, WalReader};
pub use self::replica::{WalConfig, WalStatus, WalSync, log_of_wal};
use self::writer::{AppendRequest, WalWriter};
use super::{
    AppendError, Batch, Log, LogId, Position, RandomId, ReadError, Seq, Subscription, TrimError,
};

/// Writes that arrive during a sync make the next batch larger. With two batches in flight, batches
/// of 64 connections had 21 writes instead of 30, and `POST /set` reached 0.61 of its rate with the
/// log in memory instead of 0.70: more syncs cost more than a disk that is sometimes idle.
const IN_FLIGHT_MAX: usize = 1;

/// Why a log cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A file cannot be read or written.
    #[error("cannot open the log in {dir}: {why}")]
    Storage {
        /// The log's directory.
        dir: PathBuf,
        /// The system's error.
        why: Box<str>,
    },
    /// A file was changed or lost.
    #[error("the log in {dir} is damaged: {why}; move it away and restore from a backup")]
    Damaged {
        /// The log's directory.
        dir: PathBuf,
        /// The reason.
        why: Box<str>,
    },
    /// A newer program wrote to the log.
    #[error(
        "batch {seq} of the log in {dir} has format {format}, newer than this program reads; update \
         gradestore"
    )]
    Newer {
        /// The log's directory.
        dir: PathBuf,
        /// The first such batch.
        seq: Seq,
        /// Its format.
        format: u64,
    },
    /// The directory has no log that this version can read.
    #[error(
        "{dir} has no log that this version can read: {why}; move it away and restore from a backup, \
         or use another data directory"
    )]
    Unrecognized {
        /// The log's directory.
        dir: PathBuf,
        /// The reason.
        why: Box<str>,
    },
    /// A base was given for a log that has batches.
    #[error(
        "the log in {dir} is not empty: its last batch is {end}; move it away, or use another data \
         directory"
    )]
    NotEmpty {
        /// The log's directory.
        dir: PathBuf,
        /// Its last batch.
        end: Seq,
    },
    /// The system returned no random bytes for the log's id.
    #[error("the system returned no random bytes: {0}")]
    Random(#[from] getrandom::Error),
}

impl OpenError {
    fn io(dir: &Path, error: io::Error) -> Self {
        let (dir, why) = (dir.into(), error.to_string().into());
        Self::Storage { dir, why }
    }
}

/// The sizes of a log's parts.
#[derive(Debug, Clone, Copy)]
struct WalSizes {
    /// How much space is zeroed at once.
    step_bytes: u64,
    /// The size of a segment, the unit of trimming. Larger only for a single larger record.
    segment_bytes: u64,
    /// The free space that the log leaves on the disk.
    reserve_bytes: u64,
}

/// A log on disk.
///
/// Dropping it waits for the batch that is being written.
pub struct DiskLog {
    shared: Arc<WalShared>,
    end: watch::Receiver<Seq>,
    /// `None` only while the log is dropped.
    queue: Option<SyncSender<AppendRequest>>,
    thread: Option<JoinHandle<()>>,
}

/// State shared by the log, its writer and its readers.
struct WalShared {
    dir: PathBuf,
    log: RandomId,
    /// The first batch is base + 1.
    base: Seq,
    sizes: WalSizes,
    /// The first batch of each segment, in order; never empty.
    segments: Mutex<Vec<Seq>>,
    first: AtomicU64,
    recent: Mutex<RecentEntries>,
    stall_reason: Mutex<Option<Arc<str>>>,
    /// Locked while segments are removed, because the oldest must be removed first.
    trimming: Mutex<()>,
    /// Called before a record is written.
    #[cfg(test)]
    fault: Mutex<Option<tests::Fault>>,
}

impl DiskLog {
    /// Opens the log in `dir`, or creates it. The caller must ensure that no other process has it
    /// open.
    ///
    /// With a `base`, the log must never have had a batch. Its first one will be `base` + 1, and it
    /// gets a new [`LogId`], because its sequence numbers have another meaning.
    ///
    /// # Errors
    /// The log cannot be read or written, is damaged, or has batches and a `base` was given.
    pub fn open(dir: &Path, base: Option<Seq>) -> Result<Self, OpenError> {
        Self::open_with(dir, base, WalSizes::NODE)
    }

    fn open_with(dir: &Path, base: Option<Seq>, sizes: WalSizes) -> Result<Self, OpenError> {
        let exists = dir.try_exists();
        if !exists.map_err(|error| OpenError::io(dir, error))? {
            RecoveredLog::create(dir, base.unwrap_or(0), sizes)?;
        }
        let mut recovered = RecoveredLog::open(dir)?;
        if let Some(base) = base
            && !(recovered.is_unused() && recovered.base == base)
        {
            if !recovered.is_unused() {
                let (dir, end) = (dir.into(), recovered.last.seq);
                return Err(OpenError::NotEmpty { dir, end });
            }
            recovered.discard(dir)?;
            RecoveredLog::create(dir, base, sizes)?;
            recovered = RecoveredLog::open(dir)?;
        }
        Self::start(dir, recovered, sizes)
    }

    fn start(dir: &Path, recovered: RecoveredLog, sizes: WalSizes) -> Result<Self, OpenError> {
        let (sender, end) = watch::channel(recovered.last.seq);
        let first = recovered.segments.first().copied();
        let shared = Arc::new(WalShared {
            dir: dir.into(),
            log: recovered.log,
            base: recovered.base,
            sizes,
            first: AtomicU64::new(first.unwrap_or(recovered.last.seq + 1)),
            segments: Mutex::new(recovered.segments),
            recent: Mutex::default(),
            stall_reason: Mutex::default(),
            trimming: Mutex::default(),
            #[cfg(test)]
            fault: Mutex::default(),
        });
        let writer = WalWriter {
            shared: Arc::clone(&shared),
            end: sender,
            last: recovered.last,
            writer: RandomId::random()?,
            written: 0,
            active: Some(recovered.active),
            uncertain: None,
            stall: None,
            record: Vec::new(),
        };
        // Callers keep to `in_flight_max`, so the queue is never full.
        let (queue, received) = mpsc::sync_channel(IN_FLIGHT_MAX);
        let thread = thread::Builder::new()
            .name("disk-log".to_owned())
            .spawn(move || writer.run(&received))
            .map_err(|error| OpenError::io(dir, error))?;
        Ok(Self {
            shared,
            end,
            queue: Some(queue),
            thread: Some(thread),
        })
    }

    /// The position of batch `seq`, or of the batch before the first one; `None` if the log does
    /// not have it. Reads whole segments, so it is slow, and blocks.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn position(&self, seq: Seq) -> io::Result<Option<Position>> {
        let segments = self.shared.segments.lock().clone();
        for first in segments {
            let bytes = fs::read(segment::path(&self.shared.dir, first))?;
            let header = segment::SegmentHeader::read(&bytes).map_err(io::Error::other)?;
            let mut position = header.start;
            let mut rest = bytes.get(segment::HEADER_BYTES as usize..);
            while position.seq != seq
                && let Some(record) = rest.and_then(record::read)
                && record.seq == position.seq + 1
            {
                let next = format::position(&position, record.value);
                position = next.map_err(io::Error::other)?;
                rest = rest.and_then(|rest| rest.get(record.bytes..));
            }
            if position.seq == seq {
                return Ok(Some(position));
            }
        }
        Ok(None)
    }
}

impl WalShared {
    /// The first and the last possible batch of the segment with batch `seq`.
    fn segment_of(&self, seq: Seq) -> Option<(Seq, Seq)> {
        let segments = self.segments.lock();
        let next = segments.partition_point(|first| *first <= seq);
        let first = segments.get(next.checked_sub(1)?)?;
        let last = segments.get(next).map_or(Seq::MAX, |next| next - 1);
        Some((*first, last))
    }

    /// Removes the segments that end at or before `through`. Blocks.
    fn trim(&self, through: Seq) -> Result<(), TrimError> {
        let failed = |error: io::Error| TrimError::Failed(error.to_string().into());
        let _oldest_first = self.trimming.lock();
        loop {
            // Removals must become durable in order.
            segment::sync_dir(&self.dir).map_err(failed)?;
            let (oldest, next) = match self.segments.lock().as_slice() {
                [oldest, next, ..] if *next <= through.saturating_add(1) => (*oldest, *next),
                _ => return Ok(()),
            };
            // From here on the log does not have these batches. The lock is not held, so that
            // appends do not wait for the removal.
            self.first.store(next, Ordering::Release);
            fs::remove_file(segment::path(&self.dir, oldest)).map_err(|error| {
                self.first.store(oldest, Ordering::Release);
                failed(error)
            })?;
            self.segments.lock().remove(0);
        }
    }
}

impl Log for DiskLog {
    fn kind(&self) -> &'static str {
        "disk"
    }

    fn id(&self) -> LogId {
        recovery::log_id(self.shared.log)
    }

    fn first(&self) -> Seq {
        self.shared.first.load(Ordering::Acquire)
    }

    fn end(&self) -> Seq {
        *self.end.borrow()
    }

    fn in_flight_max(&self) -> usize {
        IN_FLIGHT_MAX
    }

    fn append(&self, batch: Batch) -> BoxFuture<'_, Result<(), AppendError>> {
        async {
            let (reply, result) = oneshot::channel();
            let queue = self.queue.as_ref().ok_or(AppendError::Closed)?;
            match queue.try_send(AppendRequest { batch, reply }) {
                Ok(()) => {}
                Err(TrySendError::Disconnected(_)) => return Err(AppendError::Closed),
                Err(TrySendError::Full(_)) => {
                    let why = format!("more than {IN_FLIGHT_MAX} batches in flight");
                    return Err(AppendError::Refused(why.into()));
                }
            }
            // If the thread panicked, it may have written the batch. That is not an error here,
            // because a batch is committed once it is delivered.
            result.await.unwrap_or(Ok(()))
        }
        .boxed()
    }

    fn unwritable(&self) -> Option<Arc<str>> {
        self.shared.stall_reason.lock().clone()
    }

    fn trim(&self, through: Seq) -> BoxFuture<'_, Result<(), TrimError>> {
        async move {
            let shared = Arc::clone(&self.shared);
            let trimmed = tokio::task::spawn_blocking(move || shared.trim(through));
            trimmed.await.map_err(|_| TrimError::Closed)?
        }
        .boxed()
    }

    fn subscribe(
        &self,
        after: Position,
    ) -> BoxFuture<'_, Result<Box<dyn Subscription>, ReadError>> {
        async move {
            let wanted = after.seq.saturating_add(1);
            if wanted < self.first() || after.seq > self.end() {
                return Err(ReadError::NotHeld { wanted });
            }
            Ok(Box::new(DiskSubscription {
                shared: Arc::clone(&self.shared),
                end: self.end.clone(),
                last: after,
                cursor: None,
            }) as Box<dyn Subscription>)
        }
        .boxed()
    }
}

impl Drop for DiskLog {
    fn drop(&mut self) {
        // The thread finishes the queued batches and ends.
        drop(self.queue.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("log thread panicked");
        }
    }
}
