//! Faults with three servers: of the servers, of their routes and of other publishers.

use std::net::SocketAddr;
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD as BASE64;
use bytes::Bytes;
use rustix::process::Signal;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

use crate::clock::Clock;
use crate::fault::wait_until_not_writable;
use crate::harness::AUTHORIZATION;
use crate::harness::cluster::broker::{STREAM, SUBJECT};
use crate::harness::cluster::nats::{Gossip, SERVERS};
use crate::harness::cluster::proxy::{Proxy, Rules};
use crate::harness::cluster::seeded::{SEED_POSITION, message_at};
use crate::harness::wire::{Response, eventually, with_timeout};
use crate::scene::{A, B, C, Scene};
use crate::stage::Stage;

/// A fault with three servers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ServerFault {
    /// kill -9 of the leader of the stream.
    LeaderKilled,
    /// SIGSTOP to the leader, and SIGCONT later.
    LeaderFrozen,
    /// The routes of a follower are cut; its clients still reach it.
    FollowerIsolated,
    /// The routes of the leader are cut; its clients still reach it.
    LeaderIsolated,
    /// Each server is stopped and restarted, one after the other.
    Restarted,
    /// Two of three servers are killed.
    QuorumLost,
    /// The servers have no storage left.
    DiskFull,
    /// Another publisher sends messages whose header block cannot be parsed.
    UnreadableHeader,
    /// The replica under test loses the permission to publish batches.
    NoPermission,
    /// The replica under test is suspended for longer than the broker remembers message ids. Its
    /// clocks stop meanwhile.
    Suspended,
    /// Another publisher sends checkpoints with invented replica ids and digests.
    ForgedVotes,
    /// A replica has reached its memory limit.
    StoreFull,
}

/// The storage limit of a server, and the one with which it is restarted.
const SMALL_STORE: &str = "jetstream { max_file_store: 8MB }\n";
const LARGER_STORE: &str = "jetstream { max_file_store: 200MB }\n";
/// Both users have all permissions. Clients without credentials are the user `all`; the replica
/// under test is `a`.
const ALL_PERMISSIONS: &str = "\
    authorization { users: [{ user: all, password: p }, { user: a, password: p }] }\n\
    no_auth_user: all\n";
/// `a` may not publish batches.
const PUBLISH_DENIED: &str = "\
    authorization { users: [{ user: all, password: p }, { user: a, password: p, \
    permissions: { publish: { deny: [\"grades.set\"] } } }] }\n\
    no_auth_user: all\n";
