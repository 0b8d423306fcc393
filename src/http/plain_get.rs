//! A plain `GET /get?user_id=ID`, answered past hyper.
//!
//! Most of what a node does all day are such requests, and of what one takes beyond the kernel's part
//! most is hyper's: a request with its own header map and URI, a future, a body, a header encoded from
//! a map. What going past it is worth stands in `load/README.md`.
//!
//! [`PlainGet`] stands between a connection's socket and hyper. It looks at what comes before hyper does,
//! and answers the requests in it that are plain: nothing in them could ask for anything but the record as
//! it is now. The first bytes that are anything else it hands to hyper, unread, and with them the
//! connection for good: a request that came in two parts, one whose id is percent-encoded, one for a
//! user who is not there, a wrong one. So hyper alone decides what is an error, and what is said to it; it
//! also keeps the deadlines, the draining and the end of every connection, since until then to it no byte
//! has come. Header lines are read by `httparse`, as hyper does.

use std::cell::RefCell;
use std::io;
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant, SystemTime};

use httparse::{EMPTY_HEADER, Request, Status};
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use super::listener::Connection;
use super::observe::HttpMetrics;

/// Appends the JSON of a user's grade; `false`, and nothing, if there is none to show.
pub type ShowGrade = Arc<dyn Fn(&str, &mut Vec<u8>) -> bool + Send + Sync>;

/// Bytes that are read at a time. A request that is longer is hyper's.
const READ_BYTES: usize = 4096;
/// Header lines of a plain request, at most: a browser sends fifteen.
const LINES_MAX: usize = 24;
/// How a plain request's target begins; what follows is the id as it is.
const TARGET: &str = "/get?user_id=";
/// Header lines that change nothing about the answer. A line that is not among these may: so it is hyper's.
const HARMLESS: [&str; 8] = [
    "host",
    "user-agent",
    "accept",
    "accept-encoding",
    "accept-language",
    "cache-control",
    "pragma",
    "traceparent",
];

/// A socket whose plain requests are answered before hyper sees them.
pub(super) struct PlainGet {
    io: TokioIo<TcpStream>,
    /// `None` once the connection is hyper's.
    answers: Option<Answers>,
    /// What is answered and not yet sent. Nothing is read, nor sent by hyper, until it is.
    unsent: Vec<u8>,
}

/// What answers.
pub(super) struct Answers {
    pub(super) show: ShowGrade,
    pub(super) metrics: Arc<HttpMetrics>,
    pub(super) connection: Arc<Connection>,
}

impl PlainGet {
    /// With `None` all is hyper's.
    pub(super) fn new(stream: TcpStream, answers: Option<Answers>) -> Self {
        Self {
            io: TokioIo::new(stream),
            answers,
            unsent: Vec::new(),
        }
    }

    /// The socket, and what is still to be sent on it.
    pub(super) fn into_parts(self) -> (TcpStream, Vec<u8>) {
        (self.io.into_inner(), self.unsent)
    }
}

/// Sends what is `unsent`.
fn poll_unsent(
    io: &mut TokioIo<TcpStream>,
    unsent: &mut Vec<u8>,
    cx: &mut Context<'_>,
) -> Poll<io::Result<()>> {
    while !unsent.is_empty() {
        let sent = ready!(Pin::new(io.inner_mut()).poll_write(cx, unsent))?;
        if sent == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        unsent.drain(..sent);
        if unsent.is_empty() {
            // There is rarely more.
            *unsent = Vec::new();
        }
    }
    Poll::Ready(Ok(()))
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch::new());
}

/// What an answer is made in, once a thread.
struct Scratch {
    out: Vec<u8>,
    json: Vec<u8>,
    /// As the `Date` line has it.
    date: String,
    /// When it is another second.
    date_until: Instant,
}

impl Scratch {
    fn new() -> Self {
        Self {
            out: Vec::new(),
            json: Vec::new(),
            date: String::new(),
            date_until: Instant::now(),
        }
    }

    /// Answers the plain requests at the beginning of `bytes` in `out`; what follows them.
    fn answer<'a>(&mut self, answers: &Answers, mut bytes: &'a [u8]) -> &'a [u8] {
        self.out.clear();
        while !bytes.is_empty() {
            let Some((user_id, len)) = plain(bytes) else {
                break;
            };
            let begun = Instant::now();
            self.json.clear();
            if !(answers.show)(user_id, &mut self.json) {
                break;
            }
            answers.connection.begin();
            self.answer_json(begun);
            answers.metrics.plain_get(begun, &answers.connection);
            bytes = bytes.get(len..).unwrap_or_default();
        }
        bytes
    }

    /// As hyper would write it.
    fn answer_json(&mut self, now: Instant) {
        if now >= self.date_until {
            let time = SystemTime::now();
            self.date = httpdate::fmt_http_date(time);
            let since = time.duration_since(SystemTime::UNIX_EPOCH);
            let into_second = since.unwrap_or_default().subsec_nanos();
            let left =
                Duration::from_secs(1).saturating_sub(Duration::from_nanos(into_second.into()));
            self.date_until = now + left;
        }
        let mut digits = itoa::Buffer::new();
        let out = &mut self.out;
        out.extend_from_slice(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: ",
        );
        out.extend_from_slice(digits.format(self.json.len()).as_bytes());
        out.extend_from_slice(b"\r\ndate: ");
        out.extend_from_slice(self.date.as_bytes());
        out.extend_from_slice(b"\r\n\r\n");
        out.extend_from_slice(&self.json);
    }
}

