//! The log of a node alone, on its disk: an answered write survives kill -9 and power loss.
//!
//! A batch is written and synced before anyone sees it, so its reply, which goes out after the
//! reader has applied it, never comes before its sync. One sync a batch; while it runs the next
//! batch fills, which makes batches as large as the disk is slow.
//!
//! A log is a row of [segments](segment), files of [records](record); batches go to the last one, and
//! forgetting removes whole segments from the front.
//!
//! # Why a format of our own
//!
//! Until it was measured the log was kept in *fjall*, a log-structured store, whose journal does what
//! is done here. It grows as it is written, so each sync also commits the file's length and blocks: a
//! batch took 0.18 ms of CPU, and `POST /set` came to 0.46 of what it does with the log in memory.
//! Writing 2,500 bytes and syncing them took 192 us, 68 of them CPU, at a file's end; 184 and 70 in
//! room that was only reserved; 104 and 37 over zeros that were written and synced before, and the
//! same with `O_DSYNC` in place of the sync. Only the owner of the file can make such room. *redb* and
//! *SQLite* write pages of a tree where appending wants one run of bytes.
//!
//! A format of one's own is quickly written and long in being trusted. What is to keep its bugs away:
//! it does nothing but append and remove whole files, with no index and no work in the background;
//! each batch is synced before the next, so there is one place that a crash can tear; and the tests
//! cut and zero that place at every 8 bytes and every page, flip bits in all others, fail writes and
//! syncs, compare with a plain list, and kill a node under load.
//!
//! # A full disk
//!
//! Room is made a [step](Sizes) at a time and synced before a batch is written there. Free space is
//! looked at before each batch: with less than a reserve left, or without the next step where that is
//! needed, the batch is refused before any of it is written; reading goes on, and when there is room
//! again so does writing. A segment can be forgotten once the
//! next one is begun, so the log comes to 17 MiB before a trim can free any of it: 20 MiB, and what
//! the snapshots take, are about the least for a disk.

pub mod format;
mod reader;
mod record;
mod recovery;
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

use self::reader::{DiskSubscription, Recent};
use self::recovery::Opened;
use self::writer::{Append, Keeper};
use super::{
    AppendError, Batch, Log, LogId, Position, RandomId, ReadError, Seq, Subscription, TrimError,
};

/// What comes while one batch is written and synced makes the next one larger. With two, batches of 64
/// connections held 21 writes in place of 30, and `POST /set` did 0.61 of what it does with
/// the log in memory in place of 0.70: a sync costs more than the disk's waiting for the next one.
const IN_FLIGHT_MAX: usize = 1;

/// Why a log can't be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The disk said no.
    #[error("cannot open the log in {dir}: {why}")]
    Storage {
        /// Where the log is.
        dir: PathBuf,
        /// What was said.
        why: Box<str>,
    },
    /// What is there is not what was written.
    #[error("the log in {dir} is damaged: {why}; move it away and restore from a backup")]
    Damaged {
        /// Where the log is.
        dir: PathBuf,
        /// What is wrong.
        why: Box<str>,
    },
    /// What is there is no log, or none that this version reads.
    #[error(
        "{dir} holds no log of this version: {why}; move it away and restore from a backup, or use \
         another data directory"
    )]
    Foreign {
        /// Where the log should be.
        dir: PathBuf,
        /// What is there.
        why: Box<str>,
    },
    /// Numbering was to begin anew in a log that has batches.
    #[error(
        "the log in {dir} is not empty: it has come to batch {end}; move it away, or use another \
         data directory"
    )]
    NotEmpty {
        /// Where the log is.
        dir: PathBuf,
        /// Its last batch.
        end: Seq,
    },
    /// The system has no random bytes to name the log with.
    #[error("the system gave no random bytes: {0}")]
    Random(#[from] getrandom::Error),
}

impl OpenError {
    fn io(dir: &Path, error: io::Error) -> Self {
        let (dir, why) = (dir.into(), error.to_string().into());
        Self::Storage { dir, why }
    }
}

/// The measures of a log, in bytes.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    /// Room that is made at once.
    step_bytes: u64,
    /// Records in a segment, the unit of forgetting; more only where one record is larger.
    segment_bytes: u64,
    /// What must stay free on the disk when room is made.
    reserve_bytes: u64,
}

/// A log on disk.
///
/// Dropping it waits for what is being written, which may take as long as the disk does.
pub struct DiskLog {
    shared: Arc<Shared>,
    end: watch::Receiver<Seq>,
    /// `None` while it is dropped.
    queue: Option<SyncSender<Append>>,
    thread: Option<JoinHandle<()>>,
}

/// What the log, its thread and its readers share.
struct Shared {
    dir: PathBuf,
    log: RandomId,
    /// What numbering began after.
    base: Seq,
    sizes: Sizes,
    /// The first batch of each segment, in order; never empty.
    segments: Mutex<Vec<Seq>>,
    first: AtomicU64,
    recent: Mutex<Recent>,
    refusal: Mutex<Option<Arc<str>>>,
    /// Held while segments are removed: they must go oldest first.
    trimming: Mutex<()>,
    /// Comes before a record is written.
    #[cfg(test)]
    fault: Mutex<Option<tests::Fault>>,
}

