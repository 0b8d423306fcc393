//! Counts and times every request, gives it an id, and answers a panic with 500.

use std::cell::Cell;
use std::convert::Infallible;
use std::future::Future;
use std::mem;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, HttpBody};
use axum::response::{IntoResponse, Response};
use futures_util::FutureExt;
use futures_util::future::{BoxFuture, CatchUnwind};
use http::header::CONNECTION;
use http::{HeaderValue, Method, Request, StatusCode};
use hyper::body::Incoming;
use metrics::{Counter, Gauge, counter, describe_counter, describe_gauge, gauge};
use tower::Service;

use super::body::check_transfer_encoding;
use super::common_headers::COMMON_HEADERS;
use super::connection::ConnectionState;
use super::error::ApiError;
use super::error_log::{ErrorDetail, ErrorLog, FailedRequest};
use super::host::Hosts;
use super::latency::{self, Latency, LatencyCounts};
use super::rejections::Rejections;
use super::request_body::RequestBody;
use super::request_id::{self, X_REQUEST_ID};
use super::response_body::ResponseBody;
use super::route::{PerRoute, Route};

const PATH_METRIC: &str = "gradestore_http_path_total";

/// Each status from 100 to 599 has a counter.
const STATUS_MIN: u16 = 100;
const STATUSES: usize = 500;

/// The number of answered requests for grades. Backups compare it with an earlier value, and slow down
/// while requests arrive. Clones share it.
#[derive(Clone, Default)]
pub struct RequestCount(Arc<AtomicU64>);

impl RequestCount {
    /// Requests since the start.
    pub(super) fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The metrics of requests.
pub struct HttpMetrics {
    request_count: RequestCount,
    /// Whether metrics other than `request_count` are recorded.
    enabled: bool,
    routes: PerRoute<RouteMetrics>,
    pub(super) rejections: Rejections,
    in_flight: Gauge,
    /// Requests that the fast path answered.
    fast: Counter,
    /// Requests that the router answered.
    router: Counter,
    error_log: ErrorLog,
}

struct RouteMetrics {
    latency: Latency,
    /// The counter of each status, registered when the status first occurs.
    requests: Box<[OnceLock<Counter>; STATUSES]>,
    /// Registers a counter with the recorder of the node.
    register: Box<dyn Fn(u16) -> Counter + Send + Sync>,
}

impl HttpMetrics {
    /// Registers the metrics with the current recorder, and later the counter of each route and status
    /// through `counter_of`.
    pub fn new(
        counter_of: impl Fn(&'static str, u16) -> Counter + Clone + Send + Sync + 'static,
    ) -> Self {
        describe_counter!(
            "gradestore_http_requests_total",
            "Answered requests, by route and status."
        );
        describe_gauge!(
            "gradestore_http_requests_in_flight",
            "Requests in progress."
        );
        describe_counter!(
            PATH_METRIC,
            "Answered requests, by path: fast, or router for those that took hyper and the router."
        );
        Self {
            request_count: RequestCount::default(),
            enabled: true,
            routes: PerRoute::new(|route| {
                let counter_of = counter_of.clone();
                RouteMetrics {
                    latency: Latency::default(),
                    requests: Box::new([const { OnceLock::new() }; STATUSES]),
                    register: Box::new(move |status| counter_of(route.name(), status)),
                }
            }),
            rejections: Rejections::default(),
            in_flight: gauge!("gradestore_http_requests_in_flight"),
            fast: counter!(PATH_METRIC, "path" => "fast"),
            router: counter!(PATH_METRIC, "path" => "router"),
            error_log: ErrorLog::default(),
        }
    }

    /// Records nothing but the number of requests.
    #[must_use]
    pub fn disabled() -> Self {
        Self {
            enabled: false,
            in_flight: Gauge::noop(),
            fast: Counter::noop(),
            router: Counter::noop(),
            ..Self::new(|_, _| Counter::noop())
        }
    }

    /// The counter of a route's responses with a status, from the current recorder.
    pub fn requests_counter(route: &'static str, status: u16) -> Counter {
        let status = status.to_string();
        counter!("gradestore_http_requests_total", "route" => route, "status" => status)
    }

    /// Appends the latency histograms, which the recorder does not have, in Prometheus' text format.
    pub fn render(&self, out: &mut String) {
        if self.enabled {
            let latencies = self.routes.iter();
            let latencies = latencies.map(|(route, metrics)| (route.name(), &metrics.latency));
            // Writing to a string can't fail.
            let _ = latency::render(latencies, out);
        }
    }

    /// The number of answered requests for grades; recorded even if these metrics are disabled.
    #[must_use]
    pub fn request_count(&self) -> RequestCount {
        self.request_count.clone()
    }

    /// The latencies of `GET /get` and of `POST /set` and `DELETE /set` of one user; `None` if
    /// disabled.
    pub(super) fn reads_and_writes(&self) -> Option<[LatencyCounts; 2]> {
        let counts = |route| self.routes[route].latency.counts();
        self.enabled.then(|| [Route::Get, Route::Set].map(counts))
    }

    /// Records a `GET /get` on the fast path.
    pub(super) fn record_fast_get(
        &self,
        found: bool,
        started: Instant,
        connection: &ConnectionState,
    ) {
        connection.begin();
        let status = match found {
            true => StatusCode::OK,
            false => StatusCode::NOT_FOUND,
        };
        self.fast.increment(1);
        self.finish(Route::Get, status, started, connection);
    }

    /// Records a `POST /set` on the fast path. Returns the current time.
    pub(super) fn record_fast_set(
        &self,
        started: Instant,
        connection: &ConnectionState,
    ) -> Instant {
        self.fast.increment(1);
        self.finish(Route::Set, StatusCode::NO_CONTENT, started, connection)
    }

    /// Records the end of a request. Returns the current time.
    fn finish(
        &self,
        route: Route,
        status: StatusCode,
        started: Instant,
        connection: &ConnectionState,
    ) -> Instant {
        // One reading of the clock for all uses.
        let now = Instant::now();
        connection.end_at(now);
        if route.is_hot() {
            self.request_count.0.fetch_add(1, Ordering::Relaxed);
        }
        self.record(route, status, now - started);
        now
    }

    #[expect(
        clippy::indexing_slicing,
        reason = "no handler answers with a status above 599"
    )]
    fn record(&self, route: Route, status: StatusCode, took: Duration) {
        if !self.enabled {
            return;
        }
        self.rejections.record(route, status);
        let route = &self.routes[route];
        // Errors are fast: they would make the latency look better than it is.
        if !status.is_server_error() {
            route.latency.record(took);
        }
        let status = status.as_u16();
        route.requests[usize::from(status - STATUS_MIN)]
            .get_or_init(|| (route.register)(status))
            .increment(1);
    }

