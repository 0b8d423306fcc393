//! Whether replicas that must be equal are.
//!
//! A batch may carry a [`Checkpoint`]: a position and what its sender's digest was there. Such a
//! batch is a *mark*: every replica notes its own digest right after it. The next checkpoint, whoever
//! sends it, speaks of the last mark, so all replicas compare at exactly one position, and none needs
//! to remember a digest for every batch. After writes have ended, each replica speaks of the last
//! mark once more and then all are silent.
//!
//! When a checkpoint says otherwise than a replica's own digest, at least one of them is wrong and
//! nobody knows which. Whoever notices is not ready from then on and speaks of that mark, again and
//! again, so that others notice too. When one of them has spoken of it [`TIMES_MAX`] times, it is
//! settled, at the same place of the log for all: what most replicas said holds, and of two with as
//! many voices that which was said first. Who holds otherwise begins anew from a peer. Three replicas
//! therefore outvote one; of two, nobody could say which is right.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use metrics::Counter;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::grade::Digest;
use crate::log::{Chain, Checkpoint, Mac, RandomId, Seq};

/// How often a replica speaks of one mark before that is settled. At the pace of a dispute it is two
/// seconds: some round trips, and a broker that was away for a moment.
const TIMES_MAX: u32 = 5;
/// How many marks are remembered. With a checkpoint a replica and interval, those of some rounds.
const MARKS_MAX: usize = 64;
/// How often a replica speaks during a dispute.
const DISPUTE_INTERVAL: Duration = Duration::from_millis(500);

/// What a replica has heard of its peers' states and is to say of its own. Clones are the same.
#[derive(Clone)]
pub struct Checkpoints(Arc<Inner>);

struct Inner {
    /// How often this replica speaks; `None` where nobody would listen.
    interval: Option<Duration>,
    /// Whether writes have been applied since the last mark.
    changed: AtomicBool,
    state: Mutex<State>,
    /// What is to be said, or when, has changed.
    sooner: Notify,
    metrics: CheckpointMetrics,
}

/// Handles of what is measured about checkpoints.
#[derive(Clone)]
pub struct CheckpointMetrics {
    /// Checkpoints of others compared with the own digest.
    pub compared: Counter,
    /// Those that said otherwise.
    pub divergences: Counter,
}

impl CheckpointMetrics {
    /// Handles that count nothing.
    #[must_use]
    pub fn noop() -> Self {
        Self {
            compared: Counter::noop(),
            divergences: Counter::noop(),
        }
    }
}

struct State {
    /// Whether there is a state to speak of.
    begun: bool,
    /// From here on it is whole: before, a restored store may hold effects of later batches.
    whole_from: Seq,
    /// The last marks, the oldest first.
    marks: VecDeque<Mark>,
    /// The newest mark that has writes before it and that this replica has not spoken of.
    unspoken: Option<Seq>,
    /// The mark that replicas differ at.
    disputed: Option<Mark>,
    /// When this replica is to speak next.
    next: Instant,
    me: RandomId,
    /// How many pauses there have been.
    pauses: u64,
}

struct Mark {
    position: Seq,
    /// The chain there.
    chain: Chain,
    /// This replica's own.
    digest: Digest,
    /// What was said, the first first; one voice a replica.
    voices: Vec<Voice>,
}

struct Voice {
    origin: RandomId,
    digest: Digest,
    /// How often it was heard.
    times: u32,
}

/// A batch with a checkpoint, at its place in the log.
#[derive(Debug, Clone, Copy)]
pub(super) struct Heard {
    /// The place.
    pub seq: Seq,
    /// The chain there.
    pub chain: Chain,
    /// What it says.
    pub checkpoint: Checkpoint,
}

/// What follows from a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing new.
    Nothing,
    /// Another replica holds something else.
    Disputed {
        /// What this replica held there.
        own: Digest,
        /// What the other did.
        other: Digest,
    },
    /// The dispute is over and this replica's state holds.
    Upheld,
    /// The dispute is over and this replica's state does not hold.
    Overruled {
        /// Where it differed.
        position: Seq,
        /// What it held there.
        own: Digest,
        /// What holds.
        agreed: Digest,
    },
}

impl Checkpoints {
    /// For the replica `me`, which speaks every `interval`, if at all.
    #[must_use]
    pub fn new(me: RandomId, interval: Option<Duration>, metrics: CheckpointMetrics) -> Self {
        Self(Arc::new(Inner {
            interval,
            changed: AtomicBool::new(false),
            state: Mutex::new(State {
                begun: false,
                whole_from: 0,
                marks: VecDeque::new(),
                unspoken: None,
                disputed: None,
                next: Instant::now(),
                me,
                pauses: 0,
            }),
            sooner: Notify::new(),
            metrics,
        }))
    }

    /// The state was made anew and is whole from batch `whole_from` on.
    pub fn begin(&self, whole_from: Seq) {
        let mut state = self.0.state.lock();
        state.begun = true;
        state.whole_from = whole_from;
        state.pause(self.0.interval);
        // What came out of a file is to be compared even if nobody writes any more.
        self.0.changed.store(whole_from > 0, Ordering::Relaxed);
        self.0.sooner.notify_one();
    }

    /// The state is given up: there is nothing to say of it until the next one has begun.
    pub(super) fn end(&self) {
        let mut state = self.0.state.lock();
        state.begun = false;
        state.marks.clear();
        state.unspoken = None;
        state.disputed = None;
        self.0.changed.store(false, Ordering::Relaxed);
    }

    /// A batch that sets something was applied.
    pub(super) fn changed(&self) {
        self.0.changed.store(true, Ordering::Relaxed);
    }

