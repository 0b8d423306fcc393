//! Tests of a replica's WAL on real files.

use std::fs;
use std::time::SystemTime;

use bytes::Bytes;
use tempfile::TempDir;

use super::super::segment;
use super::*;
use crate::grade::{Changes, Digest, Patch, Write};
use crate::log::codec;
use crate::log::{Batch, BatchId, Chain, Checkpoint, Mac, Message};

const LOG: u128 = 7;

fn log_id(log: u128) -> LogId {
    LogId(RandomId::of(log).to_string().into())
}

fn config(dir: &TempDir) -> WalConfig {
    WalConfig {
        dir: dir.path().join("wal"),
        sync: WalSync::Always,
        keep_bytes: 0,
        pool: Blocking::threads(),
    }
}

fn open(dir: &TempDir) -> ReplicaWal {
    ReplicaWal::open(config(dir), &log_id(LOG)).unwrap()
}

fn base() -> Position {
    Position::base(&log_id(LOG), 0, 5)
}

/// The entry after `previous`. Every third has a checkpoint, every fifth is skipped.
fn entry(previous: &Position) -> Entry {
    let seq = previous.seq + 1;
    let time_ns = previous.time_ns + 10;
    let mut changes = Changes::default();
    changes.set(0, seq as i64);
    let user_id = format!("user-{seq}").into();
    let writes = [Write::Set(Patch { user_id, changes })];
    let mut payload = Vec::new();
    codec::write(&writes, &mut payload);
    let message = match seq % 5 {
        0 => Message::Skipped,
        _ => Message::Batch {
            format: codec::FORMAT,
            id: BatchId {
                writer: RandomId::of(3),
                seq,
            },
            payload: Bytes::from(payload),
        },
    };
    let checkpoint = Checkpoint {
        replica: RandomId::of(9),
        position: seq,
        chain: Chain(1),
        digest: Digest::default(),
        round: 1,
        mac: Mac::default(),
    };
    let batch = match seq % 5 {
        0 => Batch::default(),
        _ => Batch {
            ticket: None,
            writes: writes.into(),
            checkpoint: seq.is_multiple_of(3).then_some(checkpoint),
        },
    };
    Entry {
        position: previous.next(time_ns, message.chain_entry()),
        batch,
        message: Some(message),
    }
}

/// Records `count` entries after `previous` and writes them. Returns all positions.
async fn record(wal: &ReplicaWal, previous: Position, count: usize) -> Vec<Position> {
    let mut positions = vec![previous];
    for _ in 0..count {
        let previous = positions[positions.len() - 1];
        let entry = entry(&previous);
        wal.record(&previous, &entry, None);
        positions.push(entry.position);
    }
    assert!(wal.flush().await);
    positions
}

/// The positions after `after`, checked against what was recorded.
async fn read(wal: &ReplicaWal, after: Position) -> Option<Vec<Position>> {
    let mut reader = wal.read_after(after).await?;
    let mut positions = vec![after];
    while let Some((same, entries)) = wal.read(reader).await {
        reader = same;
        for found in entries {
            let wanted = entry(&positions[positions.len() - 1]);
            assert_eq!(found.position, wanted.position);
            assert_eq!(found.batch.writes, wanted.batch.writes);
            assert_eq!(found.batch.checkpoint, wanted.batch.checkpoint);
            assert!(found.message.is_none());
            positions.push(found.position);
        }
    }
    Some(positions)
}

/// The directory of the log.
fn log_dir(dir: &TempDir) -> PathBuf {
    dir.path().join("wal").join(&*log_id(LOG).0)
}

