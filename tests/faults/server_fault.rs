//! Faults with a cluster of three servers: of the servers, of their routes and of other publishers.

use std::net::SocketAddr;
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD as BASE64;
use bytes::Bytes;
use rustix::process::Signal;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

use crate::broker::{STREAM, SUBJECT, status_where};
use crate::clock::Clock;
use crate::fault::not_writable;
use crate::harness::AUTHORIZATION;
use crate::nats::{Gossip, SERVERS};
use crate::proxy::{Proxy, Rules};
use crate::scene::{A, B, C, Scene};
use crate::seeded::{SEED, message_at};
use crate::stage::Stage;
use crate::wire::{Answer, eventually, in_time};

/// A fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ServerFault {
    /// kill -9 of the server that leads the stream.
    LeaderKilled,
    /// SIGSTOP to that server, and SIGCONT later.
    LeaderFrozen,
    /// The routes of a follower are cut; its clients still reach it.
    FollowerIsolated,
    /// The same for the leader.
    LeaderIsolated,
    /// Each server is stopped and started, one after the other.
    Restarted,
    /// Two of three servers are killed.
    QuorumLost,
    /// The servers have no storage left.
    DiskFull,
    /// Messages with header blocks that cannot be parsed are stored.
    UnreadableHeader,
    /// The replica under test loses the permission to publish batches.
    NoRight,
    /// The replica under test is suspended, with its clocks, for longer than the broker remembers
    /// message ids.
    Suspended,
    /// Another publisher sends checkpoints with invented replica ids and digests.
    ForgedVotes,
    /// A replica has reached its memory limit.
    StoreFull,
}

/// The storage limit of a server, and the raised limit.
const STORE: &str = "jetstream { max_file_store: 8MB }\n";
const LARGER_STORE: &str = "jetstream { max_file_store: 200MB }\n";
/// All users have all permissions, also without a name. Then user `a` may not publish batches.
const ALL_RIGHTS: &str = "\
    authorization { users: [{ user: all, password: p }, { user: a, password: p }] }\n\
    no_auth_user: all\n";
const NO_RIGHT: &str = "\
    authorization { users: [{ user: all, password: p }, { user: a, password: p, \
    permissions: { publish: { deny: [\"grades.set\"] } } }] }\n\
    no_auth_user: all\n";
const BALLAST_BYTES: usize = 500_000;
/// The number of empty batches that are stored while a server is isolated.
const BEYOND: usize = 100;
const BETWEEN: Duration = Duration::from_millis(50);
/// More than a debug build needs for the rows of a cell.
const MEMORY_MAX: &str = "160MiB";
/// New users per request, and the maximum number of requests.
const NEW_USERS: usize = 5000;
const REQUESTS_MAX: usize = 200;

