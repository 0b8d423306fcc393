//! The fast path: answers `GET /get?user_id=ID` and `POST /set` of one patch before hyper reads them.
//!
//! Nearly all requests are of these two kinds. Apart from the kernel, most of their cost was in hyper
//! and axum: a header map, a URI, the future of a service, a channel for the body, encoding headers.
//! ADR 0002 in `docs/internals/adr` has the measurements.
//!
//! Every connection starts on the fast path. The first request that it does not handle (see `request`)
//! goes to hyper, unparsed, together with the connection. So only hyper and the router decide what is
//! an error, and report it. The connection returns with the next request that the fast path handles
//! (see `prefixed`). The responses are byte for byte those of hyper (`response`).

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

use crate::http::connection::ConnectionState;
use crate::http::host::Hosts;
use crate::http::instrument::{FastPathError, HttpMetrics, InFlightGuard};
use crate::replication::PendingWrite;
pub(super) use prefixed::PrefixedStream;
use request::{Get, NotFast, Set};
use response::Responses;

/// Bytes of a read.
const READ_BYTES: usize = 4096;
/// The longest header on the fast path, in bytes.
const HEADER_BYTES_MAX: usize = 8 * 1024;
/// Reads without waiting before the task yields to others; as many as in hyper.
const READS_MAX: usize = 16;
/// How long the fast path waits for the rest of a body. After that, hyper waits for it.
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
    /// Appends the body of the response to `body`; appends nothing for [`GetOutcome::Fallback`].
    fn get(&self, request: &Get<'_>, body: &mut Vec<u8>) -> GetOutcome;
}

/// The outcome of a read.
pub enum GetOutcome {
    /// 200.
    Grade,
    /// 404.
    NotFound,
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
    pub(super) hosts: Hosts,
    pub(super) metrics: Arc<HttpMetrics>,
}

/// The state of a connection that hyper takes over.
pub(super) struct Handoff {
    /// The bytes that were read and not answered.
    pub(super) bytes: Vec<u8>,
    /// The error of the first request, if it has been executed.
    pub(super) failed: Option<FastPathError>,
}

impl FastPath {
    /// Answers requests until one arrives that hyper has to answer. Returns `None` once the client has
    /// closed its side or `connection` drains. `held` was read from `stream` before.
    ///
    /// # Errors
    /// The connection broke.
    pub(super) async fn serve(
        &self,
        held: Vec<u8>,
        stream: &mut TcpStream,
        connection: &ConnectionState,
    ) -> io::Result<Option<Handoff>> {
        let connection = FastConnection {
            stream,
            path: self,
            connection,
            reads: 0,
            held,
            awaiting: Awaiting::Request,
            unsent: Vec::new(),
        };
        connection.serve().await
    }

    /// Whether the fast path handles the request at the beginning of `bytes`, judging by its header.
    pub(super) fn accepts(&self, bytes: &[u8]) -> bool {
        match self.route {
            FastRoute::Get(_) => self.parse_get(bytes).is_ok(),
            FastRoute::Set(_) => self.parse_set(bytes).is_ok(),
        }
    }

