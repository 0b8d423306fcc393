//! The URLs of the NATS servers.

use std::borrow::Cow;
use std::fmt;
use std::net::Ipv6Addr;
use std::num::NonZeroU16;
use std::str::FromStr;

use async_nats::ServerAddr;
use percent_encoding::percent_decode_str;

/// URLs of NATS servers, separated by commas. Displayed without user names and passwords.
#[derive(Clone)]
pub struct Servers(Vec<ServerAddr>);

impl Servers {
    pub(super) fn addresses(&self) -> &[ServerAddr] {
        &self.0
    }

    /// Host and port of the first one.
    #[must_use]
    pub fn first(&self) -> Option<(String, u16)> {
        let address = self.0.first()?;
        Some((address.host().to_owned(), address.port()))
    }

    /// `tls` if any of the URLs has it, else `nats`.
    pub(super) fn scheme(&self) -> &'static str {
        match self.0.iter().any(|address| address.scheme() == "tls") {
            true => "tls",
            false => "nats",
        }
    }

    /// User name and password, from the first URL that has them.
    pub(super) fn user(&self) -> Option<(String, String)> {
        self.0.iter().find_map(credentials)
    }
}

impl FromStr for Servers {
    type Err = ServersError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let count = text.split(',').count();
        let mut servers = Vec::with_capacity(count);
        let mut user = None;
        for (index, url) in text.split(',').enumerate() {
            let wrong = |error| ServersError {
                number: index + 1,
                count,
                error,
            };
            let server = parse(url.trim()).map_err(wrong)?;
            let own = credentials(&server);
            if own.is_some() && user.is_some() && own != user {
                return Err(wrong(UrlError::OtherUser));
            }
            user = own.or(user);
            servers.push(server);
        }
        Ok(Self(servers))
    }
}

/// Why a list of URLs is invalid, and the fix. The text shows no part of the URLs, because a
/// mistake may put a password anywhere in them.
#[derive(Debug, thiserror::Error)]
#[error("NATS server URL {number} of {count} {error}")]
pub struct ServersError {
    /// Which URL, from 1.
    number: usize,
    /// How many URLs the list has.
    count: usize,
    error: UrlError,
}

/// Why a URL is invalid.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
enum UrlError {
    #[error("is empty: remove the extra comma, or name a host")]
    Empty,
    #[error("contains a space: separate URLs with commas, and write a space in a password as %20")]
    Space,
    #[error("must begin with nats:// or tls://")]
    Scheme,
    #[error("contains another URL: separate URLs with commas")]
    Separator,
    #[error(
        "has an unencoded {0} before its last @: in a user name or password write it as %{code:02X}",
        code = *.0 as u32
    )]
    Unencoded(char),
    #[error(
        "has a % without two hexadecimal digits after it: in a user name or password write % as %25"
    )]
    Percent,
    #[error("has a user name or password that is not UTF-8 once it is percent-decoded")]
    NotUtf8,
    #[error(
        "has an @ without a user name and a password before it: write USER:PASSWORD@HOST, with a \
         comma in a password as %2C"
    )]
    HalfUser,
    #[error("has another user name or password than one before it: all servers get the same")]
    OtherUser,
    #[error("names no host: write one such as nats://127.0.0.1:4222")]
    NoHost,
    #[error("has an IPv6 address without brackets, or one that is wrong: write nats://[::1]:4222")]
    Ipv6,
    #[error("has a character in its host that no host name has")]
    Host,
    #[error(
        "has a port that is not a number from 1 to 65535; if it is a password, end it with @ and \
         the host, and write a comma in it as %2C"
    )]
    Port,
    #[error("has a {0} after its host: remove it")]
    Rest(&'static str),
    #[error("is not a URL")]
    Other,
}

/// Characters that must be percent-encoded in a user name or password. The first `:` separates the
/// two, so an error for `:` is about the password. `+` is rejected because form decoding turns it
/// into a space and URL decoding does not.
const RESERVED: [char; 6] = ['/', '?', '#', '@', '+', ':'];

