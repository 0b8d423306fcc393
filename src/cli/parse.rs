//! Parses the command line and the environment.

use std::any::TypeId;
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

use clap::builder::Resettable;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{CommandFactory, FromArgMatches};

use super::args::Cli;
use super::error::ConfigError;
use super::password;
use super::values::env_value;

/// Replaces a value that may contain a password.
const HIDDEN: &str = "***";
/// The prefix of all variables.
const ENV_PREFIX: &str = "GRADESTORE_";

/// Set in every pod of Kubernetes.
const ENV_OF_KUBERNETES: &str = "KUBERNETES_SERVICE_HOST";

/// Checks the environment of this process with [`check_env_names`].
///
/// # Errors
/// The first unknown variable.
pub fn check_env() -> Result<(), ConfigError> {
    let set = std::env::vars_os().filter(|(_, value)| !value.is_empty());
    check_env_names(set.map(|(name, _)| name.to_string_lossy().into_owned()))
}

/// The command line, without the variables that are empty.
fn command() -> clap::Command {
    let omit_empty = |arg: clap::Arg| match arg.get_env() {
        Some(name) if env_value(name).is_none() && std::env::var_os(name).is_some() => {
            arg.env(Resettable::Reset)
        }
        _ => arg,
    };
    Cli::command().mut_subcommands(|command| command.mut_args(omit_empty))
}

/// Parses the command line and environment of this process. Exits after printing help, version or an
/// error.
#[must_use]
pub fn parse_args() -> Cli {
    parse(std::env::args_os().collect()).unwrap_or_else(|error| error.exit())
}

/// Parses a command line, including the program's name. `serve` is the default command, and the
/// environment has the defaults of flags.
///
/// # Errors
/// An argument or variable is invalid, with the fix; or the command line asks for help or the version.
pub fn parse(mut args: Vec<OsString>) -> Result<Cli, clap::Error> {
    let first = args.get(1).map(|arg| arg.to_string_lossy().into_owned());
    let serve = match first.as_deref() {
        None => true,
        Some("-h" | "--help" | "-V" | "--version") => false,
        Some(word) => word.starts_with('-'),
    };
    if serve {
        args.insert(1.min(args.len()), "serve".into());
    }
    let matches = command().try_get_matches_from(&args);
    let parsed = matches.and_then(|matches| Cli::from_arg_matches(&matches));
    parsed.map_err(|error| match error.kind() {
        // clap does not report which argument it is.
        ErrorKind::InvalidUtf8 => {
            let wrong = not_utf8(&args).join(", ");
            Cli::command().error(
                ErrorKind::InvalidUtf8,
                format!("only paths may contain invalid UTF-8; change {wrong}"),
            )
        }
        _ => without_password(error),
    })
}

/// Hides the value of an invalid URL that may contain a password.
fn without_password(mut error: clap::Error) -> clap::Error {
    let argument = error.get(ContextKind::InvalidArg);
    let of_url =
        matches!(argument, Some(ContextValue::String(argument)) if argument.contains("<URL>"));
    if of_url
        && let Some(ContextValue::String(value)) = error.get(ContextKind::InvalidValue)
        && may_contain_password(value)
    {
        let hidden = ContextValue::String(HIDDEN.to_owned());
        error.insert(ContextKind::InvalidValue, hidden);
    }
    error
}

/// Whether a list of URLs contains more than hosts and ports. Without an `@`, a password may be in the
/// place of a port.
fn may_contain_password(urls: &str) -> bool {
    urls.split(',').any(|url| {
        let (_, rest) = url.split_once("://").unwrap_or(("", url));
        let port = rest.split_once(':').map_or("", |(_, port)| port);
        let is_port = port.len() <= 5 && port.bytes().all(|byte| byte.is_ascii_digit());
        rest.contains('@') || !is_port
    })
}

/// The arguments and variables that are not UTF-8, with their flags and names.
fn not_utf8(args: &[OsString]) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut before = "";
    for arg in args {
        match arg.to_str() {
            Some(arg) => before = arg,
            None if before.starts_with('-') => {
                wrong.push(format!("{before} {}", shown(arg)));
            }
            None => wrong.push(shown(arg)),
        }
    }
    let command = Cli::command();
    let flags = command
        .get_subcommands()
        .flat_map(clap::Command::get_arguments);
    for flag in flags.filter(|flag| flag.get_value_parser().type_id() != TypeId::of::<PathBuf>()) {
        let Some(name) = flag.get_env() else {
            continue;
        };
        if let Some(value) = std::env::var_os(name).filter(|value| value.to_str().is_none()) {
            wrong.push(format!("{}={}", name.display(), shown(&value)));
        }
    }
    wrong.sort();
    wrong.dedup();
    wrong
}

/// A value with U+FFFD in place of invalid bytes; hidden if it may be a URL with a password.
fn shown(value: &OsStr) -> String {
    let value = value.to_string_lossy();
    match value.contains('@') {
        true => format!("{HIDDEN}\u{fffd}{HIDDEN}"),
        false => value.into_owned(),
    }
}

