//! The log: the total order of batches from which a store is built.
//!
//! A log gives each batch the next sequence number and delivers batches in that order. A batch is
//! committed once a [`Subscription`] delivers it. [`Log::append`] returns when the log has accepted
//! it, which may be earlier.

mod chain;
mod checkpoint;
mod cluster_key;
mod codec;
mod in_flight;
mod jetstream;
mod memory;
mod wal;

use std::fmt;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};

use crate::grade::Write;
use crate::sys::hex;
use crate::sys::tasks::TaskEnded;
pub use chain::{BatchId, Chain, ChainEntry, Message, Position, StoredBatch};
pub use checkpoint::{Checkpoint, Mac};
pub use cluster_key::ClusterKey;
pub use in_flight::{Answers, InFlight, InFlightBatch, Ticket, WaitingRequest};
pub use jetstream::{
    AskNode, ExistingData, JetStreamConfig, JetStreamLog, ReplicaIdentity, ReportWait, Servers,
    SetupError, broker, header_block, message, raw_message,
};
pub use memory::MemoryLog;
pub use wal::{DiskLog, OpenError, WalConfig, WalStatus, WalSync, format as stored, log_of_wal};

/// A batch's sequence number in its log, from 1; 0 is the position before the first batch.
pub type Seq = u64;

/// A random 128-bit identity: of a log, a replica, a process or a writer. Shown as 32 hexadecimal
/// digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RandomId(u128);

impl RandomId {
    /// A new id from the system's random source.
    ///
    /// # Errors
    /// The system returned no random bytes.
    pub fn random() -> Result<Self, getrandom::Error> {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes)?;
        Ok(Self(u128::from_le_bytes(bytes)))
    }

    /// The id with this number, which must be unique and not 0.
    #[must_use]
    pub const fn of(id: u128) -> Self {
        Self(id)
    }

    /// Parses an id in its displayed form.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        hex::parse(text).map(Self)
    }

    /// Its bytes, little-endian.
    #[must_use]
    pub fn bytes(self) -> [u8; 16] {
        self.0.to_le_bytes()
    }
}

impl fmt::Display for RandomId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// Writes that are appended to the log together.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    /// Set on a batch that this process appended, when it is appended and when it is delivered.
    pub ticket: Option<Ticket>,
    /// The writes, in the order in which they are applied.
    pub writes: Arc<[Write]>,
    /// The sender's vote on its own state, in some batches. A log that no other process reads need
    /// not keep it.
    pub checkpoint: Option<Checkpoint>,
}

/// A batch with its position in the log.
#[derive(Debug, Clone)]
pub struct Entry {
    /// The position.
    pub position: Position,
    /// The batch; without writes for a message that all replicas skip.
    pub batch: Batch,
    /// The message as the log delivered it, if the replica still has to keep a copy.
    pub message: Option<Message>,
}

impl Entry {
    /// About how many bytes of memory it takes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let of = |write: &Write| size_of::<Write>() + write.user_id().len();
        let writes: usize = self.batch.writes.iter().map(of).sum();
        let message = self.message.as_ref().map_or(0, Message::payload_bytes);
        (size_of::<Self>() + writes + message) as u64
    }
}

/// The identity of a log. A sequence number is meaningful only together with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogId(pub Box<str>);

impl fmt::Display for LogId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why a batch is not in the log.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AppendError {
    /// The log is closed.
    #[error("the log is closed")]
    Closed,
    /// The batch is not in the log and will not be; says why and what to do.
    #[error("{0}")]
    Refused(Arc<str>),
    /// The log did not acknowledge the batch in time. The batch may be in it, or may get into it.
    #[error("append outcome unknown: no acknowledgement from the log")]
    Unknown,
}

/// Why a log could not be trimmed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum TrimError {
    /// The log is closed.
    #[error("the log is closed")]
    Closed,
    /// The log's storage failed. Some or all of the batches to remove may still be there.
    #[error("cannot trim the log: {0}")]
    Failed(Arc<str>),
}

