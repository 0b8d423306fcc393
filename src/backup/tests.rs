//! Complete files, and the same files with many kinds of damage.

use std::collections::BTreeMap;
use std::io::{Cursor, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use flate2::Compression;
use flate2::read::MultiGzDecoder;
use flate2::write::GzEncoder;
use futures_util::FutureExt;
use parking_lot::Mutex;
use proptest::prelude::*;

use super::format::POSITION_MAX;
use super::parallelism::threads_for;
use super::*;
use crate::grade::{Changes, FIELD_COUNT, FIELDS, Patch, USER_ID, Values};
use crate::log::{Chain, Position};
use crate::store::{RecordBatch, Store};
use crate::sys::exec::Blocking;

type Rows = BTreeMap<String, Values>;

fn store_of(users: usize) -> Store {
    let store = Store::new();
    for user in 0..users {
        // Some ids need quotes, some are long.
        let user_id = match user % 4 {
            0 => format!("{}", 1_000_000_000_000_usize + user),
            1 => format!("a,\"{user}\""),
            2 => format!("é {user}"),
            _ => format!("{user:036}"),
        };
        let mut values = [user as i64; FIELD_COUNT];
        values[0] = i64::MIN + user as i64;
        let changes = Changes::all(values);
        store.apply(&Patch { user_id, changes });
    }
    store
}

fn head() -> HeadRecord {
    HeadRecord {
        format: FORMAT,
        created_ns: 1_700_000_100_000_000_000,
        log_id: "memory-1".into(),
        position: 7,
        time_ns: 1_700_000_000_123_456_789,
        chain: Chain(1),
        previous_chain: Chain(2),
        rows_expected: 2_900,
        shard_seed: None,
    }
}

/// The members of a backup. Several for a thousand rows.
fn members_of(store: &Store) -> Vec<Vec<u8>> {
    members_after(&head(), store)
}

fn members_after(head: &HeadRecord, store: &Store) -> Vec<Vec<u8>> {
    members_between(head, 9, store)
}

/// The members of a backup that ends at position `end`.
fn members_between(head: &HeadRecord, end: u64, store: &Store) -> Vec<Vec<u8>> {
    let (mut writer, first) = BackupWriter::start(head);
    let mut members = vec![first];
    let source = ChunkSource::with_chunk_text(store, 16 * 1024);
    while let Some(chunk) = source.next() {
        writer.add(&chunk);
        members.push(chunk.bytes);
    }
    members.push(writer.end(&Position {
        seq: end,
        ..head.position()
    }));
    members
}

fn file_of(store: &Store) -> Vec<u8> {
    members_of(store).concat()
}

fn read_rows(bytes: &[u8]) -> Result<(Summary, Rows), BackupError> {
    let rows = Mutex::new(Rows::new());
    let sink = |batch: &RecordBatch| {
        let given = batch.iter().map(|(id, values)| (id.to_owned(), *values));
        rows.lock().extend(given);
        batch.digest()
    };
    let summary = read(Cursor::new(bytes.to_vec()), &sink, &ReadProgress::default())?;
    Ok((summary, rows.into_inner()))
}

fn rejection(bytes: &[u8]) -> String {
    match read_rows(bytes) {
        Ok(_) => panic!("accepted"),
        Err(error) => error.to_string(),
    }
}

fn rows_of(store: &Store) -> Rows {
    let mut rows = Rows::new();
    let mut batch = RecordBatch::default();
    let mut scan = store.scan();
    while scan.next_into(&mut batch) {
        rows.extend(batch.iter().map(|(id, values)| (id.to_owned(), *values)));
    }
    rows
}

fn gzip(text: &str) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(text.as_bytes()).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn a_store_round_trips() {
    for users in [0, 1, 5_000] {
        let store = store_of(users);
        let bytes = file_of(&store);
        let (summary, rows) = read_rows(&bytes).unwrap();
        assert_eq!(rows, rows_of(&store));
        assert_eq!(summary.rows, users as u64);
        assert_eq!(summary.digest, store.digest());
        assert_eq!(summary.bytes, bytes.len() as u64);
        let (found, end) = summary.records.unwrap();
        assert_eq!(found, head());
        assert_eq!((end.position, end.rows), (9, users as u64));
    }
}

#[tokio::test]
async fn a_snapshot_is_complete_or_absent() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("snapshots");
    let snapshots = Snapshots::open(&dir).unwrap();
    let (store, pool) = (store_of(20_000), Blocking::threads());
    let failed = || Err(std::io::Error::other("replaced"));
    let failed = snapshots.write(&store, head(), failed, &pool).await;
    assert_eq!(failed.unwrap_err().to_string(), "replaced");
    assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 0);

    let end = || Ok(head().position());
    let written = snapshots.write(&store, head(), end, &pool).await.unwrap();
    assert_eq!((written.head, written.rows), (head(), 20_000));
    let path = snapshots.newest().unwrap().unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().len(), written.bytes);
    assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 1);
    let restored = Store::new();
    restore_file(&path, &restored, &ReadProgress::default()).unwrap();
    assert_eq!(restored.digest(), store.digest());
}

