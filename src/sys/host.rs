//! The resources of this process: memory limits and disk space.

use std::fmt;
use std::fs;
use std::io;
use std::path::Path;

use rustix::fs::statvfs;
use rustix::param::page_size;
use rustix::process::{Resource, getrlimit};
use rustix::system::{sysinfo, uname};

/// The name of this machine, or of its container.
#[must_use]
pub fn host_name() -> String {
    uname().nodename().to_string_lossy().into_owned()
}

/// The space of a file system, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskSpace {
    /// Free space for unprivileged processes.
    pub free: u64,
    /// The size of the file system.
    pub size: u64,
}

/// The space of the file system that contains `dir`; `None` if the file system does not report it,
/// as ramfs and some that run in user space. Blocks if the file system is slow.
///
/// # Errors
/// The directory does not exist or can't be accessed.
pub fn disk_space(dir: &Path) -> io::Result<Option<DiskSpace>> {
    let stat = statvfs(dir)?;
    Ok((stat.f_blocks > 0).then(|| DiskSpace {
        free: stat.f_bavail.saturating_mul(stat.f_frsize),
        size: stat.f_blocks.saturating_mul(stat.f_frsize),
    }))
}

/// The lowest limit of the memory of this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryLimit {
    /// The limit.
    pub bytes: u64,
    /// What sets the limit.
    pub kind: MemoryLimitKind,
}

/// What sets a memory limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryLimitKind {
    /// The memory of the machine.
    Machine,
    /// A control group. Above its limit the kernel kills the process.
    ControlGroup,
    /// `ulimit -v`. Above it allocations fail, and the process aborts.
    AddressSpace,
}

impl fmt::Display for MemoryLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.kind {
            MemoryLimitKind::Machine => "the memory of the machine",
            MemoryLimitKind::ControlGroup => "the memory limit of the control group",
            MemoryLimitKind::AddressSpace => "the limit of the address space (ulimit -v)",
        })
    }
}

/// The lowest of the limits of the control groups, the memory of the machine, and the limit of the
/// address space.
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
        (Some(machine), MemoryLimitKind::Machine),
        (group, MemoryLimitKind::ControlGroup),
        (address_space, MemoryLimitKind::AddressSpace),
    ];
    let mut lowest = MemoryLimit {
        bytes: u64::MAX,
        kind: MemoryLimitKind::Machine,
    };
    for (bytes, kind) in limits {
        if let Some(bytes) = bytes.filter(|bytes| *bytes < lowest.bytes) {
            lowest = MemoryLimit { bytes, kind };
        }
    }
    lowest
}

/// The memory of a process, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProcessMemory {
    /// Resident memory.
    pub resident: u64,
    /// The mapped address space, resident or not.
    pub address_space: u64,
}

impl ProcessMemory {
    /// The memory that counts against a limit.
    #[must_use]
    pub fn counted_by(self, limit: MemoryLimitKind) -> u64 {
        match limit {
            MemoryLimitKind::Machine | MemoryLimitKind::ControlGroup => self.resident,
            MemoryLimitKind::AddressSpace => self.address_space,
        }
    }
}

/// The memory of this process; `None` if `/proc` is not mounted.
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

/// The lowest limit of the control groups in `groups` (the text of `/proc/PID/cgroup`) and of their
/// ancestors, read below `mounts`. In a container, only its own group is visible, as the root.
fn group_limit(groups: &str, mounts: &Path) -> Option<u64> {
    let lines = groups.lines().filter_map(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        Some((parts.next()?, parts.next()?))
    });
    let limits = lines.filter_map(|(controllers, group)| {
        let (top, file) = match controllers {
            // Version 2. Beside version 1 it has no memory controller.
            "" => (mounts.to_owned(), "memory.max"),
            "memory" => (mounts.join("memory"), "memory.limit_in_bytes"),
            _ => return None,
        };
        let group = top.join(group.trim_start_matches('/'));
        // The name that a container's group has outside does not exist inside, but the root does.
        let ancestors = group.ancestors().take_while(|dir| dir.starts_with(&top));
        ancestors
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
    fn finds_the_lowest_limit_of_a_group_and_its_ancestors() {
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
            "a container that sees its name outside"
        );
        assert_eq!(limit(""), None);
        assert_eq!(limit("0::/../../etc\n"), Some(9000));
    }

    #[test]
    fn reads_version_1_too() {
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
    fn the_lowest_limit_decides_which_memory_counts() {
        let limit = |machine, group, address_space| {
            let limit = lowest(machine, group, address_space);
            let memory = ProcessMemory {
                resident: 1,
                address_space: 2,
            };
            (limit.bytes, memory.counted_by(limit.kind))
        };
        assert_eq!(limit(900, None, None), (900, 1));
        assert_eq!(limit(900, Some(300), Some(400)), (300, 1));
        assert_eq!(limit(900, Some(i64::MAX as u64 & !4095), None), (900, 1));
        assert_eq!(limit(900, Some(300), Some(200)), (200, 2));
    }

    #[test]
    fn allocating_memory_raises_the_memory_of_this_process() {
        const BYTES: usize = 64 << 20;
        let before = process_memory().unwrap();
        let allocated = std::hint::black_box(vec![1_u8; BYTES]);
        let after = process_memory().unwrap();
        // Other tests run at the same time.
        assert!(after.resident > before.resident + (BYTES / 2) as u64);
        assert!(after.address_space >= after.resident);
        drop(allocated);
    }

    #[test]
    fn reports_the_memory_of_the_machine_and_the_space_of_a_directory() {
        assert!(memory_limit().bytes > 1 << 20);
        let here = tempfile::tempdir().unwrap();
        let space = disk_space(here.path()).unwrap().unwrap();
        assert!(0 < space.free && space.free <= space.size, "{space:?}");
        assert!(disk_space(&here.path().join("nowhere")).is_err());
        let unknown = Path::new("/proc");
        assert_eq!(disk_space(unknown).unwrap(), None);
    }
}
