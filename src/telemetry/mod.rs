//! Logs and metrics.

mod logs;
mod metrics;
mod process;
mod register;
mod wal_metrics;

pub use self::metrics::{ReplicationMetrics, Telemetry};
pub use logs::{LogFormat, init_logs};
