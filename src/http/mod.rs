//! The three ports.
//!
//! | port | route | module |
//! | --- | --- | --- |
//! | write | `POST /set` `DELETE /set` | [`mod@write`], and [`lines`] for many patches at once |
//! | write | `GET /backup` | [`backup`] |
//! | read | `GET /get` | [`read`] |
//! | ops | `GET /livez` `/readyz` `/readyz/write` `/metrics` | [`ops`] |
//! | ops | `GET /status` `/` | [`status`], `page` |
//! | ops | `GET /openapi.json` | `openapi` |
//!
//! [`listener`] takes connections and bounds them, [`plain`] answers most requests before hyper sees them,
//! `observe` counts and times requests (`latency`), [`traffic`] knows the last seconds of that,
//! `request_id` names them, `failures` logs those that failed,
//! [`error::ApiError`] alone maps what can go wrong to statuses.

mod answer;
mod auth;
pub mod backup;
pub mod error;
mod failures;
pub mod fast;
pub mod get;
mod instrument;
mod latency;
pub mod listener;
pub mod ops;
mod request_id;
pub mod set;

pub use answer::{Answer, AnswerBody};
pub use auth::Credentials;
pub use instrument::{Answered, HttpMetrics};

/// The upper bounds of this room's histograms, by name.
pub const BUCKETS: [(&str, &[f64]); 1] = [(backup::DURATION_METRIC, backup::DURATION_BUCKETS_S)];

pub use crate::replication::peer_client::{GRADE_NODE, GRADE_POSITION};
pub use set::body::parse_patch;
