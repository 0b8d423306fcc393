//! Whether this replica may answer, and if not, why.
//!
//! One task drives a replica through its states and sets them here; requests read them.

use std::fmt;
use std::sync::Arc;

use crate::sys::sync::Mutex;
use crate::sys::sync::atomic::{AtomicBool, Ordering};

/// What a replica is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodeState {
    /// It opens its log and looks for a snapshot.
    Starting,
    /// It fills its store from a snapshot or a peer's backup.
    Restoring,
    /// It applies the log up to its end.
    CatchingUp,
    /// It answers.
    Ready,
    /// No snapshot, peer or log leads to a complete state; it tries again.
    NoSource,
    /// The log does not lead on from what it has applied; it tries again.
    Gap,
    /// It holds data of another log than the stream's.
    OtherLog,
    /// Its state differs from that of most replicas, or of the only other one.
    Diverged,
    /// It answers reads, and the log acknowledges no writes.
    ReadOnly,
    /// It stops.
    Stopping,
}

impl NodeState {
    /// One word, for programs.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Restoring => "restoring",
            Self::CatchingUp => "catching-up",
            Self::Ready => "ready",
            Self::NoSource => "no-source",
            Self::Gap => "gap",
            Self::OtherLog => "other-log",
            Self::Diverged => "diverged",
            Self::ReadOnly => "read-only",
            Self::Stopping => "stopping",
        }
    }
}

impl fmt::Display for NodeState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why a replica is not ready.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unready {
    /// What it is doing instead.
    pub state: NodeState,
    /// A sentence for people.
    pub reason: Arc<str>,
}

/// An epoch of the store in which its state was complete. The state is still the same one as long as
/// the store has this epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CompleteEpoch(u64);

impl CompleteEpoch {
    /// For the task that replaces the state, which knows without asking whether it is complete.
    pub(super) const fn known(epoch: u64) -> Self {
        Self(epoch)
    }

    /// Whether a store with this epoch still holds the state.
    #[must_use]
    pub const fn is(self, epoch: u64) -> bool {
        self.0 == epoch
    }
}

/// The state of one replica. Clones share it.
#[derive(Clone)]
pub struct Readiness(Arc<Inner>);

struct Inner {
    /// For the check on every request.
    ready: AtomicBool,
    status: Mutex<Status>,
}

struct Status {
    /// `None` while the replica is ready.
    unready: Option<Unready>,
    /// Once it stops it is never ready again.
    stopping: bool,
}

impl Readiness {
    /// A replica that starts.
    #[must_use]
    pub fn starting(reason: &str) -> Self {
        let unready = Unready {
            state: NodeState::Starting,
            reason: reason.into(),
        };
        Self(Arc::new(Inner {
            ready: AtomicBool::new(false),
            status: Mutex::new(Status {
                unready: Some(unready),
                stopping: false,
            }),
        }))
    }

    /// The replica does not answer from now on.
    pub fn block(&self, state: NodeState, reason: impl Into<Arc<str>>) {
        let mut status = self.0.status.lock();
        if !status.stopping {
            let reason = reason.into();
            status.unready = Some(Unready { state, reason });
            status.stopping = state == NodeState::Stopping;
        }
        self.0.ready.store(false, Ordering::Release);
    }

    /// The replica answers from now on, unless it stops.
    pub fn set_ready(&self) {
        let mut status = self.0.status.lock();
        if !status.stopping {
            status.unready = None;
            self.0.ready.store(true, Ordering::Release);
        }
    }

    /// What the replica is doing.
    #[must_use]
    pub fn state(&self) -> NodeState {
        match self.check() {
            Ok(()) => NodeState::Ready,
            Err(unready) => unready.state,
        }
    }

    /// Whether the replica may answer.
    ///
    /// # Errors
    /// Why not.
    pub fn check(&self) -> Result<(), Unready> {
        if self.0.ready.load(Ordering::Acquire) {
            return Ok(());
        }
        match &self.0.status.lock().unready {
            Some(unready) => Err(unready.clone()),
            None => Ok(()),
        }
    }

    /// The store's current epoch, if its state is complete.
    ///
    /// The epoch is read before readiness. The task that replaces a state first
    /// [blocks](Self::block), then increments `epoch`, and only then removes records. So if the
    /// replica is ready after the epoch was read, nothing had been removed in that epoch.
    ///
    /// # Errors
    /// Why the replica may not answer.
    pub fn complete_epoch(&self, epoch: impl FnOnce() -> u64) -> Result<CompleteEpoch, Unready> {
        let epoch = epoch();
        self.check()?;
        Ok(CompleteEpoch(epoch))
    }

    /// What `look` finds in a state that may be replaced meanwhile: never a part of one, nor one that
    /// is not complete.
    ///
    /// # Errors
    /// Why the replica may not answer.
    pub fn read<T>(&self, epoch: impl Fn() -> u64, look: impl Fn() -> T) -> Result<T, Unready> {
        loop {
            let before = self.complete_epoch(&epoch)?;
            let found = look();
            if before.is(epoch()) {
                return Ok(found);
            }
        }
    }
}
