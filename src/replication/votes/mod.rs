//! Counts the votes of all replicas on the state, from the log alone.
//!
//! A batch that carries a checkpoint is a *comparison point*, or point: every replica records its
//! own digest right after it. A checkpoint about a point is a *vote*. All votes on a point follow
//! it in the log, so a replica that has read the point sees all of them, whenever it started. It
//! concludes nothing about points before its start.
//!
//! - Each replica id has one vote per point: its first. A later vote of the same replica only
//!   raises its *round*, which is signed, so a copy of a vote has no effect.
//! - A vote with another chain is about another history and does not count.
//! - The *preceding* point is the newest one on which any replica had voted when the point was
//!   written. The *voters* of a point are the ids that voted on it or on the preceding one (or on
//!   one between the two, which was opened at the same time). A *majority* is more than half of
//!   them.
//! - A point is *settled* at the first vote of round [`ROUNDS`]. Later votes on it change nothing.
//!
//! What a replica concludes about itself:
//!
//! | when | the votes | conclusion |
//! | --- | --- | --- |
//! | any vote | a majority, counting this replica as a voter, contradicts it | [`Verdict::Contradicted`] |
//! | any vote | such a majority agrees with it | [`Verdict::Upheld`], if there was a mismatch |
//! | settlement | a majority contradicts it | [`Verdict::Overruled`] |
//! | settlement | it voted, and most votes are not for its digest | [`Verdict::Undecided`] |
//!
//! Votes that contradict each other are no mismatch by themselves, because more votes may follow
//! before the settlement. At the settlement a replica stays ready if most of the *votes* are for
//! its digest, even if half of the *voters* or more are silent. Only a majority of the voters makes
//! a replica discard its state. A replica that does not know the preceding point does not know the
//! voters, and is neither contradicted, upheld nor overruled there.

mod outcome;
mod point;

use std::collections::VecDeque;

pub(super) use self::outcome::{Comparison, DigestMismatch, Verdict, VoteOutcome};
use self::point::{ComparisonPoint, Vote, Voters};
use crate::grade::Digest;
use crate::log::{Chain, Checkpoint, Mac, RandomId, Seq};

/// A point is settled when any replica reaches this round. In a dispute that takes two seconds,
/// which leaves time for some round trips and a short outage of the broker.
pub(super) const ROUNDS: u32 = 5;
/// How many points are remembered. Ten replicas in a dispute make twenty per second.
const POINTS_MAX: usize = 1024;
/// How many ids may vote on a point. Ephemeral replicas have a new id after each start.
const VOTES_MAX: usize = 256;

/// The points and the votes on them, as one replica has seen them.
pub(super) struct Votes {
    me: RandomId,
    /// From the oldest to the newest.
    points: VecDeque<ComparisonPoint>,
    /// The newest point that has writes before it and that this replica has not voted on.
    unvoted: Option<Seq>,
    mismatch: Option<DigestMismatch>,
}

/// A batch with an authentic checkpoint, at its place in the log.
#[derive(Debug, Clone, Copy)]
pub(super) struct CheckpointBatch {
    pub(super) seq: Seq,
    pub(super) chain: Chain,
    /// This replica's digest right after the batch; `None` if its state is not complete there.
    pub(super) own: Option<Digest>,
    /// Whether there were writes since the last point.
    pub(super) changed: bool,
    pub(super) checkpoint: Checkpoint,
}

/// What a replica sends when its next vote is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NextCheckpoint {
    /// Nothing.
    Nothing,
    /// A checkpoint without a vote, which makes its batch a point.
    NewPoint,
    /// This vote, not yet signed.
    Vote(Checkpoint),
    /// Nothing this time, because not all voters have voted on the point at this position. The next
    /// time the replica votes on a newer one.
    Wait(Seq),
}

impl Votes {
    pub(super) fn new(me: RandomId) -> Self {
        Self {
            me,
            points: VecDeque::new(),
            unvoted: None,
            mismatch: None,
        }
    }

    /// Why this replica's state may be wrong.
    pub(super) fn mismatch(&self) -> Option<DigestMismatch> {
        self.mismatch
    }

    /// Whether replicas disagree on a point that is not settled.
    pub(super) fn is_disputed(&self) -> bool {
        self.disputed().is_some()
    }

