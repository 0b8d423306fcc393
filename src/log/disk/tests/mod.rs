//! What a log on disk does, by subject; here is what all of them need.

mod damage;
mod failure;
mod order;
mod trim;

use std::process::Command;

use tempfile::TempDir;

use super::*;
use crate::grade::{Changes, Patch, Write};
use crate::log::{Entry, Origin};

/// Small enough that a few batches make a table and a few more a segment.
const TINY: Sizes = Sizes {
    table_bytes: 200,
    segment_bytes: 500,
    reserve_bytes: 0,
};

/// Every fifth write is a deletion.
fn batch(number: u64, writes: usize) -> Batch {
    let writes = (0..writes).map(|index| {
        let user_id = format!("user-{number}-{index}").into();
        if (number as usize + index).is_multiple_of(5) {
            return Write::Delete(user_id);
        }
        let mut changes = Changes::default();
        changes.set(index % 4, number as i64);
        Write::Set(Patch { user_id, changes })
    });
    Batch {
        origin: Origin(7),
        number,
        writes: writes.collect(),
        checkpoint: None,
    }
}

fn dir() -> (TempDir, PathBuf) {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("log");
    (root, dir)
}

fn tiny(dir: &Path) -> DiskLog {
    DiskLog::open_with(dir, None, TINY).unwrap()
}

fn runtime() -> tokio::runtime::Runtime {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_time().build().unwrap()
}

async fn append(log: &DiskLog, numbers: std::ops::RangeInclusive<u64>) {
    for number in numbers {
        log.append(batch(number, 2)).await.unwrap();
    }
}

/// Reads from `after` to the end.
async fn read(log: &DiskLog, after: Seq) -> Vec<Entry> {
    let mut subscription = log.subscribe(after).await.unwrap();
    let mut entries = Vec::new();
    while after + (entries.len() as u64) < log.end() {
        subscription.next(&mut entries).await.unwrap();
    }
    entries
}

/// The entries are whole, follow each other from `after` on, and time never goes back.
fn check(entries: &[Entry], after: Seq) {
    let mut time_ns = 0;
    for (seq, entry) in (after + 1..).zip(entries) {
        assert_eq!(entry.seq, seq);
        assert!(entry.time_ns >= time_ns);
        time_ns = entry.time_ns;
        let wanted = batch(entry.batch.number, entry.batch.writes.len());
        assert_eq!(entry.batch.writes, wanted.writes);
        assert_eq!(entry.batch.origin, wanted.origin);
    }
}

/// What a crash would leave: `from` as it is at one moment, though the library's worker may be
/// writing and removing tables.
fn copy(from: &Path, to: &Path) {
    let run = |program: &str, args: &[&str]| {
        let ran = Command::new(program).args(args).output().unwrap();
        (ran.status.success(), ran.stdout)
    };
    let (from, to) = (from.to_str().unwrap(), to.to_str().unwrap());
    let seen = || run("find", &[from, "-printf", "%p %s %T@\n"]);
    for _ in 0..1_000 {
        let before = seen();
        let (copied, _) = run("cp", &["-a", from, to]);
        if copied && seen() == before {
            return;
        }
        std::fs::remove_dir_all(to).unwrap();
    }
    panic!("{from} never stood still");
}