impl ServerFault {
    pub(crate) const ALL: [Self; 12] = [
        Self::LeaderKilled,
        Self::LeaderFrozen,
        Self::FollowerIsolated,
        Self::LeaderIsolated,
        Self::Restarted,
        Self::QuorumLost,
        Self::DiskFull,
        Self::UnreadableHeader,
        Self::NoRight,
        Self::Suspended,
        Self::ForgedVotes,
        Self::StoreFull,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::LeaderKilled => "leader-killed",
            Self::LeaderFrozen => "leader-frozen",
            Self::FollowerIsolated => "follower-isolated",
            Self::LeaderIsolated => "leader-isolated",
            Self::Restarted => "servers-restarted",
            Self::QuorumLost => "quorum-lost",
            Self::DiskFull => "servers-full",
            Self::UnreadableHeader => "unreadable-header",
            Self::NoRight => "no-right-to-publish",
            Self::Suspended => "suspended",
            Self::ForgedVotes => "forged-votes",
            Self::StoreFull => "store-full",
        }
    }

    pub(crate) fn time_max(self) -> Duration {
        match self {
            // The broker remembers ids for two minutes.
            Self::Suspended => Duration::from_secs(300),
            _ => Duration::from_secs(180),
        }
    }

    /// Additional configuration of the servers.
    pub(crate) fn config(self) -> &'static str {
        match self {
            Self::DiskFull => STORE,
            Self::NoRight => ALL_RIGHTS,
            _ => "",
        }
    }

    /// The suspended replica must reach its servers only through a proxy.
    pub(crate) fn gossip(self) -> Gossip {
        match self {
            Self::Suspended => Gossip::Nothing,
            _ => Gossip::Clients,
        }
    }

    /// Additional flags of each replica.
    pub(crate) fn flags(self) -> [Vec<String>; 3] {
        let flags = |flags: &[&str]| flags.iter().map(|flag| (*flag).to_owned()).collect();
        match self {
            Self::ForgedVotes => [(); 3].map(|()| flags(&["--checkpoint-interval=200ms"])),
            Self::StoreFull => [flags(&[]), flags(&["--memory-max", MEMORY_MAX]), flags(&[])],
            _ => Default::default(),
        }
    }

    /// Prepares the scene before the replica under test starts.
    pub(crate) async fn prepare(self, scene: &mut Scene) {
        match self {
            Self::NoRight => {
                let urls = scene.servers().servers.each_ref();
                let urls = urls.map(|server| server.url().replace("://", "://a:p@"));
                scene.nats_url = Some(urls.join(","));
            }
            Self::Suspended => {
                scene.clock = Some(Clock::with_monotonic());
                let leader = scene.servers().settled().await;
                let address = scene.servers().servers[leader].address;
                scene.proxy = Some(Proxy::to(address).await);
            }
            _ => {}
        }
    }

    /// Injects the fault and ends it. Then all servers and replicas run, and the replica under test
    /// is ready.
    pub(crate) async fn inject(self, scene: &mut Scene) {
        match self {
            Self::LeaderKilled => {
                let leader = scene.servers().settled().await;
                scene.servers().kill(leader);
                scene.load.progress(&[B, C], 10).await;
                scene.servers().restart(leader).await;
            }
            Self::LeaderFrozen => {
                let leader = scene.servers().settled().await;
                scene.servers().freeze(leader);
                scene.load.progress(&[B, C], 10).await;
                scene.servers().thaw(leader);
            }
            Self::FollowerIsolated => {
                let leader = scene.servers().settled().await;
                let follower = scene.servers().other_than(&[leader]);
                isolated(scene, follower).await;
            }
            Self::LeaderIsolated => {
                let leader = scene.servers().settled().await;
                isolated(scene, leader).await;
            }
            Self::Restarted => {
                for index in 0..SERVERS {
                    scene.servers().end(index).await;
                    scene.servers().restart(index).await;
                    scene.servers().settled().await;
                    scene.load.progress(&[B, C], 5).await;
                }
            }
            Self::QuorumLost => {
                scene.servers().kill(0);
                scene.servers().kill(1);
                for index in [B, C] {
                    not_writable(scene, index).await;
                }
                scene.servers().restart(0).await;
                scene.servers().restart(1).await;
            }
            Self::DiskFull => full(scene).await,
            Self::UnreadableHeader => unreadable_headers(scene).await,
            Self::NoRight => no_right(scene).await,
            Self::Suspended => suspended(scene).await,
            Self::ForgedVotes => forged_votes(scene).await,
            Self::StoreFull => store_full(scene).await,
        }
        scene.servers().settled().await;
        scene.go_on().await;
    }
}

/// Cuts the routes of a server until the others have stored many batches.
async fn isolated(scene: &mut Scene, index: usize) {
    let cluster = scene.servers();
    cluster.isolate(index);
    let leader = cluster.leader().await;
    let client = cluster.client_of(leader);
    for _ in 0..BEYOND {
        eventually("a batch stored without the isolated server", async || {
            let sent = client.publish(SUBJECT, "[]".into()).await.ok()?;
            sent.await.ok()
        })
        .await;
        tokio::time::sleep(BETWEEN).await;
    }
    cluster.heal(index);
}

