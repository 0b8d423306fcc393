//! `--restore-from`: a backup seeds an empty log, whole or not at all.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::process::Command;

use flate2::write::GzEncoder;
use flate2::{Compression, GzBuilder};
use tempfile::tempdir;

use crate::backup::verify;
use crate::disk::{
    Held, backup_of, file_of, make_pipe, names_in, program_from, program_on, store_of,
    write_file_of,
};
use crate::harness::{Node, run};
use crate::wire::eventually;

/// Names of columns and values as another program may write them.
const FOREIGN: &str = "spp,\"user_id\",return_fee\r\n\
                       5,\"a,b\",-7\r\n\
                       0,\"say \"\"hi\"\"\",9223372036854775807\r\n\
                       1,plain,0\r\n";

fn foreign_file(directory: &Path) -> std::path::PathBuf {
    let path = directory.join("foreign.csv.gz");
    let mut gzip = GzEncoder::new(File::create(&path).unwrap(), Compression::default());
    gzip.write_all(FOREIGN.as_bytes()).unwrap();
    gzip.finish().unwrap();
    path
}

async fn assert_foreign(node: &Node) {
    let grade = |id: &str, spp: i64, return_fee: i64| {
        let id = serde_json::Value::from(id);
        format!(
            r#"{{"user_id":{id},"postpaid_limit":0,"spp":{spp},"shipping_fee":0,"return_fee":{return_fee}}}"#
        )
    };
    assert_eq!(node.get("a,b").await.body, grade("a,b", 5, -7));
    assert_eq!(
        node.get("say \"hi\"").await.body,
        grade("say \"hi\"", 0, i64::MAX)
    );
    assert_eq!(node.get("plain").await.body, grade("plain", 1, 0));
}

/// What a start that must fail says; nothing of the file may stay.
#[track_caller]
fn refused(command: &mut Command, words: &[&str]) {
    let output = run(command);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = String::from_utf8(output.stderr).unwrap();
    let last = said.lines().last().unwrap();
    for word in words {
        assert!(last.contains(word), "{word:?} is not in {said}");
    }
    assert!(!said.contains("panicked"), "{said}");
}

