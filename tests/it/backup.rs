//! `GET /backup`, `gradestore backup` and `gradestore verify`, when all goes well and when there is
//! nothing to be had.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::{FileTypeExt, symlink};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use gradestore::grade::FIELDS;
use tempfile::tempdir;

use crate::disk::{
    Held, ask_backup, backup_of, make_pipe, names_in, now, program_from, restored, store_of,
    time_named, write_file_of,
};
use crate::harness::{AUTHORIZATION, Node, PASSWORD, Ports, program, run, run_by};
use crate::wire::{Answer, PATIENCE, in_time};

/// Ids that a tool that reads CSV may stumble over.
const IDS: [&str; 10] = [
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

type Grades = BTreeMap<String, Vec<i64>>;

/// Sets odd grades; what was set.
async fn set_odd_grades(node: &Ports) -> Grades {
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
    // A proxy that the machine is told of is none of the node's.
    command
        .env("NO_PROXY", "*")
        .env("GRADESTORE_PASSWORD", PASSWORD);
    command.args(["backup", "--from", from, "-o"]).arg(output);
    command
}

pub(crate) fn verify(file: &Path) -> Output {
    run(program().arg("verify").arg(file))
}

#[tokio::test]
async fn a_backup_says_what_it_is() {
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
        let answer = request.header("authorization", AUTHORIZATION).send().await;
        let answer = answer.unwrap();
        assert_eq!(answer.status(), 200);
        let header = |name: &str| answer.headers()[name].to_str().unwrap().to_owned();
        assert_eq!(header("content-type"), "application/gzip");
        assert_eq!(header("grade-position"), last.to_string());
        let time = time_named(&header("content-disposition"));
        assert!(before <= time && time <= now(), "{time}");
        let body = if method == "GET" {
            assert_eq!(header("transfer-encoding"), "chunked");
            let body = answer.bytes().await.unwrap();
            let (head, end) = restored(&body).1.records.unwrap();
            assert_eq!((head.position, end.position, end.rows), (last, last, 20));
            // gunzip -N gives it the same name.
            let name = format!("grades-{time}.csv\0");
            assert!(body.windows(name.len()).any(|at| at == name.as_bytes()));
            continue;
        } else {
            answer.bytes().await.unwrap()
        };
        assert!(body.is_empty());
    }
    // HEAD took no place for good.
    for _ in 0..3 {
        backup_of(&node).await;
    }
}

#[tokio::test]
async fn a_backup_is_for_who_has_the_password_and_asks_with_get() {
    let node = Node::start().await;
    let url = format!("http://{}/backup", node.write);
    let ask = async |method: &str, authorization: Option<&str>| {
        let mut request = node.client.request(method.parse().unwrap(), &url);
        if let Some(authorization) = authorization {
            request = request.header("authorization", authorization);
        }
        Answer::of(in_time(&url, request.send()).await.unwrap()).await
    };
    ask("GET", None).await.problem(401, "unauthorized");
    let wrong = "Basic YWRtaW46d3Jvbmc=";
    ask("GET", Some(wrong)).await.problem(401, "unauthorized");
    let refused = ask("HEAD", None).await;
    assert_eq!((refused.status, &*refused.body), (401, ""));
    for method in ["POST", "PUT", "DELETE", "PATCH"] {
        let answer = ask(method, Some(AUTHORIZATION)).await;
        answer.problem(405, "method-not-allowed");
        assert_eq!(answer.header("allow"), "GET, HEAD");
    }
}

/// What Python's own gzip and csv make of a file, as JSON.
const PYTHON: &str = "
import csv, gzip, json, sys
with gzip.open(sys.argv[1], 'rt', encoding='utf-8', newline='') as file:
    rows = [dict(row) for row in csv.DictReader(file, strict=True)]
json.dump(rows, sys.stdout)
";

