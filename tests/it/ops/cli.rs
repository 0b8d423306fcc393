//! The command line.

use std::net::TcpListener;
use std::process::{Command, Output, Stdio};

use crate::harness::backup_files::{file_names, program_with_data_dir};
use crate::harness::wire::eventually;
use crate::harness::{ANY_PORTS, Node, PASSWORD, Process, ReservedPort, program, run};

/// The stderr of a start that must fail.
#[track_caller]
fn failed_start(command: &mut Command) -> String {
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
fn assert_contains(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in: {text}");
    }
    assert!(!text.contains("panicked"), "{text}");
}

#[test]
fn an_invalid_flag_or_variable_is_named_with_its_value_and_the_fix() {
    for (flag, variable, example) in [
        ("--write-addr", "GRADESTORE_WRITE_ADDR", "127.0.0.1:8080"),
        ("--read-addr", "GRADESTORE_READ_ADDR", "127.0.0.1:8081"),
        ("--ops-addr", "GRADESTORE_OPS_ADDR", "127.0.0.1:8082"),
    ] {
        for value in ["nowhere", "8080", "127.0.0.1", "127.0.0.1:99999", "::1:80"] {
            let printed = failed_start(program().args([flag, value]));
            assert_contains(&printed, &[flag, value, example]);
            let printed = failed_start(program().env(variable, value));
            assert_contains(&printed, &[variable, value, example]);
        }
    }
    assert_contains(
        &failed_start(program().args(["--username", "a:b"])),
        &["--username", "a:b", "admin"],
    );
    assert_contains(
        &failed_start(program().args(["--username", ""])),
        &["--username", "empty"],
    );
    for value in ["0", "-1", "two", "1025"] {
        let printed = failed_start(program().arg(format!("--threads={value}")));
        assert_contains(&printed, &["--threads", value, "from 1 to 1024"]);
    }
    for (value, why) in [
        ("8G", "unit"),
        ("1MiB", "at least 16MiB"),
        ("0%", "1% to 100%"),
    ] {
        let printed = failed_start(program().arg(format!("--memory-max={value}")));
        assert_contains(
            &printed,
            &["--memory-max", value, why, "GRADESTORE_MEMORY_MAX"],
        );
    }
    assert_contains(
        &failed_start(program().arg("--wirte-addr=x")),
        &["--wirte-addr", "--write-addr"],
    );
    assert_contains(&failed_start(program().arg("serv")), &["serv", "serve"]);
    let printed = failed_start(program().env("GRADESTORE_USER_NAME", "x"));
    assert_contains(&printed, &["GRADESTORE_USER_NAME", "GRADESTORE_USERNAME"]);
}

#[test]
fn an_unknown_variable_stops_every_command() {
    let directory = tempfile::tempdir().unwrap();
    let output = directory.path().join("out");
    let to = output.to_str().unwrap();
    for args in [
        &["serve"][..],
        &["backup", "--from", "http://127.0.0.1:1", "-o", to],
        &["verify", to],
        &["health", "--ops-addr", "127.0.0.1:1"],
    ] {
        let printed = failed_start(program().args(args).env("GRADESTORE_X", "1"));
        let unknown = "unknown environment variable GRADESTORE_X;";
        assert_contains(&printed, &[unknown, "GRADESTORE_PASSWORD_FILE"]);
        // Before anything else is done.
        assert_eq!(printed.lines().count(), 1, "{args:?}: {printed}");
    }
    assert!(!output.exists());
}

#[tokio::test]
async fn ephemeral_is_a_boolean() {
    let directory = tempfile::tempdir().unwrap();
    for value in ["maybe", "2", " "] {
        let printed = failed_start(
            program_with_data_dir(directory.path()).env("GRADESTORE_EPHEMERAL", value),
        );
        let fix = "set GRADESTORE_EPHEMERAL to true or false";
        assert_contains(&printed, &[&format!("'{value}'"), fix]);
    }
    assert!(file_names(directory.path()).is_empty());
    for (value, kind) in [("No", "disk"), ("1", "memory")] {
        let mut command = program_with_data_dir(directory.path());
        let node = Node::start_with(command.env("GRADESTORE_EPHEMERAL", value)).await;
        let status = node.status().await;
        assert_eq!(status["log_kind"], kind, "{value:?}");
    }
}