const BALLAST_BYTES: usize = 500_000;
/// The number of empty batches that are published while a server is isolated.
const MISSED_BATCHES: usize = 100;
/// The pause between two of them.
const PUBLISH_PAUSE: Duration = Duration::from_millis(50);
/// More than a debug build uses with the rows of a cell.
const MEMORY_MAX: &str = "160MiB";
/// The number of new users per request, and the maximum number of requests.
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
        Self::NoPermission,
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
            Self::NoPermission => "no-right-to-publish",
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
            Self::DiskFull => SMALL_STORE,
            Self::NoPermission => ALL_PERMISSIONS,
            _ => "",
        }
    }

    /// A suspended replica must reach the servers only through the proxy.
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

    /// Prepares what the fault needs before the replica under test starts.
    pub(crate) async fn prepare(self, scene: &mut Scene) {
        match self {
            Self::NoPermission => {
                let urls = scene.servers().servers.each_ref();
                let urls = urls.map(|server| server.url().replace("://", "://a:p@"));
                scene.nats_url = Some(urls.join(","));
            }
            Self::Suspended => {
                scene.clock = Some(Clock::with_monotonic());
                let leader = scene.servers().leader_with_current_followers().await;
                let address = scene.servers().servers[leader].address;
                scene.proxy = Some(Proxy::to(address).await);
            }
            _ => {}
        }
    }

    /// Injects the fault and repairs it. Afterwards all servers and replicas run, and the replica
    /// under test is ready.
    pub(crate) async fn inject(self, scene: &mut Scene) {
        match self {
            Self::LeaderKilled => {
                let leader = scene.servers().leader_with_current_followers().await;
                scene.servers().kill(leader);
                scene.load.progress(&[B, C], 10).await;
                scene.servers().restart(leader).await;
            }
            Self::LeaderFrozen => {
                let leader = scene.servers().leader_with_current_followers().await;
                scene.servers().freeze(leader);
                scene.load.progress(&[B, C], 10).await;
                scene.servers().thaw(leader);
            }
            Self::FollowerIsolated => {
                let leader = scene.servers().leader_with_current_followers().await;
                let follower = scene.servers().other_than(&[leader]);
                isolate(scene, follower).await;
            }
            Self::LeaderIsolated => {
                let leader = scene.servers().leader_with_current_followers().await;
                isolate(scene, leader).await;
            }
            Self::Restarted => {
                for index in 0..SERVERS {
                    scene.servers().end(index).await;
                    scene.servers().restart(index).await;
                    scene.servers().leader_with_current_followers().await;
                    scene.load.progress(&[B, C], 5).await;
                }
            }
            Self::QuorumLost => {
                scene.servers().kill(0);
                scene.servers().kill(1);
                for index in [B, C] {
                    wait_until_not_writable(scene, index).await;
                }
                scene.servers().restart(0).await;
                scene.servers().restart(1).await;
            }
            Self::DiskFull => servers_full(scene).await,
            Self::UnreadableHeader => unreadable_headers(scene).await,
            Self::NoPermission => publish_denied(scene).await,
            Self::Suspended => suspended(scene).await,
            Self::ForgedVotes => forged_votes(scene).await,
            Self::StoreFull => store_full(scene).await,
        }
        scene.servers().leader_with_current_followers().await;
        scene.resume().await;
    }
}

/// Cuts the routes of a server until the others have stored batches that it has not.
async fn isolate(scene: &mut Scene, index: usize) {
    let cluster = scene.servers();
    cluster.isolate(index);
    let leader = cluster.leader().await;
    let client = cluster.client_of(leader);
    for _ in 0..MISSED_BATCHES {
        eventually("a batch stored without the isolated server", async || {
            let sent = client.publish(SUBJECT, "[]".into()).await.ok()?;
            sent.await.ok()
        })
        .await;
        tokio::time::sleep(PUBLISH_PAUSE).await;
    }
    cluster.heal(index);
}

