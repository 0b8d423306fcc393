//! The fast path: answers `GET /get?user_id=ID` and `POST /set` of one patch before hyper reads them.
//!
//! Nearly all requests are of these two kinds. Beyond the kernel's part, most of their cost was hyper's
//! and axum's: a header map, a URI, a service's future, a channel for the body, a header encoded from a
//! map. ADR 0002 in `docs/internals/adr` has the measurements.
//!
//! A connection begins here. The first request that the fast path does not handle (see `request`) goes
//! to hyper, unread, together with the connection. So hyper and the router alone decide what is an
//! error, and report it. The connection comes back with the next request that the fast path handles
//! (see `prefixed`). The responses are hyper's, byte for byte (`response`).

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
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;

use crate::http::connection::Connection;
use crate::http::instrument::{FailedFast, HttpMetrics, InFlight};
use crate::replication::PendingWrite;
pub(super) use prefixed::Prefixed;
use request::{Get, NotFast, Set};
use response::Responses;

/// Bytes of a read.
const READ_BYTES: usize = 4096;
/// The longest header on the fast path, in bytes.
const HEADER_BYTES_MAX: usize = 8 * 1024;
/// Reads before other tasks have their turn; hyper allows as many.
const READS_MAX: usize = 16;
/// How long the fast path waits for the rest of a body. Then hyper waits on.
const BODY_WAIT_MAX: Duration = Duration::from_secs(1);

/// The route of a port that the fast path answers.
#[derive(Clone)]
pub enum FastRoute {
    /// `GET /get?user_id=ID`.
    Get(Arc<dyn GetRoute>),
    /// `POST /set` of one patch.
    Set(Arc<dyn SetRoute>),
}

/// Answers reads.
pub trait GetRoute: Send + Sync {
    /// Appends the body of the response to `body`; appends nothing for [`Found::Fallback`].
    fn get(&self, request: &Get<'_>, body: &mut Vec<u8>) -> Found;
}

/// The outcome of a read.
pub enum Found {
    /// 200.
    Grade,
    /// 404.
    Nobody,
    /// The router answers.
    Fallback,
}

/// Accepts writes.
pub trait SetRoute: Send + Sync {
    /// Whether a write with this value of `Authorization` is accepted; otherwise the router answers.
    fn admits(&self, authorization: Option<&[u8]>) -> bool;

    /// Submits the write in `body`; `None` if the router has to answer.
    fn submit(&self, body: &[u8]) -> Option<PendingWrite>;
}

/// The fast path of a port.
pub(super) struct FastPath {
    pub(super) route: FastRoute,
    pub(super) metrics: Arc<HttpMetrics>,
}

/// A connection that is handed to hyper.
pub(super) struct Handoff {
    /// The bytes that were read and not answered.
    pub(super) bytes: Vec<u8>,
    /// The error of the first request, if it has been executed.
    pub(super) failed: Option<FailedFast>,
}

impl FastPath {
    /// Answers requests until one comes that hyper has to answer, or until the client has sent all or
    /// `connection` drains (`None`). `held` was read from `stream` before.
    ///
    /// # Errors
    /// The connection broke.
    pub(super) async fn serve(
        &self,
        held: Vec<u8>,
        stream: &mut TcpStream,
        connection: &Connection,
    ) -> io::Result<Option<Handoff>> {
        let connection = FastConnection {
            stream,
            path: self,
            connection,
            reads: 0,
            held,
            missing: Missing::Nothing,
            unsent: Vec::new(),
        };
        connection.serve().await
    }

    /// Whether the fast path answers the request at the beginning of `bytes`, as far as its header tells.
    pub(super) fn takes(&self, bytes: &[u8]) -> bool {
        match self.route {
            FastRoute::Get(_) => request::get(bytes).is_ok(),
            FastRoute::Set(_) => request::set(bytes).is_ok(),
        }
    }

    /// Answers the reads at the beginning of `bytes`; the bytes that follow them, and why they were not
    /// answered.
    #[expect(clippy::indexing_slicing, reason = "`get` was read from `bytes`")]
    fn get_all<'a>(
        &self,
        mut bytes: &'a [u8],
        route: &dyn GetRoute,
        responses: &mut Responses,
        connection: &Connection,
    ) -> (&'a [u8], NotFast) {
        while !bytes.is_empty() {
            let get = match request::get(bytes) {
                Ok(get) => get,
                Err(not_fast) => return (bytes, not_fast),
            };
            let started = Instant::now();
            let found = responses.read(started, |body| {
                caught(|| route.get(&get, body)).unwrap_or(Found::Fallback)
            });
            match found {
                Found::Grade => self.metrics.fast_get(true, started, connection),
                Found::Nobody => self.metrics.fast_get(false, started, connection),
                Found::Fallback => return (bytes, NotFast::Fallback),
            }
            bytes = &bytes[get.len..];
        }
        (bytes, NotFast::Incomplete)
    }

