//! A process: a real node on the simulated broker, from its start to its end.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use axum::Router;
use gradestore::backup::{HeadRecord, Snapshots, read_head};
use gradestore::http::Credentials;
use gradestore::http::RequestCount;
use gradestore::http::backup::BackupMetrics;
use gradestore::log::{
    ClusterKey, HeldData, Identity, JetStreamConfig, JetStreamLog, LogId, MemoryLog, RandomId,
    SetupError,
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

use crate::coroutine::Coroutine;
use crate::paused::PausedLog;
use crate::phone::{Phone, url};
use crate::wire::SimBroker;
use crate::world::{Slot, State, World};

pub const USERNAME: &str = "sim";
pub const PASSWORD: &str = "secret";
/// How long requests may take to finish once a node stops.
const DRAIN_MAX: Duration = Duration::from_secs(4);
/// When a process that could not open its log is started again.
const START_AGAIN_AFTER: Duration = Duration::from_secs(1);
/// How long appends may wait before the log counts as unwritable, on top of a write's wait.
pub const WRITE_SILENCE: Duration = Duration::from_secs(2);

/// What differs between the nodes of different runs.
#[derive(Debug, Clone)]
pub struct Knobs {
    pub snapshots: bool,
    pub snapshot_interval: Duration,
    pub checkpoint_interval: Duration,
    pub buffer_bytes_max: u64,
    pub batch_patches_max: usize,
    pub queue_requests_max: usize,
    pub chunk_text_bytes: usize,
    pub backups_max: usize,
    pub by_hand: bool,
    /// How many replicas must be there before one creates the stream.
    pub expect_peers: usize,
    /// How long blocking work waits for its turn, and how often.
    pub work_wait_ms: u64,
}

impl Knobs {
    pub const WRITE_WAIT_MAX: Duration = Duration::from_secs(2);
    pub const POSITION_WAIT_MAX: Duration = Duration::from_secs(1);

    fn peers(&self, nodes: usize) -> Vec<String> {
        match self.by_hand {
            true => (0..nodes).map(url).collect(),
            false => Vec::new(),
        }
    }

    /// The stream, as all nodes are to find or create it.
    fn stream(&self, nodes: usize, clustered: bool) -> JetStreamConfig {
        JetStreamConfig {
            servers: "nats://sim".parse().expect("a URL"),
            creds: None,
            stream: "grades".to_owned(),
            replicas: if clustered { 3 } else { 1 },
            retention: Duration::from_secs(7 * 24 * 3600),
            expect_peers: self.expect_peers.min(nodes),
            peers: self.peers(nodes),
            write_silence_max: Self::WRITE_WAIT_MAX + WRITE_SILENCE,
        }
    }

    fn config(&self, nodes: usize) -> Config {
        let nowhere = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        Config {
            write_addr: nowhere,
            read_addr: nowhere,
            ops_addr: nowhere,
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
                batch_patches_max: self.batch_patches_max,
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

/// A process from its start on: it waits for the broker first.
pub struct Life {
    /// Tells it to stop in good order.
    stop: CancellationToken,
    /// Cancelled when it is over.
    gone: CancellationToken,
    task: AbortHandle,
}

/// A node that runs.
#[derive(Clone)]
pub struct Process {
    pub node: Arc<Node>,
    pub write: Router,
    pub read: Router,
    /// Times that batches were missing.
    pub gaps: Arc<AtomicU64>,
    /// States made anew.
    pub resyncs: Arc<AtomicU64>,
    /// The log that it follows.
    pub log: LogId,
    /// Peers that were heard to hold something else.
    pub divergences: Arc<AtomicU64>,
    /// Cancelled when it is over.
    pub gone: CancellationToken,
}

/// Starts a process at `node`, if there is none.
pub fn start(world: &World, node: usize, knobs: &Knobs) {
    let mut state = world.lock();
    let (fence, end) = (state.broker.last(), state.broker.end());
    let nodes = state.nodes.len();
    let slot = &mut state.nodes[node];
    if slot.life.is_some() {
        return;
    }
    slot.fence = fence;
    slot.lost = None;
    slot.helpless_since = None;
    slot.refused_since = None;
    slot.unstored_since = None;
    slot.excuse();
    let (stop, gone) = (CancellationToken::new(), CancellationToken::new());
    let live = live(
        world.clone(),
        node,
        knobs.config(nodes),
        knobs.clone(),
        stop.clone(),
        gone.clone(),
    );
    slot.life = Some(Life {
        stop,
        gone,
        task: tokio::spawn(live).abort_handle(),
    });
    drop(state);
    world.note(|| format!("node {node} starts; the log ends at {end}"));
}

/// Ends the process at `node` in the middle of whatever it does. With `wipe` its disk goes too.
pub fn kill(world: &World, node: usize, wipe: bool) {
    let Some(life) = forget(world, node) else {
        return;
    };
    life.task.abort();
    world.note(|| {
        format!(
            "node {node} is killed{}",
            if wipe { ", its disk lost" } else { "" }
        )
    });
    let mut slot = world.slot(node);
    if wipe && slot.dir.is_some() {
        slot.dir = Some(disk());
        slot.disks += 1;
    }
}

/// An empty disk: in memory, where the system offers that.
pub fn disk() -> TempDir {
    let in_memory = tempfile::tempdir_in("/dev/shm");
    in_memory
        .or_else(|_| tempfile::tempdir())
        .expect("a directory")
}

/// Tells the process at `node` to stop, and waits until it has.
pub async fn stop(world: &World, node: usize) {
    let gone = world.slot(node).life.as_ref().map(|life| {
        life.stop.cancel();
        life.gone.clone()
    });
    world.note(|| format!("node {node} is to stop"));
    if let Some(gone) = gone {
        gone.cancelled().await;
    }
}

fn forget(world: &World, node: usize) -> Option<Life> {
    let mut state = world.lock();
    let State { nodes, rng, .. } = &mut *state;
    let slot = &mut nodes[node];
    slot.end_links(rng);
    let process = slot.process.take();
    let life = slot.life.take();
    drop(state);
    // Its parts look at the world when they go.
    drop(process);
    let life = life?;
    life.gone.cancel();
    world.change();
    Some(life)
}

impl State {
    /// Whether a node other than `node` has data, or its disk has.
    pub fn is_held_elsewhere(&self, node: usize) -> bool {
        let mut others = self.nodes.iter().enumerate();
        others.any(|(other, slot)| {
            let applied = slot.process.as_ref().map(|process| &process.node.applied);
            let applied = applied.is_some_and(|applied| applied.seq() > 0);
            other != node && (applied || !heads(slot).is_empty())
        })
    }
}

/// The heads of the snapshots on a disk.
pub fn heads(slot: &Slot) -> Vec<HeadRecord> {
    let snapshots = slot.dir.as_ref().map(|dir| Snapshots::in_dir(dir.path()));
    let found = snapshots.and_then(|snapshots| snapshots.list().ok());
    let head = |(_, path): (_, PathBuf)| read_head(File::open(path).ok()?).ok()?;
    found
        .unwrap_or_default()
        .into_iter()
        .filter_map(head)
        .collect()
}

/// The replica at `node`: its disk's, or its process' where nothing is kept.
fn identity(world: &World, node: usize, knobs: &Knobs) -> Identity {
    let mut slot = world.slot(node);
    slot.starts += 1;
    let of = |count: u64, kind: u128| {
        RandomId::of(kind << 96 | (node as u128 + 1) << 64 | u128::from(count))
    };
    let process = of(slot.starts, 1);
    let disk = of(slot.disks, 2);
    let newest = heads(&slot).into_iter().next();
    Identity {
        node: process,
        replica: if knobs.snapshots { disk } else { process },
        holds: newest.map_or(HeldData::Nothing, |head| HeldData::Of(LogId(head.log_id))),
        keeps_data: knobs.snapshots,
        url: url(node),
        ask_node: Arc::new(Phone::new(world.clone(), node)),
        key: ClusterKey::derive(PASSWORD),
    }
}

/// Opens the log; a process that can't is started again.
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
        let snapshots = dir.map(|dir| Snapshots::open(&dir).expect("a directory for snapshots"));
        let identity = identity(world, node, knobs);
        let process = identity.node;
        let nothing = Arc::new(MemoryLog::new(process, 0));
        let mut storage = Storage::of(nothing, identity.replica);
        storage.snapshots = snapshots.map(|snapshots| (snapshots, knobs.snapshot_interval));
        let (nodes, clustered) = {
            let state = world.lock();
            (state.nodes.len(), state.broker.clustered)
        };
        let opened = JetStreamLog::open_on(
            Arc::new(SimBroker::new(world.clone(), node, gone.clone())),
            knobs.stream(nodes, clustered),
            identity,
            storage.in_flight.clone(),
            None,
            Arc::new(|_| {}),
        );
        match opened.await {
            Ok(log) => {
                storage.log = Arc::new(PausedLog {
                    log,
                    world: world.clone(),
                });
                return (process, storage);
            }
            Err(
                error @ (SetupError::Away { .. }
                | SetupError::Refused { .. }
                | SetupError::NoLeader { .. }),
            ) => {
                world.note(|| format!("node {node} is started again: {error}"));
            }
            Err(error) => world.violate(format!("node {node} can't open its log: {error}")),
        }
        sleep(START_AGAIN_AFTER).await;
        world.slot(node).excuse();
    }
}

async fn live(
    world: World,
    node: usize,
    config: Config,
    knobs: Knobs,
    stop: CancellationToken,
    gone: CancellationToken,
) {
    let opened = stop.run_until_cancelled(open(&world, node, &knobs, &gone));
    let Some((process, storage)) = opened.await else {
        drop(forget(&world, node));
        return;
    };
    let log = storage.log.id();
    let (gaps, resyncs, divergences) = (Arc::default(), Arc::default(), Arc::default());
    let resources = NodeResources {
        node: process,
        started_ns: world.lock().broker.now_ns(),
        critical: CriticalTasks::default(),
        store: Store::new(),
        storage,
        peers: Arc::new(Phone::new(world.clone(), node)),
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
    world.note(|| format!("node {node} has stopped"));
    drop(forget(&world, node));
}

/// Blocking work: begun after a while, then in step with all else.
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
        batch_patches: Histogram::noop(),
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
