//! Runs a real node on the simulated broker, from its start to its end.

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::Router;
use gradestore::backup::{HeadRecord, Snapshots, read_head};
use gradestore::http::Credentials;
use gradestore::http::RequestCount;
use gradestore::http::backup::BackupMetrics;
use gradestore::log::{
    ClusterKey, ExistingData, JetStreamConfig, JetStreamLog, Log, LogId, MemoryLog, RandomId,
    ReplicaIdentity, SetupError, WalConfig, WalSync, log_of_wal,
};
use gradestore::node::config::{ClusterConfig, Config, HttpConfig};
use gradestore::node::data_dir::Storage;
use gradestore::node::{Node, NodeResources};
use gradestore::replication::memory::MemoryMax;
use gradestore::replication::{CheckpointMetrics, WriterLimits};
use gradestore::store::Store;
use gradestore::sys::exec::Blocking;
use gradestore::sys::tasks::CriticalTasks;
use gradestore::telemetry::ReplicationMetrics;
use metrics::{Counter, Histogram};
use tempfile::TempDir;
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::connection::SimBroker;
use crate::coroutine::Coroutine;
use crate::paused::PausedLog;
use crate::peer_client::{SimPeerClient, url};
use crate::world::{Slot, State, World};

pub const USERNAME: &str = "sim";
pub const PASSWORD: &str = "secret";
/// How long requests may take to finish once a node stops.
const DRAIN_MAX: Duration = Duration::from_secs(4);
/// The directory of the WAL on a node's disk.
const WAL_DIR: &str = "wal";
/// A killed process may not have synced as many bytes at the end of its WAL.
const UNSYNCED_BYTES_MAX: u64 = 400;
/// The header of a segment, which is synced before its first record is written.
const SEGMENT_HEADER_BYTES: u64 = 4096;
/// When a process that could not open its log is restarted.
const RESTART_AFTER: Duration = Duration::from_secs(1);
/// How long appends may wait before the log counts as unwritable, in addition to the write timeout.
pub const WRITE_SILENCE: Duration = Duration::from_secs(2);

/// The settings that vary between runs.
#[derive(Debug, Clone)]
pub struct Knobs {
    pub snapshots: bool,
    pub snapshot_interval: Duration,
    pub checkpoint_interval: Duration,
    pub buffer_bytes_max: u64,
    pub batch_writes_max: usize,
    pub queue_requests_max: usize,
    pub chunk_text_bytes: usize,
    pub backups_max: usize,
    pub static_peers: bool,
    /// How many replicas must have announced themselves before one creates the stream.
    pub expect_peers: usize,
    /// The maximum delay of blocking work.
    pub work_wait_ms: u64,
    /// When a node with a disk syncs its WAL; `None` without one.
    pub wal: Option<WalSync>,
}

impl Knobs {
    pub const WRITE_WAIT_MAX: Duration = Duration::from_secs(2);
    pub const POSITION_WAIT_MAX: Duration = Duration::from_secs(1);

    fn peers(&self, nodes: usize) -> Vec<String> {
        match self.static_peers {
            true => (0..nodes).map(url).collect(),
            false => Vec::new(),
        }
    }

    /// The stream's settings, the same for all nodes.
    fn stream(
        &self,
        nodes: usize,
        clustered: bool,
        dir: Option<&Path>,
        pool: Blocking,
    ) -> JetStreamConfig {
        JetStreamConfig {
            servers: "nats://sim".parse().expect("a URL"),
            creds: None,
            stream: "grades".to_owned(),
            replicas: if clustered { 3 } else { 1 },
            retention: Duration::from_secs(7 * 24 * 3600),
            expect_peers: self.expect_peers.min(nodes),
            peers: self.peers(nodes),
            write_silence_max: Self::WRITE_WAIT_MAX + WRITE_SILENCE,
            wal: self.wal.zip(dir).map(|(sync, dir)| WalConfig {
                dir: dir.join(WAL_DIR),
                sync,
                keep_bytes: 0,
                pool,
            }),
        }
    }

