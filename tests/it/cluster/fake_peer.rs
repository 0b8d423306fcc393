//! A peer that claims a higher position than all others and then misbehaves.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use gradestore::backup::{FORMAT, HeadRecord, Summary};
use gradestore::grade::{Changes, FIELD_COUNT, Patch, Write};
use gradestore::log::Position;
use gradestore::store::Store;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use crate::harness::backup_files::{
    backup_file_ending_at, backup_file_with_head, gzip, read_backup,
};
use crate::harness::{AUTHORIZATION, ReservedPort};

/// A valid backup, from which faulty ones are made.
pub(crate) struct ValidBackup {
    file: Vec<u8>,
    store: Store,
    head: HeadRecord,
}

impl ValidBackup {
    pub(crate) fn new(file: Vec<u8>) -> Self {
        let (store, Summary { records, .. }) = read_backup(&file);
        let (head, _) = records.unwrap();
        assert_eq!(head.format, FORMAT);
        Self { file, store, head }
    }

    /// The same backup with another head.
    fn with_head(&self, change: impl FnOnce(&mut HeadRecord)) -> PeerBehavior {
        let mut head = self.head.clone();
        change(&mut head);
        complete(&backup_file_with_head(&self.store, &head))
    }

    /// The same backup, ending with one more batch that the log then lost. That batch created the
    /// user `lost`.
    pub(crate) fn with_a_lost_batch(self) -> PeerBehavior {
        self.store.apply_all(&[Write::Set(Patch {
            user_id: "lost".to_owned(),
            changes: Changes::all([1; FIELD_COUNT]),
        })]);
        let end = Position {
            seq: self.head.position + 1,
            ..self.head.position()
        };
        complete(&backup_file_ending_at(&self.store, &self.head, &end))
    }
}

/// What a peer does with a request for its backup.
pub(crate) enum PeerBehavior {
    /// Refuses connections.
    Refuse,
    /// Sends these bytes and closes the connection.
    Send(Vec<u8>),
    /// Sends these bytes and then nothing.
    Stall(Vec<u8>),
    /// Sends these bytes, and then one every second.
    Drip(Vec<u8>),
}

/// A name, what the peer does, and a part of the replica's error.
pub(crate) type Fault = (&'static str, fn(&ValidBackup) -> PeerBehavior, &'static str);

/// Faults that are detected immediately.
#[rustfmt::skip]
pub(crate) const FAULTS: [Fault; 21] = [
    ("connection refused", |_| PeerBehavior::Refuse, "onnection refused"),
    ("hangs up", |_| PeerBehavior::Send(Vec::new()), "connection closed before message completed"),
    ("no HTTP", |_| PeerBehavior::Send(b"220 ready\r\n".to_vec()), "invalid HTTP"),
    ("another password", |_| error("401 Unauthorized", ""), "answered 401: why"),
    ("no such route", |_| error("404 Not Found", ""), "answered 404: why"),
    ("not ready", |_| error("503 Service Unavailable", ""), "answered 503: why"),
    ("elsewhere", |_| error("302 Found", "location: http://127.0.0.1:1/\r\n"), "answered 302: why"),
    ("HTML", |_| complete(b"<html>sign in</html>"), "not a gzip file"),
    ("nothing", |_| complete(b""), "truncated at byte 0"),
    ("foreign", |_| complete(&gzip(b"user_id,spp\na,1\n")), "it has no log position"),
    ("another log", |good| good.with_head(|head| head.log_id = "x".into()), "it belongs to another log, x"),
    ("another history", |good| good.with_head(|head| head.time_ns += 1), "the log holds a different batch"),
    ("ahead", |good| good.with_head(|head| head.position += 9), "it is at batch 113, and the log holds"),
    ("too old", |good| good.with_head(|head| head.position = 99), "batch 99, and the log holds batches 101 to 104"),
    ("countless rows", |good| good.with_head(|head| head.rows_expected = u64::MAX), "18446744073709551615 records need at least"),
    ("a newer format", |good| good.with_head(|head| head.format += 1), "use a newer gradestore"),
    ("one bit", |good| complete(&flipped(&good.file)), "fetch the backup again"),
    ("no end", |good| complete(half(&good.file)), "the end record is missing"),
    ("twice", |good| complete(&good.file.repeat(2)), "data after the end"),
    ("cut", |good| truncated(&good.file), "end of file before message length reached"),
    ("cut chunk", |good| truncated_chunk(&good.file), "end of file before message length reached"),
];

/// Faults that are detected by a timeout.
#[rustfmt::skip]
pub(crate) const SLOW_FAULTS: [Fault; 3] = [
    ("says nothing", |_| PeerBehavior::Stall(Vec::new()), "operation timed out"),
    ("stops in the middle", |good| stalled(&good.file), "operation timed out"),
    ("drips", |good| PeerBehavior::Drip(sized(good.file.len(), half(&good.file))), "it is too slow: "),
];

