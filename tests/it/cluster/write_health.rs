//! Readiness for writes: a replica whose log stores nothing becomes unready for writes with the
//! reason, and ready again without a client's write once batches are stored.

use std::time::{Duration, Instant};

use async_nats::ConnectOptions;
use async_nats::jetstream::Context;
use async_nats::jetstream::stream::Config;
use bytes::Bytes;
use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::harness::cluster::broker::{Broker, STREAM, SUBJECT, replica_with_data};
use crate::harness::cluster::nats::NatsServer;
use crate::harness::cluster::proxy::{Proxy, Rules};
use crate::harness::small_disk::SmallDisk;
use crate::harness::wire::{RawConnection, eventually};
use crate::harness::{Node, pending_set, set_request};

/// After a write failed with a reason from NATS.
const REASON_MAX: Duration = Duration::from_secs(5);
/// Tolerance for a busy machine. Without the mechanisms under test it takes much longer.
const BUSY_MAX: Duration = Duration::from_secs(3);
const WRITE_TIMEOUT: Duration = Duration::from_secs(2);
/// Time for several probes on a busy machine.
const PROBED_MAX: Duration = Duration::from_secs(10);
const PATCH: &str = r#"{"user_id":"x","spp":1}"#;
/// A batch without writes, so large that a few fill a store.
const BALLAST_BYTES: usize = 500_000;

/// Writes until the replica is unready for writes, which must happen `within` a time; returns the
/// reason.
pub(crate) async fn wait_until_not_writable(node: &Node, within: Duration) -> String {
    let started_at = Instant::now();
    let (mut last, mut ready) = (String::new(), None);
    let writing = async {
        loop {
            let response = node.set(PATCH).await;
            last = format!("{} {}", response.status, response.body);
        }
    };
    let asking = eventually("not ready for writes", async || {
        let response = node.ops("/readyz/write").await;
        ready = Some(response.status);
        if started_at.elapsed() > within + Duration::from_secs(10) {
            return Some(Err(()));
        }
        (response.status != 200).then(|| Ok(response.expect_problem(503, "not-ready")))
    });
    let reason = tokio::select! {
        () = writing => unreachable!(),
        reason = asking => reason,
    };
    let took = started_at.elapsed();
    let reason = reason.unwrap_or_else(|()| {
        panic!("/readyz/write still {ready:?} after {took:?}; the last write: {last}")
    });
    assert!(took <= within + BUSY_MAX, "after {took:?}: {reason}");
    assert_eq!(node.metric("gradestore_log_writable").await, Some(0.0));
    // Load balancers see it on the write port as well; reads go on.
    node.get_from(node.write, "/readyz")
        .await
        .expect_problem(503, "not-ready");
    assert_eq!(node.get_from(node.read, "/readyz").await.status, 200);
    // It stays unready.
    for _ in 0..10 {
        let response = node.set(PATCH).await;
        assert!(matches!(response.status, 503 | 504), "{response:?}");
        node.ops("/readyz/write")
            .await
            .expect_problem(503, "not-ready");
    }
    reason
}

/// Waits, without sending writes, until the replica is ready for writes; then writes.
pub(crate) async fn wait_until_writable(node: &Node) {
    let started_at = Instant::now();
    eventually("ready for writes", async || {
        (node.ops("/readyz/write").await.status == 200).then_some(())
    })
    .await;
    let took = started_at.elapsed();
    assert!(took <= PROBED_MAX, "ready for writes after {took:?}");
    assert_eq!(node.metric("gradestore_log_writable").await, Some(1.0));
    node.set(PATCH).await.position();
}

/// Publishes batches without writes until one is not stored; returns the error of NATS.
async fn fill_stream(client: &Context) -> String {
    let mut ballast = vec![b' '; BALLAST_BYTES];
    (ballast[0], ballast[1]) = (b'[', b']');
    let ballast = Bytes::from(ballast);
    for _ in 0..500 {
        let sent = client.publish(SUBJECT, ballast.clone()).await.unwrap();
        if let Err(error) = sent.await {
            return error.to_string();
        }
    }
    panic!("the stream is never full");
}

