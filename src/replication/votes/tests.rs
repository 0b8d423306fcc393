//! Single votes. `checkpoint/tests.rs` simulates whole replicas.

use super::*;
use crate::log::Mac;

const RIGHT: Digest = Digest(7);
const WRONG: Digest = Digest(8);

const ME: u128 = 100;
const A: u128 = 1;
const B: u128 = 2;
const C: u128 = 3;
const D: u128 = 4;

/// The votes as `ME` counts them, whose digest is always `RIGHT`.
struct Counted {
    votes: Votes,
    end: Seq,
}

impl Counted {
    fn new() -> Self {
        let votes = Votes::new(RandomId::of(ME));
        let mut counted = Self { votes, end: 0 };
        // The first point, which is batch 1.
        counted.vote(A, 0, Digest(0), 0);
        counted
    }

    /// Appends a batch with this checkpoint.
    fn vote(&mut self, replica: u128, position: Seq, digest: Digest, round: u32) -> VoteOutcome {
        self.end += 1;
        self.votes.observe(&CheckpointBatch {
            seq: self.end,
            chain: Chain(u128::from(self.end)),
            own: Some(RIGHT),
            changed: true,
            checkpoint: Checkpoint {
                replica: RandomId::of(replica),
                position,
                chain: Chain(u128::from(position)),
                digest,
                round,
                mac: Mac::default(),
            },
        })
    }

    /// All of `replicas` vote for the right digest.
    fn agree(&mut self, replicas: &[u128], position: Seq) {
        for replica in replicas {
            let outcome = self.vote(*replica, position, RIGHT, 1);
            assert_eq!(outcome.verdict, Verdict::Unchanged);
        }
    }

    fn round_of_next(&self) -> Option<u32> {
        match self.votes.next_checkpoint(false, None) {
            NextCheckpoint::Vote(vote) => Some(vote.round),
            _ => None,
        }
    }
}

#[test]
fn a_replica_counts_itself_as_a_voter() {
    let mut counted = Counted::new();
    counted.agree(&[A], 1);
    assert_eq!(counted.end, 2);
    // One of one that voted, and one of two with this replica.
    let outcome = counted.vote(A, 2, WRONG, 1);
    assert_eq!(outcome.comparison, Comparison::Different { own: RIGHT });
    assert_eq!(outcome.verdict, Verdict::Unchanged);
    let outcome = counted.vote(B, 2, WRONG, 1);
    let Verdict::Contradicted(mismatch) = outcome.verdict else {
        panic!("{outcome:?}");
    };
    assert_eq!(
        (mismatch.position, mismatch.own, mismatch.other),
        (2, RIGHT, WRONG)
    );
    // Until it has a majority again.
    for (number, replica) in [ME, C, D].into_iter().enumerate() {
        let outcome = counted.vote(replica, 2, RIGHT, 1);
        let upheld = outcome.verdict == Verdict::Upheld(2);
        assert_eq!(upheld, number == 2, "{number}");
    }
    assert_eq!(counted.votes.mismatch(), None);
}

#[test]
fn a_copy_of_an_older_vote_does_not_set_its_replica_back() {
    let mut counted = Counted::new();
    counted.vote(A, 1, WRONG, 1);
    for round in 1..=3 {
        counted.vote(ME, 1, RIGHT, round);
    }
    assert_eq!(counted.round_of_next(), Some(4));
    counted.vote(ME, 1, RIGHT, 1);
    assert_eq!(counted.round_of_next(), Some(4));
}

#[test]
fn a_vote_for_a_second_digest_does_not_settle() {
    let mut counted = Counted::new();
    counted.agree(&[A, B, ME], 1);
    let outcome = counted.vote(A, 1, WRONG, ROUNDS);
    let first = RIGHT;
    assert_eq!(outcome.comparison, Comparison::Equivocation { first });
    assert!(counted.votes.points().iter().all(|(.., settled)| !settled));
}

