//! One nats-server, replicas on it, load, and the checks of what a cluster must hold.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_nats::jetstream::consumer::{AckPolicy, pull};
use async_nats::jetstream::stream::Config;
use async_nats::jetstream::{self, Context};
use futures_util::StreamExt;
use futures_util::future::join_all;
use gradestore::log::RandomId;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::Value;
use tempfile::TempDir;
use tokio::task::JoinHandle;

use crate::harness::cluster::nats::NatsServer;
use crate::harness::wire::{Response, eventually, with_timeout};
use crate::harness::{ANY_PORTS, Node, PASSWORD, Ports, program};

/// Installed by tests/install-nats.sh.
pub(crate) const NATS_SERVER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/.tools/bin/nats-server");
pub(crate) const STREAM: &str = "GRADES";
pub(crate) const SUBJECT: &str = "grades.set";
pub(crate) const FIELDS: [&str; 4] = ["postpaid_limit", "spp", "shipping_fee", "return_fee"];

/// One nats-server, which may be killed, restarted and rolled back.
pub(crate) struct Broker {
    pub(crate) address: SocketAddr,
    server: NatsServer,
}

impl Broker {
    /// A server with the stream, which an ephemeral replica alone does not create.
    pub(crate) async fn start() -> Self {
        let broker = Self::start_with(&[]).await;
        broker.create_stream().await;
        broker
    }

    /// Creates the stream of a new log.
    pub(crate) async fn create_stream(&self) {
        let client = self.client().await;
        client.create_stream(stream_config()).await.unwrap();
    }

    /// A server with these arguments and no stream.
    pub(crate) async fn start_with(args: &[&str]) -> Self {
        let server = NatsServer::start_with("", args).await;
        Self {
            address: server.address,
            server,
        }
    }

    /// kill -9; the page cache survives.
    pub(crate) fn kill(&mut self) {
        self.server.kill();
    }

    /// Restarts it with the same port and store.
    pub(crate) async fn restart(&mut self) {
        self.server.restart().await;
    }

    /// Kills it and copies its store.
    pub(crate) fn kill_and_copy(&mut self) -> TempDir {
        self.kill();
        let copy = tempfile::tempdir().unwrap();
        copy_tree(&self.server.store(), copy.path());
        copy
    }

    /// Restarts it with an older copy of its store, so that it has lost its last messages.
    pub(crate) async fn roll_back(&mut self, copy: TempDir) {
        self.kill();
        let store = self.server.store();
        fs::remove_dir_all(&store).unwrap();
        fs::create_dir(&store).unwrap();
        copy_tree(copy.path(), &store);
        self.restart().await;
    }

    /// A NATS client for the test.
    pub(crate) async fn client(&self) -> Context {
        let client = async_nats::connect(self.address.to_string()).await.unwrap();
        jetstream::new(client)
    }

    /// A ready replica.
    pub(crate) async fn replica(&self) -> Node {
        Node::start_with(&mut replica_at(self.address)).await
    }

    /// Replicas that start at the same time, so that one creates the stream. Every second one has
    /// two threads.
    pub(crate) async fn replicas<const N: usize>(&self) -> [Node; N] {
        let replica = async |number: usize| {
            let threads = (1 + number % 2).to_string();
            let mut command = replica_at(self.address);
            Node::start_with(command.args(["--threads", &threads])).await
        };
        let nodes = join_all((0..N).map(replica)).await;
        nodes.try_into().ok().unwrap()
    }
}

/// The stream of a new log with the required settings.
pub(crate) fn stream_config() -> Config {
    let log = RandomId::random().unwrap();
    Config {
        name: STREAM.to_owned(),
        subjects: vec![SUBJECT.to_owned()],
        max_age: Duration::from_secs(24 * 3600),
        max_messages_per_subject: -1,
        max_message_size: 2 << 20,
        duplicate_window: Duration::from_secs(120),
        deny_delete: true,
        deny_purge: true,
        metadata: [("gradestore-log-id".to_owned(), log.to_string())].into(),
        ..Config::default()
    }
}

pub(crate) fn copy_tree(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap().path();
        let to = to.join(entry.file_name().unwrap());
        match entry.is_dir() {
            true => {
                fs::create_dir(&to).unwrap();
                copy_tree(&entry, &to);
            }
            false => drop(fs::copy(&entry, &to).unwrap()),
        }
    }
}

/// The command of a replica on the server at `address`.
pub(crate) fn replica_at(address: SocketAddr) -> Command {
    replica_with(&address.to_string())
}

/// The command of a replica with this `--nats-url`.
pub(crate) fn replica_with(nats_url: &str) -> Command {
    let mut command = program();
    command
        .env("GRADESTORE_PASSWORD", PASSWORD)
        // Checkpoints would add messages to the stream.
        .env("GRADESTORE_CHECKPOINT_INTERVAL", "1h")
        // Shorter than the default, because some tests wait for the timeout.
        .env("GRADESTORE_WRITE_TIMEOUT", "5s")
        .args(["--nats-url", nats_url])
        .args(ANY_PORTS);
    command
}

