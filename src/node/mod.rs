//! A node: its components, the routes of its ports, and its tasks.
//!
//! [`lifecycle`] starts and stops one with sockets and metrics.

pub mod config;
pub mod data_dir;
pub mod lifecycle;
mod restore_report;
mod restored_from;
pub mod sd_notify;
mod seed;
pub mod signals;
mod storage_error;
mod tasks;

use std::sync::Arc;

use axum::Router;
use tokio::sync::Semaphore;

use crate::http::backup::{self, BackupMetrics, BackupState};
use crate::http::fast::FastRoute;
use crate::http::get::{self, ReadState};
use crate::http::health;
use crate::http::ops::traffic::RecentTraffic;
use crate::http::ops::{OpsState, Port};
use crate::http::set::{self, WriteState};
use crate::http::{Credentials, HttpMetrics, RequestCount};
use crate::log::{Announcement, ClusterKey, Log, Position, RandomId};
use crate::node::config::{Config, HttpConfig};
use crate::node::data_dir::Storage;
use crate::replication::memory::MemoryGuard;
use crate::replication::peer_client::PeerClient;
use crate::replication::state::{NodeState, Readiness};
use crate::replication::{
    AppliedIndex, Applier, Bootstrap, Checkpoints, CompleteState, LastSnapshot, Peers,
    ReplicaDriver, RestoreTracker, Snapshotter, Writer,
};
use crate::store::Store;
use crate::sys::exec::Blocking;
use crate::sys::tasks::CriticalTasks;
use crate::telemetry::{ReplicationMetrics, Telemetry};

pub use tasks::{FinalSnapshot, NodeTasks, StartError};

/// The resources that a node is built from, besides its configuration.
pub struct NodeResources {
    /// The id of this process.
    pub node: RandomId,
    /// When this process started, in nanoseconds since 1970.
    pub started_ns: u64,
    /// An empty store.
    pub store: Store,
    /// Watches the tasks that a node can't run without.
    pub critical: CriticalTasks,
    /// The log and the snapshots.
    pub storage: Storage,
    /// The client for other nodes.
    pub peers: Arc<dyn PeerClient>,
    /// Threads for blocking jobs.
    pub blocking: Blocking,
    /// Threads of low priority: for snapshots, and for backups that bootstrap other replicas.
    pub background: Blocking,
    /// Threads of idle priority: for other backups.
    pub idle: Blocking,
    /// The metrics of backups.
    pub backup_metrics: BackupMetrics,
    /// Counts the answered requests.
    pub request_count: RequestCount,
}

/// A node's components.
pub struct Node {
    /// The records.
    pub store: Store,
    /// The position of the records.
    pub applied: AppliedIndex,
    /// The log that the replica applies.
    pub log: Arc<dyn Log>,
    /// Whether the node serves requests.
    pub readiness: Readiness,
    /// Submits writes.
    pub writer: Writer,
    /// The progress of a restore.
    pub restore: RestoreTracker,
    /// Whether writes may create records.
    pub memory: MemoryGuard,
    name: Arc<str>,
    replica: RandomId,
    key: ClusterKey,
    credentials: Credentials,
    http: HttpConfig,
    peers: Peers,
    snapshotter: Option<Snapshotter>,
    last_snapshot: LastSnapshot,
    blocking: Blocking,
    background: Blocking,
    idle: Blocking,
    backup_metrics: BackupMetrics,
    request_count: RequestCount,
    /// Keeps the data directory locked.
    storage: Storage,
}