/// Why a log can't be read.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ReadError {
    /// The log no longer has, or never had, the batch after the given one.
    #[error("the log does not hold batch {wanted}")]
    NotHeld {
        /// The batch that was requested.
        wanted: Seq,
    },
    /// A stored batch is damaged.
    #[error("batch {seq} of the log is damaged: {why}; restore from a backup")]
    Damaged {
        /// The batch.
        seq: Seq,
        /// The reason.
        why: Box<str>,
    },
    /// The log's storage cannot be read.
    #[error("cannot read the log: {0}")]
    Failed(Arc<str>),
    /// The log has trimmed the batch before it was read.
    #[error(
        "batch {wanted} is next and the log begins at batch {first}: this replica was down for \
         longer than the log's retention"
    )]
    Trimmed {
        /// The oldest batch that the log holds.
        first: Seq,
        /// The batch that was requested.
        wanted: Seq,
    },
    /// The log's stream does not exist.
    #[error("stream {stream} of log {id} does not exist; restore the stream")]
    Gone {
        /// The stream.
        stream: Box<str>,
        /// The log that this replica follows.
        id: LogId,
    },
    /// The stream holds another log.
    #[error(
        "this replica follows log {was} and the stream holds log {is}; restore the stream of log \
         {was}, or start this replica with --abandon-log {was} to discard its data and follow {is}"
    )]
    Replaced {
        /// The log that this replica follows.
        was: LogId,
        /// The log in the stream.
        is: LogId,
    },
    /// The log ends before a batch that was read.
    #[error(
        "the log ends at batch {end} and this replica has applied batch {applied}: the broker lost \
         batches; this replica keeps them and stays unready until the log holds them again"
    )]
    Shorter {
        /// The log's last batch.
        end: Seq,
        /// The last batch that was read.
        applied: Seq,
    },
    /// The log holds a different batch at a position that was read.
    #[error(
        "the log holds a different batch at position {seq} than this replica has applied: the broker \
         lost batches and stored others since; this replica keeps its state and stays unready"
    )]
    Rewritten {
        /// The position.
        seq: Seq,
    },
    /// A newer program wrote the batch.
    #[error("batch {seq} has format {format}, newer than this program reads; update gradestore")]
    NewerFormat {
        /// The batch.
        seq: Seq,
        /// Its format.
        format: u64,
    },
    /// The log is closed.
    #[error("the log is closed")]
    Closed,
}

impl ReadError {
    pub(crate) fn damaged(seq: Seq, why: &str) -> Self {
        let why = why.into();
        Self::Damaged { seq, why }
    }
}

/// Counts of events of a log since the process started.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct LogCounts {
    /// Connections made after the first one.
    pub reconnects: u64,
    /// Consumers created after the first one.
    pub resumes: u64,
    /// Attempts to append a batch after the first one.
    pub resends: u64,
    /// Messages that were delivered again.
    pub redeliveries: u64,
    /// Messages that are not a batch.
    pub poisoned: u64,
    /// Announcements that were not signed with the cluster's key.
    pub forged_announcements: u64,
}

/// A replica's announcement to the others on its log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Announcement {
    /// The process.
    pub node: Box<str>,
    /// The replica.
    pub replica: Box<str>,
    /// The program's version.
    pub version: Box<str>,
    /// The log that `position` counts in; `none` for a replica that holds no data of any log.
    pub log_id: Box<str>,
    /// The URL of its write port, such as `http://10.0.0.5:8080`; its backup is at `/backup` there.
    pub url: Box<str>,
    /// `ready`, or why not, in one word.
    pub state: Box<str>,
    /// The last batch that it has applied.
    pub position: Seq,
    /// The chain there.
    pub chain: Chain,
    /// Whether it has reached its memory limit: other replicas then reject writes for new users.
    #[serde(default)]
    pub full: bool,
    /// Proves that the replica knows the cluster's password and answers this request. Without it,
    /// the password must not be sent to `url`.
    #[serde(default)]
    pub mac: Option<Mac>,
}

/// Makes this replica's announcement, signed for a request with the given nonce.
pub type Announce = Arc<dyn Fn(&str) -> Announcement + Send + Sync>;

/// The oldest and the newest batch of a log at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// See [`Log::first`].
    pub first: Seq,
    /// See [`Log::end`].
    pub end: Seq,
}

