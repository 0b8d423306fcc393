//! Counts the votes of all replicas on the state, from the log alone.
//!
//! A batch that carries a checkpoint is a *mark*: every replica notes its own digest right after it.
//! A checkpoint about a mark is a *vote*. All votes on a mark come after it in the log, so a replica
//! that has read the mark sees all of them, whenever it started. It concludes nothing about marks
//! before its start.
//!
//! - Each replica id has one vote per mark: its first. A later vote of the same replica only raises
//!   its *round*, which is signed, so a copy of a vote has no effect.
//! - A vote with another chain is about another history and does not count.
//! - The *mark before* a mark is the newest one on which any replica had voted when the mark was
//!   written. The *electors* of a mark are the ids that voted on it or on the one before (or on one
//!   between the two, which was opened at the same time). A *majority* is more than half of them.
//! - A mark is *settled* at the first vote of round [`ROUNDS`]. Later votes on it change nothing.
//!
//! What a replica concludes about itself:
//!
//! | when | the votes | conclusion |
//! | --- | --- | --- |
//! | any vote | a majority, itself counted as an elector, contradicts it | [`Verdict::Contradicted`] |
//! | any vote | such a majority agrees with it | [`Verdict::Upheld`], if it was in doubt |
//! | settlement | a majority contradicts it | [`Verdict::Overruled`] |
//! | settlement | it voted, and most votes are not for its digest | [`Verdict::Undecided`] |
//!
//! Votes that contradict each other are no reason for doubt by themselves, because more votes may
//! follow before the settlement. At the settlement a replica stays ready if most of the *votes* are
//! for its digest, even if half of the *electors* or more are silent. Only a majority of the
//! electors makes a replica discard its state. A replica that does not know the mark before a mark
//! does not know the electors, and is neither contradicted, upheld nor overruled there.

use std::collections::VecDeque;
use std::fmt;

use crate::grade::Digest;
use crate::log::{Chain, Checkpoint, RandomId, Seq};

/// A mark is settled when any replica reaches this round. In a dispute that takes two seconds,
/// which leaves time for some round trips and a short outage of the broker.
pub(super) const ROUNDS: u32 = 5;
/// How many marks are remembered. Ten replicas in a dispute make twenty per second.
const MARKS_MAX: usize = 1024;
/// How many ids may vote on a mark. Ephemeral replicas have a new id after each start.
const VOTES_MAX: usize = 256;

/// What a test compares of a mark: its position, the votes on it, and whether it is settled.
#[cfg(test)]
pub(super) type KnownMark = (Seq, Vec<(RandomId, Digest)>, bool);

/// The marks and the votes on them, as one replica has seen them.
pub(super) struct Votes {
    me: RandomId,
    /// From the oldest to the newest.
    marks: VecDeque<Mark>,
    /// The newest mark that has writes before it and that this replica has not voted on.
    unvoted: Option<Seq>,
    doubt: Option<Doubt>,
}

struct Mark {
    position: Seq,
    chain: Chain,
    /// This replica's digest there; `None` while its state was not complete.
    own: Option<Digest>,
    /// In the order of the log; one per replica.
    votes: Vec<Vote>,
    /// The batch with the first vote.
    opened_at: Option<Seq>,
    settled: bool,
}

struct Vote {
    replica: RandomId,
    digest: Digest,
    round: u32,
}

/// A batch with an authentic checkpoint, at its place in the log.
#[derive(Debug, Clone, Copy)]
pub(super) struct Marked {
    pub(super) seq: Seq,
    pub(super) chain: Chain,
    /// This replica's digest right after the batch; `None` if its state is not complete there.
    pub(super) own: Option<Digest>,
    /// Whether there were writes since the last mark.
    pub(super) changed: bool,
    pub(super) checkpoint: Checkpoint,
}

/// Why a replica's state may be wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Doubt {
    /// The mark.
    pub(super) position: Seq,
    /// This replica's digest there.
    pub(super) own: Digest,
    /// The digest with the most votes among the others.
    pub(super) other: Digest,
    /// A replica that voted for it.
    pub(super) replica: RandomId,
    /// Whether a majority voted for it.
    pub(super) majority: bool,
}

