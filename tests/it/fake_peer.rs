//! A peer that says that it is further than all others, and then does something wrong.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use gradestore::backup::{FORMAT, Head, Summary};
use gradestore::grade::{Changes, FIELD_COUNT, Patch};
use gradestore::log::Position;
use gradestore::store::Store;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use crate::damaged::gzip;
use crate::disk::{file_until, file_with, restored};
use crate::harness::AUTHORIZATION;

/// A good backup to do wrong with.
pub(crate) struct Good {
    file: Vec<u8>,
    store: Store,
    head: Head,
}

impl Good {
    pub(crate) fn new(file: Vec<u8>) -> Self {
        let (store, Summary { records, .. }) = restored(&file);
        let (head, _) = records.unwrap();
        assert_eq!(head.format, FORMAT);
        Self { file, store, head }
    }

    /// The same that says something else of itself.
    fn but(&self, change: impl FnOnce(&mut Head)) -> Act {
        let mut head = self.head.clone();
        change(&mut head);
        whole(&file_with(&self.store, &head))
    }

    /// The same, but while it was made one more batch was applied, which the log then lost: it
    /// created the user `lost`.
    pub(crate) fn with_a_lost_batch(self) -> Act {
        self.store.apply(&Patch {
            user_id: "lost".to_owned(),
            changes: Changes::all([1; FIELD_COUNT]),
        });
        let end = Position {
            seq: self.head.position + 1,
            ..self.head.position()
        };
        whole(&file_until(&self.store, &self.head, &end))
    }
}

/// What a peer does when it is asked for its backup.
pub(crate) enum Act {
    /// Nobody listens, from the start.
    Refuse,
    /// Sends these bytes and hangs up.
    Send(Vec<u8>),
    /// Sends these bytes, and nothing more.
    Stall(Vec<u8>),
}

/// A name, what the peer does, what the replica says of it.
pub(crate) type Fault = (&'static str, fn(&Good) -> Act, &'static str);

/// All that is noticed at once.
#[rustfmt::skip]
pub(crate) const FAULTS: [Fault; 20] = [
    ("nobody listens", |_| Act::Refuse, "onnection refused"),
    ("hangs up", |_| Act::Send(Vec::new()), "connection closed before message completed"),
    ("no HTTP", |_| Act::Send(b"220 ready\r\n".to_vec()), "invalid HTTP"),
    ("another password", |_| error("401 Unauthorized", ""), "answered 401: why"),
    ("no such route", |_| error("404 Not Found", ""), "answered 404: why"),
    ("not ready", |_| error("503 Service Unavailable", ""), "answered 503: why"),
    ("elsewhere", |_| error("302 Found", "location: http://127.0.0.1:1/\r\n"), "answered 302: why"),
    ("HTML", |_| whole(b"<html>sign in</html>"), "not a gzip file"),
    ("nothing", |_| whole(b""), "cut off at byte 0"),
    ("foreign", |_| whole(&gzip(b"user_id,spp\na,1\n")), "it has no log position"),
    ("another log", |good| good.but(|head| head.log_id = "x".into()), "it belongs to another log, x"),
    ("another history", |good| good.but(|head| head.time_ns += 1), "the log holds another batch"),
    ("ahead", |good| good.but(|head| head.position += 9), "it is at batch 113, and the log holds"),
    ("too old", |good| good.but(|head| head.position = 99), "batch 99, and the log holds batches 101 to 104"),
    ("a newer format", |good| good.but(|head| head.format += 1), "use a newer gradestore"),
    ("one bit", |good| whole(&flipped(&good.file)), "fetch the backup again"),
    ("no end", |good| whole(half(&good.file)), "the end record is missing"),
    ("twice", |good| whole(&good.file.repeat(2)), "bytes follow the end"),
    ("cut", |good| cut(&good.file), "end of file before message length reached"),
    ("cut chunk", |good| cut_chunk(&good.file), "end of file before message length reached"),
];

