//! A cluster seeded from a backup, whose log does not begin at its first batch, so that a replica
//! without data needs a peer; and the state that its replicas must hold.

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

use crate::harness::backup_files::{random_store, write_backup_file};
use crate::harness::cluster::broker::{
    AckedWrite, Broker, FIELDS, LoggedWrite, STREAM, Write, assert_acked_writes_in_log,
    assert_no_duplicates, parse_batch, replica_with_data,
};
use crate::harness::cluster::throttle::Throttle;
use crate::harness::wire::eventually;
use crate::harness::{Node, Ports};

/// The position of the first replica's backup.
pub(crate) const SEED_POSITION: u64 = 100;
/// Concurrent requests for messages of the stream.
const CONCURRENT_READS: usize = 64;

/// NATS, the backup for the first replica, and the parent of the data directories.
pub(crate) struct SeededCluster {
    pub(crate) broker: Broker,
    pub(crate) reference: ReferenceState,
    pub(crate) seed: PathBuf,
    pub(crate) dir: TempDir,
    written: u64,
}

impl SeededCluster {
    /// With `rows` of 35 bytes in the backup.
    pub(crate) async fn with_rows(rows: u64) -> Self {
        let (reference, seed, dir) = seed(rows);
        Self {
            broker: Broker::start_with(&[]).await,
            reference,
            seed,
            dir,
            written: 0,
        }
    }

    /// The command of a replica with the data directory `name`.
    pub(crate) fn replica(&self, name: &str) -> Command {
        self.replica_through(name, self.broker.address)
    }

    /// The same with the broker at `address`.
    pub(crate) fn replica_through(&self, name: &str, address: SocketAddr) -> Command {
        replica_with_data(address, &self.dir.path().join(name))
    }

    /// Starts the replica that creates the stream.
    pub(crate) async fn start_first(&self) -> Node {
        let mut command = self.replica("first");
        Node::start_with(command.arg("--restore-from").arg(&self.seed)).await
    }

    /// The same; the other replicas reach it through `throttle`.
    pub(crate) async fn start_first_behind(&self, throttle: &Throttle) -> Node {
        let mut command = self.replica("first");
        command.args(["--advertise-url", &throttle.url()]);
        let node = Node::start_with(command.arg("--restore-from").arg(&self.seed)).await;
        throttle.set_target(node.write);
        node
    }

    /// Sends writes through `node` one by one, until each is acknowledged.
    pub(crate) async fn write(&mut self, node: &Ports, count: usize) -> Vec<AckedWrite> {
        let mut answered = Vec::new();
        for _ in 0..count {
            self.written += 1;
            let write = Write {
                user: format!("user {}", self.written % 7),
                field: self.written as usize % FIELDS.len(),
                value: self.written as i64,
            };
            let deletes = self.written.is_multiple_of(11);
            // A rejected write is not stored, so it can be sent again.
            let response = eventually("an answered write", async || {
                let response = match deletes {
                    true => node.delete(&write.user).await,
                    false => node.set(write.json()).await,
                };
                (response.status != 503).then_some(response)
            });
            let position = response.await.position();
            let write = match deletes {
                true => LoggedWrite::Delete(write.user),
                false => write.into(),
            };
            answered.push(AckedWrite { position, write });
        }
        answered
    }

    /// Checks replicas against the log.
    pub(crate) async fn check(&mut self, nodes: &[&Ports], answered: &[AckedWrite]) {
        let client = self.broker.client().await;
        self.reference.check(&client, nodes, answered).await;
    }
}

/// Writes a backup of `rows` rows into a directory for all replicas; returns the state in it too.
pub(crate) fn seed(rows: u64) -> (ReferenceState, PathBuf, TempDir) {
    let (dir, store) = (tempfile::tempdir().unwrap(), random_store(rows, u64::MAX));
    let seed = write_backup_file(dir.path(), &store, SEED_POSITION);
    let reference = ReferenceState {
        store,
        position: SEED_POSITION,
        log: BTreeMap::new(),
    };
    (reference, seed, dir)
}

