//! What the machine gives this process: memory, and room on a disk.

use std::fmt;
use std::fs;
use std::io;
use std::path::Path;

use rustix::fs::statvfs;
use rustix::param::page_size;
use rustix::process::{Resource, getrlimit};
use rustix::system::sysinfo;

/// Room on the file system of a directory, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// What a process without privileges may still write.
    pub free: u64,
    /// How much there is in all.
    pub size: u64,
}

/// The room where `dir` is. It asks the file system, which may be one that takes its time.
///
/// # Errors
/// The directory is not there, or not to be had.
pub fn room_in(dir: &Path) -> io::Result<Room> {
    let stat = statvfs(dir)?;
    Ok(Room {
        free: stat.f_bavail * stat.f_frsize,
        size: stat.f_blocks * stat.f_frsize,
    })
}

/// What ends a process that takes more memory than that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryLimit {
    /// The limit.
    pub bytes: u64,
    /// Whose it is.
    pub by: LimitedBy,
}

/// Whose a limit of memory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LimitedBy {
    /// There is no more.
    Machine,
    /// A control group's: the kernel kills the process.
    ControlGroup,
    /// `ulimit -v`: the process aborts when an allocation fails.
    AddressSpace,
}

impl fmt::Display for MemoryLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.by {
            LimitedBy::Machine => "the memory of the machine",
            LimitedBy::ControlGroup => "the memory limit of the control group",
            LimitedBy::AddressSpace => "the limit of the address space (ulimit -v)",
        })
    }
}

/// How much memory this process may take: the lowest limit of its control groups, the memory of the
/// machine or the limit of its address space, whichever is the least.
#[must_use]
pub fn memory_limit() -> MemoryLimit {
    let info = sysinfo();
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    lowest(
        info.totalram.saturating_mul(info.mem_unit.into()),
        group_limit(&groups, Path::new("/sys/fs/cgroup")),
        getrlimit(Resource::As).current,
    )
}

fn lowest(machine: u64, group: Option<u64>, address_space: Option<u64>) -> MemoryLimit {
    let limits = [
        (Some(machine), LimitedBy::Machine),
        (group, LimitedBy::ControlGroup),
        (address_space, LimitedBy::AddressSpace),
    ];
    let mut lowest = MemoryLimit {
        bytes: u64::MAX,
        by: LimitedBy::Machine,
    };
    for (bytes, by) in limits {
        if let Some(bytes) = bytes.filter(|bytes| *bytes < lowest.bytes) {
            lowest = MemoryLimit { bytes, by };
        }
    }
    lowest
}

/// What a process takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProcessMemory {
    /// In memory, in bytes.
    pub resident: u64,
    /// Addresses that are mapped, in memory or not, in bytes.
    pub address_space: u64,
}

impl ProcessMemory {
    /// What a limit of that kind counts.
    #[must_use]
    pub fn counted_by(self, limit: LimitedBy) -> u64 {
        match limit {
            LimitedBy::Machine | LimitedBy::ControlGroup => self.resident,
            LimitedBy::AddressSpace => self.address_space,
        }
    }
}

/// What this process takes now; `None` where `/proc` is not mounted.
#[must_use]
pub fn process_memory() -> Option<ProcessMemory> {
    let statm = fs::read_to_string("/proc/self/statm").ok()?;
    let mut pages = statm
        .split(' ')
        .map_while(|pages| pages.parse::<u64>().ok());
    let page = page_size() as u64;
    let (address_space, resident) = (pages.next()?, pages.next()?);
    Some(ProcessMemory {
        resident: resident * page,
        address_space: address_space * page,
    })
}

