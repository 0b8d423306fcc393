//! Appended batches are read once each and in order.

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use proptest::prelude::*;

use super::*;

#[tokio::test]
async fn batches_survive_reopening() {
    let (_root, dir) = dir();
    let log = DiskLog::open(&dir, None).unwrap();
    assert_eq!((log.first(), log.end()), (1, 0));
    append(&log, 1..=5).await;
    let (id, entries) = (log.id(), read(&log, 0).await);
    check(&entries, 0);
    assert_eq!(entries.len(), 5);
    drop(log);

    let log = DiskLog::open(&dir, None).unwrap();
    assert_eq!((log.id(), log.first(), log.end()), (id, 1, 5));
    let again = read(&log, 0).await;
    check(&again, 0);
    let offsets = |entries: &[Entry]| -> Vec<_> {
        let offset = |entry: &Entry| {
            (
                entry.position.seq,
                entry.position.time_ns,
                number(&entry.batch),
            )
        };
        entries.iter().map(offset).collect()
    };
    assert_eq!(offsets(&again), offsets(&entries));
    append(&log, 6..=6).await;
    assert_eq!(log.end(), 6);
    assert_eq!(number(&read(&log, 5).await[0].batch), 6);
}

#[tokio::test]
async fn recent_batches_are_not_decoded() {
    let (_root, dir) = dir();
    let log = DiskLog::open(&dir, None).unwrap();
    let sent = batch(1, 3);
    log.append(sent.clone()).await.unwrap();
    assert!(Arc::ptr_eq(
        &read(&log, 0).await[0].batch.writes,
        &sent.writes
    ));
}

