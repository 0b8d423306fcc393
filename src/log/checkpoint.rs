//! A replica's vote on its state, in the log.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{Chain, RandomId, Seq};
use crate::grade::Digest;
use crate::sys::hex;

/// A replica's vote on the state right after a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checkpoint {
    /// The replica.
    pub replica: RandomId,
    /// The batch. A checkpoint at 0 is no vote: it only lets others vote on the batch that carries
    /// it.
    pub position: Seq,
    /// The replica's chain at that batch.
    pub chain: Chain,
    /// The digest of all its records then.
    pub digest: Digest,
    /// How often the replica has voted on that batch, including this vote. A copy of an older vote
    /// has no effect.
    pub round: u32,
    /// Proves that the sender knows the cluster's password.
    pub mac: Mac,
}

/// A message authentication code. Shown as 32 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Mac(pub [u8; 16]);

impl Mac {
    /// Parses a code in its displayed form.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        hex::parse(text).map(|number| Self(number.to_be_bytes()))
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

impl Serialize for Mac {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Mac {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        Self::parse(&text).ok_or_else(|| serde::de::Error::custom("not 32 hexadecimal digits"))
    }
}

impl Checkpoint {
    /// Parses the displayed form: replica, position, chain, digest, round and message authentication
    /// code, separated by a space.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let mut words = text.split(' ');
        let checkpoint = Self {
            replica: RandomId::parse(words.next()?)?,
            position: words.next()?.parse().ok()?,
            chain: Chain::parse(words.next()?)?,
            digest: Digest::parse(words.next()?)?,
            round: words.next()?.parse().ok()?,
            mac: Mac::parse(words.next()?)?,
        };
        words.next().is_none().then_some(checkpoint)
    }
}

impl fmt::Display for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            replica,
            position,
            chain,
            digest,
            round,
            mac,
        } = self;
        write!(f, "{replica} {position} {chain} {digest} {round} {mac}")
    }
}
