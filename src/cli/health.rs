//! `gradestore health`: asks a node's `/readyz`, for container health checks.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::time::Duration;

/// How long the node may take to answer.
const WAIT_MAX: Duration = Duration::from_secs(3);
/// More of an answer than this is not read.
const ANSWER_BYTES_MAX: u64 = 64 * 1024;

/// Why a node is not healthy.
#[derive(Debug, thiserror::Error)]
pub enum HealthError {
    /// Nobody answers.
    #[error(
        "no answer from http://{0}/readyz: {1}; is the node running, and is this its --ops-addr?"
    )]
    NoAnswer(SocketAddr, io::Error),
    /// The node says it is not ready.
    #[error("http://{0}/readyz: {1}")]
    NotReady(SocketAddr, String),
}

/// Asks the node whose ops port listens on `ops_addr`.
///
/// # Errors
/// It does not answer, or not with 200.
pub fn check(ops_addr: SocketAddr) -> Result<(), HealthError> {
    let address = reachable(ops_addr);
    let answer = ask(address).map_err(|error| HealthError::NoAnswer(address, error))?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head.lines().next().unwrap_or_default();
    match status.split(' ').nth(1) {
        Some("200") => Ok(()),
        _ => Err(HealthError::NotReady(address, format!("{status} {body}"))),
    }
}

/// The address at which a listener on this machine can be asked: one that listens on all of the
/// machine's addresses is asked on loopback.
#[must_use]
pub fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}

// One request and nothing around it: a client library would be more code to start than this.
fn ask(address: SocketAddr) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, WAIT_MAX)?;
    stream.set_read_timeout(Some(WAIT_MAX))?;
    write!(
        stream,
        "GET /readyz HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"
    )?;
    let mut answer = String::new();
    stream.take(ANSWER_BYTES_MAX).read_to_string(&mut answer)?;
    Ok(answer)
}
