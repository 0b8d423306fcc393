//! Plain requests, answered past hyper: `GET /get?user_id=ID` and `POST /set` of one patch.
//!
//! They are most of what a node does all day, and of what one takes beyond the kernel's part most is
//! hyper's: a header map and a URI of its own, a service's future, a body's channel, a header encoded from
//! a map. What going past it is worth stands in `load/README.md`.
//!
//! A [`Socket`] stands between a connection and hyper, and sees first what comes. It answers what is plain
//! (`request.rs`): requests in which nothing could ask for another answer than the one that is made here,
//! byte for byte hyper's (`answer.rs`). The first bytes that are anything else go to hyper, unread, and with
//! them the connection for good: a request that came in two parts, one whose id is percent-encoded, one for
//! a user who is not there, a wrong password. So hyper alone decides what is an error, and says it. It also
//! keeps the draining and the end of every connection: until then no byte has come, as far as it knows.

mod answer;
mod request;

use std::io;
use std::mem::{self, MaybeUninit};
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use super::listener::Connection;
use super::observe::{HttpMetrics, InFlight};
use crate::replication::HandedIn;
use answer::Answers;

/// Appends the JSON of a user's grade; `false`, and nothing, if there is none to show.
pub type ShowGrade = Arc<dyn Fn(&str, &mut Vec<u8>) -> bool + Send + Sync>;

/// Hands in the write in a request's body, for what its `Authorization` says; `None`, and nothing is done,
/// if that may not be.
pub type HandIn = Arc<dyn Fn(Option<&[u8]>, &[u8]) -> Option<HandedIn> + Send + Sync>;

/// Bytes that are read at a time. A request that is longer is hyper's.
const READ_BYTES: usize = 4096;

/// Reads a poll; hyper does as many.
const TURNS_MAX: usize = 16;

/// What a port's plain requests are.
#[derive(Clone)]
pub enum Plain {
    /// `GET /get?user_id=ID`.
    Get(ShowGrade),
    /// `POST /set` of one patch.
    Set(HandIn),
}

/// A connection's socket, as hyper has it.
pub(super) struct Socket {
    io: TokioIo<TcpStream>,
    /// `None` once the connection is hyper's.
    ours: Option<Ours>,
    waiting: Option<Waiting>,
    connection: Arc<Connection>,
    /// Read and not answered: from the request that is waited for on; or hyper's. Its memory is kept for
    /// the next write.
    held: Vec<u8>,
    /// Answered and not sent. Nothing more is read, nor sent by hyper, until it is.
    unsent: Vec<u8>,
}

/// What answers plain requests.
pub(super) struct Ours {
    pub(super) plain: Plain,
    pub(super) metrics: Arc<HttpMetrics>,
}

/// A write on its way.
struct Waiting {
    handed_in: HandedIn,
    begun: Instant,
    /// Bytes of its request.
    len: usize,
    _in_flight: InFlight,
}

impl Socket {
    /// With `None` all is hyper's.
    pub(super) fn new(stream: TcpStream, ours: Option<Ours>, connection: Arc<Connection>) -> Self {
        Self {
            io: TokioIo::new(stream),
            ours,
            connection,
            waiting: None,
            held: Vec::new(),
            unsent: Vec::new(),
        }
    }

    /// The socket, and what is still to be sent on it.
    pub(super) fn into_parts(self) -> (TcpStream, Vec<u8>) {
        (self.io.into_inner(), self.unsent)
    }

