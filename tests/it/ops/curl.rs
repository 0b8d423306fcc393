//! The curl commands that a node prints with a generated password.

use std::process::Command;

use crate::harness::wire::eventually;
use crate::harness::{ANY_PORTS, Node, program, run};

#[tokio::test]
async fn the_printed_curl_commands_with_a_generated_password_work() {
    // A name that needs quotes in a shell.
    let name = "o'neill $HOME";
    let node = Node::start_with(program().args(ANY_PORTS).args(["--username", name])).await;
    let printed = eventually("two curl lines", async || {
        let printed = node.stdout.lock().clone();
        (printed.matches("curl").count() == 2).then_some(printed)
    })
    .await;
    let lines = &printed[printed.find("  curl").unwrap()..];
    let mut shell = Command::new("sh");
    let sent = run(shell.args(["-e", "-c", lines]).env("NO_PROXY", "*"));
    assert!(sent.status.success(), "{sent:?}");
    let got = String::from_utf8(sent.stdout).unwrap();
    assert_eq!(got, node.get("alice").await.body);
    assert_eq!(node.get("alice").await.json()["spp"], 5);

    let (_, password) = printed.split_once("$HOME:").unwrap();
    let password = password.split('\'').next().unwrap();
    assert!(password.len() >= 20, "{password}");
    assert!(!node.stderr.lock().contains(password));
    let other = Node::start_with(program().args(ANY_PORTS)).await;
    let printed = eventually("a password", async || {
        Some(other.stdout.lock().clone()).filter(|printed| printed.contains("admin:"))
    });
    assert!(!printed.await.contains(password), "the same password");
}