/// Parses one URL. The library's own errors do not help: for a `/` in a password it reports
/// "invalid port number". And it accepts a user name without a password, which would be ignored
/// here.
fn parse(url: &str) -> Result<ServerAddr, UrlError> {
    if url.is_empty() {
        return Err(UrlError::Empty);
    }
    if url.contains(|c: char| c.is_whitespace() || c.is_control()) {
        return Err(UrlError::Space);
    }
    let rest = after_scheme(url)?;
    let server = match rest.rsplit_once('@') {
        Some((user, server)) => {
            check_user(user)?;
            server
        }
        None => rest,
    };
    check_server(server)?;
    url.parse().map_err(|_| UrlError::Other)
}

fn after_scheme(url: &str) -> Result<&str, UrlError> {
    match url.split_once("://") {
        Some((scheme, rest)) if is_scheme(scheme) => Ok(rest),
        // The URL has no scheme, and :// is part of a password.
        Some((before, _)) if before.contains([':', '@', '/']) => Ok(url),
        // The library accepts ws:// and wss://. Built without websockets, it uses plain NATS for
        // them.
        Some(_) => Err(UrlError::Scheme),
        None => match url.split_once(":/") {
            Some((scheme, _)) if is_scheme(scheme) => Err(UrlError::Scheme),
            _ => Ok(url),
        },
    }
}

fn is_scheme(text: &str) -> bool {
    ["nats", "tls"]
        .iter()
        .any(|scheme| text.eq_ignore_ascii_case(scheme))
}

/// Checks the part before the last `@`.
fn check_user(user: &str) -> Result<(), UrlError> {
    if ["nats://", "tls://"].iter().any(|url| user.contains(url)) {
        return Err(UrlError::Separator);
    }
    let (name, password) = user.split_once(':').unwrap_or((user, ""));
    for part in [name, password] {
        if let Some(reserved) = part.chars().find(|c| RESERVED.contains(c)) {
            return Err(UrlError::Unencoded(reserved));
        }
        let encoded = |rest: &str| {
            let digits = rest.as_bytes().get(..2);
            digits.is_some_and(|digits| digits.iter().all(u8::is_ascii_hexdigit))
        };
        if !part.split('%').skip(1).all(encoded) {
            return Err(UrlError::Percent);
        }
        if percent_decode_str(part).decode_utf8().is_err() {
            return Err(UrlError::NotUtf8);
        }
    }
    match name.is_empty() || password.is_empty() {
        true => Err(UrlError::HalfUser),
        false => Ok(()),
    }
}

/// Checks `HOST[:PORT][/]`.
fn check_server(server: &str) -> Result<(), UrlError> {
    if server.contains("://") {
        return Err(UrlError::Separator);
    }
    let end = server.find(['/', '?', '#']).unwrap_or(server.len());
    let (address, rest) = server.split_at(end);
    let (host, port) = match address.strip_prefix('[') {
        Some(bracketed) => {
            let (host, port) = bracketed.split_once(']').ok_or(UrlError::Ipv6)?;
            host.parse::<Ipv6Addr>().map_err(|_| UrlError::Ipv6)?;
            match port.strip_prefix(':') {
                None if !port.is_empty() => return Err(UrlError::Port),
                port => (host, port),
            }
        }
        None if address.parse::<Ipv6Addr>().is_ok() => return Err(UrlError::Ipv6),
        None => match address.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (address, None),
        },
    };
    if host.is_empty() {
        return Err(UrlError::NoHost);
    }
    if let Some(port) = port
        && !(port.bytes().all(|byte| byte.is_ascii_digit()) && port.parse::<NonZeroU16>().is_ok())
    {
        return Err(UrlError::Port);
    }
    let of_a_host = |c: char| c.is_ascii_alphanumeric() || ['-', '.', '_', ':'].contains(&c);
    if !host.chars().all(of_a_host) {
        return Err(UrlError::Host);
    }
    match rest.strip_prefix('/').unwrap_or(rest).chars().next() {
        None => Ok(()),
        Some('?') => Err(UrlError::Rest("query")),
        Some('#') => Err(UrlError::Rest("fragment")),
        Some(_) => Err(UrlError::Rest("path")),
    }
}

