//! What each version of each format looks like, kept as it was written: every later program reads it to
//! the same grades. These files never change; a new version of a format brings new ones.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use async_nats::HeaderMap;
use gradestore::backup::{End, Head};
use gradestore::grade::FIELDS;
use gradestore::store::{Piece, Store};
use serde_json::json;
use tempfile::tempdir;

use crate::backup::verify;
use crate::broker::{Broker, SUBJECT, at, copy_tree};
use crate::disk::{Held, program_from, program_on, restored};
use crate::harness::{Node, Ports};

const BACKUP: &[u8] = include_bytes!("../fixtures/backup-1.csv.gz");
const MESSAGES: &str = include_str!("../fixtures/messages-1.txt");
/// Those that follow them.
const MESSAGES_2: &str = include_str!("../fixtures/messages-2.txt");
const DIGEST: &str = "c6e9489171341a65aefd438f35bb55af";

/// What each of them holds.
fn grades() -> BTreeMap<String, [i64; 4]> {
    [
        ("a", [i64::MIN, i64::MAX, -1, 0]),
        ("0", [0, 0, 0, 0]),
        (&"é".repeat(128), [1, -2, 3, -4]),
        (r#""q", 'r'"#, [10, 0, 0, -10]),
        ("a\\nb\u{2028}c\u{2029}d", [0, 7, 0, 0]),
        (" =1+1 ", [0, 0, i64::MAX, 0]),
        ("привет 😀", [0, 0, 0, i64::MIN]),
    ]
    .map(|(user, values)| (user.to_owned(), values))
    .into()
}

fn fixture(name: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    root.join("tests/fixtures").join(name)
}

fn all_in(store: &Store) -> BTreeMap<String, [i64; 4]> {
    let (mut scan, mut piece) = (store.scan(), Piece::default());
    let mut found = BTreeMap::new();
    while scan.next_into(&mut piece) {
        found.extend(
            piece
                .iter()
                .map(|(user, values)| (user.to_owned(), *values)),
        );
    }
    found
}

/// A node holds exactly what it should.
async fn holds(node: &Ports, position: u64) {
    let status = at(node, position).await;
    assert_eq!(status["digest"], DIGEST);
    assert_eq!(status["records"], grades().len());
    for (user, values) in grades() {
        let mut wanted = json!({ "user_id": user });
        for (field, value) in FIELDS.iter().zip(values) {
            wanted[field] = value.into();
        }
        assert_eq!(node.get(&user).await.json(), wanted);
    }
}

#[tokio::test]
async fn a_backup_of_format_1_is_read() {
    let (store, summary) = restored(BACKUP);
    assert_eq!(all_in(&store), grades());
    assert_eq!(store.digest().to_string(), DIGEST);
    let head = Head {
        format: 1,
        log_id: "disk-82dfecef9dda467228557736144bfb0f".into(),
        position: 8,
        time_ns: 1_795_412_503_623_302_489,
        rows_expected: 7,
    };
    let end = End {
        position: 8,
        rows: 7,
        digest: DIGEST.to_owned(),
        checksum: "9d6823db254cc13925487f9db686dbea".to_owned(),
    };
    assert_eq!(summary.records, Some((head, end)));
    assert_eq!((summary.rows, summary.bytes), (7, 549));

    let file = fixture("backup-1.csv.gz");
    let output = verify(&file);
    assert!(output.status.success(), "{output:?}");
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.contains("time      2026-11-23T05:41:43Z\n"), "{said}");
    let node = Node::start_with(&mut program_from(&file)).await;
    holds(&node, 8).await;
}

/// A replica has read each message and taken what it says.
async fn reads_all(node: &Ports, count: u64) {
    holds(node, count).await;
    for (name, value) in [
        ("log_poisoned", 0.0),
        ("checkpoints_compared", 1.0),
        ("divergences", 0.0),
    ] {
        let found = node.metric(&format!("gradestore_{name}_total")).await;
        assert_eq!(found, Some(value), "{name}");
    }
}