/// What is noticed by how long it takes only.
#[rustfmt::skip]
pub(crate) const SILENT: [Fault; 2] = [
    ("says nothing", |_| Act::Stall(Vec::new()), "operation timed out"),
    ("stops in the middle", |good| stalled(&good.file), "operation timed out"),
];

fn answer(status: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let head = format!("HTTP/1.1 {status}\r\nconnection: close\r\n{headers}\r\n");
    [head.as_bytes(), body].concat()
}

fn error(status: &str, headers: &str) -> Act {
    let headers = format!("{headers}content-length: 3\r\n");
    Act::Send(answer(status, &headers, b"why"))
}

fn sized(length: usize, body: &[u8]) -> Vec<u8> {
    answer("200 OK", &format!("content-length: {length}\r\n"), body)
}

fn whole(body: &[u8]) -> Act {
    Act::Send(sized(body.len(), body))
}

fn half(file: &[u8]) -> &[u8] {
    &file[..file.len() / 2]
}

fn cut(file: &[u8]) -> Act {
    Act::Send(sized(file.len(), half(file)))
}

fn stalled(file: &[u8]) -> Act {
    Act::Stall(sized(file.len(), half(file)))
}

fn cut_chunk(file: &[u8]) -> Act {
    let chunk = format!("{:x}\r\n", file.len());
    let body = [chunk.as_bytes(), half(file)].concat();
    Act::Send(answer("200 OK", "transfer-encoding: chunked\r\n", &body))
}

fn flipped(file: &[u8]) -> Vec<u8> {
    let mut file = file.to_vec();
    let middle = file.len() / 2;
    file[middle] ^= 1;
    file
}

/// The peer. Ends when dropped.
pub(crate) struct FakePeer {
    pub(crate) url: String,
    asked: Arc<AtomicUsize>,
    _serving: JoinSet<()>,
}

impl FakePeer {
    pub(crate) async fn start(act: Act) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let asked = Arc::<AtomicUsize>::default();
        let (act, mut serving) = (Arc::new(act), JoinSet::new());
        if !matches!(*act, Act::Refuse) {
            serving.spawn(serve(listener, act, Arc::clone(&asked)));
        }
        Self {
            url,
            asked,
            _serving: serving,
        }
    }

    /// How often it was asked for its backup.
    pub(crate) fn asked(&self) -> usize {
        self.asked.load(Ordering::Relaxed)
    }
}

async fn serve(listener: TcpListener, act: Arc<Act>, asked: Arc<AtomicUsize>) {
    let mut connections = JoinSet::new();
    loop {
        let (connection, _) = listener.accept().await.unwrap();
        connections.spawn(respond(connection, Arc::clone(&act), Arc::clone(&asked)));
        while connections.try_join_next().is_some() {}
    }
}

async fn respond(connection: TcpStream, act: Arc<Act>, asked: Arc<AtomicUsize>) {
    let mut connection = BufReader::new(connection);
    let mut request = String::new();
    while !request.ends_with("\r\n\r\n") {
        if !matches!(connection.read_line(&mut request).await, Ok(1..)) {
            return;
        }
    }
    assert!(request.contains(AUTHORIZATION), "{request}");
    let far = "grade-position: 1000000\r\ncontent-length: 0\r\n";
    let offer = answer("200 OK", far, b"");
    let (bytes, stay) = match (request.starts_with("HEAD "), &*act) {
        (true, _) => (&offer, false),
        (false, Act::Stall(bytes)) => (bytes, true),
        (false, Act::Send(bytes)) => (bytes, false),
        (false, Act::Refuse) => return,
    };
    if !request.starts_with("HEAD ") {
        asked.fetch_add(1, Ordering::Relaxed);
    }
    // Who asked may have seen enough.
    let _ = connection.write_all(bytes).await;
    if stay {
        // Until who asked has gone.
        let _ = connection.read(&mut [0]).await;
    }
}