    #[cfg(test)]
    pub(super) fn record_read(&self, took: Duration) {
        self.record(Route::Get, StatusCode::OK, took);
    }
}

/// Counts a request as in progress until it is dropped.
pub(super) struct InFlightGuard(Arc<HttpMetrics>);

impl InFlightGuard {
    pub(super) fn begin(metrics: &Arc<HttpMetrics>) -> Self {
        metrics.in_flight.increment(1.0);
        Self(Arc::clone(metrics))
    }
}

impl Drop for InFlightGuard {
    fn drop(&mut self) {
        self.0.in_flight.decrement(1.0);
    }
}

/// The error of a request on the fast path, which hyper reports, and the start of the request.
pub(super) type FastPathError = (ApiError, Instant);

/// The service of one connection: the port's router with metrics and request ids.
pub(super) struct Instrumented {
    pub(super) router: Router,
    pub(super) metrics: Arc<HttpMetrics>,
    pub(super) connection: Arc<ConnectionState>,
    pub(super) hosts: Hosts,
    /// The error of the first request, if it was executed on the fast path.
    pub(super) failed: Cell<Option<FastPathError>>,
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
            request_id: request_id::from_client(request.headers()),
            // Replicas use HEAD /backup to find out whether a peer is ready.
            head: request.method() == Method::HEAD,
        };
        let checked = self.hosts.check(&request);
        let checked = checked.and_then(|()| check_transfer_encoding(request.headers()));
        let request = RequestBody::of(request, &connection);
        let failed = match checked {
            Ok(()) => self.failed.take(),
            Err(error) => Some((error, started)),
        };
        let response = if let Some((error, started)) = failed {
            context.started = started;
            let mut response = error.into_response();
            if connection.is_draining() {
                // hyper does not know yet that the connection drains.
                close(&mut response);
            }
            ResponseFuture::Ready {
                response: Some(response),
            }
        } else {
            let mut request = request.map(Body::new);
            // A backup marks its connection as streaming.
            if route == Route::Backup {
                request.extensions_mut().insert(Arc::clone(&connection));
            }
            let response = self.router.clone().call(request);
            ResponseFuture::Router {
                response: AssertUnwindSafe(response).catch_unwind(),
            }
        };
        let running = RunningRequest {
            in_flight: InFlightGuard::begin(&self.metrics),
            connection,
            context,
            has_response: false,
        };
        InstrumentedFuture {
            response,
            discarding: None,
            running,
        }
    }
}