    fn poll_unsent(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.unsent.is_empty() {
            let sent = ready!(Pin::new(self.io.inner_mut()).poll_write(cx, &self.unsent))?;
            if sent == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.unsent.drain(..sent);
            if self.unsent.is_empty() {
                // There is rarely more.
                self.unsent = Vec::new();
                self.say_what_is_open();
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Answers the plain requests that `bytes` begins with, up to one that is to be waited for, and
    /// holds the rest. What is left and not waited for is hyper's, and so is the end.
    fn take(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> io::Result<()> {
        let Some(ours) = &self.ours else {
            return Ok(());
        };
        let (rest, waiting) = match &ours.plain {
            Plain::Get(show) => Answers::with(|answers| {
                let rest = ours.show(bytes, show, answers, &self.connection);
                send(&mut self.io, &mut self.unsent, cx, answers.bytes())?;
                io::Result::Ok((rest, None))
            })?,
            Plain::Set(hand_in) => (bytes, ours.hand_in(bytes, hand_in, &self.connection)),
        };
        if waiting.is_none() && (!rest.is_empty() || bytes.is_empty()) {
            self.ours = None;
        }
        self.waiting = waiting;
        self.held.extend_from_slice(rest);
        self.say_what_is_open();
        Ok(())
    }

    /// Says whether there is something to be finished before the connection may end.
    fn say_what_is_open(&self) {
        let open = self.waiting.is_some() || !self.unsent.is_empty();
        self.connection.wait_past_hyper(open);
    }

    /// Waits for the write that is on its way, if one is, and answers it.
    fn poll_waiting(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let (Some(waiting), Some(ours)) = (&mut self.waiting, &self.ours) else {
            return Poll::Ready(Ok(()));
        };
        let outcome = ready!(Pin::new(&mut waiting.handed_in).poll(cx));
        let (begun, len) = (waiting.begun, waiting.len);
        self.waiting = None;
        match outcome {
            Ok(seq) => {
                let now = ours.metrics.plain_set(begun, &self.connection);
                let closes = self.connection.drains();
                let written = Answers::with(|answers| {
                    answers.written(seq, closes, now);
                    send(&mut self.io, &mut self.unsent, cx, answers.bytes())
                });
                self.held.drain(..len.min(self.held.len()));
                self.say_what_is_open();
                Poll::Ready(written)
            }
            // hyper sees the request, and is told what became of it.
            Err(error) => {
                self.connection.failed(error.into(), begun);
                self.ours = None;
                self.say_what_is_open();
                Poll::Ready(Ok(()))
            }
        }
    }
}

/// Sends `answers`, and keeps what can't be sent now as `unsent`.
fn send(
    io: &mut TokioIo<TcpStream>,
    unsent: &mut Vec<u8>,
    cx: &mut Context<'_>,
    answers: &[u8],
) -> io::Result<()> {
    if answers.is_empty() {
        return Ok(());
    }
    let sent = match Pin::new(io.inner_mut()).poll_write(cx, answers) {
        Poll::Ready(sent) => sent?,
        Poll::Pending => 0,
    };
    unsent.extend_from_slice(answers.get(sent..).unwrap_or_default());
    Ok(())
}

impl Ours {
    /// What follows the requests that were answered.
    fn show<'a>(
        &self,
        mut bytes: &'a [u8],
        show: &ShowGrade,
        answers: &mut Answers,
        connection: &Connection,
    ) -> &'a [u8] {
        while !bytes.is_empty()
            && let Some((user_id, len)) = request::get(bytes)
        {
            let begun = Instant::now();
            if !answers.grade(begun, |json| {
                caught(|| show(user_id, json)).unwrap_or(false)
            }) {
                break;
            }
            self.metrics.plain_get(begun, connection);
            bytes = bytes.get(len..).unwrap_or_default();
        }
        bytes
    }

    fn hand_in(&self, bytes: &[u8], hand_in: &HandIn, connection: &Connection) -> Option<Waiting> {
        let set = request::set(bytes)?;
        let begun = Instant::now();
        let handed_in = caught(|| hand_in(set.authorization, set.body))??;
        connection.begin();
        Some(Waiting {
            handed_in,
            begun,
            len: set.len,
            _in_flight: InFlight::begin(&self.metrics),
        })
    }
}

/// What `answer` gives; `None` if it panics: then so it does for hyper, who is told of it.
fn caught<T>(answer: impl FnOnce() -> T) -> Option<T> {
    std::panic::catch_unwind(AssertUnwindSafe(answer)).ok()
}

impl Read for Socket {
    /// Answers what comes until there is nothing to read, or something for hyper.
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        mut hypers: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let mut turns = 0;
        while this.ours.is_some() {
            ready!(this.poll_waiting(cx))?;
            if this.ours.is_none() {
                break;
            }
            ready!(this.poll_unsent(cx))?;
            if this.connection.drains() {
                // Nothing more is begun. Who said so wakes this task, and hyper ends it.
                return Poll::Pending;
            }
            turns += 1;
            if turns > TURNS_MAX {
                // Others' turn: a client may send as quickly as it is answered.
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            if this.held.is_empty() {
                let mut room = [const { MaybeUninit::uninit() }; READ_BYTES];
                let mut read = ReadBuf::uninit(&mut room);
                ready!(Pin::new(this.io.inner_mut()).poll_read(cx, &mut read))?;
                this.take(cx, read.filled())?;
            } else {
                let held = mem::take(&mut this.held);
                this.take(cx, &held)?;
            }
        }
        if this.held.is_empty() {
            return Pin::new(&mut this.io).poll_read(cx, hypers);
        }
        let given = this.held.len().min(hypers.remaining());
        hypers.put_slice(this.held.get(..given).unwrap_or_default());
        this.held.drain(..given);
        if this.held.is_empty() {
            this.held = Vec::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl Write for Socket {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.poll_unsent(cx))?;
        Pin::new(&mut this.io).poll_write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_unsent(cx))?;
        Pin::new(&mut this.io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_unsent(cx))?;
        Pin::new(&mut this.io).poll_shutdown(cx)
    }
}
