//! A clock that a test sets, for one process.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use tempfile::TempDir;

/// As tests/faults/install.sh puts it there.
const LIBRARY: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/.tools/faketime/libfaketimeMT.so.1"
);

/// What a process takes for the time of day, and what it measures durations by if that can stand
/// still: the kernel never sets that back or forth, but a guest's may stop with the guest.
pub(crate) struct Clock {
    dir: TempDir,
    monotonic: bool,
}

impl Clock {
    /// One that is right.
    pub(crate) fn new() -> Self {
        Self::with(false)
    }

    /// One that is right, and shifts durations too.
    pub(crate) fn that_can_stand_still() -> Self {
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

    /// From now on the time is so many seconds more than it is.
    pub(crate) fn shift(&self, seconds: i64) {
        // Never half a file: it is read all the time.
        let next = self.dir.path().join("next");
        fs::write(&next, format!("{seconds:+}s\n")).unwrap();
        fs::rename(next, self.file()).unwrap();
    }

    /// What `command` starts goes by this clock.
    pub(crate) fn show_to(&self, command: &mut Command) {
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
