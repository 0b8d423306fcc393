//! A proxy to a peer that limits how many bytes of each response pass.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt, copy};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::harness::wire::with_timeout;

/// A small receive buffer, so that the peer notices the limit.
const KERNEL_BYTES: u32 = 16 * 1024;

/// A proxy between a replica and a peer that sends its backup. Stops when dropped.
pub(crate) struct Throttle {
    pub(crate) address: SocketAddr,
    state: ThrottleState,
    _accepting: JoinSet<()>,
}

#[derive(Clone, Default)]
struct ThrottleState {
    /// The peer; without one, connections are closed.
    target: watch::Sender<Option<SocketAddr>>,
    /// How many bytes of each response may pass.
    limit: watch::Sender<u64>,
    /// How many bytes have passed on each connection.
    passed: watch::Sender<Vec<u64>>,
    cut: watch::Sender<()>,
}

impl Throttle {
    /// A proxy that passes `limit` bytes of each response once it has a target.
    pub(crate) async fn without_target(limit: u64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = ThrottleState::default();
        state.limit.send_replace(limit);
        let mut accepting = JoinSet::new();
        accepting.spawn(accept(listener, state.clone()));
        Self {
            address,
            state,
            _accepting: accepting,
        }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(crate) fn set_target(&self, peer: SocketAddr) {
        self.state.target.send_replace(Some(peer));
    }

    /// Changes the limit of each connection, which includes the bytes that have passed.
    pub(crate) fn set_limit(&self, limit: u64) {
        self.state.limit.send_replace(limit);
    }

    /// Removes the limit.
    pub(crate) fn remove_limit(&self) {
        self.set_limit(u64::MAX);
    }

    /// Closes all connections and rejects new ones.
    pub(crate) fn cut(&self) {
        self.state.target.send_replace(None);
        self.state.cut.send_replace(());
    }

    /// The number of connections to the target so far.
    pub(crate) fn connections(&self) -> usize {
        self.state.passed.borrow().len()
    }

    /// Waits until `connections` of them have reached the limit.
    pub(crate) async fn wait_until_limited(&self, connections: usize) {
        let limit = *self.state.limit.borrow();
        let mut passed = self.state.passed.subscribe();
        let full = |passed: &Vec<u64>| {
            let full = passed.iter().filter(|passed| **passed == limit);
            full.count() == connections
        };
        with_timeout("the throttle's limit", passed.wait_for(full))
            .await
            .unwrap();
    }
}

async fn accept(listener: TcpListener, state: ThrottleState) {
    let mut connections = JoinSet::new();
    loop {
        let (client, _) = listener.accept().await.unwrap();
        // Subscribed before the target is read: a cut between the two must close this connection.
        let mut cut = state.cut.subscribe();
        let Some(peer) = *state.target.borrow() else {
            continue;
        };
        let mut index = 0;
        state.passed.send_modify(|passed| {
            index = passed.len();
            passed.push(0);
        });
        let state = state.clone();
        connections.spawn(async move {
            tokio::select! {
                () = forward(client, peer, &state, index) => {}
                _ = cut.changed() => {}
            }
        });
        while connections.try_join_next().is_some() {}
    }
}

async fn forward(mut client: TcpStream, peer: SocketAddr, state: &ThrottleState, index: usize) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(KERNEL_BYTES).unwrap();
    let Ok(mut peer) = socket.connect(peer).await else {
        return;
    };
    let (mut from_client, mut to_client) = client.split();
    let (mut from_peer, mut to_peer) = peer.split();
    let responses = async {
        let (mut passed, mut limit) = (0, state.limit.subscribe());
        let mut bytes = vec![0; 8 * 1024];
        loop {
            let allowed = *limit.wait_for(|limit| *limit > passed).await.unwrap() - passed;
            let allowed = bytes.len().min(usize::try_from(allowed).unwrap());
            let Ok(read @ 1..) = from_peer.read(&mut bytes[..allowed]).await else {
                return;
            };
            if to_client.write_all(&bytes[..read]).await.is_err() {
                return;
            }
            passed += read as u64;
            state.passed.send_modify(|of_all| of_all[index] = passed);
        }
    };
    tokio::select! {
        () = responses => {}
        _ = copy(&mut from_client, &mut to_peer) => {}
    }
}
