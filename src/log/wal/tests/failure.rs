//! A disk that fails, or has no room, while the log is open.

use std::os::unix::fs::FileExt;
use std::time::Duration;

use super::*;

/// How a write fails.
#[derive(Debug, Clone, Copy)]
enum Fails {
    /// Nothing is written.
    Before,
    /// Half of it is.
    Within,
    /// All is, and the sync says no.
    AtSync,
}

/// Makes writes fail from now on.
fn fail(log: &DiskLog, fails: Fails) {
    *log.shared.fault.lock() = Some(Box::new(move |file, at, record| {
        let written = match fails {
            Fails::Before => 0,
            Fails::Within => record.len() / 2,
            Fails::AtSync => record.len(),
        };
        file.write_all_at(&record[..written], at)?;
        Err(io::Error::other("input/output error"))
    }));
}

/// Keeps a segment that begins with batch `seq` from being made.
fn block(dir: &Path, seq: Seq) -> PathBuf {
    let way = segment::path(dir, seq).with_extension("new");
    fs::create_dir(&way).unwrap();
    way
}

fn assert_refused(append: Result<(), AppendError>) {
    let Err(AppendError::Refused(why)) = append else {
        panic!("{append:?}");
    };
    assert!(why.contains("failed") && why.contains("check"), "{why}");
}

async fn pending(append: &mut BoxFuture<'_, Result<(), AppendError>>) -> bool {
    let waited = tokio::time::timeout(Duration::from_millis(400), append);
    waited.await.is_err()
}

