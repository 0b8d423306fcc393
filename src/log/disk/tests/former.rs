//! Logs of the time before segments: what was in them stays, whatever cuts their conversion.

use fjall::{Database, KeyspaceCreateOptions, PersistMode};

use super::*;
use crate::log::disk::former::{convert, is_at, moved};

const ID: Origin = Origin(0xF0);

/// Makes one with these batches, a keyspace beginning at each of `firsts`.
fn former(dir: &Path, firsts: &[Seq], batches: impl IntoIterator<Item = Seq>) {
    let database = Database::builder(dir).worker_threads(1).open().unwrap();
    let keyspace = |name: &str| {
        let options = KeyspaceCreateOptions::default;
        database.keyspace(name, options).unwrap()
    };
    let about = keyspace("about");
    about.insert("id", format!("disk-{ID}")).unwrap();
    about.insert("base", 3_u64.to_le_bytes()).unwrap();
    let segment = |first: &Seq| keyspace(&format!("seg-{first}"));
    let segments: Vec<_> = firsts.iter().map(segment).collect();
    let mut value = Vec::new();
    for seq in batches {
        let entry = Entry {
            seq,
            time_ns: seq * 10,
            batch: batch(seq, 2),
        };
        format::write(&entry, &mut value);
        let after = firsts.partition_point(|first| *first <= seq);
        segments[after - 1]
            .insert(seq.to_be_bytes(), &value[..])
            .unwrap();
    }
    database.persist(PersistMode::SyncAll).unwrap();
}

/// A log that numbers from 4 on and has forgotten what is before 7.
fn usual(dir: &Path) {
    former(dir, &[7, 40, 90], 7..=100);
}

/// It has all of the usual one's batches and takes more.
async fn holds_the_usual(dir: &Path) {
    let log = tiny(dir);
    assert_eq!(log.id().0.as_ref(), format!("disk-{ID}"));
    assert_eq!((log.first(), log.end()), (7, 100));
    assert!(segments(dir).len() > 3);
    let entries = read(&log, 6).await;
    check(&entries, 6);
    for entry in &entries {
        assert_eq!(entry.batch.number, entry.seq);
        assert_eq!(entry.time_ns, entry.seq * 10);
    }
    let next = batch(101, 2);
    log.append(next).await.unwrap();
    drop(log);
    let log = tiny(dir);
    assert_eq!(log.end(), 101);
    check(&read(&log, 6).await, 6);
    for beside in ["new", "old", "former"] {
        assert!(!dir.with_extension(beside).exists(), "{beside}");
    }
}

#[tokio::test]
async fn a_former_log_is_the_same_log_in_segments() {
    let (_root, dir) = dir();
    usual(&dir);
    let refused = DiskLog::open_with(&dir, Some(9), TINY).err();
    assert!(matches!(
        refused,
        Some(OpenError::NotEmpty { end: 100, .. })
    ));
    holds_the_usual(&dir).await;
}

#[tokio::test]
async fn a_former_log_without_batches_goes_on_after_what_it_began_after() {
    let (_root, dir) = dir();
    former(&dir, &[4], []);
    let log = DiskLog::open_with(&dir, Some(3), TINY).unwrap();
    assert_eq!(log.id().0.as_ref(), format!("disk-{ID}"));
    assert_eq!((log.first(), log.end()), (4, 3));
    append(&log, 1..=1).await;
    assert_eq!(log.end(), 4);
}

#[tokio::test]
async fn a_conversion_that_is_cut_begins_again_or_is_done() {
    // While it writes.
    let (_root, one) = dir();
    usual(&one);
    let half = one.with_extension("new");
    fs::create_dir(&half).unwrap();
    fs::write(segment::path(&half, 7), b"gradeseg").unwrap();
    holds_the_usual(&one).await;

    // With nothing where the log should be.
    let (_root, two) = dir();
    usual(&two);
    fs::rename(&two, moved(&two)).unwrap();
    holds_the_usual(&two).await;

    // With the old log still there.
    let (_root, three) = dir();
    usual(&three);
    convert(&three, TINY).unwrap();
    usual(&moved(&three));
    holds_the_usual(&three).await;
}

#[test]
fn a_former_log_that_is_not_whole_is_refused_and_left_as_it_is() {
    for (firsts, batches, why) in [
        (
            &[7, 40, 90][..],
            vec![7, 8, 40, 41],
            "batches 9 to 39 are missing",
        ),
        (&[7, 40], vec![7, 8], "batches 9 to 39 are missing"),
        (&[7], vec![7, 8, 10], "batches 9 to 9 are missing"),
        (&[7], vec![8], "batches 7 to 7 are missing"),
        (&[], vec![], "it has no segment"),
    ] {
        let (_root, dir) = dir();
        former(&dir, firsts, batches);
        for _ in 0..2 {
            let said = DiskLog::open_with(&dir, None, TINY)
                .err()
                .unwrap()
                .to_string();
            assert!(said.contains(why), "{said}");
            assert!(is_at(&dir) && !dir.with_extension("new").exists());
        }
    }
    // No room, or no right, to write beside it.
    let (_root, dir) = dir();
    usual(&dir);
    fs::write(dir.with_extension("new"), "").unwrap();
    let said = DiskLog::open_with(&dir, None, TINY)
        .err()
        .unwrap()
        .to_string();
    assert!(said.contains("cannot open the log"), "{said}");
    assert!(is_at(&dir));
}

#[test]
fn a_damaged_batch_of_a_former_log_is_named() {
    let (_root, dir) = dir();
    usual(&dir);
    let database = Database::builder(&dir).open().unwrap();
    let options = KeyspaceCreateOptions::default;
    let segment = database.keyspace("seg-40", options).unwrap();
    segment.insert(50_u64.to_be_bytes(), "\u{1}").unwrap();
    drop((segment, database));
    let said = DiskLog::open_with(&dir, None, TINY)
        .err()
        .unwrap()
        .to_string();
    assert!(
        said.contains("batch 50") && said.contains("within its header"),
        "{said}"
    );
    assert!(is_at(&dir));
}
