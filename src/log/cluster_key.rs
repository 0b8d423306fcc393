//! The key that the replicas of a cluster share, and the signatures that they make with it.
//!
//! Any client that may publish to the broker can write a checkpoint or an announcement. Only a
//! replica that knows the cluster's password can sign one. `docs/internals/protocol.md` specifies
//! the signed bytes.

use std::sync::Arc;

use hmac::{Hmac, Mac as _};
use parking_lot::RwLock;
use sha2::Sha256;

use super::{Announcement, Checkpoint, LogId, Mac};

/// The context of the key derivation. Another version of the format has another context.
const KEY_CONTEXT: &[u8] = b"gradestore cluster key 1";
const CHECKPOINT_CONTEXT: &[u8] = b"gradestore checkpoint 1\n";
const ANNOUNCEMENT_CONTEXT: &[u8] = b"gradestore announcement 1\n";

/// Signs and verifies checkpoints and announcements. Clones share the key, which a new password
/// replaces. Never printed.
#[derive(Clone)]
pub struct ClusterKey(Arc<RwLock<Hmac<Sha256>>>);

impl ClusterKey {
    /// The key of the cluster with this password.
    #[must_use]
    pub fn derive(password: &str) -> Self {
        Self(Arc::new(RwLock::new(key_of(password))))
    }

    /// Replaces the key by that of another password. Codes of the old key no longer count, so that
    /// its holders count as strangers.
    pub fn replace(&self, password: &str) {
        *self.0.write() = key_of(password);
    }

    fn hmac(&self) -> Hmac<Sha256> {
        self.0.read().clone()
    }

    /// The code of `checkpoint` on `log`. Ignores its `mac`.
    #[must_use]
    pub fn sign_checkpoint(&self, log: &LogId, checkpoint: &Checkpoint) -> Mac {
        truncated(self.checkpoint_hmac(log, checkpoint))
    }

    /// Whether a holder of the key signed `checkpoint` for `log`. Compares in constant time.
    #[must_use]
    pub fn verify_checkpoint(&self, log: &LogId, checkpoint: &Checkpoint) -> bool {
        let expected = self.checkpoint_hmac(log, checkpoint);
        expected.verify_truncated_left(&checkpoint.mac.0).is_ok()
    }

    /// The code of `announcement` as the answer to the request with this nonce. Ignores its `mac`.
    #[must_use]
    pub fn sign_announcement(&self, announcement: &Announcement, nonce: &str) -> Mac {
        truncated(self.announcement_hmac(announcement, nonce))
    }

    /// Whether a holder of the key signed `announcement` as the answer to the request with this
    /// nonce. Compares in constant time.
    #[must_use]
    pub fn verify_announcement(&self, announcement: &Announcement, nonce: &str) -> bool {
        let expected = self.announcement_hmac(announcement, nonce);
        let mac = announcement.mac.as_ref();
        mac.is_some_and(|mac| expected.verify_truncated_left(&mac.0).is_ok())
    }

    fn checkpoint_hmac(&self, log: &LogId, checkpoint: &Checkpoint) -> Hmac<Sha256> {
        let Checkpoint {
            replica,
            position,
            chain,
            digest,
            round,
            mac: _,
        } = checkpoint;
        let mut hmac = self.hmac();
        hmac.update(CHECKPOINT_CONTEXT);
        update_text(&mut hmac, &log.0);
        hmac.update(&replica.bytes());
        hmac.update(&position.to_le_bytes());
        hmac.update(&chain.0.to_le_bytes());
        hmac.update(&digest.0.to_le_bytes());
        hmac.update(&round.to_le_bytes());
        hmac
    }

    /// Covers every field, so that nobody can make a ready replica look unready, or one that is
    /// behind look up to date. This costs a microsecond per answer.
    fn announcement_hmac(&self, announcement: &Announcement, nonce: &str) -> Hmac<Sha256> {
        let Announcement {
            node,
            replica,
            version,
            log_id,
            url,
            state,
            position,
            chain,
            full,
            mac: _,
        } = announcement;
        let mut hmac = self.hmac();
        hmac.update(ANNOUNCEMENT_CONTEXT);
        update_text(&mut hmac, nonce);
        for text in [node, replica, version, log_id, url, state] {
            update_text(&mut hmac, text);
        }
        hmac.update(&position.to_le_bytes());
        hmac.update(&chain.0.to_le_bytes());
        hmac.update(&[u8::from(*full)]);
        hmac
    }
}

fn key_of(password: &str) -> Hmac<Sha256> {
    let mut derived = keyed(password.as_bytes());
    derived.update(KEY_CONTEXT);
    keyed(&derived.finalize().into_bytes())
}

#[expect(clippy::expect_used, reason = "HMAC takes keys of any length")]
fn keyed(key: &[u8]) -> Hmac<Sha256> {
    Hmac::new_from_slice(key).expect("HMAC takes keys of any length")
}