fn response(status: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let head = format!("HTTP/1.1 {status}\r\nconnection: close\r\n{headers}\r\n");
    [head.as_bytes(), body].concat()
}

fn error(status: &str, headers: &str) -> PeerBehavior {
    let headers = format!("{headers}content-length: 3\r\n");
    PeerBehavior::Send(response(status, &headers, b"why"))
}

fn sized(length: usize, body: &[u8]) -> Vec<u8> {
    response("200 OK", &format!("content-length: {length}\r\n"), body)
}

fn complete(body: &[u8]) -> PeerBehavior {
    PeerBehavior::Send(sized(body.len(), body))
}

fn half(file: &[u8]) -> &[u8] {
    &file[..file.len() / 2]
}

fn truncated(file: &[u8]) -> PeerBehavior {
    PeerBehavior::Send(sized(file.len(), half(file)))
}

fn stalled(file: &[u8]) -> PeerBehavior {
    PeerBehavior::Stall(sized(file.len(), half(file)))
}

fn truncated_chunk(file: &[u8]) -> PeerBehavior {
    let chunk = format!("{:x}\r\n", file.len());
    let body = [chunk.as_bytes(), half(file)].concat();
    PeerBehavior::Send(response("200 OK", "transfer-encoding: chunked\r\n", &body))
}

fn flipped(file: &[u8]) -> Vec<u8> {
    let mut file = file.to_vec();
    let middle = file.len() / 2;
    file[middle] ^= 1;
    file
}

/// The peer. Stops when dropped.
pub(crate) struct FakePeer {
    pub(crate) url: String,
    backup_requests: Arc<AtomicUsize>,
    _port: ReservedPort,
    _serving: JoinSet<()>,
}

impl FakePeer {
    pub(crate) async fn start(act: PeerBehavior) -> Self {
        let port = ReservedPort::new();
        let url = format!("http://{}", port.address());
        let backup_requests = Arc::<AtomicUsize>::default();
        let (act, mut serving) = (Arc::new(act), JoinSet::new());
        if !matches!(*act, PeerBehavior::Refuse) {
            let listener = TcpListener::bind(port.address()).await.unwrap();
            serving.spawn(serve(listener, act, Arc::clone(&backup_requests)));
        }
        Self {
            url,
            backup_requests,
            _port: port,
            _serving: serving,
        }
    }

    /// The number of requests for its backup.
    pub(crate) fn backup_requests(&self) -> usize {
        self.backup_requests.load(Ordering::Relaxed)
    }
}

async fn serve(listener: TcpListener, act: Arc<PeerBehavior>, backup_requests: Arc<AtomicUsize>) {
    let mut connections = JoinSet::new();
    loop {
        let (connection, _) = listener.accept().await.unwrap();
        connections.spawn(respond(
            connection,
            Arc::clone(&act),
            Arc::clone(&backup_requests),
        ));
        while connections.try_join_next().is_some() {}
    }
}

async fn respond(connection: TcpStream, act: Arc<PeerBehavior>, backup_requests: Arc<AtomicUsize>) {
    let mut connection = BufReader::new(connection);
    let mut request = String::new();
    while !request.ends_with("\r\n\r\n") {
        if !matches!(connection.read_line(&mut request).await, Ok(1..)) {
            return;
        }
    }
    assert!(request.contains(AUTHORIZATION), "{request}");
    let far = "grade-position: 18446744073709551615\r\ncontent-length: 0\r\n";
    let offer = response("200 OK", far, b"");
    let bytes = match (request.starts_with("HEAD "), &*act) {
        (true, _) => &offer,
        (false, PeerBehavior::Refuse) => return,
        (
            false,
            PeerBehavior::Stall(bytes) | PeerBehavior::Send(bytes) | PeerBehavior::Drip(bytes),
        ) => bytes,
    };
    if !request.starts_with("HEAD ") {
        backup_requests.fetch_add(1, Ordering::Relaxed);
    }
    // The replica may have closed the connection.
    let _ = connection.write_all(bytes).await;
    match (request.starts_with("GET "), &*act) {
        // Until the replica closes the connection.
        (true, PeerBehavior::Stall(_)) => drop(connection.read(&mut [0]).await),
        (true, PeerBehavior::Drip(_)) => drip(connection).await,
        _ => {}
    }
}

/// Sends a byte every second until the replica closes the connection.
async fn drip(mut connection: BufReader<TcpStream>) {
    let mut pace = tokio::time::interval(Duration::from_secs(1));
    while connection.write_all(b"x").await.is_ok() {
        pace.tick().await;
    }
}
