//! The log of a cluster: a JetStream stream, whose sequence numbers are the order that all replicas
//! share.
//!
//! - `broker`: the NATS operations that the log uses, as traits; `nats`: the real client.
//! - `servers`: the servers' URLs; `stream`: the stream's configuration.
//! - `creation`: opening the stream, and who may create it; `setup_error`: why it can't be opened.
//! - `shared`: the state that the tasks below share; `config`: the settings.
//! - `session`: keeps one connection; `write_health`: whether writes are acknowledged; `probe`:
//!   checks that while no client writes.
//! - `append`: sends a batch until its outcome is known; it is stored at most once.
//! - `subscription`: one consumer per replica, recreated after the last batch read; `history`:
//!   whether the stream still is the one that this replica has read; `suspicion`: doubts about
//!   that.
//! - `wal_then_stream`: reads the replica's WAL before the stream.
//! - `announcements`: verifies announcements of other replicas.
//! - `message`: encodes a batch as a message; `header_block`, `raw_message`: read messages that the
//!   client library cannot.
//! - `ordered_watch`: values that tasks wait for.

mod announcements;
mod append;
pub mod broker;
mod config;
mod creation;
pub mod header_block;
mod history;
pub mod message;
mod nats;
mod ordered_watch;
mod probe;
pub mod raw_message;
mod servers;
mod session;
mod setup_error;
mod shared;
mod stream;
mod subscription;
mod suspicion;
mod wal_then_stream;
mod write_health;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio_util::sync::{CancellationToken, DropGuard};

use self::announcements::Announcements;
use self::broker::{Broker, PeerQuery};
pub use self::config::JetStreamConfig;
pub use self::creation::{AskNode, ExistingData, ReplicaIdentity, ReportWait};
use self::ordered_watch::OrderedWatch;
pub use self::servers::Servers;
pub use self::setup_error::SetupError;
use self::shared::{ConnectionStatus, EventCounters, JetStreamShared};
use self::subscription::JetStreamSubscription;
use self::wal_then_stream::WalThenStream;
use self::write_health::WriteHealth;
use super::wal::ReplicaWal;
use super::{
    Announce, Announcement, Answers, AppendError, Batch, BatchId, Bounds, Entry, InFlight, Log,
    LogCounts, LogId, Position, ReadError, Seq, Subscription, TrimError, WalConfig, WalStatus,
};
use crate::sys::tasks::{CriticalTasks, TaskEnded};

/// While one batch is in flight the next one fills. A second one in flight would make both smaller:
/// with `sync_interval: always` it costs 7 to 53 % of the writes per second (ADR 0009).
const IN_FLIGHT_MAX: usize = 1;
/// A log in a JetStream stream.
pub struct JetStreamLog {
    shared: Arc<JetStreamShared>,
    tasks: CriticalTasks,
    /// Ends the log's tasks and its connection.
    stop: CancellationToken,
    /// Cancels `stop` when the log is dropped.
    _guard: DropGuard,
}

impl JetStreamLog {
    /// The log on NATS servers; see [`open_on`](Self::open_on).
    ///
    /// # Errors
    /// See [`SetupError`].
    pub async fn open(
        config: JetStreamConfig,
        identity: ReplicaIdentity,
        in_flight: InFlight,
        base: Option<Seq>,
        report_wait: ReportWait,
    ) -> Result<Self, SetupError> {
        let broker = Arc::new(nats::Nats::new(config.clone(), identity.replica));
        Self::open_on(broker, config, identity, in_flight, base, report_wait).await
    }

