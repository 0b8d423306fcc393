//! Whether this replica may answer, and if not, why.
//!
//! What forbids answering holds a [`Latch`] for as long as it does: starting, restoring, a gap in
//! the log, stopping. Nothing sets "ready"; it is what is left when nobody holds one.

use std::sync::Arc;

use crate::sync::Mutex;
use crate::sync::atomic::{AtomicUsize, Ordering};

/// The state of a replica whose peers hold something else.
pub const DIVERGED: &str = "diverged";

/// What a latch forbids.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Reads, and with them writes: whoever can't be read from can't confirm a write.
    All,
    /// Writes alone.
    Writes,
}

/// Why a replica is not ready.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unready {
    /// One word for programs: `starting`, `stopping`, …
    pub state: &'static str,
    /// A sentence for people.
    pub reason: Arc<str>,
}

/// The latches of one replica. Clones are the same.
#[derive(Clone, Default)]
pub struct Readiness(Arc<Inner>);

#[derive(Default)]
struct Inner {
    /// How many latches there are for each scope, for the look on every request.
    all: AtomicUsize,
    writes: AtomicUsize,
    held: Mutex<Vec<Held>>,
}

struct Held {
    id: usize,
    scope: Scope,
    unready: Unready,
}

/// Keeps a replica unready until it is dropped.
#[must_use = "the replica is unready only as long as this is held"]
pub struct Latch {
    readiness: Readiness,
    id: usize,
    scope: Scope,
}

impl Readiness {
    /// Makes the replica unready.
    pub fn hold(&self, scope: Scope, state: &'static str, reason: impl Into<Arc<str>>) -> Latch {
        let mut held = self.0.held.lock();
        let id = held.iter().map(|held| held.id + 1).max().unwrap_or(0);
        let reason = reason.into();
        held.push(Held {
            id,
            scope,
            unready: Unready { state, reason },
        });
        self.count(scope).fetch_add(1, Ordering::Release);
        Latch {
            readiness: self.clone(),
            id,
            scope,
        }
    }

    /// Whether reads may be answered.
    ///
    /// # Errors
    /// Why not: the latch held longest.
    pub fn reads(&self) -> Result<(), Unready> {
        match self.0.all.load(Ordering::Acquire) {
            0 => Ok(()),
            _ => self.oldest(|scope| scope == Scope::All),
        }
    }

    /// What `look` finds in a state that may be made anew meanwhile: never a part of it, nor one that
    /// is not whole yet. Who makes it anew first [holds](Self::hold) a latch, then moves `epoch` on, and
    /// only then begins to remove what is there.
    ///
    /// # Errors
    /// Why reads may not be answered.
    pub fn read<T>(&self, epoch: impl Fn() -> u64, look: impl Fn() -> T) -> Result<T, Unready> {
        loop {
            let before = epoch();
            self.reads()?;
            let found = look();
            if epoch() == before {
                return Ok(found);
            }
        }
    }

    /// Whether writes may be answered.
    ///
    /// # Errors
    /// Why not: the latch held longest.
    pub fn writes(&self) -> Result<(), Unready> {
        self.reads()?;
        match self.0.writes.load(Ordering::Acquire) {
            0 => Ok(()),
            _ => self.oldest(|_| true),
        }
    }

    fn oldest(&self, wanted: impl Fn(Scope) -> bool) -> Result<(), Unready> {
        let held = self.0.held.lock();
        let oldest = held.iter().find(|held| wanted(held.scope));
        oldest.map_or(Ok(()), |held| Err(held.unready.clone()))
    }

    fn count(&self, scope: Scope) -> &AtomicUsize {
        match scope {
            Scope::All => &self.0.all,
            Scope::Writes => &self.0.writes,
        }
    }
}

impl Latch {
    /// The replica is unready for another reason now, without having been ready between.
    pub fn say(&self, state: &'static str, reason: impl Into<Arc<str>>) {
        let mut held = self.readiness.0.held.lock();
        if let Some(held) = held.iter_mut().find(|held| held.id == self.id) {
            let reason = reason.into();
            held.unready = Unready { state, reason };
        }
    }
}

impl Drop for Latch {
    fn drop(&mut self) {
        self.readiness
            .0
            .held
            .lock()
            .retain(|held| held.id != self.id);
        self.readiness
            .count(self.scope)
            .fetch_sub(1, Ordering::Release);
    }
}
