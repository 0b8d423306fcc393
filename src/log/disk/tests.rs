use std::collections::BTreeMap;
use std::process::Command;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use tempfile::TempDir;

use fjall::{Database, PersistMode};

use super::*;
use crate::grade::{Changes, Patch};
use crate::log::Entry;
use crate::log::Origin;

/// Small enough that a few batches make a table and a few more a segment.
const TINY: Sizes = Sizes {
    table_bytes: 200,
    segment_bytes: 500,
    reserve_bytes: 0,
};

/// Does something to a journal's bytes.
type Damage = Box<dyn Fn(&mut Vec<u8>)>;

fn batch(number: u64, patches: usize) -> Batch {
    let patches = (0..patches).map(|index| {
        let mut changes = Changes::default();
        changes.set(index % 4, number as i64);
        Patch {
            user_id: format!("user-{number}-{index}").into(),
            changes,
        }
    });
    Batch {
        origin: Origin(7),
        number,
        patches: patches.collect(),
        checkpoint: None,
    }
}

fn dir() -> (TempDir, PathBuf) {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("log");
    (root, dir)
}

fn tiny(dir: &Path) -> DiskLog {
    DiskLog::open_with(dir, None, TINY).unwrap()
}

fn runtime() -> tokio::runtime::Runtime {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_time().build().unwrap()
}

async fn append(log: &DiskLog, numbers: std::ops::RangeInclusive<u64>) {
    for number in numbers {
        log.append(batch(number, 2)).await.unwrap();
    }
}

/// Reads from `after` to the end.
async fn read(log: &DiskLog, after: Seq) -> Vec<Entry> {
    let mut subscription = log.subscribe(after).await.unwrap();
    let mut entries = Vec::new();
    while after + (entries.len() as u64) < log.end() {
        subscription.next(&mut entries).await.unwrap();
    }
    entries
}

/// The entries are whole, follow each other from `after` on, and time never goes back.
fn check(entries: &[Entry], after: Seq) {
    let mut time_ns = 0;
    for (seq, entry) in (after + 1..).zip(entries) {
        assert_eq!(entry.seq, seq);
        assert!(entry.time_ns >= time_ns);
        time_ns = entry.time_ns;
        let wanted = batch(entry.batch.number, entry.batch.patches.len());
        assert_eq!(entry.batch.patches, wanted.patches);
        assert_eq!(entry.batch.origin, wanted.origin);
    }
}

/// What a crash would leave: `from` as it is at one moment, though the library's worker may be
/// writing and removing tables.
fn copy(from: &Path, to: &Path) {
    let run = |program: &str, args: &[&str]| {
        let ran = Command::new(program).args(args).output().unwrap();
        (ran.status.success(), ran.stdout)
    };
    let (from, to) = (from.to_str().unwrap(), to.to_str().unwrap());
    let seen = || run("find", &[from, "-printf", "%p %s %T@\n"]);
    for _ in 0..1_000 {
        let before = seen();
        let (copied, _) = run("cp", &["-a", from, to]);
        if copied && seen() == before {
            return;
        }
        std::fs::remove_dir_all(to).unwrap();
    }
    panic!("{from} never stood still");
}

fn journal(dir: &Path) -> PathBuf {
    let files = std::fs::read_dir(dir).unwrap().map(|f| f.unwrap().path());
    let mut journals: Vec<_> = files
        .filter(|path| path.extension().is_some_and(|e| e == "jnl"))
        .collect();
    journals.sort();
    journals.pop().unwrap()
}

#[tokio::test]
async fn what_was_appended_is_there_after_reopening() {
    let (_root, dir) = dir();
    let log = DiskLog::open(&dir, None).unwrap();
    assert!(log.is_empty());
    assert_eq!((log.first(), log.end()), (1, 0));
    append(&log, 1..=5).await;
    let (id, entries) = (log.id(), read(&log, 0).await);
    check(&entries, 0);
    assert_eq!(entries.len(), 5);
    drop(log);

    let log = DiskLog::open(&dir, None).unwrap();
    assert!(!log.is_empty());
    assert_eq!((log.id(), log.first(), log.end()), (id, 1, 5));
    let again = read(&log, 0).await;
    check(&again, 0);
    let places = |entries: &[Entry]| -> Vec<_> {
        let place = |entry: &Entry| (entry.seq, entry.time_ns, entry.batch.number);
        entries.iter().map(place).collect()
    };
    assert_eq!(places(&again), places(&entries));
    append(&log, 6..=6).await;
    assert_eq!(log.end(), 6);
    assert_eq!(read(&log, 5).await[0].batch.number, 6);
}

#[tokio::test]
async fn own_batches_come_back_undecoded() {
    let (_root, dir) = dir();
    let log = DiskLog::open(&dir, None).unwrap();
    let sent = batch(1, 3);
    log.append(sent.clone()).await.unwrap();
    assert!(Arc::ptr_eq(
        &read(&log, 0).await[0].batch.patches,
        &sent.patches
    ));
}