async fn full(scene: &mut Scene) {
    let mut ballast = vec![b' '; BALLAST_BYTES];
    (ballast[0], ballast[1]) = (b'[', b']');
    let ballast = Bytes::from(ballast);
    let client = scene.client().await;
    eventually("no storage left", async || {
        let sent = client.publish(SUBJECT, ballast.clone()).await.ok()?;
        sent.await.err()
    })
    .await;
    for index in [B, C] {
        not_writable(scene, index).await;
    }
    for index in 0..SERVERS {
        scene.servers().servers[index].configure(LARGER_STORE);
        scene.servers().kill(index);
        scene.servers().restart(index).await;
    }
}

/// Publishes a message byte for byte; returns once the server has read it.
async fn publish_raw(server: SocketAddr, headers: &[u8], payload: &[u8]) {
    let stream = TcpStream::connect(server).await.unwrap();
    let (from, mut to) = stream.into_split();
    let mut said = BufReader::new(from).lines();
    let (head, all) = (headers.len(), headers.len() + payload.len());
    let mut bytes = b"CONNECT {\"verbose\":false,\"headers\":true}\r\n".to_vec();
    bytes.extend(format!("HPUB {SUBJECT} {head} {all}\r\n").as_bytes());
    bytes.extend([headers, payload, b"\r\nPING\r\n"].concat());
    to.write_all(&bytes).await.unwrap();
    while let Some(line) = in_time("PONG", said.next_line()).await.unwrap() {
        assert!(!line.starts_with("-ERR"), "{line}");
        if line == "PONG" {
            return;
        }
    }
    panic!("the server hung up");
}

async fn unreadable_headers(scene: &mut Scene) {
    let headers: [&[u8]; 3] = [
        b"NATS/1.0\r\nTrace Id: 1\r\n\r\n",
        b"NATS/1.0\r\nbad header line\r\n\r\n",
        b"NATS/1.0\r\nTrace: \xe9\r\n\r\n",
    ];
    let address = scene.servers().servers[0].address;
    for headers in headers {
        publish_raw(address, headers, b"[]").await;
        scene.load.progress(&[B, C], 10).await;
    }
    let poisoned = "gradestore_log_poisoned_total";
    let skipped = scene.node(B).metric(poisoned).await;
    assert!(skipped >= Some(1.0), "{skipped:?}");
    assert_eq!(scene.node(C).metric(poisoned).await, skipped);
}

