//! Clients that stop reading a backup, and backups that end too soon: neither harms the others, and
//! what was got never passes for a whole.

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::LazyLock;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use flate2::read::MultiGzDecoder;
use gradestore::backup::{BackupError, Progress, read};
use gradestore::store::Piece;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::{TempDir, tempdir};

use crate::backup::{backup_command, verify};
use crate::disk::{
    ask_backup, backup_of, file_of, make_pipe, names_in, program_from, restored, store_of,
};
use crate::harness::{AUTHORIZATION, Local, Node, Ports, Process, collected, run, set_request_of};
use crate::wire::{PATIENCE, Raw, eventually};

/// More than the kernel holds for a client that does not read: 3.5 MB.
const ROWS: u64 = 100_000;
static FILE: LazyLock<Vec<u8>> = LazyLock::new(|| file_of(&store_of(ROWS, u64::MAX), 9));

/// A file to begin from, for as long as the directory is held.
fn seed() -> (TempDir, PathBuf) {
    let directory = tempdir().unwrap();
    let path = directory.path().join("seed.csv.gz");
    fs::write(&path, &*FILE).unwrap();
    (directory, path)
}

async fn large_node() -> Node {
    let (_directory, seed) = seed();
    Node::start_with(&mut program_from(&seed)).await
}

/// A client that takes the head of a backup and nothing more.
async fn stalled_backup(node: &Ports) -> Raw {
    stalled_backup_with(node, "").await
}

/// One that sends these header lines too.
async fn stalled_backup_with(node: &Ports, lines: &str) -> Raw {
    let mut connection = Raw::connect(node.write).await;
    let request =
        format!("GET /backup HTTP/1.1\r\nhost: x\r\nauthorization: {AUTHORIZATION}\r\n{lines}\r\n");
    connection.send(request).await;
    assert_eq!(connection.answer().await.status, 200);
    connection
}

