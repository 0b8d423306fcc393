//! The signals of a node, apart from those that stop it.

use std::io;

use rustix::process::Signal;
use tokio::signal::unix::{self, SignalKind, signal};

/// Signals that have no meaning for a node, and whose default ends the process.
const IGNORED: [(Signal, &str); 7] = [
    (Signal::USR1, "SIGUSR1"),
    (Signal::USR2, "SIGUSR2"),
    (Signal::ALARM, "SIGALRM"),
    (Signal::VTALARM, "SIGVTALRM"),
    (Signal::PROF, "SIGPROF"),
    (Signal::IO, "SIGIO"),
    (Signal::POWER, "SIGPWR"),
];

/// Calls `reload`, which may block, on each SIGHUP, and ignores other signals that would end the
/// process. Needs a runtime, whose tasks wait for the signals. To be called before the node opens
/// its data directory.
///
/// # Errors
/// The system does not accept a handler.
pub fn handle(reload: impl Fn() + Clone + Send + 'static) -> io::Result<()> {
    // The handler remains, so that a write beyond the limit of the file size (`ulimit -f`) fails
    // with an error. The signal is not logged, because the log may be the file that is too large.
    drop(receiver(Signal::XFSZ)?);
    for (number, name) in IGNORED {
        let mut received = receiver(number)?;
        tokio::spawn(async move {
            while received.recv().await.is_some() {
                tracing::info!(signal = name, "signal ignored");
            }
        });
    }
    let mut hangup = signal(SignalKind::hangup())?;
    tokio::spawn(async move {
        while hangup.recv().await.is_some() {
            let reloaded = tokio::task::spawn_blocking(reload.clone()).await;
            if let Err(error) = reloaded {
                tracing::error!(%error, "reload failed");
            }
        }
    });
    Ok(())
}

fn receiver(number: Signal) -> io::Result<unix::Signal> {
    signal(SignalKind::from_raw(number.as_raw()))
}
