//! `gradestore import`.

use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::json;
use tempfile::tempdir;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::spawn_blocking;

use crate::broker::delete;
use crate::damaged::gzip;
use crate::disk::{Held, backup_of, file_of, program_on, store_of};
use crate::harness::{Local, Node, PASSWORD, Ports, half_sent_lines, program, run};
use crate::wire::{eventually, in_time};

fn command(file: &Path, to: &str) -> Command {
    let mut command = program();
    command
        .env("GRADESTORE_PASSWORD", PASSWORD)
        .arg("import")
        .arg(file)
        .args(["--to", to]);
    command
}

/// Runs an import; what it printed.
async fn import(file: &Path, node: &Ports) -> Output {
    let mut command = command(file, &format!("http://{}", node.write));
    spawn_blocking(move || run(&mut command)).await.unwrap()
}

fn written(dir: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = dir.join(name);
    fs::write(&path, bytes).unwrap();
    path
}

/// What a failed import said.
#[track_caller]
fn failed(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert_eq!(output.stdout, b"");
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// How many rows it said that the node has.
#[track_caller]
fn accepted_in(said: &str) -> u64 {
    let mut parts = said.split("; ");
    let rows = parts.find_map(|part| {
        part.strip_prefix("the first ")?
            .split_once(" rows were imported")
    });
    rows.unwrap().0.parse().unwrap()
}

#[tokio::test]
async fn a_backup_of_one_node_makes_another_equal() {
    let dir = tempdir().unwrap();
    let (one, other) = tokio::join!(Node::start(), Node::start());
    // Enough for some parts, with ids that need quotes, and a user who has gone.
    let file = written(dir.path(), "seed", &file_of(&store_of(10_000, u64::MAX), 1));
    assert!(import(&file, &one).await.status.success());
    for user in ["\"q\", 'r'", "a\\nb\u{2028}c", " =1+1 ", "привет 😀"] {
        let patch = json!({"user_id": user, "spp": i64::MIN, "return_fee": i64::MAX});
        one.set(patch.to_string()).await.position();
    }
    delete(&one, "user+7").await.position();
    let held = Held::by(&one).await;
    assert_eq!(held.records, 10_003);

    let file = written(dir.path(), "grades.csv.gz", &backup_of(&one).await);
    let output = import(&file, &other).await;
    assert!(output.status.success(), "{output:?}");
    let found = Held::by(&other).await;
    assert_eq!((found.records, &found.digest), (held.records, &held.digest));
    let said = String::from_utf8(output.stdout).unwrap();
    let position = found.position;
    assert_eq!(said, format!("rows      10003\nposition  {position}\n"));
    assert_eq!(output.stderr, b"");
    // Once more changes nothing.
    assert!(import(&file, &other).await.status.success());
    assert_eq!(Held::by(&other).await.digest, held.digest);
}

#[tokio::test]
async fn a_column_that_is_not_there_is_left_alone_and_others_are_set() {
    let dir = tempdir().unwrap();
    let node = Node::start().await;
    for user in ["a", "b"] {
        let patch = json!({"user_id": user, "spp": 1, "shipping_fee": 2, "return_fee": 3});
        node.set(patch.to_string()).await.position();
    }
    let text = "\u{feff}return_fee,user_id,spp\r\n0,a,7\r\n\r\n\"-9\",\"c \"\"d\",8";
    let file = written(dir.path(), "foreign.csv.gz", &gzip(text.as_bytes()));
    let output = import(&file, &node).await;
    assert!(output.status.success(), "{output:?}");
    for (user, values) in [("a", [7, 2, 0]), ("b", [1, 2, 3]), ("c \"d", [8, 0, -9])] {
        let grade = node.get(user).await.json();
        let found = ["spp", "shipping_fee", "return_fee"].map(|name| grade[name].as_i64().unwrap());
        assert_eq!(found, values, "{user}");
    }
}

#[tokio::test]
async fn standard_input_will_do_and_a_file_without_rows_as_well() {
    let node = Node::start().await;
    let to = format!("http://{}", node.write);
    let mut command = command(Path::new("-"), &to);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(&gzip(b"user_id,spp\na,5\n")).unwrap();
    drop(stdin);
    let output = spawn_blocking(move || child.wait_with_output()).await;
    let output = output.unwrap().unwrap();
    assert_eq!(output.stdout, b"rows      1\nposition  1\n");
    assert_eq!(node.get("a").await.json()["spp"], 5);

    let dir = tempdir().unwrap();
    let file = written(dir.path(), "empty.csv.gz", &gzip(b"user_id\n"));
    let output = import(&file, &node).await;
    let said = String::from_utf8(output.stdout).unwrap();
    assert_eq!(said, "rows      0\nposition  none (the file has no rows)\n");
}

#[tokio::test]
async fn a_bad_row_is_named_with_its_line() {
    let dir = tempdir().unwrap();
    let node = Node::start().await;
    // The line is not the row's number and one: two lines are empty.
    let mut text = "user_id,spp\n\n".to_owned();
    for user in 1..=9000 {
        let spp = if user == 8765 { "1.5" } else { "1" };
        let _ = writeln!(text, "user-{user},{spp}");
        if user == 5000 {
            text.push('\n');
        }
    }
    let file = written(dir.path(), "bad.csv.gz", &gzip(text.as_bytes()));
    let said = failed(&import(&file, &node).await);
    let wanted = "bad.csv.gz: row 8765, column spp (line 8768): ";
    assert!(said.contains(wanted), "{said}");
    let accepted = accepted_in(&said);
    assert!((4000..8765).contains(&accepted), "{said}");
    assert_eq!(Held::by(&node).await.records, accepted);
}

#[tokio::test]
async fn a_row_that_the_node_refuses_is_named_with_its_line() {
    let dir = tempdir().unwrap();
    let node = Node::start().await;
    let mut text = "user_id,spp\n".to_owned();
    for user in 1..=9000 {
        let _ = writeln!(text, "user-{user},1");
        if user == 6000 {
            text.push('\n');
        }
    }
    let file = written(dir.path(), "good.csv.gz", &gzip(text.as_bytes()));
    // As a node would that does not know one of the file's columns.
    let spoiling = spoiling_proxy(
        node.write,
        b"\"user-6500\",\"spp\":1}",
        b"\"user-6500\",\"xpp\":1}",
    );
    let to = format!("http://{}", spoiling.await);
    let mut command = command(&file, &to);
    let output = spawn_blocking(move || run(&mut command)).await.unwrap();
    let said = failed(&output);
    for part in [
        "good.csv.gz: row 6500, line 6502, was rejected: line ",
        "unknown field \"xpp\"",
    ] {
        assert!(said.contains(part), "{part} in {said}");
    }
    let accepted = accepted_in(&said);
    assert!((5500..6500).contains(&accepted), "{said}");
    assert_eq!(Held::by(&node).await.records, accepted);
}

/// Passes bytes on both ways, and puts `new` in place of `old` on the way there.
async fn spoiling_proxy(to: SocketAddr, old: &'static [u8], new: &'static [u8]) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let (mut from_client, mut to_client) = client.into_split();
            let node = TcpStream::connect(to).await.unwrap();
            let (mut from_node, mut to_node) = node.into_split();
            tokio::spawn(async move { copy(&mut from_node, &mut to_client).await });
            tokio::spawn(async move {
                let (mut held, mut room) = (Vec::new(), vec![0; 1 << 16]);
                loop {
                    let read = from_client.read(&mut room).await.unwrap_or(0);
                    held.extend_from_slice(&room[..read]);
                    if let Some(at) = held.windows(old.len()).position(|part| part == old) {
                        held[at..at + new.len()].copy_from_slice(new);
                    }
                    // What may be the beginning of it is kept back, but not for ever: a request ends
                    // with a line.
                    let whole = read == 0 || held.ends_with(b"\n");
                    let keep = if whole { 0 } else { old.len().min(held.len()) };
                    let rest = held.split_off(held.len() - keep);
                    if to_node.write_all(&held).await.is_err() || read == 0 {
                        return;
                    }
                    held = rest;
                }
            });
        }
    });
    address
}