/// What a chunked body holds, and whether it came to its end.
fn unchunked(mut body: &[u8]) -> (Vec<u8>, bool) {
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

/// Reads on to the connection's end, which must come too soon.
async fn assert_broken_off(connection: &mut Raw) {
    let (content, ended) = unchunked(&connection.rest().await);
    assert!(!ended && content.len() < FILE.len(), "it looks like an end");
    let refused = read(&*content, &Piece::digest, &Progress::default()).unwrap_err();
    let cut = matches!(refused, BackupError::Truncated { .. });
    assert!(cut, "{refused}");
    let directory = tempdir().unwrap();
    let path = directory.path().join("got.csv.gz");
    fs::write(&path, content).unwrap();
    let output = verify(&path);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
}

/// A write and a read, as they should be.
async fn write_and_read(node: &Ports, value: u64) {
    let patch = format!(r#"{{"user_id":"user 1","spp":{value}}}"#);
    node.set(patch).await.position();
    assert_eq!(node.get("user 1").await.json()["spp"], value);
}

#[tokio::test]
async fn two_clients_that_do_not_read_make_a_third_wait_and_nobody_else() {
    let node = large_node().await;
    let first = stalled_backup(&node).await;
    let second = stalled_backup(&node).await;
    for value in 0..3 {
        let answer = crate::wire::Answer::of(ask_backup(&node).await).await;
        let detail = answer.problem(503, "backups-running");
        assert!(detail.contains("again"), "{detail}");
        write_and_read(&node, value).await;
    }
    drop(first);
    let whole = eventually("a free place", async || {
        let response = ask_backup(&node).await;
        (response.status() == 200).then_some(response)
    })
    .await;
    // The other one still has its place: this is the last.
    assert_eq!(ask_backup(&node).await.status(), 503);
    let file = whole.bytes().await.unwrap();
    assert_eq!(restored(&file).1.rows, ROWS);
    drop(second);
    let places = async || {
        let (one, two) = (ask_backup(&node).await, ask_backup(&node).await);
        (one.status() == 200 && two.status() == 200).then_some(())
    };
    eventually("both places", places).await;
}

#[tokio::test]
async fn a_client_that_stops_reading_is_cut_and_writes_go_on_meanwhile() {
    let (_directory, seed) = seed();
    let node = Local::start(|config| {
        config.http.data.idle_max = Duration::from_secs(2);
        config.http.backups_max = 1;
        config.http.backup_wait_max = Duration::from_millis(10);
        config.restore_from = Some(seed);
    })
    .await;
    let mut stalled = stalled_backup(&node).await;
    let (mut value, mut refused) = (0, 0);
    let response = eventually("the place back", async || {
        value += 1;
        write_and_read(&node, value).await;
        let response = ask_backup(&node).await;
        refused += usize::from(response.status() == 503);
        (response.status() == 200).then_some(response)
    })
    .await;
    assert!(refused > 0);
    assert_eq!(restored(&response.bytes().await.unwrap()).1.rows, ROWS);
    let cut = "gradestore_http_connections_cut_total{port=\"write\"}";
    assert_eq!(node.metric(cut).await, Some(1.0));
    assert_broken_off(&mut stalled).await;
}

/// A body, at a MB a second.
async fn slowly(connection: &mut Raw) -> Vec<u8> {
    let mut pace = tokio::time::interval(Duration::from_millis(32));
    let mut body = Vec::new();
    while connection.some(32 * 1024, &mut body).await > 0 {
        pace.tick().await;
    }
    body
}

#[tokio::test]
async fn a_slow_client_that_would_do_without_compression_gets_it_compressed() {
    let node = large_node().await;
    let if_slow = "grade-compression: if-slow\r\nconnection: close\r\n";
    let mut slow = stalled_backup_with(&node, if_slow).await;
    let (content, ended) = unchunked(&slowly(&mut slow).await);
    assert!(ended);
    assert_eq!(restored(&content).1.rows, ROWS);
    let mut text = Vec::new();
    MultiGzDecoder::new(&*content)
        .read_to_end(&mut text)
        .unwrap();
    let (sent, without) = (content.len(), text.len());
    assert!(sent < without * 3 / 4, "{sent} {without}");
}

#[tokio::test]
async fn a_client_that_reads_slowly_gets_it_all() {
    let (_directory, seed) = seed();
    let node = Local::start(|config| {
        // Many times what one part takes at this client's speed, and much less than the whole does.
        config.http.data.idle_max = Duration::from_secs(1);
        config.restore_from = Some(seed);
    })
    .await;
    let mut slow = stalled_backup(&node).await;
    let begun = Instant::now();
    let body = slowly(&mut slow).await;
    let took = begun.elapsed();
    assert!(took > Duration::from_millis(2500), "{took:?} shows nothing");
    let (content, ended) = unchunked(&body);
    assert!(ended);
    assert_eq!(restored(&content).1.rows, ROWS);
}

#[tokio::test]
async fn a_crowd_of_new_connections_does_not_cut_a_backup() {
    const CUT: &str = "gradestore_http_connections_cut_total{port=\"write\"}";
    let (_directory, seed) = seed();
    let node = Local::start(|config| {
        config.http.data.connections_max = 4;
        config.restore_from = Some(seed);
    })
    .await;
    let mut backup = stalled_backup(&node).await;
    let mut crowd = Vec::new();
    for new in 0..20 {
        let mut connection = Raw::connect(node.write).await;
        let patch = format!(r#"{{"user_id":"user {new}","spp":1}}"#);
        let answer = connection.ask(set_request_of(&patch)).await;
        answer.position();
        crowd.push(connection);
    }
    // Three of them have places beside the backup, which has been idle longer than any.
    assert_eq!(node.metric(CUT).await, Some(17.0));
    // Or the connection would be kept for another request.
    backup.send_no_more().await;
    let (content, ended) = unchunked(&backup.rest().await);
    assert!(ended, "cut after {} bytes", content.len());
    assert_eq!(restored(&content).1.rows, ROWS);
}

#[tokio::test]
async fn a_backup_that_a_kill_breaks_off_is_no_backup() {
    let node = large_node().await;
    let mut stalled = stalled_backup(&node).await;
    node.kill();
    assert_broken_off(&mut stalled).await;
}

#[tokio::test]
async fn a_backup_that_a_stop_breaks_off_is_no_backup() {
    let mut node = large_node().await;
    let mut stalled = stalled_backup(&node).await;
    node.signal(Signal::TERM);
    // It waits for the client as long as it waits for anyone.
    assert_eq!(node.exit().await.code(), Some(0));
    assert_broken_off(&mut stalled).await;
}

#[tokio::test]
async fn a_backup_that_runs_is_finished_before_a_stop() {
    let mut node = large_node().await;
    let mut slow = stalled_backup(&node).await;
    node.signal(Signal::TERM);
    eventually("unready", async || {
        (node.ops("/readyz").await.status == 503).then_some(())
    })
    .await;
    let (content, ended) = unchunked(&slow.rest().await);
    assert!(ended);
    assert_eq!(restored(&content).1.rows, ROWS);
    assert_eq!(node.exit().await.code(), Some(0));
}

/// Passes one connection on to a node and lets a test hold what the node sends after some bytes.
struct Between {
    url: String,
    holding: Receiver<()>,
    go_on: Sender<()>,
}

impl Between {
    fn new(node: SocketAddr, bytes: usize) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (held, holding) = channel();
        let (go_on, going_on) = channel();
        std::thread::spawn(move || {
            let mut client = listener.accept().unwrap().0;
            let mut server = TcpStream::connect(node).unwrap();
            let mut request = [0; 4096];
            let length = client.read(&mut request).unwrap();
            server.write_all(&request[..length]).unwrap();
            let mut answer = vec![0; bytes];
            server.read_exact(&mut answer).unwrap();
            client.write_all(&answer).unwrap();
            held.send(()).unwrap();
            going_on.recv_timeout(PATIENCE).unwrap();
            let mut rest = Vec::new();
            // A reset is how it ends.
            let _ = server.read_to_end(&mut rest);
            let _ = client.write_all(&rest);
            let _ = client.shutdown(Shutdown::Both);
        });
        Self {
            url,
            holding,
            go_on,
        }
    }
}

#[tokio::test]
async fn the_command_keeps_nothing_of_a_backup_that_breaks_off() {
    for (what, before) in [("file", None), ("file", Some("an older one")), ("-", None)] {
        let node = large_node().await;
        let between = Between::new(node.write, 200_000);
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
        let mut command = backup_command(&between.url, &output);
        let fetching = tokio::task::spawn_blocking(move || run(&mut command));
        between.holding.recv_timeout(PATIENCE).unwrap();
        node.kill();
        between.go_on.send(()).unwrap();
        let output = fetching.await.unwrap();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(
            said.contains(&between.url) && !said.contains("panicked"),
            "{said}"
        );
        assert_eq!(fs::read_to_string(&path).ok().as_deref(), before);
        let left = usize::from(before.is_some());
        assert_eq!(names_in(directory.path()).len(), left);
        // A pipe has got what came, and that is refused.
        let got = read(&*output.stdout, &Piece::digest, &Progress::default());
        assert!(got.is_err());
    }
}

#[tokio::test]
async fn the_command_keeps_nothing_when_it_is_interrupted() {
    let node = large_node().await;
    for (before, signal) in [(None, Signal::INT), (Some("an older one"), Signal::TERM)] {
        let between = Between::new(node.write, 200_000);
        let directory = tempdir().unwrap();
        let path = directory.path().join("grades.csv.gz");
        if let Some(before) = before {
            fs::write(&path, before).unwrap();
        }
        let mut command = backup_command(&between.url, &path);
        let command = command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut fetching = Process(command.spawn().unwrap());
        let said = collected(fetching.0.stderr.take().unwrap());
        between.holding.recv_timeout(PATIENCE).unwrap();
        let partial = |name: &String| name.ends_with(".partial");
        eventually("some of it", async || {
            names_in(directory.path()).iter().any(partial).then_some(())
        })
        .await;
        kill_process(Pid::from_child(&fetching.0), signal).unwrap();
        let ended = async || fetching.0.try_wait().unwrap();
        assert_eq!(eventually("its end", ended).await.code(), Some(1));
        eventually("a last word", async || {
            let said = said.lock();
            said.contains("interrupted; no file was written")
                .then_some(())
        })
        .await;
        assert_eq!(fs::read_to_string(&path).ok().as_deref(), before);
        let left = usize::from(before.is_some());
        assert_eq!(names_in(directory.path()).len(), left);
        between.go_on.send(()).unwrap();
    }
}

#[tokio::test]
async fn the_command_can_be_interrupted_while_nobody_reads_its_pipe() {
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
    assert_eq!(eventually("its end", ended).await.code(), Some(1));
    assert_eq!(names_in(directory.path()), ["pipe"]);
}

#[tokio::test]
async fn two_backups_at_once_are_both_whole() {
    let node = large_node().await;
    let (one, other) = tokio::join!(backup_of(&node), backup_of(&node));
    let (one, other) = (restored(&one).1, restored(&other).1);
    assert_eq!((one.rows, other.rows), (ROWS, ROWS));
    assert_eq!(one.digest, other.digest);
}
