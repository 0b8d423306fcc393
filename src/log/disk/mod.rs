//! The log of a node alone, on its disk: an answered write survives kill -9 and power loss.
//!
//! A batch is written and synced before anyone sees it, so its reply, which goes out after the
//! reader has applied it, never comes before its sync. One sync a batch; while it runs the next
//! batch fills, which makes batches as large as the disk is slow.
//!
//! Under it is [fjall], a log-structured store: every write goes through a journal whose entries
//! are checksummed and whose torn tail is cut off at opening; when to sync is the caller's to say;
//! keyspaces can be dropped whole, so forgetting the oldest batches leaves no tombstones; it is
//! Rust all through and kept up. Considered and left: *redb*, whose commit writes and syncs pages
//! of a tree where appending wants one run of bytes; *SQLite*, C, with the same tree to keep
//! and rows to delete one by one; *a file format of our own*, which is the bytes of an afternoon
//! and the crash bugs of years.
//!
//! # A full disk
//!
//! Free space is looked at before each batch. With less than a [reserve](Sizes) left the batch is
//! refused before it is written, so that what the library still has in memory finds room; reading
//! goes on, and when there is room again so does writing. The library's journal alone grows to
//! about 64 MiB before it is begun anew: a disk of 128 MiB is about the least.

pub mod format;
mod keeper;
mod shelf;
mod subscription;
#[cfg(test)]
mod tests;
mod torn;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, SyncSender, TrySendError};
use std::thread::{self, JoinHandle};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use parking_lot::{Mutex, RwLock};
use tokio::sync::{oneshot, watch};

use self::keeper::{Append, Keeper, Pen};
use self::shelf::{Shelf, plain};
use self::subscription::{DiskSubscription, Recent};
use super::{AppendError, Batch, Log, LogId, ReadError, Seq, Subscription, TrimError};

/// One batch is being synced and one waits, so the disk goes from one to the next; what comes
/// meanwhile makes the batch after them larger.
const IN_FLIGHT_MAX: usize = 2;

/// Why a log can't be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The disk or the library said no.
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
        Self::storage(dir, &fjall::Error::Io(error))
    }

    fn storage(dir: &Path, error: &fjall::Error) -> Self {
        let (dir, why) = (dir.into(), plain(error).into());
        match error {
            fjall::Error::JournalRecovery(_) | fjall::Error::Unrecoverable => {
                Self::Damaged { dir, why }
            }
            _ => Self::Storage { dir, why },
        }
    }
}

/// The measures of a log, in bytes.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    /// Batches that are gathered in memory before they become a table on the disk. The journal has
    /// them meanwhile.
    table_bytes: u64,
    /// Batches in a segment, the unit of forgetting; up to one table more.
    segment_bytes: u64,
    /// What must be free on the disk for a batch to be taken.
    reserve_bytes: u64,
}

/// A log on disk.
///
/// Dropping it syncs and closes it, which may take as long as the disk does.
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
    id: LogId,
    sizes: Sizes,
    /// `None` while the database is closed: after a failure until it is open again, and for good
    /// when the log is.
    shelf: RwLock<Option<Shelf>>,
    first: AtomicU64,
    recent: Mutex<Recent>,
    refusal: Mutex<Option<Arc<str>>>,
    /// Whether segments were dropped since the database was opened.
    dropped: AtomicBool,
    /// Held while segments are dropped: they must go oldest first.
    trimming: Mutex<()>,
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
        let exists = dir.try_exists().map_err(|e| OpenError::io(dir, e))?;
        if !exists {
            Shelf::create(dir, base.unwrap_or(0))?;
        }
        let mut shelf = Shelf::open(dir)?;
        if let Some(base) = base
            && !(shelf.unused && shelf.base == base)
        {
            if !shelf.unused {
                let (dir, end) = (dir.into(), shelf.end);
                return Err(OpenError::NotEmpty { dir, end });
            }
            shelf.discard(dir)?;
            Shelf::create(dir, base)?;
            shelf = Shelf::open(dir)?;
        }
        Self::start(dir, shelf, sizes)
    }

    fn start(dir: &Path, shelf: Shelf, sizes: Sizes) -> Result<Self, OpenError> {
        let (sender, end) = watch::channel(shelf.end);
        let shared = Arc::new(Shared {
            dir: dir.into(),
            id: shelf.id.clone(),
            sizes,
            shelf: RwLock::new(None),
            first: AtomicU64::new(0),
            recent: Mutex::default(),
            refusal: Mutex::default(),
            dropped: AtomicBool::new(false),
            trimming: Mutex::default(),
        });
        let keeper = Keeper {
            shared: Arc::clone(&shared),
            end: sender,
            time_ns: shelf.time_ns,
            pen: Pen::new(&shelf),
            doubt: None,
            value: Vec::new(),
        };
        shared.adopt(shelf);
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
}

