//! The atomics and the lock of [`readiness`](crate::replication::state) and `replication::waiters`.
//! `tests/loom` replaces them with its own.

pub(crate) use std::sync::atomic;

pub(crate) use parking_lot::Mutex;
