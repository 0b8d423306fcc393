//! A position at which replicas compare digests, and the votes there.

use crate::grade::Digest;
use crate::log::{Chain, RandomId, Seq};

pub(super) struct ComparisonPoint {
    pub(super) position: Seq,
    pub(super) chain: Chain,
    /// This replica's digest there; `None` while its state was not complete.
    pub(super) own: Option<Digest>,
    /// In the order of the log; one per replica.
    pub(super) votes: Vec<Vote>,
    /// The batch with the first vote.
    pub(super) opened_at: Option<Seq>,
    pub(super) settled: bool,
}

/// A replica's vote on a point.
pub(super) struct Vote {
    pub(super) replica: RandomId,
    pub(super) digest: Digest,
    pub(super) round: u32,
}

/// The ids whose votes count at a point.
pub(super) struct Voters(pub(super) Vec<RandomId>);

impl Voters {
    /// Whether `votes` are more than half of the voters, with `me` counted as one of them.
    pub(super) fn majority(&self, me: RandomId, votes: usize) -> bool {
        let others = usize::from(!self.0.contains(&me));
        2 * votes > self.0.len() + others
    }
}

impl ComparisonPoint {
    pub(super) fn has_vote_of(&self, replica: RandomId) -> bool {
        self.votes.iter().any(|vote| vote.replica == replica)
    }

    pub(super) fn count(&self, digest: Digest) -> usize {
        let same = |vote: &&Vote| vote.digest == digest;
        self.votes.iter().filter(same).count()
    }

    /// The digest other than `own` with the most votes (of equals, the first), and their number.
    pub(super) fn strongest_other(&self, own: Digest) -> Option<(&Vote, usize)> {
        let mut strongest: Option<(&Vote, usize)> = None;
        for vote in self.votes.iter().filter(|vote| vote.digest != own) {
            let count = self.count(vote.digest);
            if strongest.is_none_or(|(_, most)| count > most) {
                strongest = Some((vote, count));
            }
        }
        strongest
    }

    /// Whether a vote differs from this replica's digest, and the point is not settled.
    pub(super) fn is_disputed(&self) -> bool {
        let differs = |own| self.votes.iter().any(|vote| vote.digest != own);
        !self.settled && self.own.is_some_and(differs)
    }
}
