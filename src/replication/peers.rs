//! The other replicas on this log: those that the broker knows of and those given by hand.

use std::cmp::Reverse;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use parking_lot::Mutex;
use serde::Serialize;

use crate::log::{Log, RandomId, Seq};
use crate::remote::{Incoming, Reach, RemoteError};

/// How often the others are asked.
const ASK_EVERY: Duration = Duration::from_secs(2);
/// How long a peer may be silent before it is taken for away.
pub const SILENCE_MAX: Duration = Duration::from_secs(10);
/// How long one that was given by hand may take to say how far it is.
const OFFER_WAIT_MAX: Duration = Duration::from_secs(2);
/// What a peer that gives backups says of itself.
const READY: &str = "ready";

/// Another replica, as it was when it was last asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Peer {
    /// Where its write port is reached.
    pub url: Box<str>,
    /// Its process start; `null` while one given by hand has not answered.
    pub node: Option<Box<str>>,
    /// Its program's version, where the broker told.
    pub version: Option<Box<str>>,
    /// `ready`, or why not in a word or more.
    pub state: Box<str>,
    /// The last batch that it had applied.
    pub position: Option<Seq>,
    /// Whether it had reached its memory limit.
    pub full: bool,
}

impl Peer {
    /// Whether it would give a backup.
    #[must_use]
    pub fn ready(&self) -> bool {
        &*self.state == READY
    }

    /// Whether it has said itself that it would not.
    pub(super) fn announced_unready(&self) -> bool {
        self.version.is_some() && !self.ready()
    }
}

/// Finds the other replicas. Clones are the same.
#[derive(Clone)]
pub struct Peers(Arc<Inner>);

struct Inner {
    me: Box<str>,
    log: Arc<dyn Log>,
    by_hand: Vec<String>,
    reach: Arc<dyn Reach>,
    known: Mutex<Vec<Peer>>,
}

impl Peers {
    /// Those on `log`, and those whose write ports are at `by_hand`, asked by way of `reach`.
    #[must_use]
    pub fn new(
        me: RandomId,
        log: Arc<dyn Log>,
        by_hand: Vec<String>,
        reach: Arc<dyn Reach>,
    ) -> Self {
        Self(Arc::new(Inner {
            me: me.to_string().into(),
            log,
            by_hand,
            reach,
            known: Mutex::default(),
        }))
    }

    /// Those that answered last time.
    #[must_use]
    pub fn known(&self) -> Vec<Peer> {
        self.0.known.lock().clone()
    }

    /// Where a ready one is reached that had reached its memory limit, if there is one.
    #[must_use]
    pub fn full(&self) -> Option<Box<str>> {
        let known = self.0.known.lock();
        let full = known.iter().find(|peer| peer.ready() && peer.full);
        full.map(|peer| peer.url.clone())
    }

    /// Asks all of them; the one that is furthest comes first.
    pub async fn ask(&self) -> Vec<Peer> {
        let offers = join_all(self.0.by_hand.iter().map(|url| self.ask_by_hand(url)));
        let (announced, offers) = tokio::join!(self.0.log.peers(), offers);
        let mut found: Vec<Peer> = announced
            .into_iter()
            .map(|said| Peer {
                url: said.url,
                node: Some(said.node),
                version: Some(said.version),
                state: said.state,
                position: Some(said.position),
                full: said.full,
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
                // Who gave it by hand knows a way.
                Some(peer) => peer.url = offer.url,
                None => found.push(offer),
            }
        }
        found.sort_by_key(|peer| Reverse((peer.ready(), peer.position)));
        self.0.known.lock().clone_from(&found);
        found
    }

    /// Asks them now and then, for ever.
    pub async fn watch(&self) {
        if !self.0.log.is_replicated() && self.0.by_hand.is_empty() {
            return std::future::pending().await;
        }
        let mut every = tokio::time::interval(ASK_EVERY);
        loop {
            every.tick().await;
            self.ask().await;
        }
    }

    /// Begins to fetch the backup of `peer`.
    pub(super) async fn backup(&self, peer: &Peer) -> Result<Incoming, RemoteError> {
        self.0.reach.backup(&peer.url).await
    }

    /// Whether `node` is this process.
    pub(super) fn is_me(&self, node: &str) -> bool {
        *self.0.me == *node
    }

    async fn ask_by_hand(&self, url: &str) -> Peer {
        let offer = tokio::time::timeout(OFFER_WAIT_MAX, self.0.reach.offer(url));
        let (node, position, state) = match offer.await {
            Ok(Ok(offer)) => (offer.node, offer.position, READY.into()),
            Ok(Err(RemoteError::Refused { status: 503, .. })) => (None, None, "not ready".into()),
            Ok(Err(error)) => (None, None, error.to_string().into()),
            Err(_elapsed) => (None, None, "silent".into()),
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