/// So that the next restore, from a backup of the restored store, is fast as well.
#[test]
fn a_restored_store_has_the_shards_and_the_order_of_the_first_one() {
    let store = store_of(2_900);
    let first = |seed| HeadRecord {
        shard_seed: seed,
        ..head()
    };
    let seed = Some(store.shard_seed());
    let file = members_after(&first(seed), &store).concat();
    let restored = Store::new();
    restore(&*file, &restored, &ReadProgress::default()).unwrap();
    assert_eq!(Some(restored.shard_seed()), seed);
    assert_eq!(members_after(&first(seed), &restored).concat(), file);

    // Older files have no seed, and a store that has been used keeps its own.
    let file = members_after(&first(None), &store).concat();
    for used in [None, Some(1)] {
        let restored = Store::new();
        used.inspect(|seed| restored.set_shard_seed(*seed));
        let summary = restore(&*file, &restored, &ReadProgress::default()).unwrap();
        assert_eq!(summary.digest, store.digest());
        assert_eq!(rows_of(&restored), rows_of(&store));
        assert_ne!(Some(restored.shard_seed()), seed);
    }
}

#[tokio::test]
async fn a_pipeline_starts_chunks_only_when_asked_and_no_more_than_allowed() {
    let store = store_of(5_000);
    let started = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&started);
    let pool = Blocking::with_executor(Arc::new(move |work| {
        count.fetch_add(1, Ordering::Relaxed);
        work();
        futures_util::future::ready(()).boxed()
    }));
    let source = ChunkSource::with_chunk_text(&store, 16 * 1024);
    let mut chunks = ChunkPipeline::new(source, pool);
    assert_eq!(started.load(Ordering::Relaxed), 0);
    let mut rows = 0;
    for (in_flight_max, wanted) in [(1, 1), (1, 2), (3, 5), (3, 6), (1, 6)] {
        rows += chunks.next(in_flight_max).await.unwrap().unwrap().rows();
        assert_eq!(started.load(Ordering::Relaxed), wanted);
    }
    while let Some(chunk) = chunks.next(2).await.unwrap() {
        rows += chunk.rows();
    }
    assert_eq!(rows, 5_000);
}

#[tokio::test]
async fn a_pipeline_ends_after_a_panic() {
    let store = store_of(10);
    let pool = Blocking::with_executor(Arc::new(|work| {
        drop(work);
        futures_util::future::ready(()).boxed()
    }));
    let mut chunks = ChunkPipeline::new(ChunkSource::new(&store), pool);
    assert!(chunks.next(2).await.is_err());
    assert!(chunks.next(2).await.unwrap().is_none());
}

#[test]
fn other_programs_read_gzip_and_csv() {
    let store = store_of(3_000);
    let mut text = String::new();
    let mut decoder = MultiGzDecoder::new(Cursor::new(file_of(&store)));
    decoder.read_to_string(&mut text).unwrap();
    assert_eq!(text.lines().count(), 3_001);
    let names: Vec<_> = [USER_ID]
        .iter()
        .chain(FIELDS)
        .map(|name| format!("\"{name}\""))
        .collect();
    assert_eq!(text.lines().next(), Some(&*names.join(",")));
    // The same rows in a third-party file.
    let (summary, rows) = read_rows(&gzip(&text)).unwrap();
    assert_eq!(rows, rows_of(&store));
    assert_eq!((summary.records, summary.rows), (None, 3_000));
    assert_eq!(summary.digest, store.digest());
}

