//! `gradestore health`: requests `/readyz` of a node, for container health checks.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::time::Duration;

/// How long connecting, and each read, may take.
const WAIT_MAX: Duration = Duration::from_secs(3);
/// The maximum size of the response that is read.
const RESPONSE_BYTES_MAX: u64 = 64 * 1024;

/// Why a node is not healthy.
#[derive(Debug, thiserror::Error)]
pub enum HealthError {
    /// There is no response.
    #[error(
        "no response from http://{0}/readyz: {1}; check that the node runs, and its --ops-addr"
    )]
    NoResponse(SocketAddr, io::Error),
    /// The node is not ready.
    #[error("http://{0}/readyz: {1}")]
    NotReady(SocketAddr, String),
}

/// Checks the node whose ops port listens on `ops_addr`.
///
/// # Errors
/// The node does not respond, or its status is not 200.
pub fn check(ops_addr: SocketAddr) -> Result<(), HealthError> {
    let address = reachable(ops_addr);
    let response = get_readyz(address).map_err(|error| HealthError::NoResponse(address, error))?;
    let (head, body) = response.split_once("\r\n\r\n").unwrap_or((&response, ""));
    let status = head.lines().next().unwrap_or_default();
    match status.split(' ').nth(1) {
        Some("200") => Ok(()),
        _ => Err(HealthError::NotReady(address, format!("{status} {body}"))),
    }
}

/// The address at which a listener on this machine can be reached: loopback if it listens on all
/// addresses.
#[must_use]
pub fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}

/// Sends one request. An HTTP client library would take longer to start than this.
fn get_readyz(address: SocketAddr) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, WAIT_MAX)?;
    stream.set_read_timeout(Some(WAIT_MAX))?;
    write!(
        stream,
        "GET /readyz HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"
    )?;
    let mut response = String::new();
    stream
        .take(RESPONSE_BYTES_MAX)
        .read_to_string(&mut response)?;
    Ok(response)
}
