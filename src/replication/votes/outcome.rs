//! The result of a vote for the replica that reads it.

use std::fmt;

use crate::grade::Digest;
use crate::log::{Chain, RandomId, Seq};

/// Why a replica's state may be wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DigestMismatch {
    /// The comparison point.
    pub(crate) position: Seq,
    /// This replica's digest there.
    pub(crate) own: Digest,
    /// The digest with the most votes among the others.
    pub(crate) other: Digest,
    /// A replica that voted for it.
    pub(crate) replica: RandomId,
    /// Whether a majority voted for it.
    pub(crate) majority: bool,
}

impl fmt::Display for DigestMismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            position,
            own,
            other,
            replica,
            majority,
        } = self;
        match majority {
            true => write!(
                f,
                "digest mismatch with a majority at batch {position}: this replica has {own}, replica \
                 {replica} and others have {other}; waiting for more votes"
            ),
            false => write!(
                f,
                "digest mismatch without a majority at batch {position}: this replica has {own}, replica \
                 {replica} has {other}; if this persists, find the wrong replica, stop it and delete \
                 its data directory; the other becomes ready within 30 s"
            ),
        }
    }
}

/// How the vote of another replica compares with this replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Comparison {
    /// There was nothing to compare.
    None,
    /// The digests are the same.
    Same,
    /// The digests differ.
    Different {
        /// This replica's digest.
        own: Digest,
    },
    /// The other replica read another history up to the point.
    Fork {
        /// This replica's chain.
        own: Chain,
    },
    /// The other replica has voted for another digest at this point before.
    Equivocation {
        /// Its first digest, which counts.
        first: Digest,
    },
}

/// The conclusion of this replica from a vote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Nothing new.
    Unchanged,
    /// A majority has another digest. More votes may change that until the point is settled.
    Contradicted(DigestMismatch),
    /// The point is settled, and this replica's digest does not have most of the votes.
    Undecided(DigestMismatch),
    /// The point is settled, and a majority has another digest.
    Overruled(DigestMismatch),
    /// A majority agrees with this replica, after a mismatch.
    Upheld(Seq),
}

/// The result of observing a vote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct VoteOutcome {
    pub(crate) comparison: Comparison,
    pub(crate) verdict: Verdict,
    /// Another replica has read the same history up to a batch that this one has read.
    pub(crate) same_history: bool,
}

impl VoteOutcome {
    pub(crate) const NONE: Self = Self {
        comparison: Comparison::None,
        verdict: Verdict::Unchanged,
        same_history: false,
    };
}
