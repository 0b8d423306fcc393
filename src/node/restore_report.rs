//! Shows the progress of a restore: a bar on a terminal, otherwise log lines.

use std::io::{self, IsTerminal};
use std::time::Duration;

use crate::replication::RestoreTracker;
use crate::sys::progress::Bar;

/// How often a bar is updated.
const BAR_EVERY: Duration = Duration::from_millis(100);
/// How often a line is logged.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Shows every restore of `tracker`; never returns.
pub(super) async fn report(tracker: RestoreTracker) {
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
            let bar = bar.get_or_insert_with(|| Bar::new(restore.bytes_total, restore.started));
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
