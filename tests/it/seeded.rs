//! A cluster whose log does not begin at its first batch, so that who starts from nothing needs a
//! peer; and what its replicas must hold.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;

use async_nats::jetstream::Context;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD as BASE64;
use futures_util::StreamExt;
use gradestore::grade::{self, Changes, Patch};
use gradestore::store::Store;
use serde_json::Value;
use tempfile::TempDir;

use crate::broker::{
    Answered, Broker, FIELDS, Logged, STREAM, Write, all_there, delete, none_twice, replica_at,
    writes_in,
};
use crate::disk::{store_of, write_file_of};
use crate::harness::{Node, Ports};
use crate::throttle::Throttle;
use crate::wire::eventually;

/// What the first replica is seeded with ends here.
pub(crate) const SEED: u64 = 100;
/// Messages of the stream that are asked for at once.
const READ_AT_ONCE: usize = 64;

/// A broker, what its first replica is seeded with, and directories for all.
pub(crate) struct Cluster {
    pub(crate) broker: Broker,
    pub(crate) truth: Truth,
    pub(crate) seed: PathBuf,
    pub(crate) dir: TempDir,
    written: u64,
}

impl Cluster {
    /// With `rows` of 35 bytes in the seed.
    pub(crate) async fn of(rows: u64) -> Self {
        let (truth, seed, dir) = seed(rows);
        Self {
            broker: Broker::start_with(&[]).await,
            truth,
            seed,
            dir,
            written: 0,
        }
    }

    /// A replica that keeps its snapshots in a directory of this name.
    pub(crate) fn with_dir(&self, name: &str) -> Command {
        self.with_dir_at(name, self.broker.address)
    }

    /// The same that meets the broker at `address`.
    pub(crate) fn with_dir_at(&self, name: &str, address: SocketAddr) -> Command {
        let mut command = replica_at(address);
        command.env("GRADESTORE_EPHEMERAL", "false");
        command.arg("--data-dir").arg(self.dir.path().join(name));
        command
    }

    /// The replica that makes the stream.
    pub(crate) async fn first(&self) -> Node {
        let mut command = self.with_dir("first");
        Node::start_with(command.arg("--restore-from").arg(&self.seed)).await
    }

    /// The same; the others reach it through `throttle`.
    pub(crate) async fn first_behind(&self, throttle: &Throttle) -> Node {
        let mut command = self.with_dir("first");
        command.args(["--advertise-url", &throttle.url()]);
        let node = Node::start_with(command.arg("--restore-from").arg(&self.seed)).await;
        throttle.lead_to(node.write);
        node
    }

    /// Writes through `node` that must be answered, one after the other.
    pub(crate) async fn write(&mut self, node: &Ports, count: usize) -> Vec<Answered> {
        let mut answered = Vec::new();
        for _ in 0..count {
            self.written += 1;
            let write = Write {
                user: format!("user {}", self.written % 7),
                field: self.written as usize % FIELDS.len(),
                value: self.written as i64,
            };
            let deletes = self.written.is_multiple_of(11);
            // A broker that is away refuses, and stores nothing of what it refused.
            let answer = eventually("an answered write", async || {
                let answer = match deletes {
                    true => delete(node, &write.user.replace(' ', "+")).await,
                    false => node.set(write.json()).await,
                };
                (answer.status != 503).then_some(answer)
            });
            let position = answer.await.position();
            let write = match deletes {
                true => Logged::Delete(write.user),
                false => write.into(),
            };
            answered.push(Answered { position, write });
        }
        answered
    }

    /// What must hold of replicas, whatever has happened.
    pub(crate) async fn check(&mut self, nodes: &[&Ports], answered: &[Answered]) {
        let client = self.broker.client().await;
        self.truth.check(&client, nodes, answered).await;
    }
}

/// A backup of `rows` rows that a first replica begins from, in a directory for all replicas; what
/// they then hold.
pub(crate) fn seed(rows: u64) -> (Truth, PathBuf, TempDir) {
    let (dir, store) = (tempfile::tempdir().unwrap(), store_of(rows, u64::MAX));
    let seed = write_file_of(dir.path(), &store, SEED);
    let truth = Truth {
        store,
        position: SEED,
        log: BTreeMap::new(),
    };
    (truth, seed, dir)
}

