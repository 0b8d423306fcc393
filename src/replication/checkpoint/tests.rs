use futures_util::FutureExt;
use proptest::prelude::*;

use super::super::votes::PointSummary;
use super::*;
use crate::log::{ChainEntry, Position};
use crate::replication::votes::ROUNDS;

const INTERVAL: Duration = Duration::from_secs(10);

fn log_id() -> LogId {
    LogId("log".into())
}

fn key() -> ClusterKey {
    ClusterKey::derive("secret")
}

fn id(number: usize) -> RandomId {
    RandomId::of(number as u128 + 1)
}

#[derive(Debug, Clone, Copy)]
enum LogEntry {
    Write,
    Empty,
    Checkpoint(Checkpoint),
}

/// A replica that applies the log.
struct Replica {
    checkpoints: Checkpoints,
    position: Position,
    writes: u128,
    /// The error of its digest; 0 if its state is right.
    error: u128,
    verdicts: Vec<Verdict>,
}

impl Replica {
    fn new(id: RandomId) -> Self {
        let metrics = CheckpointMetrics::noop();
        let checkpoints = Checkpoints::new(id, log_id(), key(), Some(INTERVAL), metrics);
        checkpoints.begin(0);
        let _ = checkpoints.caught_up();
        Self {
            checkpoints,
            position: Position::base(&log_id(), 0, 0),
            writes: 0,
            error: 0,
            verdicts: Vec::new(),
        }
    }

    /// A new process that starts from a copy of this one's state.
    fn copy(&self, id: RandomId) -> Self {
        let copy = Self {
            position: self.position,
            writes: self.writes,
            error: self.error,
            ..Self::new(id)
        };
        copy.checkpoints.begin(self.position.seq);
        let _ = copy.checkpoints.caught_up();
        copy
    }

    fn apply(&mut self, entry: LogEntry) {
        self.position = self.position.next(7, ChainEntry::Skipped);
        match entry {
            LogEntry::Write => {
                self.writes += 1;
                self.checkpoints.changed();
            }
            LogEntry::Empty => {}
            LogEntry::Checkpoint(checkpoint) => {
                let digest = Digest(self.writes + self.error);
                let outcome = self
                    .checkpoints
                    .observe(&self.position, &checkpoint, || digest);
                if outcome.verdict != Verdict::Unchanged {
                    self.verdicts.push(outcome.verdict);
                }
                if matches!(outcome.verdict, Verdict::Overruled(_)) {
                    // It bootstraps again.
                    self.checkpoints.end();
                    self.error = 0;
                    self.checkpoints.begin(self.position.seq);
                    let _ = self.checkpoints.caught_up();
                }
            }
        }
    }

    fn points(&self) -> Vec<PointSummary> {
        self.checkpoints.0.state.lock().votes.points()
    }

    fn mismatch(&self) -> Option<DigestMismatch> {
        self.checkpoints.0.state.lock().votes.mismatch()
    }

    fn count(&self, what: fn(&Verdict) -> bool) -> usize {
        self.verdicts.iter().filter(|verdict| what(verdict)).count()
    }
}

/// A log, and replicas that apply it.
struct Cluster {
    log: Vec<LogEntry>,
    replicas: Vec<Replica>,
}

impl Cluster {
    fn of(replicas: usize) -> Self {
        Self {
            log: Vec::new(),
            replicas: (0..replicas)
                .map(|number| Replica::new(id(number)))
                .collect(),
        }
    }

    fn append(&mut self, entry: LogEntry) {
        self.log.push(entry);
    }

    /// Makes the replica apply at most `entries_max` entries.
    fn advance(&mut self, replica: usize, entries_max: usize) {
        let replica = &mut self.replicas[replica];
        let from = replica.position.seq as usize;
        for entry in self.log[from..].iter().take(entries_max) {
            replica.apply(*entry);
        }
    }

    fn settle(&mut self) {
        for replica in 0..self.replicas.len() {
            self.advance(replica, usize::MAX);
        }
    }

