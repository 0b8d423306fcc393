//! A value that tasks wait for.

use std::pin::pin;

use parking_lot::Mutex;
use tokio::sync::Notify;

/// A value that tasks wait for. `tokio::sync::watch` wakes those that wait in random order; this
/// wakes them in the order in which they came, so that a simulated history can be repeated.
pub(super) struct Watched<T> {
    value: Mutex<T>,
    changed: Notify,
}

impl<T: Clone> Watched<T> {
    pub(super) fn new(value: T) -> Self {
        Self {
            value: Mutex::new(value),
            changed: Notify::new(),
        }
    }

    pub(super) fn get(&self) -> T {
        self.value.lock().clone()
    }

    pub(super) fn set(&self, value: T) {
        *self.value.lock() = value;
        self.changed.notify_waiters();
    }

    /// Waits until `find` finds something in the value. Cancel-safe.
    pub(super) async fn wait_for<R>(&self, find: impl Fn(T) -> Option<R>) -> R {
        loop {
            let mut changed = pin!(self.changed.notified());
            // Before the look, so that no change is missed between the look and the wait.
            changed.as_mut().enable();
            if let Some(found) = find(self.get()) {
                return found;
            }
            changed.await;
        }
    }
}