    /// Connects, and opens or creates the stream. Waits up to 30 s for NATS to answer, and without
    /// limit for a stream that this replica may not create. With a `base` the stream must be new,
    /// and its first batch will be `base` + 1.
    ///
    /// # Errors
    /// See [`SetupError`].
    pub async fn open_on(
        broker: Arc<dyn Broker>,
        config: JetStreamConfig,
        identity: ReplicaIdentity,
        in_flight: InFlight,
        base: Option<Seq>,
        report_wait: ReportWait,
    ) -> Result<Self, SetupError> {
        let announcements = Announcements::new(identity.key.clone());
        let opened = creation::open(
            &*broker,
            &config,
            &identity,
            &announcements,
            base,
            &report_wait,
        )
        .await?;
        let wal = match &config.wal {
            Some(wal) => Some(open_wal(wal, &opened.id).await?),
            None => None,
        };
        let wal_end = wal.as_ref().map_or(0, |wal| wal.known_end());
        let shared = Arc::new(JetStreamShared {
            wal: wal.clone(),
            health: WriteHealth::new(config.write_silence_max),
            announcements,
            config,
            broker,
            node: identity.node,
            replica: identity.replica,
            id: opened.id,
            first: AtomicU64::new(opened.first),
            // A stream that ends before the WAL has lost batches. Nothing may take their places.
            end: AtomicU64::new(opened.last.max(wal_end)),
            reads_stream: OrderedWatch::new(false),
            connection_status: OrderedWatch::new(ConnectionStatus::Up(Arc::clone(
                &opened.connection,
            ))),
            in_flight,
            writer: Mutex::new(BatchId {
                writer: identity.node,
                seq: 0,
            }),
            appending: tokio::sync::Mutex::default(),
            delivered: OrderedWatch::new(0),
            replace_consumer: Notify::new(),
            suspicion: Mutex::default(),
            compared: AtomicBool::new(false),
            same_history: OrderedWatch::new(false),
            verified: AtomicBool::new(false),
            counts: EventCounters::default(),
        });
        let stop = CancellationToken::new();
        let connected =
            session::keep_connected(Arc::clone(&shared), opened.connection, stop.clone());
        let tasks = CriticalTasks::default();
        tasks.spawn("connection to NATS", connected);
        let watch = JetStreamShared::watch_health(Arc::clone(&shared), stop.clone());
        tasks.spawn("write health", watch);
        if let Some(wal) = wal {
            let stop = stop.clone();
            tasks.spawn(
                "WAL",
                async move { stop.run_until_cancelled(wal.run()).await },
            );
        }
        Ok(Self {
            shared,
            tasks,
            stop: stop.clone(),
            _guard: stop.drop_guard(),
        })
    }
}

/// Opens the WAL of log `id`.
async fn open_wal(config: &WalConfig, id: &LogId) -> Result<Arc<ReplicaWal>, SetupError> {
    let (dir, pool, id) = (config.dir.clone(), config.pool.clone(), id.clone());
    let config = config.clone();
    let opened = pool.run(move || ReplicaWal::open(config, &id)).await;
    let opened = opened.flatten();
    opened
        .map(Arc::new)
        .map_err(|error| SetupError::Wal { dir, error })
}

impl JetStreamLog {
    fn unwritable_wal(&self) -> Option<Arc<str>> {
        self.shared.wal.as_ref()?.unwritable()
    }
}

