//! A node's tasks.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::log::{InFlight, Log};
use crate::node::Node;
use crate::node::config::Config;
use crate::replication::memory::{self, DoesNotFit};
use crate::replication::state::{NodeState, Readiness};
use crate::replication::{
    Bootstrap, BootstrapError, CompleteState, ReplicaDriver, Snapshotter, WriterTask, restore_seed,
};
use crate::sys::exec::Blocking;
use crate::sys::tasks::{CriticalTasks, TaskEnded};

/// How often requests that have waited too long are answered with an error.
const EXPIRE_EVERY: Duration = Duration::from_millis(250);

/// Why a node did not start, or stopped by itself.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The store can't be restored.
    #[error(transparent)]
    Bootstrap(#[from] BootstrapError),
    /// The restored state can't be written as a snapshot, so the next start would not have it.
    #[error(
        "cannot write a snapshot of the restored data: {0}; free space, and start again with \
         --restore-from"
    )]
    SeedNotKept(#[source] io::Error),
    /// The file needs more memory than the system has.
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

/// A node's tasks. Dropping this aborts them at once, as the end of the process would.
pub struct NodeTasks {
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

impl NodeTasks {
    /// Starts all tasks of `node` but the driver, which [`run`](Self::run) starts.
    pub(super) fn spawn(
        config: &Config,
        node: &Node,
        critical: CriticalTasks,
        writer: WriterTask,
        driver: ReplicaDriver,
    ) -> Self {
        let mut tasks = Self {
            blocking: node.blocking.clone(),
            snapshotter: node.snapshotter.clone(),
            critical,
            log: Arc::clone(&node.log),
            driver: Some(driver),
            writing: JoinSet::new(),
            stop_writing: CancellationToken::new(),
            rest: JoinSet::new(),
        };
        let snapshots = node.storage.snapshots.as_ref();
        let interval = snapshots.map(|(_, interval)| *interval);
        tasks.spawn_writing(writer, interval, &node.readiness);
        let in_flight = node.storage.in_flight.clone();
        tasks.spawn_rest("expire", expire(in_flight, config.writer.wait_max));
        let peers = node.peers.clone();
        tasks.spawn_rest("peers", async move { peers.watch().await });
        tasks
    }

    fn spawn_writing(
        &mut self,
        writer: WriterTask,
        interval: Option<Duration>,
        readiness: &Readiness,
    ) {
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
            let file = match (seed, snapshots) {
                (Some(seed), _) => Some(seed),
                (None, Some(snapshots)) => snapshots.newest().map_err(StartError::System)?,
                (None, None) => None,
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

/// The snapshot that a node writes when it stops; `None` if it was not ready, or has no data
/// directory.
pub struct FinalSnapshot(pub(super) Option<(Snapshotter, CompleteState)>);

impl FinalSnapshot {
    /// Writes the snapshot, if the state has changed since the last one.
    pub async fn write(&self) {
        if let Some((snapshotter, state)) = &self.0 {
            snapshotter.write_if_changed(state.clone()).await;
        }
    }
}
