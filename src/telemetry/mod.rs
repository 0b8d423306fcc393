//! Logs and metrics.

mod logs;
mod metrics;
mod process;

pub use self::metrics::{ReplicationMetrics, Telemetry};
pub use logs::{LogFormat, init_logs};
