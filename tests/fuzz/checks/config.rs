//! The command line and the environment. The input is what stands between zero bytes: an argument each,
//! or a variable, if it begins as ours do.
//!
//! Nothing panics. A refusal names the key and the value, and says what to set instead. What is let
//! through can be worked with: times that a clock and the broker can count, addresses, URLs that a
//! backup can be under.

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

/// The variables are to be set.
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
        Err(error) => refused(&error),
        Ok(cli) => match cli.command {
            Command::Serve(args) => taken(&args),
            Command::Backup(args) => base(&args.from),
            Command::Import(args) => base(&args.to),
            Command::Verify(_) | Command::Health(_) => {}
        },
    }
}

fn refused(error: &clap::Error) {
    let said = error.to_string();
    let names = |kind| match error.get(kind) {
        // Escape sequences are not shown.
        Some(ContextValue::String(text)) => text.contains(char::is_control) || said.contains(text),
        _ => false,
    };
    match error.kind() {
        ErrorKind::ValueValidation => {
            assert!(
                names(ContextKind::InvalidArg) && names(ContextKind::InvalidValue),
                "{said}"
            );
            assert!(
                said.contains("set --") || said.contains("set GRADESTORE_"),
                "{said}"
            );
        }
        ErrorKind::InvalidValue | ErrorKind::UnknownArgument => {
            assert!(names(ContextKind::InvalidArg), "{said}");
        }
        ErrorKind::InvalidUtf8 => {
            let (_, wrong) = said.split_once("; change ").expect("what to do");
            assert!(wrong.contains('\u{fffd}'), "{said}");
        }
        _ => assert!(!said.is_empty()),
    }
}

fn taken(args: &ServeArgs) {
    let times = [
        args.snapshot_interval,
        args.log_retention,
        args.checkpoint_interval,
    ];
    for time in times {
        assert!(time >= Duration::from_millis(100));
        assert!(i64::try_from(time.as_nanos()).is_ok());
        // As often as a jittered interval may be long.
        assert!(Instant::now().checked_add(time * 2).is_some());
    }
    args.peer
        .iter()
        .chain(&args.advertise_url)
        .for_each(|url| base(url));
    assert!((1..=5).contains(&args.replicas));
    let name = &args.credentials.username;
    assert!(!name.is_empty() && !name.contains(':'));
    if let Some(servers) = &args.nats_url {
        let (host, port) = servers.first().expect("at least one");
        assert!(!host.is_empty());
        assert!(servers.to_string().starts_with(&format!("{host}:{port}")));
    }
    let _ = args.storage();
    // A file that someone happens to have is none of this check's.
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

/// What a backup can be asked for under.
fn base(url: &str) {
    let backup = Url::parse(&format!("{url}/backup")).expect("a URL");
    assert_eq!(backup.scheme(), "http");
    assert!(backup.host_str().is_some_and(|host| !host.is_empty()));
    assert!(backup.path().ends_with("/backup") && backup.query().is_none());
    assert!(backup.username().is_empty() && backup.password().is_none());
}