    fn config(&self, nodes: usize) -> Config {
        let unused = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        Config {
            write_addr: unused,
            read_addr: unused,
            ops_addr: unused,
            credentials: Credentials::new(USERNAME, PASSWORD),
            http: HttpConfig {
                position_wait_max: Self::POSITION_WAIT_MAX,
                backups_max: self.backups_max,
                backups_waiting_max: 2,
                backup_chunk_text_bytes: self.chunk_text_bytes,
                ..HttpConfig::default()
            },
            writer: WriterLimits {
                queue_requests_max: self.queue_requests_max,
                queue_bytes_max: 1 << 20,
                batch_writes_max: self.batch_writes_max,
                wait_max: Self::WRITE_WAIT_MAX,
                bulks_max: 1,
            },
            memory_max: MemoryMax::Percent(100),
            restore_from: None,
            cluster: ClusterConfig {
                peers: self.peers(nodes),
                checkpoint_interval: self.checkpoint_interval,
                restore_buffer_bytes_max: self.buffer_bytes_max,
                ..ClusterConfig::single_node()
            },
        }
    }
}

/// The task of a process. It opens the log first.
pub struct NodeTask {
    /// Requests a graceful shutdown.
    stop: CancellationToken,
    /// Cancelled when the process has ended.
    gone: CancellationToken,
    task: AbortHandle,
}

/// A running node.
#[derive(Clone)]
pub struct Process {
    pub node: Arc<Node>,
    pub write: Router,
    pub read: Router,
    /// How often batches were missing.
    pub gaps: Arc<AtomicU64>,
    /// How often the state was discarded.
    pub resyncs: Arc<AtomicU64>,
    /// The log that it follows.
    pub log: LogId,
    /// Digest mismatches with peers.
    pub divergences: Arc<AtomicU64>,
    /// Cancelled when the process has ended.
    pub gone: CancellationToken,
}

/// Starts a process at `node`, unless one is running.
pub fn start(world: &World, node: usize, knobs: &Knobs) {
    let mut state = world.lock();
    let (last, end) = (state.broker.last(), state.broker.end());
    let nodes = state.nodes.len();
    let slot = &mut state.nodes[node];
    if slot.task.is_some() {
        return;
    }
    slot.log_end_at_start = last;
    slot.lost = None;
    slot.stuck_since = None;
    slot.rejected_since = None;
    slot.unstored_since = None;
    slot.allow_reconnect();
    let (stop, gone) = (CancellationToken::new(), CancellationToken::new());
    let run = run_node(
        world.clone(),
        node,
        knobs.config(nodes),
        knobs.clone(),
        stop.clone(),
        gone.clone(),
    );
    slot.task = Some(NodeTask {
        stop,
        gone,
        task: tokio::spawn(run).abort_handle(),
    });
    drop(state);
    world.note(|| format!("node {node} starts; the log ends at {end}"));
}

/// With a WAL that is synced before the answer, a write that `node` acknowledged is in it or in a
/// snapshot, whatever the broker has lost since.
fn check_has_acknowledged(world: &World, node: usize, knobs: &Knobs, log: &JetStreamLog) {
    let slot = world.slot(node);
    let acknowledged = slot.acknowledged.clone();
    let newest = snapshot_heads(&slot).into_iter().next();
    drop(slot);
    let copies = log
        .wal_status()
        .filter(|_| knobs.wal == Some(WalSync::Always));
    let (Some((of, seq)), Some(copies)) = (acknowledged, copies) else {
        return;
    };
    let newest = newest.map_or(0, |head| head.position).max(copies.last);
    if of == log.id() && newest < seq {
        world.violate(format!(
            "node {node} acknowledged batch {seq} and has only batch {newest} after a restart"
        ));
    }
}

/// Cuts some of the bytes that the killed process at `node` did not sync off its WAL.
fn lose_unsynced(world: &World, node: usize) {
    let mut state = world.lock();
    let Some(dir) = state.nodes[node].dir.as_ref() else {
        return;
    };
    let Ok(logs) = fs::read_dir(dir.path().join(WAL_DIR)) else {
        return;
    };
    let mut logs: Vec<_> = logs
        .filter_map(|log| log.ok().map(|log| log.path()))
        .collect();
    logs.sort();
    for log in logs {
        let files = fs::read_dir(log).expect("the files of a log");
        let paths = files.filter_map(|file| file.ok().map(|file| file.path()));
        let segments = paths.filter(|path| path.extension().is_some_and(|of| of == "seg"));
        let Some(newest) = segments.max() else {
            continue;
        };
        let lost = state.rng.u64(..UNSYNCED_BYTES_MAX);
        let file = File::options().write(true).open(newest).expect("a segment");
        let bytes = file.metadata().expect("its length").len();
        let kept = bytes
            .saturating_sub(lost)
            .max(SEGMENT_HEADER_BYTES.min(bytes));
        file.set_len(kept).expect("a shorter file");
    }
}

