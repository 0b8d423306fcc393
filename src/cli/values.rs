//! Parsers of flag values. Each error says how to fix the value.

use std::ffi::{OsStr, OsString};
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::time::Duration;

use reqwest::Url;

use crate::http::host::{address_of, is_name};
use crate::log::{Servers, WalSync};
use crate::replication::memory::{MemoryMax, parse_bytes};

/// The longest duration of a flag. NATS counts nanoseconds in 64 bits, and deadlines beyond the range
/// of the clock would panic.
const TIME_MAX: &str = "100years";

/// The environment variable of a flag.
pub(super) fn env_of(flag: &str) -> String {
    let name = flag.trim_start_matches('-').replace('-', "_");
    format!("GRADESTORE_{}", name.to_ascii_uppercase())
}

/// The value of an environment variable; `None` if it is empty, too. Compose files, units and shells
/// set variables to an empty string to omit them.
pub(super) fn env_value(name: impl AsRef<OsStr>) -> Option<OsString> {
    std::env::var_os(name).filter(|value| !value.is_empty())
}

/// How to fix the value of a flag.
fn fix(flag: &str, example: &str) -> String {
    format!(
        "set {flag} or {} to a value such as {example}",
        env_of(flag)
    )
}

pub(super) fn address(
    flag: &'static str,
    example: &'static str,
) -> impl Fn(&str) -> Result<SocketAddr, String> + Clone + Send + Sync + 'static {
    move |text| {
        text.parse().map_err(|_| {
            format!(
                "it must be an IP address and a port; {}",
                fix(flag, example)
            )
        })
    }
}

/// A duration from `least` to [`TIME_MAX`].
pub(super) fn at_least(
    least: &'static str,
    flag: &'static str,
    example: &'static str,
) -> impl Fn(&str) -> Result<Duration, String> + Clone + Send + Sync + 'static {
    move |text| {
        let fix = fix(flag, example);
        let given = humantime::parse_duration(text).map_err(|error| format!("{error}; {fix}"))?;
        let bounds = [least, TIME_MAX].map(humantime::parse_duration);
        match bounds {
            [Ok(least), Ok(most)] if (least..=most).contains(&given) => Ok(given),
            _ => Err(format!("it must be from {least} to {TIME_MAX}; {fix}")),
        }
    }
}

/// A number in `range`.
pub(super) fn count(
    range: RangeInclusive<usize>,
    flag: &'static str,
    example: &'static str,
) -> impl Fn(&str) -> Result<usize, String> + Clone + Send + Sync + 'static {
    move |text| {
        let number = text.parse().ok().filter(|number| range.contains(number));
        number.ok_or_else(|| {
            let (least, most) = (range.start(), range.end());
            let fix = fix(flag, example);
            format!("it must be a number from {least} to {most}; {fix}")
        })
    }
}

pub(super) fn yes_or_no(text: &str) -> Result<bool, String> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "yes" | "on" | "1" => Ok(true),
        "false" | "no" | "off" | "0" => Ok(false),
        _ => Err("set GRADESTORE_EPHEMERAL to true or false, or remove it".to_owned()),
    }
}

pub(super) fn host_name(text: &str) -> Result<String, String> {
    let is_host_name = !text.is_empty() && is_name(text) && !text.contains('*');
    match is_host_name || address_of(text).is_some() {
        true => Ok(text.to_owned()),
        false => {
            let fix = fix("--allowed-host", "grades.example.com");
            Err(format!(
                "it must be one host name or IP address without a port or wildcard; {fix}"
            ))
        }
    }
}

pub(super) fn servers(text: &str) -> Result<Servers, String> {
    let fix = fix("--nats-url", "nats://127.0.0.1:4222");
    text.parse().map_err(|error| format!("{error}; {fix}"))
}

