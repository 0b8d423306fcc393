//! HTTP Basic authentication (RFC 7617) with one user name and password.

use std::fmt;
use std::sync::Arc;

use axum_extra::headers::authorization::{Basic, Credentials as _};
use axum_extra::headers::{Authorization, HeaderMapExt};
use http::header::AUTHORIZATION;
use http::{HeaderMap, HeaderValue};
use parking_lot::RwLock;
use subtle::{Choice, ConstantTimeEq};

use super::error::ApiError;
use crate::log::ClusterKey;
use crate::replication::peer_client::ClientCredentials;

/// The user name and password of a node, which its write port and `/backup` require. Clones share
/// the password, which may be replaced.
#[derive(Clone)]
pub struct Credentials {
    account: ClientCredentials,
    key: ClusterKey,
    /// The `Authorization` header as nearly every client encodes it.
    header: Arc<RwLock<HeaderValue>>,
    #[cfg(feature = "measure")]
    accepts_all: bool,
}

impl Credentials {
    /// Credentials of this name and password.
    #[must_use]
    pub fn new(username: &str, password: &str) -> Self {
        Self {
            account: ClientCredentials::new(username, password),
            key: ClusterKey::derive(password),
            header: Arc::new(RwLock::new(header_of(username, password))),
            #[cfg(feature = "measure")]
            accepts_all: false,
        }
    }

    /// Accepts every client, to measure the cost of the check.
    #[cfg(feature = "measure")]
    pub fn accept_all(&mut self) {
        self.accepts_all = true;
    }

    /// The account for requests to other nodes, which all have the same credentials.
    #[must_use]
    pub fn for_client(&self) -> ClientCredentials {
        self.account.clone()
    }

    /// The key that the nodes with this password share.
    #[must_use]
    pub fn cluster_key(&self) -> ClusterKey {
        self.key.clone()
    }

    /// Replaces the password: for requests that arrive from now on, for requests to other nodes,
    /// and for the key of the cluster. Returns whether it differs from the one before.
    pub fn replace_password(&self, password: &str) -> bool {
        let changed = *self.account.password() != *password;
        self.account.replace_password(password);
        self.key.replace(password);
        *self.header.write() = header_of(self.account.username(), password);
        changed
    }

    /// Whether the value of an `Authorization` header is these credentials in their usual encoding.
    /// Other encodings may be valid too: [`check`](Self::check) decides.
    pub(super) fn matches(&self, sent: Option<&[u8]>) -> bool {
        #[cfg(feature = "measure")]
        if self.accepts_all {
            return true;
        }
        sent.is_some_and(|sent| bool::from(sent.ct_eq(self.header.read().as_bytes())))
    }

    /// Checks a request's `Authorization` header, in constant time.
    ///
    /// # Errors
    /// The header is missing, repeated, malformed or wrong.
    pub fn check(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        let mut sent = headers.get_all(AUTHORIZATION).iter();
        let (first, second) = (sent.next(), sent.next());
        // Of two headers, a proxy in front of this node may have checked the other one.
        if second.is_some() {
            return Err(ApiError::Unauthorized);
        }
        // Equal bytes need no decoding.
        if self.matches(first.map(HeaderValue::as_bytes)) {
            return Ok(());
        }
        let given: Authorization<Basic> = headers.typed_get().ok_or(ApiError::Unauthorized)?;
        let username = equal(given.username(), self.account.username());
        let password = equal(given.password(), &self.account.password());
        match bool::from(username & password) {
            true => Ok(()),
            false => Err(ApiError::Unauthorized),
        }
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials(..)")
    }
}

fn header_of(username: &str, password: &str) -> HeaderValue {
    Authorization::basic(username, password).0.encode()
}

/// Compares in constant time, also for different lengths.
fn equal(given: &str, wanted: &str) -> Choice {
    let same_length = given.len() == wanted.len();
    let compared = if same_length { given } else { wanted };
    compared.as_bytes().ct_eq(wanted.as_bytes()) & Choice::from(u8::from(same_length))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(credentials: &Credentials, sent: &[&str]) -> bool {
        let mut headers = HeaderMap::new();
        for value in sent {
            headers.append(AUTHORIZATION, value.parse().unwrap());
        }
        credentials.check(&headers).is_ok()
    }

    #[test]
    fn clones_share_a_replaced_password() {
        let credentials = Credentials::new("a", "b");
        let (clone, client) = (credentials.clone(), credentials.for_client());
        assert!(!credentials.replace_password("b"));
        assert!(credentials.replace_password("b:c"));
        for sent in ["Basic YTpiOmM=", "bASIC  YTpiOmM="] {
            assert!(checked(&clone, &[sent]), "{sent}");
        }
        for old in ["Basic YTpi", "bASIC  YTpi"] {
            assert!(!checked(&clone, &[old]), "{old}");
        }
        assert_eq!(&*client.password(), "b:c");
    }

    #[test]
    fn one_right_header_is_let_in() {
        let credentials = Credentials::new("a", "b:c");
        let check = |sent: &[&str]| checked(&credentials, sent);
        assert!(check(&["Basic YTpiOmM="]));
        assert!(check(&["bASIC  YTpiOmM="]));
        for wrong in [
            &[][..],
            &["Basic YTpiOmM"],
            &["BasicYTpiOmM="],
            &["Bearer YTpiOmM="],
            &["Basic YTpiOmM=", "Basic YTpiOmM="],
            &["Basic YTpiOmM=", "Basic eDp5"],
        ] {
            assert!(!check(wrong), "{wrong:?}");
        }
    }
}
