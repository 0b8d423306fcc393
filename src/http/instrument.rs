//! Counts, times and names every request, and turns a panic into an answer.

use std::panic::AssertUnwindSafe;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use futures_util::FutureExt;
use futures_util::future::{BoxFuture, CatchUnwind};
use http::header::CONNECTION;
use http::{HeaderValue, Method, Request, StatusCode};
use hyper::body::Incoming;
use metrics::{Counter, Gauge, counter, describe_counter, describe_gauge, gauge};
use std::cell::Cell;
use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tower::Service;

use super::answer::{Answer, routed};
use super::error::ApiError;
use super::failures::{Failed, Failure, FailureLog};
use super::latency::{self, Counts, Latency};
use super::listener::{Connection, Direct, Directly};
use super::request_id::{self, X_REQUEST_ID};

/// The routes as metrics name them; whatever else is asked for counts as the last one.
pub(super) const ROUTES: [&str; 12] = [
    "/set",
    "/get",
    LINES,
    BACKUP,
    "/livez",
    "/readyz",
    "/readyz/write",
    "/metrics",
    "/status",
    "/",
    "/openapi.json",
    "other",
];
/// `GET /get`.
const GET_AT: usize = 1;
/// `POST /set` of one patch.
const SET_AT: usize = 0;
/// `POST /set` with many lines, which takes as long as its body: no path has a space.
pub(super) const LINES: &str = "/set lines";
const LINES_AT: usize = 2;
/// Of `ROUTES`, so many of the first are those of the data ports.
const DATA_ROUTES: usize = 4;
/// And of these the first are answered so often that a request there is named only where that is of use.
const HOT_ROUTES: usize = 2;
/// The route whose answer goes on after it has begun.
const BACKUP: &str = "/backup";
const OTHER: usize = ROUTES.len() - 1;

/// Marks the answer to a body of many lines.
#[derive(Clone)]
pub(super) struct ManyLines;

/// Statuses that are counted one by one: 100 to 599.
const STATUSES: usize = 500;

/// How many requests for grades were answered: who works beside them looks whether there are any.
/// Clones are the same.
#[derive(Clone, Default)]
pub struct Answered(Arc<AtomicU64>);

