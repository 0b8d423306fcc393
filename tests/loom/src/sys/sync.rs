//! Replaces `src/sys/sync.rs`.

use loom::sync::MutexGuard;
pub(crate) use loom::sync::atomic;

/// loom's mutex with parking_lot's interface, without poisoning.
#[derive(Default)]
pub(crate) struct Mutex<T>(loom::sync::Mutex<T>);

impl<T> Mutex<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(loom::sync::Mutex::new(value))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        self.0.lock().unwrap()
    }
}
