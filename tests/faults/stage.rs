//! The stages of the replica under test when the fault is injected, and what holds it there.

use std::fs::File;
use std::io::Read;

use rustix::process::Signal;
use tokio::task::JoinHandle;

use crate::broker::status_where;
use crate::disk::{ask_backup, open_pipe, rest_of};
use crate::harness::Ports;
use crate::scene::{A, B, C, Scene};
use crate::seeded::serves_nothing;
use crate::throttle::Throttle;
use crate::wire::{eventually, in_time};

/// The bytes that a client reads of a backup before it stops. With the system's buffers this is
/// less than the whole backup.
const TAKEN_BYTES: u64 = 100_000;
/// The bytes of a peer's backup, which is not compressed, that pass before the proxy holds it.
const PASSED_BYTES: u64 = 500_000;

/// A stage of the replica under test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// It accepts writes like the others.
    Steady,
    /// It is writing a snapshot.
    Snapshot,
    /// It is sending a backup to a client.
    Backup,
    /// It is restoring a peer's backup.
    Restoring,
    /// All rows are restored, and the batches since then are missing.
    Draining,
    /// It is shutting down with requests in flight.
    Stopping,
}

/// What holds the replica in its stage.
pub(crate) enum Hold {
    /// Nothing is needed.
    Nothing,
    /// A pipe instead of the snapshot file, which is not read.
    Snapshot(File),
    /// A client that has stopped reading the backup.
    Backup(Throttle, Download),
    /// The peers' backups are held by proxies.
    Restoring,
    /// The log's batches are held by a proxy.
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

    /// Whether the replica has no complete state yet.
    pub(crate) fn incomplete(self) -> bool {
        matches!(self, Self::Restoring | Self::Draining)
    }

    /// The number of rows at the start, about 90 bytes each, 35 compressed: enough to fill the pipe
    /// of a snapshot, the limit of a peer's backup and the system's buffers of a client's
    /// connection.
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
    scene.load_on();
    scene.load.progress(&[A, B, C], 10).await;
}

async fn snapshot(scene: &mut Scene) -> Hold {
    scene.snapshots_often = true;
    scene.start(A).await;
    scene.ready(A).await;
    // There are no writes yet, so the position of the next snapshot is known.
    let written = |status: &serde_json::Value| status["snapshot"]["position"] == status["position"];
    let status = status_where(scene.node(A), "a snapshot of all", written).await;
    let next = status["position"].as_u64().unwrap() + 1;
    let name = format!("snapshots/grades-{next:020}.csv.gz.partial");
    let mut pipe = open_pipe(&scene.dir(A).join(name));
    let first = scene.node(B).set(r#"{"user_id":"user 1"}"#).await;
    assert_eq!(first.position(), next);
    eventually("a snapshot under way", async || {
        pipe.read(&mut [0; 1024]).ok().filter(|read| *read > 0)
    })
    .await;
    scene.load_on();
    scene.load.progress(&[A, B, C], 10).await;
    Hold::Snapshot(pipe)
}

async fn backup(scene: &mut Scene) -> Hold {
    steady(scene).await;
    let throttle = Throttle::to_nobody(TAKEN_BYTES).await;
    throttle.lead_to(scene.node(A).write);
    let through = Ports::new(throttle.address, throttle.address, throttle.address);
    let client = tokio::spawn(async move {
        let answer = ask_backup(&through).await.error_for_status()?;
        Ok(answer.bytes().await?.to_vec())
    });
    throttle.reached(1).await;
    let running = scene.node(A).metric("gradestore_backups_running").await;
    assert_eq!(running, Some(1.0));
    Hold::Backup(throttle, client)
}

async fn restoring(scene: &mut Scene) {
    scene.load_on();
    scene.load.progress(&[B, C], 10).await;
    for way in &scene.ways {
        way.limit(PASSED_BYTES);
    }
    scene.held_at = scene.position(B).await;
    scene.start(A).await;
    let [one, other] = &scene.ways;
    tokio::select! {
        () = one.reached(1) => {}
        () = other.reached(1) => {}
    }
    status_where(scene.node(A), "rows and batches", |status| {
        let restore = &status["restore"];
        status["state"] == "restoring"
            && restore["rows"].as_u64() > Some(0)
            && restore["buffered_batches"].as_u64() > Some(10)
    })
    .await;
    serves_nothing(scene.node(A), &["restoring"]).await;
}

async fn draining(scene: &mut Scene) -> Hold {
    restoring(scene).await;
    scene.hold_batches(true);
    scene.load.progress(&[B, C], 10).await;
    scene.open_ways();
    status_where(scene.node(A), "catching up", |status| {
        status["state"] == "catching-up" && status["restore"]["stage"] == "catching-up"
    })
    .await;
    // It stays in this state while the others acknowledge writes.
    scene.load.progress(&[B, C], 10).await;
    serves_nothing(scene.node(A), &["catching-up"]).await;
    Hold::Batches
}

async fn stopping(scene: &mut Scene) -> Hold {
    steady(scene).await;
    scene.hold_batches(true);
    eventually("batches that do not come", async || {
        let (a, b) = (scene.position(A).await, scene.position(B).await);
        (a + 10 < b).then_some(())
    })
    .await;
    // Its clients' writes can't be acknowledged any more, and have not timed out yet.
    let running = async || {
        let in_flight = "gradestore_http_requests_in_flight";
        // The metrics request itself is one of them.
        scene.node(A).metric(in_flight).await.unwrap() - 1.0
    };
    eventually("writes that wait", async || {
        (scene.load.all_wait(A) && running().await >= 2.0).then_some(())
    })
    .await;
    scene.node(A).signal(Signal::TERM);
    let stopping = |status: &serde_json::Value| status["state"] == "stopping";
    status_where(scene.node(A), "stopping", stopping).await;
    assert!(running().await >= 1.0, "nothing is running");
    Hold::Batches
}

impl Hold {
    /// Releases the replica.
    pub(crate) async fn release(self, scene: &mut Scene) {
        match self {
            Self::Nothing => {}
            Self::Snapshot(mut pipe) => {
                rest_of(&mut pipe).await;
            }
            Self::Backup(throttle, client) => {
                throttle.open();
                let ended = in_time("the backup's end", client).await.unwrap();
                scene.backup = Some(ended.ok());
            }
            Self::Restoring => scene.open_ways(),
            Self::Batches => scene.hold_batches(false),
        }
    }
}
