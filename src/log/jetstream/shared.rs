//! The state that the tasks of the log share.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;
use tokio::sync::Notify;

use super::announcements::Announcements;
use super::broker::{Broker, BrokerConnection};
use super::config::JetStreamConfig;
use super::ordered_watch::OrderedWatch;
use super::suspicion::Suspicion;
use super::write_health::WriteHealth;
use crate::log::wal::ReplicaWal;
use crate::log::{BatchId, InFlight, LogId, RandomId, Seq};

/// State shared by the log, its connection and its subscriptions.
pub(super) struct JetStreamShared {
    pub(super) config: JetStreamConfig,
    pub(super) broker: Arc<dyn Broker>,
    pub(super) announcements: Announcements,
    /// This process.
    pub(super) node: RandomId,
    pub(super) replica: RandomId,
    pub(super) id: LogId,
    pub(super) first: AtomicU64,
    pub(super) end: AtomicU64,
    pub(super) connection_status: OrderedWatch<ConnectionStatus>,
    pub(super) in_flight: InFlight,
    /// The id of the last batch: this process' writer id and the number of batches sent under it.
    pub(super) writer: Mutex<BatchId>,
    /// Held while a batch is appended.
    pub(super) appending: tokio::sync::Mutex<()>,
    pub(super) health: WriteHealth,
    /// The last batch that a subscription has delivered.
    pub(super) delivered: OrderedWatch<Seq>,
    /// Tells the subscription to replace its consumer, which does not deliver a stored batch.
    pub(super) replace_consumer: Notify,
    pub(super) suspicion: Mutex<Suspicion>,
    /// Whether the stream was compared over this connection with the batches that were read.
    pub(super) compared: AtomicBool,
    /// Whether the histories were the same and there is no suspicion since. Until then nothing is
    /// appended: the stream might hold another log.
    pub(super) same_history: OrderedWatch<bool>,
    /// Whether the stream is known to hold the batches that this replica has applied.
    pub(super) verified: AtomicBool,
    pub(super) counts: EventCounters,
    pub(super) wal: Option<Arc<ReplicaWal>>,
    /// Whether the subscription reads the stream: it has read the WAL and has had a consumer.
    pub(super) reads_stream: OrderedWatch<bool>,
}

#[derive(Default)]
pub(super) struct EventCounters {
    pub(super) reconnects: AtomicU64,
    pub(super) resumes: AtomicU64,
    pub(super) resends: AtomicU64,
    pub(super) redeliveries: AtomicU64,
    pub(super) poisoned: AtomicU64,
}

#[derive(Clone)]
pub(super) enum ConnectionStatus {
    /// Connected.
    Up(Arc<dyn BrokerConnection>),
    /// Not connected, for this reason.
    Down(Arc<str>),
}

impl JetStreamShared {
    /// Waits for a connection.
    pub(super) async fn connection(&self) -> Arc<dyn BrokerConnection> {
        let alive = |status| match status {
            ConnectionStatus::Up(connection) if !connection.ended().is_cancelled() => {
                Some(connection)
            }
            _ => None,
        };
        self.connection_status.wait_for(alive).await
    }

    /// The connection, if there is one.
    pub(super) fn current_connection(&self) -> Option<Arc<dyn BrokerConnection>> {
        match self.connection_status.get() {
            ConnectionStatus::Up(connection) => Some(connection),
            ConnectionStatus::Down(_) => None,
        }
    }

    pub(super) fn set_down(&self, why: &str) {
        self.compared.store(false, Ordering::Release);
        self.same_history.set(false);
        self.connection_status
            .set(ConnectionStatus::Down(why.into()));
    }

    /// Why nothing could be sent.
    pub(super) fn down_reason(&self) -> Arc<str> {
        match self.connection_status.get() {
            ConnectionStatus::Up(_) => "NATS does not answer".into(),
            ConnectionStatus::Down(why) => why,
        }
    }

    /// The identity of this process' next batch.
    pub(super) fn next_batch_id(&self) -> BatchId {
        let mut writer = self.writer.lock();
        writer.seq += 1;
        *writer
    }

    /// Gives this process a new writer id, because another publisher uses its batch ids.
    pub(super) fn renew_writer(&self) -> RandomId {
        let mut writer = self.writer.lock();
        // Without random bytes, skip to sequence numbers that are unlikely to be in use.
        match self.broker.random_id() {
            Ok(id) => *writer = BatchId { writer: id, seq: 0 },
            Err(error) => {
                tracing::error!(%error, "cannot get random bytes for a new writer id");
                writer.seq += 1 << 32;
            }
        }
        writer.writer
    }
}