    /// Sends the checkpoint of the replica, if it has one. Returns whether it does.
    fn vote_if_due(&mut self, replica: usize) -> bool {
        let checkpoints = &self.replicas[replica].checkpoints;
        checkpoints.0.state.lock().next = Instant::now();
        let checkpoint = checkpoints.next();
        if let Some(checkpoint) = checkpoint {
            self.append(LogEntry::Checkpoint(checkpoint));
        }
        checkpoint.is_some()
    }

    /// Appends a write, then the checkpoint of each of `voters`. All replicas apply all entries.
    fn round(&mut self, voters: &[usize]) {
        self.append(LogEntry::Write);
        self.settle();
        for voter in voters {
            self.vote_if_due(*voter);
            self.settle();
        }
    }

    fn last_vote(&self) -> Checkpoint {
        let last = self.log.iter().rev().find_map(|entry| match entry {
            LogEntry::Checkpoint(checkpoint) if checkpoint.position > 0 => Some(*checkpoint),
            _ => None,
        });
        last.unwrap()
    }
}

fn signed(mut checkpoint: Checkpoint) -> Checkpoint {
    checkpoint.mac = key().sign_checkpoint(&log_id(), &checkpoint);
    checkpoint
}

const UNREADY: fn(&Verdict) -> bool = |verdict| !matches!(verdict, Verdict::Upheld(_));
const CONTRADICTED: fn(&Verdict) -> bool = |verdict| matches!(verdict, Verdict::Contradicted(_));
const OVERRULED: fn(&Verdict) -> bool = |verdict| matches!(verdict, Verdict::Overruled(_));
const UNDECIDED: fn(&Verdict) -> bool = |verdict| matches!(verdict, Verdict::Undecided(_));

#[test]
fn replicas_without_new_writes_stop_voting() {
    let mut cluster = Cluster::of(3);
    let mut sent = 0;
    for round in 0..20 {
        if round == 5 || round == 12 {
            cluster.append(LogEntry::Write);
        }
        for speaker in 0..3 {
            cluster.settle();
            sent += usize::from(cluster.vote_if_due(speaker));
        }
    }
    // One replica opens a point, then each votes on it.
    assert_eq!(sent, 2 * 4);
    assert!(
        cluster
            .replicas
            .iter()
            .all(|replica| replica.verdicts.is_empty())
    );
}

#[test]
fn one_of_three_that_differs_is_overruled_and_agrees_after_its_bootstrap() {
    let mut cluster = Cluster::of(3);
    for _ in 0..3 {
        cluster.round(&[0, 1, 2]);
    }
    cluster.replicas[2].error = 1 << 64;
    for _ in 0..20 {
        cluster.round(&[2, 0, 1]);
    }
    let [a, b, c] = &cluster.replicas[..] else {
        unreachable!()
    };
    assert_eq!((&a.verdicts[..], &b.verdicts[..]), (&[][..], &[][..]));
    // Contradicted as soon as both others have voted, four rounds before the settlement.
    assert!(CONTRADICTED(&c.verdicts[0]));
    assert_eq!(c.count(OVERRULED), 1, "{:?}", c.verdicts);
    assert_eq!(c.mismatch(), None);
}

#[test]
fn two_that_differ_have_a_mismatch_until_one_of_them_is_stopped() {
    let mut cluster = Cluster::of(2);
    for _ in 0..3 {
        cluster.round(&[0, 1]);
    }
    cluster.replicas[1].error = 1 << 64;
    for _ in 0..30 {
        cluster.round(&[0, 1]);
    }
    for replica in &cluster.replicas {
        assert_eq!(replica.count(OVERRULED) + replica.count(CONTRADICTED), 0);
        assert!(replica.count(UNDECIDED) > 1);
        assert!(!replica.mismatch().unwrap().majority);
    }
    // The wrong one is stopped, and its data directory deleted.
    cluster.replicas.pop();
    let mut rounds = 0;
    while cluster.replicas[0].mismatch().is_some() {
        // No replica is ready.
        cluster.vote_if_due(0);
        cluster.settle();
        rounds += 1;
    }
    assert!(rounds <= 12, "{rounds}");
    let copy = cluster.replicas[0].copy(id(7));
    cluster.replicas.push(copy);
    let verdicts = cluster.replicas[0].verdicts.len();
    for _ in 0..10 {
        cluster.round(&[0, 1]);
    }
    assert_eq!(cluster.replicas[0].verdicts.len(), verdicts);
    assert!(cluster.replicas[1].verdicts.is_empty());
    // A restart replays all of it.
    let mut again = Replica::new(id(0));
    cluster.log.iter().for_each(|entry| again.apply(*entry));
    assert_eq!(again.mismatch(), None);
}

