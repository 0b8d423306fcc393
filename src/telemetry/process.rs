//! The standard metrics of a process, from `/proc`.

use std::fs;
use std::io;

use metrics::{Unit, describe_gauge, gauge};
use rustix::param::clock_ticks_per_second;
use rustix::process::{Resource, getrlimit};

use crate::sys::host::process_memory;

/// Registers the metrics with the current recorder.
pub(super) fn describe() {
    describe_gauge!(
        "process_cpu_seconds_total",
        Unit::Seconds,
        "User and system CPU time."
    );
    describe_gauge!("process_threads", Unit::Count, "Threads.");
    describe_gauge!(
        "process_start_time_seconds",
        Unit::Seconds,
        "Start time in seconds since the Unix epoch."
    );
    describe_gauge!(
        "process_resident_memory_bytes",
        Unit::Bytes,
        "Resident memory."
    );
    describe_gauge!(
        "process_virtual_memory_bytes",
        Unit::Bytes,
        "Mapped addresses."
    );
    describe_gauge!("process_open_fds", Unit::Count, "Open file descriptors.");
    describe_gauge!(
        "process_max_fds",
        Unit::Count,
        "Limit of open file descriptors."
    );
}

/// Sets the metrics of the current recorder. What `/proc` does not show keeps its last value.
pub(super) fn collect() {
    if let Ok(stat) = fs::read_to_string("/proc/self/stat")
        && let Some(times) = Times::read(&stat)
    {
        let tick_s = 1.0 / clock_ticks_per_second() as f64;
        gauge!("process_cpu_seconds_total").set(times.cpu_ticks as f64 * tick_s);
        gauge!("process_threads").set(times.threads as f64);
        if let Ok(boot_s) = boot_time_s() {
            let start_s = boot_s + times.start_ticks as f64 * tick_s;
            gauge!("process_start_time_seconds").set(start_s);
        }
    }
    if let Some(memory) = process_memory() {
        gauge!("process_resident_memory_bytes").set(memory.resident as f64);
        gauge!("process_virtual_memory_bytes").set(memory.address_space as f64);
    }
    if let Ok(open) = fs::read_dir("/proc/self/fd") {
        gauge!("process_open_fds").set(open.count() as f64);
    }
    let max_fds = getrlimit(Resource::Nofile).current;
    gauge!("process_max_fds").set(max_fds.map_or(f64::INFINITY, |max| max as f64));
}

/// Fields of `/proc/self/stat`, see proc(5).
#[derive(Debug, PartialEq)]
struct Times {
    cpu_ticks: u64,
    threads: u64,
    /// After the boot.
    start_ticks: u64,
}

impl Times {
    fn read(stat: &str) -> Option<Self> {
        // The name of the program comes second, in parentheses, and may hold anything.
        let (_, fields) = stat.rsplit_once(") ")?;
        let fields: Vec<_> = fields.split_ascii_whitespace().collect();
        // proc(5) counts from 1 and the name is its second field.
        let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
        Some(Self {
            cpu_ticks: field(14)? + field(15)?,
            threads: field(20)?,
            start_ticks: field(22)?,
        })
    }
}

/// The time of the boot, in seconds since the Unix epoch.
fn boot_time_s() -> io::Result<f64> {
    let stat = fs::read_to_string("/proc/stat")?;
    let line = stat.lines().find_map(|line| line.strip_prefix("btime "));
    line.and_then(|seconds| seconds.parse().ok())
        .ok_or_else(|| io::ErrorKind::InvalidData.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_name_with_spaces_and_parentheses_is_skipped() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 99 0 0 0 12 30 0 0 20 0 4 0 5345078 1 2";
        let times = Times {
            cpu_ticks: 42,
            threads: 4,
            start_ticks: 5_345_078,
        };
        assert_eq!(Times::read(stat), Some(times));
        assert_eq!(Times::read("7 (a"), None);
        assert_eq!(Times::read("7 (a) S 1"), None);
    }
}
