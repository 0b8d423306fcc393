//! What threads share [`readiness`](crate::readiness) by. `tests/loom` puts its own in place of this one.

pub(crate) use std::sync::atomic;

pub(crate) use parking_lot::Mutex;
