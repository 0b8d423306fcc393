//! The command line, as a person or a container runs it.

use std::net::TcpListener;
use std::process::{Command, Output};

use crate::disk::{names_in, program_on};
use crate::harness::{ANY_PORTS, Node, PASSWORD, program, run};
use crate::wire::eventually;

/// What a run that must fail to start says.
#[track_caller]
fn refused(command: &mut Command) -> String {
    let Output {
        status,
        stdout,
        stderr,
    } = run(command);
    assert!(!status.success());
    assert!(stdout.is_empty());
    String::from_utf8(stderr).unwrap()
}

#[track_caller]
fn assert_names(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in: {text}");
    }
    assert!(!text.contains("panicked"), "{text}");
}

#[test]
fn a_wrong_flag_or_variable_is_named_with_its_value_and_the_fix() {
    for (flag, variable, example) in [
        ("--write-addr", "GRADESTORE_WRITE_ADDR", "127.0.0.1:8080"),
        ("--read-addr", "GRADESTORE_READ_ADDR", "127.0.0.1:8081"),
        ("--ops-addr", "GRADESTORE_OPS_ADDR", "127.0.0.1:8082"),
    ] {
        for value in ["nowhere", "8080", "127.0.0.1", "127.0.0.1:99999", "::1:80"] {
            let said = refused(program().args([flag, value]));
            assert_names(&said, &[flag, value, example]);
            let said = refused(program().env(variable, value));
            assert_names(&said, &[variable, value, example]);
        }
    }
    assert_names(
        &refused(program().args(["--username", "a:b"])),
        &["--username", "a:b", "admin"],
    );
    assert_names(
        &refused(program().args(["--username", ""])),
        &["--username", "empty"],
    );
    for value in ["0", "-1", "two", "1025"] {
        let said = refused(program().arg(format!("--threads={value}")));
        assert_names(&said, &["--threads", value, "from 1 to 1024"]);
    }
    for (value, why) in [
        ("8G", "unit"),
        ("1MiB", "at least 16MiB"),
        ("0%", "1% to 100%"),
    ] {
        let said = refused(program().arg(format!("--memory-max={value}")));
        assert_names(
            &said,
            &["--memory-max", value, why, "GRADESTORE_MEMORY_MAX"],
        );
    }
    assert_names(
        &refused(program().arg("--wirte-addr=x")),
        &["--wirte-addr", "--write-addr"],
    );
    assert_names(&refused(program().arg("serv")), &["serv", "serve"]);
    let said = refused(program().env("GRADESTORE_USER_NAME", "x"));
    assert_names(&said, &["GRADESTORE_USER_NAME", "GRADESTORE_USERNAME"]);
}

#[test]
fn a_misspelt_variable_stops_every_command() {
    let directory = tempfile::tempdir().unwrap();
    let output = directory.path().join("out");
    let to = output.to_str().unwrap();
    for args in [
        &["serve"][..],
        &["backup", "--from", "http://127.0.0.1:1", "-o", to],
        &["verify", to],
        &["health", "--ops-addr", "127.0.0.1:1"],
    ] {
        let said = refused(program().args(args).env("GRADESTORE_X", "1"));
        let unknown = "unknown environment variable GRADESTORE_X;";
        assert_names(&said, &[unknown, "GRADESTORE_PASSWORD_FILE"]);
        // Before anything is done.
        assert_eq!(said.lines().count(), 1, "{args:?}: {said}");
    }
    assert!(!output.exists());
}

#[tokio::test]
async fn ephemeral_is_yes_or_no_and_nothing_is_no() {
    let directory = tempfile::tempdir().unwrap();
    for value in ["maybe", "2", " "] {
        let said = refused(program_on(directory.path()).env("GRADESTORE_EPHEMERAL", value));
        let fix = "set GRADESTORE_EPHEMERAL to true or false";
        assert_names(&said, &[&format!("'{value}'"), fix]);
    }
    assert!(names_in(directory.path()).is_empty());
    for (value, kind) in [("", "disk"), ("No", "disk"), ("1", "memory")] {
        let mut command = program_on(directory.path());
        let node = Node::start_with(command.env("GRADESTORE_EPHEMERAL", value)).await;
        let status = node.ops("/status").await.json();
        assert_eq!(status["log_kind"], kind, "{value:?}");
    }
}

