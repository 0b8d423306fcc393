//! The three ports.
//!
//! | port | route | module |
//! | --- | --- | --- |
//! | write | `POST /set` | [`mod@write`] |
//! | write | `GET /backup` | [`backup`] |
//! | read | `GET /get` | [`read`] |
//! | ops | `GET /livez` `/readyz` `/readyz/write` `/metrics` `/status` | [`ops`] |
//!
//! [`listener`] takes connections and bounds them, `observe` counts and times requests,
//! [`error::ApiError`] alone maps what can go wrong to statuses.

mod answer;
mod auth;
pub mod backup;
pub mod error;
pub mod listener;
mod observe;
pub mod ops;
mod patch_body;
pub mod read;
pub mod write;

pub use answer::{Answer, AnswerBody};
pub use auth::Credentials;
pub use observe::HttpMetrics;

/// The upper bounds of this room's histograms, by name.
pub const BUCKETS: [(&str, &[f64]); 2] = [
    (observe::LATENCY_METRIC, observe::LATENCY_BUCKETS_S),
    (backup::DURATION_METRIC, backup::DURATION_BUCKETS_S),
];

pub use crate::remote::{GRADE_NODE, GRADE_POSITION};
pub use patch_body::parse_patch;
