//! Counts, times and names every request, and turns a panic into an answer.

use std::cell::Cell;
use std::convert::Infallible;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, HttpBody};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::CatchUnwind;
use http::header::CONNECTION;
use http::{HeaderValue, Method, Request, StatusCode};
use hyper::body::{Frame, Incoming, SizeHint};
use metrics::{Counter, Gauge, counter, describe_counter, describe_gauge, gauge};
use tower::Service;

use super::connection::Connection;
use super::error::ApiError;
use super::failures::{Failed, Failure, FailureLog};
use super::latency::{self, Counts, Latency};
use super::request_id::{self, X_REQUEST_ID};
use super::route::{PerRoute, Route};

const PATH_METRIC: &str = "gradestore_http_path_total";

/// Statuses are counted one by one, from 100 to 599.
const STATUS_MIN: u16 = 100;
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
    routes: PerRoute<RouteMetrics>,
    in_flight: Gauge,
    /// Requests that the fast path answered.
    fast: Counter,
    /// Those that the router answered.
    router: Counter,
    failures: FailureLog,
}

struct RouteMetrics {
    latency: Latency,
    /// A counter a status, made when it first occurs.
    requests: Box<[OnceLock<Counter>; STATUSES]>,
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
        describe_counter!(
            PATH_METRIC,
            "Requests answered by the fast path, and by hyper and the router."
        );
        Self {
            answered: Answered::default(),
            counted: true,
            routes: PerRoute::new(|route| {
                let counter_of = counter_of.clone();
                RouteMetrics {
                    latency: Latency::default(),
                    requests: Box::new([const { OnceLock::new() }; STATUSES]),
                    make: Box::new(move |status| counter_of(route.name(), status)),
                }
            }),
            in_flight: gauge!("gradestore_http_requests_in_flight"),
            fast: counter!(PATH_METRIC, "path" => "fast"),
            router: counter!(PATH_METRIC, "path" => "router"),
            failures: FailureLog::default(),
        }
    }

    /// Measures nothing for anybody to see.
    #[must_use]
    pub fn uncounted() -> Self {
        Self {
            counted: false,
            in_flight: Gauge::noop(),
            fast: Counter::noop(),
            router: Counter::noop(),
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
            let latencies = self.routes.iter();
            let latencies = latencies.map(|(route, metrics)| (route.name(), &metrics.latency));
            // Nothing fails to be written to memory.
            let _ = latency::render(latencies, out);
        }
    }

    /// How many requests for grades were answered, counted as long as this is.
    #[must_use]
    pub fn answered(&self) -> Answered {
        self.answered.clone()
    }

    /// How long the requests for one grade and the single writes took; `None` where that is not counted.
    pub(super) fn reads_and_writes(&self) -> Option<[Counts; 2]> {
        let counts = |route| self.routes[route].latency.counts();
        self.counted.then(|| [Route::Get, Route::Set].map(counts))
    }

    /// Measures a `GET /get` on the fast path.
    pub(super) fn fast_get(&self, found: bool, started: Instant, connection: &Connection) {
        connection.begin();
        let status = match found {
            true => StatusCode::OK,
            false => StatusCode::NOT_FOUND,
        };
        self.fast.increment(1);
        self.end(Route::Get, status, started, connection);
    }

    /// Measures a `POST /set` on the fast path; returns the time.
    pub(super) fn fast_set(&self, started: Instant, connection: &Connection) -> Instant {
        self.fast.increment(1);
        self.end(Route::Set, StatusCode::NO_CONTENT, started, connection)
    }

    /// A request ends: what time it is.
    fn end(
        &self,
        route: Route,
        status: StatusCode,
        started: Instant,
        connection: &Connection,
    ) -> Instant {
        // The clock is read once for all.
        let now = Instant::now();
        connection.end_at(now);
        if route.is_hot() {
            self.answered.0.fetch_add(1, Ordering::Relaxed);
        }
        self.count(route, status, now - started);
        now
    }

    #[expect(
        clippy::indexing_slicing,
        reason = "no handler answers with a status above 599"
    )]
    fn count(&self, route: Route, status: StatusCode, took: Duration) {
        if !self.counted {
            return;
        }
        let route = &self.routes[route];
        // Refusals are quick: they would make the latency look better than it is.
        if !status.is_server_error() {
            route.latency.record(took);
        }
        let status = status.as_u16();
        route.requests[usize::from(status - STATUS_MIN)]
            .get_or_init(|| (route.make)(status))
            .increment(1);
    }

    /// Counts a `GET /get` that took so long.
    #[cfg(test)]
    pub(super) fn count_read(&self, took: Duration) {
        self.count(Route::Get, StatusCode::OK, took);
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

/// The error of a request on the fast path, which hyper reports, and when the request began.
pub(super) type FailedFast = (ApiError, Instant);

/// The service of one connection: a port's router, instrumented.
pub(super) struct Instrumented {
    pub(super) router: Router,
    pub(super) metrics: Arc<HttpMetrics>,
    pub(super) connection: Arc<Connection>,
    /// The error of the first request, if it was executed on the fast path.
    pub(super) failed: Cell<Option<FailedFast>>,
}

impl hyper::service::Service<Request<Incoming>> for Instrumented {
    type Response = http::Response<ResponseBody>;
    type Error = Infallible;
    type Future = InstrumentedFuture;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let started = Instant::now();
        let route = Route::of_path(request.uri().path());
        let connection = Arc::clone(&self.connection);
        connection.begin();
        connection.exchange_begins(request.body().is_end_stream());
        let mut context = RequestContext {
            started,
            route,
            request_id: request_id::sent(request.headers()),
            // Replicas ask each other so whether they would give a backup.
            head: request.method() == Method::HEAD,
        };
        let response = if let Some((error, started)) = self.failed.take() {
            context.started = started;
            let mut response = error.into_response();
            if connection.drains() {
                // hyper does not know it yet.
                let close = HeaderValue::from_static("close");
                response.headers_mut().insert(CONNECTION, close);
            }
            ResponseFuture::Ready {
                response: Some(response),
            }
        } else {
            let mut request = request.map(|body| {
                let connection = Arc::clone(&connection);
                Body::new(RequestBody { body, connection })
            });
            // A backup tells its connection when its body begins and ends.
            if route == Route::Backup {
                request.extensions_mut().insert(Arc::clone(&connection));
            }
            let response = self.router.clone().call(request);
            ResponseFuture::Router {
                response: AssertUnwindSafe(response).catch_unwind(),
            }
        };
        let running = Running {
            in_flight: InFlight::begin(&self.metrics),
            connection,
            context,
            answered: false,
        };
        InstrumentedFuture { response, running }
    }
}