async fn servers_full(scene: &mut Scene) {
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
        wait_until_not_writable(scene, index).await;
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
    let (reader, mut writer) = stream.into_split();
    let mut lines = BufReader::new(reader).lines();
    let (head, all) = (headers.len(), headers.len() + payload.len());
    let mut bytes = b"CONNECT {\"verbose\":false,\"headers\":true}\r\n".to_vec();
    bytes.extend(format!("HPUB {SUBJECT} {head} {all}\r\n").as_bytes());
    bytes.extend([headers, payload, b"\r\nPING\r\n"].concat());
    writer.write_all(&bytes).await.unwrap();
    while let Some(line) = with_timeout("PONG", lines.next_line()).await.unwrap() {
        assert!(!line.starts_with("-ERR"), "{line}");
        if line == "PONG" {
            return;
        }
    }
    panic!("the server closed the connection");
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

async fn publish_denied(scene: &mut Scene) {
    for index in 0..SERVERS {
        scene.servers().servers[index].reload(PUBLISH_DENIED).await;
    }
    if scene.stage == Stage::Steady {
        wait_until_not_writable(scene, A).await;
        let detail = eventually("the broker's reason", async || {
            let response = scene.node(A).set(r#"{"user_id":"user 1"}"#).await;
            Some(response.body).filter(|body| body.contains("Permissions Violation"))
        });
        let detail = detail.await;
        assert!(detail.contains(SUBJECT), "{detail}");
    }
    // The others are not affected.
    scene.load.progress(&[B, C], 10).await;
    for index in 0..SERVERS {
        scene.servers().servers[index].reload(ALL_PERMISSIONS).await;
    }
}

/// The replica sends a batch, gets no acknowledgement, and is suspended until the broker has
/// forgotten the batch's id. The others write meanwhile.
async fn suspended(scene: &mut Scene) {
    let silent = Rules {
        drop_acks: true,
        drop_batches: true,
        ..Rules::default()
    };
    scene.set_link(silent);
    if scene.stage == Stage::Steady {
        let node = scene.node(A);
        eventually("a write in flight", async || {
            scene.load.all_in_flight(A).then_some(())
        })
        .await;
        // Once the replica has responded to a later request, it has sent the batch.
        node.ops("/status").await;
    }
    scene.node(A).signal(Signal::STOP);
    let started_at = std::time::Instant::now();
    let client = scene.client().await;
    let is_stored = async || {
        let mut headers = async_nats::HeaderMap::new();
        headers.insert("Nats-Msg-Id", "since the suspension");
        let sent = client.publish_with_headers(SUBJECT, headers, "[]".into());
        !sent.await.unwrap().await.unwrap().duplicate
    };
    assert!(is_stored().await);
    while !is_stored().await {
        scene.load.progress(&[B, C], 1).await;
    }
    // Set its clocks back, as if they had stopped during the suspension.
    let seconds = started_at.elapsed().as_secs();
    scene
        .clock
        .as_ref()
        .expect("a clock")
        .shift(-i64::try_from(seconds).unwrap());
    scene.set_link(Rules::default());
    scene.proxy().cut();
    scene.node(A).signal(Signal::CONT);
}

/// Publishes copies of the replicas' checkpoints with all ids, digests and codes replaced.
async fn forged_votes(scene: &mut Scene) {
    scene.load.progress(&[B, C], 10).await;
    let client = scene.client().await;
    let address = scene.servers().servers[0].address;
    let checkpoint = async |client: &async_nats::jetstream::Context| {
        eventually("a checkpoint", async || {
            let stream = client.get_stream(STREAM).await.ok()?;
            let last = stream.cached_info().state.last_sequence;
            for position in (last.saturating_sub(50).max(SEED_POSITION + 1)..=last).rev() {
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
                let response = scene.node(index).ops("/readyz").await;
                if response.status != 200 {
                    return response.body;
                }
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::select! {
        () = forging => {}
        reason = unready => panic!("forged votes made a replica unready: {reason}"),
    }
}

/// Replaces everything in a header block that may be an id, a digest or a code: runs of 32 or more
/// hexadecimal digits.
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

/// One replica reaches its memory limit. It rejects new users, and so do the replicas that learn of
/// it. All accept updates.
async fn store_full(scene: &mut Scene) {
    let mut rejected = None;
    for request in 0..REQUESTS_MAX {
        let padding = "x".repeat(200);
        let line = |user: usize| {
            let number = request * NEW_USERS + user;
            format!("{{\"user_id\":\"new {number} {padding}\",\"spp\":{number}}}\n")
        };
        let lines: String = (0..NEW_USERS).map(line).collect();
        let node = scene.node(B);
        let post = node.client.post(format!("http://{}/set", node.write));
        let post = post
            .header("authorization", AUTHORIZATION)
            .header("content-type", "application/x-ndjson")
            .body(lines);
        let response = with_timeout("lines", post.send()).await.unwrap();
        let response = Response::of(response).await;
        if response.status == 507 {
            rejected = Some(response);
            break;
        }
        assert_eq!(response.status, 200, "{response:?}");
    }
    let rejected = rejected.expect("no request was rejected");
    rejected.expect_problem(507, "store-full");
    let mut number = 0;
    eventually("another replica that rejects new users", async || {
        number += 1;
        let user = format!(r#"{{"user_id":"one more {number}","spp":1}}"#);
        let response = scene.node(C).set(user).await;
        (response.status == 507).then_some(())
    })
    .await;
    scene.load.progress(&[B, C], 10).await;
    for index in [B, C] {
        scene
            .node(index)
            .status_where("ready", |status| status["state"] == "ready")
            .await;
    }
}
