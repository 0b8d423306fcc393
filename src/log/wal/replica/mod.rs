//! The write-ahead log of a replica: a local copy of the batches that it has applied. A replica that
//! starts needs the stream only from the end of this copy on.
//!
//! It has the format of a single node's log. It is a list of *runs*: a run has no holes. It ends where
//! a record could not be written or the replica's state was replaced. A segment's header says whether
//! it continues the segment before it.
//!
//! Recording never delays the applier. Records wait in memory, up to a bound, for one write and one
//! sync, at every interval of `--wal-sync`, or at once with `always`. The log only answers a client
//! after that sync with `always`. If records cannot be written, the run ends; the next record begins
//! another one.

mod files;
mod reader;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::io;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use serde::Serialize;
use tokio::sync::Notify;

pub use self::files::log_of_wal;
use self::files::{RunWriter, WalFiles};
pub(in crate::log) use self::reader::WalReader;
use super::{format, record};
use crate::log::{Answers, AppendError, Entry, LogId, Position, RandomId, Seq};
use crate::sys::exec::Blocking;

/// Records that wait to be written, in bytes. Beyond it the disk is too slow, and the run ends.
const PENDING_BYTES_MAX: usize = 64 << 20;
/// Waiting records of this many bytes are written before the interval ends.
const PENDING_BYTES_EARLY: usize = 4 << 20;
/// Records that are written together. A segment ends between two of these.
const CHUNK_BYTES: usize = if cfg!(test) { 1 << 10 } else { 1 << 20 };
/// A disk that does not complete a write in this time counts as failing.
const RESPONSE_WAIT_MAX: Duration = Duration::from_secs(5);
/// How long after a failure the next write is tried.
const RETRY_AFTER: Duration = Duration::from_millis(250);

/// When a replica's WAL is synced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WalSync {
    /// Before a write of this replica is acknowledged.
    Always,
    /// At this interval.
    Every(Duration),
}

/// The settings of a replica's WAL.
#[derive(Debug, Clone)]
pub struct WalConfig {
    /// The directory of the WALs of all logs.
    pub dir: PathBuf,
    /// When it is synced.
    pub sync: WalSync,
    /// Up to how many bytes are kept beyond those that a start needs.
    pub keep_bytes: u64,
    /// The threads that read and write it.
    pub pool: Blocking,
}

/// The content of a replica's WAL.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct WalStatus {
    /// The oldest batch of the newest run; one past `last` if it is empty.
    pub first: Seq,
    /// The newest batch that was written.
    pub last: Seq,
    /// The size of all segments.
    pub bytes: u64,
    /// How often records could not be written.
    pub failures: u64,
    /// Why records cannot be written now.
    pub failure: Option<Arc<str>>,
}

/// A replica's WAL.
pub(in crate::log) struct ReplicaWal {
    config: WalConfig,
    log: RandomId,
    pending: Mutex<Pending>,
    /// Tells the task that writes that a record waits.
    wake: Notify,
    /// Ends its interval early.
    early: Notify,
    /// Locked during writes and removals.
    writer: Arc<Mutex<RunWriter>>,
    files: Arc<Mutex<WalFiles>>,
    /// Held by the flush that runs, because records must be written in order.
    flushing: Arc<tokio::sync::Mutex<()>>,
    /// Requests to answer once their batch is synced, oldest first.
    answers: Mutex<VecDeque<(Seq, Answers)>>,
    failure: Mutex<Option<Arc<str>>>,
    failures: AtomicU64,
}

/// Records that are not written yet.
#[derive(Default)]
struct Pending {
    chunks: Vec<RecordChunk>,
    bytes: usize,
    /// The last entry that was recorded.
    last: Seq,
    /// Why all files are to be quarantined before these records are written.
    quarantine: Option<&'static str>,
    /// Records were left out: too many were waiting.
    overflowed: bool,
}

/// Contiguous records.
struct RecordChunk {
    /// The position before the first one.
    previous: Position,
    last: Position,
    records: Vec<u8>,
}

impl ReplicaWal {
    /// Opens the WAL of log `id`, which has a directory of its id. Quarantines damaged files, and
    /// truncates the newest after its last valid record. Blocks.
    ///
    /// # Errors
    /// The directory cannot be read or written.
    pub(in crate::log) fn open(mut config: WalConfig, id: &LogId) -> io::Result<Self> {
        let log = RandomId::parse(&id.0);
        let log = log.ok_or_else(|| io::Error::other(format!("{id} is not the id of a stream")))?;
        config.dir.push(&*id.0);
        let (writer, files) = files::open(&config, log)?;
        Ok(Self {
            config,
            log,
            pending: Mutex::default(),
            wake: Notify::new(),
            early: Notify::new(),
            writer: Arc::new(Mutex::new(writer)),
            files: Arc::new(Mutex::new(files)),
            flushing: Arc::default(),
            answers: Mutex::default(),
            failure: Mutex::default(),
            failures: AtomicU64::new(0),
        })
    }