impl fmt::Display for Doubt {
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
                "at batch {position} this replica's digest was {own} and that of a majority {other} \
                 (replica {replica} and others): its state is wrong; waiting for the settlement"
            ),
            false => write!(
                f,
                "at batch {position} this replica's digest was {own} and that of replica {replica} \
                 {other}, and there is no majority for either; if this lasts, find out which one is \
                 wrong, stop it and delete its data directory; the other becomes ready within 30 s"
            ),
        }
    }
}

/// How the vote of another replica compares with this replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Comparison {
    /// There was nothing to compare.
    None,
    /// The digests are the same.
    Same,
    /// The digests differ.
    Different {
        /// This replica's digest.
        own: Digest,
    },
    /// The other replica read another history up to the mark.
    Fork {
        /// This replica's chain.
        own: Chain,
    },
    /// The other replica has voted for another digest at this mark before.
    Equivocation {
        /// Its first digest, which counts.
        first: Digest,
    },
}

/// The consequence of a vote for this replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing new.
    Unchanged,
    /// A majority has another digest. More votes may change that until the mark is settled.
    Contradicted(Doubt),
    /// The mark is settled, and this replica's digest does not have most of the votes.
    Undecided(Doubt),
    /// The mark is settled, and a majority has another digest.
    Overruled(Doubt),
    /// A majority has the digest of this replica, which was in doubt.
    Upheld(Seq),
}

/// The result of observing a vote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Observed {
    pub(super) comparison: Comparison,
    pub(super) verdict: Verdict,
    /// Another replica has read the same history up to a batch that this one has read.
    pub(super) same_history: bool,
}

impl Observed {
    pub(super) const NOTHING: Self = Self {
        comparison: Comparison::None,
        verdict: Verdict::Unchanged,
        same_history: false,
    };
}

/// The contents of a vote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ballot {
    pub(super) position: Seq,
    pub(super) chain: Chain,
    pub(super) digest: Digest,
    pub(super) round: u32,
}

/// What a replica should send when it is its turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    /// Nothing.
    Silent,
    /// A checkpoint without a vote, to make a mark.
    Mark,
    /// A vote.
    Vote(Ballot),
    /// Nothing this time: not all electors have voted on the mark at this position. The next time
    /// it votes on a newer one.
    Wait(Seq),
}

/// The electors of a mark.
struct Electors(Vec<RandomId>);

impl Electors {
    /// Whether `votes` are more than half of them and `me`.
    fn majority(&self, me: RandomId, votes: usize) -> bool {
        let others = usize::from(!self.0.contains(&me));
        2 * votes > self.0.len() + others
    }
}

impl Mark {
    fn has_vote_of(&self, replica: RandomId) -> bool {
        self.votes.iter().any(|vote| vote.replica == replica)
    }

    fn count(&self, digest: Digest) -> usize {
        let same = |vote: &&Vote| vote.digest == digest;
        self.votes.iter().filter(same).count()
    }

    /// The digest other than `own` with the most votes (of equals, the first), and their number.
    fn strongest_other(&self, own: Digest) -> Option<(&Vote, usize)> {
        let mut strongest: Option<(&Vote, usize)> = None;
        for vote in self.votes.iter().filter(|vote| vote.digest != own) {
            let count = self.count(vote.digest);
            if strongest.is_none_or(|(_, most)| count > most) {
                strongest = Some((vote, count));
            }
        }
        strongest
    }

    /// Whether a vote differs from this replica's digest, and the mark is not settled.
    fn is_disputed(&self) -> bool {
        let differs = |own| self.votes.iter().any(|vote| vote.digest != own);
        !self.settled && self.own.is_some_and(differs)
    }
}

impl Votes {
    pub(super) fn new(me: RandomId) -> Self {
        Self {
            me,
            marks: VecDeque::new(),
            unvoted: None,
            doubt: None,
        }
    }

    /// Why this replica's state may be wrong.
    pub(super) fn doubt(&self) -> Option<Doubt> {
        self.doubt
    }

    /// Whether replicas disagree on a mark that is not settled.
    pub(super) fn is_disputed(&self) -> bool {
        self.disputed().is_some()
    }

