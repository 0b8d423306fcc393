//! `DELETE /set`.

use serde_json::json;
use tempfile::tempdir;

use crate::harness::backup_files::{
    NodeState, fetch_backup, program_restoring, program_with_data_dir, read_backup,
};
use crate::harness::wire::{RawConnection, Response};
use crate::harness::{AUTHORIZATION, Node, Ports, delete_request};

async fn send_delete(node: &Ports, request: String) -> Response {
    let mut connection = RawConnection::connect(node.write).await;
    connection.send(request).await;
    connection.response().await
}

/// Writes two users, deletes both, and sets one field of the first again.
pub(crate) async fn write_and_delete(node: &Ports) {
    for body in [
        r#"{"user_id":"a b","spp":5,"return_fee":7}"#,
        r#"{"user_id":"b","spp":6}"#,
    ] {
        node.set(body).await.position();
    }
    for user in ["a b", "b"] {
        node.delete(user).await.position();
    }
    node.set(r#"{"user_id":"a b","shipping_fee":1}"#)
        .await
        .position();
}

/// Checks the result of [`write_and_delete`].
pub(crate) async fn assert_written_and_deleted(node: &Ports) {
    let a = json!({
        "user_id": "a b", "postpaid_limit": 0, "spp": 0, "shipping_fee": 1, "return_fee": 0,
    });
    assert_eq!(node.get("a b").await.json(), a);
    node.get("b").await.expect_problem(404, "user-unknown");
    assert_eq!(node.status().await["records"], 1);
}

#[tokio::test]
async fn a_delete_returns_its_position_and_removes_the_record() {
    let node = Node::start().await;
    let empty = NodeState::of(&node).await;
    write_and_delete(&node).await;
    assert_written_and_deleted(&node).await;
    let response = node.delete("a b").await;
    assert_eq!((response.position(), response.body.as_str()), (6, ""));
    node.get("a b").await.expect_problem(404, "user-unknown");
    // Deleting an unknown user succeeds: only the log's order decides whether the user exists.
    assert_eq!(node.delete("a b").await.position(), 7);
    assert_eq!(node.delete("nobody").await.position(), 8);
    let held = NodeState::of(&node).await;
    assert_eq!((held.records, held.digest), (0, empty.digest));
    for (name, value) in [
        ("gradestore_patches_applied_total", 3.0),
        ("gradestore_deletions_applied_total", 5.0),
        (
            r#"gradestore_http_requests_total{route="/set",status="204"}"#,
            8.0,
        ),
    ] {
        assert_eq!(node.metric(name).await, Some(value), "{name}");
    }
}

#[tokio::test]
async fn a_delete_needs_the_password_and_one_user() {
    let node = Node::start().await;
    node.set(r#"{"user_id":"a","spp":1}"#).await.position();
    let ours = format!("authorization: {AUTHORIZATION}\r\n");
    for wrong in ["", "authorization: Basic YWRtaW46d3Jvbmc=\r\n"] {
        let request = delete_request("?user_id=a").replace(&ours, wrong);
        send_delete(&node, request)
            .await
            .expect_problem(401, "unauthorized");
    }
    let long = format!("?user_id={}", "x".repeat(257));
    for (query, cause) in [
        ("", "user-id-missing"),
        ("?USER_ID=a", "user-id-missing"),
        ("?user_id=a&user_id=a", "user-id-repeated"),
        ("?user_id=a&user%5fid=b", "user-id-repeated"),
        ("?user_id=", "user-id-invalid"),
        ("?user_id=%00", "user-id-invalid"),
        (&long, "user-id-invalid"),
        ("?user_id=%", "query-encoding"),
        ("?user_id=%ff", "query-encoding"),
    ] {
        send_delete(&node, delete_request(query))
            .await
            .expect_problem(400, cause);
    }
    let held = NodeState::of(&node).await;
    assert_eq!((held.position, held.records), (1, 1));
}

#[tokio::test]
async fn a_delete_survives_restarts_snapshots_and_backups() {
    let root = tempdir().unwrap();
    let dir = root.path().join("data");
    let node = Node::start_with(&mut program_with_data_dir(&dir)).await;
    write_and_delete(&node).await;
    let held = NodeState::of(&node).await;
    let file = fetch_backup(&node).await;
    node.kill();
    // First from the log alone, then from a snapshot alone.
    let node = Node::start_with(&mut program_with_data_dir(&dir)).await;
    assert_written_and_deleted(&node).await;
    assert_eq!(node.status().await["restore"], json!(null));
    node.stop().await;
    let node = Node::start_with(&mut program_with_data_dir(&dir)).await;
    assert_written_and_deleted(&node).await;
    assert_eq!(node.status().await["restore"]["rows"], 1);
    assert_eq!(NodeState::of(&node).await, held);

    let (store, summary) = read_backup(&file);
    assert_eq!(summary.rows, 1);
    assert_eq!(NodeState::of_store(&store, held.position), held);
    let path = root.path().join("grades.csv.gz");
    std::fs::write(&path, file).unwrap();
    let node = Node::start_with(&mut program_restoring(&path)).await;
    assert_written_and_deleted(&node).await;
}