#[tokio::test]
async fn numbering_begins_where_it_is_told_to_and_only_in_an_unused_log() {
    let (_root, dir) = dir();
    let first_id = DiskLog::open(&dir, None).unwrap().id();
    let log = DiskLog::open(&dir, Some(500)).unwrap();
    assert_ne!(log.id(), first_id);
    assert_eq!((log.first(), log.end(), log.is_empty()), (501, 500, false));
    assert!(matches!(
        log.subscribe(499).await.err(),
        Some(ReadError::NotHeld { wanted: 500 })
    ));
    let id = log.id();
    drop(log);
    let log = DiskLog::open(&dir, Some(500)).unwrap();
    assert_eq!((log.id(), log.end()), (id, 500));
    append(&log, 1..=1).await;
    assert_eq!(read(&log, 500).await[0].seq, 501);
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_see_each_batch_once_and_in_order_while_batches_come() {
    const BATCHES: u64 = 400;
    let (_root, dir) = dir();
    let log = Arc::new(tiny(&dir));
    append(&log, 1..=30).await;
    let readers: Vec<_> = [0, 7, 29, 30]
        .into_iter()
        .map(|after| {
            let log = Arc::clone(&log);
            tokio::spawn(async move {
                let mut subscription = log.subscribe(after).await.unwrap();
                let mut entries = Vec::new();
                while (entries.len() as u64) < BATCHES - after {
                    // A call that is given up loses nothing.
                    let wait = Duration::from_micros(after * 20);
                    let next = subscription.next(&mut entries);
                    match tokio::time::timeout(wait, next).await {
                        Ok(result) => result.unwrap(),
                        Err(_) => subscription.next(&mut entries).await.unwrap(),
                    }
                    if after == 7 {
                        // So slow that it goes back to the disk again and again.
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
    // A closed log ends its readers, after all that it has.
    let mut subscription = log.subscribe(BATCHES - 1).await.unwrap();
    drop(Arc::into_inner(log).unwrap());
    let mut entries = Vec::new();
    subscription.next(&mut entries).await.unwrap();
    assert_eq!(entries[0].seq, BATCHES);
    let closed = subscription.next(&mut entries).await;
    assert!(matches!(closed, Err(ReadError::Closed)));
}

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

/// A disk of its own; `None` where mounting is not allowed.
struct SmallDisk(TempDir);

impl SmallDisk {
    fn mount(mebibytes: usize) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={mebibytes}m"), "tmpfs"]);
        let mounted = mount.arg(dir.path()).stderr(std::process::Stdio::null());
        let mounted = mounted.status().is_ok_and(|status| status.success());
        mounted.then_some(Self(dir))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let unmount = Command::new("umount").arg("-l").arg(self.0.path()).status();
        assert!(unmount.unwrap().success());
    }
}

#[tokio::test]
async fn a_full_disk_refuses_until_there_is_room() {
    let Some(disk) = SmallDisk::mount(128) else {
        eprintln!("skipped: mounting is not allowed");
        return;
    };
    let dir = disk.0.path().join("log");
    let log = DiskLog::open(&dir, None).unwrap();
    let mut sent = batch(1, 1_000);
    let long = |patch: &Patch| Patch {
        user_id: format!("{:0>250}", patch.user_id).into(),
        ..*patch
    };
    sent.patches = sent.patches.iter().map(long).collect();
    let mut answered = 0;
    // Filled by the log, then with the help of others; emptied by a trim, then by both.
    for round in 0..4 {
        let ballast = disk.0.path().join("ballast");
        if round % 2 == 1 {
            std::fs::write(&ballast, vec![0; 20 << 20]).unwrap();
        }
        let refused = loop {
            match log.append(sent.clone()).await {
                Ok(()) => answered += 1,
                Err(error) => break error.to_string(),
            }
        };
        assert!(refused.contains("is full"), "{refused}");
        assert!(log.refusal().is_some());
        assert_eq!(log.end(), answered);
        // A round on a slow machine may fit few batches, and a trim leaves what is before it out.
        let after = (log.first() - 1).max(answered.saturating_sub(20));
        assert_eq!(read(&log, after).await.len() as u64, answered - after);
        log.trim(answered).await.unwrap();
        let _ = std::fs::remove_file(&ballast);
        let begun = Instant::now();
        while let Some(why) = log.refusal() {
            assert!(begun.elapsed() < Duration::from_secs(10), "{why}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
    drop(log);
    let log = DiskLog::open(&dir, None).unwrap();
    assert_eq!(log.end(), answered);
    let entries = read(&log, log.first() - 1).await;
    assert!(
        entries
            .iter()
            .all(|entry| entry.batch.patches == sent.patches)
    );
}

#[derive(Debug, Clone)]
enum Step {
    Append { patches: usize },
    Trim { through_percent: u64 },
    Reopen,
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Whatever is done in whatever order, the log is the model from its first batch on.
    #[test]
    fn agrees_with_a_vec(steps in prop::collection::vec(prop_oneof![
        6 => (0..12_usize).prop_map(|patches| Step::Append { patches }),
        1 => (0..130_u64).prop_map(|through_percent| Step::Trim { through_percent }),
        1 => Just(Step::Reopen),
    ], 1..60)) {
        let (_root, dir) = dir();
        runtime().block_on(async {
            let mut log = tiny(&dir);
            let mut model: BTreeMap<Seq, Batch> = BTreeMap::new();
            for step in steps {
                let (first, end) = (log.first(), log.end());
                match step {
                    Step::Append { patches } => {
                        let batch = batch(end * 10, patches);
                        log.append(batch.clone()).await.unwrap();
                        model.insert(end + 1, batch);
                    }
                    Step::Trim { through_percent } => {
                        let through = end * through_percent / 100;
                        log.trim(through).await.unwrap();
                        assert!(log.first() >= first && log.first() <= (through + 1).max(first));
                    }
                    Step::Reopen => {
                        drop(log);
                        log = tiny(&dir);
                        assert_eq!((log.first(), log.end()), (first, end));
                    }
                }
                assert_eq!(log.end(), model.len() as u64);
            }
            let first = log.first();
            let entries = read(&log, first - 1).await;
            assert_eq!(entries.len() as u64, log.end() + 1 - first);
            for entry in entries {
                let wanted = &model[&entry.seq];
                assert_eq!(entry.batch.number, wanted.number);
                assert_eq!(entry.batch.patches, wanted.patches);
            }
        });
    }
}
