//! The life of a replica's state: gets to a position, follows the log from there, and begins anew
//! where the log went on without it.

use std::time::Duration;

use metrics::Counter;
use tokio::time::Instant;

use super::bootstrap::{Begun, Bootstrap, BootstrapError};
use super::peers::Peer;
use super::reader::{Reader, ReaderError};
use super::snapshotter::Snapshotter;
use crate::log::{ReadError, Seq};
use crate::readiness::{DIVERGED, Latch, Readiness, Scope};

const PAUSE_MIN: Duration = Duration::from_millis(250);
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// Keeps a store at its place in a log.
pub struct Follower {
    /// How to get to a position.
    pub bootstrap: Bootstrap,
    /// How to go on from there.
    pub reader: Reader,
    /// Whether the replica may answer.
    pub readiness: Readiness,
    /// What writes them, where any are kept.
    pub snapshotter: Option<Snapshotter>,
    /// Counts gaps.
    pub gaps: Counter,
    /// Counts states that were made anew.
    pub resyncs: Counter,
}

/// What can still be done after reading has ended.
enum Ending {
    /// The state is whole, and the log may give what it left out.
    Again,
    /// The log is sound and this replica has lost its place in it.
    Resync {
        /// Whether its state and its snapshots may be wrong too.
        doubtful: bool,
        /// A source before this place leads to where reading ended.
        at_least: Seq,
    },
    /// Nothing that the replica could do by itself.
    Stay,
}

impl Follower {
    /// Follows the log for ever. The store holds what belongs at the position if it is `seeded`, and
    /// is empty if not. `starting` is held until the replica is ready.
    pub async fn run(self, seeded: bool, starting: Latch) {
        let mut latch = starting;
        let mut begun = match seeded {
            true => self.bootstrap.resume(0).await,
            false => self.begin(&latch, 0).await,
        };
        let mut pauses = Pauses::default();
        let mut gap = None;
        let mut whole_from;
        let mut disputed = None;
        loop {
            let (error, sound);
            let began_at = Instant::now();
            (error, latch, sound) = match begun {
                Ok(begun) => {
                    whole_from = begun.whole_from;
                    self.follow(begun, latch, &mut disputed).await
                }
                Err(error) => {
                    tracing::error!(%error, "no way to a whole state, not serving");
                    latch.say(state_of(&error), error.to_string());
                    return std::future::pending().await;
                }
            };
            let ending = self.ending(&error, &mut gap);
            if began_at.elapsed() > PAUSE_MAX {
                pauses = Pauses::default();
            }
            let (doubtful, at_least) = match ending {
                Ending::Stay => {
                    if sound && self.bootstrap.log.shared() {
                        self.keep_state().await;
                    }
                    return std::future::pending().await;
                }
                Ending::Resync { doubtful, at_least } => (doubtful, at_least),
                Ending::Again => {
                    begun = self.bootstrap.resume(whole_from).await;
                    continue;
                }
            };
            pauses.pause().await;
            self.reader.checkpoints.end();
            disputed = None;
            if doubtful {
                self.wait_for_a_source().await;
            }
            self.resyncs.increment(1);
            self.give_up_state(doubtful).await;
            begun = self.begin(&latch, at_least).await;
        }
    }

    /// Writes down what nothing will be added to. Of a log that is gone this is all there is since
    /// the last snapshot, and without any a start would take the log in its place for the first.
    async fn keep_state(&self) {
        if let Some(snapshotter) = &self.snapshotter {
            let epoch = self.bootstrap.store.epoch();
            snapshotter.write_if_changed(epoch).await;
        }
    }

    /// Waits until there is somebody or something to begin anew from: a state that may be wrong is
    /// still more than none.
    async fn wait_for_a_source(&self) {
        let mut pauses = Pauses::default();
        loop {
            let extent = self.bootstrap.log.look().await;
            let whole = extent.is_ok_and(|extent| extent.first == 1);
            if whole || self.bootstrap.peers.ask().await.iter().any(Peer::ready) {
                return;
            }
            pauses.pause().await;
        }
    }

    async fn give_up_state(&self, doubtful: bool) {
        self.reader.own.forget();
        // In this order: a snapshot that is being written is not kept once the store is another one.
        self.bootstrap.store.clear();
        self.bootstrap.applied.cleared();
        if doubtful && let Some(snapshotter) = &self.snapshotter {
            snapshotter.set_all_aside("diverged").await;
        }
    }

