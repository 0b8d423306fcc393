//! A stream that is kept on three servers: one of them may die.

use std::net::TcpListener;
use std::process::{Command, Stdio};

use tempfile::TempDir;

use crate::broker::{Load, NATS_SERVER, STREAM, check, replica_with, status_where};
use crate::harness::{Node, Process};
use crate::wire::eventually;

struct Server {
    name: String,
    url: String,
    process: Process,
    _dir: TempDir,
}

/// Three servers that know each other.
fn three() -> [Server; 3] {
    // All ports at once, so that they differ.
    let free: Vec<_> = (0..6)
        .map(|_| TcpListener::bind("127.0.0.1:0").unwrap())
        .collect();
    let ports: Vec<u16> = free
        .iter()
        .map(|listener| listener.local_addr().unwrap().port())
        .collect();
    drop(free);
    let (clients, routes) = ports.split_at(3);
    let all = routes.iter().map(|port| format!("nats://127.0.0.1:{port}"));
    let all = all.collect::<Vec<_>>().join(",");
    [0, 1, 2].map(|index| {
        let dir = tempfile::tempdir().unwrap();
        let name = format!("server-{index}");
        let process = Command::new(NATS_SERVER)
            .args(["-js", "-a", "127.0.0.1", "-p", &clients[index].to_string()])
            .args(["--name", &name, "--cluster_name", "three", "--routes", &all])
            .args(["--cluster", &format!("nats://127.0.0.1:{}", routes[index])])
            .arg("-sd")
            .arg(dir.path())
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Server {
            name,
            url: format!("nats://127.0.0.1:{}", clients[index]),
            process: Process(process),
            _dir: dir,
        }
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_that_leads_the_stream_may_die() {
    let servers = three();
    let urls = servers.each_ref().map(|server| server.url.clone());
    let nats_url = urls.join(",");
    let replica = async || {
        let mut command = replica_with(&nats_url);
        Node::start_with(command.args(["--replicas", "3"])).await
    };
    let (a, b) = (replica().await, replica().await);
    let load = Load::start(&[&a, &b], 20, usize::MAX);
    let client = async_nats::connect(&urls[..]).await.unwrap();
    let client = async_nats::jetstream::new(client);
    let leader = eventually("a leader and two that keep up", async || {
        let mut stream = client.get_stream(STREAM).await.ok()?;
        let cluster = stream.info().await.ok()?.cluster.clone()?;
        let current = cluster.replicas.iter().filter(|peer| peer.current).count();
        cluster.leader.filter(|_| current == 2)
    })
    .await;
    let mut servers = servers;
    let dead = servers.iter_mut().find(|server| server.name == leader);
    dead.unwrap().process.0.kill().unwrap();
    // Another leads, and writes go on at both.
    for node in [&a, &b] {
        let before = node.metric("gradestore_log_position").await.unwrap();
        eventually("writes go on", async || {
            let now = node.metric("gradestore_log_position").await?;
            (now > before + 100.0).then_some(())
        })
        .await;
    }
    let answered = load.stop().await;
    for node in [&a, &b] {
        status_where(node, "ready", |status| status["state"] == "ready").await;
    }
    check(&client, &[&a, &b], &answered).await;
}