#[tokio::test]
async fn a_backup_seeds_an_empty_directory_and_stays() {
    let directory = tempdir().unwrap();
    let dir = directory.path().join("data");
    let store = store_of(5000, 100);
    let seed = write_file_of(directory.path(), &store, 77);
    let node = Node::start_with(program_on(&dir).arg("--restore-from").arg(&seed)).await;
    assert_eq!(Held::by(&node).await, Held::in_store(&store, 77));
    assert_eq!(node.metric("gradestore_restore_rows").await, Some(5000.0));
    let restore = &node.ops("/status").await.json()["restore"];
    assert_eq!(restore["source"], seed.to_str().unwrap());
    assert_eq!(
        (&restore["done"], &restore["rows"]),
        (&true.into(), &5000.into())
    );
    // Who saw a position before does not see it go back.
    let next = node.set(r#"{"user_id":"user 1","spp":7}"#).await.position();
    assert_eq!(next, 78);
    let held = Held::by(&node).await;
    node.kill();

    let node = Node::start_with(&mut program_on(&dir)).await;
    assert_eq!(Held::by(&node).await, held);
    // A backup of it seeds another, however often.
    let path = directory.path().join("again.csv.gz");
    fs::write(&path, backup_of(&node).await).unwrap();
    let again = Node::start_with(&mut program_from(&path)).await;
    assert_eq!(Held::by(&again).await, held);
}

#[tokio::test]
async fn a_file_of_another_program_seeds_too() {
    let directory = tempdir().unwrap();
    let dir = directory.path().join("data");
    let file = foreign_file(directory.path());
    let node = Node::start_with(program_on(&dir).arg("--restore-from").arg(&file)).await;
    assert_foreign(&node).await;
    node.set(r#"{"user_id":"plain","shipping_fee":3}"#)
        .await
        .position();
    let held = Held::by(&node).await;
    node.kill();
    let node = Node::start_with(&mut program_on(&dir)).await;
    assert_eq!(Held::by(&node).await, held);
    assert_eq!(node.get("plain").await.json()["spp"], 1);
    node.end().await;

    // The log never held those rows: without a snapshot it must not pass for all there is.
    for name in names_in(&dir.join("snapshots")) {
        fs::remove_file(dir.join("snapshots").join(name)).unwrap();
    }
    let node = Node::launch(&mut program_on(&dir)).await;
    let reason = eventually("a verdict", async || {
        let status = node.ops("/status").await.json();
        (status["state"] == "no-source").then(|| status["reason"].to_string())
    })
    .await;
    assert!(reason.contains("not at its first one"), "{reason}");
}

#[tokio::test]
async fn other_programs_may_keep_what_they_like_in_gzip_headers() {
    let directory = tempdir().unwrap();
    let path = directory.path().join("foreign.csv.gz");
    // mgzip's, dictzip's, bgzip's, and one of nobody's before another.
    for extra in [
        &b"IG\x08\0\x40\0\0\0\0\0\0\0"[..],
        b"RA\x08\0\x01\0\xcb\xe3\x01\0\x40\0",
        b"BC\x02\0\x1b\0",
        b"XX\0\0cp\x01\0\x07",
    ] {
        let name = String::from_utf8_lossy(&extra[..2]);
        let gzip = GzBuilder::new().extra(extra).filename("grades.csv");
        let mut gzip = gzip.write(File::create(&path).unwrap(), Compression::default());
        gzip.write_all(FOREIGN.as_bytes()).unwrap();
        gzip.finish().unwrap();
        let verified = verify(&path);
        assert!(verified.status.success(), "{name}: {verified:?}");
        let said = String::from_utf8(verified.stdout).unwrap();
        assert!(said.contains("not made by gradestore"), "{name}: {said}");
        let node = Node::start_with(&mut program_from(&path)).await;
        assert_foreign(&node).await;
    }
}

#[tokio::test]
async fn a_node_without_a_disk_begins_from_a_file() {
    let directory = tempdir().unwrap();
    let store = store_of(100, 10);
    let own = write_file_of(directory.path(), &store, 40);
    let node = Node::start_with(&mut program_from(&own)).await;
    assert_eq!(Held::by(&node).await, Held::in_store(&store, 40));
    let next = node.set(r#"{"user_id":"a","spp":7}"#).await.position();
    assert_eq!(next, 41);
    let node = Node::start_with(&mut program_from(&foreign_file(directory.path()))).await;
    assert_foreign(&node).await;
}

#[tokio::test]
async fn a_file_that_is_no_good_leaves_the_directory_as_it_was() {
    let directory = tempdir().unwrap();
    let dir = directory.path().join("data");
    let store = store_of(5000, 100);
    let good = write_file_of(directory.path(), &store, 77);
    let whole = fs::read(&good).unwrap();
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 1;
    let bad = directory.path().join("bad.csv.gz");
    for (content, reason) in [
        (&whole[..whole.len() / 2], "truncated at byte"),
        (&flipped, "damaged at byte"),
        (b"user_id,spp\na,1\n", "not a gzip"),
    ] {
        fs::write(&bad, content).unwrap();
        let words = [bad.to_str().unwrap(), "cannot restore from", reason];
        refused(program_on(&dir).arg("--restore-from").arg(&bad), &words);
        refused(&mut program_from(&bad), &words);
    }
    let none = directory.path().join("none");
    let words = [none.to_str().unwrap(), "No such file"];
    refused(program_on(&dir).arg("--restore-from").arg(&none), &words);

    let node = Node::start_with(program_on(&dir).arg("--restore-from").arg(&good)).await;
    assert_eq!(Held::by(&node).await, Held::in_store(&store, 77));
}

#[tokio::test]
async fn a_directory_that_was_written_to_is_not_seeded() {
    let directory = tempdir().unwrap();
    let dir = directory.path().join("data");
    let seed = write_file_of(directory.path(), &store_of(10, 10), 5);
    let node = Node::start_with(&mut program_on(&dir)).await;
    node.set(r#"{"user_id":"a","spp":1}"#).await.position();
    let held = Held::by(&node).await;
    node.kill();
    for _ in 0..2 {
        refused(
            program_on(&dir).arg("--restore-from").arg(&seed),
            &["empty", "data"],
        );
        let node = Node::start_with(&mut program_on(&dir)).await;
        assert_eq!(Held::by(&node).await, held);
        // With a snapshot beside the log the second time.
        node.end().await;
    }
    // Nor one that was seeded, or a restart with the same flags would undo what came after.
    let seeded = directory.path().join("seeded");
    let node = Node::start_with(program_on(&seeded).arg("--restore-from").arg(&seed)).await;
    node.kill();
    refused(
        program_on(&seeded).arg("--restore-from").arg(&seed),
        &["empty"],
    );
}

#[tokio::test]
async fn a_seed_that_a_kill_interrupts_is_begun_again() {
    let directory = tempdir().unwrap();
    let dir = directory.path().join("data");
    let store = store_of(60_000, u64::MAX);
    let seed = write_file_of(directory.path(), &store, 77);
    let node = Node::launch(program_on(&dir).arg("--restore-from").arg(&seed)).await;
    eventually("the snapshot under way", async || {
        let names = names_in(&dir.join("snapshots"));
        names
            .iter()
            .any(|name| name.ends_with(".partial"))
            .then_some(())
    })
    .await;
    node.kill();
    // What there is does not pass for a store that is empty.
    let node = Node::launch(&mut program_on(&dir)).await;
    eventually("a verdict", async || {
        (node.ops("/status").await.json()["state"] == "no-source").then_some(())
    })
    .await;
    node.end().await;
    let node = Node::start_with(program_on(&dir).arg("--restore-from").arg(&seed)).await;
    assert_eq!(Held::by(&node).await, Held::in_store(&store, 77));
}

#[tokio::test]
async fn nothing_is_answered_while_a_restore_runs() {
    let directory = tempdir().unwrap();
    let pipe = directory.path().join("pipe");
    make_pipe(&pipe);
    let store = store_of(20_000, u64::MAX);
    let file = file_of(&store, 12);
    let half = file.len() / 2;
    // With both ends open here, the pipe outlives each of the two times that the node opens it.
    let mut feed = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&pipe)
        .unwrap();
    let (go_on, going_on) = std::sync::mpsc::channel();
    let fed = file.clone();
    let feeding = std::thread::spawn(move || {
        // First it looks for the position, up to the last header: deflated nothing and a trailer
        // come after that.
        feed.write_all(&fed[..fed.len() - 10]).unwrap();
        feed.write_all(&fed[..half]).unwrap();
        going_on.recv().unwrap();
        feed.write_all(&fed[half..]).unwrap();
    });
    let node = Node::launch(&mut program_from(&pipe)).await;
    let restore = eventually("some of it", async || {
        let restore = node.ops("/status").await.json()["restore"].clone();
        (restore["rows"].as_u64() > Some(0)).then_some(restore)
    })
    .await;
    assert_eq!(restore["done"], false);
    assert_eq!(restore["rows_expected"], 20_000);
    assert!(restore["rows"].as_u64().unwrap() < 20_000);
    assert_eq!(node.ops("/livez").await.status, 200);
    let detail = node.ops("/readyz").await.problem(503, "not-ready");
    assert!(detail.contains("loading backup"), "{detail}");
    node.get("user 1").await.problem(503, "not-ready");
    node.set(r#"{"user_id":"a","spp":1}"#)
        .await
        .problem(503, "not-ready");
    go_on.send(()).unwrap();
    feeding.join().unwrap();
    eventually("ready", async || {
        (node.ops("/readyz").await.status == 200).then_some(())
    })
    .await;
    assert_eq!(Held::by(&node).await, Held::in_store(&store, 12));
}
