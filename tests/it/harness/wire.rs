//! HTTP requests and responses as bytes, and waiting with a timeout.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use http::{HeaderMap, HeaderName, HeaderValue};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};

/// The timeout of everything that a test waits for. Long, because machines may be busy and it only
/// delays failures.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(90);

/// Polls until `look` returns a value.
pub(crate) async fn eventually<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let started_at = Instant::now();
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(started_at.elapsed() < TIMEOUT, "timeout: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Waits for `task` with a timeout.
pub(crate) async fn with_timeout<T>(what: &str, task: impl Future<Output = T>) -> T {
    let ended = tokio::time::timeout(TIMEOUT, task).await;
    ended.unwrap_or_else(|_| panic!("timeout: {what}"))
}

/// A complete response.
#[derive(Debug)]
pub(crate) struct Response {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) body: String,
}

impl Response {
    /// The value of a header, or an empty string.
    pub(crate) fn header(&self, name: &str) -> &str {
        let value = self.headers.get(name);
        value.map_or("", |value| value.to_str().unwrap())
    }

    /// The position of an acknowledged write.
    #[track_caller]
    pub(crate) fn position(&self) -> u64 {
        assert_eq!(self.status, 204, "{}", self.body);
        self.header("grade-position").parse().unwrap()
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.body).unwrap()
    }

    /// Checks that this is the problem `cause` with all its required parts; returns its `detail`.
    #[track_caller]
    pub(crate) fn expect_problem(&self, status: u16, cause: &str) -> String {
        assert_eq!(self.status, status, "{cause}: {}", self.body);
        assert_eq!(self.header("content-type"), "application/problem+json");
        let problem = self.json();
        assert_eq!(problem["type"], format!("urn:gradestore:problem:{cause}"));
        assert_eq!(problem["status"], status);
        assert_ne!(problem["title"], "");
        let detail = problem["detail"].as_str().unwrap();
        assert_ne!(detail, "");
        for (needing, header) in [
            (401, "www-authenticate"),
            (405, "allow"),
            (503, "retry-after"),
        ] {
            let has = !self.header(header).is_empty();
            assert_eq!(has, status == needing, "{header} with {status}");
        }
        detail.to_owned()
    }

    pub(crate) async fn of(response: reqwest::Response) -> Self {
        Self {
            status: response.status().as_u16(),
            headers: response.headers().clone(),
            body: response.text().await.unwrap(),
        }
    }
}

/// A connection on which a test controls every byte.
pub(crate) struct RawConnection {
    incoming: Incoming,
    outgoing: OwnedWriteHalf,
}

struct Incoming {
    stream: OwnedReadHalf,
    received: Vec<u8>,
}

impl RawConnection {
    pub(crate) async fn connect(address: SocketAddr) -> Self {
        let stream = with_timeout("connect", TcpStream::connect(address)).await;
        let stream = stream.unwrap();
        // Otherwise Nagle's algorithm delays a second small write by 40 ms.
        stream.set_nodelay(true).unwrap();
        let (stream, outgoing) = stream.into_split();
        let received = Vec::new();
        Self {
            incoming: Incoming { stream, received },
            outgoing,
        }
    }

    pub(crate) async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        let sent = self.outgoing.write_all(bytes.as_ref());
        with_timeout("send", sent).await.unwrap();
    }

    /// The same, for a node that may be gone.
    pub(crate) async fn try_send(&mut self, bytes: impl AsRef<[u8]>) -> std::io::Result<()> {
        with_timeout("send", self.outgoing.write_all(bytes.as_ref())).await
    }

    /// Closes the sending side.
    pub(crate) async fn shutdown_write(&mut self) {
        self.outgoing.shutdown().await.unwrap();
    }

    /// Reads the next response.
    pub(crate) async fn response(&mut self) -> Response {
        self.try_response().await.unwrap()
    }

    /// The same; `None` if the connection ends first.
    pub(crate) async fn try_response(&mut self) -> Option<Response> {
        self.incoming.response().await
    }

    /// Sends `request` and reads the response at the same time, because the node may respond early.
    pub(crate) async fn request(&mut self, request: impl AsRef<[u8]>) -> Response {
        let sent = self.outgoing.write_all(request.as_ref());
        let (_, response) = tokio::join!(with_timeout("send", sent), self.incoming.response());
        response.unwrap()
    }

    /// Reads until the node closes the connection.
    pub(crate) async fn read_to_end(&mut self) -> Vec<u8> {
        while self.incoming.receive().await > 0 {}
        std::mem::take(&mut self.incoming.received)
    }

    /// Appends at most `bytes_max` bytes to `into`; returns 0 at the end of the connection.
    pub(crate) async fn read_some(&mut self, bytes_max: usize, into: &mut Vec<u8>) -> usize {
        into.append(&mut self.incoming.received);
        let mut buffer = vec![0; bytes_max];
        let read = with_timeout("more bytes", self.incoming.stream.read(&mut buffer)).await;
        let bytes = read.unwrap_or(0);
        into.extend_from_slice(&buffer[..bytes]);
        bytes
    }

    /// Waits until the node closes the connection; no more bytes may arrive.
    pub(crate) async fn expect_closed(&mut self) {
        let more = self.incoming.receive().await;
        assert_eq!(
            (more, self.incoming.received.len()),
            (0, 0),
            "the connection has more bytes"
        );
    }
}

impl Incoming {
    async fn response(&mut self) -> Option<Response> {
        let head_end = loop {
            let end = self.received.windows(4).position(|at| at == b"\r\n\r\n");
            match end {
                Some(at) => break at + 4,
                None if self.receive().await == 0 => return None,
                None => {}
            }
        };
        let head = String::from_utf8(self.received.drain(..head_end).collect()).unwrap();
        let mut lines = head.lines();
        let status = lines.next()?.split(' ').nth(1)?.parse().unwrap();
        let headers: HeaderMap = lines
            .filter_map(|line| line.split_once(": "))
            .map(|(name, value)| {
                let name: HeaderName = name.parse().unwrap();
                (name, HeaderValue::from_str(value).unwrap())
            })
            .collect();
        let body_len = headers.get("content-length");
        let body_len = body_len.map_or(0, |len| len.to_str().unwrap().parse().unwrap());
        while self.received.len() < body_len {
            assert_ne!(self.receive().await, 0, "the answer is cut off: {head}");
        }
        let body = self.received.drain(..body_len).collect();
        Some(Response {
            status,
            headers,
            body: String::from_utf8(body).unwrap(),
        })
    }

    /// Reads more; returns 0 at the end of the connection.
    async fn receive(&mut self) -> usize {
        let received = self.stream.read_buf(&mut self.received);
        // A reset is an end, too.
        with_timeout("more bytes", received).await.unwrap_or(0)
    }
}
