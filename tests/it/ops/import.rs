//! `gradestore import`.

use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use tempfile::tempdir;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::spawn_blocking;

use crate::harness::backup_files::{
    NodeState, backup_file, fetch_backup, gzip, program_with_data_dir, random_store,
};
use crate::harness::wire::{eventually, with_timeout};
use crate::harness::{
    InProcessNode, Node, PASSWORD, Ports, UnusedProxy, incomplete_ndjson_request, program, run,
};

fn command(file: &Path, to: &str) -> Command {
    let mut command = program();
    command
        .env("GRADESTORE_PASSWORD", PASSWORD)
        .arg("import")
        .arg(file)
        .args(["--to", to]);
    command
}

/// Runs an import to its end.
async fn import(file: &Path, node: &Ports) -> Output {
    let mut command = command(file, &format!("http://{}", node.write));
    spawn_blocking(move || run(&mut command)).await.unwrap()
}

fn write_file(dir: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = dir.join(name);
    fs::write(&path, bytes).unwrap();
    path
}

/// The stderr of a failed import.
#[track_caller]
fn error_of(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert_eq!(output.stdout, b"");
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// The number of accepted rows in an error.
#[track_caller]
fn accepted_in(printed: &str) -> u64 {
    let mut parts = printed.split("; ");
    let rows = parts.find_map(|part| {
        part.strip_prefix("the first ")?
            .split_once(" rows were imported")
    });
    rows.unwrap().0.parse().unwrap()
}

#[tokio::test]
async fn importing_a_backup_makes_an_equal_node() {
    let dir = tempdir().unwrap();
    let (one, other) = tokio::join!(Node::start(), Node::start());
    // Several requests, user ids that need quotes, and a deleted user.
    let file = write_file(
        dir.path(),
        "seed",
        &backup_file(&random_store(10_000, u64::MAX), 1),
    );
    assert!(import(&file, &one).await.status.success());
    for user in ["\"q\", 'r'", "a\\nb\u{2028}c", " =1+1 ", "привет 😀"] {
        let patch = json!({"user_id": user, "spp": i64::MIN, "return_fee": i64::MAX});
        one.set(patch.to_string()).await.position();
    }
    one.delete("user 7").await.position();
    let held = NodeState::of(&one).await;
    assert_eq!(held.records, 10_003);

    let file = write_file(dir.path(), "grades.csv.gz", &fetch_backup(&one).await);
    let output = import(&file, &other).await;
    assert!(output.status.success(), "{output:?}");
    let found = NodeState::of(&other).await;
    assert_eq!((found.records, &found.digest), (held.records, &held.digest));
    let printed = String::from_utf8(output.stdout).unwrap();
    let position = found.position;
    assert_eq!(printed, format!("rows      10003\nposition  {position}\n"));
    assert_eq!(output.stderr, b"");
    // A second import changes nothing.
    assert!(import(&file, &other).await.status.success());
    assert_eq!(NodeState::of(&other).await.digest, held.digest);
}

#[tokio::test]
async fn missing_columns_stay_unchanged_and_others_are_set() {
    let dir = tempdir().unwrap();
    let node = Node::start().await;
    for user in ["a", "b"] {
        let patch = json!({"user_id": user, "spp": 1, "shipping_fee": 2, "return_fee": 3});
        node.set(patch.to_string()).await.position();
    }
    let text = "\u{feff}return_fee,user_id,spp\r\n0,a,7\r\n\r\n\"-9\",\"c \"\"d\",8";
    let file = write_file(dir.path(), "foreign.csv.gz", &gzip(text.as_bytes()));
    let output = import(&file, &node).await;
    assert!(output.status.success(), "{output:?}");
    for (user, values) in [("a", [7, 2, 0]), ("b", [1, 2, 3]), ("c \"d", [8, 0, -9])] {
        let grade = node.get(user).await.json();
        let found = ["spp", "shipping_fee", "return_fee"].map(|name| grade[name].as_i64().unwrap());
        assert_eq!(found, values, "{user}");
    }
}

#[tokio::test]
async fn import_reads_stdin_and_accepts_a_file_without_rows() {
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
    let file = write_file(dir.path(), "empty.csv.gz", &gzip(b"user_id\n"));
    let output = import(&file, &node).await;
    let printed = String::from_utf8(output.stdout).unwrap();
    assert_eq!(
        printed,
        "rows      0\nposition  none (the file has no rows)\n"
    );
}

#[tokio::test]
async fn an_invalid_row_is_named_with_its_line() {
    let dir = tempdir().unwrap();
    let node = Node::start().await;
    // Line and row numbers differ by more than one because of two empty lines.
    let mut text = "user_id,spp\n\n".to_owned();
    for user in 1..=9000 {
        let spp = if user == 8765 { "1.5" } else { "1" };
        let _ = writeln!(text, "user-{user},{spp}");
        if user == 5000 {
            text.push('\n');
        }
    }
    let file = write_file(dir.path(), "bad.csv.gz", &gzip(text.as_bytes()));
    let printed = error_of(&import(&file, &node).await);
    let expected = "bad.csv.gz: row 8765, column spp (line 8768): ";
    assert!(printed.contains(expected), "{printed}");
    let accepted = accepted_in(&printed);
    assert!((4000..8765).contains(&accepted), "{printed}");
    assert_eq!(NodeState::of(&node).await.records, accepted);
}

#[tokio::test]
async fn a_user_twice_and_text_that_is_no_csv_are_refused_with_their_line() {
    let dir = tempdir().unwrap();
    let node = Node::start().await;
    for (text, expected) in [
        (
            &b"user_id,spp\r\na,1\r\n\"bo\"b,1\r\n"[..],
            "row 2 (line 3) is not valid CSV: text after a closing quote",
        ),
        (
            b"user_id,spp\na,1\nb,2\na,3\n",
            "row 3, column user_id (line 4): \"a\" is in an earlier row too",
        ),
    ] {
        let file = write_file(dir.path(), "foreign.csv.gz", &gzip(text));
        let printed = error_of(&import(&file, &node).await);
        assert!(printed.contains(expected), "{printed}");
    }
}

#[tokio::test]
async fn a_row_that_the_node_rejects_is_named_with_its_line() {
    let dir = tempdir().unwrap();
    let node = Node::start().await;
    let mut text = "user_id,spp\n".to_owned();
    for user in 1..=9000 {
        let _ = writeln!(text, "user-{user},1");
        if user == 6000 {
            text.push('\n');
        }
    }
    let file = write_file(dir.path(), "good.csv.gz", &gzip(text.as_bytes()));
    // Like a node that does not know one of the columns.
    let rewriting = rewriting_proxy(
        node.write,
        b"\"user-6500\",\"spp\":1}",
        b"\"user-6500\",\"xpp\":1}",
    );
    let to = format!("http://{}", rewriting.await);
    let mut command = command(&file, &to);
    let output = spawn_blocking(move || run(&mut command)).await.unwrap();
    let printed = error_of(&output);
    for part in [
        "good.csv.gz: row 6500, line 6502, was rejected: line ",
        "unknown field \"xpp\"",
    ] {
        assert!(printed.contains(part), "{part} in {printed}");
    }
    let accepted = accepted_in(&printed);
    assert!((5500..6500).contains(&accepted), "{printed}");
    assert_eq!(NodeState::of(&node).await.records, accepted);
}

/// A proxy that replaces `old` by `new` in requests.
async fn rewriting_proxy(to: SocketAddr, old: &'static [u8], new: &'static [u8]) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let (mut from_client, mut to_client) = client.into_split();
            let node = TcpStream::connect(to).await.unwrap();
            let (mut from_node, mut to_node) = node.into_split();
            tokio::spawn(async move { copy(&mut from_node, &mut to_client).await });
            tokio::spawn(async move {
                let (mut held, mut buffer) = (Vec::new(), vec![0; 1 << 16]);
                loop {
                    let read = from_client.read(&mut buffer).await.unwrap_or(0);
                    held.extend_from_slice(&buffer[..read]);
                    if let Some(at) = held.windows(old.len()).position(|part| part == old) {
                        held[at..at + new.len()].copy_from_slice(new);
                    }
                    // A possible beginning of `old` is held back until more arrives; a request ends
                    // with a newline.
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
async fn a_damaged_file_is_detected_and_accepted_rows_stay() {
    let dir = tempdir().unwrap();
    let node = Node::start().await;
    let whole = backup_file(&random_store(30_000, u64::MAX), 1);
    // Truncated in its last members.
    let cut = write_file(dir.path(), "cut.csv.gz", &whole[..whole.len() - 100]);
    let printed = error_of(&import(&cut, &node).await);
    assert!(
        printed.contains("cut.csv.gz: truncated at byte"),
        "{printed}"
    );
    let accepted = NodeState::of(&node).await.records;
    assert!((10_000..30_000).contains(&accepted), "{accepted}");
    let stay = format!("the first {accepted} rows were imported");
    assert!(printed.contains(&stay), "{printed}");
    // With another checksum.
    let mut changed = whole.clone();
    let at = whole.len() / 2;
    changed[at] ^= 1;
    let changed = write_file(dir.path(), "changed.csv.gz", &changed);
    let printed = error_of(&import(&changed, &node).await);
    assert!(
        printed.contains("changed.csv.gz: damaged at byte"),
        "{printed}"
    );
    // Importing the intact file completes the data.
    let whole = write_file(dir.path(), "whole.csv.gz", &whole);
    assert!(import(&whole, &node).await.status.success());
    let held = NodeState::of_store(&random_store(30_000, u64::MAX), 0);
    assert_eq!(NodeState::of(&node).await.digest, held.digest);
}

fn start_import(file: &Path, to: &str, wait: &str) -> Child {
    let mut command = command(file, to);
    command.args(["--wait", wait]).stdin(Stdio::null());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

async fn wait_for_import(child: Child) -> Output {
    spawn_blocking(move || child.wait_with_output())
        .await
        .unwrap()
        .unwrap()
}

#[tokio::test]
async fn a_node_that_dies_during_an_import_is_reported_with_the_accepted_rows() {
    let dir = tempdir().unwrap();
    let data = dir.path().join("data");
    let node = Node::start_with(&mut program_with_data_dir(&data)).await;
    let file = backup_file(&random_store(30_000, u64::MAX), 1);
    let mut command = command(Path::new("-"), &format!("http://{}", node.write));
    let command = command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let (first, second) = file.split_at(file.len() / 2);
    stdin.write_all(first).unwrap();
    eventually("some rows", async || {
        (NodeState::of(&node).await.records >= 8000).then_some(())
    })
    .await;
    node.kill();
    // The import may have ended already.
    let _ = stdin.write_all(second);
    drop(stdin);
    let printed = error_of(&wait_for_import(child).await);
    let accepted = accepted_in(&printed);
    let node = Node::start_with(&mut program_with_data_dir(&data)).await;
    let held = NodeState::of(&node).await.records;
    let until = printed.split_once(&format!("; rows {} to ", accepted + 1));
    let until = until.map_or(accepted, |(_, rest)| {
        let (until, rest) = rest.split_once(' ').unwrap();
        assert!(
            rest.starts_with("may or may not have been imported"),
            "{printed}"
        );
        until.parse().unwrap()
    });
    assert!((accepted..=until).contains(&held), "{held}: {printed}");
}

#[tokio::test]
async fn an_interrupted_import_reports_the_accepted_rows() {
    let node = Node::start().await;
    let file = backup_file(&random_store(30_000, u64::MAX), 1);
    let (first, _) = file.split_at(file.len() / 2);
    for signal in [
        Signal::INT,
        Signal::TERM,
        Signal::HUP,
        Signal::QUIT,
        Signal::USR1,
        Signal::USR2,
    ] {
        let before = node.status().await["position"].as_u64().unwrap();
        let mut command = command(Path::new("-"), &format!("http://{}", node.write));
        let command = command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(first).unwrap();
        // The file is incomplete, so the import waits for the rest.
        eventually("some rows", async || {
            let position = node.status().await["position"].as_u64().unwrap();
            (position > before).then_some(())
        })
        .await;
        kill_process(Pid::from_child(&child), signal).unwrap();
        let printed = error_of(&wait_for_import(child).await);
        let rows = printed.strip_prefix("gradestore: interrupted; at least ");
        let rows = rows.and_then(|rest| rest.strip_suffix(" rows were imported\n"));
        assert!(rows.is_some(), "{signal:?}: {printed}");
    }
}

#[tokio::test]
async fn a_lost_response_and_a_refused_connection_are_reported_differently() {
    let dir = tempdir().unwrap();
    let file = write_file(dir.path(), "grades.csv.gz", &gzip(b"user_id\na\nb\n"));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let to = format!("http://{}", listener.local_addr().unwrap());
    let child = start_import(&file, &to, "1m");
    let (mut connection, _) = with_timeout("a request", listener.accept()).await.unwrap();
    let mut request = Vec::new();
    while !request.ends_with(b"{\"user_id\":\"b\"}\n") {
        with_timeout("the exit of the process", connection.read_buf(&mut request))
            .await
            .unwrap();
    }
    drop((connection, listener));
    let printed = error_of(&wait_for_import(child).await);
    let expected = "no row was imported; rows 1 to 2 may or may not have been imported";
    assert!(printed.contains(expected), "{printed}");
    let printed = error_of(&wait_for_import(start_import(&file, &to, "1m")).await);
    assert!(printed.contains("no row was imported"), "{printed}");
    assert!(!printed.contains("may or may not"), "{printed}");
}

#[tokio::test]
async fn import_waits_for_a_full_queue_up_to_its_deadline() {
    let dir = tempdir().unwrap();
    let node = InProcessNode::start(|config| config.writer.bulks_max = 1).await;
    let file = write_file(
        dir.path(),
        "grades.csv.gz",
        &backup_file(&random_store(3000, u64::MAX), 1),
    );
    let to = format!("http://{}", node.write);
    let refused = r#"gradestore_http_requests_total{route="/set lines",status="503"}"#;
    let held = incomplete_ndjson_request(&node).await;

    let printed = error_of(&wait_for_import(start_import(&file, &to, "0s")).await);
    for part in ["answered 503: ", "queue is full", "no row was imported"] {
        assert!(printed.contains(part), "{part} in {printed}");
    }
    assert_eq!(node.metric(refused).await, Some(1.0));

    let waiting = start_import(&file, &to, "1m");
    node.metric_reaches(refused, 3.0).await;
    drop(held);
    let output = wait_for_import(waiting).await;
    assert!(output.status.success(), "{output:?}");
    assert_eq!(NodeState::of(&node).await.records, 3000);
}

#[tokio::test]
async fn import_reports_wrong_credentials_and_unreadable_files() {
    let dir = tempdir().unwrap();
    let node = Node::start().await;
    let file = write_file(dir.path(), "grades.csv.gz", &gzip(b"user_id\na\n"));
    let to = format!("http://{}", node.write);
    let mut wrong = command(&file, &to);
    let printed = error_of(&run(wrong.env("GRADESTORE_PASSWORD", "wrong")));
    assert!(printed.contains("answered 401: "), "{printed}");
    let mut none = command(&file, &to);
    let printed = error_of(&run(none.env_remove("GRADESTORE_PASSWORD")));
    assert!(printed.contains("no password"), "{printed}");
    let printed = error_of(&run(&mut command(&dir.path().join("nothing"), &to)));
    assert!(
        printed.contains("cannot open ") && printed.contains("nothing: No such file"),
        "{printed}"
    );
    let text = write_file(dir.path(), "text", b"user_id\na\n");
    let printed = error_of(&run(&mut command(&text, &to)));
    assert!(printed.contains("not a gzip file"), "{printed}");
    assert_eq!(NodeState::of(&node).await.records, 0);
}

#[tokio::test]
async fn clients_of_a_node_use_no_proxy() {
    let dir = tempdir().unwrap();
    let node = Node::start().await;
    let (to, proxy) = (format!("http://{}", node.write), UnusedProxy::new());
    let file = write_file(dir.path(), "grades.csv.gz", &gzip(b"user_id,spp\na,5\n"));
    let copy = dir.path().join("copy.csv.gz");
    let mut backup = program();
    backup
        .args(["backup", "--from", &to, "--output"])
        .arg(&copy);
    let mut health = program();
    health.args(["health", "--ops-addr", &node.ops.to_string()]);
    for mut command in [command(&file, &to), backup, health] {
        proxy.configure(&mut command);
        command.env("GRADESTORE_PASSWORD", PASSWORD);
        let output = spawn_blocking(move || run(&mut command)).await.unwrap();
        assert!(output.status.success(), "{output:?}");
    }
    proxy.assert_unused();
}

/// Answers one request with `response`, which is not that of a node.
async fn answer_once(listener: TcpListener, response: String) {
    let (mut connection, _) = listener.accept().await.unwrap();
    let mut request = Vec::new();
    while !request.ends_with(b"}\n") {
        assert_ne!(connection.read_buf(&mut request).await.unwrap(), 0);
    }
    connection.write_all(response.as_bytes()).await.unwrap();
}

#[tokio::test]
async fn no_number_in_a_response_ends_an_import_with_a_panic() {
    const MAX: u64 = u64::MAX;
    let dir = tempdir().unwrap();
    let file = write_file(dir.path(), "grades.csv.gz", &gzip(b"user_id\na\nb\n"));
    for (status, accepted, printed) in [
        ("503 Service Unavailable", 0, "no row was imported"),
        (
            "503 Service Unavailable",
            MAX,
            "the first 2 rows were imported",
        ),
        (
            "422 Unprocessable Content",
            0,
            "row 2, line 3, was rejected: no",
        ),
        (
            "422 Unprocessable Content",
            MAX,
            "the first 2 rows were imported",
        ),
    ] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let to = format!("http://{}", listener.local_addr().unwrap());
        let body = format!(r#"{{"detail":"no","accepted":{accepted},"line":{MAX}}}"#);
        let length = body.len();
        let response = format!(
            "HTTP/1.1 {status}\r\nretry-after: {MAX}\r\nconnection: close\r\n\
             content-length: {length}\r\n\r\n{body}"
        );
        let answering = tokio::spawn(answer_once(listener, response));
        let mut command = command(&file, &to);
        let output = spawn_blocking(move || run(&mut command)).await.unwrap();
        answering.await.unwrap();
        let error = error_of(&output);
        assert!(error.contains(printed), "{status} {accepted}: {error}");
    }
}
