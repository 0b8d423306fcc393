//! Opening a log after a crash or on a damaged disk.

use super::recovery::SegmentScan;
use super::segment::SegmentHeader;
use super::*;

/// The writes of a batch of a few pages.
const LARGE: usize = 250;

#[tokio::test]
async fn leftovers_of_a_crash_during_creation_are_removed() {
    let (root, dir) = dir();
    for name in ["log.new", "log.old"] {
        fs::create_dir(root.path().join(name)).unwrap();
        fs::write(root.path().join(name).join("1.seg"), b"half").unwrap();
    }
    drop(DiskLog::open(&dir, None).unwrap());
    let left = segment::path(&dir, 7).with_extension("new");
    fs::write(&left, b"half").unwrap();
    drop(DiskLog::open(&dir, None).unwrap());
    assert!(!left.exists());
    drop(DiskLog::open(&dir, Some(3)).unwrap());
    let left: Vec<_> = fs::read_dir(root.path()).unwrap().collect();
    assert_eq!(left.len(), 1);
}

#[tokio::test]
async fn a_directory_without_a_log_is_left_unchanged() {
    let (_root, dir) = dir();
    fs::create_dir(&dir).unwrap();
    for file in ["", "0.jnl", "version"] {
        if !file.is_empty() {
            fs::write(dir.join(file), b"kept").unwrap();
        }
        for base in [None, Some(3)] {
            let rejection = DiskLog::open(&dir, base).err().unwrap();
            assert!(
                matches!(rejection, OpenError::Unrecognized { .. }),
                "{rejection}"
            );
            let said = rejection.to_string();
            assert!(
                said.contains("no segment") && said.contains(dir.to_str().unwrap()),
                "{said}"
            );
            assert!(said.contains("move it away"), "{said}");
        }
    }
    for file in ["0.jnl", "version"] {
        assert_eq!(fs::read(dir.join(file)).unwrap(), b"kept");
    }
}

/// Checks that opening fails twice and changes nothing. Returns the error.
fn rejection(dir: &Path) -> String {
    let bytes = || -> Vec<_> {
        segments(dir)
            .iter()
            .map(|at| fs::read(at).unwrap())
            .collect()
    };
    let before = bytes();
    let first = DiskLog::open(dir, None).err().unwrap();
    let second = DiskLog::open(dir, None).err().unwrap();
    assert!(matches!(second, OpenError::Damaged { .. }), "{second}");
    assert_eq!(first.to_string(), second.to_string());
    assert!(before == bytes(), "changed");
    second.to_string()
}

#[tokio::test]
async fn missing_batches_are_detected() {
    let (root, dir) = dir();
    let log = tiny(&dir);
    append(&log, 1..=60).await;
    drop(log);
    let firsts = segment::list(&dir).unwrap().segments;
    let gone = |name: &str, damage: &dyn Fn(&Path)| {
        let copied = root.path().join(name);
        copy(&dir, &copied);
        damage(&segment::path(&copied, firsts[2]));
        rejection(&copied)
    };
    let wanted = |from: Seq| format!("batches {from} to {} are missing", firsts[3] - 1);
    let said = gone("removed", &|path| fs::remove_file(path).unwrap());
    assert!(said.contains(&wanted(firsts[2])), "{said}");
    let bytes = fs::read(segment::path(&dir, firsts[2])).unwrap();
    let offsets = offsets(&bytes);
    for (at, offset) in offsets[..offsets.len() - 1].iter().enumerate() {
        let wanted = wanted(firsts[2] + at as Seq);
        for (cut, more) in [("head", 8), ("value", 40)] {
            let said = gone(&format!("{cut}-{at}"), &|path| {
                fs::write(path, &bytes[..offset + more]).unwrap();
            });
            assert!(said.contains(&wanted), "{said}");
        }
        let said = gone(&format!("zero-{at}"), &|path| {
            let mut bytes = bytes.clone();
            bytes[*offset..].fill(0);
            fs::write(path, bytes).unwrap();
        });
        assert!(said.contains(&wanted), "{said}");
    }
}

#[tokio::test]
async fn segments_of_different_logs_are_rejected() {
    let (root, dir) = dir();
    let log = tiny(&dir);
    append(&log, 1..=60).await;
    drop(log);
    let firsts = segment::list(&dir).unwrap().segments;
    let other = root.path().join("other");
    let log = tiny(&other);
    append(&log, 1..=60).await;
    drop(log);
    for first in [firsts[0], firsts[2], *firsts.last().unwrap()] {
        let (path, from) = (segment::path(&dir, first), segment::path(&other, first));
        let own = fs::read(&path).unwrap();
        fs::copy(from, &path).unwrap();
        let said = rejection(&dir);
        assert!(said.contains("another log"), "{said}");
        // A segment under another name.
        fs::copy(segment::path(&dir, firsts[1]), &path).unwrap();
        let said = rejection(&dir);
        assert!(said.contains("begins with batch"), "{said}");
        // Any bit of its header.
        for bit in (0..64 * 8).step_by(17) {
            let mut bytes = own.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            fs::write(&path, bytes).unwrap();
            let said = rejection(&dir);
            assert!(said.contains(path.to_str().unwrap()), "{said}");
        }
        fs::write(&path, own).unwrap();
    }
    assert_eq!(DiskLog::open(&dir, None).unwrap().end(), 60);
}