/// Hashes the length first, so that the boundaries between texts are signed, too.
fn update_text(hmac: &mut Hmac<Sha256>, text: &str) {
    hmac.update(&(text.len() as u64).to_le_bytes());
    hmac.update(text.as_bytes());
}

fn truncated(hmac: Hmac<Sha256>) -> Mac {
    let mut mac = Mac::default();
    let code = hmac.finalize().into_bytes();
    for (byte, code) in mac.0.iter_mut().zip(code) {
        *byte = code;
    }
    mac
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grade::Digest;
    use crate::log::{Chain, RandomId};

    fn log() -> LogId {
        LogId("1c5f".into())
    }

    fn signed(key: &ClusterKey) -> Checkpoint {
        let mut checkpoint = Checkpoint {
            replica: RandomId::of(3),
            position: 7,
            chain: Chain(1 << 90),
            digest: Digest(9),
            round: 1,
            mac: Mac::default(),
        };
        checkpoint.mac = key.sign_checkpoint(&log(), &checkpoint);
        checkpoint
    }

    const NONCE: &str = "5d0e6c0e8d7f4e6f9f0a7a3b5c1d2e3f";

    fn announced(key: &ClusterKey) -> Announcement {
        let mut announcement = Announcement {
            node: "n".into(),
            replica: "r".into(),
            version: "0.1.0".into(),
            log_id: "none".into(),
            url: "http://10.0.0.5:8080".into(),
            state: "ready".into(),
            position: 7,
            chain: Chain(5),
            full: false,
            mac: None,
        };
        announcement.mac = Some(key.sign_announcement(&announcement, NONCE));
        announcement
    }

    #[test]
    fn every_field_of_a_checkpoint_is_signed() {
        let key = ClusterKey::derive("secret");
        let checkpoint = signed(&key);
        assert!(key.verify_checkpoint(&log(), &checkpoint));
        assert!(!key.verify_checkpoint(&LogId("1c5".into()), &checkpoint));
        assert!(!ClusterKey::derive("secrets").verify_checkpoint(&log(), &checkpoint));
        let changed: [fn(&mut Checkpoint); 6] = [
            |checkpoint| checkpoint.replica = RandomId::of(4),
            |checkpoint| checkpoint.position += 1,
            |checkpoint| checkpoint.chain.0 += 1,
            |checkpoint| checkpoint.digest.0 += 1,
            |checkpoint| checkpoint.round += 1,
            |checkpoint| checkpoint.mac.0[15] ^= 1,
        ];
        for (field, change) in changed.into_iter().enumerate() {
            let mut forged = checkpoint;
            change(&mut forged);
            assert!(!key.verify_checkpoint(&log(), &forged), "{field}");
        }
    }

    #[test]
    fn clones_share_a_replaced_key() {
        let (key, old) = (ClusterKey::derive("old"), ClusterKey::derive("old"));
        let clone = key.clone();
        key.replace("new");
        assert!(ClusterKey::derive("new").verify_checkpoint(&log(), &signed(&clone)));
        assert!(!clone.verify_checkpoint(&log(), &signed(&old)));
    }

    #[test]
    fn every_field_of_an_announcement_and_its_boundaries_are_signed() {
        let key = ClusterKey::derive("secret");
        let announcement = announced(&key);
        assert!(key.verify_announcement(&announcement, NONCE));
        assert!(!key.verify_announcement(&announcement, &NONCE[1..]));
        assert!(!key.verify_announcement(&announcement, ""));
        let changed: [fn(&mut Announcement); 10] = [
            |announcement| announcement.node = "x".into(),
            |announcement| announcement.replica = "x".into(),
            |announcement| announcement.version = "x".into(),
            |announcement| announcement.log_id = "x".into(),
            |announcement| announcement.url = "http://10.0.0.6:8080".into(),
            |announcement| announcement.state = "diverged".into(),
            |announcement| announcement.position += 1,
            |announcement| announcement.chain.0 += 1,
            |announcement| (announcement.node, announcement.replica) = ("nr".into(), "".into()),
            |announcement| announcement.mac = None,
        ];
        for (field, change) in changed.into_iter().enumerate() {
            let mut forged = announcement.clone();
            change(&mut forged);
            assert!(!key.verify_announcement(&forged, NONCE), "{field}");
        }
    }

    /// Programs that follow the stream can verify the same: see `docs/internals/protocol.md`. The
    /// values were computed with Python's `hmac` and `hashlib`.
    #[test]
    fn known_codes() {
        let key = ClusterKey::derive("secret");
        assert_eq!(
            signed(&key).mac.to_string(),
            "bf24c74e7ddb57bd61e7ff7099b2c16c"
        );
        assert_eq!(
            announced(&key).mac.unwrap().to_string(),
            "fcab093241234b1fe37057ee963d0079"
        );
    }
}
