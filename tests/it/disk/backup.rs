//! `GET /backup`, `gradestore backup` and `gradestore verify`.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::UNIX_EPOCH;

use gradestore::backup::rfc3339;
use gradestore::grade::FIELDS;
use tempfile::tempdir;

use crate::harness::backup_files::{
    NodeState, fetch_backup, file_names, make_pipe, now, program_restoring, random_store,
    read_backup, request_backup, time_in_file_name, write_backup_file,
};
use crate::harness::wire::{Response, TIMEOUT, with_timeout};
use crate::harness::{AUTHORIZATION, Node, PASSWORD, Ports, ReservedPort, program, run};

/// User ids that CSV parsers may misread.
pub(crate) const IDS: [&str; 10] = [
    "plain",
    "a,b",
    "\"quoted\"",
    " spaces ",
    "привет 😀",
    "=1+1",
    "007",
    "NULL",
    "\"",
    ",",
];

pub(crate) type Grades = BTreeMap<String, Vec<i64>>;

/// Sets edge-case values; returns them by user id.
pub(crate) async fn set_edge_case_grades(node: &Ports) -> Grades {
    let mut grades = Grades::new();
    for (index, id) in IDS.iter().enumerate() {
        let mut values = vec![i64::MIN, i64::MAX, -1, index as i64];
        values.rotate_left(index % 4);
        let mut patch = serde_json::json!({ "user_id": id });
        for (field, value) in FIELDS.iter().zip(&values) {
            patch[field] = (*value).into();
        }
        node.set(patch.to_string()).await.position();
        grades.insert((*id).to_owned(), values);
    }
    grades
}

/// `gradestore backup` of the node at `from`.
pub(crate) fn backup_command(from: &str, output: &Path) -> Command {
    let mut command = program();
    // Ignores a proxy that the machine's environment names.
    command
        .env("NO_PROXY", "*")
        .env("GRADESTORE_PASSWORD", PASSWORD);
    command.args(["backup", "--from", from, "-o"]).arg(output);
    command
}

pub(crate) fn verify(file: &Path) -> Output {
    run(program().arg("verify").arg(file))
}

/// `gradestore verify -`.
fn verify_stdin(file: &[u8]) -> Output {
    let mut command = program();
    let command = command.args(["verify", "-"]).stdin(Stdio::piped());
    let command = command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(file).unwrap();
    child.wait_with_output().unwrap()
}

/// Checks that two valid backups have the same records.
#[track_caller]
fn assert_same_records(one: &[u8], other: &[u8]) {
    let (one, other) = (read_backup(one).1, read_backup(other).1);
    assert_eq!((one.rows, one.digest), (other.rows, other.digest));
}

fn now_ns() -> u64 {
    u64::try_from(UNIX_EPOCH.elapsed().unwrap().as_nanos()).unwrap()
}

