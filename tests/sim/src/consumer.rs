//! A consumer of the stream, as one connection sees it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use gradestore::log::Seq;
use gradestore::log::broker::{BrokerError, Consumer, Delivered};
use tokio::time::{Instant, sleep};

use crate::connection::ConnectionEnd;
use crate::message::Delivery;

/// A consumer without heartbeats has ended after this.
const HEARTBEATS_MISSED: Duration = Duration::from_secs(1);
/// The maximum number of messages that arrive at once.
pub const ARRIVE_MAX: usize = 6;

/// A consumer of one connection.
pub struct SimConsumer {
    pub client_end: ConnectionEnd,
    pub generation: u64,
    pub next_seq: Seq,
    /// Messages that have arrived and were not read yet.
    pub arrived: VecDeque<Delivered>,
    /// Since when no heartbeats arrive.
    pub silent_since: Option<Instant>,
    pub consumers: Arc<AtomicUsize>,
}

/// Whether a consumer has something to deliver.
enum Available {
    Messages,
    /// Only heartbeats.
    Heartbeats,
    /// Not even heartbeats.
    Silence,
    Deleted,
}

impl SimConsumer {
    fn available(&self) -> Available {
        let mut state = self.client_end.world.lock();
        let state = &mut *state;
        let (slot, broker) = (&state.nodes[self.client_end.node], &state.broker);
        if slot.consumer != self.generation {
            return Available::Deleted;
        }
        if slot.receives_nothing() {
            return Available::Silence;
        }
        if let Some(isolated) = slot.isolated_for(&self.client_end.link) {
            return match isolated.heartbeats {
                true => Available::Heartbeats,
                false => Available::Silence,
            };
        }
        let faults = &broker.faults;
        if faults.gone > 0 {
            return Available::Deleted;
        }
        match broker.visible_end() >= self.next_seq {
            true if faults.no_leader == 0 && !slot.loses_unread => Available::Messages,
            _ => Available::Heartbeats,
        }
    }

    async fn receive(&mut self) -> Result<(), BrokerError> {
        let error = |why: &str| Err(BrokerError::NoAnswer(why.into()));
        if self.client_end.link.ended.is_cancelled() {
            return error("the connection has ended");
        }
        match self.available() {
            Available::Messages => {
                self.silent_since = None;
                sleep(self.client_end.world.latency(self.client_end.node)).await;
                if matches!(self.available(), Available::Messages) {
                    self.deliver();
                }
                return Ok(());
            }
            Available::Heartbeats => self.silent_since = None,
            Available::Silence => {
                let since = *self.silent_since.get_or_insert_with(Instant::now);
                if since.elapsed() >= HEARTBEATS_MISSED {
                    return error("missed idle heartbeat");
                }
            }
            Available::Deleted => return error("consumer deleted"),
        }
        tokio::select! {
            biased;
            () = self.client_end.link.ended.cancelled() => {}
            () = self.client_end.world.wait() => {}
        }
        Ok(())
    }

    /// Delivers some messages.
    fn deliver(&mut self) {
        let mut state = self.client_end.world.lock();
        let state = &mut *state;
        let slot = &mut state.nodes[self.client_end.node];
        let (broker, end) = (&state.broker, state.broker.visible_end());
        // Messages were trimmed before the consumer reached them, so there is a gap.
        if self.next_seq < broker.first() {
            slot.losses += 1;
            self.next_seq = broker.first();
        }
        let delivered = |seq: Seq| {
            let entry = broker.get(seq)?;
            let Delivery::Ordinary(headers) = &entry.delivery else {
                return None;
            };
            Some(Delivered {
                seq,
                time_ns: entry.time_ns,
                pending: end - seq,
                headers: headers.clone(),
                payload: entry.payload(),
            })
        };
        if std::mem::take(&mut slot.repeat_next_delivery) {
            self.arrived.extend(delivered(self.next_seq - 1));
        }
        // The last message is not dropped: without a later one the gap would not be visible.
        if self.next_seq < end && std::mem::take(&mut slot.drop_next_delivery) {
            slot.losses += 1;
            self.next_seq += 1;
        }
        for _ in 0..state.rng.usize(1..=ARRIVE_MAX) {
            let Some(entry) = broker.get(self.next_seq).filter(|_| self.next_seq <= end) else {
                break;
            };
            match entry.delivery {
                Delivery::Ordinary(_) => self.arrived.extend(delivered(self.next_seq)),
                Delivery::Status => {}
                Delivery::EndsConnection => {
                    self.client_end.link.end(&mut state.rng);
                    break;
                }
            }
            self.next_seq += 1;
        }
    }
}

impl Consumer for SimConsumer {
    fn next(&mut self) -> BoxFuture<'_, Result<Delivered, BrokerError>> {
        async {
            loop {
                if let Some(delivered) = self.arrived.pop_front() {
                    return Ok(delivered);
                }
                self.receive().await?;
            }
        }
        .boxed()
    }

    fn try_next(&mut self) -> Option<Result<Delivered, BrokerError>> {
        self.arrived.pop_front().map(Ok)
    }
}

impl Drop for SimConsumer {
    fn drop(&mut self) {
        self.consumers.fetch_sub(1, Ordering::Relaxed);
    }
}
