//! Describes metrics and registers them with the current recorder.

use metrics::{Counter, Gauge, Histogram};

/// Describes a gauge and registers it with the current recorder.
pub(super) fn gauge(name: &'static str, help: &'static str) -> Gauge {
    metrics::describe_gauge!(name, help);
    metrics::gauge!(name)
}

/// Describes a counter and registers it with the current recorder.
pub(super) fn counter(name: &'static str, help: &'static str) -> Counter {
    metrics::describe_counter!(name, help);
    metrics::counter!(name)
}

/// Describes a histogram and registers it with the current recorder.
pub(super) fn histogram(name: &'static str, help: &'static str) -> Histogram {
    metrics::describe_histogram!(name, help);
    metrics::histogram!(name)
}
