//! The log: the one total order of batches that a store is made of.
//!
//! A log gives each batch the next sequence number, from 1, and hands batches back in that order.
//! What becomes of a batch is told by its coming back through a [`Subscription`], not by
//! [`Log::append`] returning: only the log knows where a batch stands.

mod disk;
mod jetstream;
mod memory;
mod writes;

use std::fmt;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};

use crate::grade::{Digest, Write};
use crate::hex;
pub use disk::{DiskLog, OpenError, format as stored};
pub use jetstream::{JetStreamConfig, JetStreamLog, Servers, SetupError, message};
pub use memory::MemoryLog;

/// A batch's place in its log: 1 for the first. 0 is the place before it.
pub type Seq = u64;

/// The id of one process start, random; marks the batches that this process sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Origin(u128);

impl Origin {
    /// Not a process start: a batch whose sender is not known.
    pub const NOBODY: Self = Self(0);

    /// A new one, from the system's random source.
    ///
    /// # Errors
    /// The system has no random bytes to give.
    pub fn random() -> Result<Self, getrandom::Error> {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes)?;
        Ok(Self(u128::from_le_bytes(bytes)))
    }

    /// A given one, for who makes sure that no two are the same; not 0.
    #[must_use]
    pub const fn of(id: u128) -> Self {
        Self(id)
    }

    /// Reads what displaying one writes.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        hex::parse(text).map(Self)
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// The writes that travel as one message.
#[derive(Debug, Clone)]
pub struct Batch {
    /// Who sent it.
    pub origin: Origin,
    /// The sender's own count of its batches; with `origin`, the batch's name.
    pub number: u64,
    /// What it does to records, in this order.
    pub writes: Arc<[Write]>,
    /// What its sender says of its own state, now and then. A log that one process has to itself
    /// need not keep it.
    pub checkpoint: Option<Checkpoint>,
}

impl Batch {
    /// What stands in the place of a message that can't be read: it does nothing.
    #[must_use]
    pub fn nothing() -> Self {
        Self {
            origin: Origin::NOBODY,
            number: 0,
            writes: Arc::default(),
            checkpoint: None,
        }
    }
}

/// A replica's word on what it held right after a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checkpoint {
    /// The batch; 0 for the empty state before the first one.
    pub position: Seq,
    /// When the log took it, if that was said: what tells it from another one in the same place of
    /// a log that lost its last batches. 0 before the first one.
    pub time_ns: Option<u64>,
    /// The digest of all records then.
    pub digest: Digest,
}

/// A batch at its place in the log.
#[derive(Debug, Clone)]
pub struct Entry {
    /// The place.
    pub seq: Seq,
    /// When the log took it, by the log's own clock, in nanoseconds since 1970.
    pub time_ns: u64,
    /// The batch.
    pub batch: Batch,
}

impl Entry {
    /// About how many bytes of memory it takes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let of = |write: &Write| size_of::<Write>() + write.user_id().len();
        let writes: usize = self.batch.writes.iter().map(of).sum();
        (size_of::<Self>() + writes) as u64
    }
}

/// What makes a log this log and no other: a sequence number means something only with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogId(pub Box<str>);

impl fmt::Display for LogId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why a batch is not in the log.
#[derive(Debug, Clone, thiserror::Error)]
pub enum AppendError {
    /// The log is closed: nobody reads it any more.
    #[error("the log is closed")]
    Closed,
    /// The log did not take the batch and won't; says why and what to do.
    #[error("{0}")]
    Refused(Arc<str>),
    /// The log was asked more than once and did not say. The batch may be in it, or come into it.
    #[error("the log did not say whether it took the batch")]
    Unknown,
}

/// Why a log forgot nothing.
#[derive(Debug, Clone, thiserror::Error)]
pub enum TrimError {
    /// The log is closed.
    #[error("the log is closed")]
    Closed,
    /// What the log is kept on failed. What was to be forgotten may be kept, in part or whole.
    #[error("the log can't be trimmed: {0}")]
    Failed(Arc<str>),
}

