//! The signals of a node, apart from those that stop it.

use std::io;

use crate::sys::signals::{HANGUP, Signals, catch_file_size_signal, numbered, unused_signals};

/// Calls `reload`, which may block, on each SIGHUP, and ignores the signals that
/// gradestore does not use. Needs a runtime, whose tasks wait for the signals. To be called before the node opens its
/// data directory.
///
/// # Errors
/// The system does not accept a handler.
pub fn handle(reload: impl Fn() + Clone + Send + 'static) -> io::Result<()> {
    // Not logged, because the log may be the file that is too large.
    catch_file_size_signal()?;
    let mut ignored = Signals::handle(unused_signals())?;
    tokio::spawn(async move {
        loop {
            let signal = ignored.next().await;
            tracing::info!(signal, "signal ignored");
        }
    });
    let mut hangup = Signals::handle(numbered(&[HANGUP]))?;
    tokio::spawn(async move {
        loop {
            hangup.next().await;
            let reloaded = tokio::task::spawn_blocking(reload.clone()).await;
            if let Err(error) = reloaded {
                tracing::error!(%error, "reload failed");
            }
        }
    });
    Ok(())
}