    /// Records `entry`, which was applied after `previous`, and answers `own` requests, with
    /// [`WalSync::Always`] after the sync. Entries that were read from this WAL have no message and
    /// are not recorded again.
    pub(in crate::log) fn record(&self, previous: &Position, entry: &Entry, own: Option<Answers>) {
        let Some(message) = &entry.message else {
            if let Some(own) = own {
                own.send(&Ok(entry.position.seq));
            }
            return;
        };
        let seq = entry.position.seq;
        let value = |out: &mut Vec<u8>| {
            let checkpoint = entry.batch.checkpoint.as_ref();
            let time_ns = entry.position.time_ns;
            format::write_message(time_ns, message.chain_entry(), checkpoint, out);
        };
        let mut pending = self.pending.lock();
        let waited = pending.bytes;
        let own = match (own, self.config.sync) {
            (Some(own), WalSync::Always) => {
                self.answers.lock().push_back((seq, own));
                None
            }
            (own, _) => own,
        };
        pending.add(previous, entry.position, |out| {
            record::append(seq, value, out)
        });
        let waiting = pending.bytes;
        drop(pending);
        if let Some(own) = own {
            own.send(&Ok(seq));
        }
        if waited == 0 {
            self.wake.notify_one();
        }
        if waited < PENDING_BYTES_EARLY && waiting >= PENDING_BYTES_EARLY {
            self.early.notify_one();
        }
    }

    /// Quarantines all files, because the replica's state was found to be wrong. Until that has
    /// succeeded nothing is read from them.
    pub(in crate::log) async fn quarantine(&self, why: &'static str) {
        {
            let mut pending = self.pending.lock();
            pending.chunks.clear();
            pending.bytes = 0;
            pending.quarantine = Some(why);
        }
        self.wake.notify_one();
        self.early.notify_one();
        self.flush().await;
    }

    /// Writes and syncs records until the task is dropped.
    pub(in crate::log) async fn run(self: Arc<Self>) {
        loop {
            self.wake.notified().await;
            if let WalSync::Every(interval) = self.config.sync {
                let _ = tokio::time::timeout(interval, self.early.notified()).await;
            }
            // Retries without new records too, because clients' writes are rejected until it succeeds.
            while !self.flush_in_time().await {
                tokio::time::sleep(RETRY_AFTER).await;
            }
        }
    }

    /// Like [`flush`](Self::flush). A disk that does not respond counts as a failure meanwhile.
    async fn flush_in_time(&self) -> bool {
        let mut flushed = pin!(self.flush());
        loop {
            match tokio::time::timeout(RESPONSE_WAIT_MAX, flushed.as_mut()).await {
                Ok(flushed) => return flushed,
                Err(_elapsed) => {
                    let error = io::Error::new(io::ErrorKind::TimedOut, "it does not respond");
                    self.fail(&error, Seq::MAX);
                }
            }
        }
    }

    /// Writes and syncs the records that wait now; after a failure it first checks that the disk can
    /// be written. Returns whether that succeeded.
    pub(in crate::log) async fn flush(&self) -> bool {
        // Owned by the job, which goes on if this future is dropped.
        let one_at_a_time = Arc::clone(&self.flushing).lock_owned().await;
        let pending = {
            let mut waiting = self.pending.lock();
            let last = waiting.last;
            let pending = std::mem::take(&mut *waiting);
            waiting.last = last;
            pending
        };
        let was_failing = self.failure.lock().is_some();
        if pending.is_empty() && !was_failing {
            return true;
        }
        let (through, overflowed) = (pending.last, pending.overflowed);
        let quarantine = pending.quarantine;
        let (writer, files) = (Arc::clone(&self.writer), Arc::clone(&self.files));
        let (config, log) = (self.config.clone(), self.log);
        let written = self.config.pool.run(move || {
            let _one_at_a_time = one_at_a_time;
            let mut writer = writer.lock();
            if was_failing {
                files::check_writable(&config.dir)?;
            }
            if let Some(why) = pending.quarantine {
                writer.quarantine_from(&config, &files, 0, why)?;
            }
            writer.write(&config, log, &files, &pending.chunks)
        });
        let written = written.await.flatten().and_then(|()| match overflowed {
            true => Err(io::Error::other("the disk is too slow")),
            false => Ok(()),
        });
        match written {
            Ok(()) => {
                self.answer(through, &|seq| Ok(seq));
                if self.failure.lock().take().is_some() {
                    tracing::info!("WAL is written again");
                }
                true
            }
            Err(error) => {
                if quarantine.is_some() {
                    self.pending.lock().quarantine = quarantine;
                }
                self.fail(&error, through);
                false
            }
        }
    }

