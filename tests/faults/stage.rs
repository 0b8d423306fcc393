//! The stages of the replica under test when the fault occurs, and how it is held in each.

use std::fs::File;
use std::io::Read;

use rustix::process::Signal;
use tokio::task::JoinHandle;

use crate::harness::Ports;
use crate::harness::backup_files::{open_pipe, read_pipe_to_end, request_backup};
use crate::harness::cluster::seeded::assert_serves_nothing;
use crate::harness::cluster::throttle::Throttle;
use crate::harness::wire::{eventually, with_timeout};
use crate::scene::{A, B, C, Scene};

/// How much of a backup a client reads before it stops. With the buffers of the connection this is
/// less than the backup.
const READ_BYTES: u64 = 100_000;
/// How much of a peer's uncompressed backup passes before the proxy blocks: some of its chunks.
const PASSED_BYTES: u64 = 500_000;

/// A stage of the replica under test, the column of a cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// It accepts writes like the others.
    Steady,
    /// It is writing a snapshot.
    Snapshot,
    /// It is sending a backup to a client of `GET /backup`.
    Backup,
    /// It is restoring a peer's backup.
    Restoring,
    /// It has restored all rows, and has not applied the later batches of the log.
    Draining,
    /// It has received a SIGTERM, and requests are in flight.
    Stopping,
}

/// How the replica is held in its stage.
pub(crate) enum Hold {
    /// It is not held.
    Nothing,
    /// The snapshot is written to a pipe that nothing reads.
    Snapshot(File),
    /// The backup is sent to a client that stops reading.
    Backup(Throttle, Download),
    /// The proxies block the peers' backups.
    Restoring,
    /// The proxy holds back the log's batches.
    Batches,
}

/// A client that downloads a backup.
pub(crate) type Download = JoinHandle<Result<Vec<u8>, reqwest::Error>>;

impl Stage {
    pub(crate) const ALL: [Self; 6] = [
        Self::Steady,
        Self::Snapshot,
        Self::Backup,
        Self::Restoring,
        Self::Draining,
        Self::Stopping,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Steady => "steady",
            Self::Snapshot => "snapshot",
            Self::Backup => "backup",
            Self::Restoring => "restoring",
            Self::Draining => "draining",
            Self::Stopping => "stopping",
        }
    }

    /// Whether the state of the replica is incomplete.
    pub(crate) fn is_incomplete(self) -> bool {
        matches!(self, Self::Restoring | Self::Draining)
    }

    /// The number of rows in the seed: about 90 bytes each, 35 compressed. A snapshot must be
    /// larger than a pipe, a peer's backup larger than what passes the proxy, and a client's backup
    /// larger than the buffers of a connection.
    pub(crate) fn rows(self) -> u64 {
        match self {
            Self::Backup => 40_000,
            _ => 10_000,
        }
    }

    /// Brings the replica under test into this stage. The other two are ready.
    pub(crate) async fn enter(self, scene: &mut Scene) {
        scene.hold = match self {
            Self::Steady => {
                steady(scene).await;
                Hold::Nothing
            }
            Self::Snapshot => snapshot(scene).await,
            Self::Backup => backup(scene).await,
            Self::Restoring => {
                restoring(scene).await;
                Hold::Restoring
            }
            Self::Draining => draining(scene).await,
            Self::Stopping => stopping(scene).await,
        };
    }
}

async fn steady(scene: &mut Scene) {
    scene.start(A).await;
    scene.ready(A).await;
    scene.start_load();
    scene.load.progress(&[A, B, C], 10).await;
}