/// Whom the request at the beginning of `bytes` asks for, and its length, if it is plain and whole.
fn plain(bytes: &[u8]) -> Option<(&str, usize)> {
    let mut lines = [const { EMPTY_HEADER }; LINES_MAX];
    let mut request = Request::new(&mut lines);
    let Ok(Status::Complete(len)) = request.parse(bytes) else {
        return None;
    };
    let plain = request.method == Some("GET") && request.version == Some(1);
    let user_id = request.path?.strip_prefix(TARGET)?;
    let harmless = request.headers.iter().all(|line| {
        let name = line.name.as_bytes();
        let keeps_alive = || {
            name.eq_ignore_ascii_case(b"connection")
                && line.value.eq_ignore_ascii_case(b"keep-alive")
        };
        let is = |harmless: &&str| name.eq_ignore_ascii_case(harmless.as_bytes());
        HARMLESS.iter().any(is) || keeps_alive()
    });
    (plain && harmless && user_id.bytes().all(stands_for_itself)).then_some((user_id, len))
}

/// Whether a byte of a query is one of the value, and nothing else: RFC 3986's unreserved ones, and two
/// that ids are often made with.
fn stands_for_itself(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~' | b':' | b'@')
}

impl Read for PlainGet {
    /// Answers what comes until there is nothing to read, or something for hyper.
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        mut hypers: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        let Self {
            io,
            answers,
            unsent,
        } = self.get_mut();
        while let Some(answering) = answers {
            ready!(poll_unsent(io, unsent, cx))?;
            let mut room = [const { MaybeUninit::uninit() }; READ_BYTES];
            let room = room.get_mut(..hypers.remaining().min(READ_BYTES));
            let mut read = ReadBuf::uninit(room.unwrap_or_default());
            ready!(Pin::new(io.inner_mut()).poll_read(cx, &mut read))?;
            let rest = SCRATCH.with_borrow_mut(|scratch| {
                let rest = scratch.answer(answering, read.filled());
                if !scratch.out.is_empty() {
                    let sent = match Pin::new(io.inner_mut()).poll_write(cx, &scratch.out) {
                        Poll::Ready(sent) => sent?,
                        Poll::Pending => 0,
                    };
                    let more = scratch.out.get(sent..).unwrap_or_default();
                    unsent.extend_from_slice(more);
                }
                io::Result::Ok(rest)
            })?;
            if !rest.is_empty() || read.filled().is_empty() {
                *answers = None;
                hypers.put_slice(rest);
                return Poll::Ready(Ok(()));
            }
        }
        Pin::new(io).poll_read(cx, hypers)
    }
}

impl Write for PlainGet {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(poll_unsent(&mut this.io, &mut this.unsent, cx))?;
        Pin::new(&mut this.io).poll_write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(poll_unsent(&mut this.io, &mut this.unsent, cx))?;
        Pin::new(&mut this.io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(poll_unsent(&mut this.io, &mut this.unsent, cx))?;
        Pin::new(&mut this.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_plain() {
        let whole =
            "GET /get?user_id=a-Z.0_~:@ HTTP/1.1\r\nHost: x\r\nconnection: Keep-Alive\r\n\r\n";
        assert_eq!(plain(whole.as_bytes()), Some(("a-Z.0_~:@", whole.len())));
        let next = format!("{whole}GET /");
        assert_eq!(plain(next.as_bytes()), Some(("a-Z.0_~:@", whole.len())));
        for len in 0..whole.len() {
            assert_eq!(plain(&whole.as_bytes()[..len]), None, "{len}");
        }
        let none = "GET /get?user_id= HTTP/1.1\r\n\r\n";
        assert_eq!(plain(none.as_bytes()), Some(("", none.len())));
    }

    #[test]
    fn what_is_hypers() {
        for target in [
            "/get",
            "/get?user_ids=a",
            "/get?user_id=a&x",
            "/get?user_id=a%20",
            "/get?user_id=a+b",
            "/get?user_id=a=b",
            "/get?user_id=a#",
            "/get?user_id=é",
            "/get/?user_id=a",
            "http://x/get?user_id=a",
        ] {
            let request = format!("GET {target} HTTP/1.1\r\nhost: x\r\n\r\n");
            assert_eq!(plain(request.as_bytes()), None, "{target}");
        }
        for line in [
            "GET /get?user_id=a HTTP/1.0",
            "HEAD /get?user_id=a HTTP/1.1",
            "get /get?user_id=a HTTP/1.1",
        ] {
            let request = format!("{line}\r\nhost: x\r\n\r\n");
            assert_eq!(plain(request.as_bytes()), None, "{line}");
        }
        for line in [
            "connection: close",
            "connection: keep-alive, te",
            "connection: upgrade",
            "content-length: 0",
            "transfer-encoding: chunked",
            "expect: 100-continue",
            "upgrade: h2c",
            "grade-position: 1",
            "x-request-id: a",
            "range: bytes=0-1",
            "if-none-match: *",
            "x: y",
        ] {
            let request = format!("GET /get?user_id=a HTTP/1.1\r\nhost: x\r\n{line}\r\n\r\n");
            assert_eq!(plain(request.as_bytes()), None, "{line}");
        }
    }
}