#[tokio::test]
async fn a_backup_has_its_metadata_in_headers_and_file_name() {
    let node = Node::start().await;
    let before = now();
    let mut last = 0;
    for user in 0..20 {
        let patch = format!(r#"{{"user_id":"{user}","spp":{user}}}"#);
        last = node.set(patch).await.position();
    }
    let url = format!("http://{}/backup", node.write);
    for method in ["GET", "HEAD"] {
        let request = node.client.request(method.parse().unwrap(), &url);
        let response = request.header("authorization", AUTHORIZATION).send().await;
        let response = response.unwrap();
        assert_eq!(response.status(), 200);
        let header = |name: &str| response.headers()[name].to_str().unwrap().to_owned();
        assert_eq!(header("content-type"), "application/gzip");
        assert_eq!(header("grade-position"), last.to_string());
        let time = time_in_file_name(&header("content-disposition"));
        assert!(before <= time && time <= now(), "{time}");
        let body = if method == "GET" {
            assert_eq!(header("transfer-encoding"), "chunked");
            let body = response.bytes().await.unwrap();
            let (head, end) = read_backup(&body).1.records.unwrap();
            assert_eq!((head.position, end.position, end.rows), (last, last, 20));
            // `gunzip -N` restores this name.
            let name = format!("grades-{time}.csv\0");
            assert!(body.windows(name.len()).any(|at| at == name.as_bytes()));
            continue;
        } else {
            response.bytes().await.unwrap()
        };
        assert!(body.is_empty());
    }
    // HEAD occupied no place.
    for _ in 0..3 {
        fetch_backup(&node).await;
    }
}

#[tokio::test]
async fn a_backup_needs_the_password_and_get() {
    let node = Node::start().await;
    let url = format!("http://{}/backup", node.write);
    let ask = async |method: &str, authorization: Option<&str>| {
        let mut request = node.client.request(method.parse().unwrap(), &url);
        if let Some(authorization) = authorization {
            request = request.header("authorization", authorization);
        }
        Response::of(with_timeout(&url, request.send()).await.unwrap()).await
    };
    ask("GET", None).await.expect_problem(401, "unauthorized");
    let wrong = "Basic YWRtaW46d3Jvbmc=";
    ask("GET", Some(wrong))
        .await
        .expect_problem(401, "unauthorized");
    let refused = ask("HEAD", None).await;
    assert_eq!((refused.status, &*refused.body), (401, ""));
    for method in ["POST", "PUT", "DELETE", "PATCH"] {
        let response = ask(method, Some(AUTHORIZATION)).await;
        response.expect_problem(405, "method-not-allowed");
        assert_eq!(response.header("allow"), "GET, HEAD");
    }
}

#[tokio::test]
async fn the_backup_command_writes_a_file_that_verify_accepts() {
    let node = Node::start().await;
    set_edge_case_grades(&node).await;
    let directory = tempdir().unwrap();
    let path = directory.path().join("grades.csv.gz");
    fs::write(&path, "an older one").unwrap();
    let url = format!("http://{}", node.write);
    // Not the time of the last write.
    let before = now_ns();
    let kept = run(&mut backup_command(&url, &path));
    assert!(kept.status.success() && kept.stdout.is_empty(), "{kept:?}");
    assert_eq!(file_names(directory.path()), ["grades.csv.gz"]);
    let file = fs::read(&path).unwrap();

    // The same on stdout, and the summary on stderr.
    let piped = run(&mut backup_command(
        &format!("{url}/backup"),
        Path::new("-"),
    ));
    assert!(piped.status.success(), "{piped:?}");
    assert_same_records(&piped.stdout, &file);
    let from_pipe = verify_stdin(&piped.stdout);
    assert_eq!(from_pipe.stdout, [&*piped.stderr, b"OK\n"].concat());

    let verified = verify(&path);
    assert!(verified.status.success(), "{verified:?}");
    assert_eq!(verified.stdout, [&*kept.stderr, b"OK\n"].concat());
    let printed = String::from_utf8(verified.stdout).unwrap();
    let held = NodeState::of(&node).await;
    let (head, end) = read_backup(&file).1.records.unwrap();
    assert!(before <= head.created_ns && head.created_ns <= now_ns());
    let lines = [
        format!("rows      {}", held.records),
        format!("time      {}", rfc3339(head.created_ns)),
        format!("bytes     {}", file.len()),
        format!("position  {0} to {0}", held.position),
        format!("digest    {}", held.digest),
        format!("checksum  {}", end.checksum),
    ];
    for line in lines {
        assert!(
            printed.lines().any(|has| has == line),
            "{line:?} not in {printed}"
        );
    }
}

#[tokio::test]
async fn the_backup_command_reads_environment_variables() {
    let node = Node::start().await;
    let directory = tempdir().unwrap();
    let path = directory.path().join("grades.csv.gz");
    let mut command = program();
    command
        .arg("backup")
        .env("NO_PROXY", "*")
        .env("GRADESTORE_PASSWORD", PASSWORD)
        .env("GRADESTORE_FROM", format!("http://{}", node.write))
        .env("GRADESTORE_OUTPUT", &path);
    let kept = run(&mut command);
    assert!(kept.status.success(), "{kept:?}");
    assert!(verify(&path).status.success());
}

#[tokio::test]
async fn the_backup_command_writes_into_a_pipe() {
    let node = Node::start().await;
    set_edge_case_grades(&node).await;
    let directory = tempdir().unwrap();
    let pipe = directory.path().join("pipe");
    make_pipe(&pipe);
    let (read, got) = std::sync::mpsc::channel();
    let from = pipe.clone();
    std::thread::spawn(move || read.send(fs::read(from)));
    let kept = run(&mut backup_command(
        &format!("http://{}", node.write),
        &pipe,
    ));
    assert!(kept.status.success(), "{kept:?}");
    let got = got.recv_timeout(TIMEOUT).unwrap().unwrap();
    assert_same_records(&got, &fetch_backup(&node).await);
    assert_eq!(file_names(directory.path()), ["pipe"]);
    assert!(fs::metadata(&pipe).unwrap().file_type().is_fifo());
}

#[tokio::test]
async fn the_backup_command_replaces_the_target_of_a_symlink() {
    let node = Node::start().await;
    set_edge_case_grades(&node).await;
    let directory = tempdir().unwrap();
    let (kept_in, link) = (directory.path().join("kept"), directory.path().join("link"));
    fs::create_dir(&kept_in).unwrap();
    symlink("kept/file", &link).unwrap();
    // First to a missing target, then to an existing one.
    for _ in 0..2 {
        let kept = run(&mut backup_command(
            &format!("http://{}", node.write),
            &link,
        ));
        assert!(kept.status.success(), "{kept:?}");
        assert_eq!(fs::read_link(&link).unwrap(), Path::new("kept/file"));
        assert_same_records(
            &fs::read(kept_in.join("file")).unwrap(),
            &fetch_backup(&node).await,
        );
        assert_eq!(file_names(&kept_in), ["file"]);
        assert_eq!(file_names(directory.path()), ["kept", "link"]);
        node.set(r#"{"user_id":"new","spp":1}"#).await.position();
    }
}

#[tokio::test]
async fn a_new_backup_is_private_and_an_existing_file_keeps_its_permissions() {
    let node = Node::start().await;
    let directory = tempdir().unwrap();
    let path = directory.path().join("grades.csv.gz");
    for before in [None, Some(0o600), Some(0o640), Some(0o444)] {
        if let Some(mode) = before {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        }
        let url = format!("http://{}", node.write);
        let kept = run(&mut backup_command(&url, &path));
        assert!(kept.status.success(), "{kept:?}");
        let mode = fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, before.unwrap_or(0o600));
    }
}

/// A server that sends `response` to one request.
fn serve_once(response: &'static str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        let mut stream = listener.accept().unwrap().0;
        let mut request = [0; 4096];
        let _ = stream.read(&mut request).unwrap();
        stream.write_all(response.as_bytes()).unwrap();
    });
    url
}

