//! Truncated, altered, reordered and malicious backups: all are rejected with a reason, and nothing
//! of them is kept.

use std::fs;
use std::io::{self, Read};
use std::ops::Range;
use std::sync::LazyLock;

use gradestore::backup::{ReadProgress, read, restore};
use gradestore::store::{RecordBatch, Store};
use tempfile::tempdir;

use crate::disk::backup::verify;
use crate::harness::Node;
use crate::harness::backup_files::{
    Rng, fetch_backup, gzip, program_restoring, random_store, read_backup, write_backup_file,
};

/// A node's own backup of 30,000 rows.
async fn own_backup() -> Vec<u8> {
    let directory = tempdir().unwrap();
    let file = write_backup_file(directory.path(), &random_store(30_000, 1000), 7);
    let node = Node::start_with(&mut program_restoring(&file)).await;
    let backup = fetch_backup(&node).await;
    assert_eq!(read_backup(&backup).1.rows, 30_000);
    backup
}

/// The gzip members of our own file: head, rows, end.
fn members(file: &[u8]) -> Vec<Range<usize>> {
    let u16_at = |at: usize| usize::from(u16::from_le_bytes([file[at], file[at + 1]]));
    let mut members = Vec::new();
    let mut at = 0;
    while at < file.len() {
        assert_eq!(file[at..at + 4], [0x1f, 0x8b, 8, file[at + 3]]);
        let extra_end = at + 12 + u16_at(at + 10);
        let content = at + 16;
        let end = match file[content] {
            b'H' => {
                let name = file[extra_end..]
                    .iter()
                    .position(|byte| *byte == 0)
                    .unwrap();
                let stored = extra_end + name + 1;
                stored + 5 + u16_at(stored + 1) + 8
            }
            b'M' => at + u32_at(file, content + 1) as usize,
            _ => file.len(),
        };
        members.push(at..end);
        at = end;
    }
    members
}

fn u32_at(file: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(file[at..at + 4].try_into().unwrap())
}

/// The error of restoring `file`; the store must be empty afterwards.
#[track_caller]
fn restore_error(file: &[u8], what: &str) -> String {
    let store = Store::new();
    let read = restore(file, &store, &ReadProgress::default());
    let why = read.expect_err(what).to_string();
    assert!(store.is_empty(), "{what}: kept in part");
    why
}

/// The error of reading `file` without a store, which is faster.
#[track_caller]
fn read_error(file: &[u8], what: &str) -> String {
    let read = read(file, &RecordBatch::digest, &ReadProgress::default());
    read.expect_err(what).to_string()
}

/// Runs `damage` for `count` cases on two threads.
fn in_parallel(count: usize, damage: impl Fn(usize) + Sync) {
    std::thread::scope(|scope| {
        for first in 0..2 {
            let damage = &damage;
            scope.spawn(move || (first..count).step_by(2).for_each(damage));
        }
    });
}

#[tokio::test]
async fn a_backup_truncated_at_any_byte_is_rejected() {
    let file = own_backup().await;
    let cuts: Vec<usize> = (0..file.len())
        .step_by(997)
        .chain(file.len() - 80..file.len())
        .collect();
    in_parallel(cuts.len(), |index| {
        let cut = cuts[index];
        let why = read_error(&file[..cut], &format!("cut at {cut}"));
        assert!(why.contains(&format!("truncated at byte {cut}:")), "{why}");
    });
}

#[tokio::test]
async fn a_flipped_bit_anywhere_is_detected() {
    let file = own_backup().await;
    let mut rng = Rng(5);
    let mut bytes: Vec<usize> = (0..300)
        .map(|_| rng.below(file.len() as u64) as usize)
        .collect();
    // All bytes of the members' headers.
    for member in members(&file) {
        bytes.extend(member.start..member.end.min(member.start + 32));
    }
    bytes.extend(file.len() - 40..file.len());
    in_parallel(bytes.len(), |index| {
        let (byte, bit) = (bytes[index], index % 8);
        let mut flipped = file.clone();
        flipped[byte] ^= 1 << bit;
        read_error(&flipped, &format!("bit {bit} of byte {byte}"));
    });
}

/// A backup with its members in another order.
fn reordered(file: &[u8], order: impl IntoIterator<Item = usize>) -> Vec<u8> {
    let members = members(file);
    let parts = order.into_iter().map(|index| &file[members[index].clone()]);
    parts.collect::<Vec<_>>().concat()
}

