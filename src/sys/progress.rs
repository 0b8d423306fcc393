//! A progress bar on a terminal.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::time::Instant;

/// A bar with the transferred rows and bytes; invisible if stderr is not a terminal.
pub struct Bar {
    bar: ProgressBar,
    started: Instant,
}

impl Bar {
    /// A bar for a transfer of `bytes_total` bytes (0 if unknown) since `started`.
    #[must_use]
    pub fn new(bytes_total: u64, started: Instant) -> Self {
        let bar = ProgressBar::with_draw_target(
            (bytes_total > 0).then_some(bytes_total),
            ProgressDrawTarget::stderr(),
        )
        .with_elapsed(started.elapsed());
        let template = match bytes_total {
            0 => "{spinner} {bytes} {bytes_per_sec} {msg}",
            _ => "{bar:30} {percent}% {bytes}/{total_bytes} {bytes_per_sec} {msg} {eta} left",
        };
        // The templates are valid constants.
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        Self { bar, started }
    }

    /// Updates the bar.
    pub fn set(&self, rows: u64, bytes: u64) {
        let elapsed_s = self.started.elapsed().as_secs_f64().max(0.001);
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
