//! The faults, and how each is repaired.

use std::time::Duration;

use rustix::process::Signal;

use crate::broken_log;
use crate::clock::Clock;
use crate::harness::backup_files::fetch_backup;
use crate::harness::cluster::proxy::Rules;
use crate::harness::cluster::seeded::assert_serves_nothing;
use crate::harness::small_disk::SmallDisk;
use crate::harness::wire::eventually;
use crate::scene::{A, B, C, Scene};
use crate::server_fault::ServerFault;
use crate::stage::Stage;

/// The size of the disk that is filled, and the space left on it: less than a snapshot needs.
const DISK_MIB: usize = 64;
const FREE_BYTES: u64 = 200_000;
const HOUR_S: i64 = 3600;

/// A fault, the row of a cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// kill -9.
    Kill,
    /// SIGSTOP, and SIGCONT later.
    Freeze,
    /// Packets from the replica to the broker are dropped.
    CutTo,
    /// Packets from the broker to the replica are dropped.
    CutFrom,
    /// Packets in both directions are dropped.
    CutBoth,
    /// The connection to the broker is slow.
    Slow,
    /// The disk has no space for a snapshot.
    FullDisk,
    /// The broker is killed and restarted with its storage.
    Broker,
    /// The broker restarts with an empty disk.
    Wiped,
    /// The stream removes batches that the replica has applied.
    TrimmedBehind,
    /// The stream removes batches that the replica has not applied.
    TrimmedBeyond,
    /// The broker's acknowledgement of a batch is dropped.
    AckLost,
    /// The clock is set an hour ahead.
    ClockAhead,
    /// The clock is set an hour back.
    ClockBehind,
    /// A fault of a cluster of three servers.
    Servers(ServerFault),
}

impl Fault {
    /// The faults with one server.
    const ONE_SERVER: [Self; 14] = [
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

    /// All faults, those with one server first.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        let three_servers = ServerFault::ALL.into_iter().map(Self::Servers);
        Self::ONE_SERVER.into_iter().chain(three_servers)
    }

    /// The stages in which the fault is injected.
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

    /// Whether the fault may abort a backup in progress.
    pub(crate) fn may_abort_backups(self) -> bool {
        matches!(self, Self::Kill | Self::TrimmedBeyond)
    }

    /// Prepares what the fault needs before the replica under test starts.
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