/// All kinds of damage: name, file and a part of the error.
#[expect(clippy::too_many_lines, reason = "a table")]
fn damaged_files(file: &[u8]) -> Vec<(&'static str, Vec<u8>, &'static str)> {
    let members = members(file);
    let last = members.len() - 1;
    assert!(last > 3, "too few members to swap");
    let with = |at: usize, bytes: &[u8]| {
        let mut changed = file.to_vec();
        changed[at..at + bytes.len()].copy_from_slice(bytes);
        changed
    };
    let rows = members[1].start + 17;
    let text_bytes = u32_at(file, rows + 4);
    let end = |more: &[u8]| [file, more].concat();
    vec![
        (
            "whole.cut",
            file[..file.len() / 2].to_vec(),
            "truncated at byte",
        ),
        (
            "no-end",
            reordered(file, 0..last),
            "the end record is missing",
        ),
        (
            "no-start",
            reordered(file, 1..=last),
            "the first member is missing",
        ),
        (
            "swapped",
            reordered(file, [0, 2, 1].into_iter().chain(3..=last)),
            "checksums differ",
        ),
        (
            "one-less",
            reordered(file, [0].into_iter().chain(2..=last)),
            "row counts differ",
        ),
        (
            "one-twice",
            reordered(file, [0, 1].into_iter().chain(1..=last)),
            "row counts differ",
        ),
        (
            "two-starts",
            reordered(file, [0].into_iter().chain(0..=last)),
            "first member",
        ),
        ("newline", end(b"\n"), "data after the end"),
        ("zeros", end(&[0; 512]), "data after the end"),
        ("twice", end(file), "data after the end"),
        (
            "more-rows",
            end(&gzip(b"x,1,2,3,4\n")),
            "data after the end",
        ),
        ("no-gzip", b"user_id,spp\na,1\n".to_vec(), "not a gzip"),
        ("nothing", Vec::new(), "truncated at byte 0"),
        (
            "long-member",
            with(rows, &u32::MAX.to_le_bytes()),
            "exceeds the limit",
        ),
        (
            "long-text",
            with(rows + 4, &u32::MAX.to_le_bytes()),
            "exceeds the limit",
        ),
        (
            "less-text",
            with(rows + 4, &(text_bytes / 2).to_le_bytes()),
            "cannot be inflated",
        ),
        (
            "short-member",
            with(rows, &9_u32.to_le_bytes()),
            "less than its header",
        ),
        (
            "foreign-cut",
            truncated_third_party_file(),
            "cannot be read as gzip",
        ),
        (
            "foreign-row",
            gzip(b"user_id,spp\na,1\nb,9223372036854775808\n"),
            "row 2, column spp",
        ),
        (
            "foreign-twice",
            gzip(b"user_id,spp\na,1\nb,1\na,2\n"),
            "row 3, column user_id (line 4): \"a\" is in an earlier row too",
        ),
    ]
}

fn truncated_third_party_file() -> Vec<u8> {
    let mut file = gzip(b"user_id,spp\na,1\nb,2\n");
    file.truncate(file.len() - 4);
    file
}

#[tokio::test]
async fn each_kind_of_damage_is_rejected_with_its_reason() {
    let file = own_backup().await;
    let directory = tempdir().unwrap();
    for (name, damaged, expected) in damaged_files(&file) {
        let path = directory.path().join(name);
        fs::write(&path, &damaged).unwrap();
        let output = verify(&path);
        assert_eq!(output.status.code(), Some(1), "{name}: {output:?}");
        assert!(output.stdout.is_empty(), "{name}: {output:?}");
        let printed = String::from_utf8(output.stderr).unwrap();
        let verdict = format!("CORRUPT: {}: ", path.display());
        assert!(
            printed.starts_with(&verdict) && printed.contains(expected),
            "{name}: {printed}"
        );
        assert_eq!(printed.lines().count(), 1, "{name}: {printed}");
        let why = restore_error(&damaged, name);
        assert!(why.contains(expected), "{name}: {why}");
    }
    let path = directory.path().join("there-is-none");
    let output = verify(&path);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let printed = String::from_utf8(output.stderr).unwrap();
    let expected = format!("gradestore: cannot open {}: No such file", path.display());
    assert!(printed.starts_with(&expected), "{printed}");
}

/// 1 MiB of one letter, repeated: 64 GiB from a few MiB.
static BOMB_MEMBER: LazyLock<Vec<u8>> = LazyLock::new(|| gzip(&vec![b'a'; 1 << 20]));
const BOMB_MEMBERS: usize = 64 * 1024;

struct Bomb {
    taken: usize,
}

impl Read for &mut Bomb {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let whole = BOMB_MEMBER.len() * BOMB_MEMBERS;
        let at = self.taken % BOMB_MEMBER.len();
        let part = &BOMB_MEMBER[at..];
        let bytes = part.len().min(buffer.len()).min(whole - self.taken);
        buffer[..bytes].copy_from_slice(&part[..bytes]);
        self.taken += bytes;
        Ok(bytes)
    }
}

#[test]
fn a_gzip_bomb_is_rejected_before_it_is_expanded() {
    let mut bomb = Bomb { taken: 0 };
    let store = Store::new();
    let why = restore(&mut bomb, &store, &ReadProgress::default()).unwrap_err();
    assert!(why.to_string().contains("longer than"), "{why}");
    // It read only a little ahead.
    assert!(bomb.taken < 1 << 20, "{} bytes", bomb.taken);
    assert!(store.is_empty());

    // The same for the program: 4 GiB in a file of 4 MiB.
    let directory = tempdir().unwrap();
    let path = directory.path().join("bomb.csv.gz");
    fs::write(&path, BOMB_MEMBER.repeat(4096)).unwrap();
    let output = verify(&path);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let printed = String::from_utf8(output.stderr).unwrap();
    assert!(
        printed.contains("bomb.csv.gz") && printed.contains("longer than"),
        "{printed}"
    );
}
