//! The signals that end a client command.

use std::fs;
use std::io;

use crate::sys::signals::{
    CRASH, HANGUP, STOP, Signals, catch_file_size_signal, numbered, unused_signals,
};

/// Resolves at the first signal whose default would end the process, so that the command can remove
/// its temporary file. A signal that was ignored at the start stays ignored, as `nohup` expects.
///
/// # Errors
/// The system does not accept a handler.
pub fn interrupted() -> io::Result<impl Future<Output = ()>> {
    catch_file_size_signal()?;
    let ignored = ignored_signals();
    let signals = numbered(&STOP)
        .chain(numbered(&[HANGUP]))
        .chain(numbered(&CRASH))
        .chain(unused_signals())
        .filter(|(number, _)| ignored >> (number - 1) & 1 == 0);
    let mut signals = Signals::handle(signals)?;
    Ok(async move {
        signals.next().await;
    })
}

/// One bit per ignored signal, from bit 0 for signal 1. 0 where there is no `/proc`.
fn ignored_signals() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = ignored.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok());
    ignored.unwrap_or(0)
}