/// Why a log can't be read.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ReadError {
    /// The log no longer has, or never had, the batch after the given one.
    #[error("the log does not hold batch {wanted}")]
    NotHeld {
        /// The batch that was asked for.
        wanted: Seq,
    },
    /// A stored batch is not what was written.
    #[error("batch {seq} of the log is damaged: {why}; restore from a backup")]
    Damaged {
        /// The batch.
        seq: Seq,
        /// What is wrong with it.
        why: Box<str>,
    },
    /// What the log is kept on can't be read.
    #[error("the log can't be read: {0}")]
    Failed(Arc<str>),
    /// The log has forgotten the batch before it was read.
    #[error(
        "batch {wanted} is next and the log begins at batch {first} by now: this replica was away \
         for longer than the log remembers"
    )]
    Trimmed {
        /// The oldest batch that the log holds.
        first: Seq,
        /// The batch that was asked for.
        wanted: Seq,
    },
    /// The log is not there any more.
    #[error(
        "log {id} is gone: its stream was removed; put the right log back and start this replica \
         again"
    )]
    Gone {
        /// Which one it was.
        id: LogId,
    },
    /// Another log is in its place.
    #[error(
        "log {was} is gone and {is} is in its place: its stream was removed and made anew; put the \
         right log back and start this replica again, or, to follow the one that is there, move this \
         replica's snapshots away first"
    )]
    Replaced {
        /// Which one it was.
        was: LogId,
        /// Which one it is.
        is: LogId,
    },
    /// The log ends before a batch that was read.
    #[error(
        "the log ends at batch {end} and had batch {applied} before: the broker lost batches; put \
         the right log back and start this replica again, or, to follow it as it is, move this \
         replica's snapshots away first: they hold what was lost"
    )]
    Shorter {
        /// The log's last batch.
        end: Seq,
        /// The last batch that was read.
        applied: Seq,
    },
    /// The log holds another batch in the place of one that was read.
    #[error(
        "batch {seq} of the log is not the one it was: the broker lost batches and took others \
         since; put the right log back and start this replica again, or, to follow it as it is, move \
         this replica's snapshots away first: they hold what was lost"
    )]
    Rewritten {
        /// The place.
        seq: Seq,
    },
    /// A newer program wrote the batch.
    #[error("batch {seq} has format {format}, newer than this program reads; update this replica")]
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

/// What has happened to a log since the process started.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    /// Connections made anew.
    pub reconnects: u64,
    /// Times that reading was taken up again where it had stopped.
    pub resumes: u64,
    /// Batches sent again because nothing was heard of them.
    pub resends: u64,
    /// Messages that came again after they had been read.
    pub redeliveries: u64,
    /// Batches that were missing between two that came.
    pub gaps: u64,
    /// Messages that are no batch.
    pub poisoned: u64,
}

/// What a replica tells the others on its log of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Announcement {
    /// This process start: its [`Origin`].
    pub node: Box<str>,
    /// The program's version.
    pub version: Box<str>,
    /// The log that `position` counts in.
    pub log_id: Box<str>,
    /// Where its write port is reached, such as `http://10.0.0.5:8080`; its backup is under
    /// `/backup` there.
    pub url: Box<str>,
    /// `ready`, or why not in one word.
    pub state: Box<str>,
    /// The last batch that it has applied.
    pub position: Seq,
    /// Whether it has reached its memory limit: whoever hears it refuses writes for new users.
    #[serde(default)]
    pub full: bool,
}

/// What this replica says of itself when it is asked.
pub type Announce = Arc<dyn Fn() -> Announcement + Send + Sync>;

/// The oldest and the newest batch of a log, as of one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// See [`Log::first`].
    pub first: Seq,
    /// See [`Log::end`].
    pub end: Seq,
}