/// Writes nine batches and a long tenth one. Returns the segment, and the start and end of the
/// tenth batch in it.
async fn ten_batches(dir: &Path) -> (Vec<u8>, usize, usize) {
    let log = DiskLog::open(dir, None).unwrap();
    append(&log, 1..=9).await;
    log.append(batch(10, LARGE)).await.unwrap();
    drop(log);
    let bytes = fs::read(&segments(dir)[0]).unwrap();
    let offsets = offsets(&bytes);
    assert_eq!(offsets.len(), 11);
    (bytes, offsets[9], offsets[10])
}

/// Opens the log with `bytes` as its segment. Returns its end.
async fn end_of(dir: &Path, bytes: &[u8], what: &str) -> Seq {
    let file = segments(dir).remove(0);
    fs::write(&file, bytes).unwrap();
    let log = DiskLog::open(dir, None).map_err(|error| format!("{what}: {error}"));
    let log = log.unwrap();
    let end = log.end();
    check(&read(&log, 0).await, 0);
    if end == 9 {
        // Shorter batches than the truncated one, none of which may remain behind them.
        append(&log, 10..=11).await;
        drop(log);
        let bytes = fs::read(&file).unwrap();
        let end = *offsets(&bytes).last().unwrap();
        assert!(bytes[end..].iter().all(|byte| *byte == 0), "{what}");
        let log = DiskLog::open(dir, None).unwrap();
        assert_eq!(log.end(), 11, "{what}");
        check(&read(&log, 0).await, 0);
    }
    end
}

/// Ways in which the part of `bytes` from `begin` to `end` can be torn at `cut`.
fn torn(bytes: &[u8], begin: usize, end: usize, cut: usize) -> [Vec<u8>; 3] {
    let with_zeros = |from: usize, to: usize| {
        let mut bytes = bytes.to_vec();
        bytes[from..to].fill(0);
        bytes
    };
    let head_gone = with_zeros(begin, cut.max(begin + 8));
    [bytes[..cut].to_vec(), with_zeros(cut, end), head_gone]
}

#[tokio::test]
async fn only_a_torn_tail_is_truncated() {
    let (_root, dir) = dir();
    let (bytes, begin, end) = ten_batches(&dir).await;
    let last = bytes.iter().rposition(|byte| *byte != 0).unwrap() + 1;
    assert!(end - begin > 2 * 4096 && end - last < 8);
    // Tests every offset in memory, and some in files.
    let header = SegmentHeader::read(&bytes).unwrap();
    for cut in (begin..last).step_by(8).chain([last - 1]) {
        for (shape, torn) in torn(&bytes[..end + 8], begin, end, cut).iter().enumerate() {
            let found = SegmentScan::new(&header, torn).unwrap();
            assert_eq!(found.position.seq, 9, "{shape} at {cut}");
        }
    }
    let some = (begin..last).step_by(1832);
    for cut in some.chain([begin + 8, begin + 16, begin + 24, last - 1]) {
        for (shape, torn) in torn(&bytes, begin, end, cut).iter().enumerate() {
            let what = format!("{shape} at {}", cut - begin);
            assert_eq!(end_of(&dir, torn, &what).await, 9, "{what}");
        }
    }
    // Missing zeros and padding are harmless.
    for cut in [last, end, end + 1, end + 4096] {
        assert_eq!(end_of(&dir, &bytes[..cut], "space").await, 10);
    }
}

#[tokio::test]
async fn a_last_batch_with_missing_pages_or_sectors_is_truncated() {
    let (_root, dir) = dir();
    let (bytes, begin, end) = ten_batches(&dir).await;
    let pages = begin / 4096..=(end - 1) / 4096;
    let count = pages.clone().count();
    for lost in 1..1_u32 << count {
        let mut torn = bytes.clone();
        for (index, page) in pages.clone().enumerate() {
            if lost & 1 << index != 0 {
                torn[(page * 4096).max(begin)..(page * 4096 + 4096).min(end)].fill(0);
            }
        }
        assert_eq!(end_of(&dir, &torn, "pages").await, 9, "{lost:b}");
    }
    for sector in begin / 512..=(end - 1) / 512 {
        let mut torn = bytes.clone();
        torn[(sector * 512).max(begin)..(sector * 512 + 512).min(end)].fill(0);
        assert_eq!(end_of(&dir, &torn, "sector").await, 9, "{sector}");
    }
}

