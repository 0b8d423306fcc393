//! The ops port: is it alive, is it ready, what does it hold, what does it measure.

use std::sync::Arc;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get};
use axum::{Json, Router};
use http::HeaderValue;
use http::header::CONTENT_TYPE;
use serde::Serialize;

use super::error::ApiError;
use crate::log::{Log, Seq};
use crate::readiness::Readiness;
use crate::replication::{Applied, Writer};
use crate::store::Store;
use crate::telemetry::Telemetry;

/// What the ops port tells of.
#[derive(Clone)]
pub struct OpsState {
    /// This process start's name.
    pub node: Arc<str>,
    /// The records.
    pub store: Store,
    /// How far they have come.
    pub applied: Applied,
    /// The log they come from.
    pub log: Arc<dyn Log>,
    /// The write queue.
    pub writer: Writer,
    /// Whether the replica may answer.
    pub readiness: Readiness,
    /// What is measured.
    pub telemetry: Arc<Telemetry>,
}

/// The answer of `GET /status`.
#[derive(Debug, Serialize)]
pub struct Status {
    /// This process start.
    pub node: Arc<str>,
    /// The program's version.
    pub version: &'static str,
    /// `ready`, or why not in one word.
    pub state: &'static str,
    /// Why not in a sentence.
    pub reason: Option<Arc<str>>,
    /// `memory`, …
    pub log_kind: &'static str,
    /// Which log `position` counts in.
    pub log_id: Box<str>,
    /// The last batch applied.
    pub position: Seq,
    /// The log's last batch.
    pub log_end: Seq,
    /// How many batches lie between.
    pub lag: u64,
    /// Records at `position`.
    pub records: usize,
    /// Their digest.
    pub digest: String,
    /// Patches that wait for a batch.
    pub queue: usize,
    /// Seconds since the process started.
    pub uptime_s: u64,
}

/// The port's routes.
pub fn routes(state: OpsState) -> Router {
    let getting = |handler: MethodRouter<OpsState>| {
        handler.fallback(|| async { ApiError::MethodNotAllowed("GET, HEAD") })
    };
    Router::new()
        .route("/livez", getting(get(|| async { "alive\n" })))
        .route("/readyz", getting(get(ready)))
        .route("/readyz/write", getting(get(ready_for_writes)))
        .route("/metrics", getting(get(metrics)))
        .route("/status", getting(get(status)))
        .fallback(|| async {
            ApiError::RouteUnknown("/livez, /readyz, /readyz/write, /metrics, /status")
        })
        .with_state(state)
}

async fn ready(State(state): State<OpsState>) -> Result<&'static str, ApiError> {
    state.readiness.reads()?;
    Ok("ready\n")
}

async fn ready_for_writes(State(state): State<OpsState>) -> Result<&'static str, ApiError> {
    state.readiness.writes()?;
    Ok("ready\n")
}

async fn metrics(State(state): State<OpsState>) -> Response {
    let gauges = &state.telemetry.gauges;
    gauges.records.set(state.store.len() as f64);
    gauges.position.set(state.applied.seq() as f64);
    gauges.log_end.set(state.log.end() as f64);
    gauges
        .queue_patches
        .set(state.writer.queue_patches() as f64);
    gauges
        .ready
        .set(f64::from(u8::from(state.readiness.reads().is_ok())));
    let text_type = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    ([(CONTENT_TYPE, text_type)], state.telemetry.render()).into_response()
}

async fn status(State(state): State<OpsState>) -> Json<Status> {
    let at = state.applied.snapshot(&state.store);
    let log_end = state.log.end();
    let unready = state.readiness.writes().err();
    Json(Status {
        node: state.node,
        version: env!("CARGO_PKG_VERSION"),
        state: unready.as_ref().map_or("ready", |unready| unready.state),
        reason: unready.map(|unready| unready.reason),
        log_kind: state.log.kind(),
        log_id: state.log.id().0,
        position: at.seq,
        log_end,
        lag: log_end.saturating_sub(at.seq),
        records: at.records,
        digest: at.digest.to_string(),
        queue: state.writer.queue_patches(),
        uptime_s: state.telemetry.uptime().as_secs(),
    })
}
