//! Signals that do not stop a node.

use std::fs;
use std::process::Stdio;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use tempfile::tempdir;

use crate::harness::wire::{RawConnection, eventually};
use crate::harness::{
    ANY_PORTS, Node, PASSWORD, Process, collect_output, get_request, program, set_request,
};

const PATCH: &str = r#"{"user_id":"a","spp":1}"#;

/// Waits until the node has logged `line` this many times.
async fn wait_for_log(node: &Node, line: &str, times: usize) {
    eventually(line, async || {
        (node.stderr.lock().matches(line).count() == times).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_signal_without_a_meaning_is_ignored_with_a_log_line() {
    let node = Node::start().await;
    for (signal, name) in [
        (Signal::USR1, "SIGUSR1"),
        (Signal::USR2, "SIGUSR2"),
        (Signal::ALARM, "SIGALRM"),
        (Signal::STKFLT, "SIGSTKFLT"),
        (Signal::XCPU, "SIGXCPU"),
        (Signal::VTALARM, "SIGVTALRM"),
        (Signal::PROF, "SIGPROF"),
        (Signal::IO, "SIGIO"),
        (Signal::POWER, "SIGPWR"),
    ] {
        for times in 1..=2 {
            node.signal(signal);
            let line = format!("signal ignored signal=\"{name}\"");
            wait_for_log(&node, &line, times).await;
        }
    }
    for n in 0..=30 {
        node.real_time_signal(n);
        let line = format!("signal ignored signal=\"SIGRTMIN+{n}\"");
        wait_for_log(&node, &line, 1).await;
    }
    // The system sends these for writes that fail with an error.
    node.signal(Signal::PIPE);
    node.signal(Signal::XFSZ);
    node.signal(Signal::HUP);
    wait_for_log(&node, "nothing to reload", 1).await;
    node.set(PATCH).await.position();
    node.stop().await;
}

#[tokio::test]
async fn a_node_that_waits_for_nats_ignores_signals_and_stops_on_sigquit() {
    let mut command = program();
    command
        .env("GRADESTORE_PASSWORD", PASSWORD)
        .args(["--nats-url", "127.0.0.1:1"])
        .args(ANY_PORTS)
        .stderr(Stdio::piped());
    let mut process = Process(command.spawn().unwrap());
    let logged = collect_output(process.0.stderr.take().unwrap());
    let pid = Pid::from_child(&process.0);
    let wait_for = async |line: &str| {
        eventually(line, async || logged.lock().contains(line).then_some(())).await;
    };
    wait_for("waiting for NATS").await;
    kill_process(pid, Signal::USR1).unwrap();
    wait_for("SIGUSR1").await;
    kill_process(pid, Signal::HUP).unwrap();
    wait_for("nothing to reload").await;
    kill_process(pid, Signal::QUIT).unwrap();
    let status = eventually("the exit of the process", async || {
        process.0.try_wait().unwrap()
    });
    assert_eq!(status.await.code(), Some(0));
}

/// The status of a write with this password, on the fast path and on the other one.
async fn statuses(node: &Node, password: &str) -> [u16; 2] {
    let request = |body: &str| {
        let request = node.client.post(format!("http://{}/set", node.write));
        let request = request.basic_auth("admin", Some(password));
        let request = request.header("content-type", "application/json");
        request.body(body.to_owned())
    };
    let backup = node.client.head(format!("http://{}/backup", node.write));
    let backup = backup.basic_auth("admin", Some(password));
    [
        request(PATCH).send().await.unwrap().status().as_u16(),
        backup.send().await.unwrap().status().as_u16(),
    ]
}

#[tokio::test]
async fn sighup_reads_the_password_file_again() {
    let directory = tempdir().unwrap();
    let file = directory.path().join("password");
    fs::write(&file, PASSWORD).unwrap();
    let mut command = program();
    command.args(ANY_PORTS).arg("--password-file").arg(&file);
    let node = Node::start_with(&mut command).await;
    assert_eq!(statuses(&node, PASSWORD).await, [204, 200]);
    let mut open = RawConnection::connect(node.write).await;
    open.send(set_request(PATCH)).await;
    assert_eq!(open.response().await.status, 204);

    fs::write(&file, "\u{feff}battery staple\r\n").unwrap();
    assert_eq!(statuses(&node, PASSWORD).await, [204, 200]);
    node.signal(Signal::HUP);
    wait_for_log(&node, "password reloaded file=", 1).await;
    assert_eq!(statuses(&node, "battery staple").await, [204, 200]);
    assert_eq!(statuses(&node, PASSWORD).await, [401, 401]);
    open.send(set_request(PATCH)).await;
    assert_eq!(open.response().await.status, 401);
    // Reads need no password.
    let mut read = RawConnection::connect(node.read).await;
    read.send(get_request("?user_id=a", "")).await;
    assert_eq!(read.response().await.json()["spp"], json!(1));

    node.signal(Signal::HUP);
    wait_for_log(&node, "password unchanged", 1).await;
    // A file that is not valid, is missing, or cannot be read leaves the password.
    fs::write(&file, "battery staple\nand more").unwrap();
    node.signal(Signal::HUP);
    wait_for_log(&node, "password not reloaded", 1).await;
    fs::remove_file(&file).unwrap();
    node.signal(Signal::HUP);
    wait_for_log(&node, "password not reloaded", 2).await;
    assert_eq!(statuses(&node, "battery staple").await, [204, 200]);
    let logged = node.stderr.lock().clone();
    for password in [PASSWORD, "battery"] {
        assert!(!logged.contains(password), "{logged}");
    }
    assert!(logged.contains("No such file"), "{logged}");
    node.stop().await;
}
