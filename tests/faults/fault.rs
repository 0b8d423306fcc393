//! The faults, and how each ends.

use std::time::Duration;

use rustix::process::Signal;

use crate::broken_log;
use crate::broker::status_where;
use crate::clock::Clock;
use crate::disk::backup_of;
use crate::proxy::Rules;
use crate::scene::{A, B, C, Scene};
use crate::seeded::serves_nothing;
use crate::server_fault::ServerFault;
use crate::small_disk::SmallDisk;
use crate::stage::Stage;
use crate::wire::eventually;

/// The size of the disk, and the free space that is left: less than a snapshot needs.
const DISK_MIB: usize = 64;
const FREE_BYTES: u64 = 200_000;
const HOUR_S: i64 = 3600;

/// A fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// kill -9.
    Kill,
    /// SIGSTOP, and SIGCONT later.
    Freeze,
    /// Data from the replica to the broker is dropped.
    CutTo,
    /// Data from the broker to the replica is dropped.
    CutFrom,
    /// Both.
    CutBoth,
    /// The connection to the broker is slow.
    Slow,
    /// There is no space for a snapshot.
    FullDisk,
    /// The broker is killed and restarted with its data.
    Broker,
    /// The broker is restarted without its data.
    Wiped,
    /// The stream trims batches that the replica has.
    TrimmedBehind,
    /// The stream trims batches that the replica lacks.
    TrimmedBeyond,
    /// Acknowledgements of the broker are lost.
    AckLost,
    /// The clock is set an hour ahead.
    ClockAhead,
    /// The clock is set an hour back.
    ClockBehind,
    /// A fault of a cluster of three servers.
    Servers(ServerFault),
}

impl Fault {
    /// Faults with one server.
    const OF_ONE: [Self; 14] = [
        Self::Kill,
        Self::Freeze,
        Self::CutTo,
        Self::CutFrom,
        Self::CutBoth,
        Self::Slow,
        Self::FullDisk,
        Self::Broker,
        Self::Wiped,
        Self::TrimmedBehind,
        Self::TrimmedBeyond,
        Self::AckLost,
        Self::ClockAhead,
        Self::ClockBehind,
    ];

    /// All faults; those with one server first.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        let of_three = ServerFault::ALL.into_iter().map(Self::Servers);
        Self::OF_ONE.into_iter().chain(of_three)
    }

    /// The stages that the fault is combined with.
    pub(crate) fn stages(self) -> &'static [Stage] {
        match self {
            Self::Servers(_) => &[Stage::Steady, Stage::Restoring],
            _ => &Stage::ALL,
        }
    }

    /// The timeout of a cell.
    pub(crate) fn time_max(self) -> Duration {
        match self {
            Self::Servers(fault) => fault.time_max(),
            _ => Duration::from_secs(120),
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Servers(fault) => fault.name(),
            Self::Kill => "kill",
            Self::Freeze => "freeze",
            Self::CutTo => "cut-to-broker",
            Self::CutFrom => "cut-from-broker",
            Self::CutBoth => "cut-both-ways",
            Self::Slow => "slow-link",
            Self::FullDisk => "full-disk",
            Self::Broker => "broker-killed",
            Self::Wiped => "broker-wiped",
            Self::TrimmedBehind => "trimmed-behind",
            Self::TrimmedBeyond => "trimmed-beyond",
            Self::AckLost => "ack-lost",
            Self::ClockAhead => "clock-ahead",
            Self::ClockBehind => "clock-behind",
        }
    }

    /// Whether the fault may abort a backup.
    pub(crate) fn breaks_backups(self) -> bool {
        matches!(self, Self::Kill | Self::TrimmedBeyond)
    }

    /// Prepares the scene before the replica under test starts.
    pub(crate) async fn prepare(self, scene: &mut Scene) {
        match self {
            Self::FullDisk => {
                scene.disk = Some(SmallDisk::new(DISK_MIB));
                scene.snapshots_often = true;
            }
            Self::ClockAhead | Self::ClockBehind => scene.clock = Some(Clock::new()),
            Self::Servers(fault) => fault.prepare(scene).await,
            _ => {}
        }
    }

    /// Injects the fault while the replica under test is held in its stage, and ends it. Then all
    /// three replicas run, and the one under test is ready.
    pub(crate) async fn inject(self, scene: &mut Scene) {
        match self {
            Self::Kill => {
                scene.kill(A);
                scene.load.progress(&[B], 10).await;
                scene.go_on().await;
            }
            Self::Freeze => {
                scene.node(A).signal(Signal::STOP);
                scene.load.progress(&[B, C], 10).await;
                scene.node(A).signal(Signal::CONT);
                scene.go_on().await;
            }
            Self::CutTo => cut(scene, |dead| dead.mute = false).await,
            Self::CutFrom => cut(scene, |dead| dead.deaf = false).await,
            Self::CutBoth => cut(scene, |_| {}).await,
            Self::Slow => {
                scene.connection(Rules {
                    slow: true,
                    ..Rules::default()
                });
                scene.go_on().await;
                scene.load.progress(&[A], 10).await;
                scene.connection(Rules::default());
            }
            Self::FullDisk => full_disk(scene).await,
            Self::Broker => {
                scene.broker().kill();
                for index in [A, B, C] {
                    not_writable(scene, index).await;
                }
                scene.broker().restart().await;
                scene.go_on().await;
            }
            Self::Wiped => broken_log::wiped(scene).await,
            Self::TrimmedBehind => broken_log::trimmed_behind(scene).await,
            Self::TrimmedBeyond => broken_log::trimmed_beyond(scene).await,
            Self::AckLost => ack_lost(scene).await,
            Self::ClockAhead => clock(scene, HOUR_S).await,
            Self::ClockBehind => clock(scene, -HOUR_S).await,
            Self::Servers(fault) => fault.inject(scene).await,
        }
    }
}

