//! A cluster whose password is replaced while its nodes run.

use std::fs;
use std::path::Path;

use rustix::process::Signal;

use crate::harness::cluster::seeded::SeededCluster;
use crate::harness::wire::eventually;
use crate::harness::{Node, Ports};

/// Waits until a node lists this many ready others.
async fn wait_for_peers(node: &Ports, count: usize) {
    node.status_where("its peers", |status| {
        let peers = status["peers"].as_array().unwrap();
        peers.len() == count && peers.iter().all(|peer| peer["state"] == "ready")
    })
    .await;
}

async fn reload(node: &Node) {
    node.signal(Signal::HUP);
    let line = "password reloaded file=";
    eventually(line, async || {
        node.stderr.lock().contains(line).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_with_a_replaced_password_find_each_other_and_send_backups() {
    let mut cluster = SeededCluster::with_rows(100).await;
    let file = cluster.dir.path().join("password");
    fs::write(&file, crate::harness::PASSWORD).unwrap();
    let (seed, interval) = (cluster.seed.clone(), "200ms");
    let start = async |name: &str, seed: Option<&Path>| {
        let mut command = cluster.replica(name);
        command.env_remove("GRADESTORE_PASSWORD");
        command.env("GRADESTORE_CHECKPOINT_INTERVAL", interval);
        command.arg("--password-file").arg(&file);
        if let Some(seed) = seed {
            command.arg("--restore-from").arg(seed);
        }
        Node::start_with(&mut command).await
    };
    let first = start("first", Some(&seed)).await;
    let second = start("second", None).await;
    for node in [&first, &second] {
        wait_for_peers(node, 1).await;
    }
    fs::write(&file, "battery staple").unwrap();
    reload(&first).await;
    // Until the other node has the same password, neither trusts the other.
    for node in [&first, &second] {
        wait_for_peers(node, 0).await;
    }
    reload(&second).await;
    for node in [&first, &second] {
        wait_for_peers(node, 1).await;
    }
    // The log begins after the seed, so this one needs a backup, which needs the password.
    let third = start("third", None).await;
    let nodes = [&first, &second, &third];
    for node in nodes {
        wait_for_peers(node, 2).await;
    }
    // Their votes count again, and are for the same digest.
    let compared = async |node: &Node| {
        let compared = node.metric("gradestore_checkpoints_compared_total").await;
        compared.unwrap()
    };
    let before = [
        compared(&first).await,
        compared(&second).await,
        compared(&third).await,
    ];
    let write = first.client.post(format!("http://{}/set", first.write));
    let write = write.basic_auth("admin", Some("battery staple"));
    let write = write.header("content-type", "application/json");
    let written = write.body(r#"{"user_id":"user 1","spp":1}"#).send().await;
    assert_eq!(written.unwrap().status(), 204);
    for (node, before) in nodes.into_iter().zip(before) {
        eventually("another vote", async || {
            (compared(node).await > before).then_some(())
        })
        .await;
        assert_eq!(node.metric("gradestore_divergences_total").await, Some(0.0));
    }
    cluster.check(&[&first, &second, &third], &[]).await;
}
