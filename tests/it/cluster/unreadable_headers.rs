//! Messages with a header block that the client library cannot parse or takes for a message of the
//! server: all replicas skip the same ones.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use gradestore::log::{header_block, raw_message};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};

use crate::harness::cluster::broker::{Broker, STREAM, SUBJECT, replica_with_data};
use crate::harness::wire::{eventually, with_timeout};
use crate::harness::{Node, Ports};

const POISONED: &str = "gradestore_log_poisoned_total";
/// Average time for one message on three replicas and the two writes around it, on a busy machine.
const SKIP_WAIT_MAX: Duration = Duration::from_secs(3);

/// For any number of unreadable messages within seconds.
const RECONNECTS_MAX: f64 = 4.0;

/// Blocks with a status have no CR here: the server removes all bytes between the version and the
/// first CR.
const UNREADABLE: [&[u8]; 23] = [
    // The client ends its connection.
    b"NATS/1.0\r\nTrace Id: 1\r\n\r\n",
    b"NATS/1.0\r\nbad header line\r\n\r\n",
    b"NATS/1.0\r\nA: caf\xe9\r\n\r\n",
    b"NATS/1.0\r\nGrade-Format : 1\r\n\r\n",
    b"NATS/1.0\r\n\xc3\x89: 1\r\n\r\n",
    b"NATS/1.0\r\nA\0: 1\r\n\r\n",
    b"NATS/1.0 OK\n\n",
    b"NATS/1.01\n\n",
    b"NATS/2.0\r\n\r\n",
    b"nats/1.0\r\n\r\n",
    b"A: b\r\n\r\n",
    b"\r\n",
    // The client's task panics.
    b"NATS/1.0\r\nA: b\rc\r\n\r\n",
    // The pull consumer drops the message and reports nothing.
    b"NATS/1.0 100 Idle Heartbeat\n\n",
    b"NATS/1.0 408 Request Timeout\n\n",
    b"NATS/1.0 409 Message Size Exceeds MaxBytes\n\n",
    b"NATS/1.0 423 Nats-Pin-Id mismatch\n\n",
    // The pull consumer ends, or returns an error.
    b"NATS/1.0 409 Consumer Deleted\n\n",
    b"NATS/1.0 409 Exceeded MaxRequestBatch of 1\n\n",
    b"NATS/1.0 408\nNats-Pending-Messages: x\n\n",
    b"NATS/1.0 404 No Messages\n\n",
    b"NATS/1.0 503\n\n",
    b"NATS/1.0 503",
];

const READABLE: [&[u8]; 11] = [
    b"NATS/1.0\r\n\r\n",
    b"NATS/1.0",
    b"NATS/1.0\r\nTrace-Id: abc\r\n\r\n",
    b"NATS/1.0 200 OK\n\n",
    b"NATS/1.0\nA: b",
    b"NATS/1.0\r\n\r\nA:\r\n b\r\n\r\n",
    b"NATS/1.0\r\nA: caf\xc3\xa9\0\r\n\r\n",
    b"NATS/1.0\r\n: b\r\n\r\n",
    b"NATS/1.0\r\ngrade-format: 99\r\n\r\n",
    b"NATS/1.0\r\nGrade-Format: 1\r\nGrade-Format: 99\r\n\r\n",
    b"NATS/1.0\r\nGrade-Format:\xc2\xa01\t\r\n\r\n",
];

/// Blocks with a status and a CR, and what the server stores of them.
const STATUS_REMOVED: [(&[u8], Option<&[u8]>); 3] = [
    (b"NATS/1.0 503\r\n\r\n", None),
    (b"NATS/1.0 100 Idle Heartbeat\r\n\r\n", None),
    (
        b"NATS/1.0 404 No Messages\r\nA: b\r\n\r\n",
        Some(b"NATS/1.0\r\nA: b\r\n\r\n"),
    ),
];

/// A NATS client that writes header blocks as bytes.
pub(crate) struct Publisher {
    incoming: Lines<BufReader<OwnedReadHalf>>,
    outgoing: OwnedWriteHalf,
}

impl Publisher {
    pub(crate) async fn connect(address: SocketAddr) -> Self {
        let stream = with_timeout("connect", TcpStream::connect(address)).await;
        let (incoming, mut outgoing) = stream.unwrap().into_split();
        let hello = b"CONNECT {\"headers\":true,\"verbose\":false}\r\nSUB ack 1\r\n";
        outgoing.write_all(hello).await.unwrap();
        Self {
            incoming: BufReader::new(incoming).lines(),
            outgoing,
        }
    }