#[test]
fn the_head_and_end_position_are_known_without_the_rows() {
    let bytes = file_of(&store_of(3_000));
    assert_eq!(read_head(&*bytes).unwrap(), Some(head()));
    assert_eq!(end_position(&*bytes).unwrap(), 9);
    let third_party = gzip("user_id\na\n");
    assert_eq!(read_head(&*third_party).unwrap(), None);
    assert_eq!(end_position(&*third_party).unwrap(), 0);
    for cut in (20..bytes.len()).step_by(991) {
        let (start, _) = bytes.split_at(cut);
        let error = end_position(start).unwrap_err().to_string();
        assert!(error.contains("truncated at byte"), "at {cut}: {error}");
    }
    assert!(read_head(&b"no gzip, though long"[..]).is_err());
}

#[test]
fn impossible_positions_and_log_ids_are_refused() {
    let store = store_of(10);
    let with_positions = |position: u64, end: u64| {
        let head = HeadRecord { position, ..head() };
        members_between(&head, end, &store).concat()
    };
    let possible = with_positions(POSITION_MAX, POSITION_MAX);
    assert_eq!(end_position(&*possible).unwrap(), POSITION_MAX);
    assert!(read_rows(&possible).is_ok());
    for (position, end) in [
        (u64::MAX, u64::MAX),
        (POSITION_MAX + 1, POSITION_MAX + 1),
        (7, u64::MAX),
        (7, POSITION_MAX + 1),
        (7, 6),
    ] {
        let bytes = with_positions(position, end);
        for error in [
            read_rows(&bytes).map(drop).unwrap_err(),
            end_position(&*bytes).map(drop).unwrap_err(),
        ] {
            let error = error.to_string();
            assert!(
                error.contains("impossible position"),
                "{position} {end}: {error}"
            );
        }
    }
    let log_id = "\u{1b}[2J".into();
    let bytes = members_after(&HeadRecord { log_id, ..head() }, &store).concat();
    let error = read_rows(&bytes).map(drop).unwrap_err().to_string();
    assert!(error.contains("control character"), "{error}");
}

#[test]
fn several_threads_read_the_same_as_one() {
    let store = store_of(20_000);
    let large = HeadRecord {
        rows_expected: 1_000_000,
        ..head()
    };
    assert!(threads_for(large.rows_expected) > 1 || threads_for(u64::MAX) == 1);
    let mut members = members_after(&large, &store);
    let (summary, rows) = read_rows(&members.concat()).unwrap();
    assert_eq!(rows, rows_of(&store));
    assert_eq!(summary.digest, store.digest());
    // The error is the first one, although other threads read on.
    let middle = members.len() / 2;
    let at: usize = members[..middle].iter().map(Vec::len).sum();
    let half = members[middle].len() / 2;
    members[middle][half] ^= 1;
    let error = rejection(&members.concat());
    assert!(
        error.contains(&format!("damaged at byte {at}: ")),
        "{error}"
    );
    members.truncate(middle);
    assert!(rejection(&members.concat()).contains("truncated at byte"));
}

#[test]
fn progress_counts_rows_and_bytes() {
    let progress = ReadProgress::default();
    assert!(progress.head().now_or_never().is_none());
    let bytes = file_of(&store_of(3_000));
    read(&*bytes, &RecordBatch::digest, &progress).unwrap();
    assert_eq!(progress.rows(), 3_000);
    assert_eq!(progress.bytes(), bytes.len() as u64);
    assert_eq!(progress.rows_expected(), 2_900);
    assert_eq!(progress.head().now_or_never(), Some(head()));
    let progress = ReadProgress::default();
    let third_party = gzip("user_id\na\nb\n");
    read(&*third_party, &RecordBatch::digest, &progress).unwrap();
    assert_eq!((progress.rows(), progress.rows_expected()), (2, 0));
    assert_eq!(progress.bytes(), third_party.len() as u64);
}

#[test]
fn truncation_at_any_byte_is_detected() {
    let members = members_of(&store_of(3_000));
    let bytes = members.concat();
    let mut boundary = 0;
    let mut cuts: Vec<usize> = (0..bytes.len()).step_by(997).collect();
    for member in &members {
        cuts.extend(boundary.max(1) - 1..boundary + 20);
        boundary += member.len();
    }
    cuts.extend(bytes.len() - 200..bytes.len());
    for cut in cuts {
        let Some(start) = bytes.get(..cut.min(bytes.len() - 1)) else {
            continue;
        };
        let error = rejection(start);
        assert!(error.contains("truncated at byte"), "at {cut}: {error}");
    }
}