/// User name and password, decoded.
fn credentials(server: &ServerAddr) -> Option<(String, String)> {
    let decoded = |text: &str| {
        let text = percent_decode_str(text).decode_utf8();
        text.ok().map(Cow::into_owned)
    };
    Some((decoded(server.username()?)?, decoded(server.password()?)?))
}

impl fmt::Display for Servers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, address) in self.0.iter().enumerate() {
            let separator = if index == 0 { "" } else { ", " };
            write!(f, "{separator}{}:{}", address.host(), address.port())?;
        }
        Ok(())
    }
}

impl fmt::Debug for Servers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Servers({self})")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn servers(text: &str) -> Result<Servers, String> {
        text.parse()
            .map_err(|error: ServersError| error.to_string())
    }

    #[test]
    fn servers_are_separated_by_commas() {
        let parsed =
            servers("nats://a:1, tls://name:secret@b ,[::1],NATS://c_d.e-f:65535/").unwrap();
        let shown = "Servers(a:1, b:4222, ::1:4222, c_d.e-f:65535)";
        assert_eq!(format!("{parsed:?}"), shown);
        assert_eq!(parsed.first(), Some(("a".into(), 1)));
        assert_eq!(parsed.user(), Some(("name".into(), "secret".into())));
        for text in ["nats", "nats:4222", "tls://[::1]:1", "nats://127.0.0.1/"] {
            assert!(servers(text).is_ok(), "{text}");
        }
        // Several URLs may have the same user, and others none.
        assert!(servers("u:p@a,nats://u:p@b,c").is_ok());
    }

    #[test]
    fn credentials_are_percent_decoded() {
        for (user, password) in [
            ("u", "/?#@+:,% "),
            ("a:b", "aGVsbG8+d29ybGQ/Cg=="),
            ("é", "\u{1f600}[]\\^`{|}!$&'()*;=\"<>"),
        ] {
            let encoded = |text: &str| {
                percent_encoding::utf8_percent_encode(text, percent_encoding::NON_ALPHANUMERIC)
                    .to_string()
            };
            let url = format!("nats://{}:{}@a", encoded(user), encoded(password));
            let wanted = Some((user.to_owned(), password.to_owned()));
            assert_eq!(servers(&url).unwrap().user(), wanted, "{url}");
        }
        // Characters that are not reserved need no encoding.
        let plain = servers("nats://ü:p-._~!$&'()*;=\"<>[]\\^`{|}é@a").unwrap();
        let password = "p-._~!$&'()*;=\"<>[]\\^`{|}é";
        assert_eq!(plain.user(), Some(("ü".into(), password.into())));
    }

    #[test]
    #[expect(clippy::too_many_lines, reason = "a table")]
    fn an_error_names_the_url_and_the_fix_and_shows_no_secret() {
        for (text, wanted) in [
            ("", "1 of 1 is empty"),
            (" ", "1 of 1 is empty"),
            ("a,", "2 of 2 is empty: remove the extra comma"),
            (",a", "1 of 2 is empty: remove the extra comma"),
            ("a, ,b", "2 of 3 is empty: remove the extra comma"),
            ("a b", "1 of 1 contains a space: separate URLs with commas"),
            ("a\tb", "1 of 1 contains a space"),
            ("a,u:SECRET SECRET@b", "2 of 2 contains a space"),
            ("ws://a", "1 of 1 must begin with nats:// or tls://"),
            ("wss://a", "must begin with"),
            ("http://u:SECRET@a", "must begin with"),
            ("://a", "must begin with"),
            ("nats:/a", "must begin with"),
            ("TLS:/u:SECRET@a", "must begin with"),
            (
                "nats://a;nats://b",
                "contains another URL: separate URLs with commas",
            ),
            ("u:SECRET@a;tls://u:SECRET@b", "contains another URL"),
            (
                "u:SECRET/SECRET@a",
                "has an unencoded / before its last @: in a user name or password write it as %2F",
            ),
            ("SECRET/SECRET:p@a", "write it as %2F"),
            ("u:SECRET+SECRET@a", "has an unencoded +"),
            ("SECRET+:p@a", "write it as %2B"),
            ("u:SECRET@SECRET@a", "has an unencoded @"),
            ("SECRET@SECRET:p@a", "write it as %40"),
            ("u:SECRET#SECRET@a", "write it as %23"),
            ("u:SECRET?SECRET@a", "write it as %3F"),
            ("u:SECRET:SECRET@a", "write it as %3A"),
            ("u:SECRET://SECRET@a", "write it as %3A"),
            ("u:SECRET%SECRET@a", "write % as %25"),
            ("u:SECRET%4@a", "write % as %25"),
            ("SECRET%:p@a", "write % as %25"),
            ("u:SECRET%ff@a", "not UTF-8"),
            ("SECRET%ED%A0%80:p@a", "not UTF-8"),
            ("SECRET@a", "write USER:PASSWORD@HOST"),
            ("u:@a", "write USER:PASSWORD@HOST"),
            (":SECRET@a", "write USER:PASSWORD@HOST"),
            ("@a", "write USER:PASSWORD@HOST"),
            (
                "u:1,SECRET@a",
                "2 of 2 has an @ without a user name and a password before it",
            ),
            (
                "u:SECRET,SECRET@a",
                "1 of 2 has a port that is not a number from 1 to 65535; if it is a password, end it with @ and the host, and write a comma in it as %2C",
            ),
            (
                "u:p@a,u:SECRET@b",
                "2 of 2 has another user name or password",
            ),
            (
                "u:p@a,b,SECRET:p@b",
                "3 of 3 has another user name or password",
            ),
            ("nats://", "names no host"),
            ("nats://:4222", "names no host"),
            ("nats:///", "names no host"),
            ("u:SECRET@", "names no host"),
            ("u:SECRET@:4222", "names no host"),
            ("::1", "write nats://[::1]:4222"),
            ("fe80::1:4222", "write nats://[::1]:4222"),
            ("[::1", "write nats://[::1]:4222"),
            ("[a]", "write nats://[::1]:4222"),
            ("[fe80::1%eth0]:4222", "write nats://[::1]:4222"),
            ("[]", "write nats://[::1]:4222"),
            ("a%20b", "has a character in its host"),
            ("a\\b", "has a character in its host"),
            ("ü", "has a character in its host"),
            ("a:", "has a port that is not a number from 1 to 65535"),
            ("a:0", "has a port that is not"),
            ("a:65536", "has a port that is not"),
            ("a:-1", "has a port that is not"),
            ("a:+1", "has a port that is not"),
            ("a:1:2", "has a port that is not"),
            ("[::1]4222", "has a port that is not"),
            ("u:SECRET", "has a port that is not"),
            ("u:SECRET/SECRET", "has a port that is not"),
            ("a/b", "has a path after its host: remove it"),
            ("u:SECRET@a:4222/b", "has a path"),
            ("a//", "has a path"),
            ("a?tls=true", "has a query after its host: remove it"),
            ("a/?b", "has a query"),
            ("a#b", "has a fragment after its host: remove it"),
        ] {
            let error = servers(text).unwrap_err();
            assert!(error.starts_with("NATS server URL "), "{text}: {error}");
            assert!(error.contains(wanted), "{text}: {error}");
            assert!(!error.contains("SECRET"), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn an_accepted_url_has_a_host_and_whole_credentials(
            text in "(nats://|tls://)?([a-z%0-9:/@+?#.]{0,8}@)?[a-z0-9:/\\[\\].,%]{0,12}",
        ) {
            if let Ok(servers) = servers(&text) {
                for server in servers.addresses() {
                    prop_assert!(!server.host().is_empty());
                    prop_assert_eq!(credentials(server).is_some(), server.has_user_pass());
                }
            }
        }
    }
}