#[test]
fn a_replica_that_replays_the_votes_of_a_settled_dispute_has_no_mismatch() {
    let mut cluster = Cluster::of(3);
    for _ in 0..3 {
        cluster.round(&[0, 1, 2]);
    }
    cluster.replicas[2].error = 1 << 64;
    for _ in 0..12 {
        cluster.round(&[0, 2, 1]);
    }
    assert_eq!(cluster.replicas[2].count(OVERRULED), 1);
    // All of them, the overruled one too, and one that is new.
    for number in [0, 1, 2, 9] {
        let mut again = Replica::new(id(number));
        cluster.log.iter().for_each(|entry| again.apply(*entry));
        assert_eq!(again.count(UNREADY), 0, "{number}");
        assert!(
            !again.checkpoints.0.state.lock().votes.is_disputed(),
            "{number}"
        );
    }
}

#[test]
fn a_replica_that_does_not_know_the_voters_is_not_overruled() {
    let mut cluster = Cluster::of(5);
    for _ in 0..3 {
        cluster.round(&[0, 1, 2, 3, 4]);
    }
    let mut copy = cluster.replicas[2].copy(id(9));
    let known = cluster.log.len();
    // Two of five hold the same wrong state. They vote first.
    cluster.replicas[0].error = 1 << 64;
    cluster.replicas[1].error = 1 << 64;
    cluster.round(&[]);
    for _ in 0..3 {
        cluster.vote_if_due(0);
        cluster.settle();
        cluster.vote_if_due(1);
        cluster.settle();
    }
    cluster.log[known..]
        .iter()
        .for_each(|entry| copy.apply(*entry));
    assert!(copy.checkpoints.0.state.lock().votes.is_disputed());
    assert!(copy.verdicts.is_empty(), "{:?}", copy.verdicts);
    assert_eq!(cluster.replicas[2].count(UNREADY), 0);
}

#[test]
fn the_first_vote_of_a_replica_counts_and_a_copy_of_it_has_no_effect() {
    let mut cluster = Cluster::of(3);
    for _ in 0..4 {
        cluster.round(&[0, 1, 2]);
    }
    let vote = cluster.last_vote();
    let other = signed(Checkpoint {
        digest: Digest(1 << 80),
        round: 2,
        ..vote
    });
    let before = cluster.replicas[0].points();
    for _ in 0..ROUNDS {
        cluster.append(LogEntry::Checkpoint(vote));
        cluster.append(LogEntry::Checkpoint(other));
    }
    cluster.settle();
    let after = cluster.replicas[0].points();
    assert_eq!(after[..before.len()], before);
    assert!(
        after[before.len()..]
            .iter()
            .all(|(_, votes, _)| votes.is_empty())
    );
}