    /// Tries until there is a source that goes to `at_least`, or until trying is of no use.
    async fn begin(&self, latch: &Latch, mut at_least: Seq) -> Result<Begun, BootstrapError> {
        let mut pauses = Pauses::default();
        let mut told = String::new();
        loop {
            let error = match self.bootstrap.begin(latch, at_least).await {
                Err(error) if error.passing() && self.bootstrap.log.shared() => error,
                ended => {
                    // What was sent meanwhile is in the state, or comes and is read like anybody's.
                    self.reader.own.forget();
                    return ended;
                }
            };
            let why = error.to_string();
            latch.say(state_of(&error), why.as_str());
            if why != told {
                tracing::error!(%error, "no way to a whole state yet, not serving");
                told = why;
            }
            // Nobody has what the log left out: it may give that by now, or stop there again.
            at_least = 0;
            pauses.pause().await;
        }
    }

    /// Applies the log, and lets go of `latch` once the state is whole. Returns why it ended, what
    /// keeps the replica unready since, and whether it was ready until then. `disputed` is held
    /// while a peer says that it holds something else.
    async fn follow(
        &self,
        begun: Begun,
        latch: Latch,
        disputed: &mut Option<Latch>,
    ) -> (ReaderError, Latch, bool) {
        let Begun {
            mut subscription,
            whole_from,
            snapshot,
        } = begun;
        if let (Some(snapshot), Some(snapshotter)) = (snapshot, &self.snapshotter) {
            snapshotter.last.set(snapshot);
        }
        self.reader.checkpoints.begin(whole_from);
        latch.say("catching-up", "the log is read to where it ends");
        let (log, applied) = (&self.bootstrap.log, &self.bootstrap.applied);
        let ready = async {
            // Asked for now: whatever was answered before this replica was asked is before it.
            let end = log.look().await?.end;
            applied.reach(end.max(whole_from)).await;
            Ok::<_, ReadError>(())
        };
        let reading = self
            .reader
            .run(&mut subscription, &self.readiness, disputed);
        tokio::pin!(reading);
        let caught_up = tokio::select! {
            biased;
            error = &mut reading => Err(error),
            ready = ready => ready.map_err(ReaderError::from),
        };
        let (error, latch, sound) = match caught_up {
            Err(error) => (error, latch, false),
            Ok(()) => {
                self.bootstrap.tracker.done();
                let (position, records) = (applied.seq(), self.bootstrap.store.len());
                drop(latch);
                tracing::info!(log = log.kind(), position, records, "ready");
                let error = reading.await;
                let sound = self.readiness.reads().is_ok();
                let latch = self.readiness.hold(Scope::All, "gap", error.to_string());
                (error, latch, sound)
            }
        };
        let state = match error {
            ReaderError::Diverged { .. } => DIVERGED,
            _ => "gap",
        };
        latch.say(state, error.to_string());
        tracing::error!(%error, "log reader stopped");
        (error, latch, sound)
    }

    /// What follows from `error`; `gap` is where the last one was.
    fn ending(&self, error: &ReaderError, gap: &mut Option<Seq>) -> Ending {
        let resync = |doubtful, at_least| Ending::Resync { doubtful, at_least };
        match error {
            _ if !self.bootstrap.log.shared() => Ending::Stay,
            ReaderError::Diverged { .. } => resync(true, 0),
            // Of a log that lacks these batches only a backup helps that has them in it.
            ReaderError::Gap { got, applied } => {
                self.gaps.increment(1);
                match gap.replace(*applied) == Some(*applied) {
                    true => resync(false, got.saturating_sub(1)),
                    false => Ending::Again,
                }
            }
            ReaderError::Log(ReadError::Trimmed { first, .. }) => {
                resync(false, first.saturating_sub(1))
            }
            ReaderError::Log(_) => Ending::Stay,
        }
    }
}

/// Pauses between tries: short at first, as a peer is often about to be ready.
struct Pauses(Duration);

impl Default for Pauses {
    fn default() -> Self {
        Self(PAUSE_MIN)
    }
}

impl Pauses {
    async fn pause(&mut self) {
        tokio::time::sleep(self.0).await;
        self.0 = (self.0 * 2).min(PAUSE_MAX);
    }
}

fn state_of(error: &BootstrapError) -> &'static str {
    match error {
        BootstrapError::Log(_) => "gap",
        _ => "no-source",
    }
}