#[tokio::test]
async fn a_damaged_file_is_found_out_and_what_was_sent_stays() {
    let dir = tempdir().unwrap();
    let node = Node::start().await;
    let whole = file_of(&store_of(30_000, u64::MAX), 1);
    // One that was cut, in the middle of its last members.
    let cut = written(dir.path(), "cut.csv.gz", &whole[..whole.len() - 100]);
    let said = failed(&import(&cut, &node).await);
    assert!(said.contains("cut.csv.gz: cut off at byte"), "{said}");
    let accepted = Held::by(&node).await.records;
    assert!((10_000..30_000).contains(&accepted), "{accepted}");
    let stay = format!("the first {accepted} rows were imported");
    assert!(said.contains(&stay), "{said}");
    // And one that says another checksum.
    let mut changed = whole.clone();
    let at = whole.len() / 2;
    changed[at] ^= 1;
    let changed = written(dir.path(), "changed.csv.gz", &changed);
    let said = failed(&import(&changed, &node).await);
    assert!(said.contains("changed.csv.gz: damaged at byte"), "{said}");
    // The whole one mends it.
    let whole = written(dir.path(), "whole.csv.gz", &whole);
    assert!(import(&whole, &node).await.status.success());
    let held = Held::in_store(&store_of(30_000, u64::MAX), 0);
    assert_eq!(Held::by(&node).await.digest, held.digest);
}