impl DiskLog {
    /// Opens the log in `dir`, or makes one. That no other process has it open is the caller's to
    /// see to.
    ///
    /// With a `base` the log must never have held a batch, and its first one will be `base` + 1; it
    /// gets a new [`LogId`] then, as its numbers mean something else. A log made without begins
    /// at 1.
    ///
    /// # Errors
    /// The log can't be read or written, is damaged, or there is a `base` and it is in use.
    pub fn open(dir: &Path, base: Option<Seq>) -> Result<Self, OpenError> {
        Self::open_with(dir, base, Sizes::NODE)
    }

    fn open_with(dir: &Path, base: Option<Seq>, sizes: Sizes) -> Result<Self, OpenError> {
        let exists = dir.try_exists();
        if !exists.map_err(|error| OpenError::io(dir, error))? {
            Opened::create(dir, base.unwrap_or(0), sizes)?;
        }
        let mut opened = Opened::open(dir)?;
        if let Some(base) = base
            && !(opened.unused() && opened.base == base)
        {
            if !opened.unused() {
                let (dir, end) = (dir.into(), opened.last.seq);
                return Err(OpenError::NotEmpty { dir, end });
            }
            opened.discard(dir)?;
            Opened::create(dir, base, sizes)?;
            opened = Opened::open(dir)?;
        }
        Self::start(dir, opened, sizes)
    }

    fn start(dir: &Path, opened: Opened, sizes: Sizes) -> Result<Self, OpenError> {
        let (sender, end) = watch::channel(opened.last.seq);
        let first = opened.segments.first().copied();
        let shared = Arc::new(Shared {
            dir: dir.into(),
            log: opened.log,
            base: opened.base,
            sizes,
            first: AtomicU64::new(first.unwrap_or(opened.last.seq + 1)),
            segments: Mutex::new(opened.segments),
            recent: Mutex::default(),
            refusal: Mutex::default(),
            trimming: Mutex::default(),
            #[cfg(test)]
            fault: Mutex::default(),
        });
        let keeper = Keeper {
            shared: Arc::clone(&shared),
            end: sender,
            last: opened.last,
            writer: RandomId::random()?,
            written: 0,
            pen: Some(opened.pen),
            doubt: None,
            refusing: None,
            record: Vec::new(),
        };
        // Senders hold to the bound of what is in flight, so there is always room.
        let (queue, received) = mpsc::sync_channel(IN_FLIGHT_MAX);
        let thread = thread::Builder::new()
            .name("disk-log".to_owned())
            .spawn(move || keeper.run(&received))
            .map_err(|error| OpenError::io(dir, error))?;
        Ok(Self {
            shared,
            end,
            queue: Some(queue),
            thread: Some(thread),
        })
    }

    /// Whether this log never held a batch and has no batches before it either.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.end() == 0
    }

    /// The position of batch `seq`, or of the one before the first that is held; read from the log's
    /// files, so not for a hot path. `None` where they don't have it. Blocks.
    ///
    /// # Errors
    /// A file can't be read.
    pub fn position(&self, seq: Seq) -> io::Result<Option<Position>> {
        let segments = self.shared.segments.lock().clone();
        for first in segments {
            let bytes = fs::read(segment::path(&self.shared.dir, first))?;
            let header = segment::Header::read(&bytes).map_err(io::Error::other)?;
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

impl Shared {
    /// The segment that batch `seq` is in, and the last batch that may be in it; each by its number.
    fn segment_of(&self, seq: Seq) -> Option<(Seq, Seq)> {
        let segments = self.segments.lock();
        let next = segments.partition_point(|first| *first <= seq);
        let first = segments.get(next.checked_sub(1)?)?;
        let last = segments.get(next).map_or(Seq::MAX, |next| next - 1);
        Some((*first, last))
    }

    /// Removes the segments wholly at or below `through`. Blocks.
    fn trim(&self, through: Seq) -> Result<(), TrimError> {
        let failed = |error: io::Error| TrimError::Failed(error.to_string().into());
        let _oldest_first = self.trimming.lock();
        loop {
            // What was removed before must not come back while what is after it is gone.
            segment::sync_dir(&self.dir).map_err(failed)?;
            let (oldest, next) = match self.segments.lock().as_slice() {
                [oldest, next, ..] if *next <= through.saturating_add(1) => (*oldest, *next),
                _ => return Ok(()),
            };
            // Nothing of it is promised from here on. The lock is not held: appending must not wait
            // for this.
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
            let (verdict, given) = oneshot::channel();
            let queue = self.queue.as_ref().ok_or(AppendError::Closed)?;
            match queue.try_send(Append { batch, verdict }) {
                Ok(()) => {}
                Err(TrySendError::Disconnected(_)) => return Err(AppendError::Closed),
                Err(TrySendError::Full(_)) => {
                    let why = format!("more batches than {IN_FLIGHT_MAX} wait to be written");
                    return Err(AppendError::Refused(why.into()));
                }
            }
            // A thread that died with the batch at hand may have written it. That is not an error:
            // a batch is committed once it is delivered.
            given.await.unwrap_or(Ok(()))
        }
        .boxed()
    }

    fn unwritable(&self) -> Option<Arc<str>> {
        self.shared.refusal.lock().clone()
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
                place: None,
            }) as Box<dyn Subscription>)
        }
        .boxed()
    }
}

impl Drop for DiskLog {
    fn drop(&mut self) {
        // Nothing more can come: the thread finishes what waits and ends.
        drop(self.queue.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("log thread panicked");
        }
    }
}