    /// Counts the vote in `batch`, and adds the batch as a point.
    pub(super) fn observe(&mut self, batch: &CheckpointBatch) -> VoteOutcome {
        let outcome = self.count(batch.seq, &batch.checkpoint);
        if self.points.len() == POINTS_MAX {
            self.points.pop_front();
        }
        self.points.push_back(ComparisonPoint {
            position: batch.seq,
            chain: batch.chain,
            own: batch.own,
            votes: Vec::new(),
            opened_at: None,
            settled: false,
        });
        if batch.changed && batch.own.is_some() {
            self.unvoted = Some(batch.seq);
        }
        outcome
    }

    fn count(&mut self, at: Seq, checkpoint: &Checkpoint) -> VoteOutcome {
        let (replica, position) = (checkpoint.replica, checkpoint.position);
        let (digest, round) = (checkpoint.digest, checkpoint.round);
        let mine = replica == self.me;
        // A checkpoint at 0 is not a vote: there is no point at 0.
        let found = self
            .points
            .binary_search_by_key(&position, |point| point.position);
        let Some((index, point)) = found
            .ok()
            .and_then(|index| Some((index, self.points.get_mut(index)?)))
        else {
            return VoteOutcome::NONE;
        };
        if point.chain != checkpoint.chain {
            return VoteOutcome {
                comparison: match mine {
                    true => Comparison::None,
                    false => Comparison::Fork { own: point.chain },
                },
                ..VoteOutcome::NONE
            };
        }
        let mut outcome = VoteOutcome {
            same_history: !mine,
            ..VoteOutcome::NONE
        };
        let full = point.votes.len() == VOTES_MAX;
        let voted = point.votes.iter_mut().find(|vote| vote.replica == replica);
        match voted {
            Some(vote) if vote.digest != digest => {
                if !mine {
                    outcome.comparison = Comparison::Equivocation { first: vote.digest };
                }
                return outcome;
            }
            Some(vote) if vote.round >= round => return outcome,
            Some(vote) => vote.round = round,
            None if full => return outcome,
            None => {
                point.votes.push(Vote {
                    replica,
                    digest,
                    round,
                });
                point.opened_at.get_or_insert(at);
                outcome.comparison = match point.own {
                    Some(own) if mine || own == digest => match mine {
                        true => Comparison::None,
                        false => Comparison::Same,
                    },
                    Some(own) => Comparison::Different { own },
                    None => Comparison::None,
                };
            }
        }
        if mine && self.unvoted.is_some_and(|unvoted| unvoted <= position) {
            self.unvoted = None;
        }
        outcome.verdict = self.conclude(index, round >= ROUNDS);
        outcome
    }

    /// Draws the conclusion for this replica after a vote on the point at `index` was added, and
    /// whether that vote `settles` the point.
    fn conclude(&mut self, index: usize, settles: bool) -> Verdict {
        let voters = self.voters(index);
        let me = self.me;
        let Some(point) = self.points.get_mut(index).filter(|point| !point.settled) else {
            return Verdict::Unchanged;
        };
        point.settled = settles;
        let Some(own) = point.own else {
            return Verdict::Unchanged;
        };
        let agreeing = point.count(own);
        let by_majority = |votes| {
            let voters = voters.as_ref();
            voters.is_some_and(|voters| voters.majority(me, votes))
        };
        if by_majority(agreeing) {
            // Agreement on an older point does not remove a mismatch about a newer one.
            let position = point.position;
            return match self
                .mismatch
                .take_if(|mismatch| mismatch.position <= position)
            {
                Some(_) => Verdict::Upheld(position),
                None => Verdict::Unchanged,
            };
        }
        let Some((other, votes)) = point.strongest_other(own) else {
            return Verdict::Unchanged;
        };
        let majority = by_majority(votes);
        let mismatch = DigestMismatch {
            position: point.position,
            own,
            other: other.digest,
            replica: other.replica,
            majority,
        };
        // Most of the votes suffice to stay ready, even if this replica's own is not among them.
        let most_agree = 2 * agreeing > point.votes.len();
        let verdict = match (settles, majority) {
            (true, true) => Verdict::Overruled(mismatch),
            (false, true) if self.mismatch == Some(mismatch) => return Verdict::Unchanged,
            (false, true) => Verdict::Contradicted(mismatch),
            (true, false) if point.has_vote_of(me) && !most_agree => Verdict::Undecided(mismatch),
            (_, false) => return Verdict::Unchanged,
        };
        self.mismatch = Some(mismatch);
        verdict
    }