#[tokio::test]
async fn a_base_is_accepted_only_for_an_unused_log() {
    let (_root, dir) = dir();
    let first_id = DiskLog::open(&dir, None).unwrap().id();
    let log = DiskLog::open(&dir, Some(500)).unwrap();
    assert_ne!(log.id(), first_id);
    assert_eq!((log.first(), log.end()), (501, 500));
    assert!(matches!(
        log.subscribe(position(&log, 499)).await.err(),
        Some(ReadError::NotHeld { wanted: 500 })
    ));
    let id = log.id();
    drop(log);
    let log = DiskLog::open(&dir, Some(500)).unwrap();
    assert_eq!((log.id(), log.end()), (id, 500));
    append(&log, 1..=1).await;
    assert_eq!(read(&log, 500).await[0].position.seq, 501);
    drop(log);
    for base in [500, 9] {
        let opened = DiskLog::open(&dir, Some(base));
        assert!(matches!(
            opened.err(),
            Some(OpenError::NotEmpty { end: 501, .. })
        ));
    }
    assert_eq!(DiskLog::open(&dir, None).unwrap().end(), 501);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_see_each_batch_once_and_in_order_during_appends() {
    const BATCHES: u64 = 400;
    let (_root, dir) = dir();
    let log = Arc::new(tiny(&dir));
    append(&log, 1..=30).await;
    let readers: Vec<_> = [0, 7, 29, 30]
        .into_iter()
        .map(|after| {
            let log = Arc::clone(&log);
            tokio::spawn(async move {
                let mut subscription = log.subscribe(position(&log, after)).await.unwrap();
                let mut entries = Vec::new();
                while (entries.len() as u64) < BATCHES - after {
                    // A cancelled call loses nothing.
                    let wait = Duration::from_micros(after * 20);
                    let next = subscription.next(&mut entries);
                    match tokio::time::timeout(wait, next).await {
                        Ok(result) => result.unwrap(),
                        Err(_) => subscription.next(&mut entries).await.unwrap(),
                    }
                    if after == 7 {
                        // So slow that it reads from the disk again and again.
                        tokio::time::sleep(Duration::from_millis(30)).await;
                    }
                }
                assert_eq!(entries.len() as u64, BATCHES - after);
                check(&entries, after);
            })
        })
        .collect();
    append(&log, 31..=BATCHES).await;
    for reader in readers {
        reader.await.unwrap();
    }
    // Readers of a closed log get all its batches before the error.
    let mut subscription = log.subscribe(position(&log, BATCHES - 1)).await.unwrap();
    drop(Arc::into_inner(log).unwrap());
    let mut entries = Vec::new();
    subscription.next(&mut entries).await.unwrap();
    assert_eq!(entries[0].position.seq, BATCHES);
    let closed = subscription.next(&mut entries).await;
    assert!(matches!(closed, Err(ReadError::Closed)));
}

#[derive(Debug, Clone)]
enum LogStep {
    Append {
        writes: usize,
    },
    Trim {
        through_percent: u64,
    },
    Reopen,
    /// A crash that loses the last batch from some byte on.
    Tear {
        kept_percent: usize,
        short: bool,
    },
    /// A write that fails after a part of it.
    Fail {
        done_percent: usize,
    },
}

/// Tears the last batch.
fn tear(dir: &Path, kept_percent: usize, short: bool) -> bool {
    let file = segments(dir).pop().unwrap();
    let mut bytes = std::fs::read(&file).unwrap();
    let offsets = offsets(&bytes);
    let &[.., begin, end] = offsets.as_slice() else {
        return false;
    };
    let end = end
        - bytes[..end]
            .iter()
            .rev()
            .position(|byte| *byte != 0)
            .unwrap();
    let cut = begin + (end - begin) * kept_percent / 100;
    match short {
        true => bytes.truncate(cut),
        false => bytes[cut..].fill(0),
    }
    std::fs::write(file, bytes).unwrap();
    true
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// After any operations the log equals the model from its first batch on.
    #[test]
    fn agrees_with_a_vec(steps in prop::collection::vec(prop_oneof![
        6 => (0..12_usize).prop_map(|writes| LogStep::Append { writes }),
        1 => (0..130_u64).prop_map(|through_percent| LogStep::Trim { through_percent }),
        1 => Just(LogStep::Reopen),
        1 => (0..100_usize, any::<bool>()).prop_map(|(kept_percent, short)| LogStep::Tear {
            kept_percent,
            short,
        }),
        1 => (0..=100_usize).prop_map(|done_percent| LogStep::Fail { done_percent }),
    ], 1..60)) {
        let (_root, dir) = dir();
        runtime().block_on(async {
            let mut log = tiny(&dir);
            let mut model: BTreeMap<Seq, Batch> = BTreeMap::new();
            for step in steps {
                let (first, end) = (log.first(), log.end());
                match step {
                    LogStep::Append { writes } => {
                        let batch = batch(end * 10, writes);
                        log.append(batch.clone()).await.unwrap();
                        model.insert(end + 1, batch);
                    }
                    LogStep::Trim { through_percent } => {
                        let through = end * through_percent / 100;
                        log.trim(through).await.unwrap();
                        assert!(log.first() >= first && log.first() <= (through + 1).max(first));
                    }
                    LogStep::Reopen => {
                        drop(log);
                        log = tiny(&dir);
                        assert_eq!((log.first(), log.end()), (first, end));
                    }
                    LogStep::Tear { kept_percent, short } => {
                        drop(log);
                        if tear(&dir, kept_percent, short) {
                            model.pop_last();
                        }
                        log = tiny(&dir);
                        assert_eq!(log.first(), first);
                    }
                    LogStep::Fail { done_percent } => {
                        let mut once = true;
                        *log.shared.fault.lock() = Some(Box::new(move |file, at, record| {
                            let done = &record[..record.len() * done_percent / 100];
                            if std::mem::take(&mut once) {
                                file.write_all_at(done, at)?;
                                return Err(io::Error::other("input/output error"));
                            }
                            Ok(())
                        }));
                        let batch = batch(end * 10, 3);
                        log.append(batch.clone()).await.unwrap();
                        model.insert(end + 1, batch);
                    }
                }
                assert_eq!(log.end(), model.len() as u64);
            }
            let first = log.first();
            let entries = read(&log, first - 1).await;
            assert_eq!(entries.len() as u64, log.end() + 1 - first);
            for entry in entries {
                let wanted = &model[&entry.position.seq];
                assert_eq!(entry.batch.writes, wanted.writes);
            }
        });
    }
}