impl Node {
    /// A node whose tasks wait to be [run](NodeTasks::run).
    #[must_use]
    pub fn new(
        config: &Config,
        resources: NodeResources,
        metrics: &ReplicationMetrics,
    ) -> (Self, NodeTasks) {
        let NodeResources { node, storage, .. } = resources;
        let (log, cluster) = (Arc::clone(&storage.log), &config.cluster);
        let (store, in_flight) = (resources.store, storage.in_flight.clone());
        let position = Position::base(&log.id(), 0, resources.started_ns);
        let applied = AppliedIndex::new(position);
        let last_snapshot = LastSnapshot::default();
        let key = config.credentials.cluster_key();
        let checkpoints = Checkpoints::new(
            storage.replica,
            log.id(),
            key.clone(),
            log.is_replicated().then_some(cluster.checkpoint_interval),
            metrics.checkpoints.clone(),
        );
        let (writer, writer_task) = Writer::new(
            Arc::clone(&log),
            in_flight,
            checkpoints.clone(),
            config.writer,
            metrics.batch_writes.clone(),
        );
        let snapshotter = storage
            .snapshots
            .as_ref()
            .map(|(snapshots, _)| Snapshotter {
                store: store.clone(),
                applied: applied.clone(),
                log: Arc::clone(&log),
                snapshots: snapshots.clone(),
                last: last_snapshot.clone(),
                writing: Arc::default(),
                blocking: resources.background.clone(),
            });
        let static_peers = cluster.peers.clone();
        let node = Self {
            store,
            applied,
            readiness: Readiness::starting("looking for a state to start from"),
            writer,
            restore: RestoreTracker::default(),
            memory: MemoryGuard::new(config.memory_max),
            name: node.to_string().into(),
            replica: storage.replica,
            key,
            credentials: config.credentials.clone(),
            http: config.http.clone(),
            peers: Peers::new(node, Arc::clone(&log), static_peers, resources.peers),
            log,
            snapshotter,
            last_snapshot,
            blocking: resources.blocking,
            background: resources.background,
            idle: resources.idle,
            backup_metrics: resources.backup_metrics,
            request_count: resources.request_count,
            storage,
        };
        let driver = node.driver(config, checkpoints, metrics);
        let tasks = NodeTasks::spawn(config, &node, resources.critical, writer_task, driver);
        (node, tasks)
    }

    fn driver(
        &self,
        config: &Config,
        checkpoints: Checkpoints,
        metrics: &ReplicationMetrics,
    ) -> ReplicaDriver {
        let snapshots = self.storage.snapshots.as_ref();
        ReplicaDriver {
            bootstrap: Bootstrap {
                store: self.store.clone(),
                applied: self.applied.clone(),
                log: Arc::clone(&self.log),
                snapshots: snapshots.map(|(snapshots, _)| snapshots.clone()),
                peers: self.peers.clone(),
                tracker: self.restore.clone(),
                buffer_bytes_max: config.cluster.restore_buffer_bytes_max,
                blocking: self.blocking.clone(),
            },
            applier: Applier {
                log: Arc::clone(&self.log),
                store: self.store.clone(),
                applied: self.applied.clone(),
                in_flight: self.storage.in_flight.clone(),
                checkpoints,
                patches: metrics.patches_applied.clone(),
                deletions: metrics.deletions_applied.clone(),
                round_trip: metrics.batch_duration.clone(),
            },
            readiness: self.readiness.clone(),
            snapshotter: self.snapshotter.clone(),
            gaps: metrics.gaps.clone(),
            resyncs: metrics.resyncs.clone(),
        }
    }

    /// The routes of the write port, and the one that the fast path answers. To be called once,
    /// because each call has separate limits of backups.
    pub fn write(&self) -> (Router, FastRoute) {
        let write = WriteState {
            store: self.store.clone(),
            memory: self.memory.clone(),
            writer: self.writer.clone(),
            readiness: self.readiness.clone(),
            applied: self.applied.clone(),
            credentials: self.credentials.clone(),
            body_wait_max: self.http.body_wait_max,
        };
        let backup = BackupState {
            store: self.store.clone(),
            applied: self.applied.clone(),
            log: Arc::clone(&self.log),
            readiness: self.readiness.clone(),
            credentials: self.credentials.clone(),
            slots: Arc::new(Semaphore::new(self.http.backups_max)),
            queue: Arc::new(Semaphore::new(self.http.backups_waiting_max)),
            queue_wait_max: self.http.backup_wait_max,
            chunk_text_bytes: self.http.backup_chunk_text_bytes,
            pool: self.idle.clone(),
            replica_pool: self.background.clone(),
            answered: self.request_count.clone(),
            node: Arc::clone(&self.name),
            metrics: self.backup_metrics.clone(),
        };
        let (readiness, log) = (self.readiness.clone(), Arc::clone(&self.log));
        let health = health::routes(move || health::check_writable(&readiness, &*log));
        let routes = set::routes(write.clone()).merge(backup::routes(backup));
        let routes = routes.merge(health);
        (routes, FastRoute::Set(Arc::new(write)))
    }

