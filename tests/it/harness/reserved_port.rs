//! TCP ports that no other process takes.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::ops::Range;

/// Below Linux' ephemeral ports, so that no outgoing connection and no bind to port 0 takes the
/// port of a process that binds later or restarts.
const PORTS: Range<u16> = 20_000..32_768;

/// A TCP port that stays reserved while this exists. The reservation is the UDP port of the same
/// number: every test that reserves ports sees it, and the TCP port can be bound again and again.
pub(crate) struct ReservedPort {
    number: u16,
    _reservation: UdpSocket,
}

impl ReservedPort {
    pub(crate) fn new() -> Self {
        loop {
            let random = getrandom::u32().unwrap() as usize;
            let number = PORTS.start + (random % PORTS.len()) as u16;
            let address = (Ipv4Addr::LOCALHOST, number);
            let Ok(reservation) = UdpSocket::bind(address) else {
                continue;
            };
            if TcpListener::bind(address).is_ok() {
                return Self {
                    number,
                    _reservation: reservation,
                };
            }
        }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, self.number))
    }
}
