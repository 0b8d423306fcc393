//! Plain requests, answered past hyper: `GET /get?user_id=ID` and `POST /set` of one patch.
//!
//! They are most of what a node does all day, and of what one takes beyond the kernel's part most is
//! hyper's: a header map and a URI of its own, a service's future, a body's channel, a header encoded from
//! a map. ADR 0002 has the measurements.
//!
//! A connection begins here, and stays here as long as its requests are plain (`request.rs`): requests
//! in which nothing could ask for another answer than the one that is made here, byte for byte hyper's
//! (`answer.rs`). The first bytes that are anything else go to hyper, unread (`rewound.rs`), and with them the
//! connection for good: one whose id is percent-encoded, one for a user who is not there, a wrong password, a body
//! that is still to come. So hyper alone decides what is an error, and says it.

mod prefixed;
pub mod request;
mod response;

use std::future::poll_fn;
use std::io;
use std::mem::{self, MaybeUninit};
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use tokio::io::{AsyncRead, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;

use crate::http::instrument::{FailedPlain, HttpMetrics, InFlight};
use crate::http::listener::Connection;
use crate::replication::PendingWrite;
pub(super) use prefixed::Rewound;
use request::Other;
use response::Answers;

/// Appends the JSON of a user's grade; `false`, and nothing, if there is none to show.
pub type ShowGrade = Arc<dyn Fn(&str, &mut Vec<u8>) -> bool + Send + Sync>;

/// Hands in the write in a request's body, for what its `Authorization` says; `None`, and nothing is done,
/// if that may not be.
pub type HandIn = Arc<dyn Fn(Option<&[u8]>, &[u8]) -> Option<PendingWrite> + Send + Sync>;

/// Bytes that are read at a time. A header that is longer is hyper's.
const READ_BYTES: usize = 4096;

/// Reads until others have their turn, however quick the client is; hyper does as many.
const READS_MAX: usize = 16;

/// What a port's plain requests are.
#[derive(Clone)]
pub enum Plain {
    /// `GET /get?user_id=ID`.
    Get(ShowGrade),
    /// `POST /set` of one patch.
    Set(HandIn),
}

/// What answers plain requests.
pub(super) struct Ours {
    pub(super) plain: Plain,
    pub(super) metrics: Arc<HttpMetrics>,
}

/// What is hyper's of a connection.
pub(super) struct Handover {
    /// What has been read and not answered.
    pub(super) bytes: Vec<u8>,
    /// What became of the first request, if it was begun.
    pub(super) failed: Option<FailedPlain>,
}

/// Answers plain requests until one comes that is hyper's, or until no more is to come: the client has sent all,
/// or `connection` drains.
///
/// # Errors
/// The client is gone.
pub(super) async fn serve(
    stream: &mut TcpStream,
    ours: &Ours,
    connection: &Connection,
) -> io::Result<Option<Handover>> {
    let plainly = Plainly {
        stream,
        ours,
        connection,
        reads: 0,
        held: Vec::new(),
        incomplete: false,
        unsent: Vec::new(),
    };
    plainly.serve().await
}

/// A connection whose requests were plain so far.
struct Plainly<'a> {
    stream: &'a mut TcpStream,
    ours: &'a Ours,
    connection: &'a Connection,
    /// Since there was nothing to read.
    reads: usize,
    /// Read and not answered: from the write that is waited for on; or the beginning of a header; or
    /// hyper's. Where writes come one by one its memory is kept for the next.
    held: Vec<u8>,
    /// Whether what is held is too little, or nothing.
    incomplete: bool,
    /// Answered and not sent. Nothing more is read until it is.
    unsent: Vec<u8>,
}

/// What came of bytes.
enum Taken {
    /// What was plain and whole is answered.
    Answered,
    /// A write is on its way.
    Waiting(Waiting),
    /// The rest is hyper's, and so is what became of the first request, if it was begun.
    Hypers(Option<FailedPlain>),
    /// There will be no more.
    End,
}

/// A write on its way.
struct Waiting {
    handed_in: PendingWrite,
    begun: Instant,
    /// Bytes of its request.
    len: usize,
    _in_flight: InFlight,
}

