//! How many threads to use.

use std::thread;

/// With fewer rows, about a chunk, another thread costs more than it saves.
const ROWS_PER_THREAD: u64 = 8192;

/// The number of threads for about `rows` rows.
pub(super) fn threads_for(rows: u64) -> usize {
    let cores = thread::available_parallelism().map_or(2, usize::from);
    let useful = usize::try_from(1 + rows / ROWS_PER_THREAD).unwrap_or(usize::MAX);
    cores.min(useful)
}
