//! Concurrent clients: no field is lost, and each client reads its own acknowledged writes.

use futures_util::future::join_all;
use gradestore::grade::FIELDS;

use crate::harness::wire::RawConnection;
use crate::harness::{ANY_PORTS, Node, PASSWORD, get_request, program, set_request};

const CLIENTS: usize = 64;
const USERS: usize = 100;

/// An acknowledged write.
struct Written {
    user: usize,
    field: usize,
    value: usize,
    position: u64,
}

/// Sets one field of every user over one connection.
async fn set_one_field(node: &Node, client: usize) -> Vec<Written> {
    let field = client % FIELDS.len();
    let mut connection = RawConnection::connect(node.write).await;
    let mut written = Vec::new();
    let mut last = 0;
    // Each client starts with another user, so that all clients conflict.
    for user in (0..USERS).map(|turn| (client * 7 + turn) % USERS) {
        let value = 1 + client * USERS + user;
        let patch = format!(r#"{{"user_id":"user {user}","{}":{value}}}"#, FIELDS[field]);
        connection.send(set_request(&patch)).await;
        let position = connection.response().await.position();
        assert!(position > last, "{position} after {last}");
        last = position;
        written.push(Written {
            user,
            field,
            value,
            position,
        });
    }
    written
}

/// A ready node with this number of threads.
async fn node_with_threads(threads: usize) -> Node {
    let mut command = program();
    let command = command.env("GRADESTORE_PASSWORD", PASSWORD).args(ANY_PORTS);
    Node::start_with(command.args(["--threads", &threads.to_string()])).await
}

#[tokio::test]
async fn fields_set_by_64_concurrent_clients_are_all_kept() {
    for threads in [1, 3] {
        assert_all_fields_kept(&node_with_threads(threads).await).await;
    }
}

async fn assert_all_fields_kept(node: &Node) {
    let written = join_all((0..CLIENTS).map(|client| set_one_field(node, client))).await;
    let written: Vec<Written> = written.into_iter().flatten().collect();
    for user in 0..USERS {
        let grade = node.get(&format!("user {user}")).await.json();
        for (field, name) in FIELDS.iter().enumerate() {
            let to_this = written
                .iter()
                .filter(|w| (w.user, w.field) == (user, field));
            let last = to_this.clone().map(|w| w.position).max().unwrap();
            let stayed = to_this.clone().find(|w| grade[name] == w.value);
            let stayed = stayed.unwrap_or_else(|| panic!("{name} of {user} is lost: {grade}"));
            assert_eq!(
                stayed.position, last,
                "{name} of {user} is not the last one set"
            );
        }
    }
    let status = node.status().await;
    assert_eq!(status["records"], USERS);
    let applied = node.metric("gradestore_patches_applied_total").await;
    assert_eq!(applied, Some(written.len() as f64));
    // Group commit: fewer batches than patches.
    assert!(status["position"].as_u64().unwrap() < written.len() as u64);
}

#[tokio::test]
async fn an_acknowledged_write_is_readable_immediately() {
    let node = Node::start().await;
    let clients = (0..16).map(async |client| {
        let mut writer = RawConnection::connect(node.write).await;
        let mut reader = RawConnection::connect(node.read).await;
        for value in 0..100 {
            let patch = format!(r#"{{"user_id":"{client}","spp":{value}}}"#);
            writer.send(set_request(&patch)).await;
            writer.response().await.position();
            reader
                .send(get_request(&format!("?user_id={client}"), ""))
                .await;
            assert_eq!(reader.response().await.json()["spp"], value);
        }
    });
    join_all(clients).await;
}

#[tokio::test]
async fn a_patch_of_two_fields_is_applied_atomically() {
    let node = node_with_threads(3).await;
    let clients = (0..8).map(async |client| {
        let mut writer = RawConnection::connect(node.write).await;
        let mut reader = RawConnection::connect(node.read).await;
        for turn in 0..100 {
            let value = client * 100 + turn;
            let patch = format!(r#"{{"user_id":"a","spp":{value},"return_fee":{value}}}"#);
            writer.send(set_request(&patch)).await;
            reader.send(get_request("?user_id=a", "")).await;
            let response = reader.response().await;
            if response.status == 200 {
                let grade = response.json();
                assert_eq!(grade["spp"], grade["return_fee"]);
            }
            writer.response().await.position();
        }
    });
    join_all(clients).await;
    assert_eq!(node.get("a").await.status, 200);
}
