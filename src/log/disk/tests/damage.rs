//! What crashes and broken disks leave, and what it is made of at opening.

use super::*;

/// Does something to a journal's bytes.
type Damage = Box<dyn Fn(&mut Vec<u8>)>;

fn journal(dir: &Path) -> PathBuf {
    let files = std::fs::read_dir(dir).unwrap().map(|f| f.unwrap().path());
    let mut journals: Vec<_> = files
        .filter(|path| path.extension().is_some_and(|e| e == "jnl"))
        .collect();
    journals.sort();
    journals.pop().unwrap()
}

#[tokio::test]
async fn what_a_crash_left_of_making_a_log_is_cleared_away() {
    let (root, dir) = dir();
    for name in ["log.new", "log.old"] {
        std::fs::create_dir(root.path().join(name)).unwrap();
        std::fs::write(root.path().join(name).join("0.jnl"), b"half").unwrap();
    }
    drop(DiskLog::open(&dir, None).unwrap());
    drop(DiskLog::open(&dir, Some(3)).unwrap());
    let left: Vec<_> = std::fs::read_dir(root.path()).unwrap().collect();
    assert_eq!(left.len(), 1);
}

#[tokio::test]
async fn a_hole_is_found() {
    let (_root, dir) = dir();
    let log = tiny(&dir);
    append(&log, 1..=60).await;
    drop(log);
    let shelf = Shelf::open(&dir).unwrap();
    let middle = shelf.segments[2].clone();
    shelf.db.delete_keyspace(middle.keyspace).unwrap();
    drop(shelf);
    let refused = DiskLog::open(&dir, None).err().unwrap();
    assert!(matches!(refused, OpenError::Damaged { .. }));
    let wanted = format!("batches {} to", middle.first);
    assert!(refused.to_string().contains(&wanted), "{refused}");
}

#[tokio::test]
async fn a_damaged_batch_is_named() {
    let (_root, dir) = dir();
    let log = DiskLog::open(&dir, None).unwrap();
    append(&log, 1..=20).await;
    drop(log);
    let shelf = Shelf::open(&dir).unwrap();
    let keyspace = &shelf.segments[0].keyspace;
    for (seq, value) in [(3, &b""[..]), (5, b"\x02"), (7, b"\x01abc")] {
        keyspace.insert(format::key(seq), value).unwrap();
    }
    let mut value = keyspace.get(format::key(9)).unwrap().unwrap().to_vec();
    value.truncate(value.len() - 1);
    keyspace.insert(format::key(9), value).unwrap();
    keyspace.remove(format::key(11)).unwrap();
    drop(shelf);
    let log = DiskLog::open(&dir, None).unwrap();
    for seq in [3, 5, 7, 9, 11] {
        let mut subscription = log.subscribe(seq - 1).await.unwrap();
        let error = subscription.next(&mut Vec::new()).await.unwrap_err();
        assert!(
            matches!(error, ReadError::Damaged { seq: at, .. } if at == seq),
            "{error}"
        );
    }
}

#[tokio::test]
async fn a_torn_tail_is_cut_off_and_nothing_else() {
    let (root, dir) = dir();
    let log = DiskLog::open(&dir, None).unwrap();
    append(&log, 1..=9).await;
    // Over a page long, so that one of its pages can be lost without the others.
    log.append(batch(10, 400)).await.unwrap();
    drop(log);
    let whole = root.path().join("whole");
    copy(&dir, &whole);
    let bytes = std::fs::read(journal(&whole)).unwrap();
    let end = bytes.iter().rposition(|byte| *byte != 0).unwrap() + 1;
    let mut damages: Vec<(String, Damage)> = Vec::new();
    for cut in [1, 2, 5, 13, 100, 5_000] {
        let zeroed = move |bytes: &mut Vec<u8>| bytes[end - cut..].fill(0);
        damages.push((format!("zeroed-{cut}"), Box::new(zeroed)));
        let truncated = move |bytes: &mut Vec<u8>| bytes.truncate(end - cut);
        damages.push((format!("truncated-{cut}"), Box::new(truncated)));
    }
    let page = move |bytes: &mut Vec<u8>| bytes[end - 9_000..end - 5_000].fill(0);
    damages.push(("page".to_owned(), Box::new(page)));
    for (name, damage) in damages {
        let copied = root.path().join(&name);
        copy(&whole, &copied);
        let mut bytes = bytes.clone();
        damage(&mut bytes);
        std::fs::write(journal(&copied), bytes).unwrap();
        let log = DiskLog::open(&copied, None).map_err(|error| format!("{name}: {error}"));
        let log = log.unwrap();
        assert_eq!(log.end(), 9, "{name}");
        check(&read(&log, 0).await, 0);
        append(&log, 10..=12).await;
        drop(log);
        assert_eq!(DiskLog::open(&copied, None).unwrap().end(), 12, "{name}");
    }
}

#[tokio::test]
async fn damage_before_the_last_batch_is_refused_and_left_as_it_is() {
    let (_root, dir) = dir();
    let log = DiskLog::open(&dir, None).unwrap();
    append(&log, 1..=9).await;
    drop(log);
    let mut bytes = std::fs::read(journal(&dir)).unwrap();
    let middle = bytes.windows(8).position(|part| part == b"user-5-0");
    bytes[middle.unwrap()] = b'U';
    std::fs::write(journal(&dir), &bytes).unwrap();
    for _ in 0..2 {
        let refused = DiskLog::open(&dir, None).err().unwrap();
        assert!(matches!(refused, OpenError::Damaged { .. }), "{refused}");
    }
    assert_eq!(std::fs::read(journal(&dir)).unwrap(), bytes);
}
