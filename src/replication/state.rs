//! Whether this replica is ready, and if not, why.
//!
//! [`ReplicaDriver`](super::ReplicaDriver) sets the states of a replica, and the node those before
//! and after it; requests read them.

use std::fmt;
use std::sync::Arc;

use crate::sys::sync::Mutex;
use crate::sys::sync::atomic::{AtomicBool, Ordering};

/// The state of a replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodeState {
    /// It opens its log and looks for a snapshot.
    Starting,
    /// It fills its store from a snapshot or a peer's backup.
    Restoring,
    /// It applies the log up to its end.
    CatchingUp,
    /// It serves requests.
    Ready,
    /// No snapshot, peer or log leads to a complete state. It keeps trying.
    NoSource,
    /// The log does not continue from the last applied batch. It keeps trying.
    Gap,
    /// It holds data of another log than the stream's.
    OtherLog,
    /// Its digest differs from that of a majority, or of the only other replica.
    Diverged,
    /// It serves reads, and the log acknowledges no writes.
    ReadOnly,
    /// It is shutting down.
    Stopping,
}

impl NodeState {
    /// The name in `/status`.
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
    /// The state; not `Ready`.
    pub state: NodeState,
    /// The reason, as readable text.
    pub reason: Arc<str>,
}

/// An epoch of the store in which its state was complete. The state is still the same one as long
/// as the store has this epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CompleteEpoch(u64);

impl CompleteEpoch {
    /// For the task that replaces the state, which knows whether it is complete.
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
pub struct Readiness(Arc<ReadinessInner>);

struct ReadinessInner {
    /// For the check on every request.
    ready: AtomicBool,
    status: Mutex<ReadinessStatus>,
}

struct ReadinessStatus {
    /// `None` while the replica is ready.
    unready: Option<Unready>,
    /// A replica that is shutting down is never ready again.
    stopping: bool,
}

impl Readiness {
    /// The readiness of a replica that starts.
    #[must_use]
    pub fn starting(reason: &str) -> Self {
        let unready = Unready {
            state: NodeState::Starting,
            reason: reason.into(),
        };
        Self(Arc::new(ReadinessInner {
            ready: AtomicBool::new(false),
            status: Mutex::new(ReadinessStatus {
                unready: Some(unready),
                stopping: false,
            }),
        }))
    }

    /// Makes the replica unready.
    pub fn block(&self, state: NodeState, reason: impl Into<Arc<str>>) {
        let mut status = self.0.status.lock();
        if !status.stopping {
            let reason = reason.into();
            status.unready = Some(Unready { state, reason });
            status.stopping = state == NodeState::Stopping;
        }
        self.0.ready.store(false, Ordering::Release);
    }

    /// Makes the replica ready, unless it is shutting down.
    pub fn set_ready(&self) {
        let mut status = self.0.status.lock();
        if !status.stopping {
            status.unready = None;
            self.0.ready.store(true, Ordering::Release);
        }
    }

    /// The replica's state.
    #[must_use]
    pub fn state(&self) -> NodeState {
        match self.check() {
            Ok(()) => NodeState::Ready,
            Err(unready) => unready.state,
        }
    }

    /// Checks that the replica is ready.
    ///
    /// # Errors
    /// Why it is not.
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
    /// Why the replica is not ready.
    pub fn complete_epoch(&self, epoch: impl FnOnce() -> u64) -> Result<CompleteEpoch, Unready> {
        let epoch = epoch();
        self.check()?;
        Ok(CompleteEpoch(epoch))
    }

    /// Returns the result of `read` on one complete state. If the state is replaced meanwhile,
    /// reads again.
    ///
    /// # Errors
    /// Why the replica is not ready.
    pub fn read<T>(&self, epoch: impl Fn() -> u64, read: impl Fn() -> T) -> Result<T, Unready> {
        loop {
            let before = self.complete_epoch(&epoch)?;
            let found = read();
            if before.is(epoch()) {
                return Ok(found);
            }
        }
    }
}