impl Shared {
    /// Makes an opened database the one that readers use.
    fn adopt(&self, shelf: Shelf) {
        self.first.store(shelf.first(), Ordering::Release);
        *self.shelf.write() = Some(shelf);
    }

    /// Whether the disk has room for a batch.
    fn room(&self) -> Result<(), Arc<str>> {
        let dir = self.dir.display();
        let free_bytes = match rustix::fs::statvfs(&self.dir) {
            Ok(stat) => stat.f_bavail.saturating_mul(stat.f_frsize),
            Err(error) => return Err(format!("the disk of {dir} can't be asked: {error}").into()),
        };
        let reserve_bytes = self.sizes.reserve_bytes;
        match free_bytes < reserve_bytes {
            true => Err(format!(
                "the disk of {dir} is full: {free_bytes} bytes free, {reserve_bytes} are kept in \
                 reserve; free some"
            )
            .into()),
            false => Ok(()),
        }
    }

    /// Drops the segments wholly at or below `through`. Blocks.
    fn trim(&self, through: Seq) -> Result<(), TrimError> {
        let _oldest_first = self.trimming.lock();
        loop {
            let (db, segment, next) = {
                let shelf = self.shelf.read();
                let reopening = || TrimError::Failed("it is being reopened, try again".into());
                let shelf = shelf.as_ref().ok_or_else(reopening)?;
                let Some((segment, next)) = shelf.covered(through) else {
                    return Ok(());
                };
                (shelf.db.clone(), segment, next)
            };
            // Nothing of it is promised from here on. The lock is not held: this syncs, and
            // appending must not wait for it.
            self.first.store(next, Ordering::Release);
            db.delete_keyspace(segment.keyspace).map_err(|error| {
                self.first.store(segment.first, Ordering::Release);
                TrimError::Failed(plain(&error).into())
            })?;
            // The last handle takes the files along: not while readers wait for the lock.
            let dropped = self.shelf.write().as_mut().and_then(|shelf| {
                let oldest = shelf.segments.first()?.first;
                (oldest == segment.first).then(|| shelf.segments.remove(0))
            });
            drop(dropped);
            self.dropped.store(true, Ordering::Release);
        }
    }
}

impl Log for DiskLog {
    fn kind(&self) -> &'static str {
        "disk"
    }

    fn id(&self) -> LogId {
        self.shared.id.clone()
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
                    let why = format!("more than {IN_FLIGHT_MAX} batches wait to be written");
                    return Err(AppendError::Refused(why.into()));
                }
            }
            // A thread that died with the batch at hand may have written it. That is not an error:
            // as ever, what became of it is told by its coming back.
            given.await.unwrap_or(Ok(()))
        }
        .boxed()
    }

    fn refusal(&self) -> Option<Arc<str>> {
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

    fn subscribe(&self, after: Seq) -> BoxFuture<'_, Result<Box<dyn Subscription>, ReadError>> {
        async move {
            let wanted = after.saturating_add(1);
            if wanted < self.first() || after > self.end() {
                return Err(ReadError::NotHeld { wanted });
            }
            Ok(Box::new(DiskSubscription {
                shared: Arc::clone(&self.shared),
                end: self.end.clone(),
                wanted,
            }) as Box<dyn Subscription>)
        }
        .boxed()
    }
}

impl Drop for DiskLog {
    fn drop(&mut self) {
        // Nothing more can come: the thread finishes what waits, syncs and ends.
        drop(self.queue.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("log thread panicked");
        }
    }
}