#[test]
fn a_vote_on_another_history_or_on_no_point_does_not_count() {
    let mut cluster = Cluster::of(2);
    for _ in 0..4 {
        cluster.round(&[0, 1]);
    }
    let vote = cluster.last_vote();
    let before = cluster.replicas[0].points();
    let stranger = Checkpoint {
        replica: id(50),
        digest: Digest(1 << 80),
        ..vote
    };
    for wrong in [
        Checkpoint {
            chain: Chain(5),
            ..stranger
        },
        Checkpoint {
            position: 1 << 40,
            ..stranger
        },
        Checkpoint {
            position: 0,
            ..stranger
        },
    ] {
        cluster.append(LogEntry::Checkpoint(signed(wrong)));
    }
    cluster.settle();
    assert_eq!(cluster.replicas[0].points()[..before.len()], before);
    assert!(
        cluster
            .replicas
            .iter()
            .all(|replica| replica.verdicts.is_empty())
    );
    // The same with the right chain is one.
    cluster.append(LogEntry::Checkpoint(signed(stranger)));
    cluster.settle();
    assert_ne!(cluster.replicas[0].points()[..before.len()], before);
}

#[test]
fn a_vote_proves_the_history_of_another_replica_only() {
    let mut cluster = Cluster::of(2);
    for _ in 0..4 {
        cluster.round(&[0, 1]);
    }
    let vote = cluster.last_vote();
    let voter = cluster
        .replicas
        .iter()
        .position(|one| one.checkpoints.0.me == vote.replica);
    let position = cluster.replicas[0].position.next(7, ChainEntry::Skipped);
    for (number, replica) in cluster.replicas.iter().enumerate() {
        let outcome = replica.checkpoints.observe(&position, &vote, || Digest(0));
        assert_eq!(outcome.same_history, Some(number) != voter);
    }
}

#[test]
fn a_state_that_is_not_complete_is_not_compared() {
    let mut cluster = Cluster::of(3);
    cluster.replicas[2].error = 1 << 64;
    cluster.replicas[2].checkpoints.begin(1 << 40);
    let _ = cluster.replicas[2].checkpoints.caught_up();
    for _ in 0..10 {
        cluster.round(&[0, 1, 2]);
    }
    assert!(
        cluster
            .replicas
            .iter()
            .all(|replica| replica.verdicts.is_empty())
    );
}

#[tokio::test]
async fn a_replica_that_reads_old_batches_does_not_vote() {
    let mut cluster = Cluster::of(2);
    cluster.round(&[0]);
    let behind = &cluster.replicas[1].checkpoints;
    behind.begin(0);
    behind.changed();
    assert!(!cluster.vote_if_due(1));
    assert_eq!(behind_due(&cluster), None);
    assert_eq!(cluster.replicas[1].checkpoints.caught_up(), None);
    cluster.replicas[1].checkpoints.0.state.lock().next = Instant::now();
    assert_eq!(behind_due(&cluster), Some(()));
    assert!(cluster.vote_if_due(1));
}

/// Whether it is the second replica's turn.
fn behind_due(cluster: &Cluster) -> Option<()> {
    cluster.replicas[1].checkpoints.due().now_or_never()
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) % bound as u64) as usize
    }
}

/// What strangers publish between the turns of replicas.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Strangers {
    /// Empty batches.
    Silent,
    /// Checkpoints without the key.
    Forge,
    /// And copies of checkpoints in the log.
    ForgeAndCopy,
}

struct Outcome {
    cluster: Cluster,
    /// One that started from a copy in the middle.
    late: Option<Replica>,
}

/// Runs `rounds`, in each of which every replica has its turn, in any order and behind the log by
/// any part of the round. From round 6 on the first `wrong` replicas hold something else.
fn run(replicas: usize, wrong: usize, rounds: usize, strangers: Strangers, seed: u64) -> Outcome {
    let mut random = Random(seed);
    let mut cluster = Cluster::of(replicas);
    let mut late: Option<Replica> = None;
    for round in 0..rounds {
        cluster.append(LogEntry::Write);
        if round == 6 {
            cluster.settle();
            for replica in &mut cluster.replicas[..wrong] {
                replica.error = 1 << 64;
            }
        }
        let mut order: Vec<usize> = (0..replicas).collect();
        while !order.is_empty() {
            let replica = order.swap_remove(random.below(order.len()));
            let (kind, number, from) = (random.below(6), random.below(3), random.below(200));
            match kind {
                0 => cluster.append(LogEntry::Write),
                1 | 2 if strangers == Strangers::Silent => cluster.append(LogEntry::Empty),
                1 | 2 => cluster.append(forged(&cluster, kind == 1, number as u8)),
                3 if strangers == Strangers::ForgeAndCopy => {
                    let copy = cluster.log.iter().rev().nth(from).copied();
                    cluster.append(copy.unwrap_or(LogEntry::Empty));
                }
                _ => {}
            }
            cluster.advance(replica, random.below(12));
            cluster.vote_if_due(replica);
        }
        cluster.settle();
        if round == rounds / 2 {
            late = cluster.replicas.last().map(|last| last.copy(id(99)));
        }
    }
    if let Some(late) = &mut late {
        let from = late.position.seq as usize;
        cluster.log[from..]
            .iter()
            .for_each(|entry| late.apply(*entry));
    }
    Outcome { cluster, late }
}

