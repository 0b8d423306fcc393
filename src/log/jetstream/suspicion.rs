//! A suspicion that the stream has lost its history, until it is confirmed.

use std::mem::{Discriminant, discriminant};
use std::time::Duration;

use tokio::time::Instant;

use crate::log::ReadError;

/// How long the leader must report the same before a suspicion is confirmed.
pub(super) const CONFIRM_AFTER: Duration = Duration::from_secs(30);

/// The last suspicion, and since when the leader has confirmed it.
#[derive(Default)]
pub(super) struct Suspicion(Option<(Discriminant<ReadError>, Instant)>);

impl Suspicion {
    pub(super) fn clear(&mut self) {
        self.0 = None;
    }

    /// Notes that the leader reports `error`. Returns whether it has done so for [`CONFIRM_AFTER`].
    pub(super) fn confirm(&mut self, error: &ReadError) -> bool {
        let kind = discriminant(error);
        match self.0 {
            Some((same, since)) if same == kind => since.elapsed() >= CONFIRM_AFTER,
            _ => {
                tracing::warn!(%error, "stream may have lost batches, waiting for confirmation");
                self.0 = Some((kind, Instant::now()));
                false
            }
        }
    }
}
