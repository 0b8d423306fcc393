//! Keeps write health up to date while no client writes.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::broker::{BrokerError, InfoSource};
use super::shared::JetStreamShared;

/// How often the health of writes is checked.
const HEALTH_CHECK_EVERY: Duration = Duration::from_millis(250);
/// How often an unwritable stream is probed with an empty batch, and the info of an idle one
/// requested.
pub(super) const PROBE_EVERY: Duration = Duration::from_secs(1);

/// Reasons for an append without an answer.
pub(super) const UNANSWERED: &str = "NATS does not acknowledge batches";
const NO_QUORUM: &str =
    "the stream's leader does not acknowledge batches; check that a majority of its servers runs";
const NO_LEADER: &str =
    "the stream has no leader (election in progress?); check that a majority of its servers runs";

impl JetStreamShared {
    /// Keeps write health up to date. While no client writes, this requests the stream's info, and
    /// appends empty batches once the stream is unwritable.
    pub(super) async fn watch_health(self: Arc<Self>, stop: CancellationToken) {
        let probing = async {
            let mut every = tokio::time::interval(HEALTH_CHECK_EVERY);
            every.set_missed_tick_behavior(MissedTickBehavior::Delay);
            let mut probed_at = Instant::now();
            loop {
                every.tick().await;
                if probed_at.elapsed() < PROBE_EVERY {
                    continue;
                }
                let alone = self.appending.try_lock();
                // A batch in flight makes a probe unnecessary, unless it waits.
                if alone.is_ok() || self.health.waits_longer_than(PROBE_EVERY) {
                    self.probe(alone.is_ok()).await;
                    drop(alone);
                    probed_at = Instant::now();
                }
            }
        };
        let checking = async {
            let mut every = tokio::time::interval(HEALTH_CHECK_EVERY);
            every.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                every.tick().await;
                self.health.check();
            }
        };
        let both = async { tokio::join!(checking, probing) };
        stop.run_until_cancelled(both).await;
    }

    /// Requests the stream's info, and appends an empty batch if only that can show that writes are
    /// acknowledged. While a batch is in flight (not `alone`), this only looks for the cause.
    async fn probe(&self, alone: bool) {
        let Some(connection) = self.current_connection() else {
            return self.health.unreachable(self.down_reason());
        };
        let info = match self.fetch_info(&*connection).await {
            Ok(info) => info,
            Err(confirmed) => return self.health.unreachable(confirmed.to_string().into()),
        };
        match info {
            // Nothing is appended until the history is verified.
            Ok(_) if !self.same_history.get() => {
                let why = "the stream's history is not verified yet";
                self.health.unreachable(why.into());
            }
            Ok(info) if info.source != InfoSource::Follower => {
                if alone {
                    if !self.health.reachable() {
                        return;
                    }
                    let fenced = tokio::time::timeout(PROBE_EVERY, self.fence()).await;
                    if fenced.is_ok() {
                        return;
                    }
                }
                let why = match info.source {
                    InfoSource::Leader => NO_QUORUM,
                    _ => UNANSWERED,
                };
                self.health.unanswered(why, true);
            }
            Ok(_) => self.health.unreachable(NO_LEADER.into()),
            Err(BrokerError::NoAnswer(why) | BrokerError::NoResponders(why))
                if connection.is_clustered() =>
            {
                self.health
                    .unreachable(format!("{NO_LEADER} ({why})").into());
            }
            Err(error) => self.health.unreachable(error.to_string().into()),
        }
    }

    /// Appends an empty batch, if only that can show that the stream accepts batches.
    pub(super) async fn check_append(&self) {
        let _alone = self.appending.lock().await;
        if self.health.acknowledged() {
            return;
        }
        let fenced = tokio::time::timeout(PROBE_EVERY, self.fence()).await;
        if fenced.is_err() {
            self.health.unanswered(UNANSWERED, true);
        }
    }
}