/// What a plain fold of the log gives, so far.
pub(crate) struct Truth {
    pub(crate) store: Store,
    pub(crate) position: u64,
    /// What each batch sets and deletes.
    pub(crate) log: BTreeMap<u64, Vec<Logged>>,
}

impl Truth {
    /// Of a log that begins with nothing.
    pub(crate) fn new() -> Self {
        Self {
            store: Store::new(),
            position: 0,
            log: BTreeMap::new(),
        }
    }

    /// Reads the log to its end, which must not have been trimmed since it was last read.
    pub(crate) async fn read(&mut self, client: &Context) {
        let end = eventually("the stream's end", async || {
            let stream = client.get_stream(STREAM).await.ok()?;
            Some(stream.cached_info().state.last_sequence)
        })
        .await;
        let positions = futures_util::stream::iter(self.position + 1..=end);
        let mut payloads = positions
            .map(|position| payload_at(client, position))
            .buffered(READ_AT_ONCE);
        while let Some(payload) = payloads.next().await {
            self.position += 1;
            let writes = writes_in(&payload);
            writes.iter().for_each(|write| apply(&self.store, write));
            self.log.insert(self.position, writes);
        }
    }

    /// What must hold of replicas, whatever has happened.
    pub(crate) async fn check(
        &mut self,
        client: &Context,
        nodes: &[&Ports],
        answered: &[Answered],
    ) {
        self.read(client).await;
        all_there(answered, |position| self.log.get(&position));
        none_twice(self.log.values().flatten());
        for node in nodes {
            // Checkpoints may make the log longer meanwhile.
            let status = eventually("ready at the log's end", async || {
                let status = node.ops("/status").await.json();
                if status["position"].as_u64() > Some(self.position) {
                    self.read(client).await;
                }
                (status["position"] == self.position && status["state"] == "ready")
                    .then_some(status)
            });
            let status = status.await;
            assert_eq!(status["records"], self.store.len());
            assert_eq!(status["digest"], self.store.digest().to_string());
        }
    }
}

/// A message of the stream as JSON, its headers and its payload in base64: a client library reads
/// no message whose headers it cannot parse.
pub(crate) async fn message_at(client: &Context, position: u64) -> Value {
    eventually("a message of the stream", async || {
        let subject = format!("$JS.API.STREAM.MSG.GET.{STREAM}");
        let request = format!(r#"{{"seq":{position}}}"#);
        let answer = client
            .client()
            .request(subject, request.into())
            .await
            .ok()?;
        let mut answer: Value = serde_json::from_slice(&answer.payload).unwrap();
        answer["message"]
            .is_object()
            .then(|| answer["message"].take())
    })
    .await
}

async fn payload_at(client: &Context, position: u64) -> Vec<u8> {
    let message = message_at(client, position).await;
    // A message without a payload has no such member.
    BASE64
        .decode(message["data"].as_str().unwrap_or_default())
        .unwrap()
}

/// Does what the log says.
pub(crate) fn apply(store: &Store, write: &Logged) {
    match write {
        Logged::Set(write) => {
            let mut changes = Changes::default();
            changes.set(write.field, write.value);
            let user_id = write.user.as_str();
            store.apply_all(&[grade::Write::Set(Patch { user_id, changes })]);
        }
        Logged::Delete(user) => store.apply_all(&[grade::Write::Delete(user)]),
    }
}

/// Checks that a node serves nothing, and says with each refusal in which of `states` it is; its
/// `/status`.
pub(crate) async fn serves_nothing(node: &Ports, states: &[&str]) -> Value {
    let status = node.ops("/status").await.json();
    assert!(
        states.iter().any(|state| status["state"] == *state),
        "{status}"
    );
    let refused = [
        node.get("user 1").await,
        node.set(r#"{"user_id":"user 1","spp":1}"#).await,
        delete(node, "user+1").await,
        node.ops("/readyz").await,
        node.ops("/readyz/write").await,
    ];
    for answer in refused {
        let detail = answer.problem(503, "not-ready");
        let said = |state: &&str| detail.starts_with(&format!("not ready ({state}): "));
        assert!(states.iter().any(said), "{detail}");
    }
    assert_eq!(node.ops("/livez").await.status, 200);
    status
}
