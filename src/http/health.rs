//! Health checks: 200 if the node serves reads or accepts writes, otherwise 503 with the reason.
//!
//! The ops port has one for reads and one for writes. The read and the write port have one each, for
//! load balancers that check the port to which they send requests.

use axum::Router;
use axum::routing::{MethodRouter, get};

use super::error::ApiError;
use crate::log::Log;
use crate::replication::state::{NodeState, Readiness, Unready};

/// Whether a node with this readiness and log accepts writes.
///
/// # Errors
/// Why not. The log may reject writes while the node serves reads.
pub fn check_writable(readiness: &Readiness, log: &dyn Log) -> Result<(), Unready> {
    readiness.check()?;
    match log.unwritable() {
        Some(reason) => Err(Unready {
            state: NodeState::ReadOnly,
            reason,
        }),
        None => Ok(()),
    }
}

/// The health check of the read or the write port, which calls `check`.
pub fn routes(check: impl Fn() -> Result<(), Unready> + Clone + Send + Sync + 'static) -> Router {
    Router::new().route("/readyz", readyz(check))
}

/// A health check that calls `check`.
pub(super) fn readyz<S: Clone + Send + Sync + 'static>(
    check: impl Fn() -> Result<(), Unready> + Clone + Send + Sync + 'static,
) -> MethodRouter<S> {
    let answer = move || {
        let checked = check();
        async move { checked.map(|()| "ready\n").map_err(ApiError::from) }
    };
    get(answer).fallback(|| async { ApiError::MethodNotAllowed("GET, HEAD") })
}
