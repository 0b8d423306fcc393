//! Notifications to systemd.

use std::process::{Command, Stdio};

use tempfile::TempDir;
use tokio::net::UnixDatagram;

use crate::harness::wire::with_timeout;
use crate::harness::{ANY_PORTS, Node, PASSWORD, Process, program};

/// The socket on which systemd would listen.
pub(crate) struct NotifySocket {
    socket: UnixDatagram,
    dir: TempDir,
}

impl NotifySocket {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = UnixDatagram::bind(dir.path().join("notify")).unwrap();
        Self { socket, dir }
    }

    /// Sets NOTIFY_SOCKET for `command`.
    pub(crate) fn configure<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        command.env("NOTIFY_SOCKET", self.dir.path().join("notify"))
    }

    /// The lines of the next message.
    async fn next_message(&self) -> Vec<String> {
        let mut message = vec![0; 64 * 1024];
        let received = with_timeout("a message", self.socket.recv(&mut message));
        let length = received.await.unwrap();
        let message = std::str::from_utf8(&message[..length]).unwrap();
        message.lines().map(str::to_owned).collect()
    }

    /// All lines until one that `last` accepts.
    pub(crate) async fn messages_until(&self, last: impl Fn(&str) -> bool) -> Vec<String> {
        let mut messages = Vec::new();
        while !messages.iter().any(|line: &String| last(line)) {
            messages.extend(self.next_message().await);
        }
        messages
    }
}

#[tokio::test]
async fn the_start_timeout_is_extended_while_waiting_for_nats() {
    let notify_socket = NotifySocket::new();
    let mut command = program();
    command
        .env("GRADESTORE_PASSWORD", PASSWORD)
        .args(["--nats-url", "127.0.0.1:1"])
        .args(ANY_PORTS)
        .stderr(Stdio::null());
    let _process = Process(notify_socket.configure(&mut command).spawn().unwrap());
    for _ in 0..2 {
        let message = notify_socket.next_message().await;
        assert_eq!(message.len(), 2, "{message:?}");
        assert_eq!(message[0], "EXTEND_TIMEOUT_USEC=30000000");
        assert!(message[1].starts_with("STATUS=starting: "), "{message:?}");
    }
}

#[tokio::test]
async fn the_watchdog_is_notified() {
    let notify_socket = NotifySocket::new();
    let mut command = program();
    command
        .env("GRADESTORE_PASSWORD", PASSWORD)
        .env("WATCHDOG_USEC", "300000")
        .args(ANY_PORTS);
    let node = Node::start_with(notify_socket.configure(&mut command)).await;
    let messages = notify_socket.messages_until(|line| line == "READY=1").await;
    assert!(
        messages.iter().any(|line| line == "STATUS=ready"),
        "{messages:?}"
    );
    for _ in 0..3 {
        assert_eq!(notify_socket.next_message().await, ["WATCHDOG=1"]);
    }
    node.stop().await;
}
