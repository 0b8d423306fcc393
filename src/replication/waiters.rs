//! Tasks that wait for a position, ordered by that position.
//!
//! Applying a batch wakes the waiters whose position it reached and touches no other. A batch that
//! reaches none costs one fence and one load, however many wait: `load/waiters.py` measures it.

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::task::{Context, Poll, Waker};

use crate::log::Seq;
use crate::sys::sync::Mutex;
use crate::sys::sync::atomic::{AtomicU64, Ordering, fence};

/// Waiters removed under one lock; they are woken after it is released.
const WAKE_MAX: usize = 64;

/// The waiters of one replica.
pub(super) struct Waiters {
    /// The lowest position in `waiting`, [`Seq::MAX`] if it is empty. Changes only under the lock.
    lowest: AtomicU64,
    waiting: Mutex<WakerQueue>,
}

#[derive(Default)]
struct WakerQueue {
    /// By position, then by id: several may wait for one position.
    wakers: BTreeMap<(Seq, u64), Waker>,
    last_id: u64,
}

/// The maximum number of waiters is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TooManyWaiters;

impl Waiters {
    pub(super) fn new() -> Self {
        Self {
            lowest: AtomicU64::new(Seq::MAX),
            waiting: Mutex::new(WakerQueue::default()),
        }
    }

    /// Wakes the waiters for `reached` and for the positions before it. The caller must have stored
    /// `reached` where `is_reached` of [`wait`](Self::wait) finds it.
    pub(super) fn wake(&self, reached: Seq) {
        // Pairs with the fence in `Waiter::poll`: either the load below sees that waiter's
        // position, or the waiter sees the position stored before this fence.
        fence(Ordering::SeqCst);
        if reached < self.lowest.load(Ordering::Relaxed) {
            return;
        }
        let mut woken = Vec::new();
        loop {
            self.update(|waiting| {
                while woken.len() < WAKE_MAX
                    && let Some(first) = waiting.wakers.first_entry()
                    && first.key().0 <= reached
                {
                    woken.push(first.remove());
                }
            });
            let all = woken.len() < WAKE_MAX;
            woken.drain(..).for_each(Waker::wake);
            if all {
                return;
            }
        }
    }

    /// Waits for `position`, until `is_reached` returns true. Dropping the future removes the
    /// waiter.
    ///
    /// # Errors
    /// There are `waiters_max` waiters already.
    pub(super) async fn wait(
        &self,
        position: Seq,
        waiters_max: usize,
        is_reached: impl Fn() -> bool,
    ) -> Result<(), TooManyWaiters> {
        let mut waiter = Waiter {
            waiters: self,
            position,
            id: None,
        };
        poll_fn(|cx| waiter.poll(cx, waiters_max, &is_reached)).await
    }

    /// The number of waiters.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.waiting.lock().wakers.len()
    }

    fn update<T>(&self, change: impl FnOnce(&mut WakerQueue) -> T) -> T {
        let mut waiting = self.waiting.lock();
        let changed = change(&mut waiting);
        let first = waiting.wakers.first_key_value();
        let lowest = first.map_or(Seq::MAX, |((position, _), _)| *position);
        self.lowest.store(lowest, Ordering::Relaxed);
        changed
    }
}

/// One waiter. `id` is `None` until it has been added.
struct Waiter<'a> {
    waiters: &'a Waiters,
    position: Seq,
    id: Option<u64>,
}

impl Waiter<'_> {
    fn poll(
        &mut self,
        cx: &Context<'_>,
        waiters_max: usize,
        is_reached: impl Fn() -> bool,
    ) -> Poll<Result<(), TooManyWaiters>> {
        if is_reached() {
            return Poll::Ready(Ok(()));
        }
        if let Err(error) = self.add(cx.waker().clone(), waiters_max) {
            return Poll::Ready(Err(error));
        }
        // Pairs with the fence in `Waiters::wake`.
        fence(Ordering::SeqCst);
        match is_reached() {
            true => Poll::Ready(Ok(())),
            false => Poll::Pending,
        }
    }

    /// Adds this waiter, or replaces its waker.
    fn add(&mut self, waker: Waker, waiters_max: usize) -> Result<(), TooManyWaiters> {
        let position = self.position;
        let replaced = self.waiters.update(|waiting| {
            let added = self
                .id
                .filter(|id| waiting.wakers.contains_key(&(position, *id)));
            if added.is_none() && waiting.wakers.len() >= waiters_max {
                return Err(TooManyWaiters);
            }
            let id = added.unwrap_or(waiting.last_id + 1);
            waiting.last_id = waiting.last_id.max(id);
            self.id = Some(id);
            Ok(waiting.wakers.insert((position, id), waker))
        });
        // Dropping the old waker may free its task, so that happens after the lock is released.
        replaced.map(drop)
    }
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            let key = (self.position, id);
            let removed = self.waiters.update(|waiting| waiting.wakers.remove(&key));
            drop(removed);
        }
    }
}
