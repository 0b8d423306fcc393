//! A value that tasks can wait for.

use std::pin::pin;

use parking_lot::Mutex;
use tokio::sync::Notify;

/// Wakes waiting tasks in the order in which they began to wait, so that a simulated run can be
/// repeated. `tokio::sync::watch` wakes them in random order.
pub(super) struct OrderedWatch<T> {
    value: Mutex<T>,
    changed: Notify,
}

impl<T: Clone> OrderedWatch<T> {
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

    /// Waits until `find` returns something for the value. Cancel-safe.
    pub(super) async fn wait_for<R>(&self, find: impl Fn(T) -> Option<R>) -> R {
        loop {
            let mut changed = pin!(self.changed.notified());
            // Before the check, so that no change between the check and the wait is missed.
            changed.as_mut().enable();
            if let Some(found) = find(self.get()) {
                return found;
            }
            changed.await;
        }
    }
}
