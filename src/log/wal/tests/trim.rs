//! Trimming, and crashes while trimming.

use super::*;

#[tokio::test]
async fn trimmed_batches_cannot_be_read() {
    let (_root, dir) = dir();
    let log = tiny(&dir);
    append(&log, 1..=60).await;
    assert!(matches!(
        log.subscribe(position(&log, 61)).await.err(),
        Some(ReadError::NotHeld { wanted: 62 })
    ));
    let mut subscription = log.subscribe(position(&log, 0)).await.unwrap();
    log.trim(40).await.unwrap();
    let first = log.first();
    assert!((30..=41).contains(&first), "{first}");
    for after in [0, first - 2] {
        let rejection = log.subscribe(position(&log, after)).await.err();
        assert!(matches!(rejection, Some(ReadError::NotHeld { .. })));
    }
    let behind = subscription.next(&mut Vec::new()).await;
    assert!(matches!(behind, Err(ReadError::NotHeld { wanted: 1 })));
    check(&read(&log, first - 1).await, first - 1);
    drop(log);
    let log = tiny(&dir);
    assert_eq!((log.first(), log.end()), (first, 60));
    check(&read(&log, first - 1).await, first - 1);

    // All segments but the active one can be trimmed.
    log.trim(Seq::MAX).await.unwrap();
    assert!(log.first() <= 60);
    append(&log, 61..=80).await;
    drop(log);
    assert_eq!(tiny(&dir).end(), 80);
}

#[tokio::test]
async fn a_crash_during_a_trim_leaves_a_complete_log() {
    let (root, dir) = dir();
    let log = tiny(&dir);
    append(&log, 1..=60).await;
    let opened = async |name: &str| {
        let copied = root.path().join(name);
        copy(&dir, &copied);
        let log = tiny(&copied);
        check(&read(&log, log.first() - 1).await, log.first() - 1);
        append(&log, 61..=80).await;
        (log.first(), log.end())
    };
    let mut steps = 0;
    while let [oldest, second, ..] = segments(&dir).as_slice() {
        let next = segment::list(&dir).unwrap().segments[1];
        // The states before and after the removal is durable.
        assert_eq!(opened(&format!("held-{steps}")).await, (log.first(), 80));
        log.trim(next - 1).await.unwrap();
        assert!(!oldest.exists() && second.exists());
        assert_eq!(log.first(), next);
        assert_eq!(opened(&format!("gone-{steps}")).await, (next, 80));
        steps += 1;
    }
    assert!(steps > 3, "{steps}");
}

#[tokio::test]
async fn a_failed_trim_removes_nothing() {
    let (_root, dir) = dir();
    let log = tiny(&dir);
    append(&log, 1..=20).await;
    let oldest = segments(&dir).remove(0);
    let renamed = oldest.with_extension("renamed");
    fs::rename(&oldest, &renamed).unwrap();
    let failed = log.trim(20).await;
    assert!(matches!(failed, Err(TrimError::Failed(_))), "{failed:?}");
    assert_eq!(log.first(), 1);
    fs::rename(&renamed, &oldest).unwrap();
    check(&read(&log, 0).await, 0);
    log.trim(20).await.unwrap();
    assert!(log.first() > 10);
}
