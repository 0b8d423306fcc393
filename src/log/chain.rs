//! A hash of the log's history, and the positions that carry it.
//!
//! Two replicas whose chains are equal at a position have read the same batches up to there. A
//! position without its chain says only how long a history is, not which one.

use std::fmt;

use bytes::Bytes;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use xxhash_rust::xxh3::{Xxh3Default, xxh3_128};

use super::{LogId, RandomId, Seq};
use crate::sys::hex;

/// The hash of all batches up to a position. Shown as 32 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Chain(pub u128);

impl Chain {
    /// The chain of `log` after position `base`, where its numbering starts.
    #[must_use]
    pub fn base(log: &LogId, base: Seq) -> Self {
        let mut bytes = log.0.as_bytes().to_vec();
        bytes.extend_from_slice(&base.to_le_bytes());
        Self(xxh3_128(&bytes))
    }

    /// Parses a chain in its displayed form.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        hex::parse(text).map(Self)
    }

    fn next(self, seq: Seq, time_ns: u64, entry: ChainEntry<'_>) -> Self {
        let mut hash = Xxh3Default::new();
        hash.update(&self.0.to_le_bytes());
        hash.update(&seq.to_le_bytes());
        hash.update(&time_ns.to_le_bytes());
        if let ChainEntry::Batch(batch) = entry {
            hash.update(&[batch.format]);
            hash.update(&batch.id.writer.0.to_le_bytes());
            hash.update(&batch.id.seq.to_le_bytes());
            hash.update(batch.payload);
        }
        Self(hash.digest128())
    }
}

impl fmt::Display for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl Serialize for Chain {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Chain {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        Self::parse(&text).ok_or_else(|| serde::de::Error::custom("not 32 hexadecimal digits"))
    }
}

/// A batch's identity: its writer and the writer's own count of its batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BatchId {
    /// Its writer; all zeros if the message names none.
    pub writer: RandomId,
    /// The writer's sequence number of the batch, from 1.
    pub seq: u64,
}

impl BatchId {
    /// A batch whose message names no writer.
    pub const UNNAMED: Self = Self {
        writer: RandomId(0),
        seq: 0,
    };

    /// Parses an identity in its displayed form.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (writer, seq) = text.split_once('-')?;
        Some(Self {
            writer: RandomId::parse(writer)?,
            seq: seq.parse().ok()?,
        })
    }
}

impl fmt::Display for BatchId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.writer, self.seq)
    }
}

/// A message of the log as the chain records it.
#[derive(Debug, Clone, Copy)]
pub enum ChainEntry<'a> {
    /// A message that all replicas skip.
    Skipped,
    /// A batch, which all replicas apply.
    Batch(StoredBatch<'a>),
}

/// A batch as a log stores it.
#[derive(Debug, Clone, Copy)]
pub struct StoredBatch<'a> {
    /// The format of the payload.
    pub format: u8,
    /// Its identity.
    pub id: BatchId,
    /// The batch as it was sent. A log that no other process reads may leave it out.
    pub payload: &'a [u8],
}

/// A message of the log as it was delivered. Clones share the payload.
#[derive(Debug, Clone)]
pub enum Message {
    /// All replicas skip it.
    Skipped,
    /// All replicas apply it.
    Batch {
        /// The format of the payload.
        format: u8,
        /// Its identity.
        id: BatchId,
        /// The batch as it was sent.
        payload: Bytes,
    },
}

impl Message {
    /// The message as the chain records it.
    #[must_use]
    pub fn chain_entry(&self) -> ChainEntry<'_> {
        match self {
            Self::Skipped => ChainEntry::Skipped,
            Self::Batch {
                format,
                id,
                payload,
            } => ChainEntry::Batch(StoredBatch {
                format: *format,
                id: *id,
                payload,
            }),
        }
    }

    pub(super) fn payload_bytes(&self) -> usize {
        match self {
            Self::Skipped => 0,
            Self::Batch { payload, .. } => payload.len(),
        }
    }
}