    /// The voters of the point at `index`; `None` if this replica does not know the preceding
    /// point.
    fn voters(&self, index: usize) -> Option<Voters> {
        let position = self.points.get(index)?.position;
        let voted_by_then =
            |point: &ComparisonPoint| point.opened_at.is_some_and(|at| at <= position);
        let before = (0..index)
            .rev()
            .find(|before| self.points.get(*before).is_some_and(voted_by_then))?;
        let votes = self
            .points
            .range(before..=index)
            .flat_map(|point| &point.votes);
        let mut ids: Vec<RandomId> = votes.map(|vote| vote.replica).collect();
        ids.sort_unstable();
        ids.dedup();
        Some(Voters(ids))
    }

    /// The next checkpoint to send. `changed` is whether writes were applied since the last point;
    /// `waited_at` is the point of the last [`NextCheckpoint::Wait`].
    pub(super) fn next_checkpoint(&self, changed: bool, waited_at: Option<Seq>) -> NextCheckpoint {
        let newest = self
            .points
            .iter()
            .rposition(|point| !point.votes.is_empty());
        let open =
            newest.filter(|index| self.points.get(*index).is_some_and(|point| !point.settled));
        let has_mismatch = self.mismatch.is_some();
        let again = open
            .filter(|_| has_mismatch)
            .and_then(|index| self.next_vote(index));
        if let Some(vote) = self.disputed().or(again) {
            return NextCheckpoint::Vote(vote);
        }
        let voted = |point: &ComparisonPoint| point.has_vote_of(self.me);
        if let Some(index) = open
            && !self.points.get(index).is_some_and(voted)
            && let Some(vote) = self.next_vote(index)
        {
            return NextCheckpoint::Vote(vote);
        }
        let newest_position = newest
            .and_then(|index| self.points.get(index))
            .map(|point| point.position);
        let next = match has_mismatch {
            true => self.points.back().map(|point| point.position),
            false => self.unvoted,
        };
        let next = next.filter(|position| Some(*position) > newest_position);
        let found = next.and_then(|position| {
            let index = self
                .points
                .binary_search_by_key(&position, |point| point.position);
            self.next_vote(index.ok()?)
        });
        match found {
            Some(vote) => match open
                .filter(|index| !self.is_complete(*index))
                .and(newest_position)
            {
                Some(incomplete) if waited_at != Some(incomplete) => {
                    NextCheckpoint::Wait(incomplete)
                }
                _ => NextCheckpoint::Vote(vote),
            },
            None if changed || has_mismatch => NextCheckpoint::NewPoint,
            None => NextCheckpoint::Nothing,
        }
    }

    /// This replica's next vote on the oldest disputed point.
    fn disputed(&self) -> Option<Checkpoint> {
        let mut indices = 0..self.points.len();
        indices.find_map(|index| {
            let point = self.points.get(index)?;
            point.is_disputed().then(|| self.next_vote(index))?
        })
    }

    /// Whether all voters of the point at `index` have voted on it.
    fn is_complete(&self, index: usize) -> bool {
        let Some(point) = self.points.get(index) else {
            return false;
        };
        let voters = self.voters(index);
        voters.is_some_and(|voters| voters.0.iter().all(|id| point.has_vote_of(*id)))
    }

    /// This replica's next vote on the point at `index`, not yet signed. `None` if its state was
    /// not complete there, or is not the one that it voted for before a restart.
    fn next_vote(&self, index: usize) -> Option<Checkpoint> {
        let point = self.points.get(index)?;
        let voted = point.votes.iter().find(|vote| vote.replica == self.me);
        if voted.is_some_and(|vote| Some(vote.digest) != point.own) {
            return None;
        }
        Some(Checkpoint {
            replica: self.me,
            position: point.position,
            chain: point.chain,
            digest: point.own?,
            round: voted.map_or(1, |vote| vote.round.saturating_add(1)),
            mac: Mac::default(),
        })
    }
}

/// A point's position, the votes on it, and whether it is settled.
#[cfg(test)]
pub(super) type PointSummary = (Seq, Vec<(RandomId, Digest)>, bool);

#[cfg(test)]
impl Votes {
    pub(super) fn points(&self) -> Vec<PointSummary> {
        let votes = |point: &ComparisonPoint| {
            let votes = point.votes.iter();
            votes.map(|vote| (vote.replica, vote.digest)).collect()
        };
        let points = self.points.iter();
        points
            .map(|point| (point.position, votes(point), point.settled))
            .collect()
    }
}

#[cfg(test)]
mod tests;