/// The variables in the help of a command.
fn variables_of(command: &str) -> Vec<String> {
    let output = run(program().args([command, "--help"]));
    let help = String::from_utf8(output.stdout).unwrap();
    let names = help.split("[env: ").skip(1);
    names
        .map(|rest| rest.split(['=', ']']).next().unwrap().to_owned())
        .collect()
}

#[tokio::test]
async fn an_empty_variable_counts_as_unset() {
    let directory = tempfile::tempdir().unwrap();
    let mut command = program_with_data_dir(directory.path());
    let variables = variables_of("serve");
    assert!(variables.len() > 20, "{variables:?}");
    let of_others = ["RUST_LOG", "NOTIFY_SOCKET", "WATCHDOG_USEC", "NO_COLOR"];
    for name in variables.iter().map(String::as_str).chain(of_others) {
        command.env(name, "");
    }
    // An unknown one, too.
    command.env("GRADESTORE_UNKNOWN", "");
    let node = Node::start_with(&mut command).await;
    node.set(r#"{"user_id":"a","spp":1}"#).await.position();
    let status = node.status().await;
    assert_eq!(status["log_kind"], "disk");
    let logged = node.stderr.lock().clone();
    assert!(!logged.contains("WARN"), "{logged}");

    let mut command = program();
    for name in variables_of("backup").iter().map(String::as_str) {
        command.env(name, "");
    }
    let printed = failed_start(command.arg("backup"));
    assert_contains(&printed, &["required", "--from", "--output"]);
    let to = ["backup", "--from", "http://127.0.0.1:1", "--output", "x"];
    let mut command = program();
    let printed = failed_start(command.args(to).env("GRADESTORE_PASSWORD", ""));
    assert_contains(&printed, &["no password; set GRADESTORE_PASSWORD"]);
    let mut command = program();
    let in_cluster = command.env("GRADESTORE_NATS_URL", "127.0.0.1:1");
    let printed = failed_start(in_cluster.env("GRADESTORE_PASSWORD", ""));
    assert_contains(&printed, &["--nats-url needs a password"]);
}

#[tokio::test]
async fn variables_of_kubernetes_are_ignored_in_a_pod_only() {
    let port = "GRADESTORE_PORT";
    let printed = failed_start(program().env(port, "9000"));
    assert_contains(&printed, &[port, "GRADESTORE_WRITE_ADDR", "remove it"]);
    let mut in_pod = program();
    in_pod
        .args(ANY_PORTS)
        .env("GRADESTORE_PASSWORD", PASSWORD)
        .env("KUBERNETES_SERVICE_HOST", "10.96.0.1")
        .env(port, "tcp://10.96.0.7:8080")
        .env("GRADESTORE_READ_SERVICE_PORT_HTTP", "8081");
    Node::start_with(&mut in_pod).await;
}

#[test]
fn an_invalid_password_is_rejected_and_not_printed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("password");
    let file = path.to_str().unwrap();

    let missing = failed_start(program().args(["--password-file", file]));
    assert_contains(&missing, &["--password-file", file, "create the file"]);
    for content in ["", "\n", "\u{feff}\n", "secret\nsecond", "secret\0"] {
        std::fs::write(&path, content).unwrap();
        let printed = failed_start(program().args(["--password-file", file]));
        assert_contains(&printed, &[file, "at least one character"]);
        assert!(!printed.contains("secret"), "{printed}");
    }
    std::fs::write(&path, "secret").unwrap();
    let mut both = program();
    both.env("GRADESTORE_PASSWORD", "secret")
        .env("GRADESTORE_PASSWORD_FILE", file);
    let printed = failed_start(&mut both);
    assert_contains(
        &printed,
        &[
            "GRADESTORE_PASSWORD ",
            "GRADESTORE_PASSWORD_FILE",
            "remove one",
        ],
    );
    assert!(!printed.contains("secret"), "{printed}");
}

#[test]
fn the_error_for_an_invalid_nats_url_names_the_fix_and_prints_no_password() {
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
            let printed = failed_start(command);
            assert_contains(&printed, &["--nats-url", "GRADESTORE_NATS_URL", fix]);
            assert!(!printed.contains("SECRET"), "{printed}");
        }
    }
    let mut help = program();
    let help = help.args(["serve", "--help"]);
    let output = run(help.env("GRADESTORE_NATS_URL", "nats://u:SECRET@127.0.0.1"));
    let printed = String::from_utf8(output.stdout).unwrap();
    assert_contains(&printed, &["--nats-url", "GRADESTORE_NATS_URL"]);
    assert!(!printed.contains("SECRET"), "{printed}");
}

