//! The signals that end a client command.

use std::fs;
use std::io;

use futures_util::future::select_all;
use rustix::process::Signal;
use tokio::signal::unix::{SignalKind, signal};

/// The signals after which a command removes its temporary file. Others end the process at once:
/// SIGKILL, those that report a bug in it, SIGPWR, SIGSTKFLT and the real-time signals.
const ENDING: [Signal; 11] = [
    Signal::HUP,
    Signal::INT,
    Signal::QUIT,
    Signal::USR1,
    Signal::USR2,
    Signal::ALARM,
    Signal::TERM,
    Signal::VTALARM,
    Signal::PROF,
    Signal::XCPU,
    Signal::IO,
];

/// Resolves at the first signal, so that the command can remove its temporary file. A signal that
/// was ignored at the start stays ignored, as `nohup` expects.
///
/// # Errors
/// The system does not accept a handler.
pub fn interrupted() -> io::Result<impl Future<Output = ()>> {
    // With a handler, a write beyond the limit of `ulimit -f` fails instead of ending the process.
    let _handled = signal(SignalKind::from_raw(Signal::XFSZ.as_raw()))?;
    let ignored = ignored_signals();
    let mut waiting = Vec::new();
    for ending in ENDING.map(Signal::as_raw) {
        if ignored >> (ending - 1) & 1 == 0 {
            let mut received = signal(SignalKind::from_raw(ending))?;
            waiting.push(Box::pin(async move { received.recv().await }));
        }
    }
    Ok(async move {
        match waiting.is_empty() {
            true => std::future::pending().await,
            false => drop(select_all(waiting).await),
        }
    })
}

/// One bit per ignored signal, from bit 0 for signal 1. 0 where there is no `/proc`.
fn ignored_signals() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = ignored.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok());
    ignored.unwrap_or(0)
}