#[tokio::test]
async fn other_tools_find_in_a_backup_what_was_set() {
    let node = Node::start().await;
    let grades = set_odd_grades(&node).await;
    let directory = tempdir().unwrap();
    let path = directory.path().join("grades.csv.gz");
    fs::write(&path, backup_of(&node).await).unwrap();

    let python = run(Command::new("python3").args(["-c", PYTHON]).arg(&path));
    assert!(python.status.success(), "{python:?}");
    let rows: Vec<BTreeMap<String, String>> = serde_json::from_slice(&python.stdout).unwrap();
    let found: Grades = rows
        .iter()
        .map(|row| {
            assert_eq!(row.len(), 1 + FIELDS.len());
            let values = FIELDS.iter().map(|field| row[*field].parse().unwrap());
            (row["user_id"].clone(), values.collect())
        })
        .collect();
    assert_eq!((found, rows.len()), (grades, IDS.len()));

    let zcat = run(Command::new("zcat").arg(&path));
    assert!(zcat.status.success() && zcat.stderr.is_empty(), "{zcat:?}");
    let text = String::from_utf8(zcat.stdout).unwrap();
    assert_eq!(text.lines().count(), 1 + IDS.len());
    let header = format!("user_id,{}", FIELDS.join(","));
    assert_eq!(text.lines().next(), Some(&*header));
}

#[tokio::test]
async fn the_command_keeps_a_backup_that_verify_approves() {
    let node = Node::start().await;
    set_odd_grades(&node).await;
    let directory = tempdir().unwrap();
    let path = directory.path().join("grades.csv.gz");
    fs::write(&path, "an older one").unwrap();
    let url = format!("http://{}", node.write);
    let kept = run(&mut backup_command(&url, &path));
    assert!(kept.status.success() && kept.stdout.is_empty(), "{kept:?}");
    assert_eq!(names_in(directory.path()), ["grades.csv.gz"]);
    let file = fs::read(&path).unwrap();
    assert_eq!(file, backup_of(&node).await);

    // All in one pipe, and what people read beside it.
    let piped = run(&mut backup_command(
        &format!("{url}/backup"),
        Path::new("-"),
    ));
    assert!(piped.status.success(), "{piped:?}");
    assert_eq!(piped.stdout, file);
    assert_eq!(piped.stderr, kept.stderr);

    let verified = verify(&path);
    assert!(verified.status.success(), "{verified:?}");
    assert_eq!(verified.stdout, kept.stderr);
    let said = String::from_utf8(verified.stdout).unwrap();
    let held = Held::by(&node).await;
    let end = restored(&file).1.records.unwrap().1;
    let lines = [
        format!("rows      {}", held.records),
        format!("bytes     {}", file.len()),
        format!("position  {0} to {0}", held.position),
        format!("digest    {}", held.digest),
        format!("checksum  {}", end.checksum),
    ];
    for line in lines {
        assert!(
            said.lines().any(|has| has == line),
            "{line:?} not in {said}"
        );
    }
}

#[tokio::test]
async fn the_command_asks_as_its_variables_say() {
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
async fn a_pipe_gets_the_backup_and_stays_a_pipe() {
    let node = Node::start().await;
    set_odd_grades(&node).await;
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
    let got = got.recv_timeout(PATIENCE).unwrap().unwrap();
    assert_eq!(got, backup_of(&node).await);
    assert_eq!(names_in(directory.path()), ["pipe"]);
    assert!(fs::metadata(&pipe).unwrap().file_type().is_fifo());
}

#[tokio::test]
async fn a_device_is_written_to_and_not_replaced() {
    let node = Node::start().await;
    set_odd_grades(&node).await;
    let directory = tempdir().unwrap();
    let path = directory.path().join("null");
    fs::write(&path, "").unwrap();
    // The machine's own is not put at risk: this one is mounted over a file, for the command alone.
    let mount = "mount --bind /dev/null \"$0\" && \"$@\" && test -c \"$0\" && ls -A \"${0%/*}\"";
    let mut unshare = vec!["unshare", "--mount"];
    if !rustix::process::geteuid().is_root() {
        unshare.push("--map-root-user");
    }
    unshare.extend(["sh", "-c", mount, path.to_str().unwrap()]);
    let command = backup_command(&format!("http://{}", node.write), &path);
    let kept = run(&mut run_by(&unshare, &command));
    assert!(kept.status.success(), "{kept:?}");
    assert_eq!(kept.stdout, b"null\n");
    let said = String::from_utf8(kept.stderr).unwrap();
    let rows = format!("rows      {}", IDS.len());
    assert!(said.lines().any(|line| line == rows), "{said}");
}

#[tokio::test]
async fn what_a_link_leads_to_is_replaced_and_the_link_stays() {
    let node = Node::start().await;
    set_odd_grades(&node).await;
    let directory = tempdir().unwrap();
    let (kept_in, link) = (directory.path().join("kept"), directory.path().join("link"));
    fs::create_dir(&kept_in).unwrap();
    symlink("kept/file", &link).unwrap();
    // To a file that is not there, and to one that is.
    for _ in 0..2 {
        let kept = run(&mut backup_command(
            &format!("http://{}", node.write),
            &link,
        ));
        assert!(kept.status.success(), "{kept:?}");
        assert_eq!(fs::read_link(&link).unwrap(), Path::new("kept/file"));
        assert_eq!(
            fs::read(kept_in.join("file")).unwrap(),
            backup_of(&node).await
        );
        assert_eq!(names_in(&kept_in), ["file"]);
        assert_eq!(names_in(directory.path()), ["kept", "link"]);
        node.set(r#"{"user_id":"new","spp":1}"#).await.position();
    }
}

/// Answers one request with `answer`, whatever it asks.
fn serve_once(answer: &'static str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        let mut stream = listener.accept().unwrap().0;
        let mut request = [0; 4096];
        let _ = stream.read(&mut request).unwrap();
        stream.write_all(answer.as_bytes()).unwrap();
    });
    url
}

