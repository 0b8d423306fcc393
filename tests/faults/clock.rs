//! A clock for one process, set by the test.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use tempfile::TempDir;

/// Installed by tests/faults/install.sh.
const LIBRARY: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/.tools/faketime/libfaketimeMT.so.1"
);

/// The wall clock of a process, and with `monotonic` its monotonic clock, too: that one never
/// jumps, but stops with a suspended virtual machine.
pub(crate) struct Clock {
    dir: TempDir,
    monotonic: bool,
}

impl Clock {
    /// A correct clock.
    pub(crate) fn new() -> Self {
        Self::with(false)
    }

    /// A correct clock that can shift the monotonic clock, too.
    pub(crate) fn with_monotonic() -> Self {
        Self::with(true)
    }

    fn with(monotonic: bool) -> Self {
        let found = fs::exists(LIBRARY).unwrap();
        assert!(
            found,
            "{LIBRARY} is missing; tests/faults/install.sh gets it"
        );
        let dir = tempfile::tempdir().unwrap();
        let clock = Self { dir, monotonic };
        clock.shift(0);
        clock
    }

    /// Shifts the time by `seconds` from the real time.
    pub(crate) fn shift(&self, seconds: i64) {
        // Atomic, because the process reads the file at any time.
        let next = self.dir.path().join("next");
        fs::write(&next, format!("{seconds:+}s\n")).unwrap();
        fs::rename(next, self.file()).unwrap();
    }

    /// Makes `command` use this clock.
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