#[test]
fn any_flipped_bit_is_detected() {
    let members = members_of(&store_of(600));
    let mut bytes = members.concat();
    let last = bytes.len() - members.last().unwrap().len();
    let first = members[0].len();
    // Every bit of the head and end record and of a member's header, and some bits of the rows.
    let records = (0..first + 40).chain(last..bytes.len());
    let rows = (first + 40..last).step_by(61).map(|at| (at, at % 8));
    for (at, bit) in records
        .flat_map(|at| (0..8).map(move |bit| (at, bit)))
        .chain(rows)
    {
        bytes[at] ^= 1 << bit;
        assert_corrupt(&bytes, &format!("bit {bit} of byte {at}"));
        bytes[at] ^= 1 << bit;
    }
    assert!(read_rows(&bytes).is_ok());
}

/// Checks that `bytes`, which were a backup, are rejected with the advice to fetch it again.
#[track_caller]
fn assert_corrupt(bytes: &[u8], what: &str) {
    let error = read_rows(bytes).expect_err(what);
    let text = error.to_string();
    assert!(error.is_damage(), "{what}: {text}");
    let advice = ["fetch it again", "fetch the backup again"];
    assert!(
        advice.iter().any(|advice| text.contains(advice)),
        "{what}: {text}"
    );
}

#[test]
fn another_value_of_any_byte_is_detected() {
    for users in [0, 5] {
        let mut bytes = file_of(&store_of(users));
        for at in 0..bytes.len() {
            let right = bytes[at];
            // Others at each byte; the test above flips single bits.
            let others = (0..=u8::MAX).skip(at % 13).step_by(13);
            for other in others.filter(|other| *other != right) {
                bytes[at] = other;
                assert_corrupt(&bytes, &format!("{users} users, byte {at} is {other}"));
            }
            bytes[at] = right;
        }
        assert_eq!(read_rows(&bytes).unwrap().0.rows, users as u64);
    }
}

#[test]
fn missing_swapped_repeated_and_mixed_members_are_detected() {
    let members = members_of(&store_of(5_000));
    assert!(members.len() >= 5);
    let last = members.len() - 1;
    let with = |change: &dyn Fn(&mut Vec<Vec<u8>>)| {
        let mut changed = members.clone();
        change(&mut changed);
        rejection(&changed.concat())
    };
    assert!(with(&|m| m.swap(1, 2)).contains("checksums differ"));
    assert!(with(&|m| m.swap(0, 1)).contains("first member is missing"));
    assert!(with(&|m| m.swap(last - 1, last)).contains("data after the end"));
    assert!(with(&|m| drop(m.remove(0))).contains("first member is missing"));
    assert!(with(&|m| drop(m.remove(2))).contains("differ"));
    assert!(with(&|m| drop(m.remove(last))).contains("truncated"));
    assert!(with(&|m| m.insert(2, m[1].clone())).contains("differ"));
    assert!(with(&|m| m.insert(2, m[0].clone())).contains("second first member"));
    assert!(with(&|m| m.push(vec![0])).contains("data after the end"));
    assert!(with(&|m| m.push(m[1].clone())).contains("data after the end"));
    assert!(with(&|m| m.insert(1, gzip("x,1,2,3,4\n"))).contains("not one of gradestore"));
    let other = members_of(&store_of(5_001));
    assert!(with(&|m| m[last] = other.last().unwrap().clone()).contains("differ"));
}

#[test]
fn a_member_with_an_excessive_declared_length_is_rejected() {
    let mut members = members_of(&store_of(10));
    // The three numbers follow the fixed part, two lengths, the name of the subfield and the kind.
    let numbers = 10 + 2 + 2 + 2 + 1;
    for (at, claim) in [(0, u32::MAX), (0, 3), (4, u32::MAX), (4, 1 << 20), (8, 11)] {
        let sound = members[1].clone();
        members[1][numbers + at..numbers + at + 4].copy_from_slice(&claim.to_le_bytes());
        rejection(&members.concat());
        if (at, claim) == (0, u32::MAX) {
            let error = end_position(&*members.concat()).unwrap_err().to_string();
            assert!(error.contains("do not lead to an end record"), "{error}");
        }
        members[1] = sound;
    }
    let newer = HeadRecord {
        format: FORMAT + 1,
        ..head()
    };
    let (_, first) = BackupWriter::start(&newer);
    members[0] = first;
    assert!(rejection(&members.concat()).contains("use a newer gradestore"));
}

