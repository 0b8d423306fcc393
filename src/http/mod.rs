//! The three ports.
//!
//! | port | route | module |
//! | --- | --- | --- |
//! | write | `POST /set` `DELETE /set` | [`set`], and [`set::ndjson`] for many patches in one body |
//! | write | `GET /backup` | [`backup`] |
//! | read | `GET /get`, `POST /get` | [`get`] |
//! | read, write | `GET /readyz` | [`health`] |
//! | ops | all | [`ops`]: health, metrics, status, status page, OpenAPI document |
//!
//! [`listener`] accepts connections and bounds them. [`fast`] answers most requests before hyper
//! reads them. `instrument` counts and times requests by `route`, `request_id` identifies them, and
//! `error_log` logs those that failed. [`error::ApiError`] alone maps errors to statuses.

mod auth;
pub mod backup;
pub mod body;
mod common_headers;
mod connection;
pub mod error;
mod error_log;
pub mod fast;
pub mod get;
pub mod health;
pub mod host;
mod instrument;
mod latency;
pub mod listener;
pub mod ops;
mod rejections;
mod request_body;
mod request_id;
mod response_body;
mod route;
pub mod set;
mod unread_body;

pub use auth::Credentials;
pub use instrument::{HttpMetrics, RequestCount};

/// The upper bounds of this module's histograms, by name.
pub const BUCKETS: [(&str, &[f64]); 1] = [(backup::DURATION_METRIC, backup::DURATION_BUCKETS_S)];

pub use crate::replication::peer_client::{GRADE_NODE, GRADE_POSITION};
pub use set::patch::parse_patch;