impl Plainly<'_> {
    async fn serve(mut self) -> io::Result<Option<Handover>> {
        loop {
            let taken = if self.held.is_empty() || self.incomplete {
                poll_fn(|cx| self.poll_read(cx)).await?
            } else {
                self.take_held()?
            };
            let taken = match taken {
                Taken::Waiting(write) => self.finish(write).await?,
                taken => taken,
            };
            if !self.unsent.is_empty() {
                self.stream.write_all(&self.unsent).await?;
                // There is rarely more.
                self.unsent = Vec::new();
            }
            match taken {
                Taken::Hypers(failed) => {
                    let bytes = self.held;
                    return Ok(Some(Handover { bytes, failed }));
                }
                Taken::End => return Ok(None),
                // The answer said that nothing more is begun.
                _ if self.connection.drains() && !self.incomplete => return Ok(None),
                _ => {}
            }
        }
    }

    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Taken>> {
        if self.connection.drains() {
            // A request that has begun is finished.
            return Poll::Ready(Ok(match self.held.is_empty() {
                true => Taken::End,
                false => Taken::Hypers(None),
            }));
        }
        self.reads += 1;
        if self.reads > READS_MAX {
            self.reads = 0;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let mut room = [const { MaybeUninit::uninit() }; READ_BYTES];
        let mut read = ReadBuf::uninit(&mut room);
        let Poll::Ready(done) = Pin::new(&mut *self.stream).poll_read(cx, &mut read) else {
            self.reads = 0;
            return Poll::Pending;
        };
        done?;
        let read = read.filled();
        Poll::Ready(match (self.held.is_empty(), read.is_empty()) {
            (true, true) => Ok(Taken::End),
            (true, false) => self.take(read),
            // That there is no more to come is hyper's to judge.
            (false, true) => Ok(Taken::Hypers(None)),
            (false, false) => {
                self.held.extend_from_slice(read);
                // Some clients send a byte at a time: a header ends with a line.
                let ends = read.contains(&b'\n') || self.held.len() >= READ_BYTES;
                match ends {
                    true => self.take_held(),
                    false => Ok(Taken::Answered),
                }
            }
        })
    }

    fn take_held(&mut self) -> io::Result<Taken> {
        let held = mem::take(&mut self.held);
        self.take(&held)
    }

    /// Answers the plain requests that `bytes` begins with, up to one that is to be waited for, and holds
    /// the rest.
    fn take(&mut self, bytes: &[u8]) -> io::Result<Taken> {
        let (rest, then) = match &self.ours.plain {
            Plain::Get(show) => {
                let (ours, connection) = (self.ours, self.connection);
                Answers::with(|answers| {
                    let (rest, other) = ours.show(bytes, show, answers, connection);
                    self.send(answers.bytes()).map(|()| (rest, Err(other)))
                })?
            }
            Plain::Set(hand_in) => (bytes, self.ours.hand_in(bytes, hand_in, self.connection)),
        };
        self.held.extend_from_slice(rest);
        // Whoever sends a long header sends hyper's.
        self.incomplete = matches!(then, Err(Other::Begun)) && rest.len() < READ_BYTES;
        Ok(match then {
            Ok(waiting) => Taken::Waiting(waiting),
            Err(_) if self.incomplete => Taken::Answered,
            Err(_) => Taken::Hypers(None),
        })
    }

    /// Waits for a write, and answers it, unless it failed.
    async fn finish(&mut self, write: Waiting) -> io::Result<Taken> {
        let Waiting {
            handed_in,
            begun,
            len,
            _in_flight,
        } = write;
        let seq = match handed_in.await {
            Ok(seq) => seq,
            Err(error) => return Ok(Taken::Hypers(Some((error.into(), begun)))),
        };
        let now = self.ours.metrics.plain_set(begun, self.connection);
        let closes = self.connection.drains();
        Answers::with(|answers| {
            answers.written(seq, closes, now);
            self.send(answers.bytes())
        })?;
        self.held.drain(..len.min(self.held.len()));
        Ok(Taken::Answered)
    }

    /// Sends `answers`, and keeps what can't be sent now as `unsent`.
    fn send(&mut self, answers: &[u8]) -> io::Result<()> {
        if answers.is_empty() {
            return Ok(());
        }
        let sent = match self.stream.try_write(answers) {
            Err(full) if full.kind() == io::ErrorKind::WouldBlock => 0,
            sent => sent?,
        };
        let unsent = answers.get(sent..).unwrap_or_default();
        self.unsent.extend_from_slice(unsent);
        Ok(())
    }
}

impl Ours {
    /// What follows the requests that were answered, and what it is.
    fn show<'a>(
        &self,
        mut bytes: &'a [u8],
        show: &ShowGrade,
        answers: &mut Answers,
        connection: &Connection,
    ) -> (&'a [u8], Other) {
        while !bytes.is_empty() {
            let (user_id, len) = match request::get(bytes) {
                Ok(get) => get,
                Err(other) => return (bytes, other),
            };
            let begun = Instant::now();
            if !answers.grade(begun, |json| {
                caught(|| show(user_id, json)).unwrap_or(false)
            }) {
                return (bytes, Other::NotPlain);
            }
            self.metrics.plain_get(begun, connection);
            bytes = bytes.get(len..).unwrap_or_default();
        }
        (bytes, Other::Begun)
    }

    /// The write that `bytes` begin with, on its way.
    fn hand_in(
        &self,
        bytes: &[u8],
        hand_in: &HandIn,
        connection: &Connection,
    ) -> Result<Waiting, Other> {
        let set = request::set(bytes)?;
        let begun = Instant::now();
        let handed_in = caught(|| hand_in(set.authorization, set.body)).flatten();
        let handed_in = handed_in.ok_or(Other::NotPlain)?;
        connection.begin();
        Ok(Waiting {
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
