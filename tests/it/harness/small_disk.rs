//! A disk that is small enough to be filled.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

/// A file system in memory, in a mount namespace that ends with its holder process, so that nothing stays mounted.
/// It needs root or user namespaces.
pub(crate) struct SmallDisk {
    holder: Child,
    dir: PathBuf,
}

impl SmallDisk {
    /// A tmpfs of this size.
    pub(crate) fn new(mib: usize) -> Self {
        Self::mount(&format!("-t tmpfs -o size={mib}m"))
    }

    /// A ramfs, which reports a size of 0.
    pub(crate) fn of_unknown_size() -> Self {
        Self::mount("-t ramfs")
    }

    fn mount(options: &str) -> Self {
        let mount = format!("mount {options} none /mnt && echo mounted && exec cat");
        let mut unshare = Command::new("unshare");
        if !rustix::process::geteuid().is_root() {
            unshare.arg("--map-root-user");
        }
        let unshare = unshare.args(["--mount", "sh", "-c", &mount]);
        let unshare = unshare.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut holder = unshare.spawn().unwrap();
        let mut printed = [0; 8];
        let mounted = holder.stdout.as_mut().unwrap().read_exact(&mut printed);
        mounted.expect("this test mounts a file system: run it as root or allow user namespaces");
        // The mount point as other processes reach it.
        let dir = format!("/proc/{}/root/mnt", holder.id()).into();
        Self { holder, dir }
    }

    pub(crate) fn data_dir(&self) -> PathBuf {
        self.dir.join("data")
    }

    /// Fills the disk up to `free_bytes`.
    pub(crate) fn fill(&self, free_bytes: u64) -> Ballast {
        let ballast = Ballast(self.dir.join("ballast"));
        let mut file = File::create(&ballast.0).unwrap();
        for piece in [1 << 20, 4096, 1] {
            let zeros = vec![0; piece];
            let full = loop {
                if let Err(error) = file.write_all(&zeros) {
                    break error;
                }
            };
            assert_eq!(full.kind(), ErrorKind::StorageFull);
        }
        let filled = file.metadata().unwrap().len();
        file.set_len(filled - free_bytes).unwrap();
        ballast
    }

    /// Writes a file of this size.
    pub(crate) fn occupy(&self, bytes: usize) -> Ballast {
        let ballast = Ballast(self.dir.join("ballast"));
        fs::write(&ballast.0, vec![0; bytes]).unwrap();
        ballast
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

/// A file that is removed when dropped.
pub(crate) struct Ballast(PathBuf);

impl Drop for Ballast {
    fn drop(&mut self) {
        fs::remove_file(&self.0).unwrap();
    }
}