/// The fold of the log so far.
pub(crate) struct ReferenceState {
    pub(crate) store: Store,
    pub(crate) position: u64,
    /// The changes of each batch.
    pub(crate) log: BTreeMap<u64, Vec<LoggedWrite>>,
}

impl ReferenceState {
    /// The state of an empty log.
    pub(crate) fn new() -> Self {
        Self {
            store: Store::new(),
            position: 0,
            log: BTreeMap::new(),
        }
    }

    /// Reads the log to its end; batches after the last read must not have been trimmed.
    pub(crate) async fn read(&mut self, client: &Context) {
        let end = eventually("the end of the stream", async || {
            let stream = client.get_stream(STREAM).await.ok()?;
            Some(stream.cached_info().state.last_sequence)
        })
        .await;
        let positions = futures_util::stream::iter(self.position + 1..=end);
        let mut payloads = positions
            .map(|position| payload_at(client, position))
            .buffered(CONCURRENT_READS);
        while let Some(payload) = payloads.next().await {
            self.position += 1;
            let writes = parse_batch(&payload);
            writes.iter().for_each(|write| apply(&self.store, write));
            self.log.insert(self.position, writes);
        }
    }

    /// Checks replicas against the log.
    pub(crate) async fn check(
        &mut self,
        client: &Context,
        nodes: &[&Ports],
        answered: &[AckedWrite],
    ) {
        self.read(client).await;
        assert_acked_writes_in_log(answered, |position| self.log.get(&position));
        assert_no_duplicates(self.log.values().flatten());
        for node in nodes {
            // Checkpoints may extend the log meanwhile.
            let status = eventually("ready at the end of the log", async || {
                let status = node.status().await;
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

/// A message of the stream as JSON with headers and payload in base64. A client library cannot
/// return messages with unparsable headers.
pub(crate) async fn message_at(client: &Context, position: u64) -> Value {
    eventually("a message of the stream", async || {
        let subject = format!("$JS.API.STREAM.MSG.GET.{STREAM}");
        let request = format!(r#"{{"seq":{position}}}"#);
        let response = client
            .client()
            .request(subject, request.into())
            .await
            .ok()?;
        let mut response: Value = serde_json::from_slice(&response.payload).unwrap();
        response["message"]
            .is_object()
            .then(|| response["message"].take())
    })
    .await
}

async fn payload_at(client: &Context, position: u64) -> Vec<u8> {
    let message = message_at(client, position).await;
    // Without a payload there is no such member.
    BASE64
        .decode(message["data"].as_str().unwrap_or_default())
        .unwrap()
}

/// Applies a change of the log.
pub(crate) fn apply(store: &Store, write: &LoggedWrite) {
    match write {
        LoggedWrite::Set(write) => {
            let mut changes = Changes::default();
            changes.set(write.field, write.value);
            let user_id = write.user.as_str();
            store.apply_all(&[grade::Write::Set(Patch { user_id, changes })]);
        }
        LoggedWrite::Delete(user) => store.apply_all(&[grade::Write::Delete(user.as_str())]),
    }
}

/// Checks that a node rejects all requests and reports one of `states` each time; returns its
/// `/status`.
pub(crate) async fn assert_serves_nothing(node: &Ports, states: &[&str]) -> Value {
    let status = node.status().await;
    assert!(
        states.iter().any(|state| status["state"] == *state),
        "{status}"
    );
    let refused = [
        node.get("user 1").await,
        node.set(r#"{"user_id":"user 1","spp":1}"#).await,
        node.delete("user 1").await,
        node.ops("/readyz").await,
        node.ops("/readyz/write").await,
    ];
    for response in refused {
        let detail = response.expect_problem(503, "not-ready");
        let printed = |state: &&str| detail.starts_with(&format!("not ready ({state}): "));
        assert!(states.iter().any(printed), "{detail}");
    }
    assert_eq!(node.ops("/livez").await.status, 200);
    status
}
