//! A proxy that the environment names, and that no client of nodes may use.

use std::io::ErrorKind;
use std::net::TcpListener;
use std::process::Command;

/// Accepts connections and never answers.
pub(crate) struct UnusedProxy(TcpListener);

impl UnusedProxy {
    pub(crate) fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        Self(listener)
    }

    /// Sets all variables for proxies.
    pub(crate) fn configure<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        let url = format!("http://{}", self.0.local_addr().unwrap());
        for name in ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"] {
            command.env(name, &url).env(name.to_lowercase(), &url);
        }
        command.env_remove("NO_PROXY").env_remove("no_proxy")
    }

    /// Checks that it never got a connection.
    #[track_caller]
    pub(crate) fn assert_unused(&self) {
        let connection = self.0.accept().map_err(|error| error.kind());
        assert_eq!(connection.unwrap_err(), ErrorKind::WouldBlock);
    }
}