#[test]
fn third_party_files_may_have_any_common_form() {
    let names: Vec<&str> = FIELDS.iter().rev().copied().chain([USER_ID]).collect();
    let wanted = Rows::from([("a,\"b".to_owned(), {
        let mut values: Values = std::array::from_fn(|index| (index as i64 + 1) * -5);
        values.reverse();
        values
    })]);
    let numbers: Vec<String> = (0..FIELD_COUNT)
        .map(|index| format!("{}", (index + 1) as i64 * -5))
        .collect();
    let quoted = |items: &[String]| -> String {
        let all: Vec<String> = items.iter().map(|item| format!("\"{item}\"")).collect();
        all.join(",")
    };
    let header = names.join(",");
    let row = format!("{},\"a,\"\"b\"", numbers.join(","));
    let all_quoted = format!(
        "{}\r\n{},\"a,\"\"b\"\r\n",
        quoted(
            &names
                .iter()
                .map(|name| (*name).to_owned())
                .collect::<Vec<_>>()
        ),
        quoted(&numbers)
    );
    let plain = format!("{header}\n{row}\n");
    for text in [
        plain.clone(),
        format!("{header}\r\n{row}\r\n"),
        format!("{header}\n{row}"),
        format!("\u{feff}{header}\n\n{row}\n\n"),
        format!("\u{feff}{all_quoted}"),
        all_quoted.replace("\r\n", "\r"),
        all_quoted,
    ] {
        assert_eq!(read_rows(&gzip(&text)).unwrap().1, wanted, "{text:?}");
    }
    // Several members that split a row, like those of `cat a.gz b.gz` and `pigz -i`.
    let (one, two) = plain.split_at(plain.len() / 2);
    let members = [gzip(one), gzip(two)].concat();
    assert_eq!(read_rows(&members).unwrap().1, wanted);
    // Missing fields read as 0.
    let (_, rows) = read_rows(&gzip("user_id\nx\n")).unwrap();
    assert_eq!(rows, Rows::from([("x".to_owned(), Values::default())]));
}

/// The users of a file in order, each with its reported line.
fn in_order(bytes: &[u8]) -> (Result<Summary, BackupError>, Vec<(String, u64)>) {
    let (found, progress) = (Mutex::new(Vec::new()), ReadProgress::default());
    let sink = |rows: &RecordBatch| {
        let lines = (progress.line()..).zip(rows.iter());
        let lines = lines.map(|(line, (user, _))| (user.to_owned(), line));
        found.lock().extend(lines);
        rows.digest()
    };
    let summary = read_in_order(bytes, &sink, &progress);
    (summary, found.into_inner())
}

#[test]
fn line_numbers_are_right_for_all_line_ends() {
    for (text, wanted) in [
        ("user_id\na\nb\nc\n", [2, 3, 4]),
        ("user_id\na\nb\nc", [2, 3, 4]),
        ("user_id\r\na\r\nb\r\nc\r\n", [2, 3, 4]),
        ("user_id\r\na\r\nb\r\nc", [2, 3, 4]),
        ("user_id\n\na\n\n\nb\nc\n\n", [3, 6, 7]),
        ("\nuser_id\r\n\r\na\nb\r\n\nc", [4, 5, 7]),
        ("user_id\ra\rb\rc\r", [2, 3, 4]),
        ("\ruser_id\r\ra\r\r\rb\rc", [4, 7, 8]),
    ] {
        let (summary, found) = in_order(&gzip(text));
        assert_eq!(summary.unwrap().rows, 3);
        let wanted = ["a", "b", "c"].map(str::to_owned).into_iter().zip(wanted);
        assert_eq!(found, wanted.collect::<Vec<_>>(), "{text:?}");
        // The line of an invalid row.
        let said = rejection(&gzip(&text.replacen('c', "c,1", 1)));
        let (_, line) = &found[2];
        assert!(said.contains(&format!("(line {line})")), "{said}");
    }
}

