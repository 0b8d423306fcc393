//! A node without its ports: its parts and its tasks.
//!
//! [`app`](crate::node::lifecycle) adds sockets, signals and metrics.

pub mod config;
pub mod data_dir;
pub mod lifecycle;
mod restore_report;
pub mod sd_notify;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use futures_util::FutureExt;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::http::backup::{self, BackupMetrics, BackupState};
use crate::http::fast::FastRoute;
use crate::http::get::{self, ReadState};
use crate::http::ops::OpsState;
use crate::http::ops::traffic::RecentTraffic;
use crate::http::set::{self, WriteState};
use crate::http::{Answered, HttpMetrics};
use crate::log::{Announcement, ClusterKey, InFlight, Log, Position, RandomId};
use crate::node::config::Config;
use crate::node::data_dir::Storage;
use crate::replication::memory::{self, DoesNotFit, MemoryGuard};
use crate::replication::peer_client::PeerClient;
use crate::replication::state::{NodeState, Readiness};
use crate::replication::{
    AppliedIndex, Applier, Bootstrap, BootstrapError, Checkpoints, CompleteState, LastSnapshot,
    Peers, ReplicaDriver, RestoreTracker, Snapshotter, Writer, WriterTask, restore_seed,
};
use crate::store::Store;
use crate::sys::exec::Blocking;
use crate::sys::tasks::{CriticalTasks, TaskEnded};
use crate::telemetry::{Replication, Telemetry};

/// How often requests that have waited too long are answered with an error.
const EXPIRE_EVERY: Duration = Duration::from_millis(250);

