//! What goes wrong, and how it is mended.

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

/// The disk that may be filled, and what is left of it: less than a snapshot takes.
const DISK_MIB: usize = 64;
const FREE_BYTES: u64 = 200_000;
const HOUR_S: i64 = 3600;

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// kill -9.
    Kill,
    /// SIGSTOP, and SIGCONT later.
    Freeze,
    /// What the replica says to the broker vanishes.
    CutTo,
    /// What the broker says to the replica vanishes.
    CutFrom,
    /// Both.
    CutBoth,
    /// The connection to the broker is slow.
    Slow,
    /// There is no space for a snapshot.
    FullDisk,
    /// The broker is killed, and started again on what it has.
    Broker,
    /// The broker is started again on nothing.
    Wiped,
    /// The stream forgets what the replica has.
    TrimmedBehind,
    /// The stream forgets what the replica lacks.
    TrimmedBeyond,
    /// The broker's word that it has stored a batch vanishes.
    AckLost,
    /// The clock is set an hour ahead.
    ClockAhead,
    /// The clock is set an hour back.
    ClockBehind,
    /// One of three servers: what happens to them.
    Servers(ServerFault),
}

impl Fault {
    /// With one server.
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

    /// All of them, those with one server first.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        let of_three = ServerFault::ALL.into_iter().map(Self::Servers);
        Self::OF_ONE.into_iter().chain(of_three)
    }

    /// What the replica under test may be doing meanwhile.
    pub(crate) fn stages(self) -> &'static [Stage] {
        match self {
            Self::Servers(_) => &[Stage::Steady, Stage::Restoring],
            _ => &Stage::ALL,
        }
    }

    /// How long a cell may take.
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

    /// Whether a backup under way may be broken off by it.
    pub(crate) fn breaks_backups(self) -> bool {
        matches!(self, Self::Kill | Self::TrimmedBeyond)
    }

    /// What must be there before the replica under test is.
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

    /// Strikes the replica under test, which is held in its stage, and is over in the end: all three
    /// replicas run, and the one under test is ready.
    pub(crate) async fn strike(self, scene: &mut Scene) {
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
            Self::CutTo => cut(scene, |dead| dead.drop_replies = false).await,
            Self::CutFrom => cut(scene, |dead| dead.drop_requests = false).await,
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
            Self::Servers(fault) => fault.strike(scene).await,
        }
    }
}

/// Waits until a replica has noticed that the broker does not answer.
pub(crate) async fn not_writable(scene: &Scene, index: usize) {
    let node = scene.node(index);
    node.metric_reaches("gradestore_log_writable", 0.0).await;
}

async fn cut(scene: &mut Scene, but: fn(&mut Rules)) {
    let mut dead = Rules::BLACKHOLE;
    but(&mut dead);
    scene.connection(dead);
    if scene.stage == Stage::Restoring {
        // All rows come in meanwhile; that is not enough. And a peer that is held for long is given
        // up, and no other is found without the broker.
        scene.release().await;
        let node = scene.node(A);
        let rows = |status: &serde_json::Value| status["restore"]["rows"].as_u64();
        node.status_where("all rows", |status| {
            rows(status) >= Some(Stage::Restoring.rows())
        })
        .await;
    }
    not_writable(scene, A).await;
    // The others do not notice.
    scene.load.progress(&[B, C], 10).await;
    if scene.stage.incomplete() {
        assert_serves_nothing(scene.node(A), &["restoring", "catching-up"]).await;
    }
    scene.connection(Rules::default());
    scene.go_on().await;
}

async fn full_disk(scene: &mut Scene) {
    let disk = scene.disk.as_ref().expect("a small disk");
    let ballast = disk.fill(FREE_BYTES);
    let failures = "gradestore_snapshot_failures_total";
    scene.go_on().await;
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
    // The batch itself is word enough.
    let lost = Rules {
        drop_acks: true,
        ..Rules::default()
    };
    scene.connection(lost);
    scene.go_on().await;
    scene.load.progress(&[A], 10).await;
    // Neither comes: it is sent again, and is in the log once.
    scene.connection(Rules {
        drop_batches: true,
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
    goes_by(scene, seconds).await;
    shift(scene, 0);
    scene.load.progress(&[A], 10).await;
    goes_by(scene, 0).await;
}

/// Checks that the clock of the replica under test is wrong by so much, and durations are not.
async fn goes_by(scene: &Scene, seconds: i64) {
    let node = scene.node(A);
    let sent = |printed: &str| printed.matches("backup sent").count();
    let before = sent(&node.stderr.lock());
    fetch_backup(node).await;
    let printed = eventually("the backup's line", async || {
        let printed = node.stderr.lock().clone();
        (sent(&printed) > before).then_some(printed)
    })
    .await;
    let line = printed
        .lines()
        .rev()
        .find(|line| line.contains("backup sent"));
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