#[test]
fn each_address_must_be_free_and_unique() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let same = failed_start(program().args(["--write-addr", &address, "--ops-addr", &address]));
    assert_contains(
        &same,
        &["--write-addr", "--ops-addr", &address, "its own port"],
    );
    let printed = failed_start(
        program()
            .args(&ANY_PORTS[..2])
            .args(["--ops-addr", &address]),
    );
    assert_contains(&printed, &["--ops-addr", &address, "choose another"]);
}

#[tokio::test]
async fn a_flag_overrides_its_variable_and_a_file_may_hold_the_password() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("password");
    // As Windows' editors write it.
    std::fs::write(&path, format!("\u{feff}{PASSWORD}\r\n")).unwrap();
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
async fn the_password_is_not_printed_logged_or_served() {
    let mut command = program();
    command
        .args(ANY_PORTS)
        .env("GRADESTORE_PASSWORD", PASSWORD)
        .env("RUST_LOG", "trace");
    let mut node = Node::start_with(&mut command).await;
    node.set(r#"{"user_id":"a","spp":1}"#).await.position();
    node.set("{").await.expect_problem(400, "not-json");
    for path in ["/metrics", "/status", "/readyz", "/livez"] {
        let printed = node.ops(path).await.body;
        assert!(!printed.contains(PASSWORD), "{path}: {printed}");
    }
    node.signal(rustix::process::Signal::TERM);
    node.wait_for_exit().await;
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
async fn the_health_command_reports_readiness() {
    let node = Node::start().await;
    let address = node.ops.to_string();
    let health = |address: &str| run(program().args(["health", "--ops-addr", address]));
    let ready = health(&address);
    assert!(ready.status.success(), "{ready:?}");
    let by_variable = run(program().arg("health").env("GRADESTORE_OPS_ADDR", &address));
    assert!(by_variable.status.success(), "{by_variable:?}");

    drop(node);

    // A node that waits for NATS responds, but not that it is ready.
    let ops = ReservedPort::new();
    let address_of_starting = ops.address().to_string();
    let mut command = program();
    command
        .env("GRADESTORE_PASSWORD", PASSWORD)
        .args(["--nats-url", "127.0.0.1:1"])
        .args(["--write-addr=127.0.0.1:0", "--read-addr=127.0.0.1:0"])
        .args(["--ops-addr", &address_of_starting])
        .stderr(Stdio::null());
    let _starting = Process(command.spawn().unwrap());
    let starting = eventually("a response", async || {
        let starting = health(&address_of_starting);
        let printed = String::from_utf8_lossy(&starting.stderr);
        printed.contains("(starting)").then_some(starting)
    })
    .await;
    assert_eq!(starting.status.code(), Some(1));

    let nobody = health(&address);
    assert_eq!(nobody.status.code(), Some(1));
    let printed = String::from_utf8(nobody.stderr).unwrap();
    assert_contains(&printed, &[&address, "no response", "--ops-addr"]);
}

#[test]
fn help_and_version_are_printed() {
    let printed = |args: &[&str]| {
        let output = run(program().args(args));
        assert!(output.status.success(), "{args:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!(printed(&["--version"]), format!("gradestore {version}\n"));
    assert_contains(
        &printed(&["--help"]),
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
        assert_contains(&printed(&["serve", "--help"]), &flag);
    }
}

#[test]
fn replicas_need_a_password_and_stream_flags_need_nats() {
    let printed = |arguments: &[&str]| {
        let output = run(program().args(ANY_PORTS).args(arguments));
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    let alone = printed(&["--nats-url", "127.0.0.1:1"]);
    assert!(alone.contains("--nats-url needs a password"), "{alone}");
    for flag in [
        ["--stream", "X"],
        ["--replicas", "3"],
        ["--log-retention", "1h"],
    ] {
        let alone = printed(&flag);
        assert!(alone.contains("--nats-url"), "{alone}");
    }
    for flag in [
        ["--stream", "a.b"],
        ["--replicas", "6"],
        ["--log-retention", "1s"],
    ] {
        let wrong = printed(&flag);
        assert!(
            wrong.contains(flag[0]) && wrong.contains("GRADESTORE_"),
            "{wrong}"
        );
    }
}