    fn parse_get<'a>(&self, bytes: &'a [u8]) -> Result<Get<'a>, NotFast> {
        let get = request::get(bytes)?;
        let accepted = self.hosts.accepts(get.host);
        accepted.then_some(get).ok_or(NotFast::Fallback)
    }

    fn parse_set<'a>(&self, bytes: &'a [u8]) -> Result<Set<'a>, NotFast> {
        let set = request::set(bytes)?;
        let accepted = self.hosts.accepts(set.host);
        accepted.then_some(set).ok_or(NotFast::Fallback)
    }

    /// Answers the reads at the beginning of `bytes`. Returns the bytes after them, and why those were
    /// not answered.
    #[expect(clippy::indexing_slicing, reason = "`get` was read from `bytes`")]
    fn get_all<'a>(
        &self,
        mut bytes: &'a [u8],
        route: &dyn GetRoute,
        responses: &mut Responses,
        connection: &ConnectionState,
    ) -> (&'a [u8], NotFast) {
        while !bytes.is_empty() {
            let get = match self.parse_get(bytes) {
                Ok(get) => get,
                Err(not_fast) => return (bytes, not_fast),
            };
            let started = Instant::now();
            let outcome = responses.read(started, |body| {
                catch_panic(|| route.get(&get, body)).unwrap_or(GetOutcome::Fallback)
            });
            match outcome {
                GetOutcome::Grade => self.metrics.record_fast_get(true, started, connection),
                GetOutcome::NotFound => self.metrics.record_fast_get(false, started, connection),
                GetOutcome::Fallback => return (bytes, NotFast::Fallback),
            }
            bytes = &bytes[get.len..];
        }
        (bytes, NotFast::Incomplete)
    }

    /// Submits the write at the beginning of `bytes`. `waited` is set if its body was incomplete before.
    fn set(
        &self,
        bytes: &[u8],
        waited: Option<PendingSet>,
        route: &dyn SetRoute,
        connection: &ConnectionState,
    ) -> Submitted {
        let Set {
            authorization,
            body_at,
            len,
            ..
        } = match self.parse_set(bytes) {
            Ok(set) => set,
            Err(NotFast::Incomplete) => return Submitted::Incomplete(Awaiting::Header),
            Err(NotFast::Fallback) => return Submitted::Fallback,
        };
        let started = Instant::now();
        let admitted = || catch_panic(|| route.admits(authorization)).unwrap_or(false);
        if waited.is_none() && !admitted() {
            return Submitted::Fallback;
        }
        let body = bytes.get(body_at..len);
        let write = match body {
            Some(body) => match catch_panic(|| route.submit(body)).flatten() {
                Some(write) => Some(write),
                None => return Submitted::Fallback,
            },
            None => None,
        };
        connection.begin();
        let running = waited.unwrap_or_else(|| PendingSet {
            started,
            len,
            _in_flight: InFlightGuard::begin(&self.metrics),
        });
        match write {
            Some(write) => Submitted::Pending(write, running),
            None => Submitted::Incomplete(Awaiting::Body(running)),
        }
    }
}

/// The outcome of submitting a write.
enum Submitted {
    Pending(PendingWrite, PendingSet),
    Incomplete(Awaiting),
    Fallback,
}

/// A write whose header is complete.
struct PendingSet {
    started: Instant,
    /// The length of its request in bytes.
    len: usize,
    _in_flight: InFlightGuard,
}

/// The part of a request that a connection waits for.
enum Awaiting {
    /// A whole request: the held bytes, if any, are not parsed yet.
    Request,
    /// The end of the header.
    Header,
    /// The end of the body.
    Body(PendingSet),
}

/// The next step of a connection.
enum ConnectionStep {
    /// Parse the held bytes, or read more.
    Continue,
    /// Wait for a write.
    Wait(PendingWrite, PendingSet),
    /// Hand the held bytes to hyper.
    Handoff(Option<FastPathError>),
    /// Close the connection.
    Close,
}

/// A connection on the fast path.
struct FastConnection<'a> {
    stream: &'a mut TcpStream,
    path: &'a FastPath,
    connection: &'a ConnectionState,
    /// Consecutive reads that did not have to wait.
    reads: usize,
    /// Bytes that were read and not answered. The memory is reused for the next write.
    held: Vec<u8>,
    awaiting: Awaiting,
    /// Responses that are not sent yet. The connection reads nothing more until they are.
    unsent: Vec<u8>,
}