/// Waits until a batch's write has failed, and not until it is tried again.
async fn refused(log: &DiskLog, doubtful: &mut BoxFuture<'_, Result<(), AppendError>>) {
    while log.unwritable().is_none() {
        assert!(doubtful.now_or_never().is_none());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn a_failed_write_is_settled_in_a_new_segment() {
    for fails in [Fails::Before, Fails::Within, Fails::AtSync] {
        // Also where the failed batch is the first of its segment, which the new one then replaces.
        for before in [0, 4, 10] {
            let (root, dir) = dir();
            let log = tiny(&dir);
            append(&log, 1..=before).await;
            let mut subscription = log.subscribe(position(&log, before)).await.unwrap();
            fail(&log, fails);
            let mut doubtful = log.append(batch(before + 1, 2));
            assert!(pending(&mut doubtful).await);
            assert_refused(log.append(batch(99, 2)).await);
            assert!(log.unwritable().is_some());
            assert_eq!(log.end(), before);
            // A crash now leaves it in the log or not, and nothing else.
            let crashed = root.path().join("crashed");
            copy(&dir, &crashed);
            let other = tiny(&crashed);
            assert!((before..=before + 1).contains(&other.end()));
            check(&read(&other, 0).await, 0);
            drop(other);

            *log.shared.fault.lock() = None;
            doubtful.await.unwrap();
            assert_eq!(log.unwritable(), None);
            append(&log, before + 2..=before + 9).await;
            let mut entries = Vec::new();
            while entries.len() < 9 {
                subscription.next(&mut entries).await.unwrap();
            }
            check(&entries, before);
            assert!(segments(&dir).contains(&segment::path(&dir, before + 1)));
            let all = read(&log, 0).await;
            drop(log);
            let log = tiny(&dir);
            assert_eq!(log.end(), before + 9);
            let again = read(&log, 0).await;
            check(&again, 0);
            let numbers = |entries: &[Entry]| -> Vec<u64> {
                entries.iter().map(|entry| number(&entry.batch)).collect()
            };
            assert_eq!(numbers(&again), (1..=before + 9).collect::<Vec<_>>());
            assert_eq!(numbers(&all), numbers(&again));
            // It may be forgotten like any other.
            log.trim(before + 9).await.unwrap();
            assert!(log.first() > before + 1);
        }
    }
}

#[tokio::test]
async fn a_batch_in_doubt_is_not_read() {
    let (_root, dir) = dir();
    // So large that all of it is in one segment, and the first batches not in memory any more.
    let log = DiskLog::open(&dir, None).unwrap();
    append(&log, 1..=20).await;
    fail(&log, Fails::AtSync);
    let mut doubtful = log.append(batch(21, 2));
    // Before there is a new segment: all of it is in the old one.
    refused(&log, &mut doubtful).await;
    let mut subscription = log.subscribe(position(&log, 0)).await.unwrap();
    let mut entries = Vec::new();
    subscription.next(&mut entries).await.unwrap();
    assert_eq!(entries.len(), 20);
    let mut more = subscription.next(&mut entries);
    assert!((&mut more).now_or_never().is_none());
    drop(more);
    *log.shared.fault.lock() = None;
    doubtful.await.unwrap();
    subscription.next(&mut entries).await.unwrap();
    assert_eq!(entries.len(), 21);
    check(&entries, 0);
}

#[tokio::test]
async fn what_a_new_segment_took_over_counts_for_nothing_in_the_old_one() {
    let (_root, dir) = dir();
    let log = tiny(&dir);
    append(&log, 1..=4).await;
    // Whole in the old segment, and half in the new one that was begun with it.
    fail(&log, Fails::AtSync);
    let mut doubtful = log.append(batch(5, 2));
    refused(&log, &mut doubtful).await;
    fail(&log, Fails::Within);
    assert!(pending(&mut doubtful).await);
    drop(doubtful);
    drop(log);
    assert_eq!(segments(&dir).len(), 2);
    let log = tiny(&dir);
    assert_eq!(log.end(), 4);
    append(&log, 50..=53).await;
    let numbers = async |log: &DiskLog| -> Vec<u64> {
        let entries = read(log, 0).await;
        check(&entries, 0);
        entries.iter().map(|entry| number(&entry.batch)).collect()
    };
    let wanted = [1, 2, 3, 4, 50, 51, 52, 53];
    append(&log, 54..=63).await;
    assert_eq!(numbers(&log).await[..8], wanted);
    drop(log);
    assert_eq!(numbers(&tiny(&dir)).await[..8], wanted);
}

#[tokio::test]
async fn a_doubtful_batch_waits_for_a_new_segment_that_cannot_be_made() {
    let (_root, dir) = dir();
    let log = tiny(&dir);
    append(&log, 1..=4).await;
    let way = block(&dir, 5);
    fail(&log, Fails::Within);
    let mut doubtful = log.append(batch(5, 2));
    assert!(pending(&mut doubtful).await);
    *log.shared.fault.lock() = None;
    assert!(pending(&mut doubtful).await);
    assert_refused(log.append(batch(99, 2)).await);
    log.trim(4).await.unwrap();
    fs::remove_dir(way).unwrap();
    doubtful.await.unwrap();
    append(&log, 6..=9).await;
    drop(log);
    let log = tiny(&dir);
    assert_eq!(log.end(), 9);
    check(&read(&log, log.first() - 1).await, log.first() - 1);
}

#[tokio::test]
async fn a_closed_log_lets_go_of_a_doubtful_batch() {
    let (_root, dir) = dir();
    let log = tiny(&dir);
    append(&log, 1..=4).await;
    fail(&log, Fails::AtSync);
    let (verdict, given) = oneshot::channel();
    let sent = Append {
        batch: batch(5, 2),
        verdict,
    };
    log.queue.as_ref().unwrap().send(sent).unwrap();
    while log.unwritable().is_none() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    drop(log);
    assert!(given.await.is_err());
    check(&read(&tiny(&dir), 0).await, 0);
}

#[tokio::test]
async fn a_segment_that_cannot_be_begun_refuses_and_its_batch_is_not_written() {
    let (_root, dir) = dir();
    let log = tiny(&dir);
    append(&log, 1..=4).await;
    let way = block(&dir, 5);
    // Too large for what is left of the first.
    assert_refused(log.append(batch(5, 40)).await);
    // Nor does a smaller one go there: the file may have been made all the same.
    assert_refused(log.append(batch(6, 0)).await);
    fs::remove_dir(way).unwrap();
    while log.unwritable().is_some() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    append(&log, 7..=12).await;
    drop(log);
    let log = tiny(&dir);
    let numbers: Vec<u64> = read(&log, 0)
        .await
        .iter()
        .map(|e| number(&e.batch))
        .collect();
    assert_eq!(numbers, [1, 2, 3, 4, 7, 8, 9, 10, 11, 12]);
}

#[test]
fn less_free_space_than_the_reserve_refuses_and_reading_goes_on() {
    let (_root, dir) = dir();
    runtime().block_on(async {
        let log = tiny(&dir);
        append(&log, 1..=3).await;
        drop(log);
        let sizes = Sizes {
            reserve_bytes: u64::MAX,
            ..TINY
        };
        let log = DiskLog::open_with(&dir, None, sizes).unwrap();
        assert_eq!(log.unwritable(), None);
        let refused = log.append(batch(4, 1)).await.unwrap_err().to_string();
        assert!(
            refused.contains("is full") && refused.contains("free some"),
            "{refused}"
        );
        assert_eq!(log.unwritable().as_deref(), Some(refused.as_str()));
        check(&read(&log, 0).await, 0);
    });
}