#[test]
fn a_password_that_cannot_be_one_is_refused_and_not_shown() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("password");
    let file = path.to_str().unwrap();

    let missing = refused(program().args(["--password-file", file]));
    assert_names(&missing, &["--password-file", file, "create the file"]);
    for content in ["", "\n", "secret\nsecond", "secret\0"] {
        std::fs::write(&path, content).unwrap();
        let said = refused(program().args(["--password-file", file]));
        assert_names(&said, &[file, "at least one character"]);
        assert!(!said.contains("secret"), "{said}");
    }
    let said = refused(program().env("GRADESTORE_PASSWORD", ""));
    assert_names(&said, &["GRADESTORE_PASSWORD", "empty"]);

    std::fs::write(&path, "secret").unwrap();
    let mut both = program();
    both.env("GRADESTORE_PASSWORD", "secret")
        .env("GRADESTORE_PASSWORD_FILE", file);
    let said = refused(&mut both);
    assert_names(
        &said,
        &[
            "GRADESTORE_PASSWORD ",
            "GRADESTORE_PASSWORD_FILE",
            "remove one",
        ],
    );
    assert!(!said.contains("secret"), "{said}");
}

#[test]
fn the_error_for_a_wrong_nats_url_names_the_fix_and_shows_no_password() {
    for (urls, fix) in [
        (
            "nats://127.0.0.1:4222,",
            "2 of 2 is empty: remove the extra comma",
        ),
        ("nats://u:SECRET/x@127.0.0.1", "write it as %2F"),
        ("nats://u:SECRET+x@127.0.0.1", "write it as %2B"),
        ("nats://u:SECRET%@127.0.0.1", "write % as %25"),
        ("nats://u:SECRET,x@127.0.0.1", "write a comma in it as %2C"),
        (
            "nats://127.0.0.1:4222/GRADES",
            "has a path after its host: remove it",
        ),
    ] {
        for command in [
            program().args(["--nats-url", urls]),
            program().env("GRADESTORE_NATS_URL", urls),
        ] {
            let said = refused(command);
            assert_names(&said, &["--nats-url", "GRADESTORE_NATS_URL", fix]);
            assert!(!said.contains("SECRET"), "{said}");
        }
    }
    let mut help = program();
    let help = help.args(["serve", "--help"]);
    let output = run(help.env("GRADESTORE_NATS_URL", "nats://u:SECRET@127.0.0.1"));
    let said = String::from_utf8(output.stdout).unwrap();
    assert_names(&said, &["--nats-url", "GRADESTORE_NATS_URL"]);
    assert!(!said.contains("SECRET"), "{said}");
}

#[test]
fn an_address_must_be_free_and_each_its_own() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let same = refused(program().args(["--write-addr", &address, "--ops-addr", &address]));
    assert_names(
        &same,
        &["--write-addr", "--ops-addr", &address, "its own port"],
    );
    let said = refused(
        program()
            .args(&ANY_PORTS[..2])
            .args(["--ops-addr", &address]),
    );
    assert_names(&said, &["--ops-addr", &address, "choose another"]);
}

#[tokio::test]
async fn a_flag_beats_its_variable_and_a_file_may_hold_the_password() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("password");
    std::fs::write(&path, format!("{PASSWORD}\r\n")).unwrap();
    let mut command = program();
    command
        .arg("serve")
        .args(ANY_PORTS)
        .args(["--username", "admin", "--password-file"])
        .arg(&path)
        .env("GRADESTORE_USERNAME", "nobody")
        .env("GRADESTORE_PASSWORD", "wrong")
        .env("GRADESTORE_READ_ADDR", "256.0.0.1:1");
    let node = Node::start_with(&mut command).await;
    node.set(r#"{"user_id":"a","spp":1}"#).await.position();
    assert!(node.stdout.lock().is_empty());
}