/// The command of a replica with this `--nats-url` and the data directory `dir`, so that it may
/// create the stream.
pub(crate) fn replica_with_data(nats_url: impl ToString, dir: &Path) -> Command {
    let mut command = replica_with(&nats_url.to_string());
    command.env("GRADESTORE_EPHEMERAL", "false");
    command.arg("--data-dir").arg(dir);
    command
}

/// An acknowledged write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct AckedWrite {
    pub(crate) position: u64,
    pub(crate) write: LoggedWrite,
}

/// One change in the log.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum LoggedWrite {
    Set(Write),
    /// Removes the user's record.
    Delete(String),
}

impl LoggedWrite {
    /// The write, unless it is a deletion.
    pub(crate) fn set(&self) -> Option<&Write> {
        match self {
            Self::Set(write) => Some(write),
            Self::Delete(_) => None,
        }
    }
}

impl From<Write> for LoggedWrite {
    fn from(write: Write) -> Self {
        Self::Set(write)
    }
}

/// Sets one field of one user to a value that no other write sets.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Write {
    pub(crate) user: String,
    pub(crate) field: usize,
    pub(crate) value: i64,
}

impl Write {
    /// The body of `POST /set`.
    pub(crate) fn json(&self) -> String {
        let (user, field, value) = (&self.user, FIELDS[self.field], self.value);
        format!(r#"{{"user_id":"{user}","{field}":{value}}}"#)
    }
}

/// Users are deleted regularly, and most of them exist at any time.
const DELETE_EVERY: usize = 29;

/// Writers that run until [`Load::stop`].
pub(crate) struct Load {
    stop: Arc<AtomicBool>,
    writers: Vec<JoinHandle<Vec<AckedWrite>>>,
}

impl Load {
    /// Starts three writers for each node, all on the same fields of the same users. Each sends
    /// `writes` at most, and every [`DELETE_EVERY`]th of them is a deletion.
    pub(crate) fn start(nodes: &[&Node], users: usize, writes: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let writers = (0..nodes.len() * 3).map(|id| {
            let (ports, stop) = ((**nodes[id % nodes.len()]).clone(), Arc::clone(&stop));
            tokio::spawn(write(ports, id, users, writes, stop))
        });
        Self {
            writers: writers.collect(),
            stop,
        }
    }

    /// Waits until all writes are sent; returns the acknowledged ones.
    pub(crate) async fn done(self) -> Vec<AckedWrite> {
        let mut answered = Vec::new();
        for writer in self.writers {
            answered.extend(writer.await.unwrap());
        }
        answered
    }