/// The lowest limit of the control groups that `groups`, a `/proc/PID/cgroup`, names, and of those
/// above them, below `mounts`. In a container that sees none but its own, its group is the top.
fn group_limit(groups: &str, mounts: &Path) -> Option<u64> {
    let lines = groups.lines().filter_map(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        Some((parts.next()?, parts.next()?))
    });
    let limits = lines.filter_map(|(controllers, group)| {
        let (top, file) = match controllers {
            // Version 2, and where it stands beside version 1 it has no memory controller.
            "" => (mounts.to_owned(), "memory.max"),
            "memory" => (mounts.join("memory"), "memory.limit_in_bytes"),
            _ => return None,
        };
        let group = top.join(group.trim_start_matches('/'));
        // What a container's own group is called outside is not to be found inside, but the top is.
        let above = group.ancestors().take_while(|dir| dir.starts_with(&top));
        above
            .filter_map(|dir| fs::read_to_string(dir.join(file)).ok()?.trim().parse().ok())
            .min()
    });
    limits.min()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::TempDir;

    fn mounts(files: &[(&str, &str)]) -> TempDir {
        let mounts = tempfile::tempdir().unwrap();
        for (file, text) in files {
            let path = mounts.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        mounts
    }

    #[test]
    fn the_lowest_limit_of_a_group_and_those_above_it_counts() {
        let two = mounts(&[
            ("memory.max", "9000\n"),
            ("system.slice/memory.max", "2000\n"),
            ("system.slice/gradestore.service/memory.max", "max\n"),
            ("system.slice/other.service/memory.max", "1\n"),
        ]);
        let limit = |groups| group_limit(groups, two.path());
        assert_eq!(
            limit("0::/system.slice/gradestore.service\n"),
            Some(2000),
            "the slice's"
        );
        assert_eq!(limit("0::/\n"), Some(9000), "a container's own");
        assert_eq!(
            limit("0::/not/seen/in/here\n"),
            Some(9000),
            "a container that is told its name outside"
        );
        assert_eq!(limit(""), None);
        assert_eq!(limit("0::/../../etc\n"), Some(9000));
    }

    #[test]
    fn version_1_is_asked_too() {
        let one = mounts(&[
            ("memory/memory.limit_in_bytes", "9223372036854771712\n"),
            ("memory/pod/memory.limit_in_bytes", "3000\n"),
            ("cpu/pod/memory.limit_in_bytes", "1\n"),
        ]);
        let groups = "5:cpu:/pod\n4:memory:/pod\n0::/\n";
        assert_eq!(group_limit(groups, one.path()), Some(3000));
        assert_eq!(
            group_limit("4:memory:/\n", one.path()),
            Some(i64::MAX as u64 & !4095)
        );
    }

    #[test]
    fn the_lowest_limit_counts_and_decides_what_is_counted() {
        let limit = |machine, group, address_space| {
            let limit = lowest(machine, group, address_space);
            let memory = ProcessMemory {
                resident: 1,
                address_space: 2,
            };
            (limit.bytes, memory.counted_by(limit.by))
        };
        assert_eq!(limit(900, None, None), (900, 1));
        assert_eq!(limit(900, Some(300), Some(400)), (300, 1));
        assert_eq!(limit(900, Some(i64::MAX as u64 & !4095), None), (900, 1));
        assert_eq!(limit(900, Some(300), Some(200)), (200, 2));
    }

    #[test]
    fn what_this_process_takes_grows_with_what_it_holds() {
        const BYTES: usize = 64 << 20;
        let before = process_memory().unwrap();
        let held = std::hint::black_box(vec![1_u8; BYTES]);
        let after = process_memory().unwrap();
        // Other tests run beside this one.
        assert!(after.resident > before.resident + (BYTES / 2) as u64);
        assert!(after.address_space >= after.resident);
        drop(held);
    }

    #[test]
    fn there_is_some_memory_and_room_only_where_a_directory_is() {
        assert!(memory_limit().bytes > 1 << 20);
        let here = tempfile::tempdir().unwrap();
        let room = room_in(here.path()).unwrap();
        assert!(0 < room.free && room.free <= room.size, "{room:?}");
        assert!(room_in(&here.path().join("nowhere")).is_err());
    }
}
