//! Signals that would end the process.

use std::future::poll_fn;
use std::io;
use std::ops::RangeInclusive;
use std::task::Poll;

use rustix::process::Signal;
use tokio::signal::unix::{self, SignalKind, signal};

/// Those that ask a process to stop. A terminal sends all but SIGTERM.
pub const STOP: [(Signal, &str); 3] = [
    (Signal::TERM, "SIGTERM"),
    (Signal::INT, "SIGINT"),
    (Signal::QUIT, "SIGQUIT"),
];
/// The terminal is gone, or a daemon should reload its configuration.
pub const HANGUP: (Signal, &str) = (Signal::HUP, "SIGHUP");
/// Those that report a bug in the process or end a process that hangs. SIGSEGV, SIGBUS, SIGFPE and
/// SIGILL may have no handler.
pub const CRASH: [(Signal, &str); 3] = [
    (Signal::ABORT, "SIGABRT"),
    (Signal::TRAP, "SIGTRAP"),
    (Signal::SYS, "SIGSYS"),
];
/// Those that gradestore does not use, apart from real-time signals.
const UNUSED: [(Signal, &str); 9] = [
    (Signal::USR1, "SIGUSR1"),
    (Signal::USR2, "SIGUSR2"),
    (Signal::ALARM, "SIGALRM"),
    (Signal::STKFLT, "SIGSTKFLT"),
    (Signal::XCPU, "SIGXCPU"),
    (Signal::VTALARM, "SIGVTALRM"),
    (Signal::PROF, "SIGPROF"),
    (Signal::IO, "SIGIO"),
    (Signal::POWER, "SIGPWR"),
];
/// SIGRTMIN to SIGRTMAX: those that the C library does not use.
const REAL_TIME: RangeInclusive<i32> = 34..=64;

/// A signal's number and name.
pub type Named = (i32, String);

/// The numbers of these signals, with their names.
pub fn numbered(signals: &[(Signal, &str)]) -> impl Iterator<Item = Named> {
    let numbered = |(signal, name): &(Signal, &str)| (signal.as_raw(), (*name).to_owned());
    signals.iter().map(numbered)
}

/// The signals that gradestore does not use and whose default action ends the process.
pub fn unused_signals() -> impl Iterator<Item = Named> {
    let real_time = REAL_TIME.map(|number| {
        let name = format!("SIGRTMIN+{}", number - REAL_TIME.start());
        (number, name)
    });
    numbered(&UNUSED).chain(real_time)
}

/// Lets a write beyond the limit of the file size (`ulimit -f`) fail with an error instead of ending
/// the process, from now on.
///
/// # Errors
/// The system does not accept a handler.
pub fn catch_file_size_signal() -> io::Result<()> {
    // The handler remains.
    signal(SignalKind::from_raw(Signal::XFSZ.as_raw())).map(drop)
}

/// Receives signals instead of what they do by default.
pub struct Signals(Vec<(unix::Signal, String)>);

impl Signals {
    /// Handles these signals from now on. Needs a runtime.
    ///
    /// # Errors
    /// The system does not accept a handler.
    pub fn handle(signals: impl IntoIterator<Item = Named>) -> io::Result<Self> {
        let handle = |(number, name)| Ok((signal(SignalKind::from_raw(number))?, name));
        let handled = signals.into_iter().map(handle);
        handled.collect::<io::Result<_>>().map(Self)
    }

    /// Waits for the next signal and returns its name.
    pub async fn next(&mut self) -> &str {
        let position = poll_fn(|context| {
            let mut received = self.0.iter_mut();
            let ready = received.position(|(signal, _)| signal.poll_recv(context).is_ready());
            ready.map_or(Poll::Pending, Poll::Ready)
        });
        let position = position.await;
        self.0.get(position).map_or("", |(_, name)| name)
    }
}
