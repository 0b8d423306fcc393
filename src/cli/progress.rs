//! Progress for people: a bar where there is a terminal, a log line now and then where not.

use std::io::{self, IsTerminal};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::time::Instant;

use crate::replication::RestoreTracker;

/// How often a bar moves.
const BAR_EVERY: Duration = Duration::from_millis(100);
/// How often a line is logged.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Rows and bytes on their way; the bar shows on a terminal only.
pub struct Bar {
    bar: ProgressBar,
    begun: Instant,
}

impl Bar {
    /// Of `bytes_total` bytes, 0 where that is not known, on their way since `begun`.
    #[must_use]
    pub fn new(bytes_total: u64, begun: Instant) -> Self {
        let bar = ProgressBar::with_draw_target(
            (bytes_total > 0).then_some(bytes_total),
            ProgressDrawTarget::stderr(),
        )
        .with_elapsed(begun.elapsed());
        let template = match bytes_total {
            0 => "{spinner} {bytes} {bytes_per_sec} {msg}",
            _ => "{bar:30} {percent}% {bytes}/{total_bytes} {bytes_per_sec} {msg} {eta} left",
        };
        // The templates are constants that hold.
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        Self { bar, begun }
    }

    /// Shows how far it is.
    pub fn set(&self, rows: u64, bytes: u64) {
        let elapsed_s = self.begun.elapsed().as_secs_f64().max(0.001);
        self.bar.set_position(bytes);
        let rows_per_s = (rows as f64 / elapsed_s) as u64;
        self.bar
            .set_message(format!("{rows} rows {rows_per_s} rows/s"));
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// Shows every restore that `tracker` tells of; for ever.
pub async fn report(tracker: RestoreTracker) {
    let terminal = io::stderr().is_terminal();
    let mut every = tokio::time::interval(if terminal { BAR_EVERY } else { LINE_EVERY });
    every.tick().await;
    let mut bar: Option<Bar> = None;
    loop {
        every.tick().await;
        let running = tracker.current().filter(|restore| restore.took.is_none());
        let Some(restore) = running else {
            bar = None;
            continue;
        };
        let (rows, bytes) = (restore.progress.rows(), restore.progress.bytes());
        if terminal {
            let bar = bar.get_or_insert_with(|| Bar::new(restore.bytes_total, restore.begun));
            bar.set(rows, bytes);
        } else {
            tracing::info!(
                source = &*restore.source,
                rows,
                rows_expected = restore.progress.rows_expected(),
                bytes,
                rows_per_s = restore.rows_per_s() as u64,
                buffered_batches = restore.buffer.batches(),
                remaining_s = restore.remaining().map(|left| left.as_secs()),
                "restoring"
            );
        }
    }
}
