//! What crashes and broken disks leave, and what it is made of at opening.

use super::recovery::Found;
use super::segment::Header;
use super::*;

/// Of a batch that is a few pages long.
const LARGE: usize = 250;

#[tokio::test]
async fn what_a_crash_left_of_making_a_log_is_cleared_away() {
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
async fn what_is_no_log_of_this_version_is_left_alone() {
    let (_root, dir) = dir();
    fs::create_dir(&dir).unwrap();
    for file in ["", "0.jnl", "version"] {
        if !file.is_empty() {
            fs::write(dir.join(file), b"kept").unwrap();
        }
        for base in [None, Some(3)] {
            let refused = DiskLog::open(&dir, base).err().unwrap();
            assert!(matches!(refused, OpenError::Foreign { .. }), "{refused}");
            let said = refused.to_string();
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

/// Opening must refuse, twice, and change nothing; what it says.
fn refused(dir: &Path) -> String {
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
async fn a_hole_is_found() {
    let (root, dir) = dir();
    let log = tiny(&dir);
    append(&log, 1..=60).await;
    drop(log);
    let firsts = segment::list(&dir).unwrap().segments;
    let gone = |name: &str, damage: &dyn Fn(&Path)| {
        let copied = root.path().join(name);
        copy(&dir, &copied);
        damage(&segment::path(&copied, firsts[2]));
        refused(&copied)
    };
    let wanted = |from: Seq| format!("batches {from} to {} are missing", firsts[3] - 1);
    let said = gone("removed", &|path| fs::remove_file(path).unwrap());
    assert!(said.contains(&wanted(firsts[2])), "{said}");
    let bytes = fs::read(segment::path(&dir, firsts[2])).unwrap();
    let places = places(&bytes);
    for (at, place) in places[..places.len() - 1].iter().enumerate() {
        let wanted = wanted(firsts[2] + at as Seq);
        for (cut, more) in [("head", 8), ("value", 40)] {
            let said = gone(&format!("{cut}-{at}"), &|path| {
                fs::write(path, &bytes[..place + more]).unwrap();
            });
            assert!(said.contains(&wanted), "{said}");
        }
        let said = gone(&format!("zero-{at}"), &|path| {
            let mut bytes = bytes.clone();
            bytes[*place..].fill(0);
            fs::write(path, bytes).unwrap();
        });
        assert!(said.contains(&wanted), "{said}");
    }
}

#[tokio::test]
async fn segments_that_do_not_belong_together_are_refused() {
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
        let said = refused(&dir);
        assert!(said.contains("another log"), "{said}");
        // Under another's name.
        fs::copy(segment::path(&dir, firsts[1]), &path).unwrap();
        let said = refused(&dir);
        assert!(said.contains("begins with batch"), "{said}");
        // Any bit of what its header says.
        for bit in (0..64 * 8).step_by(17) {
            let mut bytes = own.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            fs::write(&path, bytes).unwrap();
            let said = refused(&dir);
            assert!(said.contains(path.to_str().unwrap()), "{said}");
        }
        fs::write(&path, own).unwrap();
    }
    assert_eq!(DiskLog::open(&dir, None).unwrap().end(), 60);
}

/// Nine batches, and as the tenth one that is long; the segment's file, and where the tenth begins
/// and ends in it.
async fn ten(dir: &Path) -> (Vec<u8>, usize, usize) {
    let log = DiskLog::open(dir, None).unwrap();
    append(&log, 1..=9).await;
    log.append(batch(10, LARGE)).await.unwrap();
    drop(log);
    let bytes = fs::read(&segments(dir)[0]).unwrap();
    let places = places(&bytes);
    assert_eq!(places.len(), 11);
    (bytes, places[9], places[10])
}

/// Opens the log as it is with `bytes` for its segment; where that says that it ends.
async fn end_of(dir: &Path, bytes: &[u8], what: &str) -> Seq {
    let file = segments(dir).remove(0);
    fs::write(&file, bytes).unwrap();
    let log = DiskLog::open(dir, None).map_err(|error| format!("{what}: {error}"));
    let log = log.unwrap();
    let end = log.end();
    check(&read(&log, 0).await, 0);
    if end == 9 {
        // Shorter than what was cut off, none of which may be left behind it.
        append(&log, 10..=11).await;
        drop(log);
        let bytes = fs::read(&file).unwrap();
        let end = *places(&bytes).last().unwrap();
        assert!(bytes[end..].iter().all(|byte| *byte == 0), "{what}");
        let log = DiskLog::open(dir, None).unwrap();
        assert_eq!(log.end(), 11, "{what}");
        check(&read(&log, 0).await, 0);
    }
    end
}

/// What is left of `bytes` when the part from `begin` to `end` of it is torn at `cut`.
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
async fn a_torn_tail_is_cut_off_and_nothing_else() {
    let (_root, dir) = dir();
    let (bytes, begin, end) = ten(&dir).await;
    let last = bytes.iter().rposition(|byte| *byte != 0).unwrap() + 1;
    assert!(end - begin > 2 * 4096 && end - last < 8);
    // At every place in memory, and at some in files.
    let header = Header::read(&bytes).unwrap();
    for cut in (begin..last).step_by(8).chain([last - 1]) {
        for (shape, torn) in torn(&bytes[..end + 8], begin, end, cut).iter().enumerate() {
            let found = Found::in_segment(&header, torn);
            assert_eq!(
                found.map(|found| found.position.seq),
                Ok(9),
                "{shape} at {cut}"
            );
        }
    }
    let some = (begin..last).step_by(1832);
    for cut in some.chain([begin + 8, begin + 16, begin + 24, last - 1]) {
        for (shape, torn) in torn(&bytes, begin, end, cut).iter().enumerate() {
            let what = format!("{shape} at {}", cut - begin);
            assert_eq!(end_of(&dir, torn, &what).await, 9, "{what}");
        }
    }
    // Room and padding that are gone are no loss.
    for cut in [last, end, end + 1, end + 4096] {
        assert_eq!(end_of(&dir, &bytes[..cut], "room").await, 10);
    }
}

#[tokio::test]
async fn a_batch_that_lacks_any_of_its_pages_or_sectors_is_cut_off() {
    let (_root, dir) = dir();
    let (bytes, begin, end) = ten(&dir).await;
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
async fn a_bit_that_changed_in_the_last_segment_is_refused() {
    let (_root, dir) = dir();
    let (bytes, begin, end) = ten(&dir).await;
    let places = places(&bytes);
    let header = Header::read(&bytes).unwrap();
    let mut files = 0;
    for (count, bit) in (places[0] * 8..end * 8).step_by(5).enumerate() {
        let at = bit / 8;
        let mut changed = bytes[..end + 8].to_vec();
        changed[at] ^= 1 << (bit % 8);
        let record = places.partition_point(|place| *place <= at);
        let padding = record::read(&changed[places[record - 1]..]).is_some();
        // A last batch's number and length may as well be torn, and so may a byte that became 0.
        let torn = (begin + 8..begin + 20).contains(&at) || (at > begin && changed[at] == 0);
        if padding || torn {
            continue;
        }
        let why = Found::in_segment(&header, &changed).err().unwrap();
        assert!(why.contains(&format!("batch {record} is not")), "{why}");
        if count % 500 == 0 {
            changed.resize(bytes.len(), 0);
            fs::write(&segments(&dir)[0], changed).unwrap();
            assert!(refused(&dir).contains(&why));
            files += 1;
        }
    }
    assert!(files > 10, "{files}");
}

#[tokio::test]
async fn a_bit_that_changed_in_an_earlier_segment_is_named() {
    let (_root, dir) = dir();
    let log = tiny(&dir);
    append(&log, 1..=30).await;
    drop(log);
    let file = segments(&dir).remove(1);
    let first = segment::list(&dir).unwrap().segments[1];
    let bytes = fs::read(&file).unwrap();
    let places = places(&bytes);
    let mut opened = 0;
    for bit in (places[0] * 8..places[places.len() - 1] * 8).step_by(13) {
        let mut changed = bytes.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        let index = places.partition_point(|place| *place <= bit / 8) - 1;
        if record::read(&changed[places[index]..]).is_some() {
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
async fn a_damaged_batch_is_named() {
    let (_root, dir) = dir();
    let log = tiny(&dir);
    append(&log, 1..=10).await;
    drop(log);
    // With a checksum that is right: what is wrong is told by the value.
    let file = segments(&dir).remove(0);
    let bytes = fs::read(&file).unwrap();
    let places = places(&bytes);
    for (index, change) in [(0, 20), (1, 20), (2, 60)] {
        let mut bytes = bytes.clone();
        bytes[places[index] + change] = b'\x07';
        let head = record::Head::read(&bytes[places[index]..]).unwrap();
        let summed = &bytes[places[index] + 8..places[index] + head.bytes()];
        let checksum = xxhash_rust::xxh3::xxh3_64(summed).to_le_bytes();
        bytes[places[index]..places[index] + 8].copy_from_slice(&checksum);
        fs::write(&file, bytes).unwrap();
        let log = tiny(&dir);
        let seq = index as Seq + 1;
        let mut subscription = log.subscribe(position(&log, seq - 1)).await.unwrap();
        let error = subscription.next(&mut Vec::new()).await.unwrap_err();
        assert!(
            matches!(error, ReadError::Damaged { seq: at, .. } if at == seq),
            "{error}"
        );
    }
}
