//! The reader of backups. CRCs and the checksum stop bytes that are merely random at the gate, so the
//! first byte says what the others are: a file as it is, text that is packed well, or a small change
//! to a sound file.
//!
//! Whatever is read, nothing panics, and what is accepted adds up: as many rows and the digest that
//! the sink was given. More is demanded where more is known, see below.

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

/// A change of more bytes could hold a record and its CRC-32: a forgery, which nothing here stops.
const CHANGED_BYTES_MAX: usize = 4;
/// The columns that `packed` gives a foreign file.
static HEADER: LazyLock<String> = LazyLock::new(|| format!("{USER_ID},{}\n", FIELDS.join(",")));
/// Files that are to be changed: one that the writer made, and one of several members.
static SOUND: LazyLock<[Vec<u8>; 2]> = LazyLock::new(|| [written(), ours(THREE_MEMBERS, None)]);
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

/// Some rows, in order where one thread reads them.
type Rows = Vec<(String, Values)>;

fn checked(file: &[u8]) -> Result<(Summary, Rows), BackupError> {
    let rows = Mutex::new(Rows::new());
    let digest = Mutex::new(Digest::default());
    let sink = |batch: &RecordBatch| {
        let given = batch.iter().map(|(id, values)| (id.to_owned(), *values));
        rows.lock().extend(given);
        *digest.lock() += batch.digest();
        batch.digest()
    };
    let end = end_position(file);
    let summary = read(file, &sink, &ReadProgress::default())?;
    let rows = rows.into_inner();
    assert_eq!(summary.rows, rows.len() as u64);
    assert_eq!(summary.digest, digest.into_inner());
    assert_eq!(summary.bytes, file.len() as u64);
    let wanted = summary.records.as_ref().map_or(0, |(_, end)| end.position);
    assert_eq!(end.ok(), Some(wanted));
    Ok((summary, rows))
}

/// `text` in members of our own form. What our reader takes, the one for foreign files takes as well,
/// with the same rows.
fn packed(text: &[u8]) {
    let file = ours(text, None);
    match checked(&file) {
        Ok((_, mut rows)) => {
            let text: Vec<_> = text.iter().copied().filter(|byte| *byte != 0).collect();
            let (_, mut foreign) = checked(&gzip(&[HEADER.as_bytes(), &text]))
                .expect("the reader of foreign files takes less than the one of our own");
            rows.sort_unstable();
            foreign.sort_unstable();
            assert_eq!(rows, foreign);
        }
        Err(error) => assert!(!matches!(error, BackupError::Mismatch { .. }), "{error}"),
    }
}

/// A sound file with some bytes put in place of others is refused, unless they are the same.
fn changed(kind: u8, rest: &[u8]) {
    let sound = &SOUND[usize::from(kind >= 128)];
    let Some((&[low, high, removed], put)) = rest.split_first_chunk::<3>() else {
        return;
    };
    let at = usize::from(u16::from_le_bytes([low, high])) % (sound.len() + 1);
    let until = (at + usize::from(removed)).min(sound.len());
    let file = [&sound[..at], put, &sound[until..]].concat();
    let accepted = checked(&file).is_ok();
    if file == *sound {
        assert!(accepted, "a sound file is refused");
    } else if put.len() <= CHANGED_BYTES_MAX {
        assert!(!accepted, "{} bytes at {at} became {put:?}", until - at);
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

/// Blocks that are not compressed: an encoder's tables would be most of what a run costs.
fn deflated(text: &[u8]) -> Vec<u8> {
    let mut blocks = Vec::new();
    for block in text.chunks(usize::from(u16::MAX)) {
        let length = block.len() as u16;
        blocks.push(0);
        blocks.extend_from_slice(&length.to_le_bytes());
        blocks.extend_from_slice(&(!length).to_le_bytes());
        blocks.extend_from_slice(block);
    }
    // The last one, of nothing.
    blocks.extend_from_slice(&[1, 0, 0, 0xff, 0xff]);
    blocks
}

fn head() -> HeadRecord {
    HeadRecord {
        format: FORMAT,
        log_id: "fuzz".into(),
        position: 3,
        time_ns: 1_700_000_000_000_000_000,
        chain: Chain::default(),
        previous_chain: Chain::default(),
        rows_expected: 4,
    }
}

fn written() -> Vec<u8> {
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

/// A file by the description in `src/backup/mod.rs`: a 0 in `text` begins another member. Without a
/// digest it gets the one that the reader finds.
fn ours(text: &[u8], digest: Option<String>) -> Vec<u8> {
    let (_, mut file) = BackupWriter::start(&head());
    let mut rows = 0;
    for text in text.split(|byte| *byte == 0) {
        // No id has a line break.
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
        Err(BackupError::Mismatch { found, .. }) if digest.is_none() => ours(text, Some(found)),
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