    /// Publishes a message; returns its position.
    pub(crate) async fn publish(&mut self, block: &[u8], payload: &str) -> u64 {
        let (header_len, total_len) = (block.len(), block.len() + payload.len());
        let head = format!("HPUB {SUBJECT} ack {header_len} {total_len}\r\n");
        let frame = [head.as_bytes(), block, payload.as_bytes(), b"\r\n"].concat();
        self.outgoing.write_all(&frame).await.unwrap();
        loop {
            let line = self.line().await;
            if line == "PING" {
                self.outgoing.write_all(b"PONG\r\n").await.unwrap();
            } else if line.starts_with("MSG ack ") {
                let ack: Value = serde_json::from_str(&self.line().await).unwrap();
                return ack["seq"].as_u64().unwrap_or_else(|| panic!("{ack}"));
            } else {
                let expected = line == "PONG" || line.starts_with("INFO ");
                assert!(expected, "{}: {line}", block.escape_ascii());
            }
        }
    }

    async fn line(&mut self) -> String {
        let line = with_timeout("a line of the broker", self.incoming.next_line()).await;
        line.unwrap().expect("the broker has ended the connection")
    }
}

fn patch(user: &str, spp: usize) -> String {
    format!(r#"{{"user_id":"{user}","spp":{spp}}}"#)
}

/// Checks that all nodes are at `position`, have skipped the same number of messages and hold the
/// same records.
async fn check_equal(nodes: &[&Ports], position: u64, poisoned: usize, records: usize) {
    let mut digests = Vec::new();
    for node in nodes {
        let status = node.ready_at(position).await;
        assert_eq!(status["records"], records);
        assert_eq!(node.metric(POISONED).await, Some(poisoned as f64));
        digests.push(status["digest"].as_str().unwrap().to_owned());
    }
    digests.dedup();
    assert_eq!(digests.len(), 1, "{digests:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn unreadable_headers_are_skipped_by_all_replicas_alike() {
    let broker = Broker::start().await;
    let [a, b, c] = broker.replicas().await;
    let mut publisher = Publisher::connect(broker.address).await;
    let started_at = Instant::now();
    for (index, block) in UNREADABLE.into_iter().enumerate() {
        let shown = block.escape_ascii();
        let before = a.set(patch("x", index)).await.position();
        let bad = publisher.publish(block, r#"[{"user_id":"bad"}]"#).await;
        assert_eq!(bad, before + 1, "{shown}");
        // No message follows yet.
        for node in [&a, &b, &c] {
            eventually(&format!("position {bad}: {shown}"), async || {
                let position = node.metric("gradestore_log_position").await?;
                (position == bad as f64).then_some(())
            })
            .await;
        }
        let after = b.set(patch("y", index)).await.position();
        assert_eq!(after, bad + 1, "{shown}");
        for node in [&a, &b, &c] {
            assert_eq!(node.get_at("y", after).await["spp"], index, "{shown}");
        }
        check_equal(&[&a, &b, &c], after, index + 1, 2).await;
    }
    let took = started_at.elapsed();
    assert!(took < SKIP_WAIT_MAX * UNREADABLE.len() as u32, "{took:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_starts_later_reads_past_unreadable_headers() {
    let broker = Broker::start().await;
    let dir = tempfile::tempdir().unwrap();
    let with_dir = || replica_with_data(broker.address, dir.path());
    let a = Node::start_with(&mut with_dir()).await;
    let before = a.set(patch("x", 0)).await.position();
    a.stop().await;
    // Some directly after the snapshot, some in a row, one at the end.
    let mut publisher = Publisher::connect(broker.address).await;
    let mut end = before;
    for block in UNREADABLE {
        end = publisher.publish(block, r#"[{"user_id":"bad"}]"#).await;
        if block.starts_with(b"NATS/1.0 ") {
            let good = format!("[{}]", patch("y", end as usize));
            publisher.publish(b"NATS/1.0\r\n\r\n", &good).await;
            end = publisher.publish(block, r#"[{"user_id":"bad"}]"#).await;
        }
    }
    let poisoned = end - before - blocks_with_status();
    // B first, because an empty replica would otherwise bootstrap from A.
    let b = broker.replica().await;
    let a = Node::start_with(&mut with_dir()).await;
    // Each start appends an empty batch.
    check_equal(&[&a, &b], end + 2, poisoned as usize, 2).await;
    // Again from the snapshot, with nothing to skip.
    a.stop().await;
    let a = Node::start_with(&mut with_dir()).await;
    check_equal(&[&a], end + 3, 0, 2).await;
    let after = a.set(patch("z", 1)).await.position();
    assert_eq!(after, end + 4);
    for node in [&a, &b] {
        assert_eq!(node.get_at("z", after).await["spp"], 1);
    }
}

/// The number of blocks with a status.
fn blocks_with_status() -> u64 {
    let with_status = |block: &&&[u8]| block.starts_with(b"NATS/1.0 ");
    UNREADABLE.iter().filter(with_status).count() as u64
}

/// Many cost no more than one: a client that publishes them does not stop other writes.
#[tokio::test(flavor = "multi_thread")]
async fn many_unreadable_messages_cost_few_reconnects() {
    const MANY: usize = 300;
    let broker = Broker::start().await;
    let [a, b] = broker.replicas().await;
    let before = [reconnects(&a).await, reconnects(&b).await];
    let mut publisher = Publisher::connect(broker.address).await;
    let mut good = 0;
    for (index, block) in UNREADABLE.into_iter().cycle().take(MANY).enumerate() {
        publisher.publish(block, r#"[{"user_id":"bad"}]"#).await;
        if index % 10 == 0 {
            publisher
                .publish(READABLE[0], &format!("[{}]", patch("y", index)))
                .await;
            good = index;
        }
    }
    let position = a.set(patch("x", 1)).await.position();
    check_equal(&[&a, &b], position, MANY, 2).await;
    assert_eq!(b.get_at("y", position).await["spp"], good);
    for (node, before) in [&a, &b].into_iter().zip(before) {
        let more = reconnects(node).await - before;
        assert!(more <= RECONNECTS_MAX, "{more} reconnects");
    }
    // Later consumers work again.
    let position = b.set(patch("x", 2)).await.position();
    assert_eq!(a.get_at("x", position).await["spp"], 2);
}

async fn reconnects(node: &Ports) -> f64 {
    let count = node.metric("gradestore_log_reconnects_total").await;
    count.unwrap()
}

#[tokio::test]
async fn a_replica_reconnects_after_an_unreadable_header() {
    let mut broker = Broker::start().await;
    let [a, b] = broker.replicas().await;
    // After a reconnect a reader checks that the message before its position is unchanged.
    for (index, block) in [UNREADABLE[0], UNREADABLE[12]].into_iter().enumerate() {
        let mut publisher = Publisher::connect(broker.address).await;
        let bad = publisher.publish(block, r#"[{"user_id":"bad"}]"#).await;
        check_equal(&[&a, &b], bad, index + 1, index).await;
        broker.kill();
        for node in [&a, &b] {
            node.in_state("read-only").await;
        }
        broker.restart().await;
        for node in [&a, &b] {
            node.in_state("ready").await;
        }
        let after = a.set(patch(&index.to_string(), 1)).await.position();
        assert_eq!(after, bad + 1);
        check_equal(&[&a, &b], after, index + 1, index + 1).await;
    }
}

#[tokio::test]
async fn readable_but_unusual_headers_are_applied() {
    let broker = Broker::start().await;
    let [a, b] = broker.replicas().await;
    let started = b.applied_position().await.max(a.applied_position().await);
    let mut publisher = Publisher::connect(broker.address).await;
    let status_removed = STATUS_REMOVED.map(|(block, _)| block);
    for (index, block) in READABLE.into_iter().chain(status_removed).enumerate() {
        let shown = block.escape_ascii();
        let payload = format!("[{}]", patch("x", index + 1));
        let published = publisher.publish(block, &payload).await;
        assert_eq!(published, started + index as u64 + 1, "{shown}");
        for node in [&a, &b] {
            assert_eq!(
                node.get_at("x", published).await["spp"],
                index + 1,
                "{shown}"
            );
        }
        check_equal(&[&a, &b], published, 0, 1).await;
    }
}

#[tokio::test]
async fn stored_header_blocks_are_fetched_unchanged() {
    const WAIT_MAX: Duration = Duration::from_secs(10);
    let broker = Broker::start().await;
    // Creates the stream.
    let node = broker.replica().await;
    node.stop().await;
    let context = broker.client().await;
    let client = context.client();
    let get = async |seq| {
        raw_message::get(&client, STREAM, seq, WAIT_MAX)
            .await
            .unwrap()
    };
    let mut publisher = Publisher::connect(broker.address).await;
    let mut before_ns = 0;
    let readable = READABLE.map(|block| (block, Some(block), true));
    let unreadable = UNREADABLE.map(|block| (block, Some(block), false));
    let removed = STATUS_REMOVED.map(|(block, stored)| (block, stored, true));
    for (block, stored, is_readable) in readable.into_iter().chain(unreadable).chain(removed) {
        let shown = block.escape_ascii();
        let parsed = stored.map(header_block::parse);
        assert_eq!(
            parsed.is_none_or(|parsed| parsed.is_ok()),
            is_readable,
            "{shown}"
        );
        let seq = publisher.publish(block, "é").await;
        let message = get(seq).await.unwrap();
        assert_eq!(message.seq, seq);
        assert_eq!(message.header_block.as_deref(), stored, "{shown}");
        assert_eq!(message.payload, "é".as_bytes());
        assert!(message.time_ns > before_ns);
        before_ns = message.time_ns;
        assert_eq!(get(seq + 1).await, None);
    }
    // The response is larger than the largest message that a client may publish.
    let payload = "x".repeat(1_000_000);
    let seq = publisher.publish(READABLE[0], &payload).await;
    assert_eq!(get(seq).await.unwrap().payload, payload.as_bytes());
    // An empty block counts as none.
    let seq = publisher.publish(b"", "").await;
    let message = get(seq).await.unwrap();
    assert_eq!((message.header_block, message.payload), (None, Vec::new()));
    let missing = raw_message::get(&client, "MISSING", 1, WAIT_MAX).await;
    assert!(missing.unwrap_err().to_string().contains("10059"));
}
