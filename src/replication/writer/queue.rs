//! Requests that wait for a batch, and the bounds on them.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::OwnedSemaphorePermit;

use super::WriteError;
use crate::grade::Write;
use crate::log::WaitingRequest;

/// A request that waits for a batch, and its writes.
pub(super) struct QueuedRequest {
    pub(super) writes: RequestWrites,
    pub(super) request: WaitingRequest,
}

pub(super) enum RequestWrites {
    One(Write),
    /// All writes go into one batch.
    Group {
        writes: Vec<Write>,
        /// The bulk writer's permit, in case that is dropped while the group waits.
        _permit: Arc<OwnedSemaphorePermit>,
    },
}

impl RequestWrites {
    pub(super) fn all(&self) -> &[Write] {
        match self {
            Self::One(write) => std::slice::from_ref(write),
            Self::Group { writes, .. } => writes,
        }
    }

    /// Their approximate memory in bytes.
    pub(super) fn bytes(&self) -> usize {
        let bytes = |write: &Write| size_of::<Write>() + write.user_id().len();
        self.all().iter().map(bytes).sum()
    }

    pub(super) fn append_to(self, batch: &mut Vec<Write>) {
        match self {
            Self::One(write) => batch.push(write),
            Self::Group { writes, .. } => batch.extend(writes),
        }
    }
}

/// Counts the requests that wait for a batch, and their bytes.
pub(super) struct QueueUsage {
    pub(super) requests: AtomicUsize,
    pub(super) bytes: AtomicUsize,
    pub(super) requests_max: usize,
    pub(super) bytes_max: usize,
}

impl QueueUsage {
    /// Admits `writes` if there is space. A single request always fits an empty queue.
    pub(super) fn admit(&self, writes: &RequestWrites) -> Result<(), WriteError> {
        let bytes = writes.bytes();
        let requests_before = self.requests.fetch_add(1, Ordering::AcqRel);
        let bytes_before = self.bytes.fetch_add(bytes, Ordering::AcqRel);
        let full = requests_before >= self.requests_max
            || (bytes_before > 0 && bytes_before + bytes > self.bytes_max);
        match full {
            true => {
                self.release(1, bytes);
                Err(WriteError::QueueFull)
            }
            false => Ok(()),
        }
    }

    pub(super) fn release(&self, requests: usize, bytes: usize) {
        self.requests.fetch_sub(requests, Ordering::AcqRel);
        self.bytes.fetch_sub(bytes, Ordering::AcqRel);
    }
}

/// How many of `waiting` go into one batch: as many as fit, and the first in any case.
pub(super) fn fitting(waiting: &[QueuedRequest], writes_max: usize) -> usize {
    let mut writes = 0;
    let fit = waiting.iter().take_while(|waiting| {
        writes += waiting.writes.all().len();
        writes <= writes_max
    });
    fit.count().max(waiting.len().min(1))
}
