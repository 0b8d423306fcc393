//! Write errors and full disks while the log is open.

use std::os::unix::fs::FileExt;
use std::time::Duration;

use super::*;

/// How a write fails.
#[derive(Debug, Clone, Copy)]
enum WriteFault {
    /// Nothing is written.
    Before,
    /// Half of the record is written.
    Within,
    /// The record is written, and the sync fails.
    AtSync,
}

/// Makes all writes fail from now on.
fn fail(log: &DiskLog, fault: WriteFault) {
    *log.shared.fault.lock() = Some(Box::new(move |file, at, record| {
        let written = match fault {
            WriteFault::Before => 0,
            WriteFault::Within => record.len() / 2,
            WriteFault::AtSync => record.len(),
        };
        file.write_all_at(&record[..written], at)?;
        Err(io::Error::other("input/output error"))
    }));
}

/// Prevents the creation of a segment with first batch `seq`.
fn block(dir: &Path, seq: Seq) -> PathBuf {
    let way = segment::path(dir, seq).with_extension("new");
    fs::create_dir(&way).unwrap();
    way
}

fn assert_rejected(append: Result<(), AppendError>) {
    let Err(AppendError::Refused(why)) = append else {
        panic!("{append:?}");
    };
    assert!(why.contains("failed") && why.contains("check"), "{why}");
}

async fn pending(append: &mut BoxFuture<'_, Result<(), AppendError>>) -> bool {
    let waited = tokio::time::timeout(Duration::from_millis(400), append);
    waited.await.is_err()
}

/// Waits until a write has failed, but not until the retry.
async fn wait_for_stall(log: &DiskLog, uncertain: &mut BoxFuture<'_, Result<(), AppendError>>) {
    while log.unwritable().is_none() {
        assert!(uncertain.now_or_never().is_none());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn a_failed_write_is_retried_in_a_new_segment() {
    for fault in [WriteFault::Before, WriteFault::Within, WriteFault::AtSync] {
        // With 0, the failed batch is the first of its segment, which the new one replaces.
        for before in [0, 4, 10] {
            let (root, dir) = dir();
            let log = tiny(&dir);
            append(&log, 1..=before).await;
            let mut subscription = log.subscribe(position(&log, before)).await.unwrap();
            fail(&log, fault);
            let mut uncertain = log.append(batch(before + 1, 2));
            assert!(pending(&mut uncertain).await);
            assert_rejected(log.append(batch(99, 2)).await);
            assert!(log.unwritable().is_some());
            assert_eq!(log.end(), before);
            // After a crash now, the batch is in the log or not.
            let crashed = root.path().join("crashed");
            copy(&dir, &crashed);
            let other = tiny(&crashed);
            assert!((before..=before + 1).contains(&other.end()));
            check(&read(&other, 0).await, 0);
            drop(other);

            *log.shared.fault.lock() = None;
            uncertain.await.unwrap();
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
            // The segment can be trimmed.
            log.trim(before + 9).await.unwrap();
            assert!(log.first() > before + 1);
        }
    }
}

#[tokio::test]
async fn an_uncertain_batch_is_not_published() {
    let (_root, dir) = dir();
    // All batches are in one segment, and the first ones no longer in memory.
    let log = DiskLog::open(&dir, None).unwrap();
    append(&log, 1..=20).await;
    fail(&log, WriteFault::AtSync);
    let mut uncertain = log.append(batch(21, 2));
    // There is no new segment yet: the whole batch is in the old one.
    wait_for_stall(&log, &mut uncertain).await;
    let mut subscription = log.subscribe(position(&log, 0)).await.unwrap();
    let mut entries = Vec::new();
    subscription.next(&mut entries).await.unwrap();
    assert_eq!(entries.len(), 20);
    let mut more = subscription.next(&mut entries);
    assert!((&mut more).now_or_never().is_none());
    drop(more);
    *log.shared.fault.lock() = None;
    uncertain.await.unwrap();
    subscription.next(&mut entries).await.unwrap();
    assert_eq!(entries.len(), 21);
    check(&entries, 0);
}

#[tokio::test]
async fn a_batch_in_a_new_segment_is_ignored_in_the_old_one() {
    let (_root, dir) = dir();
    let log = tiny(&dir);
    append(&log, 1..=4).await;
    // The batch is complete in the old segment, and half written in the new one.
    fail(&log, WriteFault::AtSync);
    let mut uncertain = log.append(batch(5, 2));
    wait_for_stall(&log, &mut uncertain).await;
    fail(&log, WriteFault::Within);
    assert!(pending(&mut uncertain).await);
    drop(uncertain);
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
async fn an_uncertain_batch_waits_until_a_new_segment_can_be_created() {
    let (_root, dir) = dir();
    let log = tiny(&dir);
    append(&log, 1..=4).await;
    let way = block(&dir, 5);
    fail(&log, WriteFault::Within);
    let mut uncertain = log.append(batch(5, 2));
    assert!(pending(&mut uncertain).await);
    *log.shared.fault.lock() = None;
    assert!(pending(&mut uncertain).await);
    assert_rejected(log.append(batch(99, 2)).await);
    log.trim(4).await.unwrap();
    fs::remove_dir(way).unwrap();
    uncertain.await.unwrap();
    append(&log, 6..=9).await;
    drop(log);
    let log = tiny(&dir);
    assert_eq!(log.end(), 9);
    check(&read(&log, log.first() - 1).await, log.first() - 1);
}

#[tokio::test]
async fn closing_the_log_drops_an_uncertain_batch() {
    let (_root, dir) = dir();
    let log = tiny(&dir);
    append(&log, 1..=4).await;
    fail(&log, WriteFault::AtSync);
    let (reply, result) = oneshot::channel();
    let sent = AppendRequest {
        batch: batch(5, 2),
        reply,
    };
    log.queue.as_ref().unwrap().send(sent).unwrap();
    while log.unwritable().is_none() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    drop(log);
    assert!(result.await.is_err());
    check(&read(&tiny(&dir), 0).await, 0);
}

#[tokio::test]
async fn a_batch_is_rejected_when_its_segment_cannot_be_created() {
    let (_root, dir) = dir();
    let log = tiny(&dir);
    append(&log, 1..=4).await;
    let way = block(&dir, 5);
    // Too large for the rest of the first segment.
    assert_rejected(log.append(batch(5, 40)).await);
    // A smaller one is not written there either, because the new file may exist.
    assert_rejected(log.append(batch(6, 0)).await);
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
fn writes_are_rejected_and_reads_continue_without_the_free_reserve() {
    let (_root, dir) = dir();
    runtime().block_on(async {
        let log = tiny(&dir);
        append(&log, 1..=3).await;
        drop(log);
        let sizes = WalSizes {
            reserve_bytes: u64::MAX,
            ..TINY
        };
        let log = DiskLog::open_with(&dir, None, sizes).unwrap();
        assert_eq!(log.unwritable(), None);
        let rejection = log.append(batch(4, 1)).await.unwrap_err().to_string();
        assert!(
            rejection.contains("is full") && rejection.contains("free some"),
            "{rejection}"
        );
        assert_eq!(log.unwritable().as_deref(), Some(rejection.as_str()));
        check(&read(&log, 0).await, 0);
    });
}
