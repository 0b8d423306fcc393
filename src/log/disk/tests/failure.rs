//! A database that fails, or has no room, while it is open.

use std::time::{Duration, Instant};

use fjall::{Database, PersistMode};

use super::*;

#[tokio::test]
async fn a_failed_database_is_reopened_and_the_batch_settled() {
    let (_root, dir) = dir();
    let log = tiny(&dir);
    append(&log, 1..=10).await;
    let mut subscription = log.subscribe(10).await.unwrap();
    // Another handle keeps the database from being opened again for a while; a segment that is
    // gone makes the next write fail.
    let held = {
        let shelf = log.shared.shelf.read();
        let shelf = shelf.as_ref().unwrap();
        let empty = shelf.segments.last().unwrap().keyspace.clone();
        (shelf.db.clone(), empty)
    };
    poison(&held.0);
    let mut doubtful = log.append(batch(11, 2));
    let pending = tokio::time::timeout(Duration::from_secs(1), &mut doubtful).await;
    assert!(pending.is_err(), "{pending:?}");
    let second = log.append(batch(12, 2)).await;
    let Err(AppendError::Refused(why)) = second else {
        panic!("{second:?}");
    };
    assert!(why.contains("failed"), "{why}");
    assert!(log.refusal().is_some());
    drop(held);
    // It was not in the log that was opened again, so it was written once more.
    doubtful.await.unwrap();
    append(&log, 13..=14).await;
    assert_eq!(log.refusal(), None);
    let mut entries = Vec::new();
    while entries.len() < 3 {
        subscription.next(&mut entries).await.unwrap();
    }
    check(&entries, 10);
    let numbers: Vec<u64> = entries.iter().map(|entry| entry.batch.number).collect();
    assert_eq!(numbers, [11, 13, 14]);
    drop(log);
    let log = tiny(&dir);
    assert_eq!(log.end(), 13);
    check(&read(&log, 0).await, 0);
}

/// Makes the library's table writer fail, as a broken disk does: the folder for tables is gone.
fn poison(db: &Database) {
    let keyspace = db.keyspace("victim", Default::default).unwrap();
    keyspace.insert("a", "a").unwrap();
    std::fs::remove_dir_all(keyspace.path().join("tables")).unwrap();
    keyspace.rotate_memtable().unwrap();
    let begun = Instant::now();
    while db.persist(PersistMode::Buffer).is_ok() {
        assert!(begun.elapsed() < Duration::from_secs(10));
        std::thread::sleep(Duration::from_millis(1));
    }
    std::fs::create_dir(keyspace.path().join("tables")).unwrap();
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
        assert_eq!(log.refusal(), None);
        let refused = log.append(batch(4, 1)).await.unwrap_err().to_string();
        assert!(
            refused.contains("is full") && refused.contains("free some"),
            "{refused}"
        );
        assert_eq!(log.refusal().as_deref(), Some(refused.as_str()));
        check(&read(&log, 0).await, 0);
    });
}
