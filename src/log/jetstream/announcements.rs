//! Which announcements count: those that a holder of the cluster's key signed.
//!
//! Anybody on the broker may answer for the service. An announcement without a valid code neither
//! lets a stream be created nor prevents it, and nobody asks its URL for a backup: the request would
//! carry the password.

use std::collections::BTreeMap;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

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

    /// This replica's own announcement, signed.
    pub(super) fn sign(&self, mut announcement: Announcement) -> Announcement {
        announcement.mac = Some(self.key.sign_announcement(&announcement));
        announcement
    }

    /// The authentic ones of `announced`, one a process.
    pub(super) fn authentic(&self, announced: Vec<Announcement>) -> Vec<Announcement> {
        let mut found = BTreeMap::new();
        for announcement in announced {
            match self.key.verify_announcement(&announcement) {
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
                "ignored an announcement that is not signed with this cluster's password"
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

    #[test]
    fn a_forged_announcement_neither_counts_nor_hides_an_authentic_one() {
        let ours = Announcements::new(ClusterKey::derive("ours"));
        let theirs = Announcements::new(ClusterKey::derive("theirs"));
        let (a, b) = (
            ours.sign(of("a", "http://a")),
            ours.sign(of("b", "http://b")),
        );
        let mut altered = b.clone();
        altered.url = "http://stranger".into();
        let announced = vec![
            a.clone(),
            of("a", "http://stranger"),
            theirs.sign(of("a", "http://stranger")),
            altered,
            b.clone(),
            of("c", "http://stranger"),
        ];
        assert_eq!(ours.authentic(announced), [a, b]);
        assert_eq!(ours.forged(), 4);
    }
}
