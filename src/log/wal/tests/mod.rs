//! Tests of the disk log, by subject. This file has their shared helpers.

mod damage;
mod failure;
mod order;
mod trim;

use std::fs::File;

use tempfile::TempDir;

use super::*;
use crate::grade::{Changes, Patch, Write};
use crate::log::Entry;

/// Called before a record is written, with the file, the offset and the record.
pub(super) type Fault = Box<dyn FnMut(&File, u64, &[u8]) -> io::Result<()> + Send>;

/// Small enough that a few batches fill a segment.
const TINY: WalSizes = WalSizes {
    step_bytes: 200,
    segment_bytes: 800,
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
        ticket: None,
        writes: writes.collect(),
        checkpoint: None,
    }
}

/// The number passed to [`batch`].
fn number(batch: &Batch) -> u64 {
    let user_id = batch.writes[0].user_id();
    user_id.split('-').nth(1).unwrap().parse().unwrap()
}

/// The log's position at `seq`; an arbitrary one if the log does not have it.
fn position(log: &DiskLog, seq: Seq) -> Position {
    let position = log.position(seq).unwrap();
    position.unwrap_or(Position::base(&log.id(), seq, 0))
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

/// Reads the batches after `after`.
async fn read(log: &DiskLog, after: Seq) -> Vec<Entry> {
    let mut subscription = log.subscribe(position(log, after)).await.unwrap();
    let mut entries = Vec::new();
    while after + (entries.len() as u64) < log.end() {
        subscription.next(&mut entries).await.unwrap();
    }
    entries
}

/// Checks that the entries are complete and contiguous after `after`, and that time never goes
/// back.
fn check(entries: &[Entry], after: Seq) {
    let mut time_ns = 0;
    for (seq, entry) in (after + 1..).zip(entries) {
        assert_eq!(entry.position.seq, seq);
        assert!(entry.position.time_ns >= time_ns);
        time_ns = entry.position.time_ns;
        let wanted = batch(number(&entry.batch), entry.batch.writes.len());
        assert_eq!(entry.batch.writes, wanted.writes);
    }
}

/// Copies the log as a crash would leave it: nothing runs in the background.
fn copy(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for file in fs::read_dir(from).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), to.join(file.file_name())).unwrap();
    }
}

/// The log's segments, oldest first.
fn segments(dir: &Path) -> Vec<PathBuf> {
    let files = segment::list(dir).unwrap();
    assert_eq!(fs::read_dir(dir).unwrap().count(), files.segments.len());
    let firsts = files.segments.iter();
    firsts.map(|first| segment::path(dir, *first)).collect()
}

/// The offsets of the records of a segment, and the end of the last one.
fn offsets(bytes: &[u8]) -> Vec<usize> {
    let mut offsets = vec![segment::HEADER_BYTES as usize];
    while let Some(record) = record::read(&bytes[offsets[offsets.len() - 1]..]) {
        offsets.push(offsets[offsets.len() - 1] + record.bytes);
    }
    offsets
}
