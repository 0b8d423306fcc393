//! A handle to a complete state, for scans during which the state may be replaced.

use crate::replication::state::{CompleteEpoch, Readiness, Unready};
use crate::store::Store;

/// A state of a store that was complete when this handle was made. Scan it, then
/// [check](Self::check) that the scan saw this state only.
#[derive(Clone)]
pub struct CompleteState {
    store: Store,
    epoch: CompleteEpoch,
}

/// The state was discarded since.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the state was replaced meanwhile")]
pub struct StateReplaced;

impl CompleteState {
    /// The current state of `store`.
    ///
    /// # Errors
    /// Why the replica is not ready.
    pub fn of(store: &Store, readiness: &Readiness) -> Result<Self, Unready> {
        let epoch = readiness.complete_epoch(|| store.epoch())?;
        let store = store.clone();
        Ok(Self { store, epoch })
    }

    /// The current state of `store`, which is complete although the replica is not ready. Only the
    /// task that replaces the state knows that.
    #[must_use]
    pub fn known(store: &Store) -> Self {
        let (store, epoch) = (store.clone(), CompleteEpoch::known(store.epoch()));
        Self { store, epoch }
    }

    /// The records.
    #[must_use]
    pub const fn store(&self) -> &Store {
        &self.store
    }

    /// Checks that the store still holds this state.
    ///
    /// # Errors
    /// It was replaced.
    pub fn check(&self) -> Result<(), StateReplaced> {
        match self.epoch.is(self.store.epoch()) {
            true => Ok(()),
            false => Err(StateReplaced),
        }
    }
}