    /// Injects the fault and repairs it. The replica under test is held in its stage. Afterwards
    /// all three replicas run, and the one under test is ready.
    pub(crate) async fn inject(self, scene: &mut Scene) {
        match self {
            Self::Kill => {
                scene.kill(A);
                scene.load.progress(&[B], 10).await;
                scene.resume().await;
            }
            Self::Freeze => {
                scene.node(A).signal(Signal::STOP);
                scene.load.progress(&[B, C], 10).await;
                scene.node(A).signal(Signal::CONT);
                scene.resume().await;
            }
            Self::CutTo => cut(scene, |rules| rules.drop_replies = false).await,
            Self::CutFrom => cut(scene, |rules| rules.drop_requests = false).await,
            Self::CutBoth => cut(scene, |_| {}).await,
            Self::Slow => {
                scene.set_link(Rules {
                    slow: true,
                    ..Rules::default()
                });
                scene.resume().await;
                scene.load.progress(&[A], 10).await;
                scene.set_link(Rules::default());
            }
            Self::FullDisk => full_disk(scene).await,
            Self::Broker => {
                scene.broker().kill();
                for index in [A, B, C] {
                    wait_until_not_writable(scene, index).await;
                }
                scene.broker().restart().await;
                scene.resume().await;
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

/// Waits until a replica reports that the log is not writable.
pub(crate) async fn wait_until_not_writable(scene: &Scene, index: usize) {
    let node = scene.node(index);
    node.metric_reaches("gradestore_log_writable", 0.0).await;
}

async fn cut(scene: &mut Scene, adjust: fn(&mut Rules)) {
    let mut rules = Rules::BLACKHOLE;
    adjust(&mut rules);
    scene.set_link(rules);
    if scene.stage == Stage::Restoring {
        // All rows arrive meanwhile, but without the log they are not enough. The peers' proxies
        // are released first, because a replica abandons a peer that stalls, and cannot find
        // another one without the broker.
        scene.release().await;
        let node = scene.node(A);
        let rows = |status: &serde_json::Value| status["restore"]["rows"].as_u64();
        node.status_where("all rows", |status| {
            rows(status) >= Some(Stage::Restoring.rows())
        })
        .await;
    }
    wait_until_not_writable(scene, A).await;
    // The others are not affected.
    scene.load.progress(&[B, C], 10).await;
    if scene.stage.is_incomplete() {
        assert_serves_nothing(scene.node(A), &["restoring", "catching-up"]).await;
    }
    scene.set_link(Rules::default());
    scene.resume().await;
}

async fn full_disk(scene: &mut Scene) {
    let disk = scene.disk.as_ref().expect("a small disk");
    let ballast = disk.fill(FREE_BYTES);
    let failures = "gradestore_snapshot_failures_total";
    scene.resume().await;
    // Snapshots fail without space; the log is on another file system.
    let node = scene.node(A);
    let failed = node.metric(failures).await.unwrap();
    eventually("a snapshot that does not fit", async || {
        (node.metric(failures).await? > failed).then_some(())
    })
    .await;
    let printed = node.stderr.lock().clone();
    assert!(printed.contains("No space left"), "{printed}");
    scene.load.progress(&[A], 10).await;
    let position = scene.position(A).await;
    drop(ballast);
    scene
        .node(A)
        .status_where("a snapshot", |status| {
            status["snapshot"]["position"].as_u64() >= Some(position)
        })
        .await;
}

async fn ack_lost(scene: &mut Scene) {
    // The delivery of the batch confirms the write too.
    let lost = Rules {
        drop_acks: true,
        ..Rules::default()
    };
    scene.set_link(lost);
    scene.resume().await;
    scene.load.progress(&[A], 10).await;
    // Without the delivery the replica sends the batch again. The log stores it once.
    scene.set_link(Rules {
        drop_batches: true,
        ..lost
    });
    let node = scene.node(A);
    eventually("a batch sent again", async || {
        (node.metric("gradestore_log_resends_total").await? > 0.0).then_some(())
    })
    .await;
    scene.set_link(Rules::default());
    scene.ready(A).await;
}

async fn clock(scene: &mut Scene, seconds: i64) {
    let shift = |scene: &Scene, seconds| scene.clock.as_ref().expect("a clock").shift(seconds);
    shift(scene, seconds);
    scene.resume().await;
    scene.load.progress(&[A], 10).await;
    assert_clock_offset(scene, seconds).await;
    shift(scene, 0);
    scene.load.progress(&[A], 10).await;
    assert_clock_offset(scene, 0).await;
}

/// Checks that the time of day of the replica under test is off by `seconds`, and that its
/// durations are correct.
async fn assert_clock_offset(scene: &Scene, seconds: i64) {
    let node = scene.node(A);
    let count = |printed: &str| printed.matches("backup sent").count();
    let before = count(&node.stderr.lock());
    fetch_backup(node).await;
    let printed = eventually("the backup's log line", async || {
        let printed = node.stderr.lock().clone();
        (count(&printed) > before).then_some(printed)
    })
    .await;
    let line = printed
        .lines()
        .rev()
        .find(|line| line.contains("backup sent"));
    let line = line.unwrap();
    let logged_at = humantime::parse_rfc3339(line.split(' ').next().unwrap()).unwrap();
    let since_1970 = |time: std::time::SystemTime| {
        let since = time.duration_since(std::time::UNIX_EPOCH).unwrap();
        since.as_secs() as i64
    };
    let offset = since_1970(logged_at) - since_1970(std::time::SystemTime::now());
    assert!(
        (offset - seconds).abs() < 60,
        "the time is off by {offset} s: {line}"
    );
    let (_, took_ms) = line.split_once("took_ms=").unwrap();
    assert!(took_ms.trim().parse::<u64>().unwrap() < 60_000, "{line}");
}