pub(super) fn stream_name(text: &str) -> Result<String, String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    match !text.is_empty() && text.len() <= 64 && text.chars().all(allowed) {
        true => Ok(text.to_owned()),
        false => {
            let fix = fix("--stream", "GRADES");
            Err(format!("it must be 1 to 64 letters, digits, - or _; {fix}"))
        }
    }
}

pub(super) fn memory_max(text: &str) -> Result<MemoryMax, String> {
    let fix = fix("--memory-max", "900MB, 8GiB or 80%");
    text.parse().map_err(|error| format!("{error}; {fix}"))
}

pub(super) fn wal_sync(text: &str) -> Result<WalSync, String> {
    match text {
        "always" => Ok(WalSync::Always),
        interval => at_least("1ms", "--wal-sync", "always or 100ms")(interval).map(WalSync::Every),
    }
}

pub(super) fn wal_keep(text: &str) -> Result<u64, String> {
    let fix = fix("--wal-keep", "1GiB");
    parse_bytes(text).map_err(|error| format!("{error}; {fix}"))
}

/// The URL of a write port. A trailing `/backup` is removed.
pub(super) fn base_url(
    flag: &'static str,
) -> impl Fn(&str) -> Result<String, String> + Clone + Send + Sync + 'static {
    move |text| {
        let env = env_of(flag);
        let fix = format!("set {flag} or {env} to a node's write port, http://127.0.0.1:8080");
        let url = Url::parse(text).map_err(|error| format!("{error}; {fix}"))?;
        if url.scheme() != "http" {
            return Err(format!("it must begin with http://; {fix}"));
        }
        if !url.username().is_empty() || url.password().is_some() {
            let flags = "use --username and --password-file for the name and password";
            return Err(format!("{flags}; {fix}"));
        }
        if url.query().is_some() || url.fragment().is_some() {
            return Err(format!("it must not have a ? or #; {fix}"));
        }
        let url = url.as_str().trim_end_matches('/');
        Ok(url.strip_suffix("/backup").unwrap_or(url).to_owned())
    }
}

pub(super) fn username(text: &str) -> Result<String, String> {
    let fix = fix("--username", "admin");
    if text.is_empty() {
        return Err(format!("it is empty; {fix}"));
    }
    if text.contains(':') || text.chars().any(char::is_control) {
        let why =
            "HTTP Basic authentication allows no colon and no control character in a user name";
        return Err(format!("{why}; {fix}"));
    }
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rejects_durations_beyond_the_range_of_the_clock() {
        let time = at_least("1s", "--any-time", "5m");
        for (text, rejected) in [
            ("1s", false),
            ("100years", false),
            ("100years 1ns", true),
            ("584542046090y", true),
            ("999ms", true),
        ] {
            let error = time(text).err();
            let wanted = "it must be from 1s to 100years; set --any-time or GRADESTORE_ANY_TIME to a \
                          value such as 5m";
            assert_eq!(error.as_deref(), rejected.then_some(wanted), "{text}");
        }
    }

    #[test]
    fn rejects_urls_that_are_not_a_write_port() {
        let from = base_url("--from");
        for (url, why) in [
            ("http://", "empty host"),
            ("http://:80", "empty host"),
            ("http://[::1", "invalid IPv6"),
            ("http://a b", "invalid international domain name"),
            ("a:80", "must begin with http://"),
            ("https://a", "must begin with http://"),
            ("http://name:password@a", "use --username"),
            ("http://a/?b", "must not have a ?"),
            ("http://a#b", "must not have a ?"),
        ] {
            let error = from(url).unwrap_err();
            assert!(error.contains(why), "{url}: {error}");
            assert!(
                error.contains("; set --from or GRADESTORE_FROM to"),
                "{error}"
            );
        }
        for url in ["http://a:8080", "http://a:8080/", "http://a:8080/backup"] {
            assert_eq!(from(url).as_deref(), Ok("http://a:8080"));
        }
        assert_eq!(from("HTTP://A/b/").as_deref(), Ok("http://a/b"));
    }
}