type RouterFuture = <Router as Service<Request<Body>>>::Future;

pin_project_lite::pin_project! {
    pub(super) struct InstrumentedFuture {
        #[pin]
        response: ResponseFuture,
        running: Running,
    }
}

pin_project_lite::pin_project! {
    #[project = ResponseProjection]
    enum ResponseFuture {
        Ready { response: Option<Response> },
        Router { #[pin] response: CatchUnwind<AssertUnwindSafe<RouterFuture>> },
    }
}

impl Future for ResponseFuture {
    type Output = Response;

    #[expect(clippy::expect_used, reason = "the contract of `Future`")]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Response> {
        match self.project() {
            ResponseProjection::Ready { response } => {
                Poll::Ready(response.take().expect("hyper polls a response once"))
            }
            ResponseProjection::Router { response } => response.poll(cx).map(|response| {
                match response {
                    Ok(Ok(response)) => response,
                    Ok(Err(never)) => match never {},
                    // The panic hook has logged it.
                    Err(_panic) => internal(),
                }
            }),
        }
    }
}

fn internal() -> Response {
    ApiError::Internal.into_response()
}

/// A request's body, which tells the connection when it was read to its end.
struct RequestBody {
    body: Incoming,
    connection: Arc<Connection>,
}

impl HttpBody for RequestBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let frame = std::task::ready!(Pin::new(&mut self.body).poll_frame(cx));
        if frame.is_none() || self.body.is_end_stream() {
            self.connection.request_read();
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A response's body, which tells the connection when hyper has taken all of it.
pub(super) struct ResponseBody {
    body: Body,
    connection: Arc<Connection>,
}

impl Drop for ResponseBody {
    fn drop(&mut self) {
        self.connection.response_taken();
    }
}

impl HttpBody for ResponseBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A request that is being answered.
struct RequestContext {
    started: Instant,
    route: Route,
    /// What the client calls it.
    request_id: Option<HeaderValue>,
    head: bool,
}

impl RequestContext {
    /// Measures the response, and names it.
    fn answered(
        &mut self,
        response: &mut Response,
        metrics: &HttpMetrics,
        connection: &Connection,
    ) {
        if let Some(route) = response.extensions().get() {
            self.route = *route;
        }
        let now = metrics.end(self.route, response.status(), self.started, connection);
        metrics.router.increment(1);
        self.name(response, now - self.started, &metrics.failures);
    }

    /// Adds the request's id to the response, where it has or needs one, and logs a failure.
    fn name(&mut self, response: &mut Response, took: Duration, failures: &FailureLog) {
        let status = response.status();
        let failed = status.is_client_error() || status.is_server_error();
        let sent = self.request_id.take();
        if sent.is_none() && !failed && self.route.is_hot() {
            return;
        }
        let request_id = sent.unwrap_or_else(request_id::made);
        if let Some(failure) = response.extensions_mut().remove::<Failure>() {
            let failed = Failed {
                route: self.route.name(),
                status,
                request_id: &request_id,
                took,
                expected: self.head || self.route.is_ops(),
            };
            failures.tell(&failed, &failure);
        }
        response.headers_mut().insert(X_REQUEST_ID, request_id);
    }
}

/// A request that has started; ends when dropped, so that one whose client went away ends too.
struct Running {
    in_flight: InFlight,
    connection: Arc<Connection>,
    context: RequestContext,
    answered: bool,
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.answered {
            self.connection.end();
        }
    }
}

impl Future for InstrumentedFuture {
    type Output = Result<http::Response<ResponseBody>, Infallible>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let mut response = std::task::ready!(this.response.poll(cx));
        let Running {
            context,
            in_flight,
            connection,
            answered,
        } = this.running;
        *answered = true;
        context.answered(&mut response, &in_flight.0, connection);
        let connection = Arc::clone(connection);
        Poll::Ready(Ok(response.map(|body| ResponseBody { body, connection })))
    }
}