    /// Counts the vote in `marked`, and adds the batch as a mark.
    pub(super) fn observe(&mut self, marked: &Marked) -> Observed {
        let observed = self.count(marked.seq, &marked.checkpoint);
        if self.marks.len() == MARKS_MAX {
            self.marks.pop_front();
        }
        self.marks.push_back(Mark {
            position: marked.seq,
            chain: marked.chain,
            own: marked.own,
            votes: Vec::new(),
            opened_at: None,
            settled: false,
        });
        if marked.changed && marked.own.is_some() {
            self.unvoted = Some(marked.seq);
        }
        observed
    }

    fn count(&mut self, at: Seq, checkpoint: &Checkpoint) -> Observed {
        let Checkpoint {
            replica,
            position,
            chain,
            digest,
            round,
            mac: _,
        } = *checkpoint;
        let mine = replica == self.me;
        // A checkpoint at 0 is not a vote: there is no mark at 0.
        let found = self
            .marks
            .binary_search_by_key(&position, |mark| mark.position);
        let Some((index, mark)) = found
            .ok()
            .and_then(|index| Some((index, self.marks.get_mut(index)?)))
        else {
            return Observed::NOTHING;
        };
        if mark.chain != chain {
            return Observed {
                comparison: match mine {
                    true => Comparison::None,
                    false => Comparison::Fork { own: mark.chain },
                },
                ..Observed::NOTHING
            };
        }
        let mut observed = Observed {
            same_history: !mine,
            ..Observed::NOTHING
        };
        let full = mark.votes.len() == VOTES_MAX;
        let voted = mark.votes.iter_mut().find(|vote| vote.replica == replica);
        match voted {
            Some(vote) if vote.digest != digest => {
                if !mine {
                    observed.comparison = Comparison::Equivocation { first: vote.digest };
                }
                return observed;
            }
            Some(vote) if vote.round >= round => return observed,
            Some(vote) => vote.round = round,
            None if full => return observed,
            None => {
                mark.votes.push(Vote {
                    replica,
                    digest,
                    round,
                });
                mark.opened_at.get_or_insert(at);
                observed.comparison = match mark.own {
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
        observed.verdict = self.conclude(index, round >= ROUNDS);
        observed
    }

    /// Draws the conclusion for this replica after a vote on the mark at `index` was added, and
    /// whether that vote `settles` the mark.
    fn conclude(&mut self, index: usize, settles: bool) -> Verdict {
        let electors = self.electors(index);
        let me = self.me;
        let Some(mark) = self.marks.get_mut(index).filter(|mark| !mark.settled) else {
            return Verdict::Unchanged;
        };
        mark.settled = settles;
        let Some(own) = mark.own else {
            return Verdict::Unchanged;
        };
        let agreeing = mark.count(own);
        let by_majority = |votes| {
            let electors = electors.as_ref();
            electors.is_some_and(|electors| electors.majority(me, votes))
        };
        if by_majority(agreeing) {
            // Agreement on an older mark does not remove a doubt about a newer one.
            let position = mark.position;
            return match self.doubt.take_if(|doubt| doubt.position <= position) {
                Some(_) => Verdict::Upheld(position),
                None => Verdict::Unchanged,
            };
        }
        let Some((other, votes)) = mark.strongest_other(own) else {
            return Verdict::Unchanged;
        };
        let majority = by_majority(votes);
        let doubt = Doubt {
            position: mark.position,
            own,
            other: other.digest,
            replica: other.replica,
            majority,
        };
        // Most of the votes suffice to stay ready, even if this replica's own is not among them.
        let most_agree = 2 * agreeing > mark.votes.len();
        let verdict = match (settles, majority) {
            (true, true) => Verdict::Overruled(doubt),
            (false, true) if self.doubt == Some(doubt) => return Verdict::Unchanged,
            (false, true) => Verdict::Contradicted(doubt),
            (true, false) if mark.has_vote_of(me) && !most_agree => Verdict::Undecided(doubt),
            (_, false) => return Verdict::Unchanged,
        };
        self.doubt = Some(doubt);
        verdict
    }

    /// The electors of the mark at `index`; `None` if this replica does not know the mark before.
    fn electors(&self, index: usize) -> Option<Electors> {
        let position = self.marks.get(index)?.position;
        let voted_by_then = |mark: &Mark| mark.opened_at.is_some_and(|at| at <= position);
        let before = (0..index)
            .rev()
            .find(|before| self.marks.get(*before).is_some_and(voted_by_then))?;
        let votes = self
            .marks
            .range(before..=index)
            .flat_map(|mark| &mark.votes);
        let mut ids: Vec<RandomId> = votes.map(|vote| vote.replica).collect();
        ids.sort_unstable();
        ids.dedup();
        Some(Electors(ids))
    }

    /// What to send now. `changed` says whether writes were applied since the last mark; `waited_at`
    /// is the mark of the last [`Turn::Wait`].
    pub(super) fn turn(&self, changed: bool, waited_at: Option<Seq>) -> Turn {
        let newest = self.marks.iter().rposition(|mark| !mark.votes.is_empty());
        let open = newest.filter(|index| self.marks.get(*index).is_some_and(|mark| !mark.settled));
        let in_doubt = self.doubt.is_some();
        let again = open
            .filter(|_| in_doubt)
            .and_then(|index| self.ballot(index));
        if let Some(ballot) = self.disputed().or(again) {
            return Turn::Vote(ballot);
        }
        let voted = |mark: &Mark| mark.has_vote_of(self.me);
        if let Some(index) = open
            && !self.marks.get(index).is_some_and(voted)
            && let Some(ballot) = self.ballot(index)
        {
            return Turn::Vote(ballot);
        }
        let newest_position = newest
            .and_then(|index| self.marks.get(index))
            .map(|mark| mark.position);
        let next = match in_doubt {
            true => self.marks.back().map(|mark| mark.position),
            false => self.unvoted,
        };
        let next = next.filter(|position| Some(*position) > newest_position);
        let found = next.and_then(|position| {
            let index = self
                .marks
                .binary_search_by_key(&position, |mark| mark.position);
            self.ballot(index.ok()?)
        });
        match found {
            Some(ballot) => match open
                .filter(|index| !self.is_complete(*index))
                .and(newest_position)
            {
                Some(incomplete) if waited_at != Some(incomplete) => Turn::Wait(incomplete),
                _ => Turn::Vote(ballot),
            },
            None if changed || in_doubt => Turn::Mark,
            None => Turn::Silent,
        }
    }

    /// This replica's next vote on the oldest disputed mark.
    fn disputed(&self) -> Option<Ballot> {
        let mut indices = 0..self.marks.len();
        indices.find_map(|index| {
            let mark = self.marks.get(index)?;
            mark.is_disputed().then(|| self.ballot(index))?
        })
    }

    /// Whether all electors of the mark at `index` have voted on it.
    fn is_complete(&self, index: usize) -> bool {
        let Some(mark) = self.marks.get(index) else {
            return false;
        };
        let electors = self.electors(index);
        electors.is_some_and(|electors| electors.0.iter().all(|id| mark.has_vote_of(*id)))
    }

    /// This replica's next vote on the mark at `index`. `None` if its state was not complete there,
    /// or is not the one that it voted for before a restart.
    fn ballot(&self, index: usize) -> Option<Ballot> {
        let mark = self.marks.get(index)?;
        let voted = mark.votes.iter().find(|vote| vote.replica == self.me);
        if voted.is_some_and(|vote| Some(vote.digest) != mark.own) {
            return None;
        }
        Some(Ballot {
            position: mark.position,
            chain: mark.chain,
            digest: mark.own?,
            round: voted.map_or(1, |vote| vote.round.saturating_add(1)),
        })
    }
}

#[cfg(test)]
impl Votes {
    /// Every mark: its position, the votes on it, and whether it is settled.
    pub(super) fn marks(&self) -> Vec<KnownMark> {
        let votes = |mark: &Mark| {
            let votes = mark.votes.iter();
            votes.map(|vote| (vote.replica, vote.digest)).collect()
        };
        let marks = self.marks.iter();
        marks
            .map(|mark| (mark.position, votes(mark), mark.settled))
            .collect()
    }
}

#[cfg(test)]
mod tests;
