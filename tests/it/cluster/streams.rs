//! Two clusters on one broker, each with its own stream, as staging beside production.

use std::fs;

use async_nats::ConnectOptions;
use futures_util::future::join_all;
use serde_json::Value;
use tempfile::tempdir;

use crate::harness::Node;
use crate::harness::cluster::broker::replica_with_data;
use crate::harness::cluster::nats::NatsServer;
use crate::harness::wire::eventually;

const STREAMS: [&str; 2] = ["GRADES", "STAGING"];

/// A user for each stream, with the permissions of SECURITY.md, and one with all.
fn users() -> String {
    let security = fs::read_to_string("SECURITY.md").unwrap();
    let (_, block) = security.split_once("permissions: {").unwrap();
    let (of_default, _) = block.split_once("} }").unwrap();
    let of_staging = of_default
        .replace("grades.set", "grades.STAGING.set")
        .replace("gradestore.status", "gradestore.STAGING.status")
        .replace("GRADES", "STAGING");
    format!(
        "authorization {{ users: [
            {{ user: GRADES, password: p, permissions: {{ {of_default} }} }}
            {{ user: STAGING, password: p, permissions: {{ {of_staging} }} }}
            {{ user: observer, password: p }}
        ] }}"
    )
}

/// The URLs of the other nodes that `node` knows.
fn peer_urls(status: &Value) -> Vec<String> {
    let peers = status["peers"].as_array().unwrap().iter();
    peers
        .map(|peer| peer["url"].as_str().unwrap().to_owned())
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn clusters_on_one_broker_do_not_hear_each_other() {
    let server = NatsServer::start(&users()).await;
    let dir = tempdir().unwrap();
    let start = async |stream: &str, number: usize| {
        let url = server.url().replace("://", &format!("://{stream}:p@"));
        let dir = dir.path().join(format!("{stream}-{number}"));
        let mut command = replica_with_data(url, &dir);
        // All have the same password, so that only the subjects keep them apart.
        command.args(["--stream", stream, "--expect-peers", "2"]);
        command.env("GRADESTORE_CHECKPOINT_INTERVAL", "200ms");
        Node::start_with(&mut command).await
    };
    let observer = ConnectOptions::with_user_and_password("observer".into(), "p".into());
    let observer = server.client(observer).await;

    let starting = [0, 1, 2, 3].map(|node| start(STREAMS[node % 2], node / 2));
    let nodes = join_all(starting).await;
    let (production, staging) = ([&nodes[0], &nodes[2]], [&nodes[1], &nodes[3]]);
    for [one, other] in [production, staging] {
        let expected = [format!("http://{}", other.write)];
        one.status_where("the other node of its cluster", |status| {
            peer_urls(status) == expected
        })
        .await;
    }
    // Different numbers of writes, so that the two logs differ.
    for (cluster, user, count) in [(production, "p", 3_usize), (staging, "s", 9)] {
        let mut position = 0;
        for value in 0..count {
            let patch = format!(r#"{{"user_id":"{user}","spp":{value}}}"#);
            position = cluster[value % 2].set(patch).await.position();
        }
        for node in cluster {
            let grade = node.get_at(user, position).await;
            assert_eq!(grade["spp"], count - 1);
            let other = if user == "p" { "s" } else { "p" };
            node.get(other).await.expect_problem(404, "user-unknown");
            assert_eq!(node.status().await["records"], 1);
        }
    }
    for (index, node) in nodes.iter().enumerate() {
        // The votes of two nodes on the same data agree, and no other votes arrive.
        eventually("a vote", async || {
            let compared = node.metric("gradestore_checkpoints_compared_total").await;
            compared.filter(|compared| *compared > 0.0)
        })
        .await;
        for name in ["announcements", "votes"] {
            let name = format!("gradestore_{name}_rejected_total");
            assert_eq!(node.metric(&name).await, Some(0.0), "node {index}: {name}");
        }
    }
    for (stream, subject) in STREAMS
        .into_iter()
        .zip(["grades.set", "grades.STAGING.set"])
    {
        let stream = observer.get_stream(stream).await.unwrap();
        assert_eq!(stream.cached_info().config.subjects, [subject]);
    }
}
