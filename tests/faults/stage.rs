//! What the replica under test is doing when the fault comes, and what keeps it at that.

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

/// What a client takes of a backup before it stops: with what the system holds it is less than all.
const TAKEN_BYTES: u64 = 100_000;
/// What passes of a peer's backup, which is not compressed, before it is held: some of its chunks.
const PASSED_BYTES: u64 = 500_000;

/// What the replica under test is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// It takes writes like the others.
    Steady,
    /// It is in the middle of a snapshot.
    Snapshot,
    /// A client is in the middle of `GET /backup`.
    Backup,
    /// It is in the middle of a peer's backup.
    Restoring,
    /// All rows are in, and the log's batches since then are not.
    Draining,
    /// It was told to stop, and requests are still running.
    Stopping,
}

/// What keeps the replica in its stage.
pub(crate) enum Hold {
    /// Nothing need.
    Nothing,
    /// The snapshot goes into a pipe that nobody empties.
    Snapshot(File),
    /// The backup goes to a client that reads no further.
    Backup(Throttle, Download),
    /// The peers' backups come no further.
    Restoring,
    /// The log's batches do not come.
    Batches,
}

/// A client that is being given a backup.
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

    /// Whether the replica has no whole state yet.
    pub(crate) fn incomplete(self) -> bool {
        matches!(self, Self::Restoring | Self::Draining)
    }

    /// Rows that are there from the beginning, about 90 bytes each, compressed 35: of a snapshot
    /// more than a pipe holds, of a peer's backup more than passes, of a client's more than the
    /// system holds of a connection.
    pub(crate) fn rows(self) -> u64 {
        match self {
            Self::Backup => 40_000,
            _ => 10_000,
        }
    }

    /// Brings the replica under test there; the other two are ready.
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
    // Nobody writes yet, so it is known where the next snapshot will be.
    let written = |status: &serde_json::Value| status["snapshot"]["position"] == status["position"];
    let status = scene
        .node(A)
        .status_where("a snapshot of all", written)
        .await;
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
    let throttle = Throttle::without_target(TAKEN_BYTES).await;
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
    scene.load_on();
    scene.load.progress(&[B, C], 10).await;
    for way in &scene.ways {
        way.set_limit(PASSED_BYTES);
    }
    scene.held_at = scene.position(B).await;
    scene.start(A).await;
    let [one, other] = &scene.ways;
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
    scene.open_ways();
    scene
        .node(A)
        .status_where("catching up", |status| {
            status["state"] == "catching-up" && status["restore"]["stage"] == "catching-up"
        })
        .await;
    // And it stays so, however much the others answer.
    scene.load.progress(&[B, C], 10).await;
    assert_serves_nothing(scene.node(A), &["catching-up"]).await;
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
    // Its clients' writes can't be answered any more, and they do not give up so soon.
    let running = async || {
        let in_flight = "gradestore_http_requests_in_flight";
        // Who asks is one of them.
        scene.node(A).metric(in_flight).await.unwrap() - 1.0
    };
    eventually("writes that wait", async || {
        (scene.load.all_wait(A) && running().await >= 2.0).then_some(())
    })
    .await;
    scene.node(A).signal(Signal::TERM);
    let stopping = |status: &serde_json::Value| status["state"] == "stopping";
    scene.node(A).status_where("stopping", stopping).await;
    assert!(running().await >= 1.0, "nothing is running");
    Hold::Batches
}

impl Hold {
    /// Lets the replica go on.
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
            Self::Restoring => scene.open_ways(),
            Self::Batches => scene.hold_batches(false),
        }
    }
}
