//! The reader of backups. The CRCs and the checksum reject random bytes early, so the first byte of
//! the input is a kind: a file, text to pack into a valid file, or a small change to a valid file.
//!
//! Nothing panics. The summary of an accepted file has the rows and the digest that the sink
//! received. The functions below check more for each kind.

use std::collections::HashSet;
use std::sync::LazyLock;

use flate2::Crc;
use gradestore::backup::{
    BackupError, BackupWriter, ChunkSource, EndRecord, FORMAT, HeadRecord, ReadProgress, Summary,
    end_position, read,
};
use gradestore::grade::{Changes, Digest, FIELDS, Patch, USER_ID, Values, Write};
use gradestore::log::Chain;
use gradestore::store::{RecordBatch, Store};
use parking_lot::Mutex;
use xxhash_rust::xxh3::xxh3_128;

/// A change of more bytes could forge a record and its CRC-32, which the reader cannot detect.
const CHANGED_BYTES_MAX: usize = 4;
/// The header row of a third-party file.
static HEADER: LazyLock<String> = LazyLock::new(|| format!("{USER_ID},{}\n", FIELDS.join(",")));
/// Valid files to change: one from the writer, and one with several members.
static VALID: LazyLock<[Vec<u8>; 2]> =
    LazyLock::new(|| [written_backup(), gradestore_file(THREE_MEMBERS, None)]);
const THREE_MEMBERS: &[u8] =
    b"a,1,2,3,4\n\"b,\"\"c\",-1,0,0,9223372036854775807\n\0d,0,0,0,0\n\0e,5,6,7,8\n";

pub(crate) fn check(data: &[u8]) {
    let Some((kind, rest)) = data.split_first() else {
        return;
    };
    match kind % 5 {
        0 => drop(checked(rest)),
        1 => drop(checked(&gzip(&[rest]))),
        2 => drop(checked(&gzip(&[HEADER.as_bytes(), rest]))),
        3 => packed(rest),
        _ => changed(*kind, rest),
    }
}

/// Rows. Only a reader with one thread keeps their order.
type Rows = Vec<(String, Values)>;

fn checked(file: &[u8]) -> Result<(Summary, Rows), BackupError> {
    let rows = Mutex::new(Rows::new());
    let digest = Mutex::new(Digest::default());
    let sink = |batch: &RecordBatch| {
        let received = batch.iter().map(|(id, values)| (id.to_owned(), *values));
        rows.lock().extend(received);
        *digest.lock() += batch.digest();
        batch.digest()
    };
    let end = end_position(file);
    let summary = read(file, &sink, &ReadProgress::default())?;
    let rows = rows.into_inner();
    assert!(summary.records.is_some() || is_unique(&rows));
    assert_eq!(summary.rows, rows.len() as u64);
    assert_eq!(summary.digest, digest.into_inner());
    assert_eq!(summary.bytes, file.len() as u64);
    let wanted = summary.records.as_ref().map_or(0, |(_, end)| end.position);
    assert_eq!(end.ok(), Some(wanted));
    Ok((summary, rows))
}

/// Checks `text` in gradestore's format. If the reader accepts it, the reader of third-party files
/// accepts the text too, with the same rows, unless a user is in it twice.
fn packed(text: &[u8]) {
    let file = gradestore_file(text, None);
    match checked(&file) {
        Ok((_, mut rows)) => {
            let text: Vec<_> = text.iter().copied().filter(|byte| *byte != 0).collect();
            let third_party = checked(&gzip(&[HEADER.as_bytes(), &text]));
            if !is_unique(&rows) {
                assert!(third_party.is_err(), "accepted a user twice");
                return;
            }
            let (_, mut third_party) =
                third_party.expect("a third-party file with the same rows is accepted");
            rows.sort_unstable();
            third_party.sort_unstable();
            assert_eq!(rows, third_party);
        }
        Err(error) => assert!(!matches!(error, BackupError::Mismatch { .. }), "{error}"),
    }
}

fn is_unique(rows: &Rows) -> bool {
    let users: HashSet<_> = rows.iter().map(|(user, _)| user).collect();
    users.len() == rows.len()
}

/// Checks that a valid file with some bytes replaced is rejected, unless the bytes are the same.
fn changed(kind: u8, rest: &[u8]) {
    let valid = &VALID[usize::from(kind >= 128)];
    let Some((&[low, high, removed], put)) = rest.split_first_chunk::<3>() else {
        return;
    };
    let at = usize::from(u16::from_le_bytes([low, high])) % (valid.len() + 1);
    let until = (at + usize::from(removed)).min(valid.len());
    let file = [&valid[..at], put, &valid[until..]].concat();
    let accepted = checked(&file).is_ok();
    if file == *valid {
        assert!(accepted, "a valid file is rejected");
    } else if put.len() <= CHANGED_BYTES_MAX {
        assert!(
            !accepted,
            "accepted a file with {} bytes at {at} replaced by {put:?}",
            until - at
        );
    }
}