/// What somebody without the key can make of the last vote.
fn forged(cluster: &Cluster, altered: bool, digest: u8) -> LogEntry {
    let last = cluster.log.iter().rev().find_map(|entry| match entry {
        LogEntry::Checkpoint(checkpoint) => Some(*checkpoint),
        _ => None,
    });
    let Some(last) = last else {
        return LogEntry::Empty;
    };
    let replica = match altered {
        true => last.replica,
        false => RandomId::of(1000 + u128::from(digest)),
    };
    let forged = Checkpoint {
        replica,
        digest: Digest(u128::from(digest)),
        round: ROUNDS,
        ..last
    };
    let mac = match altered {
        true => last.mac,
        false => ClusterKey::derive("guessed").sign_checkpoint(&log_id(), &forged),
    };
    LogEntry::Checkpoint(Checkpoint { mac, ..forged })
}

/// The points that both have seen.
fn common(a: &Replica, b: &Replica) -> [Vec<PointSummary>; 2] {
    let first = |replica: &Replica| replica.points().first().map_or(Seq::MAX, |(seq, ..)| *seq);
    let from = first(a).max(first(b));
    [a, b].map(|replica| {
        let mut points = replica.points();
        points.retain(|(seq, ..)| *seq >= from);
        points
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Replicas in a strict majority never have a mismatch; the others are
    /// overruled, and agree after their bootstrap; and all count the same.
    #[test]
    fn the_majority_stays_ready_and_the_minority_is_overruled(
        (replicas, wrong) in (3..6_usize).prop_flat_map(|n| (Just(n), 0..n.div_ceil(2))),
        seed in any::<u64>(),
    ) {
        let Outcome { cluster, late } = run(replicas, wrong, 60, Strangers::ForgeAndCopy, seed);
        let (minority, majority) = cluster.replicas.split_at(wrong);
        for replica in majority {
            prop_assert_eq!(replica.count(UNREADY), 0, "{:?}", replica.verdicts);
        }
        for replica in minority {
            prop_assert_eq!(replica.count(OVERRULED), 1, "{:?}", replica.verdicts);
            prop_assert_eq!(replica.mismatch(), None);
        }
        let last = majority.last().unwrap();
        for other in cluster.replicas.iter().chain(&late) {
            let [of_last, of_other] = common(last, other);
            prop_assert_eq!(of_last, of_other);
        }
        // So does a replica that replays everything, and it has no mismatch afterwards.
        let mut again = Replica::new(last.checkpoints.0.me);
        cluster.log.iter().for_each(|entry| again.apply(*entry));
        prop_assert_eq!(again.count(UNREADY), 0);
        prop_assert_eq!(again.points(), last.points());
    }

    /// Checkpoints without the key have the effect of empty batches.
    #[test]
    fn forged_votes_change_nothing(seed in any::<u64>()) {
        let with = run(3, 1, 30, Strangers::Forge, seed).cluster;
        let without = run(3, 1, 30, Strangers::Silent, seed).cluster;
        for (one, other) in with.replicas.iter().zip(&without.replicas) {
            prop_assert_eq!(&one.verdicts, &other.verdicts);
            prop_assert_eq!(one.points(), other.points());
        }
    }
}
