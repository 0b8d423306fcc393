//! Repeated kill -9: no acknowledged write is lost, and the state is consistent.

use std::sync::Arc;

use gradestore::grade::FIELDS;
use tempfile::tempdir;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::harness::backup_files::{
    NodeState, Rng, fetch_backup, file_names, program_with_data_dir, random_store, read_backup,
    write_backup_file,
};
use crate::harness::wire::{RawConnection, TIMEOUT, eventually};
use crate::harness::{Node, Ports, set_request};

const ROUNDS: u64 = 50;
const WRITERS: usize = 6;
const USERS: usize = 5;

/// Writes increasing values to fields that no other writer uses.
#[derive(Clone)]
struct Writer {
    index: usize,
    /// By user.
    sent: [u64; USERS],
    answered: [u64; USERS],
    position: u64,
}

impl Writer {
    fn new(index: usize) -> Self {
        Self {
            index,
            sent: [0; USERS],
            answered: [0; USERS],
            position: 0,
        }
    }

    fn field(&self) -> &'static str {
        FIELDS[self.index % FIELDS.len()]
    }

    fn user(&self, user: usize) -> String {
        format!("{} of {}", user, self.index / FIELDS.len())
    }

    /// Writes until the node is gone; counts the acknowledged writes.
    async fn write(
        mut self,
        mut connection: RawConnection,
        answered: Arc<watch::Sender<u64>>,
    ) -> Self {
        for user in (0..USERS).cycle() {
            self.sent[user] += 1;
            let patch = format!(
                r#"{{"user_id":"{}","{}":{}}}"#,
                self.user(user),
                self.field(),
                self.sent[user]
            );
            if connection.try_send(set_request(&patch)).await.is_err() {
                break;
            }
            let Some(response) = connection.try_response().await else {
                break;
            };
            let position = response.position();
            assert!(
                position > self.position,
                "{position} after {}",
                self.position
            );
            (self.position, self.answered[user]) = (position, self.sent[user]);
            answered.send_modify(|count| *count += 1);
        }
        self
    }

    /// Checks that no acknowledged value is lost and no value was never sent.
    async fn check(&mut self, node: &Ports) {
        let held = NodeState::of(node).await;
        assert!(
            held.position >= self.position,
            "{held:?}: {} was answered",
            self.position
        );
        for user in 0..USERS {
            let response = node.get(&self.user(user)).await;
            let value = match response.status {
                404 => 0,
                _ => response.json()[self.field()].as_u64().unwrap(),
            };
            let (answered, sent) = (self.answered[user], self.sent[user]);
            let fits = answered <= value && value <= sent;
            assert!(
                fits,
                "{}: {answered} answered, {sent} sent, {value} found",
                self.user(user)
            );
        }
    }
}

/// Checks that the node's `/status` matches its backup.
pub(crate) async fn assert_consistent(node: &Ports) -> NodeState {
    let held = NodeState::of(node).await;
    let (store, summary) = read_backup(&fetch_backup(node).await);
    assert_eq!(summary.records.unwrap().1.position, held.position);
    assert_eq!(NodeState::of_store(&store, held.position), held);
    held
}

async fn start_writing(
    writers: Vec<Writer>,
    node: &Node,
) -> (Vec<JoinHandle<Writer>>, watch::Receiver<u64>) {
    let (count, answered) = watch::channel(0);
    let count = Arc::new(count);
    let mut writing = Vec::new();
    for writer in writers {
        let connection = RawConnection::connect(node.write).await;
        writing.push(tokio::spawn(writer.write(connection, Arc::clone(&count))));
    }
    (writing, answered)
}

async fn join_writers(writing: Vec<JoinHandle<Writer>>) -> Vec<Writer> {
    let mut writers = Vec::new();
    for writer in writing {
        writers.push(writer.await.unwrap());
    }
    writers
}

#[tokio::test]
async fn no_acknowledged_write_is_lost_in_fifty_kills() {
    let directory = tempdir().unwrap();
    let snapshots = directory.path().join("snapshots");
    let mut writers: Vec<Writer> = (0..WRITERS).map(Writer::new).collect();
    let mut rng = Rng(20_240_229);
    let mut position = 0;
    for round in 0..ROUNDS {
        let node =
            Node::start_with(program_with_data_dir(directory.path()).arg("--snapshot-interval=1s"))
                .await;
        for writer in &mut writers {
            writer.check(&node).await;
        }
        let held = assert_consistent(&node).await;
        assert!(held.position >= position);
        position = held.position;

        let complete = || {
            let mut names = file_names(&snapshots);
            names.retain(|name| !name.ends_with(".partial"));
            names
        };
        let before = complete();
        let (writing, mut answered) = start_writing(writers, &node).await;
        if round % 7 == 3 {
            eventually("another snapshot", async || {
                (complete() != before).then_some(())
            })
            .await;
        }
        let moment = *answered.borrow_and_update() + 1 + rng.below(150);
        let reached = answered.wait_for(|count| *count >= moment);
        tokio::time::timeout(TIMEOUT, reached)
            .await
            .unwrap()
            .unwrap();
        node.kill();
        writers = join_writers(writing).await;
    }
    let node = Node::start_with(&mut program_with_data_dir(directory.path())).await;
    for writer in &mut writers {
        writer.check(&node).await;
    }
    assert_consistent(&node).await;
    // Two are kept; a kill between a new one and the removal of the oldest leaves three.
    let kept = file_names(&snapshots);
    assert!((2..=3).contains(&kept.len()), "{kept:?}");
}

#[tokio::test]
async fn a_kill_during_a_snapshot_loses_nothing() {
    let directory = tempdir().unwrap();
    let dir = directory.path().join("data");
    let snapshots = dir.join("snapshots");
    let seed = write_backup_file(directory.path(), &random_store(60_000, u64::MAX), 1);
    let seeded =
        Node::start_with(program_with_data_dir(&dir).arg("--restore-from").arg(&seed)).await;
    seeded.kill();
    let mut writers: Vec<Writer> = (0..WRITERS).map(Writer::new).collect();
    for _ in 0..3 {
        let node =
            Node::start_with(program_with_data_dir(&dir).arg("--snapshot-interval=1s")).await;
        for writer in &mut writers {
            writer.check(&node).await;
        }
        assert_consistent(&node).await;
        let (writing, _) = start_writing(writers, &node).await;
        eventually("a snapshot under way", async || {
            file_names(&snapshots)
                .iter()
                .any(|name| name.ends_with(".partial"))
                .then_some(())
        })
        .await;
        node.kill();
        writers = join_writers(writing).await;
        // The kill hit the snapshot.
        let left = file_names(&snapshots);
        assert!(
            left.iter().any(|name| name.ends_with(".partial")),
            "{left:?}"
        );
    }
    let node = Node::start_with(&mut program_with_data_dir(&dir)).await;
    for writer in &mut writers {
        writer.check(&node).await;
    }
    let held = assert_consistent(&node).await;
    assert!(held.records > 60_000);
    let left = file_names(&snapshots);
    assert!(
        !left.iter().any(|name| name.ends_with(".partial")),
        "{left:?}"
    );
}