#[tokio::test]
async fn what_is_no_backup_is_not_kept_and_what_was_there_stays() {
    let node = Node::start().await;
    let free = TcpListener::bind("127.0.0.1:0").unwrap();
    let nobody = format!("http://{}", free.local_addr().unwrap());
    drop(free);
    let html = "HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: 32\r\n\r\n\
                <!doctype html><p>Welcome!</p>\r\n";
    let empty = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
    let own = format!("http://{}", node.write);
    let ops = format!("http://{}", node.ops);
    for (from, password, words) in [
        (own.clone(), "wrong", &["401", "user name and password"][..]),
        (nobody, PASSWORD, &["refused", "no file was written"]),
        (
            serve_once(html),
            PASSWORD,
            &["not a gzip", "no file was written"],
        ),
        (
            serve_once(empty),
            PASSWORD,
            &["cut off at byte 0", "no file was written"],
        ),
        (ops, PASSWORD, &["404", "no such path"]),
        (own, "", &["GRADESTORE_PASSWORD", "empty"]),
    ] {
        let directory = tempdir().unwrap();
        let path = directory.path().join("grades.csv.gz");
        for before in [None, Some("an older one")] {
            if let Some(before) = before {
                fs::write(&path, before).unwrap();
            }
            if before.is_some() && words[1] == "no file was written" && words[0] != "refused" {
                // Its server answers once.
                continue;
            }
            let mut command = backup_command(&from, &path);
            let output = run(command.env("GRADESTORE_PASSWORD", password));
            assert_eq!(output.status.code(), Some(1), "{output:?}");
            assert!(output.stdout.is_empty(), "{output:?}");
            let said = String::from_utf8(output.stderr).unwrap();
            for word in words {
                assert!(said.contains(word), "{word:?} is not in {said}");
            }
            assert!(!said.contains("panicked"), "{said}");
            assert_eq!(fs::read_to_string(&path).ok().as_deref(), before);
            let left = if before.is_some() { 1 } else { 0 };
            assert_eq!(names_in(directory.path()).len(), left);
        }
    }
}

#[tokio::test]
async fn a_backup_that_cannot_be_written_says_where() {
    let node = Node::start().await;
    let url = format!("http://{}", node.write);
    let output = run(&mut backup_command(
        &url,
        Path::new("/nowhere/grades.csv.gz"),
    ));
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("/nowhere/grades.csv.gz"), "{said}");

    // Who reads the pipe has gone.
    let mut command = backup_command(&url, Path::new("-"));
    let command = command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert_eq!(ask_backup(&node).await.status(), 200);
}

#[tokio::test]
async fn who_reads_it_at_once_may_have_it_without_compression() {
    let directory = tempdir().unwrap();
    let seed = write_file_of(directory.path(), &store_of(5_000, 1_000), 10);
    let node = Node::start_with(&mut program_from(&seed)).await;
    let small = backup_of(&node).await;
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
    assert_eq!(restored(&large).1.digest, restored(&small).1.digest);
}
