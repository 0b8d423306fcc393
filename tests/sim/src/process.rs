//! A process: a real node on the log's twin, from its start to its end, kind or not.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use axum::Router;
use gradestore::backup::Snapshots;
use gradestore::blocking::Blocking;
use gradestore::config::{ClusterConfig, Config, HttpConfig};
use gradestore::http::Answered;
use gradestore::http::Credentials;
use gradestore::http::backup::BackupMetrics;
use gradestore::log::Origin;
use gradestore::memory::MemoryMax;
use gradestore::node::{Node, Parts};
use gradestore::replication::{CheckpointMetrics, WriterLimits};
use gradestore::storage::Storage;
use gradestore::store::Store;
use gradestore::telemetry::Replication;
use metrics::{Counter, Histogram};
use tempfile::TempDir;
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::coroutine::Coroutine;
use crate::phone::{Phone, url};
use crate::twin::Twin;
use crate::world::World;

pub const USERNAME: &str = "sim";
pub const PASSWORD: &str = "secret";
/// How long requests may take to finish once a node stops.
const DRAIN_MAX: Duration = Duration::from_secs(4);

/// What differs between the nodes of different runs.
#[derive(Debug, Clone)]
pub struct Knobs {
    pub snapshots: bool,
    pub snapshot_interval: Duration,
    pub checkpoint_interval: Duration,
    pub buffer_bytes_max: u64,
    pub batch_patches_max: usize,
    pub queue_patches_max: usize,
    pub chunk_text_bytes: usize,
    pub backups_max: usize,
    pub by_hand: bool,
    /// How long blocking work waits for its turn, and how often.
    pub work_wait_ms: u64,
}

impl Knobs {
    pub const WRITE_WAIT_MAX: Duration = Duration::from_secs(2);
    pub const POSITION_WAIT_MAX: Duration = Duration::from_secs(1);

    fn config(&self, nodes: usize) -> Config {
        let nowhere = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let peers = match self.by_hand {
            true => (0..nodes).map(url).collect(),
            false => Vec::new(),
        };
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
                queue_patches_max: self.queue_patches_max,
                batch_patches_max: self.batch_patches_max,
                wait_max: Self::WRITE_WAIT_MAX,
                bulks_max: 1,
            },
            memory_max: MemoryMax::Percent(100),
            restore_from: None,
            cluster: ClusterConfig {
                peers,
                checkpoint_interval: self.checkpoint_interval,
                restore_buffer_bytes_max: self.buffer_bytes_max,
                ..ClusterConfig::alone()
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
    /// Peers that were heard to hold something else.
    pub divergences: Arc<AtomicU64>,
    /// Cancelled when it is over.
    pub gone: CancellationToken,
}

/// Starts a process at `node`, if there is none.
pub fn start(world: &World, node: usize, knobs: &Knobs) {
    let mut state = world.lock();
    let fence = (state.broker.end(), state.broker.end_ns());
    let nodes = state.nodes.len();
    let slot = &mut state.nodes[node];
    if slot.life.is_some() {
        return;
    }
    slot.starts += 1;
    slot.fence = fence;
    slot.helpless_since = None;
    let (stop, gone) = (CancellationToken::new(), CancellationToken::new());
    let live = live(
        world.clone(),
        node,
        knobs.config(nodes),
        knobs.clone(),
        stop.clone(),
    );
    slot.life = Some(Life {
        stop,
        gone,
        task: tokio::spawn(live).abort_handle(),
    });
    drop(state);
    world.note(|| format!("node {node} starts; the log ends at {}", fence.0));
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
    let mut slot = world.slot(node);
    slot.process = None;
    slot.announce = None;
    let life = slot.life.take()?;
    life.gone.cancel();
    drop(slot);
    world.change();
    Some(life)
}

async fn live(world: World, node: usize, config: Config, knobs: Knobs, stop: CancellationToken) {
    let start = world.slot(node).starts;
    let origin = Origin::of(((node as u128 + 1) << 64) | u128::from(start));
    let opened = stop.run_until_cancelled(Twin::open(world.clone(), node, origin));
    let Some(twin) = opened.await else {
        drop(forget(&world, node));
        return;
    };
    let mut storage = Storage::of(Arc::new(twin));
    let dir = world
        .slot(node)
        .dir
        .as_ref()
        .map(|dir| dir.path().to_owned());
    storage.snapshots = dir.map(|dir| {
        let snapshots = Snapshots::open(&dir).expect("a directory for snapshots");
        (snapshots, knobs.snapshot_interval)
    });
    let (gaps, resyncs, divergences) = (Arc::default(), Arc::default(), Arc::default());
    let parts = Parts {
        origin,
        began_ns: world.lock().broker.now_ns(),
        store: Store::new(),
        storage,
        peers: Arc::new(Phone::new(world.clone(), node)),
        blocking: blocking(world.clone(), knobs.work_wait_ms),
        background: blocking(world.clone(), knobs.work_wait_ms),
        idle: blocking(world.clone(), knobs.work_wait_ms),
        backup_metrics: BackupMetrics::new(),
        answered: Answered::default(),
    };
    let (built, mut tasks) = Node::new(&config, parts, &metrics(&gaps, &resyncs, &divergences));
    let built = Arc::new(built);
    built.announce(url(node));
    {
        let mut slot = world.slot(node);
        let Some(gone) = slot.life.as_ref().map(|life| life.gone.clone()) else {
            return;
        };
        slot.process = Some(Process {
            node: Arc::clone(&built),
            write: built.write().0,
            read: built.read().0,
            gaps,
            resyncs,
            divergences,
            gone,
        });
    }
    world.change();
    tokio::select! {
        biased;
        () = stop.cancelled() => {}
        failed = tasks.start(None) => world.violate(format!("node {node} did not start: {failed:?}")),
    }
    let stopping = built.stopping();
    let finished = async {
        while world.slot(node).requests > 0 {
            world.wait().await;
        }
        tasks.finish_writing().await;
    };
    let _ = timeout(DRAIN_MAX, finished).await;
    stopping.write_snapshot().await;
    world.note(|| format!("node {node} has stopped"));
    drop(forget(&world, node));
}

/// Blocking work: begun after a while, then in step with all else.
fn blocking(world: World, wait_ms: u64) -> Blocking {
    Blocking::by(Arc::new(move |work| {
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
) -> Replication {
    Replication {
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