/// Trims all messages but the last.
async fn trim_stream(client: &Context) {
    let stream = client.get_stream(STREAM).await.unwrap();
    let config = stream.cached_info().config.clone();
    for max_messages in [1, -1] {
        let config = Config {
            max_messages,
            ..config.clone()
        };
        client.update_stream(config).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn full_jetstream_storage_ends_readiness_for_writes() {
    let dir = tempfile::tempdir().unwrap();
    let server = NatsServer::start("jetstream { max_file_store: 5MB }").await;
    let a = Node::start_with(&mut replica_with_data(server.url(), dir.path())).await;
    a.set(PATCH).await.position();
    let client = server.client(ConnectOptions::new()).await;
    let printed = fill_stream(&client).await;
    let detail = a.set(PATCH).await.expect_problem(503, "not-written");
    let reason = wait_until_not_writable(&a, REASON_MAX).await;
    for said_so in [&detail, &reason] {
        assert!(
            said_so.contains("resources"),
            "{said_so}; the broker said {printed}"
        );
    }
    assert_eq!(a.get("x").await.status, 200);
    // A replica that starts now reports it before a client has written.
    let dir = tempfile::tempdir().unwrap();
    let b = Node::launch(&mut replica_with_data(server.url(), dir.path())).await;
    let full = |status: &Value| {
        let reason = status["reason"].as_str();
        reason.is_some_and(|reason| reason.contains("resources"))
    };
    let status = b.status_where("that the stream is full", full).await;
    assert_eq!(status["state"], "read-only");
    b.ops("/readyz/write")
        .await
        .expect_problem(503, "not-ready");
    assert_eq!(b.ops("/readyz").await.status, 200);
    assert_eq!(b.get("x").await.status, 200);
    trim_stream(&client).await;
    wait_until_writable(&a).await;
    wait_until_writable(&b).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_of_nats_ends_readiness_for_writes() {
    let (dir, disk) = (tempfile::tempdir().unwrap(), SmallDisk::new(32));
    let store = disk.data_dir();
    let mut server = NatsServer::start_with("", &["-sd", store.to_str().unwrap()]).await;
    let mut command = replica_with_data(server.url(), dir.path());
    let a = Node::start_with(command.args(["--write-timeout", "2s"])).await;
    a.set(PATCH).await.position();
    let ballast = disk.fill(2_000_000);
    fill_stream(&server.client(ConnectOptions::new()).await).await;
    wait_until_not_writable(&a, WRITE_TIMEOUT + Duration::from_secs(2)).await;
    assert_eq!(a.get("x").await.status, 200);
    // nats-server does not recover from a full disk without a restart.
    drop(ballast);
    server.kill();
    server.restart().await;
    wait_until_writable(&a).await;
}

const ALL_RIGHTS: &str = r#"authorization { users: [{ user: u, password: p }] }"#;
const NO_PUBLISH: &str = r#"authorization { users: [
    { user: u, password: p, permissions: { publish: { deny: ["grades.set"] } } }
] }"#;

/// A directory for a replica, a server with all permissions for user `u`, and its URL with that
/// user.
async fn server_with_user() -> (TempDir, NatsServer, String) {
    let server = NatsServer::start(ALL_RIGHTS).await;
    let url = server.url().replace("://", "://u:p@");
    (tempfile::tempdir().unwrap(), server, url)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_permission_to_publish_ends_readiness_for_writes() {
    let (dir, server, url) = server_with_user().await;
    let a = Node::start_with(&mut replica_with_data(&url, dir.path())).await;
    a.set(PATCH).await.position();
    server.reload(NO_PUBLISH).await;
    // The server may have closed the connection.
    let refused = eventually("a connection", async || {
        let started_at = Instant::now();
        let response = a.set(PATCH).await;
        let away = response.body.contains("connection to the broker") || response.status == 204;
        (!away).then(|| (response, started_at.elapsed()))
    });
    let (response, took) = refused.await;
    let detail = response.expect_problem(503, "not-written");
    let reason = wait_until_not_writable(&a, REASON_MAX).await;
    for printed in [&detail, &reason] {
        assert!(
            printed.contains("Permissions Violation") && printed.contains(SUBJECT),
            "{printed}"
        );
    }
    assert!(took < Duration::from_secs(1), "refused after {took:?}");
    assert_eq!(a.get("x").await.status, 200);
    server.reload(ALL_RIGHTS).await;
    wait_until_writable(&a).await;
}

const OTHER_PASSWORD: &str = r#"authorization { users: [{ user: u, password: other }] }"#;

/// The server closes the connection and rejects the replica's reconnects while a batch is in
/// flight.
#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_user_ends_readiness_for_writes() {
    let (dir, server, url) = server_with_user().await;
    let a = Node::start_with(&mut replica_with_data(&url, dir.path())).await;
    a.set(PATCH).await.position();
    server.reload(OTHER_PASSWORD).await;
    let reason = wait_until_not_writable(&a, REASON_MAX).await;
    let detail = a.set(PATCH).await.expect_problem(503, "not-written");
    for printed in [&detail, &reason] {
        assert!(
            printed.to_lowercase().contains("authorization violation"),
            "{printed}"
        );
    }
    server.reload(ALL_RIGHTS).await;
    wait_until_writable(&a).await;
}

/// The server closes the connection because of a batch above the limit.
#[tokio::test(flavor = "multi_thread")]
async fn a_lowered_max_payload_ends_readiness_for_writes() {
    let dir = tempfile::tempdir().unwrap();
    let server = NatsServer::start("").await;
    let a = Node::start_with(&mut replica_with_data(server.url(), dir.path())).await;
    a.set(PATCH).await.position();
    server.reload("max_payload: 65536").await;
    let long = "x".repeat(200);
    let lines = (0..900).map(|index| format!("{{\"user_id\":\"{index}{long}\",\"spp\":1}}\n"));
    let lines: String = lines.collect();
    let mut bulk = RawConnection::connect(a.write).await;
    bulk.send(set_request(&lines).replace("/json", "/x-ndjson"))
        .await;
    let reason = wait_until_not_writable(&a, REASON_MAX).await;
    assert!(reason.contains("max_payload"), "{reason}");
    server.reload("max_payload: 8388608").await;
    wait_until_writable(&a).await;
}

/// The server dies while a batch is in flight: the reason is still the connection.
#[tokio::test(flavor = "multi_thread")]
async fn a_dead_server_ends_readiness_for_writes() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = NatsServer::start("").await;
    let mut command = replica_with_data(server.url(), dir.path());
    let a = Node::start_with(command.args(["--write-timeout", "2s"])).await;
    a.set(PATCH).await.position();
    server.signal(Signal::STOP);
    let mut in_flight = pending_set(&a, PATCH).await;
    let mut queued = pending_set(&a, PATCH).await;
    server.kill();
    let detail = queued.response().await.expect_problem(503, "not-written");
    let reason = wait_until_not_writable(&a, WRITE_TIMEOUT + Duration::from_secs(2)).await;
    for printed in [&detail, &reason] {
        assert!(printed.contains("no connection to NATS"), "{printed}");
    }
    in_flight
        .response()
        .await
        .expect_problem(504, "outcome-unknown");
    server.restart().await;
    wait_until_writable(&a).await;
}

