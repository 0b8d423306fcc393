//! The other replicas on this log: those found through the broker, and those given with `--peer`.

use std::cmp::Reverse;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use parking_lot::Mutex;
use serde::Serialize;

use crate::log::{Log, RandomId, Seq};
use crate::replication::peer_client::{BackupStream, PeerClient, RemoteError};

/// How often the peers' state is requested.
const ASK_EVERY: Duration = Duration::from_secs(2);
/// How long a peer may be silent before a request to it fails.
pub const SILENCE_MAX: Duration = Duration::from_secs(10);
/// The timeout for the position of a `--peer`.
const HEADERS_WAIT_MAX: Duration = Duration::from_secs(2);
/// The state of a peer that sends backups.
const READY: &str = "ready";

/// The state of another replica, as of its last answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Peer {
    /// The URL of its write port.
    pub url: Box<str>,
    /// Its node id; `null` for a `--peer` that has not answered.
    pub node: Option<Box<str>>,
    /// Its program's version, if it was found through the broker.
    pub version: Option<Box<str>>,
    /// `ready`, or why not.
    pub state: Box<str>,
    /// The last batch that it has applied.
    pub position: Option<Seq>,
    /// Whether it has reached its memory limit.
    pub full: bool,
}

impl Peer {
    /// Whether it sends backups.
    #[must_use]
    pub fn ready(&self) -> bool {
        &*self.state == READY
    }

    /// Whether it has announced that it does not send any.
    pub(super) fn announced_unready(&self) -> bool {
        self.version.is_some() && !self.ready()
    }
}

/// Finds the other replicas. Clones share the state.
#[derive(Clone)]
pub struct Peers(Arc<PeersInner>);

struct PeersInner {
    me: Box<str>,
    log: Arc<dyn Log>,
    static_peers: Vec<String>,
    client: Arc<dyn PeerClient>,
    known: Mutex<Vec<Peer>>,
}

impl Peers {
    /// Finds the replicas on `log`, and those whose write ports are at `static_peers`, using
    /// `client`.
    #[must_use]
    pub fn new(
        me: RandomId,
        log: Arc<dyn Log>,
        static_peers: Vec<String>,
        client: Arc<dyn PeerClient>,
    ) -> Self {
        Self(Arc::new(PeersInner {
            me: me.to_string().into(),
            log,
            static_peers,
            client,
            known: Mutex::default(),
        }))
    }

    /// The peers, as of the last request.
    #[must_use]
    pub fn known(&self) -> Vec<Peer> {
        self.0.known.lock().clone()
    }

    /// The URL of a ready peer that has reached its memory limit, if there is one.
    #[must_use]
    pub fn full(&self) -> Option<Box<str>> {
        let known = self.0.known.lock();
        let full = known.iter().find(|peer| peer.ready() && peer.full);
        full.map(|peer| peer.url.clone())
    }

    /// Requests the state of all peers. Ready peers come first, with the highest position first.
    pub async fn ask(&self) -> Vec<Peer> {
        let offers = join_all(self.0.static_peers.iter().map(|url| self.ask_static(url)));
        let (announced, offers) = tokio::join!(self.0.log.peers(), offers);
        let mut found: Vec<Peer> = announced
            .into_iter()
            .map(|announcement| Peer {
                url: announcement.url,
                node: Some(announcement.node),
                version: Some(announcement.version),
                state: announcement.state,
                position: Some(announcement.position),
                full: announcement.full,
            })
            .collect();
        for offer in offers {
            if offer.node.as_ref() == Some(&self.0.me) {
                continue;
            }
            let known = found.iter_mut().find(|peer| {
                peer.url == offer.url || (offer.node.is_some() && peer.node == offer.node)
            });
            match known {
                // The operator's URL takes precedence over the announced one.
                Some(peer) => peer.url = offer.url,
                None => found.push(offer),
            }
        }
        found.sort_by_key(|peer| Reverse((peer.ready(), peer.position)));
        self.0.known.lock().clone_from(&found);
        found
    }

    /// Requests the state of the peers every two seconds; never returns.
    pub async fn watch(&self) {
        if !self.0.log.is_replicated() && self.0.static_peers.is_empty() {
            return std::future::pending().await;
        }
        let mut every = tokio::time::interval(ASK_EVERY);
        loop {
            every.tick().await;
            self.ask().await;
        }
    }

    /// Starts to fetch the backup of `peer`.
    pub(super) async fn backup(&self, peer: &Peer) -> Result<BackupStream, RemoteError> {
        self.0.client.backup(&peer.url).await
    }

    /// Whether `node` is this process.
    pub(super) fn is_me(&self, node: &str) -> bool {
        *self.0.me == *node
    }

    async fn ask_static(&self, url: &str) -> Peer {
        let offer = tokio::time::timeout(HEADERS_WAIT_MAX, self.0.client.backup_headers(url));
        let (node, position, state) = match offer.await {
            Ok(Ok(offer)) => (offer.node, offer.position, READY.into()),
            Ok(Err(RemoteError::ErrorStatus { status: 503, .. })) => {
                (None, None, "not ready".into())
            }
            Ok(Err(error)) => (None, None, error.to_string().into()),
            Err(_elapsed) => (None, None, "no answer".into()),
        };
        Peer {
            url: url.into(),
            node,
            version: None,
            state,
            position,
            full: false,
        }
    }
}