fn gzip(parts: &[&[u8]]) -> Vec<u8> {
    let text = parts.concat();
    let mut file = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255];
    file.extend_from_slice(&deflated(&text));
    file.extend_from_slice(&crc32(&text).to_le_bytes());
    file.extend_from_slice(&(text.len() as u32).to_le_bytes());
    file
}

/// Uncompressed blocks: with an encoder, building its tables would dominate the time of a run.
fn deflated(text: &[u8]) -> Vec<u8> {
    let mut blocks = Vec::new();
    for block in text.chunks(usize::from(u16::MAX)) {
        let length = block.len() as u16;
        blocks.push(0);
        blocks.extend_from_slice(&length.to_le_bytes());
        blocks.extend_from_slice(&(!length).to_le_bytes());
        blocks.extend_from_slice(block);
    }
    // An empty last block.
    blocks.extend_from_slice(&[1, 0, 0, 0xff, 0xff]);
    blocks
}

fn head() -> HeadRecord {
    HeadRecord {
        format: FORMAT,
        created_ns: 1_700_000_000_000_000_000,
        log_id: "fuzz".into(),
        position: 3,
        time_ns: 1_700_000_000_000_000_000,
        chain: Chain::default(),
        previous_chain: Chain::default(),
        rows_expected: 4,
        shard_seed: None,
    }
}

/// A backup from the writer.
fn written_backup() -> Vec<u8> {
    let store = Store::new();
    for (user, id) in ["a", "a b", "\"", "ж,1", "x@example.org"]
        .iter()
        .enumerate()
    {
        store.apply_all(&[Write::Set(Patch {
            user_id: *id,
            changes: Changes::all([user as i64 - 2, 0, i64::MIN, i64::MAX]),
        })]);
    }
    let (mut writer, mut file) = BackupWriter::start(&head());
    let source = ChunkSource::new(&store);
    while let Some(chunk) = source.next() {
        writer.add(&chunk);
        file.extend_from_slice(&chunk.bytes);
    }
    file.extend_from_slice(&writer.end(&head().position()));
    file
}

/// A file in the format that `src/backup/mod.rs` documents. A zero byte in `text` begins another
/// member. Without a digest the file has the one that the reader computes.
fn gradestore_file(text: &[u8], digest: Option<String>) -> Vec<u8> {
    let (_, mut file) = BackupWriter::start(&head());
    let mut rows = 0;
    for text in text.split(|byte| *byte == 0) {
        // User ids contain no line breaks.
        let rows_here = text.iter().filter(|byte| **byte == b'\n').count() as u32;
        rows += u64::from(rows_here);
        let deflated = deflated(text);
        // The fixed part, FEXTRA with its 17 bytes, and the trailer.
        let member_bytes = (10 + 2 + 17 + deflated.len() + 8) as u32;
        let mut content = vec![b'M'];
        for number in [member_bytes, text.len() as u32, rows_here] {
            content.extend_from_slice(&number.to_le_bytes());
        }
        member(&mut file, &content, &deflated, text);
    }
    let end = EndRecord {
        position: 4,
        chain: Chain::default(),
        rows,
        digest: digest.clone().unwrap_or_default(),
        checksum: format!("{:032x}", xxh3_128(&file)),
    };
    let end = serde_json::to_vec(&end).unwrap();
    let content = [&b"E"[..], &crc32(&end).to_le_bytes(), &end].concat();
    member(&mut file, &content, &[3, 0], &[]);
    match read(&file[..], &RecordBatch::digest, &ReadProgress::default()) {
        Err(BackupError::Mismatch { found, .. }) if digest.is_none() => {
            gradestore_file(text, Some(found))
        }
        _ => file,
    }
}

fn member(file: &mut Vec<u8>, content: &[u8], deflated: &[u8], text: &[u8]) {
    file.extend_from_slice(&[0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 255]);
    file.extend_from_slice(&(content.len() as u16 + 4).to_le_bytes());
    file.extend_from_slice(b"GS");
    file.extend_from_slice(&(content.len() as u16).to_le_bytes());
    file.extend_from_slice(content);
    file.extend_from_slice(deflated);
    file.extend_from_slice(&crc32(text).to_le_bytes());
    file.extend_from_slice(&(text.len() as u32).to_le_bytes());
}

fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = Crc::new();
    crc.update(bytes);
    crc.sum()
}