    /// Records that batches up to `through` could not be synced.
    fn fail(&self, error: &io::Error, through: Seq) {
        self.failures.fetch_add(1, Ordering::Relaxed);
        let dir = self.config.dir.display();
        let why: Arc<str> =
            format!("cannot write the WAL in {dir}: {error}; check the disk").into();
        if self.failure.lock().replace(Arc::clone(&why)).is_none() {
            tracing::error!(%why, "WAL not written");
        }
        self.answer(through, &|_| Err(AppendError::Unknown));
    }

    /// Answers the requests that wait for batches up to `through`.
    fn answer(&self, through: Seq, result: &dyn Fn(Seq) -> Result<Seq, AppendError>) {
        loop {
            let next = {
                let mut answers = self.answers.lock();
                match answers.front() {
                    Some((seq, _)) if *seq <= through => answers.pop_front(),
                    _ => None,
                }
            };
            let Some((seq, own)) = next else {
                return;
            };
            own.send(&result(seq));
        }
    }

    /// Why writes of clients are rejected, if they are: they could not be synced.
    pub(in crate::log) fn unwritable(&self) -> Option<Arc<str>> {
        match self.config.sync {
            WalSync::Always => self.failure.lock().clone(),
            WalSync::Every(_) => None,
        }
    }

    /// A reader of the entries after `after`, if the newest run holds the next one and has the same
    /// history up to there.
    pub(in crate::log) async fn read_after(&self, after: Position) -> Option<WalReader> {
        if self.pending.lock().quarantine.is_some() {
            return None;
        }
        let (config, files) = (self.config.clone(), Arc::clone(&self.files));
        let found = move || WalReader::after(config, files, &after);
        self.config.pool.run(found).await.ok().flatten()
    }

    /// The next entries of `reader`; `None` at the end of the run.
    pub(in crate::log) async fn read(
        &self,
        mut reader: WalReader,
    ) -> Option<(WalReader, Vec<Entry>)> {
        let read = self.config.pool.run(move || {
            let entries = reader.next();
            (reader, entries)
        });
        // The thread panicked, or the runtime is stopping: the stream has the rest.
        let read = read.await.ok();
        read.filter(|(_, entries)| !entries.is_empty())
    }

    /// The oldest batch that can be read without a hole, from this WAL and then from a stream whose
    /// oldest message is `stream_first`.
    pub(in crate::log) fn first(&self, stream_first: Seq) -> Seq {
        let status = self.status();
        match status.last.saturating_add(1) >= stream_first && status.first <= status.last {
            true => status.first.min(stream_first),
            false => stream_first,
        }
    }

    /// Removes old segments: those that no start needs, which end at or before `through` and are
    /// older than ten minutes, as long as there are more than `keep_bytes`.
    ///
    /// # Errors
    /// A file cannot be removed.
    pub(in crate::log) async fn trim(&self, through: Seq) -> io::Result<()> {
        let (writer, files) = (Arc::clone(&self.writer), Arc::clone(&self.files));
        let config = self.config.clone();
        let trimmed = self.config.pool.run(move || {
            let mut writer = writer.lock();
            writer.needed_after = writer.needed_after.max(through);
            writer.trim(&config, &files, config.keep_bytes)
        });
        trimmed.await.flatten()
    }

    /// The last batch that is known to have been recorded, readable or not.
    pub(in crate::log) fn known_end(&self) -> Seq {
        let files = self.files.lock();
        files.known_end.max(files.last.map_or(0, |last| last.seq))
    }

    /// Its content.
    pub(in crate::log) fn status(&self) -> WalStatus {
        let files = self.files.lock();
        let last = files.last.map_or(0, |last| last.seq);
        WalStatus {
            first: files.run_start().map_or(last, |start| start.seq) + 1,
            last,
            bytes: files.bytes(),
            failures: self.failures.load(Ordering::Relaxed),
            failure: self.failure.lock().clone(),
        }
    }
}

impl Pending {
    fn is_empty(&self) -> bool {
        self.chunks.is_empty() && self.quarantine.is_none() && !self.overflowed
    }

    /// Adds a record.
    fn add(
        &mut self,
        previous: &Position,
        position: Position,
        append: impl FnOnce(&mut Vec<u8>) -> io::Result<()>,
    ) {
        self.last = position.seq;
        if self.bytes > PENDING_BYTES_MAX {
            self.overflowed = true;
            return;
        }
        let joins =
            |chunk: &RecordChunk| chunk.last.is_same(previous) && chunk.records.len() < CHUNK_BYTES;
        let mut chunk = match self.chunks.pop_if(|chunk| joins(chunk)) {
            Some(chunk) => chunk,
            None => RecordChunk {
                previous: *previous,
                last: *previous,
                records: Vec::new(),
            },
        };
        let before = chunk.records.len();
        match append(&mut chunk.records) {
            Ok(()) => chunk.last = position,
            // Longer than a record may be. The next record begins another run.
            Err(_) => {
                chunk.records.truncate(before);
                self.overflowed = true;
            }
        }
        self.bytes += chunk.records.len() - before;
        self.chunks.push(chunk);
    }
}