/// Rejects unknown variables with the prefix of this program. Otherwise a misspelt one would be
/// ignored silently. Ignores those that Kubernetes sets in its pods.
///
/// # Errors
/// The first unknown variable.
pub fn check_env_names(names: impl Iterator<Item = String>) -> Result<(), ConfigError> {
    let command = Cli::command();
    let mut known: Vec<String> = command
        .get_subcommands()
        .flat_map(clap::Command::get_arguments)
        .filter_map(|arg| arg.get_env()?.to_str().map(str::to_owned))
        .chain([password::ENV.to_owned()])
        .collect();
    known.sort();
    known.dedup();
    let names: Vec<_> = names.collect();
    let in_kubernetes = names.iter().any(|name| name == ENV_OF_KUBERNETES);
    for name in names {
        let Some(rest) = name.strip_prefix(ENV_PREFIX) else {
            continue;
        };
        let of_service = is_of_service(rest);
        if known.contains(&name) || (of_service && in_kubernetes) {
            continue;
        }
        return Err(match of_service {
            true => ConfigError::EnvOfService { name },
            false => ConfigError::UnknownEnv {
                name,
                known: known.join(", "),
            },
        });
    }
    Ok(())
}

/// Whether Kubernetes sets `GRADESTORE_` and `rest` for a service whose name begins with gradestore,
/// such as `SERVICE_HOST`, `READ_SERVICE_PORT_HTTP` or `PORT_8081_TCP_ADDR`.
fn is_of_service(rest: &str) -> bool {
    let words = format!("_{rest}_");
    words.ends_with("_SERVICE_HOST_")
        || words.contains("_SERVICE_PORT_")
        || words.contains("_PORT_")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::values::env_of;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_variable_is_named_after_its_flag() {
        let command = Cli::command();
        let args = command
            .get_subcommands()
            .flat_map(clap::Command::get_arguments);
        for arg in args {
            if let (Some(flag), Some(env)) = (arg.get_long(), arg.get_env()) {
                assert_eq!(env.to_str(), Some(&*env_of(flag)));
            }
        }
    }

    #[test]
    fn rejects_a_misspelt_variable_and_ignores_those_of_other_programs() {
        let check = |names: &[&str]| check_env_names(names.iter().map(|name| (*name).to_owned()));
        assert!(check(&["PATH", "GRADESTORE_PASSWORD", "GRADESTORE_USERNAME"]).is_ok());
        for of_service in [
            "GRADESTORE_SERVICE_HOST",
            "GRADESTORE_SERVICE_PORT",
            "GRADESTORE_READ_SERVICE_HOST",
            "GRADESTORE_READ_SERVICE_PORT_HTTP",
            "GRADESTORE_PORT",
            "GRADESTORE_PORT_8080_TCP",
            "GRADESTORE_READ_PORT_8081_TCP_ADDR",
        ] {
            assert!(
                check(&[of_service, ENV_OF_KUBERNETES]).is_ok(),
                "{of_service}"
            );
            let error = check(&[of_service]).unwrap_err().to_string();
            assert!(error.contains(of_service), "{error}");
            assert!(error.contains("GRADESTORE_WRITE_ADDR"), "{error}");
        }
        for unknown in [
            "GRADESTORE_PORTS",
            "GRADESTORE_SERVICE",
            "GRADESTORE_REPORT",
        ] {
            assert!(check(&[unknown, ENV_OF_KUBERNETES]).is_err(), "{unknown}");
        }
        let error = check(&["GRADESTORE_USER_NAME"]).unwrap_err().to_string();
        assert!(error.contains("GRADESTORE_USER_NAME") && error.contains("GRADESTORE_USERNAME"));
    }

    fn error_of(args: &[&[u8]]) -> String {
        use std::os::unix::ffi::OsStringExt;
        let args = args.iter().map(|arg| OsString::from_vec(arg.to_vec()));
        let program = std::iter::once("gradestore".into());
        parse(program.chain(args).collect())
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn reports_arguments_that_are_not_utf8() {
        for (args, wanted) in [
            (
                &[&b"--username"[..], b"\xff"][..],
                "change --username \u{fffd}",
            ),
            (&[b"--username=\xff"], "change --username=\u{fffd}"),
            (&[b"verify\xff"], "verify\u{fffd}"),
            (
                &[b"--nats-url", b"u:SECRET\xff@a"],
                "change --nats-url ***\u{fffd}***",
            ),
        ] {
            let error = error_of(args);
            assert!(error.contains(wanted), "{error}");
            assert!(!error.contains("SECRET"), "{error}");
        }
    }

    #[test]
    fn an_error_shows_the_url_unless_it_may_contain_a_password() {
        for (flag, url, shown) in [
            ("--nats-url", "a:65536", true),
            ("--nats-url", "nats://a,", true),
            ("--nats-url", "nats://a:4222,http://b:80", true),
            ("--nats-url", "u:SECRET/SECRET@a", false),
            ("--nats-url", "u:SECRET,SECRET@a", false),
            ("--nats-url", "u:SECRET", false),
            ("--nats-url", "u:123456", false),
            ("--peer", "https://a", true),
            ("--peer", "http://u:SECRET@a", false),
            ("--advertise-url", "http://u:SECRET@a", false),
        ] {
            let error = error_of(&[flag.as_bytes(), url.as_bytes()]);
            let wanted = format!("'{}' for '{flag} <URL>'", if shown { url } else { "***" });
            assert!(error.contains(&wanted), "{error}");
            assert!(shown || !error.contains(url), "{error}");
            assert!(!error.contains("SECRET"), "{error}");
        }
    }
}
