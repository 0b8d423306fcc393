//! The HTTP API of one node.

pub(crate) mod delete;
pub(crate) mod ndjson;
pub(crate) mod set;

mod concurrency;
mod connection_limits;
mod fast_path;
mod get;
mod host;
mod log_stalls;
mod malformed_requests;
mod openapi;
#[cfg(feature = "test-all")]
mod schemathesis;
mod unread_bodies;