impl Answered {
    /// So many since the start.
    pub(super) fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What is measured about requests; handles are made once.
pub struct HttpMetrics {
    answered: Answered,
    /// Whether more is measured than what others work by.
    counted: bool,
    routes: [RouteMetrics; ROUTES.len()],
    in_flight: Gauge,
    failures: FailureLog,
}

struct RouteMetrics {
    latency: Latency,
    /// A counter a status, made when it first occurs.
    requests: Box<[OnceLock<Counter>]>,
    /// Makes them, bound to the recorder that the handles belong to.
    make: Box<dyn Fn(u16) -> Counter + Send + Sync>,
}

impl HttpMetrics {
    /// Registers the handles through `counter_of`, which makes the counter of a route and status,
    /// and with the current recorder.
    pub fn new(
        counter_of: impl Fn(&'static str, u16) -> Counter + Clone + Send + Sync + 'static,
    ) -> Self {
        describe_counter!(
            "gradestore_http_requests_total",
            "Requests answered, by route and status."
        );
        describe_gauge!(
            "gradestore_http_requests_in_flight",
            "Requests that are being answered."
        );
        Self {
            answered: Answered::default(),
            counted: true,
            routes: ROUTES.map(|route| {
                let counter_of = counter_of.clone();
                RouteMetrics {
                    latency: Latency::default(),
                    requests: (0..STATUSES).map(|_| OnceLock::new()).collect(),
                    make: Box::new(move |status| counter_of(route, status)),
                }
            }),
            in_flight: gauge!("gradestore_http_requests_in_flight"),
            failures: FailureLog::default(),
        }
    }

    /// Measures nothing for anybody to see.
    #[must_use]
    pub fn uncounted() -> Self {
        Self {
            counted: false,
            in_flight: Gauge::noop(),
            ..Self::new(|_, _| Counter::noop())
        }
    }

    /// The counter of a route's answers with a status, from the current recorder.
    pub fn requests_counter(route: &'static str, status: u16) -> Counter {
        let status = status.to_string();
        counter!("gradestore_http_requests_total", "route" => route, "status" => status)
    }

    /// Appends what is counted here and not in the recorder, in Prometheus' text format.
    pub fn render(&self, out: &mut String) {
        if self.counted {
            let latencies = self.routes.iter().map(|route| &route.latency);
            // Nothing fails to be written to memory.
            let _ = latency::render(ROUTES.into_iter().zip(latencies), out);
        }
    }

    /// How many requests for grades were answered, counted as long as this is.
    #[must_use]
    pub fn answered(&self) -> Answered {
        self.answered.clone()
    }

    /// How long the requests for one grade and the single writes took; `None` where that is not counted.
    pub(super) fn reads_and_writes(&self) -> Option<[Counts; 2]> {
        let counts = |route| Some(self.routes.get::<usize>(route)?.latency.counts());
        let both = [counts(GET_AT)?, counts(SET_AT)?];
        self.counted.then_some(both)
    }

    /// Measures a `GET /get` that was answered past hyper.
    pub(super) fn plain_get(&self, begun: Instant, connection: &Connection) {
        connection.begin();
        self.end(GET_AT, StatusCode::OK, begun, connection);
    }

    /// Measures a `POST /set` that was answered past hyper; what time it is.
    pub(super) fn plain_set(&self, begun: Instant, connection: &Connection) -> Instant {
        self.end(SET_AT, StatusCode::NO_CONTENT, begun, connection)
    }

    /// A request ends: what time it is.
    fn end(
        &self,
        route: usize,
        status: StatusCode,
        begun: Instant,
        connection: &Connection,
    ) -> Instant {
        // The clock is read once for all.
        let now = Instant::now();
        connection.end_at(now);
        if route < HOT_ROUTES {
            self.answered.0.fetch_add(1, Ordering::Relaxed);
        }
        self.count(route, status, now - begun);
        now
    }

    fn count(&self, route: usize, status: StatusCode, took: Duration) {
        let index = usize::from(status.as_u16()).wrapping_sub(100);
        if let Some(route) = self.routes.get(route).filter(|_| self.counted)
            && let Some(counter) = route.requests.get(index)
        {
            // Refusals are quick: they would make the latency look better than it is.
            if !status.is_server_error() {
                route.latency.record(took);
            }
            counter
                .get_or_init(|| (route.make)(status.as_u16()))
                .increment(1);
        }
    }

    /// Counts a `GET /get` that took so long.
    #[cfg(test)]
    pub(super) fn count_read(&self, took: Duration) {
        self.count(GET_AT, StatusCode::OK, took);
    }
}

/// A request that is being answered; counted as one until dropped.
pub(super) struct InFlight(Arc<HttpMetrics>);

impl InFlight {
    pub(super) fn begin(metrics: &Arc<HttpMetrics>) -> Self {
        metrics.in_flight.increment(1.0);
        Self(Arc::clone(metrics))
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.decrement(1.0);
    }
}

/// What became of a request past hyper, where hyper is to say it, and when it began.
pub(super) type FailedPlain = (ApiError, Instant);

/// The service of one connection: a port's router, watched.
pub(super) struct Observed {
    pub(super) router: Router,
    pub(super) direct: Option<Direct>,
    pub(super) metrics: Arc<HttpMetrics>,
    pub(super) connection: Arc<Connection>,
    /// Of the first request, if it is known.
    pub(super) failed: Cell<Option<FailedPlain>>,
}

impl hyper::service::Service<Request<Incoming>> for Observed {
    type Response = Answer;
    type Error = Infallible;
    type Future = ObservedFuture;

