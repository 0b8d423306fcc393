//! The curl commands that a node prints with a generated password.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use tempfile::tempdir;

use crate::harness::backup_files::program_with_data_dir;
use crate::harness::wire::eventually;
use crate::harness::{ANY_PORTS, Node, program, run};

/// The node's output once it has two curl lines.
async fn printed_commands(node: &Node) -> String {
    eventually("two curl lines", async || {
        let printed = node.stdout.lock().clone();
        (printed.matches("curl").count() == 2).then_some(printed)
    })
    .await
}

/// Runs the curl lines; they write and read a grade.
async fn run_commands(node: &Node, printed: &str) {
    let lines = &printed[printed.find("  curl").unwrap()..];
    let mut shell = Command::new("sh");
    let sent = run(shell.args(["-e", "-c", lines]).env("NO_PROXY", "*"));
    assert!(sent.status.success(), "{sent:?}");
    let got = String::from_utf8(sent.stdout).unwrap();
    assert_eq!(got, node.get("alice").await.body);
    assert_eq!(node.get("alice").await.json()["spp"], 5);
}

#[tokio::test]
async fn the_printed_curl_commands_with_a_generated_password_work() {
    // A name that needs quotes in a shell.
    let name = "o'neill $HOME";
    let node = Node::start_with(program().args(ANY_PORTS).args(["--username", name])).await;
    let printed = printed_commands(&node).await;
    run_commands(&node, &printed).await;

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

#[tokio::test]
async fn a_generated_password_is_kept_in_the_data_directory() {
    let directory = tempdir().unwrap();
    // Names that need quotes in a shell.
    let dir = directory.path().join("o'neill $HOME");
    let file = dir.join("password");
    let without_password = || {
        let mut command = program_with_data_dir(&dir);
        command.env_remove("GRADESTORE_PASSWORD");
        command.args(["--username", "o'neill $HOME"]);
        command
    };
    let mut passwords = Vec::new();
    for _ in 0..2 {
        let node = Node::start_with(&mut without_password()).await;
        let printed = printed_commands(&node).await;
        run_commands(&node, &printed).await;
        let password = fs::read_to_string(&file).unwrap();
        assert!(password.trim().len() >= 20, "{password}");
        let mode = fs::metadata(&file).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let logged = node.stderr.lock().clone();
        // A service manager keeps both.
        for output in [&printed, &logged] {
            assert!(!output.contains(password.trim()), "{output}");
            assert!(output.contains(file.to_str().unwrap()), "{output}");
            assert!(
                output.contains(&format!("http://{}/", node.ops)),
                "{output}"
            );
        }
        assert!(logged.contains(&format!("data_dir={:?}", dir)), "{logged}");
        passwords.push(password);
        node.stop().await;
    }
    assert_eq!(passwords[0], passwords[1]);
    // A given password takes precedence.
    let node = Node::start_with(&mut program_with_data_dir(&dir)).await;
    assert!(node.stdout.lock().is_empty());
    drop(node);
    fs::write(&file, "").unwrap();
    let output = run(&mut without_password());
    let printed = String::from_utf8(output.stderr).unwrap();
    assert!(printed.contains("password is empty"), "{printed}");
}