/// A total order of batches.
pub trait Log: Send + Sync + 'static {
    /// `memory`, `disk` or `jetstream`: shown at `/status`.
    fn kind(&self) -> &'static str;

    /// The log's identity.
    fn id(&self) -> LogId;

    /// The sequence number of the oldest batch that is still held; one past the [end](Self::end)
    /// when there is none.
    fn first(&self) -> Seq;

    /// The sequence number of the last batch, as far as this process knows;
    /// [`fetch_bounds`](Self::fetch_bounds) updates it.
    fn end(&self) -> Seq;

    /// How many batches a writer may have in flight. More would only make the batches smaller
    /// (ADR 0009).
    fn in_flight_max(&self) -> usize;

    /// Appends `batch`. When this returns `Ok`, the batch has a position or will have one soon.
    ///
    /// Batches get their positions in the order in which their futures are first polled, so several
    /// may be in flight.
    ///
    /// # Errors
    /// The batch is not in the log and won't be, or [`AppendError::Unknown`].
    fn append(&self, batch: Batch) -> BoxFuture<'_, Result<(), AppendError>>;

    /// Why the log does not acknowledge writes now, and what to do about it; `None` while it does.
    /// Writes are then rejected at once.
    fn unwritable(&self) -> Option<Arc<str>> {
        None
    }

    /// The same, for a caller that rejects a write with this reason; counts the write.
    fn reject(&self) -> Option<Arc<str>> {
        self.unwritable()
    }

    /// Appends an empty batch in the background, unless a batch of this process was delivered
    /// already. Otherwise a log without storage left would look writable until it rejects a
    /// client's write.
    fn check_append(&self) {}

    /// Whether the log is known to hold the batches that this replica has applied.
    fn is_verified(&self) -> bool {
        true
    }

    /// Records that another replica has the same history as this one.
    fn set_verified(&self) {}

    /// Resolves when one of the log's own tasks has panicked: the process can't go on.
    fn failed(&self) -> BoxFuture<'_, TaskEnded> {
        std::future::pending().boxed()
    }

    /// Why batches that wait are not acknowledged, if that is known; the log may still be writable.
    fn problem(&self) -> Option<Arc<str>> {
        self.unwritable()
    }

    /// The log's counts; all 0 for a log without such events.
    fn counts(&self) -> LogCounts {
        LogCounts::default()
    }

    /// Requests the current bounds of a log to which others may have written; waits until it
    /// answers.
    ///
    /// # Errors
    /// The log is gone, or another one is in its place.
    fn fetch_bounds(&self) -> BoxFuture<'_, Result<Bounds, ReadError>> {
        let (first, end) = (self.first(), self.end());
        Box::pin(std::future::ready(Ok(Bounds { first, end })))
    }

    /// Answers other replicas' requests with `announce` from now on. Does nothing on a log without
    /// other replicas.
    fn announce(&self, announce: Announce) {
        let _ = announce;
    }

    /// Asks the other replicas on this log for their announcements. Omits replicas that do not
    /// answer soon, and announcements that are not signed with the cluster's key.
    fn peers(&self) -> BoxFuture<'_, Vec<Announcement>> {
        Box::pin(std::future::ready(Vec::new()))
    }

    /// Whether other processes write to this log too.
    fn is_replicated(&self) -> bool {
        false
    }

    /// Allows the log to remove the batches up to and including `through`. It may keep some of
    /// them, or all; see [`first`](Self::first).
    ///
    /// # Errors
    /// Removing batches failed. The log is intact, and this may be tried again.
    fn trim(&self, through: Seq) -> BoxFuture<'_, Result<(), TrimError>> {
        let _ = through;
        Box::pin(std::future::ready(Ok(())))
    }

    /// Records `entry`, which was applied after `previous`, in the replica's WAL, if it has one, and
    /// answers `own` requests, whose writes the entry contains.
    fn record(&self, previous: &Position, entry: &Entry, own: Option<Answers>) {
        let _ = previous;
        if let Some(own) = own {
            own.send(&Ok(entry.position.seq));
        }
    }

    /// Quarantines the replica's WAL, because the state that was built from it is wrong.
    fn quarantine_wal(&self, why: &'static str) -> BoxFuture<'_, ()> {
        let _ = why;
        std::future::ready(()).boxed()
    }

    /// Writes and syncs the entries recorded so far. [`wal_status`](Self::wal_status) has a failure.
    fn sync_wal(&self) -> BoxFuture<'_, ()> {
        std::future::ready(()).boxed()
    }

    /// Waits until the current subscription has replayed the replica's WAL and reads the log itself.
    fn wal_replayed(&self) -> BoxFuture<'_, ()> {
        std::future::ready(()).boxed()
    }

    /// The content of the replica's WAL; `None` for a log without one.
    fn wal_status(&self) -> Option<WalStatus> {
        None
    }

    /// Starts reading at the batch after `after`. A log that may have another history by now
    /// compares it first.
    ///
    /// # Errors
    /// The log can't be read from there, or its history is not that of `after`.
    fn subscribe(&self, after: Position)
    -> BoxFuture<'_, Result<Box<dyn Subscription>, ReadError>>;
}

/// A reader of the log, with its own position.
pub trait Subscription: Send {
    /// Waits for the next entries and appends them to `entries`, at least one. Cancel-safe: if the
    /// future is dropped, the next call returns the entries that it has not returned.
    ///
    /// # Errors
    /// This subscription can't continue; start a new one.
    fn next<'a>(&'a mut self, entries: &'a mut Vec<Entry>) -> BoxFuture<'a, Result<(), ReadError>>;
}

/// The machine's clock, in nanoseconds since 1970.
pub(crate) fn now_ns() -> u64 {
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH);
    elapsed.map_or(0, |elapsed| {
        u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX)
    })
}
