//! Which announcements count: those that a holder of the cluster's key signed for this question.
//!
//! Anybody on the broker may answer a question, also with an announcement that a replica has sent
//! before. So each question has a random nonce, and each code is over the nonce of the question that
//! it answers. An announcement without a valid code neither
//! lets a stream be created nor prevents it, and nobody asks its URL for a backup: the request would
//! carry the password.

use std::collections::BTreeMap;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use super::broker::{Asked, Broker, Connection};
use crate::log::{Announcement, ClusterKey};

/// How often forged announcements are logged at most.
const LOG_EVERY: Duration = Duration::from_secs(30);

/// Checks announcements, and counts those that are not authentic.
pub(super) struct Announcements {
    key: ClusterKey,
    forged: Mutex<Forged>,
}

#[derive(Default)]
struct Forged {
    total: u64,
    logged_at: Option<Instant>,
}

impl Announcements {
    pub(super) fn new(key: ClusterKey) -> Self {
        Self {
            key,
            forged: Mutex::default(),
        }
    }

    /// Asks the replicas that `to` names; their authentic announcements, one a process. The error is
    /// for a log line.
    pub(super) async fn ask(
        &self,
        broker: &dyn Broker,
        connection: &dyn Connection,
        to: Asked,
    ) -> Result<Vec<Announcement>, String> {
        let nonce = broker.random_id().map_err(|error| error.to_string())?;
        let announced = connection.ask_peers(to, nonce).await?;
        Ok(self.authentic(announced, &nonce.to_string()))
    }

    fn authentic(&self, announced: Vec<Announcement>, nonce: &str) -> Vec<Announcement> {
        let mut found = BTreeMap::new();
        for announcement in announced {
            match self.key.verify_announcement(&announcement, nonce) {
                true => drop(found.insert(announcement.node.clone(), announcement)),
                false => self.reject(&announcement),
            }
        }
        found.into_values().collect()
    }

    /// How many were not authentic.
    pub(super) fn forged(&self) -> u64 {
        self.forged.lock().total
    }

    fn reject(&self, announcement: &Announcement) {
        let mut forged = self.forged.lock();
        forged.total += 1;
        let now = Instant::now();
        let due = |at: Instant| now.saturating_duration_since(at) >= LOG_EVERY;
        if forged.logged_at.is_none_or(due) {
            forged.logged_at = Some(now);
            let (url, replica, total) = (&*announcement.url, &*announcement.replica, forged.total);
            tracing::warn!(
                url,
                replica,
                total,
                "ignored an announcement that is not signed with this cluster's password, or not \
                 for this question"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::Chain;

    fn of(node: &str, url: &str) -> Announcement {
        Announcement {
            node: node.into(),
            replica: node.into(),
            version: "0.1.0".into(),
            log_id: "none".into(),
            url: url.into(),
            state: "ready".into(),
            position: 0,
            chain: Chain::default(),
            full: false,
            mac: None,
        }
    }

    impl Announcements {
        fn sign(&self, mut announcement: Announcement, nonce: &str) -> Announcement {
            announcement.mac = Some(self.key.sign_announcement(&announcement, nonce));
            announcement
        }
    }

    #[test]
    fn a_forged_announcement_neither_counts_nor_hides_an_authentic_one() {
        let ours = Announcements::new(ClusterKey::derive("ours"));
        let theirs = Announcements::new(ClusterKey::derive("theirs"));
        let (a, b) = (
            ours.sign(of("a", "http://a"), "now"),
            ours.sign(of("b", "http://b"), "now"),
        );
        let mut altered = b.clone();
        altered.url = "http://stranger".into();
        let announced = vec![
            a.clone(),
            of("a", "http://stranger"),
            theirs.sign(of("a", "http://stranger"), "now"),
            ours.sign(of("a", "http://former"), "before"),
            altered,
            b.clone(),
            of("c", "http://stranger"),
        ];
        assert_eq!(ours.authentic(announced, "now"), [a, b]);
        assert_eq!(ours.forged(), 5);
    }
}
