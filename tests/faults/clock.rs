//! The clock of one process, which a test can shift.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use tempfile::TempDir;

/// Installed by tests/faults/install.sh.
const LIBRARY: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/.tools/faketime/libfaketimeMT.so.1"
);

/// A process's time of day. With `monotonic` also its monotonic clock: the kernel never sets that
/// clock, but the clock of a virtual machine stops while the machine is suspended.
pub(crate) struct Clock {
    dir: TempDir,
    monotonic: bool,
}

impl Clock {
    /// A correct clock, of which only the time of day can be shifted.
    pub(crate) fn new() -> Self {
        Self::create(false)
    }

    /// A correct clock, whose monotonic clock is shifted too.
    pub(crate) fn with_monotonic() -> Self {
        Self::create(true)
    }

    fn create(monotonic: bool) -> Self {
        let found = fs::exists(LIBRARY).unwrap();
        assert!(found, "{LIBRARY} is missing; run tests/faults/install.sh");
        let dir = tempfile::tempdir().unwrap();
        let clock = Self { dir, monotonic };
        clock.shift(0);
        clock
    }

    /// Sets the offset from the correct time.
    pub(crate) fn shift(&self, seconds: i64) {
        // The process may read the file at any time, so it is replaced in one step.
        let next = self.dir.path().join("next");
        fs::write(&next, format!("{seconds:+}s\n")).unwrap();
        fs::rename(next, self.file()).unwrap();
    }

    /// Makes the process of `command` use this clock.
    pub(crate) fn apply_to(&self, command: &mut Command) {
        command
            .env("LD_PRELOAD", LIBRARY)
            .env("FAKETIME_TIMESTAMP_FILE", self.file())
            .env("FAKETIME_NO_CACHE", "1");
        if !self.monotonic {
            command.env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        }
    }

    fn file(&self) -> PathBuf {
        self.dir.path().join("shift")
    }
}