async fn snapshot(scene: &mut Scene) -> Hold {
    scene.snapshots_often = true;
    scene.start(A).await;
    scene.ready(A).await;
    // No client writes yet, so the position of the next snapshot is known.
    let written = |status: &serde_json::Value| status["snapshot"]["position"] == status["position"];
    let status = scene
        .node(A)
        .status_where("a snapshot at the position", written)
        .await;
    let next = status["position"].as_u64().unwrap() + 1;
    let name = format!("snapshots/grades-{next:020}.csv.gz.partial");
    let mut pipe = open_pipe(&scene.dir(A).join(name));
    let first = scene.node(B).set(r#"{"user_id":"user 1"}"#).await;
    assert_eq!(first.position(), next);
    eventually("a snapshot in progress", async || {
        pipe.read(&mut [0; 1024]).ok().filter(|read| *read > 0)
    })
    .await;
    scene.start_load();
    scene.load.progress(&[A, B, C], 10).await;
    Hold::Snapshot(pipe)
}

async fn backup(scene: &mut Scene) -> Hold {
    steady(scene).await;
    let throttle = Throttle::without_target(READ_BYTES).await;
    throttle.set_target(scene.node(A).write);
    let through = Ports::new(throttle.address, throttle.address, throttle.address);
    let client = tokio::spawn(async move {
        let response = request_backup(&through).await.error_for_status()?;
        Ok(response.bytes().await?.to_vec())
    });
    throttle.wait_until_limited(1).await;
    let running = scene.node(A).metric("gradestore_backups_running").await;
    assert_eq!(running, Some(1.0));
    Hold::Backup(throttle, client)
}

async fn restoring(scene: &mut Scene) {
    scene.start_load();
    scene.load.progress(&[B, C], 10).await;
    for proxy in &scene.backup_proxies {
        proxy.set_limit(PASSED_BYTES);
    }
    scene.trimmable_through = scene.position(B).await;
    scene.start(A).await;
    let [one, other] = &scene.backup_proxies;
    tokio::select! {
        () = one.wait_until_limited(1) => {}
        () = other.wait_until_limited(1) => {}
    }
    scene
        .node(A)
        .status_where("rows and batches", |status| {
            let restore = &status["restore"];
            status["state"] == "restoring"
                && restore["rows"].as_u64() > Some(0)
                && restore["buffered_batches"].as_u64() > Some(10)
        })
        .await;
    assert_serves_nothing(scene.node(A), &["restoring"]).await;
}

async fn draining(scene: &mut Scene) -> Hold {
    restoring(scene).await;
    scene.hold_batches(true);
    scene.load.progress(&[B, C], 10).await;
    scene.open_backup_proxies();
    scene
        .node(A)
        .status_where("catching up", |status| {
            status["state"] == "catching-up" && status["restore"]["stage"] == "catching-up"
        })
        .await;
    // It stays in this state while the others acknowledge writes.
    scene.load.progress(&[B, C], 10).await;
    assert_serves_nothing(scene.node(A), &["catching-up"]).await;
    Hold::Batches
}

async fn stopping(scene: &mut Scene) -> Hold {
    steady(scene).await;
    scene.hold_batches(true);
    eventually("batches that are held back", async || {
        let (a, b) = (scene.position(A).await, scene.position(B).await);
        (a + 10 < b).then_some(())
    })
    .await;
    // The writes of its clients cannot be acknowledged, and have not timed out yet.
    let running = async || {
        let in_flight = "gradestore_http_requests_in_flight";
        // The request for the metrics is in flight too.
        scene.node(A).metric(in_flight).await.unwrap() - 1.0
    };
    eventually("writes in flight", async || {
        (scene.load.all_in_flight(A) && running().await >= 2.0).then_some(())
    })
    .await;
    scene.node(A).signal(Signal::TERM);
    let stopping = |status: &serde_json::Value| status["state"] == "stopping";
    scene.node(A).status_where("stopping", stopping).await;
    assert!(running().await >= 1.0, "no request is in flight");
    Hold::Batches
}

impl Hold {
    /// Releases the replica.
    pub(crate) async fn release(self, scene: &mut Scene) {
        match self {
            Self::Nothing => {}
            Self::Snapshot(mut pipe) => {
                read_pipe_to_end(&mut pipe).await;
            }
            Self::Backup(throttle, client) => {
                throttle.remove_limit();
                let ended = with_timeout("the backup's end", client).await.unwrap();
                scene.backup = Some(ended.ok());
            }
            Self::Restoring => scene.open_backup_proxies(),
            Self::Batches => scene.hold_batches(false),
        }
    }
}
