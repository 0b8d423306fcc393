//! Exponential backoff between attempts.

use std::time::Duration;

use tokio::time::Instant;

/// A pause that doubles with each attempt, from `min` to `max`.
pub(crate) struct Backoff {
    next: Duration,
    min: Duration,
    max: Duration,
}

impl Backoff {
    pub(crate) fn new(min: Duration, max: Duration) -> Self {
        Self {
            next: min,
            min,
            max,
        }
    }

    /// Makes the next pause `min` again.
    pub(crate) fn reset(&mut self) {
        self.next = self.min;
    }

    pub(crate) async fn pause(&mut self) {
        self.pause_after(Instant::now()).await;
    }

    /// Pauses until the backoff time has passed since `began`, when the failed attempt began.
    pub(crate) async fn pause_after(&mut self, began: Instant) {
        tokio::time::sleep_until(began + self.next).await;
        self.next = (self.next * 2).min(self.max);
    }
}