impl Log for JetStreamLog {
    fn kind(&self) -> &'static str {
        "jetstream"
    }

    fn id(&self) -> LogId {
        self.shared.id.clone()
    }

    fn first(&self) -> Seq {
        self.shared.first.load(Ordering::Acquire)
    }

    fn end(&self) -> Seq {
        self.shared.end.load(Ordering::Acquire)
    }

    fn in_flight_max(&self) -> usize {
        IN_FLIGHT_MAX
    }

    fn append(&self, batch: Batch) -> BoxFuture<'_, Result<(), AppendError>> {
        self.shared.append(batch).boxed()
    }

    fn unwritable(&self) -> Option<Arc<str>> {
        self.shared
            .health
            .reason()
            .or_else(|| self.unwritable_wal())
    }

    fn reject(&self) -> Option<Arc<str>> {
        self.shared
            .health
            .reject()
            .or_else(|| self.unwritable_wal())
    }

    fn check_append(&self) {
        let (shared, stop) = (Arc::clone(&self.shared), self.stop.child_token());
        let check = async move { stop.run_until_cancelled(shared.check_append()).await };
        self.tasks.spawn("check of appends", check);
    }

    fn failed(&self) -> BoxFuture<'_, TaskEnded> {
        self.tasks.failed().boxed()
    }

    fn problem(&self) -> Option<Arc<str>> {
        self.shared.health.problem()
    }

    fn is_verified(&self) -> bool {
        self.shared.verified.load(Ordering::Relaxed)
    }

    fn set_verified(&self) {
        self.shared.verified.store(true, Ordering::Relaxed);
    }

    fn subscribe(
        &self,
        after: Position,
    ) -> BoxFuture<'_, Result<Box<dyn Subscription>, ReadError>> {
        async move {
            let shared = Arc::clone(&self.shared);
            Ok(match shared.wal.clone() {
                Some(wal) => Box::new(WalThenStream::start(shared, wal, after).await?)
                    as Box<dyn Subscription>,
                None => Box::new(JetStreamSubscription::start(shared, after).await?),
            })
        }
        .boxed()
    }

    fn fetch_bounds(&self) -> BoxFuture<'_, Result<Bounds, ReadError>> {
        async {
            let mut bounds = self.shared.bounds().await?;
            if let Some(wal) = &self.shared.wal {
                bounds.first = wal.first(bounds.first);
                // Where the stream should end.
                bounds.end = bounds.end.max(wal.known_end());
            }
            Ok(bounds)
        }
        .boxed()
    }

    fn trim(&self, through: Seq) -> BoxFuture<'_, Result<(), TrimError>> {
        async move {
            let failed = |error: std::io::Error| TrimError::Failed(error.to_string().into());
            match &self.shared.wal {
                Some(wal) => wal.trim(through).await.map_err(failed),
                None => Ok(()),
            }
        }
        .boxed()
    }

    fn record(&self, previous: &Position, entry: &Entry, own: Option<Answers>) {
        match (&self.shared.wal, own) {
            (Some(wal), own) => wal.record(previous, entry, own),
            (None, Some(own)) => own.send(&Ok(entry.position.seq)),
            (None, None) => {}
        }
    }

    fn quarantine_wal(&self, why: &'static str) -> BoxFuture<'_, ()> {
        async move {
            if let Some(wal) = &self.shared.wal {
                wal.quarantine(why).await;
            }
        }
        .boxed()
    }

    fn sync_wal(&self) -> BoxFuture<'_, ()> {
        async {
            if let Some(wal) = &self.shared.wal {
                wal.flush().await;
            }
        }
        .boxed()
    }

    fn wal_replayed(&self) -> BoxFuture<'_, ()> {
        let reads_stream = &self.shared.reads_stream;
        reads_stream.wait_for(|reads| reads.then_some(())).boxed()
    }

    fn wal_status(&self) -> Option<WalStatus> {
        self.shared.wal.as_ref().map(|wal| wal.status())
    }

    fn announce(&self, announce: Announce) {
        let (shared, stop) = (Arc::clone(&self.shared), self.stop.child_token());
        self.tasks.spawn("announcements", async move {
            let announced = async {
                let stop = stop.clone();
                let mut backoff = session::backoff();
                loop {
                    let connection = shared.connection().await;
                    match connection
                        .announce(Arc::clone(&announce), stop.clone())
                        .await
                    {
                        Ok(()) => backoff.reset(),
                        Err(error) => tracing::warn!(error, "cannot announce this replica"),
                    }
                    backoff.pause().await;
                }
            };
            stop.run_until_cancelled(announced).await
        });
    }

    fn peers(&self) -> BoxFuture<'_, Vec<Announcement>> {
        async {
            let Some(connection) = self.shared.current_connection() else {
                return Vec::new();
            };
            let (broker, announcements) = (&*self.shared.broker, &self.shared.announcements);
            match announcements
                .ask(broker, &*connection, PeerQuery::All)
                .await
            {
                Ok(mut found) => {
                    let me = self.shared.node.to_string();
                    found.retain(|peer| *peer.node != *me && peer.log_id == self.shared.id.0);
                    let replica = self.shared.replica.to_string();
                    if let Some(copy) = found.iter().find(|peer| *peer.replica == *replica) {
                        announcements.report_copy(copy);
                    }
                    found
                }
                Err(error) => {
                    tracing::debug!(error, "cannot discover other replicas");
                    Vec::new()
                }
            }
        }
        .boxed()
    }

    fn is_replicated(&self) -> bool {
        true
    }

    fn counts(&self) -> LogCounts {
        let counts = &self.shared.counts;
        let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
        LogCounts {
            reconnects: load(&counts.reconnects),
            resumes: load(&counts.resumes),
            resends: load(&counts.resends),
            redeliveries: load(&counts.redeliveries),
            poisoned: load(&counts.poisoned),
            forged_announcements: self.shared.announcements.forged(),
        }
    }
}
