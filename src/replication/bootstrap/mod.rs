//! Recovers a complete state, at the start of a node and whenever it has discarded its state. The
//! sources are, in this order:
//!
//! 1. the newest intact snapshot whose position the log still covers; else
//! 2. the backup of a peer on this log, starting with the peer with the highest position; else
//! 3. the whole log, if it still begins at its first batch; else
//! 4. none: the node stays unready, reports why, and tries again.
//!
//! As soon as the position of a file is known, the log is read from the batch after it into a
//! [`Buffered`], while rows are still being read. Otherwise the log might be trimmed beyond that
//! position before the restore has ended.
//!
//! The node is unready during a restore. A restore that fails leaves the store empty.

mod error;

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio_util::sync::CancellationToken;

use self::error::SourceError;
pub use self::error::{Attempts, BootstrapError};
use super::applied::AppliedIndex;
use super::buffered::Buffered;
use super::peers::{Peer, Peers};
use super::tracker::{Restore, RestoreTracker};
use crate::backup::{
    self, BackupError, EndRecord, HeadRecord, SnapshotInfo, Snapshots, Summary, restore,
};
use crate::log::{Bounds, Chain, Log, ReadError, Seq, Subscription};
use crate::replication::memory;
use crate::replication::peer_client::RemoteError;
use crate::replication::state::{NodeState, Readiness};
use crate::store::Store;
use crate::sys::cancellable_reader::CancellableReader;
use crate::sys::exec::Blocking;

/// The maximum number of peers that one attempt requests a backup from.
const PEERS_MAX: usize = 32;

/// Restores a store and subscribes to the log at its position.
pub struct Bootstrap {
    /// The records.
    pub store: Store,
    /// The position of the records.
    pub applied: AppliedIndex,
    /// The log.
    pub log: Arc<dyn Log>,
    /// The snapshots of earlier processes; `None` without a data directory.
    pub snapshots: Option<Snapshots>,
    /// The other replicas, which may send a backup.
    pub peers: Peers,
    /// Records the progress.
    pub tracker: RestoreTracker,
    /// How many bytes of the log may be read ahead during a restore.
    pub buffer_bytes_max: u64,
    /// The threads that read rows.
    pub blocking: Blocking,
}

/// The position from which a restored state is complete. Its rows were read while writes went on,
/// so they may include batches up to here. The default is the beginning of the log.
#[derive(Debug, Clone, Copy, Default)]
pub struct CompleteFrom {
    /// The batch.
    pub seq: Seq,
    /// The log's history up to it.
    pub chain: Chain,
}

/// A recovered state: the store is at a position, and the log is read from there.
pub(super) struct Recovered {
    /// The log from that position on.
    pub subscription: Buffered,
    /// From where on the state is complete.
    pub complete_from: CompleteFrom,
    /// The snapshot that was restored, if it was one.
    pub snapshot: Option<SnapshotInfo>,
}

impl Bootstrap {
    /// Tries each source that reaches `at_least` once. The store must be empty.
    ///
    /// # Errors
    /// No source is usable. The store is empty.
    pub(super) async fn run(
        &self,
        readiness: &Readiness,
        at_least: Seq,
    ) -> Result<Recovered, BootstrapError> {
        let bounds = self.log.fetch_bounds().await?;
        let from_snapshot = self.restore_snapshot(bounds, at_least, readiness).await?;
        if let Some(recovered) = from_snapshot {
            return Ok(recovered);
        }
        let whole = bounds.first == 1 && at_least == 0;
        let mut attempts = Attempts::default();
        // If the log is empty, no peer has more.
        if self.log.is_replicated() && !(whole && bounds.end == 0) {
            readiness.block(NodeState::Restoring, "asking peers for a backup");
            for peer in self.peers.ask().await.into_iter().take(PEERS_MAX) {
                match self.restore_peer(&peer, at_least, readiness).await {
                    Ok(recovered) => return Ok(recovered),
                    Err(error) => {
                        tracing::warn!(peer = &*peer.url, %error, "cannot copy data from peer");
                        attempts.0.push((peer.url, error.to_string()));
                    }
                }
            }
        }
        if !whole {
            return Err(BootstrapError::NoSource {
                first: bounds.first,
                peers: attempts,
            });
        }
        readiness.block(NodeState::CatchingUp, "reading the whole log");
        let subscription = self.log.subscribe(self.applied.base()).await?;
        Ok(self.recovered(subscription, CompleteFrom::default()))
    }

    /// Subscribes at the store's position. The state is complete from `complete_from` on.
    pub(super) async fn resume(
        &self,
        complete_from: CompleteFrom,
    ) -> Result<Recovered, BootstrapError> {
        let position = self.applied.position();
        let subscription = self.log.subscribe(position).await?;
        let complete_from = match complete_from.seq < position.seq {
            true => CompleteFrom {
                seq: position.seq,
                chain: position.chain,
            },
            false => complete_from,
        };
        Ok(self.recovered(subscription, complete_from))
    }