    fn call(&self, mut request: Request<Incoming>) -> Self::Future {
        let begun = Instant::now();
        let path = request.uri().path();
        let route = ROUTES.iter().position(|route| *route == path);
        self.connection.begin();
        if path == BACKUP {
            let connection = Arc::clone(&self.connection);
            request.extensions_mut().insert(connection);
        }
        let mut asked = Asked {
            begun,
            route: route.unwrap_or(OTHER),
            request_id: request_id::sent(request.headers()),
            // Replicas ask each other so whether they would give a backup.
            head: request.method() == Method::HEAD,
        };
        let failed = self.failed.take();
        let directly = match &self.direct {
            _ if let Some((error, begun)) = failed => {
                asked.begun = begun;
                let mut answer = Answer::from(error);
                if self.connection.drains() {
                    // hyper has not been told yet.
                    let close = HeaderValue::from_static("close");
                    answer.headers_mut().insert(CONNECTION, close);
                }
                Directly::Now(answer)
            }
            Some(direct) => {
                let answer = || direct(request);
                let answer = std::panic::catch_unwind(AssertUnwindSafe(answer));
                answer.unwrap_or_else(|_| Directly::Now(internal()))
            }
            None => Directly::Router(request),
        };
        let answer = match directly {
            // Nobody could see it in flight, and nobody need hold what it is measured with.
            Directly::Now(mut response) => {
                asked.answered(&mut response, &self.metrics, &self.connection);
                return ObservedFuture::Answered {
                    response: Some(response),
                };
            }
            Directly::Later(answer) => AnswerFuture::Later {
                answer: AssertUnwindSafe(answer).catch_unwind(),
            },
            Directly::Router(request) => {
                let answer = self.router.clone().call(request.map(Body::new));
                AnswerFuture::Router {
                    answer: AssertUnwindSafe(answer).catch_unwind(),
                }
            }
        };
        let running = Running {
            in_flight: InFlight::begin(&self.metrics),
            connection: Arc::clone(&self.connection),
            asked,
            answered: false,
        };
        ObservedFuture::Running { answer, running }
    }
}

/// What a panic is answered with. The panic hook has logged it.
fn internal() -> Answer {
    ApiError::Internal.into()
}

type RouterFuture = <Router as Service<Request<Body>>>::Future;

pin_project_lite::pin_project! {
    #[project = ObservedProjection]
    pub(super) enum ObservedFuture {
        Answered { response: Option<Answer> },
        Running { #[pin] answer: AnswerFuture, running: Running },
    }
}

pin_project_lite::pin_project! {
    #[project = AnswerProjection]
    enum AnswerFuture {
        Later { #[pin] answer: CatchUnwind<AssertUnwindSafe<BoxFuture<'static, Answer>>> },
        Router { #[pin] answer: CatchUnwind<AssertUnwindSafe<RouterFuture>> },
    }
}

impl Future for AnswerFuture {
    type Output = Answer;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Answer> {
        match self.project() {
            AnswerProjection::Later { answer } => answer
                .poll(cx)
                .map(|answered| answered.unwrap_or_else(|_panic| internal())),
            AnswerProjection::Router { answer } => answer.poll(cx).map(|answered| match answered {
                Ok(Ok(response)) => routed(response),
                Ok(Err(never)) => match never {},
                Err(_panic) => internal(),
            }),
        }
    }
}

/// What is kept of a request until it is answered.
struct Asked {
    begun: Instant,
    route: usize,
    /// What the client calls it.
    request_id: Option<HeaderValue>,
    head: bool,
}

impl Asked {
    /// Measures the answer, and names it.
    fn answered(&mut self, answer: &mut Answer, metrics: &HttpMetrics, connection: &Connection) {
        if answer.extensions().get::<ManyLines>().is_some() {
            self.route = LINES_AT;
        }
        let now = metrics.end(self.route, answer.status(), self.begun, connection);
        self.name(answer, now - self.begun, &metrics.failures);
    }

    /// Gives the answer the request's id, where it has or needs one, and tells of a failure.
    fn name(&mut self, answer: &mut Answer, took: Duration, failures: &FailureLog) {
        let status = answer.status();
        let failed = status.is_client_error() || status.is_server_error();
        let sent = self.request_id.take();
        if sent.is_none() && !failed && self.route < HOT_ROUTES {
            return;
        }
        let request_id = sent.unwrap_or_else(request_id::made);
        if let Some(failure) = answer.extensions_mut().remove::<Failure>() {
            let failed = Failed {
                route: ROUTES.get(self.route).copied().unwrap_or_default(),
                status,
                request_id: &request_id,
                took,
                expected: self.head || (DATA_ROUTES..OTHER).contains(&self.route),
            };
            failures.tell(&failed, &failure);
        }
        answer.headers_mut().insert(X_REQUEST_ID, request_id);
    }
}

/// A request that has begun; ends when dropped, so that one whose client went away ends too.
struct Running {
    in_flight: InFlight,
    connection: Arc<Connection>,
    asked: Asked,
    answered: bool,
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.answered {
            self.connection.end();
        }
    }
}

impl Future for ObservedFuture {
    type Output = Result<Answer, Infallible>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let (answer, running) = match self.project() {
            // Polled once: hyper drops a future that has answered.
            ObservedProjection::Answered { response } => {
                return Poll::Ready(Ok(response.take().unwrap_or_else(internal)));
            }
            ObservedProjection::Running { answer, running } => (answer, running),
        };
        let mut response = std::task::ready!(answer.poll(cx));
        running.answered = true;
        let Running {
            asked,
            in_flight,
            connection,
            ..
        } = running;
        asked.answered(&mut response, &in_flight.0, connection);
        Poll::Ready(Ok(response))
    }
}