/// Waits until a replica has noticed that the broker does not answer.
pub(crate) async fn not_writable(scene: &Scene, index: usize) {
    let node = scene.node(index);
    node.metric_reaches("gradestore_log_writable", 0.0).await;
}

async fn cut(scene: &mut Scene, but: fn(&mut Rules)) {
    let mut dead = Rules::DEAD;
    but(&mut dead);
    scene.connection(dead);
    if scene.stage == Stage::Restoring {
        // All rows arrive meanwhile, which is not enough to become ready. A peer that is held for
        // too long times out, and no other is found without the broker.
        scene.release().await;
        let node = scene.node(A);
        let rows = |status: &serde_json::Value| status["restore"]["rows"].as_u64();
        status_where(node, "all rows", |status| {
            rows(status) >= Some(Stage::Restoring.rows())
        })
        .await;
    }
    not_writable(scene, A).await;
    // The others are not affected.
    scene.load.progress(&[B, C], 10).await;
    if scene.stage.incomplete() {
        serves_nothing(scene.node(A), &["restoring", "catching-up"]).await;
    }
    scene.connection(Rules::default());
    scene.go_on().await;
}

async fn full_disk(scene: &mut Scene) {
    let disk = scene.disk.as_ref().expect("a small disk");
    let ballast = disk.fill(FREE_BYTES);
    let failures = "gradestore_snapshot_failures_total";
    scene.go_on().await;
    // Snapshots fail because the disk is full; writes are not stored there.
    let node = scene.node(A);
    let failed = node.metric(failures).await.unwrap();
    eventually("a snapshot that does not fit", async || {
        (node.metric(failures).await? > failed).then_some(())
    })
    .await;
    let said = node.stderr.lock().clone();
    assert!(said.contains("No space left"), "{said}");
    scene.load.progress(&[A], 10).await;
    let position = scene.position(A).await;
    drop(ballast);
    status_where(scene.node(A), "a snapshot", |status| {
        status["snapshot"]["position"].as_u64() >= Some(position)
    })
    .await;
}

async fn ack_lost(scene: &mut Scene) {
    // The delivery of the batch suffices without an acknowledgement.
    let lost = Rules {
        lose_acks: true,
        ..Rules::default()
    };
    scene.connection(lost);
    scene.go_on().await;
    scene.load.progress(&[A], 10).await;
    // Neither arrives: the batch is sent again, and is in the log once.
    scene.connection(Rules {
        lose_batches: true,
        ..lost
    });
    let node = scene.node(A);
    eventually("a batch sent again", async || {
        (node.metric("gradestore_log_resends_total").await? > 0.0).then_some(())
    })
    .await;
    scene.connection(Rules::default());
    scene.ready(A).await;
}

async fn clock(scene: &mut Scene, seconds: i64) {
    let shift = |scene: &Scene, seconds| scene.clock.as_ref().expect("a clock").shift(seconds);
    shift(scene, seconds);
    scene.go_on().await;
    scene.load.progress(&[A], 10).await;
    check_clock(scene, seconds).await;
    shift(scene, 0);
    scene.load.progress(&[A], 10).await;
    check_clock(scene, 0).await;
}

/// Checks that the clock of the replica under test is wrong by `seconds`, and durations are right.
async fn check_clock(scene: &Scene, seconds: i64) {
    let node = scene.node(A);
    let sent = |said: &str| said.matches("backup sent").count();
    let before = sent(&node.stderr.lock());
    backup_of(node).await;
    let said = eventually("the backup's line", async || {
        let said = node.stderr.lock().clone();
        (sent(&said) > before).then_some(said)
    })
    .await;
    let line = said.lines().rev().find(|line| line.contains("backup sent"));
    let line = line.unwrap();
    let said_at = humantime::parse_rfc3339(line.split(' ').next().unwrap()).unwrap();
    let since_1970 = |time: std::time::SystemTime| {
        let since = time.duration_since(std::time::UNIX_EPOCH).unwrap();
        since.as_secs() as i64
    };
    let wrong_by = since_1970(said_at) - since_1970(std::time::SystemTime::now());
    assert!(
        (wrong_by - seconds).abs() < 60,
        "wrong by {wrong_by} s: {line}"
    );
    let (_, took) = line.split_once("took_ms=").unwrap();
    assert!(took.trim().parse::<u64>().unwrap() < 60_000, "{line}");
}
