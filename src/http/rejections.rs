//! Counts rejected requests for the status of the node, because a metric can't be read.

use std::sync::atomic::{AtomicU64, Ordering};

use http::StatusCode;

use super::route::Route;

/// Responses of the read and write port with an error. A 404 does not count: a read of an unknown
/// user is no mistake. The ops port does not count either: a health check is answered with 503.
#[derive(Default)]
pub(super) struct Rejections {
    client_errors: AtomicU64,
    server_errors: AtomicU64,
}

impl Rejections {
    pub(super) fn record(&self, route: Route, status: StatusCode) {
        let errors = match status {
            StatusCode::NOT_FOUND => return,
            _ if route.is_ops() => return,
            _ if status.is_client_error() => &self.client_errors,
            _ if status.is_server_error() => &self.server_errors,
            _ => return,
        };
        errors.fetch_add(1, Ordering::Relaxed);
    }

    /// Client errors and server errors.
    pub(super) fn counts(&self) -> [u64; 2] {
        [&self.client_errors, &self.server_errors].map(|errors| errors.load(Ordering::Relaxed))
    }
}