/// The names of the files, sorted.
fn names(dir: &TempDir) -> Vec<String> {
    let files = fs::read_dir(log_dir(dir)).unwrap();
    let mut names: Vec<_> = files
        .map(|file| file.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[tokio::test]
async fn a_run_is_read_from_any_position_and_across_starts() {
    let dir = tempfile::tempdir().unwrap();
    let mut positions = vec![base()];
    for start in 0..4 {
        let wal = open(&dir);
        let last = positions[positions.len() - 1];
        positions.extend(record(&wal, last, 100 + start).await.split_off(1));
        for (at, after) in positions.iter().enumerate().step_by(7) {
            let found = read(&wal, *after).await;
            match at + 1 < positions.len() {
                true => assert_eq!(found.unwrap(), positions[at..]),
                false => assert!(found.is_none()),
            }
        }
        let status = wal.status();
        assert_eq!((status.first, status.last), (1, positions.len() as u64 - 1));
    }
    assert!(names(&dir).len() > 3, "{:?}", names(&dir));
    let wal = open(&dir);
    // Another history at the same position.
    let mut other = positions[50];
    other.chain = Chain(1);
    assert!(wal.read_after(other).await.is_none());
    for (stream_first, first) in [(1, 1), (2, 1), (407, 1), (408, 408), (500, 500)] {
        assert_eq!(wal.first(stream_first), first);
    }
}

#[tokio::test]
async fn a_torn_tail_is_truncated_and_the_run_goes_on() {
    let whole = tempfile::tempdir().unwrap();
    let positions = record(&open(&whole), base(), 12).await;
    let path = segment::path(&log_dir(&whole), 1);
    let bytes = fs::read(&path).unwrap();
    for cut in (segment::HEADER_BYTES as usize..bytes.len()).step_by(5) {
        for torn in [bytes[..cut].to_vec(), {
            let mut zeroed = bytes.clone();
            zeroed[cut..].fill(0);
            zeroed
        }] {
            let dir = tempfile::tempdir().unwrap();
            fs::create_dir_all(log_dir(&dir)).unwrap();
            fs::write(segment::path(&log_dir(&dir), 1), torn).unwrap();
            let wal = open(&dir);
            let last = wal.status().last as usize;
            // The record may lack only its padding.
            assert!(last < 12 || bytes.len() - cut < 8);
            record(&wal, positions[last], 20).await;
            let read = read(&open(&dir), base()).await.unwrap();
            assert_eq!(read[..=last], positions[..=last], "{cut}");
            assert_eq!(read.len(), last + 21);
        }
    }
}

#[tokio::test]
async fn damage_ends_a_run_and_is_never_read() {
    let dir = tempfile::tempdir().unwrap();
    record(&open(&dir), base(), 300).await;
    let path = segment::path(&log_dir(&dir), 1);
    let bytes = fs::read(&path).unwrap();
    let (mut flips, mut undetected) = (0, 0);
    for at in (segment::HEADER_BYTES as usize..bytes.len()).step_by(97) {
        let mut damaged = bytes.clone();
        damaged[at] ^= 1;
        fs::write(&path, &damaged).unwrap();
        let read = read(&open(&dir), base()).await.unwrap_or_default();
        flips += 1;
        undetected += usize::from(read.len() > 250);
    }
    // The bytes between two records are in no checksum.
    assert!(
        flips > 30 && undetected < flips / 5,
        "{undetected} of {flips}"
    );
    // The header.
    let mut damaged = bytes;
    damaged[20] ^= 1;
    fs::write(&path, &damaged).unwrap();
    assert!(read(&open(&dir), base()).await.is_none());
    assert!(
        names(&dir)[0].ends_with(".seg.damaged"),
        "{:?}",
        names(&dir)
    );
}

#[tokio::test]
async fn a_jump_begins_another_run() {
    let dir = tempfile::tempdir().unwrap();
    let wal = open(&dir);
    let positions = record(&wal, base(), 30).await;
    let mut far = positions[20];
    far.seq = 100;
    let later = record(&wal, far, 10).await;
    for wal in [wal, open(&dir)] {
        assert_eq!(read(&wal, positions[5]).await.unwrap(), positions[5..]);
        assert_eq!(read(&wal, far).await.unwrap(), later);
        let status = wal.status();
        assert_eq!((status.first, status.last), (101, 110));
        assert_eq!((wal.first(111), wal.first(112)), (101, 112));
    }
    // Entries that these files should have had.
    let wal = open(&dir);
    let again = record(&wal, positions[3], 5).await;
    assert_eq!(read(&wal, positions[3]).await.unwrap(), again);
    assert!(read(&wal, far).await.is_none());
    let kept = names(&dir);
    let superseded = kept.iter().filter(|name| name.ends_with(".superseded"));
    assert_eq!((superseded.count(), kept.len()), (2, 3), "{kept:?}");
}

#[tokio::test]
async fn each_log_has_its_own_files() {
    let dir = tempfile::tempdir().unwrap();
    let positions = record(&open(&dir), base(), 5).await;
    let other = ReplicaWal::open(config(&dir), &log_id(8)).unwrap();
    assert_eq!(other.status().last, 0);
    record(&other, Position::base(&log_id(8), 0, 5), 7).await;
    other.quarantine("diverged").await;
    assert_eq!((other.status().last, other.known_end()), (0, 0));
    let wal = open(&dir);
    assert_eq!(read(&wal, base()).await.unwrap(), positions);
    let root = dir.path().join("wal");
    assert_eq!(
        log_of_wal(&root, Some(&log_id(8))).unwrap(),
        Some(log_id(LOG))
    );
    assert_eq!(log_of_wal(&root, Some(&log_id(LOG))).unwrap(), None);
    assert_eq!(log_of_wal(dir.path(), None).unwrap(), None);
}

#[tokio::test]
async fn flushes_write_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let wal = open(&dir);
    let mut positions = vec![base()];
    for _ in 0..200 {
        let mut flushes = Vec::new();
        for _ in 0..4 {
            let previous = positions[positions.len() - 1];
            let entry = entry(&previous);
            wal.record(&previous, &entry, None);
            positions.push(entry.position);
            flushes.push(wal.flush());
        }
        assert!(
            futures_util::future::join_all(flushes)
                .await
                .into_iter()
                .all(|done| done)
        );
    }
    assert_eq!(read(&wal, base()).await.unwrap(), positions);
    assert!(names(&dir).iter().all(|name| name.ends_with(".seg")));
}

#[tokio::test]
async fn records_after_a_damaged_one_are_kept_and_known() {
    let dir = tempfile::tempdir().unwrap();
    let positions = record(&open(&dir), base(), 10).await;
    let path = segment::path(&log_dir(&dir), 1);
    let mut bytes = fs::read(&path).unwrap();
    bytes[segment::HEADER_BYTES as usize + 40] ^= 1;
    fs::write(&path, &bytes).unwrap();
    let wal = open(&dir);
    assert_eq!((wal.status().last, wal.known_end()), (0, 10));
    assert_eq!(
        fs::read(path.with_added_extension("damaged")).unwrap(),
        bytes
    );
    // The stream has them.
    record(&wal, base(), 12).await;
    assert_eq!(read(&wal, base()).await.unwrap()[..11], positions);
    assert_eq!((wal.status().first, wal.known_end()), (1, 12));
}

#[tokio::test]
async fn a_hole_is_filled_from_the_stream_and_the_run_before_it_stays() {
    let dir = tempfile::tempdir().unwrap();
    let wal = open(&dir);
    let positions = record(&wal, base(), 300).await;
    // Without 151 to 160.
    let dir = tempfile::tempdir().unwrap();
    let wal = open(&dir);
    record(&wal, base(), 150).await;
    record(&wal, positions[160], 140).await;
    assert_eq!(wal.status().first, 161);
    let wal = open(&dir);
    let whole = record(&wal, positions[150], 150).await;
    assert_eq!(whole[1..], positions[151..]);
    for wal in [wal, open(&dir)] {
        assert_eq!(wal.status().first, 1);
        assert_eq!(read(&wal, base()).await.unwrap(), positions);
    }
}

#[tokio::test]
async fn trimming_keeps_what_a_start_needs_and_what_is_new() {
    let dir = tempfile::tempdir().unwrap();
    let wal = open(&dir);
    let positions = record(&wal, base(), 1000).await;
    let count = names(&dir).len();
    assert!(count > 5);
    // New segments stay.
    wal.trim(300).await.unwrap();
    assert_eq!(names(&dir).len(), count);
    for name in names(&dir) {
        let file = fs::File::options()
            .write(true)
            .open(log_dir(&dir).join(name));
        let old = SystemTime::now() - Duration::from_secs(3600);
        file.unwrap().set_modified(old).unwrap();
    }
    wal.trim(300).await.unwrap();
    let first = wal.status().first as usize;
    assert!((2..=301).contains(&first), "{first}");
    for wal in [wal, open(&dir)] {
        assert_eq!(read(&wal, positions[300]).await.unwrap(), positions[300..]);
        assert!(wal.read_after(positions[first - 2]).await.is_none());
    }
    let wal = ReplicaWal::open(
        WalConfig {
            keep_bytes: u64::MAX,
            ..config(&dir)
        },
        &log_id(LOG),
    )
    .unwrap();
    wal.trim(900).await.unwrap();
    assert_eq!(wal.status().first as usize, first);
}

#[tokio::test]
async fn a_failed_write_ends_the_run_and_rejects_writes_that_need_a_sync() {
    let dir = tempfile::tempdir().unwrap();
    let wal = open(&dir);
    let positions = record(&wal, base(), 300).await;
    // Nothing can be created in it.
    fs::rename(dir.path().join("wal"), dir.path().join("moved")).unwrap();
    let mut last = positions[300];
    let mut failed = false;
    for _ in 0..300 {
        let entry = entry(&last);
        wal.record(&last, &entry, None);
        last = entry.position;
        failed |= !wal.flush().await;
    }
    assert!(failed);
    let status = wal.status();
    let why = status.failure.unwrap();
    assert!(why.contains("No such file") && status.failures > 0, "{why}");
    assert_eq!(wal.unwritable(), Some(why));
    fs::rename(dir.path().join("moved"), dir.path().join("wal")).unwrap();
    let later = record(&wal, last, 10).await;
    assert_eq!(wal.unwritable(), None);
    assert_eq!(read(&wal, last).await.unwrap(), later);
    assert_eq!(wal.status().first, last.seq + 1);
}