/// All ways to read a stream are denied: batches are stored, and no write can be acknowledged.
const NO_READING: &str = r#"authorization { users: [
    { user: u, password: p, permissions: { publish: { deny: [
        "$JS.API.CONSUMER.>", "$JS.API.STREAM.MSG.GET.>", "$JS.API.DIRECT.GET.>"
    ] } } }
] }"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_permission_to_read_ends_readiness_for_writes() {
    let (dir, server, url) = server_with_user().await;
    let mut command = replica_with_data(&url, dir.path());
    let a = Node::start_with(command.args(["--write-timeout", "2s"])).await;
    a.set(PATCH).await.position();
    server.reload(NO_READING).await;
    wait_until_not_writable(&a, WRITE_TIMEOUT + Duration::from_secs(2)).await;
    server.reload(ALL_RIGHTS).await;
    wait_until_writable(&a).await;
    a.in_state("ready").await;
}

/// Without deliveries the replica fetches messages, which is slow.
#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_that_delivers_nothing_stops_no_writes() {
    let broker = Broker::start().await;
    let proxy = Proxy::to(broker.address).await;
    let dir = tempfile::tempdir().unwrap();
    let a = Node::start_with(&mut replica_with_data(proxy.address, dir.path())).await;
    a.set(PATCH).await.position();
    proxy.set(Rules {
        drop_batches: true,
        ..Rules::default()
    });
    a.set(PATCH).await.position();
    a.set(PATCH).await.position();
    assert_eq!(a.ops("/readyz/write").await.status, 200);
}