#[tokio::test]
async fn the_backup_command_keeps_the_old_file_on_failure() {
    let node = Node::start().await;
    let free = ReservedPort::new();
    let nobody = format!("http://{}", free.address());
    let html = "HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: 32\r\n\r\n\
                <!doctype html><p>Welcome!</p>\r\n";
    let empty = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
    let own = format!("http://{}", node.write);
    let ops = format!("http://{}", node.ops);
    for (from, password, words) in [
        (own.clone(), "wrong", &["401", "user name or password"][..]),
        (nobody, PASSWORD, &["refused", "no file was written"]),
        (
            serve_once(html),
            PASSWORD,
            &["not a gzip", "no file was written"],
        ),
        (
            serve_once(empty),
            PASSWORD,
            &["truncated at byte 0", "no file was written"],
        ),
        (ops, PASSWORD, &["404", "no such path"]),
        (own, "", &["no password", "GRADESTORE_PASSWORD"]),
    ] {
        let directory = tempdir().unwrap();
        let path = directory.path().join("grades.csv.gz");
        for before in [None, Some("an older one")] {
            if let Some(before) = before {
                fs::write(&path, before).unwrap();
            }
            if before.is_some() && words[1] == "no file was written" && words[0] != "refused" {
                // This server responds only once.
                continue;
            }
            let mut command = backup_command(&from, &path);
            let output = run(command.env("GRADESTORE_PASSWORD", password));
            assert_eq!(output.status.code(), Some(1), "{output:?}");
            assert!(output.stdout.is_empty(), "{output:?}");
            let printed = String::from_utf8(output.stderr).unwrap();
            for word in words {
                assert!(printed.contains(word), "{word:?} is not in {printed}");
            }
            assert!(!printed.contains("panicked"), "{printed}");
            assert_eq!(fs::read_to_string(&path).ok().as_deref(), before);
            let left = if before.is_some() { 1 } else { 0 };
            assert_eq!(file_names(directory.path()).len(), left);
        }
    }
}

#[tokio::test]
async fn a_backup_error_names_the_output() {
    let node = Node::start().await;
    let url = format!("http://{}", node.write);
    let output = run(&mut backup_command(
        &url,
        Path::new("/nowhere/grades.csv.gz"),
    ));
    assert_eq!(output.status.code(), Some(1));
    let printed = String::from_utf8(output.stderr).unwrap();
    assert!(printed.contains("/nowhere/grades.csv.gz"), "{printed}");

    // The reader of the pipe is gone.
    let mut command = backup_command(&url, Path::new("-"));
    let command = command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert_eq!(request_backup(&node).await.status(), 200);
}

#[tokio::test]
async fn a_fast_client_may_get_an_uncompressed_backup() {
    let directory = tempdir().unwrap();
    let seed = write_backup_file(directory.path(), &random_store(5_000, 1_000), 10);
    let node = Node::start_with(&mut program_restoring(&seed)).await;
    let small = fetch_backup(&node).await;
    let url = format!("http://{}/backup", node.write);
    let asked = node.client.get(url).header("authorization", AUTHORIZATION);
    let asked = asked.header("grade-compression", "if-slow").send().await;
    let large = asked.unwrap().bytes().await.unwrap();
    assert!(
        large.len() > 2 * small.len(),
        "{} {}",
        large.len(),
        small.len()
    );
    assert_eq!(read_backup(&large).1.digest, read_backup(&small).1.digest);
}