type RouterFuture = <Router as Service<Request<Body>>>::Future;

pin_project_lite::pin_project! {
    pub(super) struct InstrumentedFuture {
        #[pin]
        response: ResponseFuture,
        // Boxed, because it is rare and large.
        discarding: Option<Box<Discarding>>,
        running: RunningRequest,
    }
}

/// A response that waits until the rest of the request's body is discarded.
struct Discarding {
    response: Response,
    discarded: BoxFuture<'static, bool>,
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

/// The properties of a request that its metrics and log line need.
struct RequestContext {
    started: Instant,
    route: Route,
    /// The id that the client sent.
    request_id: Option<HeaderValue>,
    head: bool,
}

impl RequestContext {
    /// Records the response in the metrics, and adds the request's id to it.
    fn finish(
        &mut self,
        response: &mut Response,
        metrics: &HttpMetrics,
        connection: &ConnectionState,
    ) {
        if let Some(route) = response.extensions().get() {
            self.route = *route;
        }
        let now = metrics.finish(self.route, response.status(), self.started, connection);
        metrics.router.increment(1);
        for (name, value) in COMMON_HEADERS {
            response.headers_mut().insert(name, value);
        }
        self.add_request_id(response, now - self.started, &metrics.error_log);
    }

    /// Adds the request's id to the response, if the request has or needs one, and logs an error.
    fn add_request_id(&mut self, response: &mut Response, took: Duration, error_log: &ErrorLog) {
        let status = response.status();
        let failed = status.is_client_error() || status.is_server_error();
        let from_client = self.request_id.take();
        if from_client.is_none() && !failed && self.route.is_hot() {
            return;
        }
        let request_id = from_client.unwrap_or_else(request_id::generate);
        if let Some(error) = response.extensions_mut().remove::<ErrorDetail>() {
            let failed = FailedRequest {
                route: self.route.name(),
                status,
                request_id: &request_id,
                took,
                expected: self.head || self.route.is_ops(),
            };
            error_log.log(&failed, &error);
        }
        response.headers_mut().insert(X_REQUEST_ID, request_id);
    }
}

/// A request in progress. Dropping it ends the request, also if the client closed the connection.
struct RunningRequest {
    in_flight: InFlightGuard,
    connection: Arc<ConnectionState>,
    context: RequestContext,
    has_response: bool,
}

impl Drop for RunningRequest {
    fn drop(&mut self) {
        if !self.has_response {
            self.connection.end();
        }
    }
}

impl Future for InstrumentedFuture {
    type Output = Result<http::Response<ResponseBody>, Infallible>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let RunningRequest {
            context,
            in_flight,
            connection,
            has_response,
        } = this.running;
        let response = if let Some(discarding) = this.discarding {
            let is_complete = std::task::ready!(discarding.discarded.as_mut().poll(cx));
            let mut response = mem::take(&mut discarding.response);
            match is_complete {
                true => connection.request_read(),
                false => close(&mut response),
            }
            response
        } else {
            let mut response = std::task::ready!(this.response.poll(cx));
            *has_response = true;
            context.finish(&mut response, &in_flight.0, connection);
            if let Some(rest) = connection.take_unread() {
                let discarded = Box::pin(rest.discard());
                *this.discarding = Some(Box::new(Discarding {
                    response,
                    discarded,
                }));
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            response
        };
        let connection = Arc::clone(connection);
        Poll::Ready(Ok(response.map(|body| ResponseBody { body, connection })))
    }
}

/// Tells the client that the connection closes after this response.
fn close(response: &mut Response) {
    let close = HeaderValue::from_static("close");
    response.headers_mut().insert(CONNECTION, close);
}
