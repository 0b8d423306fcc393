//! The `Host` header (RFC 9112, section 3.2).
//!
//! A port on a loopback address answers only for hosts that lead there. Otherwise a web page could read
//! it through the browser of the same machine: the page's own name may resolve to 127.0.0.1 from its
//! second lookup on (DNS rebinding), and the browser then regards the node as the page's own server.

use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use http::header::HOST;
use http::{Request, Version};

use super::error::{ApiError, excerpt};

/// The hosts that a port answers for. Clones share them.
#[derive(Debug, Clone)]
pub struct Hosts {
    /// The names other than `localhost` that a port on a loopback address answers for; `None`: all.
    only: Option<Arc<[String]>>,
}

impl Hosts {
    /// The hosts of a port that listens on `address`; `allowed` has further names for a loopback
    /// address.
    #[must_use]
    pub fn of(address: IpAddr, allowed: &[String]) -> Self {
        let only = address
            .to_canonical()
            .is_loopback()
            .then(|| Arc::from(allowed));
        Self { only }
    }

    /// Whether a request with this value of `Host` is answered.
    pub(super) fn accepts(&self, value: &[u8]) -> bool {
        host_of(value).is_some_and(|host| self.allows(host))
    }

    /// Checks the host of a request: one `Host`, and that of the target if it is a whole URL.
    ///
    /// # Errors
    /// The host is missing, repeated, not valid, or not one that the port answers for.
    pub(super) fn check<B>(&self, request: &Request<B>) -> Result<(), ApiError> {
        let mut values = request.headers().get_all(HOST).iter();
        match (values.next(), values.next()) {
            (Some(value), None) => self.check_value(value.as_bytes())?,
            // HTTP/1.0 does not require it, and browsers always send it.
            (None, _) if request.version() == Version::HTTP_10 => {}
            _ => return Err(ApiError::HostInvalid),
        }
        match request.uri().authority() {
            Some(target) => self.check_value(target.as_str().as_bytes()),
            None => Ok(()),
        }
    }

    fn check_value(&self, value: &[u8]) -> Result<(), ApiError> {
        let host = host_of(value).ok_or(ApiError::HostInvalid)?;
        match self.allows(host) {
            true => Ok(()),
            false => Err(ApiError::HostUnknown(excerpt(host.as_bytes()))),
        }
    }

    fn allows(&self, host: &str) -> bool {
        let Some(names) = &self.only else {
            return true;
        };
        let address = address_of(host);
        let is_loopback = address.is_some_and(|address| address.to_canonical().is_loopback());
        let host = without_final_dot(host);
        let named = |name: &str| {
            let same_address = address.is_some() && address_of(name) == address;
            same_address || host.eq_ignore_ascii_case(without_final_dot(name))
        };
        is_loopback || named("localhost") || names.iter().any(|name| named(name))
    }
}

/// The host in `host[:port]`; `None` if that is not valid (RFC 3986, section 3.2). It may be empty.
fn host_of(value: &[u8]) -> Option<&str> {
    let value = str::from_utf8(value).ok()?;
    let (host, port) = match value.rfind([':', ']']) {
        Some(at) if value.as_bytes().get(at) == Some(&b':') => {
            (value.get(..at)?, value.get(at + 1..)?)
        }
        _ => (value, ""),
    };
    let valid = port.bytes().all(|digit| digit.is_ascii_digit())
        && match host.strip_prefix('[') {
            Some(address) => address.strip_suffix(']')?.parse::<Ipv6Addr>().is_ok(),
            None => is_name(host) && (!host.is_empty() || value.is_empty()),
        };
    valid.then_some(host)
}

/// The IP address in `host`; an IPv6 address may be in brackets.
#[must_use]
pub fn address_of(host: &str) -> Option<IpAddr> {
    let inner = host
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'));
    inner.unwrap_or(host).parse().ok()
}

/// `grades.example.` is the fully qualified form of `grades.example`.
fn without_final_dot(name: &str) -> &str {
    name.strip_suffix('.').unwrap_or(name)
}

/// Whether `name` consists of the characters of a registered name. Each `%` begins a hexadecimal byte.
#[must_use]
pub fn is_name(name: &str) -> bool {
    name.bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=%".contains(&byte))
        && is_percent_encoding_valid(name)
}

/// Whether two hexadecimal digits follow each `%`.
pub(super) fn is_percent_encoding_valid(text: &str) -> bool {
    let hex_follows = |rest: &str| {
        let hex = rest.as_bytes().get(..2);
        hex.is_some_and(|hex| hex.iter().all(u8::is_ascii_hexdigit))
    };
    text.split('%').skip(1).all(hex_follows)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOOPBACK: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);

    #[test]
    fn valid_hosts() {
        for (value, host) in [
            ("", Some("")),
            ("a", Some("a")),
            ("a.example:80", Some("a.example")),
            ("a.example:", Some("a.example")),
            ("10.0.0.1:8081", Some("10.0.0.1")),
            ("[::1]:8081", Some("[::1]")),
            ("[::1]", Some("[::1]")),
            ("a_b%20c", Some("a_b%20c")),
            (":80", None),
            ("a:b", None),
            ("a:80:80", None),
            ("::1", None),
            ("[::1", None),
            ("[::1]x", None),
            ("[a]", None),
            ("a b", None),
            ("a/b", None),
            ("a@b", None),
            ("a%2", None),
            ("a%zz", None),
            ("http://a", None),
            ("é", None),
        ] {
            assert_eq!(host_of(value.as_bytes()), host, "{value}");
        }
        assert_eq!(host_of(b"\xff"), None);
    }

    #[test]
    fn a_loopback_port_answers_for_local_hosts_only() {
        let allowed = [
            "Grades.example",
            "dotted.example.",
            "10.0.0.2",
            "2001:db8::1",
        ];
        let allowed = allowed.map(str::to_owned);
        let hosts = Hosts::of(LOOPBACK, &allowed);
        for (value, accepted) in [
            ("localhost", true),
            ("LOCALHOST:8081", true),
            ("127.0.0.1:8081", true),
            ("127.9.9.9", true),
            ("[::1]:1", true),
            ("[::ffff:127.0.0.1]", true),
            ("grades.EXAMPLE:443", true),
            ("grades.example.:443", true),
            ("localhost.", true),
            ("dotted.example", true),
            ("10.0.0.2", true),
            ("[2001:DB8:0::1]:8081", true),
            ("", false),
            ("10.0.0.1", false),
            ("[::2]", false),
            ("x.localhost", false),
            ("localhost.example", false),
            ("x.grades.example", false),
            ("rebind.example:8081", false),
            ("a@localhost", false),
            ("localhost..", false),
            ("[2001:db8::2]", false),
        ] {
            assert_eq!(hosts.accepts(value.as_bytes()), accepted, "{value}");
        }
        let any = Hosts::of(IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED), &allowed);
        assert!(any.accepts(b"rebind.example") && any.accepts(b"") && !any.accepts(b"a b"));
        assert!(!Hosts::of("::ffff:127.0.0.1".parse().unwrap(), &[]).accepts(b"a"));
    }
}