/// A total order of batches.
pub trait Log: Send + Sync + 'static {
    /// `memory`, `disk` or `jetstream`: what `/status` says.
    fn kind(&self) -> &'static str;

    /// Which log this is.
    fn id(&self) -> LogId;

    /// The sequence number of the oldest batch that is still held; one past the [end](Self::end)
    /// when there is none.
    fn first(&self) -> Seq;

    /// The sequence number of the last batch, as far as this process knows;
    /// [`subscribe`](Self::subscribe) brings that up to date.
    fn end(&self) -> Seq;

    /// How many batches a writer may have appended that did not come back yet. One more than is
    /// being written keeps the log busy; many only make the batches small.
    fn in_flight_max(&self) -> usize;

    /// Gives `batch` to the log. When this returns `Ok` the batch has a place or soon will.
    ///
    /// Batches take their places in the order in which their futures are first polled, so several
    /// may be under way at once.
    ///
    /// # Errors
    /// The batch is not in the log and won't be, or [`AppendError::Unknown`].
    fn append(&self, batch: Batch) -> BoxFuture<'_, Result<(), AppendError>>;

    /// Why an append would be refused now and what to do about it; `None` when it would be taken.
    fn refusal(&self) -> Option<Arc<str>> {
        None
    }

    /// Why no append can be begun now, where the log knows without trying. A write is then refused
    /// before it waits.
    fn away(&self) -> Option<Arc<str>> {
        None
    }

    /// What has happened to the log; all 0 where nothing of the kind can.
    fn counts(&self) -> Counts {
        Counts::default()
    }

    /// Asks the log itself how far it goes now, where others may have written to it; waits for it
    /// if need be.
    ///
    /// # Errors
    /// The log is not there any more.
    fn look(&self) -> BoxFuture<'_, Result<Extent, ReadError>> {
        let (first, end) = (self.first(), self.end());
        Box::pin(std::future::ready(Ok(Extent { first, end })))
    }

    /// Tells the other replicas of this one from now on, by `announce` whenever they ask. Does
    /// nothing where there are no others.
    fn announce(&self, announce: Announce) {
        let _ = announce;
    }

    /// Asks the other replicas on this log for what they say of themselves. Whoever does not answer
    /// soon is not there.
    fn peers(&self) -> BoxFuture<'_, Vec<Announcement>> {
        Box::pin(std::future::ready(Vec::new()))
    }

    /// Whether other processes write to this log too.
    fn shared(&self) -> bool {
        false
    }

    /// Lets the log forget the batches up to and including `through`. It may keep some of them, or
    /// all: [`first`](Self::first) tells.
    ///
    /// # Errors
    /// The log could not do it. It is whole and may be asked again.
    fn trim(&self, through: Seq) -> BoxFuture<'_, Result<(), TrimError>> {
        let _ = through;
        Box::pin(std::future::ready(Ok(())))
    }

    /// Starts reading at the batch after `after`.
    ///
    /// # Errors
    /// The log can't be read from there.
    fn subscribe(&self, after: Seq) -> BoxFuture<'_, Result<Box<dyn Subscription>, ReadError>>;

    /// The same for a caller who knows when the log took the batch at `after`: a log that can have
    /// another one there by now looks first.
    ///
    /// # Errors
    /// The log can't be read from there, or it went another way before.
    fn resume(
        &self,
        after: Seq,
        time_ns: u64,
    ) -> BoxFuture<'_, Result<Box<dyn Subscription>, ReadError>> {
        let _ = time_ns;
        self.subscribe(after)
    }
}

/// A place in the log that moves on as entries are taken.
pub trait Subscription: Send {
    /// Appends the next entries to `entries`, at least one; waits for it if need be. Cancel-safe:
    /// what a dropped future had not handed out comes with the next call.
    ///
    /// # Errors
    /// The log can't be read on; start a new subscription.
    fn next<'a>(&'a mut self, entries: &'a mut Vec<Entry>) -> BoxFuture<'a, Result<(), ReadError>>;
}

/// The machine's clock, in nanoseconds since 1970.
pub(crate) fn now_ns() -> u64 {
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH);
    elapsed.map_or(0, |elapsed| {
        u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX)
    })
}