#[tokio::test]
async fn a_flipped_bit_in_the_last_segment_is_rejected() {
    let (_root, dir) = dir();
    let (bytes, begin, end) = ten_batches(&dir).await;
    let offsets = offsets(&bytes);
    let header = SegmentHeader::read(&bytes).unwrap();
    let mut files = 0;
    for (count, bit) in (offsets[0] * 8..end * 8).step_by(5).enumerate() {
        let at = bit / 8;
        let mut changed = bytes[..end + 8].to_vec();
        changed[at] ^= 1 << (bit % 8);
        let record = offsets.partition_point(|offset| *offset <= at);
        let padding = record::read(&changed[offsets[record - 1]..]).is_some();
        // A wrong sequence number or length, or a byte that became 0, may also be a torn write.
        let torn = (begin + 8..begin + 20).contains(&at) || (at > begin && changed[at] == 0);
        if padding || torn {
            continue;
        }
        let error = SegmentScan::new(&header, &changed).err().unwrap();
        let ReadError::Damaged { seq, why } = &error else {
            panic!("{error}");
        };
        assert_eq!(*seq, record as Seq, "{error}");
        if count % 500 == 0 {
            changed.resize(bytes.len(), 0);
            fs::write(&segments(&dir)[0], changed).unwrap();
            assert!(rejection(&dir).contains(&format!("batch {seq}: {why}")));
            files += 1;
        }
    }
    assert!(files > 10, "{files}");
}

#[tokio::test]
async fn a_flipped_bit_in_an_earlier_segment_names_the_batch() {
    let (_root, dir) = dir();
    let log = tiny(&dir);
    append(&log, 1..=30).await;
    drop(log);
    let file = segments(&dir).remove(1);
    let first = segment::list(&dir).unwrap().segments[1];
    let bytes = fs::read(&file).unwrap();
    let offsets = offsets(&bytes);
    let mut opened = 0;
    for bit in (offsets[0] * 8..offsets[offsets.len() - 1] * 8).step_by(13) {
        let mut changed = bytes.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        let index = offsets.partition_point(|offset| *offset <= bit / 8) - 1;
        if record::read(&changed[offsets[index]..]).is_some() {
            // Padding.
            continue;
        }
        fs::write(&file, changed).unwrap();
        let seq = first + index as Seq;
        match DiskLog::open(&dir, None) {
            Ok(log) => {
                opened += 1;
                let mut subscription = log.subscribe(position(&log, 0)).await.unwrap();
                let mut entries = Vec::new();
                let error = loop {
                    if let Err(error) = subscription.next(&mut entries).await {
                        break error;
                    }
                };
                assert!(
                    matches!(error, ReadError::Damaged { seq: at, .. } if at == seq),
                    "{error}"
                );
                assert_eq!(entries.len() as Seq, seq - 1);
                check(&entries, 0);
            }
            Err(error) => assert!(matches!(error, OpenError::Damaged { .. }), "{error}"),
        }
    }
    assert!(opened > 10, "{opened}");
}

#[tokio::test]
async fn a_damaged_value_names_the_batch() {
    let (_root, dir) = dir();
    let log = tiny(&dir);
    append(&log, 1..=10).await;
    drop(log);
    // The checksum is valid, so the error is in the value.
    let file = segments(&dir).remove(0);
    let bytes = fs::read(&file).unwrap();
    let offsets = offsets(&bytes);
    for (index, change, value) in [(0, 20, 0), (1, 20, 7), (2, 60, 7)] {
        let mut bytes = bytes.clone();
        bytes[offsets[index] + change] = value;
        let header = record::RecordHeader::read(&bytes[offsets[index]..]).unwrap();
        let summed = &bytes[offsets[index] + 8..offsets[index] + header.bytes()];
        let checksum = xxhash_rust::xxh3::xxh3_64(summed).to_le_bytes();
        bytes[offsets[index]..offsets[index] + 8].copy_from_slice(&checksum);
        fs::write(&file, bytes).unwrap();
        let log = tiny(&dir);
        let seq = index as Seq + 1;
        let mut subscription = log.subscribe(position(&log, seq - 1)).await.unwrap();
        let error = subscription.next(&mut Vec::new()).await.unwrap_err();
        let expected = match value {
            7 if change == 20 => format!("batch {seq} has format 7"),
            _ => format!("batch {seq} of the log is damaged"),
        };
        assert!(error.to_string().starts_with(&expected), "{error}");
    }
}