#[tokio::test]
async fn messages_of_format_1_are_read() {
    let broker = Broker::start().await;
    let early = broker.replica().await;
    let count = publish(&broker, MESSAGES).await;
    reads_all(&early, count).await;
    early.kill();
    let late = broker.replica().await;
    reads_all(&late, count).await;
}

/// What is left of the users once the messages of format 2 have been read as well.
fn grades_2() -> Store {
    let mut grades = grades();
    for user in ["0", r#""q", 'r'"#, "привет 😀"] {
        grades.remove(user).unwrap();
    }
    grades.insert("a".to_owned(), [0, 5, 0, 0]);
    let (store, mut piece) = (Store::new(), Piece::default());
    for (user, values) in grades {
        piece.push(&user, values);
    }
    store.put(&piece);
    store
}

#[tokio::test]
async fn messages_of_format_2_are_read() {
    let broker = Broker::start().await;
    let early = broker.replica().await;
    publish(&broker, MESSAGES).await;
    let position = publish(&broker, MESSAGES_2).await;
    let wanted = Held::in_store(&grades_2(), position);
    at(&early, position).await;
    assert_eq!(Held::by(&early).await, wanted);
    let late = broker.replica().await;
    assert_eq!(Held::by(&late).await, wanted);
    let poisoned = late.metric("gradestore_log_poisoned_total").await;
    assert_eq!(poisoned, Some(0.0));
}

/// Sends messages as they were sent once; the place of the last.
async fn publish(broker: &Broker, messages: &str) -> u64 {
    let client = broker.client().await;
    let mut place = 0;
    for message in messages.split("\n----\n") {
        let (head, payload) = message.split_once("\n\n").unwrap();
        let mut headers = HeaderMap::new();
        for line in head.lines() {
            let (name, value) = line.split_once(": ").unwrap();
            headers.insert(name, value);
        }
        let payload = payload.trim_end().to_owned().into();
        let sent = client.publish_with_headers(SUBJECT, headers, payload).await;
        place = sent.unwrap().await.unwrap().sequence;
    }
    place
}

#[tokio::test]
async fn a_data_directory_of_format_2_is_read() {
    let directory = tempdir().unwrap();
    let dir = directory.path();
    copy_tree(&fixture("data-2"), dir);
    let node = Node::start_with(&mut program_on(dir)).await;
    let status = node.ops("/status").await.json();
    assert_eq!(status["restore"]["rows"], 2);
    assert_eq!(Held::by(&node).await, Held::in_store(&left_in_data_2(), 8));
    // And written on.
    assert_eq!(node.set(r#"{"user_id":"b"}"#).await.position(), 9);
}

/// What is left of a, b and c: the snapshot is of when a had gone, the log of when a had come back
/// and b had gone.
fn left_in_data_2() -> Store {
    let (store, mut piece) = (Store::new(), Piece::default());
    piece.push("a", [0, 0, 0, -4]);
    piece.push("c", [0, 7, 0, 0]);
    store.put(&piece);
    store
}

#[tokio::test]
async fn a_data_directory_of_format_1_is_read() {
    let directory = tempdir().unwrap();
    let dir = directory.path();
    copy_tree(&fixture("data-1"), dir);
    let node = Node::start_with(&mut program_on(dir)).await;
    holds(&node, 8).await;
    let status = node.ops("/status").await.json();
    assert_eq!(status["log_id"], "disk-82dfecef9dda467228557736144bfb0f");
    assert_eq!(status["restore"]["rows"], 4);
    node.kill();
}

#[tokio::test]
async fn a_log_of_format_1_is_read_without_its_snapshot() {
    let directory = tempdir().unwrap();
    let dir = directory.path();
    copy_tree(&fixture("data-1"), dir);
    std::fs::remove_dir_all(dir.join("snapshots")).unwrap();
    let node = Node::start_with(&mut program_on(dir)).await;
    holds(&node, 8).await;
    assert_eq!(node.ops("/status").await.json()["restore"], json!(null));
    // And written on.
    assert_eq!(node.set(r#"{"user_id":"b"}"#).await.position(), 9);
}