async fn no_right(scene: &mut Scene) {
    for index in 0..SERVERS {
        scene.servers().servers[index].reload(NO_RIGHT).await;
    }
    if scene.stage == Stage::Steady {
        not_writable(scene, A).await;
        let detail = eventually("the broker's reason", async || {
            let answer = scene.node(A).set(r#"{"user_id":"user 1"}"#).await;
            Some(answer.body).filter(|body| body.contains("Permissions Violation"))
        });
        let detail = detail.await;
        assert!(detail.contains(SUBJECT), "{detail}");
    }
    // The others are not affected.
    scene.load.progress(&[B, C], 10).await;
    for index in 0..SERVERS {
        scene.servers().servers[index].reload(ALL_RIGHTS).await;
    }
}

/// The replica sends a batch, gets no acknowledgement, and is suspended until the broker has
/// forgotten the batch's id. Others set the same fields meanwhile.
async fn suspended(scene: &mut Scene) {
    let silent = Rules {
        lose_acks: true,
        lose_batches: true,
        ..Rules::default()
    };
    scene.connection(silent);
    if scene.stage == Stage::Steady {
        let node = scene.node(A);
        eventually("a write that waits", async || {
            scene.load.all_wait(A).then_some(())
        })
        .await;
        // By the time that a later request is answered, the batch has been sent.
        node.ops("/status").await;
    }
    scene.node(A).signal(Signal::STOP);
    let begun = std::time::Instant::now();
    let client = scene.client().await;
    let stored_again = async || {
        let mut headers = async_nats::HeaderMap::new();
        headers.insert("Nats-Msg-Id", "since the suspension");
        let sent = client.publish_with_headers(SUBJECT, headers, "[]".into());
        !sent.await.unwrap().await.unwrap().duplicate
    };
    assert!(stored_again().await);
    while !stored_again().await {
        scene.load.progress(&[B, C], 1).await;
    }
    // As if its clocks had been suspended, too.
    let seconds = begun.elapsed().as_secs();
    scene
        .clock
        .as_ref()
        .expect("a clock")
        .shift(-i64::try_from(seconds).unwrap());
    scene.connection(Rules::default());
    scene.proxy().cut();
    scene.node(A).signal(Signal::CONT);
}

/// Publishes copies of real checkpoints in which every id, digest and code is replaced.
async fn forged_votes(scene: &mut Scene) {
    scene.load.progress(&[B, C], 10).await;
    let client = scene.client().await;
    let address = scene.servers().servers[0].address;
    let checkpoint = async |client: &async_nats::jetstream::Context| {
        eventually("a checkpoint", async || {
            let stream = client.get_stream(STREAM).await.ok()?;
            let last = stream.cached_info().state.last_sequence;
            for position in (last.saturating_sub(50).max(SEED + 1)..=last).rev() {
                let message = message_at(client, position).await;
                let headers = BASE64.decode(message["hdrs"].as_str().unwrap_or_default());
                let headers = String::from_utf8(headers.unwrap()).unwrap();
                if headers.contains("Grade-Checkpoint") {
                    return Some(headers);
                }
            }
            None
        })
        .await
    };
    let forging = async {
        for _ in 0..10 {
            let headers = checkpoint(&client).await;
            for _ in 0..4 {
                let forged = forged(&headers);
                publish_raw(address, forged.as_bytes(), b"[]").await;
            }
            scene.load.progress(&[B, C], 5).await;
        }
    };
    let unready = async {
        loop {
            for index in [B, C] {
                let answer = scene.node(index).ops("/readyz").await;
                if answer.status != 200 {
                    return answer.body;
                }
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::select! {
        () = forging => {}
        why = unready => panic!("forged votes made a replica unready: {why}"),
    }
}

/// The header block with every id, digest and code replaced: runs of 32 or more hexadecimal digits.
fn forged(headers: &str) -> String {
    let (mut forged, mut run) = (String::new(), String::new());
    for digit in headers.chars().chain(['\0']) {
        if digit.is_ascii_hexdigit() {
            run.push(digit);
            continue;
        }
        let random = run.len() >= 32;
        for old in run.drain(..) {
            let new = getrandom::u32().unwrap() % 16;
            forged.push(if random {
                char::from_digit(new, 16).unwrap()
            } else {
                old
            });
        }
        forged.push(digit);
    }
    forged.pop();
    forged
}

/// One replica is full. It and its peers reject new users and accept updates.
async fn store_full(scene: &mut Scene) {
    let mut refused = None;
    for request in 0..REQUESTS_MAX {
        let padding = "x".repeat(200);
        let line = |user: usize| {
            let number = request * NEW_USERS + user;
            format!("{{\"user_id\":\"new {number} {padding}\",\"spp\":{number}}}\n")
        };
        let lines: String = (0..NEW_USERS).map(line).collect();
        let node = scene.node(B);
        let sent = node.client.post(format!("http://{}/set", node.write));
        let sent = sent
            .header("authorization", AUTHORIZATION)
            .header("content-type", "application/x-ndjson")
            .body(lines);
        let answer = in_time("lines", sent.send()).await.unwrap();
        let answer = Answer::of(answer).await;
        if answer.status == 507 {
            refused = Some(answer);
            break;
        }
        assert_eq!(answer.status, 200, "{answer:?}");
    }
    let refused = refused.expect("no request was refused");
    refused.problem(507, "store-full");
    let mut number = 0;
    eventually("another replica that refuses new users", async || {
        number += 1;
        let user = format!(r#"{{"user_id":"one more {number}","spp":1}}"#);
        let answer = scene.node(C).set(user).await;
        (answer.status == 507).then_some(())
    })
    .await;
    scene.load.progress(&[B, C], 10).await;
    for index in [B, C] {
        status_where(scene.node(index), "ready", |status| {
            status["state"] == "ready"
        })
        .await;
    }
}
