//! `--restore-from`: a backup seeds an empty log completely or not at all.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use flate2::write::GzEncoder;
use flate2::{Compression, GzBuilder};
use gradestore::log::{MemoryLog, RandomId};
use gradestore::node::data_dir::Storage;
use tempfile::tempdir;

use crate::disk::backup::verify;
use crate::harness::backup_files::{
    NodeState, backup_file, fetch_backup, file_names, make_pipe, program_restoring,
    program_with_data_dir, random_store, write_backup_file,
};
use crate::harness::wire::eventually;
use crate::harness::{InProcessNode, Node, run};

/// Column order and quoting of another program.
const THIRD_PARTY: &str = "spp,\"user_id\",return_fee\r\n\
                       5,\"a,b\",-7\r\n\
                       0,\"say \"\"hi\"\"\",9223372036854775807\r\n\
                       1,plain,0\r\n";

fn third_party_file(directory: &Path) -> std::path::PathBuf {
    let path = directory.join("foreign.csv.gz");
    let mut gzip = GzEncoder::new(File::create(&path).unwrap(), Compression::default());
    gzip.write_all(THIRD_PARTY.as_bytes()).unwrap();
    gzip.finish().unwrap();
    path
}

async fn assert_third_party_rows(node: &Node) {
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

/// Checks that a start fails with these words in its error.
#[track_caller]
fn assert_start_fails(command: &mut Command, words: &[&str]) {
    let output = run(command);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let printed = String::from_utf8(output.stderr).unwrap();
    let last = printed.lines().last().unwrap();
    for word in words {
        assert!(last.contains(word), "{word:?} is not in {printed}");
    }
    assert!(!printed.contains("panicked"), "{printed}");
}

#[tokio::test]
async fn a_backup_seeds_an_empty_data_directory() {
    let directory = tempdir().unwrap();
    let dir = directory.path().join("data");
    let store = random_store(5000, 100);
    let seed = write_backup_file(directory.path(), &store, 77);
    let node = Node::start_with(program_with_data_dir(&dir).arg("--restore-from").arg(&seed)).await;
    assert_eq!(NodeState::of(&node).await, NodeState::of_store(&store, 77));
    assert_eq!(node.metric("gradestore_restore_rows").await, Some(5000.0));
    let restore = &node.status().await["restore"];
    assert_eq!(restore["source"], seed.to_str().unwrap());
    assert_eq!(
        (&restore["done"], &restore["rows"]),
        (&true.into(), &5000.into())
    );
    // Positions do not go back for clients.
    let next = node.set(r#"{"user_id":"user 1","spp":7}"#).await.position();
    assert_eq!(next, 78);
    let held = NodeState::of(&node).await;
    node.kill();

    let node = Node::start_with(&mut program_with_data_dir(&dir)).await;
    assert_eq!(NodeState::of(&node).await, held);
    // A backup of the restored node seeds another one.
    let path = directory.path().join("again.csv.gz");
    fs::write(&path, fetch_backup(&node).await).unwrap();
    let again = Node::start_with(&mut program_restoring(&path)).await;
    assert_eq!(NodeState::of(&again).await, held);
}

#[tokio::test]
async fn a_third_party_file_seeds_an_empty_data_directory() {
    let directory = tempdir().unwrap();
    let dir = directory.path().join("data");
    let file = third_party_file(directory.path());
    let node = Node::start_with(program_with_data_dir(&dir).arg("--restore-from").arg(&file)).await;
    assert_third_party_rows(&node).await;
    node.set(r#"{"user_id":"plain","shipping_fee":3}"#)
        .await
        .position();
    let held = NodeState::of(&node).await;
    node.kill();
    let node = Node::start_with(&mut program_with_data_dir(&dir)).await;
    assert_eq!(NodeState::of(&node).await, held);
    assert_eq!(node.get("plain").await.json()["spp"], 1);
    node.stop().await;

    // The log does not have those rows, so without a snapshot it is not complete.
    for name in file_names(&dir.join("snapshots")) {
        fs::remove_file(dir.join("snapshots").join(name)).unwrap();
    }
    let node = Node::launch(&mut program_with_data_dir(&dir)).await;
    let reason = eventually("the result", async || {
        let status = node.status().await;
        (status["state"] == "no-source").then(|| status["reason"].to_string())
    })
    .await;
    assert!(reason.contains("the log begins at batch 2"), "{reason}");
}

#[tokio::test]
async fn third_party_extra_fields_in_gzip_headers_are_ignored() {
    let directory = tempdir().unwrap();
    let path = directory.path().join("foreign.csv.gz");
    // Those of mgzip, dictzip and bgzip, and an unknown one.
    for extra in [
        &b"IG\x08\0\x40\0\0\0\0\0\0\0"[..],
        b"RA\x08\0\x01\0\xcb\xe3\x01\0\x40\0",
        b"BC\x02\0\x1b\0",
        b"XX\0\0cp\x01\0\x07",
    ] {
        let name = String::from_utf8_lossy(&extra[..2]);
        let gzip = GzBuilder::new().extra(extra).filename("grades.csv");
        let mut gzip = gzip.write(File::create(&path).unwrap(), Compression::default());
        gzip.write_all(THIRD_PARTY.as_bytes()).unwrap();
        gzip.finish().unwrap();
        let verified = verify(&path);
        assert!(verified.status.success(), "{name}: {verified:?}");
        let printed = String::from_utf8(verified.stdout).unwrap();
        assert!(
            printed.contains("not made by gradestore"),
            "{name}: {printed}"
        );
        let node = Node::start_with(&mut program_restoring(&path)).await;
        assert_third_party_rows(&node).await;
    }
}

#[tokio::test]
async fn an_ephemeral_node_starts_from_a_file() {
    let directory = tempdir().unwrap();
    let store = random_store(100, 10);
    let own = write_backup_file(directory.path(), &store, 40);
    let node = Node::start_with(&mut program_restoring(&own)).await;
    assert_eq!(NodeState::of(&node).await, NodeState::of_store(&store, 40));
    let next = node.set(r#"{"user_id":"a","spp":7}"#).await.position();
    assert_eq!(next, 41);
    let node = Node::start_with(&mut program_restoring(&third_party_file(directory.path()))).await;
    assert_third_party_rows(&node).await;
}

#[tokio::test]
async fn an_invalid_file_leaves_the_data_directory_unchanged() {
    let directory = tempdir().unwrap();
    let dir = directory.path().join("data");
    let store = random_store(5000, 100);
    let good = write_backup_file(directory.path(), &store, 77);
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
        assert_start_fails(
            program_with_data_dir(&dir).arg("--restore-from").arg(&bad),
            &words,
        );
        assert_start_fails(&mut program_restoring(&bad), &words);
    }
    let none = directory.path().join("none");
    let pipe = directory.path().join("pipe");
    make_pipe(&pipe);
    for (path, reason) in [
        (&*none, "No such file"),
        (&pipe, "not a regular file"),
        (directory.path(), "not a regular file"),
        (Path::new("/dev/null"), "not a regular file"),
    ] {
        let words = [path.to_str().unwrap(), reason];
        let unclaimed = directory.path().join("unclaimed");
        assert_start_fails(
            program_with_data_dir(&unclaimed)
                .arg("--restore-from")
                .arg(path),
            &words,
        );
        assert!(!unclaimed.exists());
    }

    let node = Node::start_with(program_with_data_dir(&dir).arg("--restore-from").arg(&good)).await;
    assert_eq!(NodeState::of(&node).await, NodeState::of_store(&store, 77));
}

#[tokio::test]
async fn a_data_directory_with_writes_is_not_seeded() {
    let directory = tempdir().unwrap();
    let dir = directory.path().join("data");
    let seed = write_backup_file(directory.path(), &random_store(10, 10), 5);
    let node = Node::start_with(&mut program_with_data_dir(&dir)).await;
    node.set(r#"{"user_id":"a","spp":1}"#).await.position();
    let held = NodeState::of(&node).await;
    node.kill();
    for _ in 0..2 {
        assert_start_fails(
            program_with_data_dir(&dir).arg("--restore-from").arg(&seed),
            &["empty", "data"],
        );
        let node = Node::start_with(&mut program_with_data_dir(&dir)).await;
        assert_eq!(NodeState::of(&node).await, held);
        // The second time with a snapshot beside the log.
        node.stop().await;
    }
}

#[tokio::test]
async fn a_directory_that_was_seeded_from_this_file_starts_normally() {
    let directory = tempdir().unwrap();
    for (name, seed) in [
        (
            "own",
            write_backup_file(directory.path(), &random_store(10, 10), 5),
        ),
        ("foreign", third_party_file(directory.path())),
    ] {
        let dir = directory.path().join(name);
        let with_seed = |seed: &Path| {
            let mut command = program_with_data_dir(&dir);
            command.arg("--restore-from").arg(seed);
            command
        };
        let node = Node::start_with(&mut with_seed(&seed)).await;
        node.set(r#"{"user_id":"later","spp":1}"#).await.position();
        let mut held = NodeState::of(&node).await;
        // With the writes only in the log, then in a snapshot.
        node.kill();
        for start in 0..2 {
            let renamed = directory.path().join(format!("{name} {start}"));
            fs::copy(&seed, &renamed).unwrap();
            let node = Node::start_with(&mut with_seed(&renamed)).await;
            assert_eq!(NodeState::of(&node).await, held);
            let logged = node.stderr.lock().clone();
            assert!(
                logged.contains("already restored from this file"),
                "{logged}"
            );
            assert!(logged.contains(renamed.to_str().unwrap()), "{logged}");
            node.set(r#"{"user_id":"later","spp":2}"#).await.position();
            held = NodeState::of(&node).await;
            node.stop().await;
        }
        // The file is gone. Another one that is missing is an error.
        let moved = directory.path().join(format!("{name} moved"));
        fs::rename(&seed, &moved).unwrap();
        let node = Node::start_with(&mut with_seed(&seed)).await;
        assert_eq!(NodeState::of(&node).await, held);
        node.stop().await;
        let missing = directory.path().join("missing");
        assert_start_fails(&mut with_seed(&missing), &["No such file"]);
        let other = write_backup_file(directory.path(), &random_store(11, 10), 6);
        assert_start_fails(&mut with_seed(&other), &["empty"]);
        // Without its log and snapshots it is a new directory.
        for part in ["log", "snapshots"] {
            fs::remove_dir_all(dir.join(part)).unwrap();
        }
        let node = Node::start_with(&mut with_seed(&other)).await;
        assert_eq!(NodeState::of(&node).await.records, 11);
    }
}

#[tokio::test]
async fn a_seed_interrupted_by_a_kill_can_be_repeated() {
    let directory = tempdir().unwrap();
    let dir = directory.path().join("data");
    let store = random_store(60_000, u64::MAX);
    let seed = write_backup_file(directory.path(), &store, 77);
    let node = Node::launch(program_with_data_dir(&dir).arg("--restore-from").arg(&seed)).await;
    eventually("the snapshot under way", async || {
        let names = file_names(&dir.join("snapshots"));
        names
            .iter()
            .any(|name| name.ends_with(".partial"))
            .then_some(())
    })
    .await;
    node.kill();
    // Without the file it cannot be completed.
    let moved = directory.path().join("moved");
    fs::rename(&seed, &moved).unwrap();
    let mut again = program_with_data_dir(&dir);
    assert_start_fails(again.arg("--restore-from").arg(&seed), &["No such file"]);
    fs::rename(&moved, &seed).unwrap();
    // The partial state does not pass for an empty store.
    let node = Node::launch(&mut program_with_data_dir(&dir)).await;
    eventually("the result", async || {
        (node.status().await["state"] == "no-source").then_some(())
    })
    .await;
    node.stop().await;
    let node = Node::start_with(program_with_data_dir(&dir).arg("--restore-from").arg(&seed)).await;
    assert_eq!(NodeState::of(&node).await, NodeState::of_store(&store, 77));
}

#[tokio::test]
async fn nothing_is_served_during_a_restore() {
    let directory = tempdir().unwrap();
    let pipe = directory.path().join("pipe");
    make_pipe(&pipe);
    let store = random_store(20_000, u64::MAX);
    let file = backup_file(&store, 12);
    let (first, second) = file.split_at(file.len() / 2);
    let (first, second) = (first.to_vec(), second.to_vec());
    // Open here too, so that opening it waits for no other process.
    let mut feed = OpenOptions::new();
    let mut feed = feed.read(true).write(true).open(&pipe).unwrap();
    let (resume, resumed) = std::sync::mpsc::channel();
    let feeding = std::thread::spawn(move || {
        feed.write_all(&first).unwrap();
        resumed.recv().unwrap();
        feed.write_all(&second).unwrap();
    });
    // The program rejects a pipe, because it reads the file twice.
    let origin = RandomId::random().unwrap();
    let storage = Storage::of(Arc::new(MemoryLog::new(origin, 12)), origin);
    let node = InProcessNode::launch(storage, origin, |config| config.restore_from = Some(pipe));
    let restore = eventually("partial progress", async || {
        let restore = node.status().await["restore"].clone();
        (restore["rows"].as_u64() > Some(0)).then_some(restore)
    })
    .await;
    assert_eq!(restore["done"], false);
    assert_eq!(restore["rows_expected"], 20_000);
    assert!(restore["rows"].as_u64().unwrap() < 20_000);
    assert_eq!(node.ops("/livez").await.status, 200);
    let detail = node.ops("/readyz").await.expect_problem(503, "not-ready");
    assert!(detail.contains("loading backup"), "{detail}");
    node.get("user 1").await.expect_problem(503, "not-ready");
    node.set(r#"{"user_id":"a","spp":1}"#)
        .await
        .expect_problem(503, "not-ready");
    resume.send(()).unwrap();
    feeding.join().unwrap();
    eventually("ready", async || {
        (node.ops("/readyz").await.status == 200).then_some(())
    })
    .await;
    assert_eq!(NodeState::of(&node).await, NodeState::of_store(&store, 12));
}

#[tokio::test]
async fn no_file_with_data_or_a_password_is_readable_by_others() {
    let directory = tempdir().unwrap();
    let dir = directory.path().join("data");
    let seed = write_backup_file(directory.path(), &random_store(10, 10), 5);
    let mut command = program_with_data_dir(&dir);
    command
        .env_remove("GRADESTORE_PASSWORD")
        .arg("--restore-from")
        .arg(&seed);
    let node = Node::start_with(&mut command).await;
    node.stop().await;
    let mut private = 0;
    for part in ["", "log", "snapshots"] {
        for entry in fs::read_dir(dir.join(part)).unwrap() {
            let (path, metadata) = entry.map(|e| (e.path(), e.metadata().unwrap())).unwrap();
            if metadata.is_file() && !path.ends_with("lock") {
                private += 1;
                let mode = metadata.permissions().mode() & 0o777;
                assert_eq!(mode, 0o600, "{}", path.display());
            }
        }
    }
    // The password, the replica id, the fingerprint, a segment and a snapshot.
    assert_eq!(private, 5);
}
