//! What a service manager is told, on a socket of its kind.

use std::process::{Command, Stdio};

use rustix::process::Signal;
use tempfile::TempDir;
use tokio::net::UnixDatagram;

use crate::broker::{replica_at, status_where};
use crate::disk::backup_of;
use crate::harness::{ANY_PORTS, Node, PASSWORD, Process, program};
use crate::seeded::Cluster;
use crate::throttle::Throttle;
use crate::wire::in_time;

/// Where systemd would listen.
struct Supervisor {
    socket: UnixDatagram,
    dir: TempDir,
}

impl Supervisor {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = UnixDatagram::bind(dir.path().join("notify")).unwrap();
        Self { socket, dir }
    }

    /// Lets `command` know of it.
    fn over<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        command.env("NOTIFY_SOCKET", self.dir.path().join("notify"))
    }

    /// What is told next, a line each.
    async fn told(&self) -> Vec<String> {
        let mut message = vec![0; 64 * 1024];
        let received = in_time("a message", self.socket.recv(&mut message));
        let length = received.await.unwrap();
        let message = std::str::from_utf8(&message[..length]).unwrap();
        message.lines().map(str::to_owned).collect()
    }

    /// All that is told until a line is `last`.
    async fn until(&self, last: impl Fn(&str) -> bool) -> Vec<String> {
        let mut told = Vec::new();
        while !told.iter().any(|line: &String| last(line)) {
            told.extend(self.told().await);
        }
        told
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_is_started_when_it_answers_reads_and_asks_for_time_until_then() {
    let mut cluster = Cluster::of(30_000).await;
    let throttle = Throttle::to_nobody(u64::MAX).await;
    let first = cluster.first_behind(&throttle).await;
    cluster.write(&first, 3).await;
    throttle.limit(backup_of(&first).await.len() as u64 / 2);
    let supervisor = Supervisor::new();
    let mut command = replica_at(cluster.broker.address);
    let mut late = Node::launch(supervisor.over(&mut command)).await;
    throttle.reached(1).await;
    status_where(&late, "rows", |status| {
        status["restore"]["rows"].as_u64() > Some(0)
    })
    .await;

    let rows = |line: &str| {
        line.starts_with("STATUS=restoring: ") && line.ends_with(" of about 30000 rows")
    };
    let told = supervisor.until(rows).await;
    assert!(
        told.iter()
            .any(|line| line == "EXTEND_TIMEOUT_USEC=30000000"),
        "{told:?}"
    );
    // Later ones too: the timeout is extended again and again.
    let told = [
        told,
        supervisor.until(|line| line.starts_with("EXTEND_")).await,
    ]
    .concat();
    assert!(
        !told.iter().any(|line| line.starts_with("READY")),
        "{told:?}"
    );
    assert_eq!(late.ops("/readyz").await.status, 503);

    throttle.open();
    supervisor.until(|line| line == "READY=1").await;
    assert_eq!(late.ops("/readyz").await.status, 200);
    late.signal(Signal::TERM);
    let told = supervisor.until(|line| line == "STOPPING=1").await;
    assert!(
        told.iter().any(|line| line == "STATUS=stopping"),
        "{told:?}"
    );
    assert_eq!(late.exit().await.code(), Some(0));
}

#[tokio::test]
async fn a_node_that_waits_for_its_broker_asks_for_time() {
    let supervisor = Supervisor::new();
    let mut command = program();
    command
        .env("GRADESTORE_PASSWORD", PASSWORD)
        .args(["--nats-url", "127.0.0.1:1"])
        .args(ANY_PORTS)
        .stderr(Stdio::null());
    let _process = Process(supervisor.over(&mut command).spawn().unwrap());
    for _ in 0..2 {
        let told = supervisor.told().await;
        assert_eq!(told.len(), 2, "{told:?}");
        assert_eq!(told[0], "EXTEND_TIMEOUT_USEC=30000000");
        assert!(told[1].starts_with("STATUS=starting: "), "{told:?}");
    }
}

#[tokio::test]
async fn a_watchdog_is_fed() {
    let supervisor = Supervisor::new();
    let mut command = program();
    command
        .env("GRADESTORE_PASSWORD", PASSWORD)
        .env("WATCHDOG_USEC", "300000")
        .args(ANY_PORTS);
    let node = Node::start_with(supervisor.over(&mut command)).await;
    let told = supervisor.until(|line| line == "READY=1").await;
    assert!(told.iter().any(|line| line == "STATUS=ready"), "{told:?}");
    for _ in 0..3 {
        assert_eq!(supervisor.told().await, ["WATCHDOG=1"]);
    }
    node.end().await;
}