impl FastConnection<'_> {
    async fn serve(mut self) -> io::Result<Option<Handoff>> {
        loop {
            let step = if self.held.is_empty() || self.is_incomplete() {
                self.read().await?
            } else {
                self.process_held()?
            };
            let step = match step {
                ConnectionStep::Wait(write, running) => self.finish(write, running).await?,
                step => step,
            };
            if !self.unsent.is_empty() {
                self.stream.write_all(&self.unsent).await?;
                // Unsent responses are rare, so their memory is not kept.
                self.unsent = Vec::new();
            }
            match step {
                ConnectionStep::Handoff(failed) => {
                    let bytes = self.held;
                    return Ok(Some(Handoff { bytes, failed }));
                }
                ConnectionStep::Close => return Ok(None),
                // The response had the header `connection: close`.
                _ if self.connection.is_draining() && !self.is_incomplete() => return Ok(None),
                _ => {}
            }
        }
    }

    fn is_incomplete(&self) -> bool {
        !matches!(self.awaiting, Awaiting::Request)
    }

    async fn read(&mut self) -> io::Result<ConnectionStep> {
        let in_body = matches!(self.awaiting, Awaiting::Body(_));
        let read = poll_fn(|cx| self.poll_read(cx));
        if !in_body {
            return read.await;
        }
        let read = tokio::time::timeout(BODY_WAIT_MAX, read).await;
        read.unwrap_or(Ok(ConnectionStep::Handoff(None)))
    }

    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<ConnectionStep>> {
        // An admitted request is finished first.
        if self.connection.is_draining() && !matches!(self.awaiting, Awaiting::Body(_)) {
            return Poll::Ready(Ok(match self.held.is_empty() {
                true => ConnectionStep::Close,
                false => ConnectionStep::Handoff(None),
            }));
        }
        self.reads += 1;
        if self.reads > READS_MAX {
            self.reads = 0;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let mut buffer = [const { MaybeUninit::uninit() }; READ_BYTES];
        let mut read = ReadBuf::uninit(&mut buffer);
        let Poll::Ready(done) = Pin::new(&mut *self.stream).poll_read(cx, &mut read) else {
            self.reads = 0;
            return Poll::Pending;
        };
        done?;
        let read = read.filled();
        Poll::Ready(match (self.held.is_empty(), read.is_empty()) {
            (true, true) => Ok(ConnectionStep::Close),
            (true, false) => self.process(read),
            // hyper handles a request that the client did not finish.
            (false, true) => Ok(ConnectionStep::Handoff(None)),
            (false, false) => {
                self.held.extend_from_slice(read);
                let complete = match &self.awaiting {
                    Awaiting::Body(running) => self.held.len() >= running.len,
                    // Some clients send a byte at a time, and a header ends with a newline.
                    _ => read.contains(&b'\n') || self.held.len() >= HEADER_BYTES_MAX,
                };
                match complete {
                    true => self.process_held(),
                    false => Ok(ConnectionStep::Continue),
                }
            }
        })
    }

    fn process_held(&mut self) -> io::Result<ConnectionStep> {
        let held = mem::take(&mut self.held);
        self.process(&held)
    }

    /// Answers the requests at the beginning of `bytes`, up to the first write, and holds the rest.
    fn process(&mut self, bytes: &[u8]) -> io::Result<ConnectionStep> {
        let (path, connection) = (self.path, self.connection);
        let (rest, submitted) = match &path.route {
            FastRoute::Get(route) => Responses::with(|responses| {
                let (rest, not_fast) = path.get_all(bytes, &**route, responses, connection);
                let submitted = match not_fast {
                    NotFast::Incomplete => Submitted::Incomplete(Awaiting::Header),
                    NotFast::Fallback => Submitted::Fallback,
                };
                self.send(responses.bytes()).map(|()| (rest, submitted))
            })?,
            FastRoute::Set(route) => {
                let waited = match mem::replace(&mut self.awaiting, Awaiting::Request) {
                    Awaiting::Body(running) => Some(running),
                    Awaiting::Request | Awaiting::Header => None,
                };
                (bytes, path.set(bytes, waited, &**route, connection))
            }
        };
        self.held.extend_from_slice(rest);
        self.awaiting = Awaiting::Request;
        Ok(match submitted {
            Submitted::Pending(write, running) => ConnectionStep::Wait(write, running),
            Submitted::Incomplete(Awaiting::Header) if rest.len() >= HEADER_BYTES_MAX => {
                ConnectionStep::Handoff(None)
            }
            Submitted::Incomplete(awaiting) => {
                self.awaiting = awaiting;
                ConnectionStep::Continue
            }
            Submitted::Fallback => ConnectionStep::Handoff(None),
        })
    }

    /// Waits for a write and answers it. A failed write is handed to hyper.
    async fn finish(
        &mut self,
        write: PendingWrite,
        running: PendingSet,
    ) -> io::Result<ConnectionStep> {
        let PendingSet {
            started,
            len,
            _in_flight,
        } = running;
        let seq = match write.await {
            Ok(seq) => seq,
            Err(error) => return Ok(ConnectionStep::Handoff(Some((error.into(), started)))),
        };
        let now = self.path.metrics.record_fast_set(started, self.connection);
        let closes = self.connection.is_draining();
        Responses::with(|responses| {
            responses.written(seq, closes, now);
            self.send(responses.bytes())
        })?;
        self.held.drain(..len.min(self.held.len()));
        Ok(ConnectionStep::Continue)
    }

    /// Sends `responses`. The part that can't be sent now goes into `unsent`.
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

/// The result of `run`; `None` if it panics. Then the router runs it again and reports the panic.
fn catch_panic<T>(run: impl FnOnce() -> T) -> Option<T> {
    std::panic::catch_unwind(AssertUnwindSafe(run)).ok()
}