/// Kills the process at `node`. With `wipe` its disk is lost, too.
pub fn kill(world: &World, node: usize, wipe: bool, knobs: &Knobs) {
    let process = world.slot(node).process.clone();
    let Some(killed) = remove(world, node) else {
        return;
    };
    killed.task.abort();
    // A state from another source, which may still be behind.
    if wipe || process.is_some_and(|process| process.resyncs.load(Ordering::Relaxed) > 0) {
        world.slot(node).acknowledged = None;
    }
    world.note(|| {
        format!(
            "node {node} is killed{}",
            if wipe { ", its disk is lost" } else { "" }
        )
    });
    if matches!(knobs.wal, Some(WalSync::Every(_))) {
        lose_unsynced(world, node);
    }
    let mut slot = world.slot(node);
    if wipe && slot.dir.is_some() {
        slot.dir = Some(new_disk());
        slot.disks += 1;
    }
}

/// An empty disk, in memory if the system has /dev/shm.
pub fn new_disk() -> TempDir {
    let in_memory = tempfile::tempdir_in("/dev/shm");
    in_memory
        .or_else(|_| tempfile::tempdir())
        .expect("a directory")
}

/// Shuts the process at `node` down and waits until it has ended.
pub async fn stop(world: &World, node: usize) {
    let gone = world.slot(node).task.as_ref().map(|task| {
        task.stop.cancel();
        task.gone.clone()
    });
    world.note(|| format!("node {node} shuts down"));
    if let Some(gone) = gone {
        gone.cancelled().await;
    }
}

fn remove(world: &World, node: usize) -> Option<NodeTask> {
    let mut state = world.lock();
    let State { nodes, rng, .. } = &mut *state;
    let slot = &mut nodes[node];
    slot.end_links(rng);
    let process = slot.process.take();
    let task = slot.task.take();
    drop(state);
    // Its destructors lock the state.
    drop(process);
    let task = task?;
    task.gone.cancel();
    world.change();
    Some(task)
}

impl State {
    /// Whether a node other than `node` has data in memory or on disk.
    pub fn is_held_elsewhere(&self, node: usize) -> bool {
        let mut others = self.nodes.iter().enumerate();
        others.any(|(other, slot)| {
            let applied = slot.process.as_ref().map(|process| &process.node.applied);
            let applied = applied.is_some_and(|applied| applied.seq() > 0);
            other != node && (applied || !snapshot_heads(slot).is_empty())
        })
    }
}

/// The heads of the snapshots on a disk.
pub fn snapshot_heads(slot: &Slot) -> Vec<HeadRecord> {
    let snapshots = slot.dir.as_ref().map(|dir| Snapshots::in_dir(dir.path()));
    let found = snapshots.and_then(|snapshots| snapshots.list().ok());
    let head = |(_, path): (_, PathBuf)| read_head(File::open(path).ok()?).ok()?;
    found
        .unwrap_or_default()
        .into_iter()
        .filter_map(head)
        .collect()
}

/// The identity of the replica at `node`. Without a disk it is the process' own.
fn identity(world: &World, node: usize, knobs: &Knobs) -> ReplicaIdentity {
    let mut slot = world.slot(node);
    slot.starts += 1;
    let of = |count: u64, kind: u128| {
        RandomId::of(kind << 96 | (node as u128 + 1) << 64 | u128::from(count))
    };
    let process = of(slot.starts, 1);
    let disk = of(slot.disks, 2);
    let newest = snapshot_heads(&slot).into_iter().next();
    let wal = slot.dir.as_ref().map(|dir| dir.path().join(WAL_DIR));
    let wal_log = wal.and_then(|dir| log_of_wal(&dir, None).expect("a readable WAL"));
    ReplicaIdentity {
        node: process,
        replica: if knobs.snapshots { disk } else { process },
        existing_data: match (newest, wal_log) {
            (Some(head), _) => ExistingData::Of(LogId(head.log_id)),
            (None, Some(log)) => ExistingData::Of(log),
            (None, None) => ExistingData::None,
        },
        keeps_data: knobs.snapshots,
        url: url(node),
        ask_node: Arc::new(SimPeerClient::new(world.clone(), node)),
        key: ClusterKey::derive(PASSWORD),
    }
}