    /// The routes of the read port, and the one that the fast path answers.
    pub fn read(&self) -> (Router, FastRoute) {
        let read = ReadState {
            body_wait_max: self.http.body_wait_max,
            store: self.store.clone(),
            applied: self.applied.clone(),
            log: Arc::clone(&self.log),
            readiness: self.readiness.clone(),
            position_wait_max: self.http.position_wait_max,
            position_waits_max: self.http.position_waits_max,
        };
        let readiness = self.readiness.clone();
        let health = health::routes(move || readiness.check());
        let routes = get::routes(read.clone()).merge(health);
        (routes, FastRoute::Get(Arc::new(read)))
    }

    /// The state of the ops port.
    #[must_use]
    pub fn ops(
        &self,
        telemetry: Arc<Telemetry>,
        http_metrics: Arc<HttpMetrics>,
        traffic: RecentTraffic,
        ports: Arc<[Port]>,
    ) -> OpsState {
        OpsState {
            node: Arc::clone(&self.name),
            replica: self.replica,
            store: self.store.clone(),
            applied: self.applied.clone(),
            log: Arc::clone(&self.log),
            writer: self.writer.clone(),
            readiness: self.readiness.clone(),
            telemetry,
            http_metrics,
            traffic,
            restore: self.restore.clone(),
            memory: self.memory.clone(),
            data_dir: self.storage.dir.as_deref().map(Arc::from),
            ports,
            last_snapshot: self.last_snapshot.clone(),
            peers: self.peers.clone(),
            blocking: self.blocking.clone(),
        }
    }

    /// Rejects writes for new users while this replica or a ready peer is full; never ends.
    pub fn watch_memory(&self) -> impl Future<Output = ()> + Send + use<> {
        let (memory, peers) = (self.memory.clone(), self.peers.clone());
        memory.watch(self.store.clone(), move || peers.full())
    }

    /// Announces this replica to the others, with `url` as the URL of its write port.
    pub fn announce(&self, url: String) {
        let (node, log_id, url) = (Box::from(&*self.name), self.log.id().0, Box::from(url));
        let replica: Box<str> = self.replica.to_string().into();
        let (readiness, applied) = (self.readiness.clone(), self.applied.clone());
        let (key, memory) = (self.key.clone(), self.memory.clone());
        self.log.announce(Arc::new(move |nonce| {
            let position = applied.position();
            let mut announcement = Announcement {
                node: Box::clone(&node),
                replica: Box::clone(&replica),
                version: env!("CARGO_PKG_VERSION").into(),
                log_id: log_id.clone(),
                url: Box::clone(&url),
                state: readiness.state().name().into(),
                position: position.seq,
                chain: position.chain,
                full: memory.is_full(),
                mac: None,
            };
            announcement.mac = Some(key.sign_announcement(&announcement, nonce));
            announcement
        }));
    }

    /// Makes the node unready, so that it rejects new requests. Returns the snapshot to write after
    /// the running requests.
    #[must_use]
    pub fn stop_serving(&self) -> FinalSnapshot {
        let state = CompleteState::of(&self.store, &self.readiness).ok();
        self.readiness
            .block(NodeState::Stopping, "the node is stopping");
        FinalSnapshot(self.snapshotter.clone().zip(state))
    }
}
