//! Log lines on standard error.

use std::io::{self, IsTerminal};
use std::str::FromStr;

use tracing_subscriber::Layer;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// The format of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// Human-readable
    Text,
    /// One JSON object per line
    Json,
}

/// Sends log lines to standard error, from level `info` up or as `RUST_LOG` says
/// (`RUST_LOG=gradestore=debug`).
pub fn init_logs(format: LogFormat) {
    let rust_log = std::env::var("RUST_LOG").unwrap_or_default();
    let targets = match rust_log.is_empty() {
        true => Ok(default_targets()),
        false => Targets::from_str(&rust_log),
    };
    let (targets, invalid) = match targets {
        Ok(targets) => (targets, None),
        Err(error) => (default_targets(), Some(error)),
    };
    let lines = tracing_subscriber::fmt::layer().with_writer(io::stderr);
    let lines = match format {
        LogFormat::Text => lines.with_ansi(io::stderr().is_terminal()).boxed(),
        LogFormat::Json => lines
            .json()
            .flatten_event(true)
            .with_current_span(false)
            .boxed(),
    };
    tracing_subscriber::registry()
        .with(lines)
        .with(targets)
        .init();
    if let Some(error) = invalid {
        tracing::warn!(value = rust_log, %error, "RUST_LOG is invalid; logging from level info up");
    }
}

/// Without the connection events of the NATS client, which gradestore logs itself.
fn default_targets() -> Targets {
    use tracing::Level;
    let targets = Targets::new().with_default(Level::INFO);
    targets.with_target("async_nats", Level::WARN)
}