fn begin(file: &Path, to: &str, wait: &str) -> Child {
    let mut command = command(file, to);
    command.args(["--wait", wait]).stdin(Stdio::null());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

async fn ended(child: Child) -> Output {
    spawn_blocking(move || child.wait_with_output())
        .await
        .unwrap()
        .unwrap()
}

#[tokio::test]
async fn a_node_that_dies_in_the_middle_is_told_with_what_is_known() {
    let dir = tempdir().unwrap();
    let data = dir.path().join("data");
    let node = Node::start_with(&mut program_on(&data)).await;
    let file = file_of(&store_of(30_000, u64::MAX), 1);
    let mut command = command(Path::new("-"), &format!("http://{}", node.write));
    let command = command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let (first, second) = file.split_at(file.len() / 2);
    stdin.write_all(first).unwrap();
    eventually("some rows", async || {
        (Held::by(&node).await.records >= 8000).then_some(())
    })
    .await;
    node.kill();
    // It may have seen enough by now.
    let _ = stdin.write_all(second);
    drop(stdin);
    let said = failed(&ended(child).await);
    let accepted = accepted_in(&said);
    let node = Node::start_with(&mut program_on(&data)).await;
    let held = Held::by(&node).await.records;
    let until = said.split_once(&format!("; rows {} to ", accepted + 1));
    let until = until.map_or(accepted, |(_, rest)| {
        let (until, rest) = rest.split_once(' ').unwrap();
        assert!(
            rest.starts_with("may or may not have been imported"),
            "{said}"
        );
        until.parse().unwrap()
    });
    assert!((accepted..=until).contains(&held), "{held}: {said}");
}

#[tokio::test]
async fn an_answer_that_does_not_come_and_nobody_there_are_told_apart() {
    let dir = tempdir().unwrap();
    let file = written(dir.path(), "grades.csv.gz", &gzip(b"user_id\na\nb\n"));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let to = format!("http://{}", listener.local_addr().unwrap());
    let child = begin(&file, &to, "1m");
    let (mut connection, _) = in_time("a request", listener.accept()).await.unwrap();
    let mut request = Vec::new();
    while !request.ends_with(b"{\"user_id\":\"b\"}\n") {
        in_time("its end", connection.read_buf(&mut request))
            .await
            .unwrap();
    }
    drop((connection, listener));
    let said = failed(&ended(child).await);
    let wanted = "no row was imported; rows 1 to 2 may or may not have been imported";
    assert!(said.contains(wanted), "{said}");
    let said = failed(&ended(begin(&file, &to, "1m")).await);
    assert!(said.contains("no row was imported"), "{said}");
    assert!(!said.contains("may or may not"), "{said}");
}

#[tokio::test]
async fn a_node_that_is_full_is_waited_for_and_not_for_ever() {
    let dir = tempdir().unwrap();
    let node = Local::start(|config| config.writer.bulks_max = 1).await;
    let file = written(
        dir.path(),
        "grades.csv.gz",
        &file_of(&store_of(3000, u64::MAX), 1),
    );
    let to = format!("http://{}", node.write);
    let refused = r#"gradestore_http_requests_total{route="/set lines",status="503"}"#;
    let held = half_sent_lines(&node).await;

    let said = failed(&ended(begin(&file, &to, "0s")).await);
    for part in ["answered 503: ", "queue is full", "no row was imported"] {
        assert!(said.contains(part), "{part} in {said}");
    }
    assert_eq!(node.metric(refused).await, Some(1.0));

    let waiting = begin(&file, &to, "1m");
    node.metric_reaches(refused, 3.0).await;
    drop(held);
    let output = ended(waiting).await;
    assert!(output.status.success(), "{output:?}");
    assert_eq!(Held::by(&node).await.records, 3000);
}

#[tokio::test]
async fn who_may_not_is_told_and_so_is_who_asks_for_nothing() {
    let dir = tempdir().unwrap();
    let node = Node::start().await;
    let file = written(dir.path(), "grades.csv.gz", &gzip(b"user_id\na\n"));
    let to = format!("http://{}", node.write);
    let mut wrong = command(&file, &to);
    let said = failed(&run(wrong.env("GRADESTORE_PASSWORD", "wrong")));
    assert!(said.contains("answered 401: "), "{said}");
    let mut none = command(&file, &to);
    let said = failed(&run(none.env_remove("GRADESTORE_PASSWORD")));
    assert!(said.contains("no password"), "{said}");
    let said = failed(&run(&mut command(&dir.path().join("nothing"), &to)));
    assert!(said.contains("nothing: cannot read on at byte 0"), "{said}");
    let text = written(dir.path(), "text", b"user_id\na\n");
    let said = failed(&run(&mut command(&text, &to)));
    assert!(said.contains("not a gzip file"), "{said}");
    assert_eq!(Held::by(&node).await.records, 0);
}