#[test]
fn without_a_majority_only_those_that_voted_are_in_doubt() {
    for voted in [true, false] {
        let mut counted = Counted::new();
        counted.vote(A, 1, WRONG, 1);
        counted.vote(B, 1, RIGHT, 1);
        if voted {
            counted.vote(ME, 1, Digest(9), 1);
        }
        let verdict = counted.vote(A, 1, WRONG, ROUNDS).verdict;
        assert_eq!(matches!(verdict, Verdict::Undecided(_)), voted);
        assert_eq!(counted.votes.mismatch().is_some(), voted);
    }
}

#[test]
fn most_of_the_votes_suffice_to_stay_ready() {
    let mut counted = Counted::new();
    counted.agree(&[A, B, C, D, ME], 1);
    // Two others are silent now: two of five voters are no majority, and two of three votes are
    // most of them.
    counted.agree(&[ME], 2);
    counted.vote(A, 2, WRONG, 1);
    counted.agree(&[B], 2);
    let verdict = counted.vote(A, 2, WRONG, ROUNDS).verdict;
    assert_eq!(verdict, Verdict::Unchanged);
    assert_eq!(counted.votes.mismatch(), None);
}

#[test]
fn a_late_vote_on_a_settled_point_changes_nothing() {
    let mut counted = Counted::new();
    counted.agree(&[A, ME], 1);
    counted.vote(ME, 2, RIGHT, 1);
    counted.vote(A, 2, WRONG, 1);
    let verdict = counted.vote(ME, 2, RIGHT, ROUNDS).verdict;
    assert!(matches!(verdict, Verdict::Undecided(_)));
    for (replica, digest) in [(B, RIGHT), (C, WRONG), (D, WRONG)] {
        let verdict = counted.vote(replica, 2, digest, ROUNDS).verdict;
        assert_eq!(verdict, Verdict::Unchanged);
    }
    assert!(counted.votes.mismatch().is_some());
}

#[test]
fn agreement_on_an_older_point_does_not_clear_a_mismatch_on_a_newer_one() {
    let mut counted = Counted::new();
    counted.agree(&[A, B], 1);
    counted.agree(&[A], 3);
    counted.vote(A, 4, WRONG, 1);
    let verdict = counted.vote(B, 4, WRONG, 1).verdict;
    assert!(matches!(verdict, Verdict::Contradicted(_)));
    counted.agree(&[B], 3);
    assert_eq!(counted.votes.mismatch().unwrap().position, 4);
}

#[test]
fn points_that_were_opened_at_the_same_time_have_the_voters_of_the_preceding_one() {
    let mut counted = Counted::new();
    counted.agree(&[A, B, C, D], 1);
    assert_eq!(counted.end, 5);
    // When A and B voted, neither had seen the other's vote.
    counted.agree(&[A], 3);
    for replica in [B, A] {
        let verdict = counted.vote(replica, 4, WRONG, 1).verdict;
        assert_eq!(verdict, Verdict::Unchanged);
    }
    let verdict = counted.vote(C, 4, WRONG, 1).verdict;
    assert!(matches!(verdict, Verdict::Contradicted(_)));
}

#[test]
fn a_replica_does_not_vote_twice_for_different_digests() {
    let mut counted = Counted::new();
    // Its own vote, of the process before, whose state was another one.
    counted.vote(ME, 1, WRONG, 1);
    assert!(!counted.votes.is_disputed());
    counted.vote(A, 1, Digest(9), 1);
    assert!(!counted.votes.is_disputed());
    let next = counted.votes.next_checkpoint(true, None);
    assert!(!matches!(next, NextCheckpoint::Vote(vote) if vote.position == 1));
}

#[test]
fn a_replica_waits_once_for_the_votes_of_the_other_voters() {
    let mut counted = Counted::new();
    counted.agree(&[A, B, ME], 1);
    counted.agree(&[ME, A], 2);
    let wait = counted.votes.next_checkpoint(true, None);
    assert_eq!(wait, NextCheckpoint::Wait(2));
    assert!(matches!(
        counted.votes.next_checkpoint(true, Some(2)),
        NextCheckpoint::Vote(_)
    ));
    counted.agree(&[B], 2);
    assert!(matches!(
        counted.votes.next_checkpoint(true, None),
        NextCheckpoint::Vote(_)
    ));
}