    /// Stops the writers; returns the acknowledged writes.
    pub(crate) async fn stop(self) -> Vec<AckedWrite> {
        self.stop.store(true, Ordering::Relaxed);
        with_timeout("the end of the writers", self.done()).await
    }
}

async fn write(
    ports: Ports,
    id: usize,
    users: usize,
    writes: usize,
    stop: Arc<AtomicBool>,
) -> Vec<AckedWrite> {
    let mut answered = Vec::new();
    for count in 0..writes {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let write = Write {
            user: format!("user-{}", (count * 7 + id) % users),
            field: (count / 3 + id) % FIELDS.len(),
            value: (id * 1_000_000_000 + count) as i64,
        };
        let (response, write) = match (count + id).is_multiple_of(DELETE_EVERY) {
            true => (
                ports.delete(&write.user).await,
                LoggedWrite::Delete(write.user),
            ),
            false => (ports.set(write.json()).await, write.into()),
        };
        match response.status {
            204 => answered.push(AckedWrite {
                position: response.position(),
                write,
            }),
            // Back off after a rejected write.
            503 | 504 => tokio::time::sleep(Duration::from_millis(10)).await,
            _ => panic!("{response:?}"),
        }
    }
    answered
}

/// Reads the whole stream with a plain consumer: the changes of each message.
pub(crate) async fn read_stream(broker: &Context) -> Vec<Vec<LoggedWrite>> {
    let mut stream = broker.get_stream(STREAM).await.unwrap();
    let messages = stream.info().await.unwrap().state.messages as usize;
    let config = pull::Config {
        ack_policy: AckPolicy::None,
        ..pull::Config::default()
    };
    // After a failover the leader of the servers' metadata, which creates consumers, may be missing
    // for longer than the stream's.
    let consumer = eventually("a consumer of the test", async || {
        stream.create_consumer(config.clone()).await.ok()
    });
    let consumer = consumer.await;
    let mut stream = consumer.messages().await.unwrap().take(messages);
    let mut read = Vec::new();
    while let Some(message) = with_timeout("the stream", stream.next()).await {
        let message = message.unwrap();
        assert_eq!(
            message.info().unwrap().stream_sequence,
            read.len() as u64 + 1
        );
        read.push(parse_batch(&message.payload));
    }
    read
}

/// The changes in a message.
pub(crate) fn parse_batch(payload: &[u8]) -> Vec<LoggedWrite> {
    let Ok(Value::Array(patches)) = serde_json::from_slice(payload) else {
        return Vec::new();
    };
    let mut writes = Vec::new();
    for patch in patches {
        if let Some(user) = patch["delete"].as_str() {
            writes.push(LoggedWrite::Delete(user.to_owned()));
        }
        for (field, name) in FIELDS.iter().enumerate() {
            if let Some(value) = patch[name].as_i64() {
                let user = patch["user_id"].as_str().unwrap().to_owned();
                writes.push(Write { user, field, value }.into());
            }
        }
    }
    writes
}

/// Checks replicas against the log: each acknowledged write is at its position, no write is there
/// twice, and every replica holds exactly the fold of the log.
pub(crate) async fn check(broker: &Context, nodes: &[&Node], answered: &[AckedWrite]) {
    let log = read_stream(broker).await;
    assert_acked_writes_in_log(answered, |position| log.get(position as usize - 1));
    assert_no_duplicates(log.iter().flatten());
    let mut folded: BTreeMap<&str, [i64; 4]> = BTreeMap::new();
    let mut deleted = BTreeSet::new();
    for write in log.iter().flatten() {
        match write {
            LoggedWrite::Set(write) => {
                folded.entry(&write.user).or_default()[write.field] = write.value;
                deleted.remove(&*write.user);
            }
            LoggedWrite::Delete(user) => {
                folded.remove(&**user);
                deleted.insert(&**user);
            }
        }
    }
    let end = log.len() as u64;
    let mut digests = BTreeSet::new();
    for node in nodes {
        let status = node.ready_at(end).await;
        assert_eq!(status["records"], folded.len());
        digests.insert(status["digest"].as_str().unwrap().to_owned());
        for (user, values) in &folded {
            let grade = node.get_at(user, end).await;
            let found = FIELDS.map(|field| grade[field].as_i64().unwrap());
            assert_eq!(found, *values, "{user}");
        }
        for user in &deleted {
            node.get(user).await.expect_problem(404, "user-unknown");
        }
    }
    assert_eq!(digests.len(), 1, "{digests:?}");
}

/// Checks that each acknowledged write is in the batch at its position. Several acknowledged
/// deletions of one user in one batch must all be there.
pub(crate) fn assert_acked_writes_in_log<'a>(
    answered: &[AckedWrite],
    batch: impl Fn(u64) -> Option<&'a Vec<LoggedWrite>>,
) {
    let mut expected: BTreeMap<(u64, &LoggedWrite), usize> = BTreeMap::new();
    for AckedWrite { position, write } in answered {
        *expected.entry((*position, write)).or_default() += 1;
    }
    for ((position, write), times) in expected {
        let there = batch(position).into_iter().flatten();
        let there = there.filter(|there| *there == write).count();
        assert!(
            there >= times,
            "position {position} does not have {write:?}"
        );
    }
}

/// Checks that no write is in the log twice. Each sets a unique value.
pub(crate) fn assert_no_duplicates<'a>(log: impl Iterator<Item = &'a LoggedWrite>) {
    let mut seen = BTreeSet::new();
    for write in log.filter_map(LoggedWrite::set) {
        assert!(seen.insert(write), "stored twice: {write:?}");
    }
}

impl Ports {
    /// `GET /get` of a known user with `Grade-Position`: responds once the node has applied
    /// `position`.
    pub(crate) async fn get_at(&self, user_id: &str, position: u64) -> Value {
        let user_id = utf8_percent_encode(user_id, NON_ALPHANUMERIC);
        let url = format!("http://{}/get?user_id={user_id}", self.read);
        let request = self.client.get(url).header("grade-position", position);
        let response = Response::of(with_timeout("GET /get", request.send()).await.unwrap()).await;
        assert_eq!(response.status, 200, "{}", response.body);
        response.json()
    }

    /// Waits until the node is in `state`; returns its `/status`.
    pub(crate) async fn in_state(&self, state: &str) -> Value {
        self.status_where(state, |status| status["state"] == state)
            .await
    }

    /// Waits until the node is ready and has applied `position`; returns its `/status`. It may be
    /// beyond: a replica on a slow machine may append another empty batch.
    pub(crate) async fn ready_at(&self, position: u64) -> Value {
        self.status_where("ready at the end of the log", |status| {
            status["position"].as_u64() >= Some(position) && status["state"] == "ready"
        })
        .await
    }

    /// The position that the node has applied. Each replica appends an empty batch when it starts.
    pub(crate) async fn applied_position(&self) -> u64 {
        self.status().await["position"].as_u64().unwrap()
    }
}
