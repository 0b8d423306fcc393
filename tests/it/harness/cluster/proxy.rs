//! A proxy between a replica and NATS that can fail in many ways. It parses the protocol, so that
//! it can delay or drop batches or acknowledgements only.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

/// What the proxy does to the traffic; nothing if all are `false`.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rules {
    /// Drops everything to the broker.
    pub(crate) drop_requests: bool,
    /// Drops everything from the broker.
    pub(crate) drop_replies: bool,
    /// Holds batches from the broker until this is unset; other messages pass.
    pub(crate) hold_batches: bool,
    /// Drops batches from the broker.
    pub(crate) drop_batches: bool,
    /// Drops the broker's publish acknowledgements.
    pub(crate) drop_acks: bool,
    /// Drops messages published to the stream's subject, as if the stream had no leader and another
    /// client subscribed to the subject.
    pub(crate) drop_publishes: bool,
    /// Adds latency and limits the throughput, both ways.
    pub(crate) slow: bool,
}

impl Rules {
    /// Nothing passes, and connections stay open.
    pub(crate) const BLACKHOLE: Self = Self {
        drop_requests: true,
        drop_replies: true,
        hold_batches: false,
        drop_batches: false,
        drop_acks: false,
        drop_publishes: false,
        slow: false,
    };
}

/// Bytes and time of one step of a slow connection.
const SLOW_BYTES: usize = 64 * 1024;
const SLOW_DELAY: Duration = Duration::from_millis(100);

/// The proxy. Stops when dropped.
pub(crate) struct Proxy {
    pub(crate) address: SocketAddr,
    rules: watch::Sender<Rules>,
    cut: watch::Sender<u64>,
    dropped_publishes: Arc<AtomicUsize>,
    _tasks: JoinSet<()>,
}

impl Proxy {
    pub(crate) async fn to(broker: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (rules, cut) = (watch::Sender::default(), watch::Sender::new(0));
        let dropped_publishes = Arc::default();
        let mut tasks = JoinSet::new();
        tasks.spawn(accept(
            listener,
            broker,
            rules.clone(),
            cut.clone(),
            Arc::clone(&dropped_publishes),
        ));
        Self {
            address,
            rules,
            cut,
            dropped_publishes,
            _tasks: tasks,
        }
    }

    /// The number of dropped publishes.
    pub(crate) fn dropped_publishes(&self) -> usize {
        self.dropped_publishes.load(Ordering::Relaxed)
    }

    /// Applies to existing connections too.
    pub(crate) fn set(&self, rules: Rules) {
        self.rules.send_replace(rules);
    }

    /// Closes all connections.
    pub(crate) fn cut(&self) {
        self.cut.send_modify(|count| *count += 1);
    }
}

async fn accept(
    listener: TcpListener,
    broker: SocketAddr,
    rules: watch::Sender<Rules>,
    cut: watch::Sender<u64>,
    dropped_publishes: Arc<AtomicUsize>,
) {
    let mut connections = JoinSet::new();
    loop {
        let (client, _) = listener.accept().await.unwrap();
        let (rules, mut cut) = (rules.clone(), cut.subscribe());
        let dropped_publishes = Arc::clone(&dropped_publishes);
        connections.spawn(async move {
            // Without the broker the proxy closes the connection.
            let Ok(server) = TcpStream::connect(broker).await else {
                return;
            };
            let (from_client, to_client) = client.into_split();
            let (from_server, to_server) = server.into_split();
            let (frames, received) = mpsc::channel(1024);
            tokio::select! {
                () = to_broker(from_client, to_server, rules.subscribe(), &dropped_publishes) => {}
                () = read_frames(from_server, frames) => {}
                () = from_broker(received, to_client, rules.subscribe()) => {}
                _ = cut.changed() => {}
            }
        });
        while connections.try_join_next().is_some() {}
    }
}

async fn to_broker(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    rules: watch::Receiver<Rules>,
    dropped_publishes: &AtomicUsize,
) {
    let publish = b"HPUB grades.set ";
    let mut bytes = vec![0; SLOW_BYTES];
    while let Ok(read @ 1..) = from.read(&mut bytes).await {
        let now = *rules.borrow();
        if now.drop_publishes && bytes[..read].windows(publish.len()).any(|at| at == publish) {
            dropped_publishes.fetch_add(1, Ordering::Relaxed);
            continue;
        }
        if now.slow {
            tokio::time::sleep(SLOW_DELAY).await;
        }
        if !now.drop_requests && to.write_all(&bytes[..read]).await.is_err() {
            return;
        }
    }
}

enum Frame {
    Batch(Vec<u8>),
    Ack(Vec<u8>),
    Other(Vec<u8>),
}

async fn read_frames(from: OwnedReadHalf, frames: mpsc::Sender<Frame>) {
    let mut from = BufReader::new(from);
    loop {
        let mut bytes = Vec::new();
        if !matches!(from.read_until(b'\n', &mut bytes).await, Ok(1..)) {
            return;
        }
        let line = String::from_utf8_lossy(&bytes).into_owned();
        let words: Vec<&str> = line.split_whitespace().collect();
        let mut frame: fn(Vec<u8>) -> Frame = Frame::Other;
        if let ["MSG" | "HMSG", .., length] = words[..] {
            let head = bytes.len();
            bytes.resize(head + length.parse::<usize>().unwrap() + 2, 0);
            if from.read_exact(&mut bytes[head..]).await.is_err() {
                return;
            }
            if words.iter().any(|word| word.starts_with("$JS.ACK.")) {
                frame = Frame::Batch;
            } else if bytes[head..].starts_with(br#"{"stream":"GRADES","#) {
                frame = Frame::Ack;
            }
        }
        if frames.send(frame(bytes)).await.is_err() {
            return;
        }
    }
}

async fn from_broker(
    mut frames: mpsc::Receiver<Frame>,
    mut to: OwnedWriteHalf,
    mut rules: watch::Receiver<Rules>,
) {
    let mut held = Vec::new();
    let mut slow_left = SLOW_BYTES;
    loop {
        let frame = tokio::select! {
            frame = frames.recv() => frame,
            changed = rules.changed() => {
                changed.unwrap();
                let now = *rules.borrow();
                if !now.hold_batches {
                    let released = std::mem::take(&mut held);
                    if !now.drop_replies && to.write_all(&released).await.is_err() {
                        return;
                    }
                }
                continue;
            }
        };
        let now = *rules.borrow();
        let pass = match frame {
            None => return,
            _ if now.drop_replies => continue,
            Some(Frame::Batch(_)) if now.drop_batches => continue,
            Some(Frame::Ack(_)) if now.drop_acks => continue,
            Some(Frame::Batch(bytes)) if now.hold_batches => {
                held.extend(bytes);
                continue;
            }
            Some(Frame::Batch(bytes) | Frame::Ack(bytes) | Frame::Other(bytes)) => bytes,
        };
        if now.slow && (frames.is_empty() || slow_left < pass.len()) {
            tokio::time::sleep(SLOW_DELAY).await;
            slow_left = SLOW_BYTES;
        }
        slow_left = slow_left.saturating_sub(pass.len());
        if to.write_all(&pass).await.is_err() {
            return;
        }
    }
}
