//! Where the broker is.

use std::fmt;
use std::io;
use std::str::FromStr;

use async_nats::ServerAddr;
use percent_encoding::percent_decode_str;

/// URLs of NATS servers, with a comma between two. Shown without the passwords in them.
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

    /// How the servers are spoken to.
    pub(super) fn scheme(&self) -> &'static str {
        match self.0.iter().any(|address| address.scheme() == "tls") {
            true => "tls",
            false => "nats",
        }
    }

    /// Name and password, from the first URL that has them.
    pub(super) fn user(&self) -> Option<(String, String)> {
        self.0.iter().find_map(|address| {
            let plain = |text: &str| {
                let text = percent_decode_str(text).decode_utf8();
                text.ok().map(std::borrow::Cow::into_owned)
            };
            Some((plain(address.username()?)?, plain(address.password()?)?))
        })
    }
}

impl FromStr for Servers {
    type Err = io::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = |why| io::Error::new(io::ErrorKind::InvalidInput, why);
        let address = |url: &str| {
            let address: ServerAddr = url.trim().parse()?;
            // The library lets ws:// and wss:// through and, built without them, speaks plain NATS there.
            if !matches!(address.scheme(), "nats" | "tls") {
                return Err(wrong("a NATS server URL must begin with nats:// or tls://"));
            }
            if address.host().is_empty() {
                return Err(wrong("a NATS server URL must name a host"));
            }
            Ok(address)
        };
        text.split(',')
            .map(address)
            .collect::<Result<_, _>>()
            .map(Self)
    }
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
    use super::*;

    #[test]
    fn a_server_has_a_host_and_is_spoken_to_in_a_way_that_is_built_in() {
        let parse = |text: &str| text.parse::<Servers>().map_err(|error| error.to_string());
        let servers = parse("nats://a:1, tls://name:secret@b ,[::1]").unwrap();
        assert_eq!(format!("{servers:?}"), "Servers(a:1, b:4222, ::1:4222)");
        assert_eq!(servers.user(), Some(("name".into(), "secret".into())));
        for (text, why) in [
            ("", "host"),
            ("a,,b", "host"),
            ("nats://", "host"),
            ("nats://:4222", "host"),
            ("ws://a", "nats:// or tls://"),
            ("wss://a", "nats:// or tls://"),
            ("http://a", "scheme"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}