    /// Submits the write at the beginning of `bytes`; `waited` if its body was missing before.
    fn set(
        &self,
        bytes: &[u8],
        waited: Option<Running>,
        route: &dyn SetRoute,
        connection: &Connection,
    ) -> Submitted {
        let Set {
            authorization,
            body_at,
            len,
        } = match request::set(bytes) {
            Ok(set) => set,
            Err(NotFast::Incomplete) => return Submitted::Missing(Missing::Header),
            Err(NotFast::Fallback) => return Submitted::Fallback,
        };
        let started = Instant::now();
        let admitted = || caught(|| route.admits(authorization)).unwrap_or(false);
        if waited.is_none() && !admitted() {
            return Submitted::Fallback;
        }
        let body = bytes.get(body_at..len);
        let write = match body {
            Some(body) => match caught(|| route.submit(body)).flatten() {
                Some(write) => Some(write),
                None => return Submitted::Fallback,
            },
            None => None,
        };
        connection.begin();
        let running = waited.unwrap_or_else(|| Running {
            started,
            len,
            _in_flight: InFlight::begin(&self.metrics),
        });
        match write {
            Some(write) => Submitted::Pending(write, running),
            None => Submitted::Missing(Missing::Body(running)),
        }
    }
}

/// The outcome of submitting a write.
enum Submitted {
    Pending(PendingWrite, Running),
    Missing(Missing),
    Fallback,
}

/// A write whose header was read.
struct Running {
    started: Instant,
    /// The length of its request in bytes.
    len: usize,
    _in_flight: InFlight,
}

/// What the held bytes lack to be a request.
enum Missing {
    /// They may be one.
    Nothing,
    /// The end of the header.
    Header,
    /// The end of the body.
    Body(Running),
}

/// The next step of a connection.
enum Step {
    /// Reads, or goes on with the held bytes.
    GoOn,
    /// Waits for a write.
    Wait(PendingWrite, Running),
    /// Hands the held bytes to hyper.
    Handoff(Option<FailedFast>),
    /// Ends.
    End,
}

/// A connection on the fast path.
struct FastConnection<'a> {
    stream: &'a mut TcpStream,
    path: &'a FastPath,
    connection: &'a Connection,
    /// Reads since there was nothing to read.
    reads: usize,
    /// Read and not answered. Where writes come one by one its memory is kept for the next.
    held: Vec<u8>,
    /// What they lack.
    missing: Missing,
    /// Responses that are not sent yet. Nothing more is read until they are.
    unsent: Vec<u8>,
}