/// Why a node did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The store can't be restored.
    #[error(transparent)]
    Bootstrap(#[from] BootstrapError),
    /// The restored state can't be written as a snapshot: the next start would not have it.
    #[error(
        "no snapshot of what was restored can be written: {0}; make room for it, and start again \
         with --restore-from"
    )]
    SeedNotKept(#[source] io::Error),
    /// The file needs more memory than the system gives.
    #[error("cannot restore {path}: {error}")]
    DoesNotFit {
        /// The file.
        path: PathBuf,
        /// The memory that it needs.
        error: DoesNotFit,
    },
    /// The thread that restores the store failed.
    #[error("cannot restore: {0}")]
    System(#[source] io::Error),
    /// A critical task has ended.
    #[error("{0}; restart this node, and report this")]
    TaskEnded(#[from] TaskEnded),
}

/// What a node is built from.
pub struct Parts {
    /// This process.
    pub node: RandomId,
    /// When this process started, in nanoseconds since 1970.
    pub began_ns: u64,
    /// An empty store.
    pub store: Store,
    /// The tasks that a node can't go on without.
    pub critical: CriticalTasks,
    /// The log and the snapshots.
    pub storage: Storage,
    /// The client for other nodes.
    pub peers: Arc<dyn PeerClient>,
    /// Threads for blocking work.
    pub blocking: Blocking,
    /// Threads of low priority: for snapshots, and for backups for replicas that start.
    pub background: Blocking,
    /// Threads of the lowest priority: for other backups.
    pub idle: Blocking,
    /// The metrics of backups.
    pub backup_metrics: BackupMetrics,
    /// Counts the answered requests.
    pub answered: Answered,
}

/// A node's handles.
pub struct Node {
    /// The records.
    pub store: Store,
    /// The position of the records.
    pub applied: AppliedIndex,
    /// The log they come from.
    pub log: Arc<dyn Log>,
    /// Whether the node serves them.
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
    peers: Peers,
    snapshotter: Option<Snapshotter>,
    last_snapshot: LastSnapshot,
    blocking: Blocking,
    write: WriteState,
    backup: BackupState,
    read: ReadState,
    /// Keeps the data directory locked.
    _storage: Storage,
}

/// A node's tasks. Dropping this aborts them at once, as the end of the process would.
pub struct Tasks {
    blocking: Blocking,
    snapshotter: Option<Snapshotter>,
    critical: CriticalTasks,
    log: Arc<dyn Log>,
    /// `None` once it is started.
    driver: Option<ReplicaDriver>,
    /// Tasks that must finish before shutdown: writer and snapshotter.
    writing: JoinSet<()>,
    stop_writing: CancellationToken,
    rest: JoinSet<()>,
}

/// A node that accepts no more requests.
pub struct Stopping {
    /// Writes the last snapshot, of the state at the stop.
    last: Option<(Snapshotter, CompleteState)>,
}

impl Node {
    /// A node whose tasks wait to be [run](Tasks::run).
    #[must_use]
    pub fn new(config: &Config, parts: Parts, metrics: &Replication) -> (Self, Tasks) {
        let Parts {
            node,
            began_ns,
            critical,
            store,
            storage,
            peers,
            blocking,
            background,
            idle,
            backup_metrics,
            answered,
        } = parts;
        let (log, cluster) = (Arc::clone(&storage.log), &config.cluster);
        let name: Arc<str> = node.to_string().into();
        let (replica, in_flight) = (storage.replica, storage.in_flight.clone());
        let readiness = Readiness::starting("looking for a state to start from");
        let applied = AppliedIndex::new(Position::base(&log.id(), 0, began_ns));
        let restore = RestoreTracker::default();
        let last_snapshot = LastSnapshot::default();
        let key = ClusterKey::derive(&config.credentials.for_client().password);
        let checkpoints = Checkpoints::new(
            replica,
            log.id(),
            key.clone(),
            log.is_replicated().then_some(cluster.checkpoint_interval),
            metrics.checkpoints.clone(),
        );
        let static_peers = cluster.peers.clone();
        let peers = Peers::new(node, Arc::clone(&log), static_peers, peers);
        let (writer, writer_task) = Writer::new(
            Arc::clone(&log),
            in_flight.clone(),
            checkpoints.clone(),
            config.writer,
            metrics.batch_patches.clone(),
        );
        let kept = storage.snapshots.as_ref();
        let snapshotter = kept.map(|(snapshots, _)| Snapshotter {
            store: store.clone(),
            applied: applied.clone(),
            log: Arc::clone(&log),
            snapshots: snapshots.clone(),
            last: last_snapshot.clone(),
            writing: Arc::default(),
            blocking: background.clone(),
        });
        let driver = ReplicaDriver {
            bootstrap: Bootstrap {
                store: store.clone(),
                applied: applied.clone(),
                log: Arc::clone(&log),
                snapshots: kept.map(|(snapshots, _)| snapshots.clone()),
                peers: peers.clone(),
                tracker: restore.clone(),
                buffer_bytes_max: cluster.restore_buffer_bytes_max,
                blocking: blocking.clone(),
            },
            applier: Applier {
                log: Arc::clone(&log),
                store: store.clone(),
                applied: applied.clone(),
                in_flight: in_flight.clone(),
                checkpoints,
                patches: metrics.patches_applied.clone(),
                deletions: metrics.deletions_applied.clone(),
                round_trip: metrics.batch_duration.clone(),
            },
            readiness: readiness.clone(),
            snapshotter: snapshotter.clone(),
            gaps: metrics.gaps.clone(),
            resyncs: metrics.resyncs.clone(),
        };
        let http = &config.http;
        let memory = MemoryGuard::new(config.memory_max);
        let write = WriteState {
            store: store.clone(),
            memory: memory.clone(),
            writer: writer.clone(),
            readiness: readiness.clone(),
            applied: applied.clone(),
            credentials: config.credentials.clone(),
            body_wait_max: http.body_wait_max,
        };
        let backup = BackupState {
            store: store.clone(),
            applied: applied.clone(),
            log: Arc::clone(&log),
            readiness: readiness.clone(),
            credentials: config.credentials.clone(),
            slots: Arc::new(Semaphore::new(http.backups_max)),
            queue: Arc::new(Semaphore::new(http.backups_waiting_max)),
            queue_wait_max: http.backup_wait_max,
            chunk_text_bytes: http.backup_chunk_text_bytes,
            blocking: idle,
            urgent: background,
            answered,
            node: Arc::clone(&name),
            metrics: backup_metrics,
        };
        let read = ReadState {
            store: store.clone(),
            applied: applied.clone(),
            log: Arc::clone(&log),
            readiness: readiness.clone(),
            position_wait_max: http.position_wait_max,
            position_waits_max: http.position_waits_max,
        };
        let interval = kept.map(|(_, interval)| *interval);
        let mut tasks = Tasks {
            blocking: blocking.clone(),
            snapshotter: snapshotter.clone(),
            critical,
            log: Arc::clone(&log),
            driver: Some(driver),
            writing: JoinSet::new(),
            stop_writing: CancellationToken::new(),
            rest: JoinSet::new(),
        };
        tasks.spawn(writer_task, interval, &readiness);
        let wait_max = config.writer.wait_max;
        tasks.spawn_rest("expire", expire(in_flight, wait_max));
        let watched = peers.clone();
        tasks.spawn_rest("peers", async move { watched.watch().await });
        let node = Self {
            store,
            applied,
            log,
            readiness,
            writer,
            restore,
            memory,
            name,
            replica,
            key,
            peers,
            snapshotter,
            last_snapshot,
            blocking,
            write,
            backup,
            read,
            _storage: storage,
        };
        (node, tasks)
    }

    /// The routes of the write port, and the one that the fast path answers.
    pub fn write(&self) -> (Router, FastRoute) {
        let (write, backup) = (&self.write, &self.backup);
        let routes = set::routes(write.clone()).merge(backup::routes(backup.clone()));
        (routes, FastRoute::Set(Arc::new(write.clone())))
    }

    /// The routes of the read port, and the one that the fast path answers.
    pub fn read(&self) -> (Router, FastRoute) {
        let read = &self.read;
        let fast_route = FastRoute::Get(Arc::new(read.clone()));
        (get::routes(read.clone()), fast_route)
    }

    /// The state that the ops port reports.
    #[must_use]
    pub fn ops(
        &self,
        telemetry: Arc<Telemetry>,
        http_metrics: Arc<HttpMetrics>,
        traffic: RecentTraffic,
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
            snapshots: self.snapshotter.as_ref().map(|s| s.snapshots.clone()),
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

    /// Makes the node unready, so that it rejects new requests.
    #[must_use]
    pub fn stopping(&self) -> Stopping {
        let state = CompleteState::of(&self.store, &self.readiness).ok();
        self.readiness
            .block(NodeState::Stopping, "the node is stopping");
        Stopping {
            last: self.snapshotter.clone().zip(state),
        }
    }
}

impl Stopping {
    /// Writes the last snapshot, if the node was ready.
    pub async fn write_snapshot(&self) {
        if let Some((snapshotter, state)) = &self.last {
            snapshotter.write_if_changed(state.clone()).await;
        }
    }
}

impl Tasks {
    fn spawn(&mut self, writer: WriterTask, interval: Option<Duration>, readiness: &Readiness) {
        let writing = writer.run(self.stop_writing.child_token());
        let writing = self.critical.guard("writer", writing).map(drop);
        self.writing.spawn(writing);
        if let (Some(snapshotter), Some(interval)) = (self.snapshotter.clone(), interval) {
            let stop = self.stop_writing.child_token();
            let run = snapshotter.run(interval, readiness.clone(), stop);
            let run = self.critical.guard("snapshotter", run).map(drop);
            self.writing.spawn(run);
        }
    }

    /// Starts a task that runs as long as the node.
    fn spawn_rest(&mut self, task: &'static str, run: impl Future<Output = ()> + Send + 'static) {
        let critical = self.critical.clone();
        let guarded = self.critical.guard(task, run);
        self.rest.spawn(async move {
            if guarded.await.is_some() {
                critical.fail(task, "it returned");
            }
        });
    }

    /// Recovers a state, from the backup at `seed` if there is one, then follows the log forever.
    ///
    /// # Errors
    /// `seed` can't be restored, or a critical task has ended.
    pub async fn run(&mut self, seed: Option<&Path>) -> Result<(), StartError> {
        if let Some(driver) = self.driver.take() {
            self.check_memory(&driver.bootstrap, seed).await?;
            if let Some(seed) = seed {
                let reason = format!("loading backup {}", seed.display());
                driver.readiness.block(NodeState::Restoring, reason);
                self.restore_seed(&driver.bootstrap, seed).await?;
            }
            self.spawn_rest("driver", driver.run(seed.is_some()));
        }
        let failed = tokio::select! {
            failed = self.critical.failed() => failed,
            failed = self.log.failed() => failed,
        };
        Err(failed.into())
    }

    /// Checks that the file to restore fits into memory. Otherwise a failed allocation would abort
    /// the process, and again after each restart.
    async fn check_memory(
        &self,
        bootstrap: &Bootstrap,
        seed: Option<&Path>,
    ) -> Result<(), StartError> {
        let (seed, snapshots) = (seed.map(Path::to_owned), bootstrap.snapshots.clone());
        let checked = self.blocking.run(move || {
            let file = match seed {
                Some(seed) => Some(seed),
                None => snapshots.and_then(|snapshots| snapshots.newest()),
            };
            // A pipe can be read only once.
            let Some(path) = file.filter(|path| path.is_file()) else {
                return Ok(());
            };
            memory::check_file_fits(&path).map_err(|error| StartError::DoesNotFit { path, error })
        });
        checked.await.map_err(StartError::System)?
    }

    async fn restore_seed(&self, bootstrap: &Bootstrap, seed: &Path) -> Result<(), StartError> {
        let (store, applied) = (bootstrap.store.clone(), bootstrap.applied.clone());
        let (log, snapshots) = (Arc::clone(&bootstrap.log), bootstrap.snapshots.clone());
        let (seed, tracker) = (seed.to_owned(), bootstrap.tracker.clone());
        let restored = self.blocking.run(move || {
            restore_seed(&seed, &store, &applied, &*log, snapshots.as_ref(), &tracker)
        });
        restored.await.map_err(StartError::System)??;
        if let Some(snapshotter) = &self.snapshotter {
            // The log never held these records, so only a snapshot can restore them.
            let state = CompleteState::known(&bootstrap.store);
            let written = snapshotter.write(state).await;
            written.map_err(StartError::SeedNotKept)?;
        }
        Ok(())
    }

    /// Appends the waiting writes, and waits until they are applied and no snapshot is being
    /// written.
    pub async fn finish_writing(&mut self) {
        self.stop_writing.cancel();
        while self.writing.join_next().await.is_some() {}
    }
}

async fn expire(in_flight: InFlight, wait_max: Duration) {
    let mut every = tokio::time::interval(EXPIRE_EVERY);
    loop {
        every.tick().await;
        in_flight.expire(wait_max);
    }
}