/// A position in a log's history.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// The last batch; 0 before the first one.
    pub seq: Seq,
    /// When the log stored that batch, in nanoseconds since 1970; before the first one, when the
    /// log or the node started.
    pub time_ns: u64,
    /// The chain up to and including that batch.
    pub chain: Chain,
    /// The chain of the position before, for checking the batch that the log holds at this
    /// position. Zero before the first batch.
    pub previous: Chain,
}

impl Position {
    /// The position before the first batch of `log`, which is `base` + 1.
    #[must_use]
    pub fn base(log: &LogId, base: Seq, time_ns: u64) -> Self {
        Self {
            seq: base,
            time_ns,
            chain: Chain::base(log, base),
            previous: Chain::default(),
        }
    }

    /// The position after this one, of the message `entry`.
    #[must_use]
    pub fn next(&self, time_ns: u64, entry: ChainEntry<'_>) -> Self {
        let seq = self.seq + 1;
        Self {
            seq,
            time_ns,
            chain: self.chain.next(seq, time_ns, entry),
            previous: self.chain,
        }
    }

    /// Whether the history up to here is that of `other`.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        (self.seq, self.chain) == (other.seq, other.chain)
    }

    /// Whether the message at this position is `entry`.
    #[must_use]
    pub fn matches(&self, entry: ChainEntry<'_>) -> bool {
        self.previous.next(self.seq, self.time_ns, entry) == self.chain
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start() -> Position {
        Position::base(&LogId("log".into()), 0, 5)
    }

    fn batch(seq: u64, payload: &[u8]) -> ChainEntry<'_> {
        let writer = RandomId(7);
        let id = BatchId { writer, seq };
        ChainEntry::Batch(StoredBatch {
            format: 1,
            id,
            payload,
        })
    }

    #[test]
    fn every_part_of_the_history_changes_the_chain() {
        let one = start().next(10, batch(1, b"[]"));
        let others = [
            start().next(11, batch(1, b"[]")),
            start().next(10, batch(2, b"[]")),
            start().next(10, batch(1, b"[1]")),
            start().next(10, ChainEntry::Skipped),
            Position::base(&LogId("gol".into()), 0, 5).next(10, batch(1, b"[]")),
            Position::base(&LogId("log".into()), 1, 5).next(10, batch(1, b"[]")),
            one.next(10, batch(1, b"[]")),
        ];
        for other in others {
            assert_ne!(other.chain, one.chain);
        }
        assert_eq!(start().next(10, batch(1, b"[]")), one);
    }

    #[test]
    fn a_position_matches_only_its_own_batch() {
        let position = start().next(1, batch(1, b"a")).next(2, batch(2, b"b"));
        assert!(position.matches(batch(2, b"b")));
        for other in [batch(2, b"a"), batch(1, b"b"), ChainEntry::Skipped] {
            assert!(!position.matches(other));
        }
    }

    /// Programs that follow the stream compute the same: see `docs/internals/protocol.md`. The
    /// values were computed with Python's `xxhash` from the definition there.
    #[test]
    fn the_chain_of_a_known_history() {
        let position = start()
            .next(10, batch(1, b"[]"))
            .next(20, ChainEntry::Skipped);
        assert_eq!(
            [position.previous.to_string(), position.chain.to_string()],
            [
                "8c2214dc161ac775c6c8e9fa7afe89be",
                "7a4a4614dcd6f780d4d9c4fd05dccc1c"
            ]
        );
    }

    #[test]
    fn displayed_values_round_trip() {
        let chain = Chain(u128::MAX - 3);
        assert_eq!(Chain::parse(&chain.to_string()), Some(chain));
        let id = BatchId {
            writer: RandomId(9),
            seq: u64::MAX,
        };
        assert_eq!(BatchId::parse(&id.to_string()), Some(id));
        for wrong in ["", "-1", "9-1", "00000000000000000000000000000009-", "x"] {
            assert_eq!(BatchId::parse(wrong), None, "{wrong}");
        }
    }
}
