//! The command line and the environment. Zero bytes separate the parts of the input. Each is an
//! argument, or a variable if it begins with `GRADESTORE_`.
//!
//! Nothing panics. An error names the key and the value, and says what to set instead. An accepted
//! configuration is usable: durations that the clock and the broker can represent, addresses, URLs.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, Instant};

use clap::error::{ContextKind, ContextValue, ErrorKind};
use gradestore::cli::{Command, ConfigError, ServeArgs, check_env_names, parse};
use reqwest::Url;

/// Arguments and variables.
pub(crate) struct Input {
    pub(crate) args: Vec<OsString>,
    pub(crate) variables: Vec<(OsString, OsString)>,
}

pub(crate) fn input(data: &[u8]) -> Input {
    let mut input = Input {
        args: vec!["gradestore".into()],
        variables: Vec::new(),
    };
    for piece in data.split(|byte| *byte == 0) {
        let equals = piece.iter().position(|byte| *byte == b'=');
        match equals.map(|at| (&piece[..at], &piece[at + 1..])) {
            Some((name, value)) if name.starts_with(b"GRADESTORE_") => {
                let (name, value) = (OsStr::from_bytes(name), OsStr::from_bytes(value));
                input.variables.push((name.into(), value.into()));
            }
            _ => input.args.push(OsStr::from_bytes(piece).into()),
        }
    }
    input
}

/// The caller must have set the variables.
pub(crate) fn check(input: Input) {
    let names = || {
        let names = input.variables.iter().map(|(name, _)| name);
        names.map(|name| name.to_string_lossy().into_owned())
    };
    if let Err(error) = check_env_names(names()) {
        assert!(
            matches!(&error, ConfigError::UnknownEnv { name, .. } if names().any(|any| any == *name))
        );
    }
    match parse(input.args) {
        Err(error) => rejected(&error),
        Ok(cli) => match cli.command {
            Command::Serve(args) => accepted(&args),
            Command::Backup(args) => node_url(&args.from),
            Command::Import(args) => node_url(&args.to),
            Command::Verify(_) | Command::Health(_) => {}
        },
    }
}

fn rejected(error: &clap::Error) {
    let message = error.to_string();
    let names = |kind| match error.get(kind) {
        // Escape sequences are not shown.
        Some(ContextValue::String(text)) => {
            text.contains(char::is_control) || message.contains(text)
        }
        _ => false,
    };
    match error.kind() {
        ErrorKind::ValueValidation => {
            assert!(
                names(ContextKind::InvalidArg) && names(ContextKind::InvalidValue),
                "{message}"
            );
            assert!(
                message.contains("set --") || message.contains("set GRADESTORE_"),
                "{message}"
            );
        }
        ErrorKind::InvalidValue | ErrorKind::UnknownArgument => {
            assert!(names(ContextKind::InvalidArg), "{message}");
        }
        ErrorKind::InvalidUtf8 => {
            let (_, wrong) = message.split_once("; change ").expect("what to do");
            assert!(wrong.contains('\u{fffd}'), "{message}");
        }
        _ => assert!(!message.is_empty()),
    }
}

fn accepted(args: &ServeArgs) {
    let times = [
        args.snapshot_interval,
        args.log_retention,
        args.checkpoint_interval,
    ];
    for time in times {
        assert!(time >= Duration::from_millis(100));
        assert!(i64::try_from(time.as_nanos()).is_ok());
        // A jittered interval is shorter than this.
        assert!(Instant::now().checked_add(time * 2).is_some());
    }
    args.peer
        .iter()
        .chain(&args.advertise_url)
        .for_each(|url| node_url(url));
    assert!((1..=5).contains(&args.replicas));
    let name = &args.credentials.username;
    assert!(!name.is_empty() && !name.contains(':'));
    if let Some(servers) = &args.nats_url {
        let (host, port) = servers.first().expect("at least one");
        assert!(!host.is_empty());
        assert!(servers.to_string().starts_with(&format!("{host}:{port}")));
    }
    let _ = args.storage();
    // Skip files that happen to exist on this machine.
    if args.credentials.password_file.is_some() {
        return;
    }
    match args.config() {
        Ok((config, _made)) => {
            let addresses = [config.write_addr, config.read_addr, config.ops_addr];
            let same = |one: usize, other: usize| {
                addresses[one] == addresses[other] && addresses[one].port() != 0
            };
            assert!(!same(0, 1) && !same(0, 2) && !same(1, 2));
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// Checks that `url` is usable as the URL of a node.
fn node_url(url: &str) {
    let backup = Url::parse(&format!("{url}/backup")).expect("a URL");
    assert_eq!(backup.scheme(), "http");
    assert!(backup.host_str().is_some_and(|host| !host.is_empty()));
    assert!(backup.path().ends_with("/backup") && backup.query().is_none());
    assert!(backup.username().is_empty() && backup.password().is_none());
}