/// Opens the log. A process that fails is restarted.
async fn open(
    world: &World,
    node: usize,
    knobs: &Knobs,
    gone: &CancellationToken,
) -> (RandomId, Storage) {
    loop {
        let dir = world
            .slot(node)
            .dir
            .as_ref()
            .map(|dir| dir.path().to_owned());
        let snapshots = dir.as_deref().map(Snapshots::open);
        let snapshots = snapshots.map(|opened| opened.expect("a directory for snapshots"));
        let identity = identity(world, node, knobs);
        let process = identity.node;
        let placeholder = Arc::new(MemoryLog::new(process, 0));
        let mut storage = Storage::of(placeholder, identity.replica);
        storage.snapshots = snapshots.map(|snapshots| (snapshots, knobs.snapshot_interval));
        let pool = blocking(world.clone(), knobs.work_wait_ms);
        let (nodes, clustered) = {
            let state = world.lock();
            (state.nodes.len(), state.broker.clustered)
        };
        let opened = JetStreamLog::open_on(
            Arc::new(SimBroker::new(world.clone(), node, gone.clone())),
            knobs.stream(nodes, clustered, dir.as_deref(), pool),
            identity,
            storage.in_flight.clone(),
            None,
            Arc::new(|_| {}),
        );
        match opened.await {
            Ok(log) => {
                check_has_acknowledged(world, node, knobs, &log);
                storage.log = Arc::new(PausedLog {
                    log,
                    world: world.clone(),
                });
                return (process, storage);
            }
            Err(
                error @ (SetupError::Unreachable { .. }
                | SetupError::Rejected { .. }
                | SetupError::NoLeader { .. }),
            ) => {
                world.note(|| format!("node {node} is restarted: {error}"));
            }
            Err(error) => world.violate(format!("node {node} can't open its log: {error}")),
        }
        sleep(RESTART_AFTER).await;
        world.slot(node).allow_reconnect();
    }
}

async fn run_node(
    world: World,
    node: usize,
    config: Config,
    knobs: Knobs,
    stop: CancellationToken,
    gone: CancellationToken,
) {
    let opened = stop.run_until_cancelled(open(&world, node, &knobs, &gone));
    let Some((process, storage)) = opened.await else {
        drop(remove(&world, node));
        return;
    };
    let log = storage.log.id();
    let (gaps, resyncs, divergences) = (Arc::default(), Arc::default(), Arc::default());
    let resources = NodeResources {
        node: process,
        started_ns: world.lock().broker.now_ns(),
        critical: CriticalTasks::default(),
        // A scan has the same order in every run.
        store: Store::with_shard_seed(0),
        storage,
        peers: Arc::new(SimPeerClient::new(world.clone(), node)),
        blocking: blocking(world.clone(), knobs.work_wait_ms),
        background: blocking(world.clone(), knobs.work_wait_ms),
        idle: blocking(world.clone(), knobs.work_wait_ms),
        backup_metrics: BackupMetrics::new(),
        request_count: RequestCount::default(),
    };
    let (built, mut tasks) = Node::new(&config, resources, &metrics(&gaps, &resyncs, &divergences));
    let built = Arc::new(built);
    built.announce(url(node));
    world.slot(node).process = Some(Process {
        node: Arc::clone(&built),
        log,
        write: built.write().0,
        read: built.read().0,
        gaps,
        resyncs,
        divergences,
        gone,
    });
    world.change();
    tokio::select! {
        biased;
        () = stop.cancelled() => {}
        failed = tasks.run(None) => world.violate(format!("node {node} has ended: {failed:?}")),
    }
    let snapshot = built.stop_serving();
    let finished = async {
        while world.slot(node).requests > 0 {
            world.wait().await;
        }
        tasks.finish_writing().await;
    };
    let _ = timeout(DRAIN_MAX, finished).await;
    snapshot.write().await;
    world.note(|| format!("node {node} has shut down"));
    drop(remove(&world, node));
}

/// Runs blocking work as a coroutine, after a random delay.
fn blocking(world: World, wait_ms: u64) -> Blocking {
    Blocking::with_executor(Arc::new(move |work| {
        let wait = world.pause(0..wait_ms);
        let work = Coroutine::new(work);
        Box::pin(async move {
            sleep(wait).await;
            work.await;
        })
    }))
}

fn metrics(
    gaps: &Arc<AtomicU64>,
    resyncs: &Arc<AtomicU64>,
    divergences: &Arc<AtomicU64>,
) -> ReplicationMetrics {
    ReplicationMetrics {
        batch_writes: Histogram::noop(),
        batch_duration: Histogram::noop(),
        patches_applied: Counter::noop(),
        deletions_applied: Counter::noop(),
        gaps: Counter::from_arc(Arc::clone(gaps)),
        resyncs: Counter::from_arc(Arc::clone(resyncs)),
        checkpoints: CheckpointMetrics {
            compared: Counter::noop(),
            divergences: Counter::from_arc(Arc::clone(divergences)),
            rejected: Counter::noop(),
        },
    }
}
