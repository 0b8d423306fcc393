//! Clients that stop reading a backup, and backups that end early: other requests are not affected,
//! and a partial backup is never accepted.

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use flate2::read::MultiGzDecoder;
use gradestore::backup::{BackupError, ReadProgress, read};
use gradestore::store::RecordBatch;
use parking_lot::Mutex;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::{TempDir, tempdir};

use crate::disk::backup::{backup_command, verify};
use crate::harness::backup_files::{
    backup_file, fetch_backup, file_names, make_pipe, program_restoring, random_store, read_backup,
    request_backup,
};
use crate::harness::wire::{RawConnection, TIMEOUT, eventually};
use crate::harness::{
    AUTHORIZATION, InProcessNode, Node, Ports, Process, collect_output, run, set_request,
    wrapped_by,
};

/// More than the socket buffers hold (3.5 MB).
const ROWS: u64 = 100_000;
static FILE: LazyLock<Vec<u8>> = LazyLock::new(|| backup_file(&random_store(ROWS, u64::MAX), 9));

/// A file to restore from, which exists as long as the directory.
fn seed() -> (TempDir, PathBuf) {
    let directory = tempdir().unwrap();
    let path = directory.path().join("seed.csv.gz");
    fs::write(&path, &*FILE).unwrap();
    (directory, path)
}

async fn large_node() -> Node {
    let (_directory, seed) = seed();
    Node::start_with(&mut program_restoring(&seed)).await
}

/// A client that reads only the header of a backup.
async fn unread_backup(node: &Ports) -> RawConnection {
    unread_backup_with_headers(node, "").await
}

/// The same with more request headers.
async fn unread_backup_with_headers(node: &Ports, lines: &str) -> RawConnection {
    let mut connection = RawConnection::connect(node.write).await;
    let request = format!(
        "GET /backup HTTP/1.1\r\nhost: localhost\r\nauthorization: {AUTHORIZATION}\r\n{lines}\r\n"
    );
    connection.send(request).await;
    assert_eq!(connection.response().await.status, 200);
    connection
}

/// The content of a chunked body, and whether it is complete.
fn decode_chunked(mut body: &[u8]) -> (Vec<u8>, bool) {
    let mut content = Vec::new();
    while let Some(line) = body.windows(2).position(|at| at == b"\r\n") {
        let length = std::str::from_utf8(&body[..line]).unwrap();
        let length = usize::from_str_radix(length, 16).unwrap();
        if length == 0 {
            return (content, true);
        }
        let chunk = &body[line + 2..];
        content.extend_from_slice(&chunk[..length.min(chunk.len())]);
        body = chunk.get(length + 2..).unwrap_or_default();
    }
    (content, false)
}

/// Reads to the end of the connection; the backup must be incomplete.
async fn assert_truncated(connection: &mut RawConnection) {
    let (content, ended) = decode_chunked(&connection.read_to_end().await);
    assert!(
        !ended && content.len() < FILE.len(),
        "the backup is complete"
    );
    let refused = read(&*content, &RecordBatch::digest, &ReadProgress::default()).unwrap_err();
    let cut = matches!(refused, BackupError::Truncated { .. });
    assert!(cut, "{refused}");
    let directory = tempdir().unwrap();
    let path = directory.path().join("got.csv.gz");
    fs::write(&path, content).unwrap();
    let output = verify(&path);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
}