impl FastConnection<'_> {
    async fn serve(mut self) -> io::Result<Option<Handoff>> {
        loop {
            let step = if self.held.is_empty() || self.lacks_bytes() {
                self.read().await?
            } else {
                self.take_held()?
            };
            let step = match step {
                Step::Wait(write, running) => self.finish(write, running).await?,
                step => step,
            };
            if !self.unsent.is_empty() {
                self.stream.write_all(&self.unsent).await?;
                // There is rarely more.
                self.unsent = Vec::new();
            }
            match step {
                Step::Handoff(failed) => {
                    let bytes = self.held;
                    return Ok(Some(Handoff { bytes, failed }));
                }
                Step::End => return Ok(None),
                // The response has announced the end of the connection.
                _ if self.connection.drains() && !self.lacks_bytes() => return Ok(None),
                _ => {}
            }
        }
    }

    fn lacks_bytes(&self) -> bool {
        !matches!(self.missing, Missing::Nothing)
    }

    async fn read(&mut self) -> io::Result<Step> {
        let in_body = matches!(self.missing, Missing::Body(_));
        let read = poll_fn(|cx| self.poll_read(cx));
        if !in_body {
            return read.await;
        }
        let read = tokio::time::timeout(BODY_WAIT_MAX, read).await;
        read.unwrap_or(Ok(Step::Handoff(None)))
    }

    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Step>> {
        // A request that was admitted is finished.
        if self.connection.drains() && !matches!(self.missing, Missing::Body(_)) {
            return Poll::Ready(Ok(match self.held.is_empty() {
                true => Step::End,
                false => Step::Handoff(None),
            }));
        }
        self.reads += 1;
        if self.reads > READS_MAX {
            self.reads = 0;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let mut space = [const { MaybeUninit::uninit() }; READ_BYTES];
        let mut read = ReadBuf::uninit(&mut space);
        let Poll::Ready(done) = Pin::new(&mut *self.stream).poll_read(cx, &mut read) else {
            self.reads = 0;
            return Poll::Pending;
        };
        done?;
        let read = read.filled();
        Poll::Ready(match (self.held.is_empty(), read.is_empty()) {
            (true, true) => Ok(Step::End),
            (true, false) => self.take(read),
            // hyper judges a request that the client did not finish.
            (false, true) => Ok(Step::Handoff(None)),
            (false, false) => {
                self.held.extend_from_slice(read);
                let complete = match &self.missing {
                    Missing::Body(running) => self.held.len() >= running.len,
                    // Some clients send a byte at a time: a header ends with a line.
                    _ => read.contains(&b'\n') || self.held.len() >= HEADER_BYTES_MAX,
                };
                match complete {
                    true => self.take_held(),
                    false => Ok(Step::GoOn),
                }
            }
        })
    }

    fn take_held(&mut self) -> io::Result<Step> {
        let held = mem::take(&mut self.held);
        self.take(&held)
    }

    /// Answers the requests at the beginning of `bytes`, up to the first write, and holds the rest.
    fn take(&mut self, bytes: &[u8]) -> io::Result<Step> {
        let (path, connection) = (self.path, self.connection);
        let (rest, submitted) = match &path.route {
            FastRoute::Get(route) => Responses::with(|responses| {
                let (rest, not_fast) = path.get_all(bytes, &**route, responses, connection);
                let submitted = match not_fast {
                    NotFast::Incomplete => Submitted::Missing(Missing::Header),
                    NotFast::Fallback => Submitted::Fallback,
                };
                self.send(responses.bytes()).map(|()| (rest, submitted))
            })?,
            FastRoute::Set(route) => {
                let waited = match mem::replace(&mut self.missing, Missing::Nothing) {
                    Missing::Body(running) => Some(running),
                    Missing::Nothing | Missing::Header => None,
                };
                (bytes, path.set(bytes, waited, &**route, connection))
            }
        };
        self.held.extend_from_slice(rest);
        self.missing = Missing::Nothing;
        Ok(match submitted {
            Submitted::Pending(write, running) => Step::Wait(write, running),
            Submitted::Missing(Missing::Header) if rest.len() >= HEADER_BYTES_MAX => {
                Step::Handoff(None)
            }
            Submitted::Missing(missing) => {
                self.missing = missing;
                Step::GoOn
            }
            Submitted::Fallback => Step::Handoff(None),
        })
    }

    /// Waits for a write, and answers it, unless it failed.
    async fn finish(&mut self, write: PendingWrite, running: Running) -> io::Result<Step> {
        let Running {
            started,
            len,
            _in_flight,
        } = running;
        let seq = match write.await {
            Ok(seq) => seq,
            Err(error) => return Ok(Step::Handoff(Some((error.into(), started)))),
        };
        let now = self.path.metrics.fast_set(started, self.connection);
        let closes = self.connection.drains();
        Responses::with(|responses| {
            responses.written(seq, closes, now);
            self.send(responses.bytes())
        })?;
        self.held.drain(..len.min(self.held.len()));
        Ok(Step::GoOn)
    }

    /// Sends `responses`, and keeps what can't be sent now as `unsent`.
    #[expect(clippy::indexing_slicing, reason = "no more was sent than there was")]
    fn send(&mut self, responses: &[u8]) -> io::Result<()> {
        if responses.is_empty() {
            return Ok(());
        }
        let sent = match self.stream.try_write(responses) {
            Err(full) if full.kind() == io::ErrorKind::WouldBlock => 0,
            sent => sent?,
        };
        self.unsent.extend_from_slice(&responses[sent..]);
        Ok(())
    }
}

/// The result of `run`; `None` if it panics. The router runs it again, and reports the panic.
fn caught<T>(run: impl FnOnce() -> T) -> Option<T> {
    std::panic::catch_unwind(AssertUnwindSafe(run)).ok()
}