    fn recovered(
        &self,
        subscription: Box<dyn Subscription>,
        complete_from: CompleteFrom,
    ) -> Recovered {
        Recovered {
            subscription: Buffered::new(subscription, self.buffer_bytes_max, Arc::default()),
            complete_from,
            snapshot: None,
        }
    }

    /// Restores the newest usable snapshot.
    async fn restore_snapshot(
        &self,
        bounds: Bounds,
        at_least: Seq,
        readiness: &Readiness,
    ) -> Result<Option<Recovered>, BootstrapError> {
        let mut other_log = None;
        let found = self.snapshots.as_ref().map(Snapshots::list);
        for (position, path) in found.transpose()?.unwrap_or_default() {
            let first = File::open(&path).map_err(BackupError::Open);
            let head = match first.and_then(backup::read_head) {
                Ok(head) => head,
                Err(error) => {
                    reject(&path, &error);
                    continue;
                }
            };
            if let Some(head) = head.filter(|head| head.log_id != self.log.id().0) {
                other_log.get_or_insert((path, head.log_id));
                continue;
            }
            if position > bounds.end {
                return Err(BootstrapError::LogBehind {
                    fix: match self.log.is_replicated() {
                        true => "waiting until the log is restored".to_owned(),
                        false => restore_advice(&path),
                    },
                    path,
                    position,
                    end: bounds.end,
                });
            }
            if position < at_least || position + 1 < bounds.first {
                let first = bounds.first;
                tracing::warn!(
                    path = %path.display(),
                    log_first = first,
                    "cannot use snapshot: the log does not cover it"
                );
                continue;
            }
            match self.restore_file(&path, readiness).await {
                Ok(recovered) => return Ok(Some(recovered)),
                Err(SourceError::Backup(error)) => reject(&path, &error),
                Err(SourceError::Log(error)) if !matches!(error, ReadError::Trimmed { .. }) => {
                    return Err(error.into());
                }
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "cannot use snapshot");
                    if matches!(error, SourceError::NoPosition) {
                        other_log.get_or_insert((path, "unknown".into()));
                    }
                }
            }
        }
        match other_log {
            None => Ok(None),
            Some((path, found)) => Err(self.other_log(path, found)),
        }
    }

    /// The error for snapshots of log `found`, of which the newest is at `path`.
    fn other_log(&self, path: PathBuf, found: Box<str>) -> BootstrapError {
        let here = self.log.id().0;
        let fix = match self.log.is_replicated() {
            true => format!(
                "restore the stream of log {found}, or start this replica once with --abandon-log \
                 {found} to discard its data and follow log {here}"
            ),
            false => restore_advice(&path),
        };
        BootstrapError::OtherLog {
            path,
            found,
            here,
            fix,
        }
    }

    async fn restore_file(
        &self,
        path: &Path,
        readiness: &Readiness,
    ) -> Result<Recovered, SourceError> {
        let source = path.display().to_string();
        readiness.block(NodeState::Restoring, format!("loading snapshot {source}"));
        let file = File::open(path).map_err(BackupError::Open)?;
        let bytes_total = file.metadata().map_or(0, |metadata| metadata.len());
        let restore = self.tracker.begin(&source, bytes_total);
        let (mut recovered, head, summary) = self.restore(file, async { Ok(()) }, &restore).await?;
        recovered.snapshot = Some(SnapshotInfo {
            head,
            rows: summary.rows,
            bytes: summary.bytes,
            took: Duration::ZERO,
            at: modified(path),
        });
        Ok(recovered)
    }

    async fn restore_peer(
        &self,
        peer: &Peer,
        at_least: Seq,
        readiness: &Readiness,
    ) -> Result<Recovered, SourceError> {
        if peer.announced_unready() {
            return Err(SourceError::NotReady(peer.state.clone()));
        }
        if peer.position.is_some_and(|position| position < at_least) {
            return Err(SourceError::Behind(at_least));
        }
        let incoming = self.peers.backup(peer).await?;
        if incoming
            .headers
            .node
            .as_ref()
            .is_some_and(|node| self.peers.is_me(node))
        {
            return Err(SourceError::Itself);
        }
        let reason = format!("copying data from peer {}", peer.url);
        readiness.block(NodeState::Restoring, reason);
        let restore = self.tracker.begin(&peer.url, 0);
        let restored = self.restore(incoming.source, incoming.pump, &restore);
        let (recovered, ..) = restored.await?;
        Ok(recovered)
    }

    /// Reads `source`, which `pump` feeds, into the store, and the log from the position of
    /// `source` into a buffer. If either fails, the store is empty.
    async fn restore(
        &self,
        source: impl Read + Unpin + Send + 'static,
        pump: impl Future<Output = Result<(), RemoteError>>,
        tracked: &Restore,
    ) -> Result<(Recovered, HeadRecord, Summary), SourceError> {
        let cancel = CancellationToken::new();
        let source = CancellableReader {
            source,
            cancel: cancel.clone(),
        };
        let rows = {
            let (store, progress) = (self.store.clone(), Arc::clone(&tracked.progress));
            self.blocking
                .run(move || restore(source, &store, &progress))
        };
        let rows_restored = CancellationToken::new();
        let rows = async {
            let (fed, rows) = tokio::join!(pump, rows);
            rows_restored.cancel();
            let summary = rows.unwrap_or_else(|error| Err(BackupError::Io { at: 0, error }));
            // A broken transfer is the cause of an incomplete file, so its error comes first.
            fed?;
            Ok::<_, SourceError>(summary?)
        };
        let log = async {
            let read_ahead = self.read_ahead(tracked, &rows_restored);
            read_ahead.await.inspect_err(|_| cancel.cancel())
        };
        let (summary, buffered) = tokio::join!(rows, log);
        let restored = match (summary, buffered) {
            // An error of the log comes first: it made the rows end.
            (_, Err(error)) | (Err(error), Ok(_)) => Err(error),
            (Ok(summary), Ok(buffered)) => match (summary.records.clone(), buffered) {
                (Some((head, end)), Some(buffered)) => self
                    .check_end(&head, &end)
                    .await
                    .map(|()| (head, end, summary, buffered)),
                _ => Err(SourceError::NoPosition),
            },
        };
        self.tracker
            .end(restored.as_ref().ok().map(|(_, _, summary, _)| summary));
        let (head, end, summary, subscription) = restored.inspect_err(|_| self.store.clear())?;
        self.applied.restored(head.position());
        let recovered = Recovered {
            subscription,
            complete_from: CompleteFrom {
                seq: end.position,
                chain: end.chain,
            },
            snapshot: None,
        };
        Ok((recovered, head, summary))
    }

    /// Checks that the end position of a backup is between its start and the log's end. The state
    /// is complete only once the log is applied up to there.
    async fn check_end(&self, head: &HeadRecord, end: &EndRecord) -> Result<(), SourceError> {
        let position = end.position;
        let known = self.log.end();
        let log_end = match position > known {
            true => self.log.fetch_bounds().await?.end,
            false => known,
        };
        match (head.position..=log_end).contains(&position) {
            true => Ok(()),
            false => Err(SourceError::EndUnknown { position, log_end }),
        }
    }

    /// Reads the log from the position in the backup's head until all rows are `restored`; `None`
    /// if the backup ends without a head.
    async fn read_ahead(
        &self,
        tracked: &Restore,
        restored: &CancellationToken,
    ) -> Result<Option<Buffered>, SourceError> {
        let head = tokio::select! {
            biased;
            head = tracked.progress.head() => head,
            () = restored.cancelled() => return Ok(None),
        };
        if head.log_id != self.log.id().0 {
            return Err(SourceError::OtherLog(head.log_id));
        }
        memory::check_fits(head.rows_expected)?;
        let (bounds, position) = (self.log.fetch_bounds().await?, head.position);
        // Checked first: a log treats a subscription beyond its end as a loss of batches.
        if position > bounds.end || position + 1 < bounds.first {
            return Err(SourceError::NotCovered { position, bounds });
        }
        let subscription = self.log.subscribe(head.position()).await?;
        let counts = Arc::clone(&tracked.buffer);
        let mut buffered = Buffered::new(subscription, self.buffer_bytes_max, counts);
        tokio::select! {
            biased;
            () = restored.cancelled() => Ok(Some(buffered)),
            ended = buffered.fill() => match ended {
                Ok(never) => match never {},
                Err(error @ ReadError::Trimmed { .. }) => Err(error.into()),
                // The rows are needed whatever has become of the log. Reading it fails again.
                Err(_) => {
                    restored.cancelled().await;
                    Ok(Some(buffered))
                }
            },
        }
    }
}

/// Logs why a snapshot is not usable, and quarantines it if it is damaged. Otherwise it would count
/// as one of the two snapshots that are kept, and the log would be trimmed up to it.
fn reject(path: &Path, error: &BackupError) {
    tracing::warn!(path = %path.display(), %error, "cannot use snapshot");
    if error.is_damage() {
        backup::quarantine(path, "damaged");
    }
}

/// The fix for a single node that has lost its log.
fn restore_advice(snapshot: &Path) -> String {
    format!(
        "put the right log back, or start with an empty data directory and --restore-from {}",
        snapshot.display()
    )
}

fn modified(path: &Path) -> SystemTime {
    let modified = fs::metadata(path).and_then(|metadata| metadata.modified());
    modified.unwrap_or_else(|_| SystemTime::now())
}
