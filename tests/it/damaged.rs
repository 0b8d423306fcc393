//! Backups that were cut, changed, put together wrongly or made to do harm: all are refused, nothing
//! of them is kept, and it is said why.

use std::fs;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::sync::LazyLock;

use flate2::Compression;
use flate2::write::GzEncoder;
use gradestore::backup::{ReadProgress, read, restore};
use gradestore::store::{RecordBatch, Store};
use tempfile::tempdir;

use crate::backup::verify;
use crate::disk::{Rng, backup_of, program_from, restored, store_of, write_file_of};
use crate::harness::Node;

/// A node's own backup of 30,000 rows.
async fn backup() -> Vec<u8> {
    let directory = tempdir().unwrap();
    let file = write_file_of(directory.path(), &store_of(30_000, 1000), 7);
    let node = Node::start_with(&mut program_from(&file)).await;
    let backup = backup_of(&node).await;
    assert_eq!(restored(&backup).1.rows, 30_000);
    backup
}

/// Where the gzip members of our own file are: the first, those of rows, the last.
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

/// Why `file` is refused; the store must be empty after.
#[track_caller]
fn refused(file: &[u8], what: &str) -> String {
    let store = Store::new();
    let read = restore(file, &store, &ReadProgress::default());
    let why = read.expect_err(what).to_string();
    assert!(store.is_empty(), "{what}: kept in part");
    why
}

/// The same without a store, which is quicker.
#[track_caller]
fn not_read(file: &[u8], what: &str) -> String {
    let read = read(file, &RecordBatch::digest, &ReadProgress::default());
    read.expect_err(what).to_string()
}

/// Runs `damage` on both cores over `count` cases.
fn in_parallel(count: usize, damage: impl Fn(usize) + Sync) {
    std::thread::scope(|scope| {
        for first in 0..2 {
            let damage = &damage;
            scope.spawn(move || (first..count).step_by(2).for_each(damage));
        }
    });
}

#[tokio::test]
async fn a_backup_cut_at_any_place_is_refused() {
    let file = backup().await;
    let cuts: Vec<usize> = (0..file.len())
        .step_by(997)
        .chain(file.len() - 80..file.len())
        .collect();
    in_parallel(cuts.len(), |index| {
        let cut = cuts[index];
        let why = not_read(&file[..cut], &format!("cut at {cut}"));
        assert!(why.contains(&format!("truncated at byte {cut}:")), "{why}");
    });
}

#[tokio::test]
async fn a_flipped_bit_is_noticed_wherever_it_is() {
    let file = backup().await;
    let mut rng = Rng(5);
    let mut bytes: Vec<usize> = (0..300)
        .map(|_| rng.below(file.len() as u64) as usize)
        .collect();
    // Headers are where a reader is led astray.
    for member in members(&file) {
        bytes.extend(member.start..member.end.min(member.start + 32));
    }
    bytes.extend(file.len() - 40..file.len());
    in_parallel(bytes.len(), |index| {
        let (byte, bit) = (bytes[index], index % 8);
        let mut flipped = file.clone();
        flipped[byte] ^= 1 << bit;
        not_read(&flipped, &format!("bit {bit} of byte {byte}"));
    });
}

/// A backup's members put together otherwise.
fn put_together(file: &[u8], order: impl IntoIterator<Item = usize>) -> Vec<u8> {
    let members = members(file);
    let parts = order.into_iter().map(|index| &file[members[index].clone()]);
    parts.collect::<Vec<_>>().concat()
}

/// Every kind of damage, by name.
fn corpus(file: &[u8]) -> Vec<(&'static str, Vec<u8>, &'static str)> {
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
            put_together(file, 0..last),
            "the end record is missing",
        ),
        (
            "no-start",
            put_together(file, 1..=last),
            "the first member is missing",
        ),
        (
            "swapped",
            put_together(file, [0, 2, 1].into_iter().chain(3..=last)),
            "checksums differ",
        ),
        (
            "one-less",
            put_together(file, [0].into_iter().chain(2..=last)),
            "row counts differ",
        ),
        (
            "one-twice",
            put_together(file, [0, 1].into_iter().chain(1..=last)),
            "row counts differ",
        ),
        (
            "two-starts",
            put_together(file, [0].into_iter().chain(0..=last)),
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
        ("foreign-cut", foreign_cut(), "cannot be read as gzip"),
        (
            "foreign-row",
            gzip(b"user_id,spp\na,1\nb,9223372036854775808\n"),
            "row 2, column spp",
        ),
        (
            "foreign-twice",
            gzip(b"user_id,spp\na,1\na,2\n"),
            "appears twice",
        ),
    ]
}

pub(crate) fn gzip(text: &[u8]) -> Vec<u8> {
    let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
    gzip.write_all(text).unwrap();
    gzip.finish().unwrap()
}

fn foreign_cut() -> Vec<u8> {
    let mut file = gzip(b"user_id,spp\na,1\nb,2\n");
    file.truncate(file.len() - 4);
    file
}

#[tokio::test]
async fn each_kind_of_damage_is_refused_and_named() {
    let file = backup().await;
    let directory = tempdir().unwrap();
    for (name, damaged, wanted) in corpus(&file) {
        if name != "foreign-twice" {
            // A file alone does not know its users.
            let path = directory.path().join(name);
            fs::write(&path, &damaged).unwrap();
            let output = verify(&path);
            assert_eq!(output.status.code(), Some(1), "{name}: {output:?}");
            assert!(output.stdout.is_empty(), "{name}: {output:?}");
            let said = String::from_utf8(output.stderr).unwrap();
            let named = format!("gradestore: {}: ", path.display());
            assert!(
                said.contains(&named) && said.contains(wanted),
                "{name}: {said}"
            );
            assert!(!said.contains("panicked"), "{name}: {said}");
        }
        let why = refused(&damaged, name);
        assert!(why.contains(wanted), "{name}: {why}");
    }
    let path = directory.path().join("there-is-none");
    let output = verify(&path);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(
        String::from_utf8(output.stderr)
            .unwrap()
            .contains(path.to_str().unwrap())
    );
}

/// A MiB of one letter, over and over: 64 GiB from a few MiB.
static BOMB_MEMBER: LazyLock<Vec<u8>> = LazyLock::new(|| gzip(&vec![b'a'; 1 << 20]));
const BOMB_MEMBERS: usize = 64 * 1024;

struct Bomb {
    taken: usize,
}

impl Read for &mut Bomb {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        let whole = BOMB_MEMBER.len() * BOMB_MEMBERS;
        let at = self.taken % BOMB_MEMBER.len();
        let part = &BOMB_MEMBER[at..];
        let bytes = part.len().min(room.len()).min(whole - self.taken);
        room[..bytes].copy_from_slice(&part[..bytes]);
        self.taken += bytes;
        Ok(bytes)
    }
}

#[test]
fn a_bomb_is_refused_before_it_bursts() {
    let mut bomb = Bomb { taken: 0 };
    let store = Store::new();
    let why = restore(&mut bomb, &store, &ReadProgress::default()).unwrap_err();
    assert!(why.to_string().contains("longer than"), "{why}");
    // It read ahead some, and stopped.
    assert!(bomb.taken < 1 << 20, "{} bytes", bomb.taken);
    assert!(store.is_empty());

    // The same to the program: 4 GiB in a file of 4 MiB.
    let directory = tempdir().unwrap();
    let path = directory.path().join("bomb.csv.gz");
    fs::write(&path, BOMB_MEMBER.repeat(4096)).unwrap();
    let output = verify(&path);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        said.contains("bomb.csv.gz") && said.contains("longer than"),
        "{said}"
    );
}
