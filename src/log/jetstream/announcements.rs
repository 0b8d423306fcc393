//! Verifies announcements: they must be signed with the cluster's key for the current request.
//!
//! Any client of the broker may answer a request, or replay an announcement that a replica has sent
//! before. So each request has a random nonce, and each code covers the nonce of its request. An
//! announcement without a valid code neither allows nor prevents the creation of a stream. No
//! replica requests a backup from its URL, because that request carries the password.

use std::collections::BTreeMap;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use super::broker::{Broker, BrokerConnection, PeerQuery};
use crate::log::{Announcement, ClusterKey};

/// The least time between two log lines about forged announcements, or about another process that
/// runs as this replica.
const LOG_EVERY: Duration = Duration::from_secs(30);

/// Checks announcements, and counts those that are not authentic.
pub(super) struct Announcements {
    key: ClusterKey,
    forged: Mutex<ForgedCount>,
    copy_logged_at: Mutex<Option<Instant>>,
}

#[derive(Default)]
struct ForgedCount {
    total: u64,
    logged_at: Option<Instant>,
}

impl Announcements {
    pub(super) fn new(key: ClusterKey) -> Self {
        Self {
            key,
            forged: Mutex::default(),
            copy_logged_at: Mutex::default(),
        }
    }

    /// Requests announcements of the replicas in `query`, and returns their authentic
    /// announcements, one per process. The error is for a log line.
    pub(super) async fn ask(
        &self,
        broker: &dyn Broker,
        connection: &dyn BrokerConnection,
        query: PeerQuery,
    ) -> Result<Vec<Announcement>, String> {
        let nonce = broker.random_id().map_err(|error| error.to_string())?;
        let announced = connection.ask_peers(query, nonce).await?;
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

    /// How many announcements were not authentic.
    pub(super) fn forged(&self) -> u64 {
        self.forged.lock().total
    }

    /// Logs that another process runs as this replica, which deletes this one's consumers. Two that
    /// start at the same moment do not detect each other at the start.
    pub(super) fn report_copy(&self, copy: &Announcement) {
        if is_due(&mut self.copy_logged_at.lock()) {
            let (url, replica) = (&*copy.url, &*copy.replica);
            tracing::error!(
                url,
                replica,
                "another process runs as this replica: stop one, and remove replica-id from its \
                 data directory"
            );
        }
    }

    fn reject(&self, announcement: &Announcement) {
        let mut forged = self.forged.lock();
        forged.total += 1;
        if is_due(&mut forged.logged_at) {
            let (url, replica) = (&*announcement.url, &*announcement.replica);
            tracing::warn!(
                url,
                replica,
                ignored_total = forged.total,
                "ignored an announcement that is not signed with this cluster's password"
            );
        }
    }
}

/// Whether a line last logged at `logged_at` may be logged again; if so, sets that to now.
fn is_due(logged_at: &mut Option<Instant>) -> bool {
    let now = Instant::now();
    let due = |at: Instant| now.saturating_duration_since(at) >= LOG_EVERY;
    let is_due = logged_at.is_none_or(due);
    if is_due {
        *logged_at = Some(now);
    }
    is_due
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
    fn a_forged_announcement_is_rejected_and_does_not_replace_an_authentic_one() {
        let ours = Announcements::new(ClusterKey::derive("ours"));
        let theirs = Announcements::new(ClusterKey::derive("theirs"));
        let (a, b) = (
            ours.sign(of("a", "http://a"), "now"),
            ours.sign(of("b", "http://b"), "now"),
        );
        let mut altered = b.clone();
        altered.url = "http://attacker".into();
        let announced = vec![
            a.clone(),
            of("a", "http://attacker"),
            theirs.sign(of("a", "http://attacker"), "now"),
            ours.sign(of("a", "http://replayed"), "before"),
            altered,
            b.clone(),
            of("c", "http://attacker"),
        ];
        assert_eq!(ours.authentic(announced, "now"), [a, b]);
        assert_eq!(ours.forged(), 5);
    }
}