/// A write and a read that must succeed.
async fn write_and_read(node: &Ports, value: u64) {
    let patch = format!(r#"{{"user_id":"user 1","spp":{value}}}"#);
    node.set(patch).await.position();
    assert_eq!(node.get("user 1").await.json()["spp"], value);
}

#[tokio::test]
async fn two_unread_backups_delay_only_further_backups() {
    let node = large_node().await;
    let first = unread_backup(&node).await;
    let second = unread_backup(&node).await;
    for value in 0..3 {
        let response = crate::harness::wire::Response::of(request_backup(&node).await).await;
        let detail = response.expect_problem(503, "backups-running");
        assert!(detail.contains("again"), "{detail}");
        write_and_read(&node, value).await;
    }
    drop(first);
    let whole = eventually("a free place", async || {
        let response = request_backup(&node).await;
        (response.status() == 200).then_some(response)
    })
    .await;
    // The other client still has its place, so this is the last one.
    assert_eq!(request_backup(&node).await.status(), 503);
    let file = whole.bytes().await.unwrap();
    assert_eq!(read_backup(&file).1.rows, ROWS);
    drop(second);
    let places = async || {
        let (one, two) = (request_backup(&node).await, request_backup(&node).await);
        (one.status() == 200 && two.status() == 200).then_some(())
    };
    eventually("both places", places).await;
}

#[tokio::test]
async fn a_client_that_stops_reading_is_disconnected_and_writes_continue() {
    let (_directory, seed) = seed();
    let node = InProcessNode::start(|config| {
        config.http.data.idle_max = Duration::from_secs(2);
        config.http.backups_max = 1;
        config.http.backup_wait_max = Duration::from_millis(10);
        config.restore_from = Some(seed);
    })
    .await;
    let mut stalled = unread_backup(&node).await;
    let (mut value, mut refused) = (0, 0);
    let response = eventually("a free place", async || {
        value += 1;
        write_and_read(&node, value).await;
        let response = request_backup(&node).await;
        refused += usize::from(response.status() == 503);
        (response.status() == 200).then_some(response)
    })
    .await;
    assert!(refused > 0);
    assert_eq!(read_backup(&response.bytes().await.unwrap()).1.rows, ROWS);
    let cut = "gradestore_http_connections_cut_total{port=\"write\"}";
    assert_eq!(node.metric(cut).await, Some(1.0));
    assert_truncated(&mut stalled).await;
}

/// Reads a body at 1 MB/s.
async fn read_slowly(connection: &mut RawConnection) -> Vec<u8> {
    let mut pace = tokio::time::interval(Duration::from_millis(32));
    let mut body = Vec::new();
    while connection.read_some(32 * 1024, &mut body).await > 0 {
        pace.tick().await;
    }
    body
}

#[tokio::test]
async fn a_slow_client_gets_compression_despite_if_slow() {
    let node = large_node().await;
    let if_slow = "grade-compression: if-slow\r\nconnection: close\r\n";
    let mut slow = unread_backup_with_headers(&node, if_slow).await;
    let (content, ended) = decode_chunked(&read_slowly(&mut slow).await);
    assert!(ended);
    assert_eq!(read_backup(&content).1.rows, ROWS);
    let mut text = Vec::new();
    MultiGzDecoder::new(&*content)
        .read_to_end(&mut text)
        .unwrap();
    let (sent, without) = (content.len(), text.len());
    assert!(sent < without * 3 / 4, "{sent} {without}");
}

#[tokio::test]
async fn a_slow_client_gets_the_whole_backup() {
    let (_directory, seed) = seed();
    let node = InProcessNode::start(|config| {
        // Much longer than one read at this speed, and much shorter than the whole backup.
        config.http.data.idle_max = Duration::from_secs(1);
        config.restore_from = Some(seed);
    })
    .await;
    let mut slow = unread_backup(&node).await;
    let started_at = Instant::now();
    let body = read_slowly(&mut slow).await;
    let took = started_at.elapsed();
    assert!(took > Duration::from_millis(2500), "{took:?} shows nothing");
    let (content, ended) = decode_chunked(&body);
    assert!(ended);
    assert_eq!(read_backup(&content).1.rows, ROWS);
}

#[tokio::test]
async fn new_connections_at_the_limit_do_not_evict_a_backup() {
    const CUT: &str = "gradestore_http_connections_cut_total{port=\"write\"}";
    let (_directory, seed) = seed();
    let node = InProcessNode::start(|config| {
        config.http.data.connections_max = 4;
        config.restore_from = Some(seed);
    })
    .await;
    let mut backup = unread_backup(&node).await;
    let mut crowd = Vec::new();
    for new in 0..20 {
        let mut connection = RawConnection::connect(node.write).await;
        let patch = format!(r#"{{"user_id":"user {new}","spp":1}}"#);
        let response = connection.request(set_request(&patch)).await;
        response.position();
        crowd.push(connection);
    }
    // Three of them keep their place beside the backup, which has been idle longest.
    assert_eq!(node.metric(CUT).await, Some(17.0));
    // Otherwise the connection would be kept for another request.
    backup.shutdown_write().await;
    let (content, ended) = decode_chunked(&backup.read_to_end().await);
    assert!(ended, "cut after {} bytes", content.len());
    assert_eq!(read_backup(&content).1.rows, ROWS);
}

#[tokio::test]
async fn a_backup_cut_off_by_a_kill_is_rejected() {
    let node = large_node().await;
    let mut stalled = unread_backup(&node).await;
    node.kill();
    assert_truncated(&mut stalled).await;
}

#[tokio::test]
async fn a_backup_cut_off_by_a_shutdown_is_rejected() {
    let mut node = large_node().await;
    let mut stalled = unread_backup(&node).await;
    node.signal(Signal::TERM);
    // The node waits for the client until its shutdown deadline.
    assert_eq!(node.wait_for_exit().await.code(), Some(0));
    assert_truncated(&mut stalled).await;
}

#[tokio::test]
async fn a_running_backup_is_finished_before_shutdown() {
    let mut node = large_node().await;
    let mut slow = unread_backup(&node).await;
    node.signal(Signal::TERM);
    eventually("unready", async || {
        (node.ops("/readyz").await.status == 503).then_some(())
    })
    .await;
    let (content, ended) = decode_chunked(&slow.read_to_end().await);
    assert!(ended);
    assert_eq!(read_backup(&content).1.rows, ROWS);
    assert_eq!(node.wait_for_exit().await.code(), Some(0));
}

/// Forwards one connection to a node and pauses the response after some bytes.
struct HoldingProxy {
    url: String,
    holding: Receiver<()>,
    resume: Sender<()>,
}

impl HoldingProxy {
    fn new(node: SocketAddr, bytes: usize) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (held, holding) = channel();
        let (resume, resumed) = channel();
        std::thread::spawn(move || {
            let mut client = listener.accept().unwrap().0;
            let mut server = TcpStream::connect(node).unwrap();
            let mut request = [0; 4096];
            let length = client.read(&mut request).unwrap();
            server.write_all(&request[..length]).unwrap();
            let mut response = vec![0; bytes];
            server.read_exact(&mut response).unwrap();
            client.write_all(&response).unwrap();
            held.send(()).unwrap();
            resumed.recv_timeout(TIMEOUT).unwrap();
            // It may end with a reset.
            let _ = std::io::copy(&mut server, &mut client);
            let _ = client.shutdown(Shutdown::Both);
        });
        Self {
            url,
            holding,
            resume,
        }
    }
}

#[tokio::test]
async fn the_backup_command_keeps_nothing_of_an_incomplete_backup() {
    for (what, before) in [("file", None), ("file", Some("an older one")), ("-", None)] {
        let node = large_node().await;
        let proxy = HoldingProxy::new(node.write, 200_000);
        let directory = tempdir().unwrap();
        let path = directory.path().join("grades.csv.gz");
        if let Some(before) = before {
            fs::write(&path, before).unwrap();
        }
        let output = if what == "-" {
            PathBuf::from("-")
        } else {
            path.clone()
        };
        let mut command = backup_command(&proxy.url, &output);
        let fetching = tokio::task::spawn_blocking(move || run(&mut command));
        proxy.holding.recv_timeout(TIMEOUT).unwrap();
        node.kill();
        proxy.resume.send(()).unwrap();
        let output = fetching.await.unwrap();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let printed = String::from_utf8(output.stderr).unwrap();
        assert!(
            printed.contains(&proxy.url) && !printed.contains("panicked"),
            "{printed}"
        );
        assert_eq!(fs::read_to_string(&path).ok().as_deref(), before);
        let left = usize::from(before.is_some());
        assert_eq!(file_names(directory.path()).len(), left);
        // stdout has a part of it, which is rejected.
        let got = read(
            &*output.stdout,
            &RecordBatch::digest,
            &ReadProgress::default(),
        );
        assert!(got.is_err());
    }
}

/// A `gradestore backup` that has written a part of its file.
struct HeldBackup {
    process: Process,
    printed: Arc<Mutex<String>>,
    proxy: HoldingProxy,
    directory: TempDir,
    path: PathBuf,
}

impl HeldBackup {
    /// Starts `wrapper` with the command as its last arguments. `before` is the content of the file
    /// that the backup replaces.
    async fn start(node: &Ports, wrapper: &[&str], before: Option<&str>) -> Self {
        let proxy = HoldingProxy::new(node.write, 200_000);
        let directory = tempdir().unwrap();
        let path = directory.path().join("grades.csv.gz");
        if let Some(before) = before {
            fs::write(&path, before).unwrap();
        }
        let mut command = backup_command(&proxy.url, &path);
        if !wrapper.is_empty() {
            command = wrapped_by(wrapper, &command);
        }
        let command = command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = Process(command.spawn().unwrap());
        let printed = collect_output(process.0.stderr.take().unwrap());
        proxy.holding.recv_timeout(TIMEOUT).unwrap();
        let partial = |name: &String| name.ends_with(".partial");
        eventually("partial progress", async || {
            let names = file_names(directory.path());
            names.iter().any(partial).then_some(())
        })
        .await;
        Self {
            process,
            printed,
            proxy,
            directory,
            path,
        }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.process.0), signal).unwrap();
    }

    async fn exit_code(&mut self) -> Option<i32> {
        let ended = async || self.process.0.try_wait().unwrap();
        eventually("the exit of the process", ended).await.code()
    }

    async fn assert_last_line(&self, line: &str) {
        eventually("the last line", async || {
            self.printed.lock().contains(line).then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn the_backup_command_keeps_nothing_when_interrupted() {
    let node = large_node().await;
    for signal in [
        Signal::INT,
        Signal::TERM,
        Signal::HUP,
        Signal::QUIT,
        Signal::USR1,
        Signal::USR2,
        Signal::ALARM,
        Signal::ABORT,
        Signal::TRAP,
        Signal::SYS,
        Signal::STKFLT,
        Signal::XCPU,
        Signal::VTALARM,
        Signal::PROF,
        Signal::IO,
        Signal::POWER,
    ] {
        let before = (signal == Signal::TERM).then_some("an older one");
        let mut held = HeldBackup::start(&node, &[], before).await;
        held.signal(signal);
        assert_eq!(held.exit_code().await, Some(1), "{signal:?}");
        held.assert_last_line("interrupted; no file was written")
            .await;
        assert_eq!(fs::read_to_string(&held.path).ok().as_deref(), before);
        let left = usize::from(before.is_some());
        assert_eq!(file_names(held.directory.path()).len(), left, "{signal:?}");
        held.proxy.resume.send(()).unwrap();
    }
}

#[tokio::test]
async fn the_backup_command_goes_on_after_a_signal_that_was_ignored_at_its_start() {
    let node = large_node().await;
    let nohup = ["sh", "-c", "trap '' HUP; exec \"$0\" \"$@\""];
    let mut held = HeldBackup::start(&node, &nohup, None).await;
    held.signal(Signal::HUP);
    held.proxy.resume.send(()).unwrap();
    assert_eq!(held.exit_code().await, Some(0), "{}", held.printed.lock());
    assert_eq!(read_backup(&fs::read(&held.path).unwrap()).1.rows, ROWS);
}

#[tokio::test]
async fn the_backup_command_keeps_nothing_beyond_the_limit_on_file_sizes() {
    let node = large_node().await;
    let directory = tempdir().unwrap();
    let path = directory.path().join("grades.csv.gz");
    let command = backup_command(&format!("http://{}", node.write), &path);
    let output = run(&mut wrapped_by(&["prlimit", "--fsize=100000"], &command));
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let printed = String::from_utf8(output.stderr).unwrap();
    let expected = format!("cannot write {}: File too large", path.display());
    assert!(printed.contains(&expected), "{printed}");
    assert_eq!(file_names(directory.path()), [""; 0]);
}

#[tokio::test]
async fn the_backup_command_can_be_interrupted_while_it_waits_for_a_pipe() {
    let node = large_node().await;
    let directory = tempdir().unwrap();
    let pipe = directory.path().join("pipe");
    make_pipe(&pipe);
    let mut command = backup_command(&format!("http://{}", node.write), &pipe);
    let command = command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut fetching = Process(command.spawn().unwrap());
    node.metric_reaches("gradestore_backups_running", 1.0).await;
    kill_process(Pid::from_child(&fetching.0), Signal::INT).unwrap();
    let ended = async || fetching.0.try_wait().unwrap();
    assert_eq!(
        eventually("the exit of the process", ended).await.code(),
        Some(1)
    );
    assert_eq!(file_names(directory.path()), ["pipe"]);
}

#[tokio::test]
async fn two_concurrent_backups_are_both_complete() {
    let node = large_node().await;
    let (one, other) = tokio::join!(fetch_backup(&node), fetch_backup(&node));
    let (one, other) = (read_backup(&one).1, read_backup(&other).1);
    assert_eq!((one.rows, other.rows), (ROWS, ROWS));
    assert_eq!(one.digest, other.digest);
}
