//! Logs and metrics.

mod logs;
mod metrics;

pub use self::metrics::{ReplicationMetrics, Telemetry};
pub use logs::{LogFormat, init_logs};