    /// A batch with a checkpoint was applied; `digest` is this replica's right after it. Only the
    /// log's reader calls this.
    pub(super) fn hear(&self, heard: Heard, digest: impl FnOnce() -> Digest) -> Verdict {
        let mut state = self.0.state.lock();
        if !state.begun || state.whole_from > heard.seq {
            return Verdict::Nothing;
        }
        let verdict = match self.compare(&mut state, &heard) {
            Verdict::Nothing => state.settle(),
            disputed => disputed,
        };
        if matches!(verdict, Verdict::Overruled { .. }) {
            return verdict;
        }
        if state.marks.len() == MARKS_MAX {
            state.marks.pop_front();
        }
        state.marks.push_back(Mark {
            position: heard.seq,
            chain: heard.chain,
            digest: digest(),
            voices: Vec::new(),
        });
        if self.0.changed.swap(false, Ordering::Relaxed) {
            state.unspoken = Some(heard.seq);
        }
        if matches!(verdict, Verdict::Disputed { .. }) {
            state.next = Instant::now();
            self.0.sooner.notify_one();
        }
        verdict
    }

    fn compare(&self, state: &mut State, heard: &Heard) -> Verdict {
        let Checkpoint {
            replica,
            position,
            chain,
            digest,
            ..
        } = heard.checkpoint;
        let mine = replica == state.me;
        if mine && state.unspoken.is_some_and(|unspoken| unspoken <= position) {
            state.unspoken = None;
        }
        let mut marks = state.disputed.iter_mut().chain(&mut state.marks);
        // Of a batch that the broker lost nobody here can say anything.
        let here = |mark: &&mut Mark| mark.position == position && chain == mark.chain;
        let Some(mark) = marks.find(here) else {
            return Verdict::Nothing;
        };
        let mut voices = mark.voices.iter_mut();
        if let Some(voice) = voices.find(|voice| voice.origin == replica) {
            voice.times += 1;
            return Verdict::Nothing;
        }
        mark.voices.push(Voice {
            origin: replica,
            digest,
            times: 1,
        });
        if mine {
            return Verdict::Nothing;
        }
        self.0.metrics.compared.increment(1);
        let own = mark.digest;
        if digest == own {
            return Verdict::Nothing;
        }
        self.0.metrics.divergences.increment(1);
        if state.disputed.is_some() {
            return Verdict::Nothing;
        }
        let at = state
            .marks
            .iter()
            .position(|mark| mark.position == position);
        state.disputed = at.and_then(|at| state.marks.remove(at));
        Verdict::Disputed { own, other: digest }
    }

    /// Resolves when this replica is to send a checkpoint. Cancel-safe.
    pub(super) async fn due(&self) {
        let Some(interval) = self.0.interval else {
            return std::future::pending().await;
        };
        loop {
            let next = {
                let mut state = self.0.state.lock();
                let now = Instant::now();
                let anything = state.disputed.is_some()
                    || state.unspoken.is_some()
                    || self.0.changed.load(Ordering::Relaxed);
                if state.next <= now && anything {
                    return;
                }
                if state.next <= now {
                    state.pause(Some(interval));
                }
                state.next
            };
            tokio::select! {
                biased;
                () = tokio::time::sleep_until(next) => {}
                () = self.0.sooner.notified() => {}
            }
        }
    }

    /// What the batch that is made now is to say, if it is time to say something.
    pub(super) fn next(&self) -> Option<Checkpoint> {
        let interval = self.0.interval?;
        let mut state = self.0.state.lock();
        let now = Instant::now();
        if !state.begun || state.next > now {
            return None;
        }
        let about = state.disputed.as_ref().or(state.marks.back());
        let checkpoint = match about {
            Some(mark) => Checkpoint {
                replica: state.me,
                position: mark.position,
                chain: mark.chain,
                digest: mark.digest,
                mac: Mac::default(),
            },
            // Before the first mark, what everyone knows: nothing is there before the first batch.
            None => Checkpoint {
                replica: state.me,
                position: 0,
                chain: Chain::default(),
                digest: Digest::default(),
                mac: Mac::default(),
            },
        };
        match state.disputed {
            Some(_) => state.next = now + DISPUTE_INTERVAL,
            None => state.pause(Some(interval)),
        }
        Some(checkpoint)
    }
}

impl State {
    /// Three quarters of `interval` to five, another part each time: replicas that began together
    /// don't speak together. Their origins are random already.
    fn jittered(&mut self, interval: Duration) -> Duration {
        self.pauses += 1;
        let part = xxh3_64_with_seed(self.me.to_string().as_bytes(), self.pauses) as f64;
        interval.mul_f64(0.75 + part / u64::MAX as f64 / 2.0)
    }

    fn pause(&mut self, interval: Option<Duration>) {
        let pause = interval.map(|interval| self.jittered(interval));
        self.next = Instant::now() + pause.unwrap_or_default();
    }

    /// Ends the dispute, if enough has been said.
    fn settle(&mut self) -> Verdict {
        let settled = |mark: &mut Mark| mark.voices.iter().any(|voice| voice.times >= TIMES_MAX);
        let Some(mark) = self.disputed.take_if(settled) else {
            return Verdict::Nothing;
        };
        // What is said of marks before this place is part of the dispute and over with it.
        self.marks.clear();
        let said = |digest: Digest| {
            mark.voices
                .iter()
                .filter(|voice| voice.digest == digest)
                .count()
        };
        let mut agreed = mark.digest;
        let mut most = 0;
        for voice in &mark.voices {
            if said(voice.digest) > most {
                (agreed, most) = (voice.digest, said(voice.digest));
            }
        }
        match agreed == mark.digest {
            true => Verdict::Upheld,
            false => Verdict::Overruled {
                position: mark.position,
                own: mark.digest,
                agreed,
            },
        }
    }
}
