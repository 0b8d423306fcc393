//! Values of flags, each with what to do about one that can't be.

use std::net::SocketAddr;
use std::time::Duration;

use reqwest::Url;

use crate::log::Servers;
use crate::replication::memory::MemoryMax;

/// The longest time that a flag may say: the broker counts nanoseconds in 64 bits, and a deadline
/// that no clock reaches would be a panic.
const TIME_MAX: &str = "100years";

pub(super) fn address(
    flag: &'static str,
    env: &'static str,
    example: &'static str,
) -> impl Fn(&str) -> Result<SocketAddr, String> + Clone + Send + Sync + 'static {
    move |text| {
        text.parse().map_err(|_| {
            format!(
                "it must be an IP address and a port; set {flag} or {env} to one such as {example}"
            )
        })
    }
}

/// A duration of `least` or more, and [`TIME_MAX`] or less.
pub(super) fn at_least(
    least: &'static str,
    flag: &'static str,
    env: &'static str,
    example: &'static str,
) -> impl Fn(&str) -> Result<Duration, String> + Clone + Send + Sync + 'static {
    move |text| {
        let fix = format!("set {flag} or {env} to one such as {example}");
        let given = humantime::parse_duration(text).map_err(|error| format!("{error}; {fix}"))?;
        let bounds = [least, TIME_MAX].map(humantime::parse_duration);
        match bounds {
            [Ok(least), Ok(most)] if (least..=most).contains(&given) => Ok(given),
            _ => Err(format!("it must be from {least} to {TIME_MAX}; {fix}")),
        }
    }
}

pub(super) fn yes_or_no(text: &str) -> Result<bool, String> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "yes" | "on" | "1" => Ok(true),
        // Set to nothing is how a compose file leaves a variable out.
        "false" | "no" | "off" | "0" | "" => Ok(false),
        _ => Err("set GRADESTORE_EPHEMERAL to true or false, or leave it out".to_owned()),
    }
}

pub(super) fn servers(text: &str) -> Result<Servers, String> {
    text.parse().map_err(|error| {
        format!(
            "{error}; set --nats-url or GRADESTORE_NATS_URL to one such as nats://127.0.0.1:4222"
        )
    })
}

pub(super) fn stream_name(text: &str) -> Result<String, String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    match !text.is_empty() && text.len() <= 64 && text.chars().all(allowed) {
        true => Ok(text.to_owned()),
        false => Err(
            "it must be 1 to 64 letters, digits, - or _; set --stream or GRADESTORE_STREAM to one \
             such as GRADES"
                .to_owned(),
        ),
    }
}

pub(super) fn replicas(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(replicas @ 1..=5) => Ok(replicas),
        _ => Err(
            "it must be a number from 1 to 5; set --replicas or GRADESTORE_REPLICAS to 1, or to 3 \
             where there are three NATS servers"
                .to_owned(),
        ),
    }
}

pub(super) fn expect_peers(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(peers @ 1..=100) => Ok(peers),
        _ => Err(
            "it must be a number from 1 to 100; set --expect-peers or GRADESTORE_EXPECT_PEERS to the \
             number of replicas, such as 3"
                .to_owned(),
        ),
    }
}

pub(super) fn memory_max(text: &str) -> Result<MemoryMax, String> {
    text.parse().map_err(|error| {
        format!(
            "{error}; set --memory-max or GRADESTORE_MEMORY_MAX to one such as 900MB, 8GiB or 80%"
        )
    })
}

pub(super) fn threads(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(threads @ 1..=1024) => Ok(threads),
        _ => Err(
            "it must be a number from 1 to 1024; set --threads or GRADESTORE_THREADS to one such as \
             4, or leave it out for half as many as there are cores"
                .to_owned(),
        ),
    }
}

pub(super) fn base_url(
    flag: &'static str,
    env: &'static str,
) -> impl Fn(&str) -> Result<String, String> + Clone + Send + Sync + 'static {
    move |text| {
        let fix = format!("set {flag} or {env} to a node's write port, http://127.0.0.1:8080");
        let url = Url::parse(text).map_err(|error| format!("{error}; {fix}"))?;
        if url.scheme() != "http" {
            return Err(format!("it must begin with http://; {fix}"));
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(format!("name and password are said elsewhere; {fix}"));
        }
        if url.query().is_some() || url.fragment().is_some() {
            return Err(format!("it must end before any ? or #; {fix}"));
        }
        let url = url.as_str().trim_end_matches('/');
        Ok(url.strip_suffix("/backup").unwrap_or(url).to_owned())
    }
}

pub(super) fn username(text: &str) -> Result<String, String> {
    let fix = "set --username or GRADESTORE_USERNAME to one such as admin";
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
    fn times_that_no_clock_reaches_are_refused() {
        let time = at_least("1s", "--time", "TIME", "5m");
        for (text, refused) in [
            ("1s", false),
            ("100years", false),
            ("100years 1ns", true),
            ("584542046090y", true),
            ("999ms", true),
        ] {
            let error = time(text).err();
            let wanted = "it must be from 1s to 100years; set --time or TIME to one such as 5m";
            assert_eq!(error.as_deref(), refused.then_some(wanted), "{text}");
        }
    }

    #[test]
    fn a_url_that_no_backup_can_be_under_is_refused() {
        let from = base_url("--from", "FROM");
        for (url, why) in [
            ("http://", "empty host"),
            ("http://:80", "empty host"),
            ("http://[::1", "invalid IPv6"),
            ("http://a b", "invalid international domain name"),
            ("a:80", "must begin with http://"),
            ("https://a", "must begin with http://"),
            ("http://name:password@a", "said elsewhere"),
            ("http://a/?b", "before any ?"),
            ("http://a#b", "before any ?"),
        ] {
            let error = from(url).unwrap_err();
            assert!(error.contains(why), "{url}: {error}");
            assert!(error.contains("; set --from or FROM to"), "{error}");
        }
        for url in ["http://a:8080", "http://a:8080/", "http://a:8080/backup"] {
            assert_eq!(from(url).as_deref(), Ok("http://a:8080"));
        }
        assert_eq!(from("HTTP://A/b/").as_deref(), Ok("http://a/b"));
    }
}
