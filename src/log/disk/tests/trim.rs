//! What was forgotten, and what a crash leaves of forgetting.

use super::*;

#[tokio::test]
async fn what_is_not_held_is_not_read() {
    let (_root, dir) = dir();
    let log = tiny(&dir);
    append(&log, 1..=60).await;
    assert!(matches!(
        log.subscribe(61).await.err(),
        Some(ReadError::NotHeld { wanted: 62 })
    ));
    let mut early = log.subscribe(0).await.unwrap();
    log.trim(40).await.unwrap();
    let first = log.first();
    assert!((30..=41).contains(&first), "{first}");
    for after in [0, first - 2] {
        let refused = log.subscribe(after).await.err();
        assert!(matches!(refused, Some(ReadError::NotHeld { .. })));
    }
    let late = early.next(&mut Vec::new()).await;
    assert!(matches!(late, Err(ReadError::NotHeld { wanted: 1 })));
    check(&read(&log, first - 1).await, first - 1);
    drop(log);
    let log = tiny(&dir);
    assert_eq!((log.first(), log.end()), (first, 60));
    check(&read(&log, first - 1).await, first - 1);

    // All of it may go but what is being written.
    log.trim(Seq::MAX).await.unwrap();
    assert!(log.first() <= 60);
    append(&log, 61..=80).await;
    drop(log);
    assert_eq!(tiny(&dir).end(), 80);
}

#[tokio::test]
async fn a_crash_at_any_step_of_a_trim_leaves_a_whole_log() {
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
    loop {
        let covered = log.shared.shelf.read().as_ref().unwrap().covered(60);
        let Some((segment, next)) = covered else {
            break;
        };
        // While a handle is held the library has forgotten the segment, but its files are there.
        log.trim(next - 1).await.unwrap();
        assert!(segment.keyspace.path().exists());
        assert_eq!(opened(&format!("held-{steps}")).await, (next, 80));
        drop(segment);
        assert_eq!(opened(&format!("gone-{steps}")).await, (next, 80));
        steps += 1;
    }
    assert!(steps > 3, "{steps}");
}