#[test]
fn read_in_order_keeps_the_order_of_the_file() {
    let bytes = file_of(&store_of(20_000));
    let mut text = String::new();
    let mut inflated = MultiGzDecoder::new(&*bytes);
    inflated.read_to_string(&mut text).unwrap();
    let (_header, rows) = text.split_once('\n').unwrap();
    let mut wanted = Vec::new();
    let parsed = row::parse(rows, FIELD_COUNT, 1, |row| {
        wanted.push((row.user_id.to_owned(), wanted.len() as u64 + 2));
    });
    assert_eq!(parsed.unwrap(), 20_000);
    let (summary, found) = in_order(&bytes);
    assert_eq!(summary.unwrap(), read_rows(&bytes).unwrap().0);
    assert_eq!(found, wanted);
}

#[test]
fn the_columns_are_known_with_the_first_row() {
    for (header, wanted) in [
        ("user_id\n".to_owned(), vec![]),
        (format!("{},user_id\n", FIELDS[2]), vec![2]),
        (format!("user_id,{},{}\n", FIELDS[3], FIELDS[1]), vec![1, 3]),
    ] {
        let progress = ReadProgress::default();
        let row = header
            .replace(|c: char| c != ',' && c != '\n', "")
            .replace(',', "1,");
        let text = format!("{header}{}1\n", row.trim_end());
        let sink = |rows: &RecordBatch| {
            let there = (0..=FIELD_COUNT).filter(|index| progress.has_field(*index));
            assert_eq!(there.collect::<Vec<_>>(), wanted);
            rows.digest()
        };
        assert_eq!(
            read_in_order(&*gzip(&text), &sink, &progress).unwrap().rows,
            1
        );
    }
}

#[test]
fn errors_in_third_party_files_have_row_and_column() {
    let field = FIELDS[0];
    let text = |rows: &str| gzip(&format!("user_id,{field}\na,1\n{rows}"));
    for (bytes, said) in [
        (
            text("b,9223372036854775808\n"),
            format!("row 2, column {field}"),
        ),
        (text("b,\n"), format!("row 2, column {field}")),
        (text("b,1.0\n"), format!("row 2, column {field}")),
        (text(",1\n"), "row 2, column user_id".to_owned()),
        (text("\"b\nc\",1\n"), "row 2, column user_id".to_owned()),
        (text("b\n"), "row 2 has 1 columns".to_owned()),
        (text("b,1,2\n"), "row 2 has 3 columns".to_owned()),
        (
            gzip("user,spp\na,1\n"),
            "unknown column \"user\"".to_owned(),
        ),
        (gzip("user_id,user_id\n"), "twice".to_owned()),
        (
            gzip(&format!("{field}\n")),
            "column user_id is missing".to_owned(),
        ),
        (gzip(""), "the file is empty".to_owned()),
        (
            b"<html>no such thing</html>".to_vec(),
            "not a gzip file".to_owned(),
        ),
        (Vec::new(), "truncated at byte 0".to_owned()),
    ] {
        let error = rejection(&bytes);
        assert!(error.contains(&said), "{said}: {error}");
    }
    let whole = text("b,2\n");
    for cut in 14..whole.len() {
        rejection(&whole[..cut]);
    }
    rejection(&[whole.clone(), b"garbage".to_vec()].concat());
    for at in whole.len() - 8..whole.len() {
        let mut flipped = whole.clone();
        flipped[at] ^= 1;
        rejection(&flipped);
    }
}

#[test]
fn a_decompression_bomb_is_rejected_early() {
    // One row of 64 MiB, which gzip compresses to a thousandth.
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(b"user_id\n").unwrap();
    let block = vec![b'a'; 1 << 20];
    for _ in 0..64 {
        encoder.write_all(&block).unwrap();
    }
    let error = rejection(&encoder.finish().unwrap());
    assert!(error.contains("longer than"), "{error}");
}

proptest! {
    #[test]
    fn no_input_panics(bytes in prop::collection::vec(any::<u8>(), 0..400), gzipped in any::<bool>()) {
        let bytes = match gzipped {
            true => gzip(&String::from_utf8_lossy(&bytes)),
            false => [&[0x1f, 0x8b, 8, 4][..], &bytes].concat(),
        };
        let _ = read_rows(&bytes);
    }
}