#[tokio::test]
async fn a_password_that_was_made_is_shown_in_lines_that_work() {
    // A name that a shell would read otherwise.
    let name = "o'neill $HOME";
    let node = Node::start_with(program().args(ANY_PORTS).args(["--username", name])).await;
    let said = eventually("two curl lines", async || {
        let said = node.stdout.lock().clone();
        (said.matches("curl").count() == 2).then_some(said)
    })
    .await;
    let lines = &said[said.find("  curl").unwrap()..];
    let mut shell = Command::new("sh");
    let sent = run(shell.args(["-e", "-c", lines]).env("NO_PROXY", "*"));
    assert!(sent.status.success(), "{sent:?}");
    let got = String::from_utf8(sent.stdout).unwrap();
    assert_eq!(got, node.get("alice").await.body);
    assert_eq!(node.get("alice").await.json()["spp"], 5);

    let (_, password) = said.split_once("$HOME:").unwrap();
    let password = password.split('\'').next().unwrap();
    assert!(password.len() >= 20, "{password}");
    assert!(!node.stderr.lock().contains(password));
    let other = Node::start_with(program().args(ANY_PORTS)).await;
    let said = eventually("a password", async || {
        Some(other.stdout.lock().clone()).filter(|said| said.contains("admin:"))
    });
    assert!(!said.await.contains(password), "made again");
}

#[tokio::test]
async fn the_password_is_said_nowhere() {
    let mut command = program();
    command
        .args(ANY_PORTS)
        .env("GRADESTORE_PASSWORD", PASSWORD)
        .env("RUST_LOG", "trace");
    let mut node = Node::start_with(&mut command).await;
    node.set(r#"{"user_id":"a","spp":1}"#).await.position();
    node.set("{").await.problem(400, "not-json");
    for path in ["/metrics", "/status", "/readyz", "/livez"] {
        let said = node.ops(path).await.body;
        assert!(!said.contains(PASSWORD), "{path}: {said}");
    }
    node.signal(rustix::process::Signal::TERM);
    node.exit().await;
    let encoded = crate::harness::AUTHORIZATION.trim_start_matches("Basic ");
    let logs = eventually("the last log line", async || {
        Some(node.stderr.lock().clone()).filter(|logs| logs.contains("shut down"))
    })
    .await;
    assert!(
        !logs.contains(PASSWORD) && !logs.contains(encoded),
        "{logs}"
    );
}

#[tokio::test]
async fn health_asks_whether_a_node_is_ready() {
    let node = Node::start().await;
    let address = node.ops.to_string();
    let health = |address: &str| run(program().args(["health", "--ops-addr", address]));
    let ready = health(&address);
    assert!(ready.status.success(), "{ready:?}");
    let by_variable = run(program().arg("health").env("GRADESTORE_OPS_ADDR", &address));
    assert!(by_variable.status.success(), "{by_variable:?}");

    // Its read port answers, but not that it is ready.
    let other = health(&node.read.to_string());
    assert_eq!(other.status.code(), Some(1));
    drop(node);
    let nobody = health(&address);
    assert_eq!(nobody.status.code(), Some(1));
    let said = String::from_utf8(nobody.stderr).unwrap();
    assert_names(&said, &[&address, "no response", "--ops-addr"]);
}

#[test]
fn help_and_version_are_printed() {
    let said = |args: &[&str]| {
        let output = run(program().args(args));
        assert!(output.status.success(), "{args:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!(said(&["--version"]), format!("gradestore {version}\n"));
    assert_names(
        &said(&["--help"]),
        &["serve", "health", "Without a command"],
    );
    let flags = [
        ["--write-addr", "GRADESTORE_WRITE_ADDR"],
        ["--read-addr", "GRADESTORE_READ_ADDR"],
        ["--ops-addr", "GRADESTORE_OPS_ADDR"],
        ["--username", "GRADESTORE_USERNAME"],
        ["--password-file", "GRADESTORE_PASSWORD_FILE"],
    ];
    for flag in flags {
        assert_names(&said(&["serve", "--help"]), &flag);
    }
}
