//! The life of a replica's state: gets to a position, follows the log from there, and begins anew
//! where the log went on without it.

use std::time::Duration;

use metrics::Counter;

use super::bootstrap::{Begun, Bootstrap, BootstrapError};
use super::checkpoint::Checkpoints;
use super::own::OwnBatches;
use super::reader::{Reader, ReaderError};
use super::snapshotter::LastSnapshot;
use crate::log::ReadError;
use crate::readiness::{Latch, Readiness, Scope};

/// Pauses between tries to find a source: short at first, as a peer is often about to be ready.
const PAUSE_MIN: Duration = Duration::from_millis(250);
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// Keeps a store at its place in a log.
pub struct Follower {
    /// How to get to a position.
    pub bootstrap: Bootstrap,
    /// How to go on from there.
    pub reader: Reader,
    /// This process's batches under way.
    pub own: OwnBatches,
    /// What is heard of the peers' states.
    pub checkpoints: Checkpoints,
    /// Whether the replica may answer.
    pub readiness: Readiness,
    /// What is known of snapshots.
    pub last_snapshot: LastSnapshot,
    /// Counts states that were made anew.
    pub resyncs: Counter,
}

/// What can still be done after reading has ended.
enum Ending {
    /// The log is sound and this replica has lost its place in it.
    Resync {
        /// Whether its snapshots may be wrong too.
        doubtful: bool,
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
            true => self.bootstrap.resume().await,
            false => self.begin(&latch).await,
        };
        loop {
            let error;
            (error, latch) = match begun {
                Ok(begun) => self.follow(begun, latch).await,
                Err(error) => {
                    tracing::error!(%error, "no way to a whole state, not serving");
                    latch.say(state_of(&error), error.to_string());
                    return std::future::pending().await;
                }
            };
            let Ending::Resync { doubtful } = self.ending(&error) else {
                return std::future::pending().await;
            };
            self.resyncs.increment(1);
            if doubtful && let Some(snapshots) = &self.bootstrap.snapshots {
                snapshots.set_all_aside("diverged");
            }
            self.own.forget();
            self.bootstrap.store.clear();
            begun = self.begin(&latch).await;
        }
    }

    /// Tries until there is a source, or until trying is of no use.
    async fn begin(&self, latch: &Latch) -> Result<Begun, BootstrapError> {
        let mut pause = PAUSE_MIN;
        let mut told = String::new();
        loop {
            let error = match self.bootstrap.begin(latch).await {
                Err(error) if error.passing() && self.bootstrap.log.shared() => error,
                ended => return ended,
            };
            let why = error.to_string();
            latch.say(state_of(&error), why.as_str());
            if why != told {
                tracing::error!(%error, "no way to a whole state yet, not serving");
                told = why;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    /// Applies the log, and lets go of `latch` once the state is whole. Returns why it ended, and
    /// what keeps the replica unready since.
    async fn follow(&self, begun: Begun, latch: Latch) -> (ReaderError, Latch) {
        let Begun {
            mut subscription,
            whole_from,
            snapshot,
        } = begun;
        if let Some(snapshot) = snapshot {
            self.last_snapshot.set(snapshot);
        }
        self.checkpoints.begin(whole_from);
        latch.say("catching-up", "the log is read to where it ends");
        let (log, applied) = (&self.bootstrap.log, &self.bootstrap.applied);
        let ready = async {
            // Asked for now: whatever was answered before this replica was asked is before it.
            let end = log.look().await?.end;
            applied.reach(end.max(whole_from)).await;
            Ok::<_, ReadError>(())
        };
        let mut disputed = None;
        let reading = self
            .reader
            .run(&mut subscription, &self.readiness, &mut disputed);
        tokio::pin!(reading);
        let caught_up = tokio::select! {
            biased;
            error = &mut reading => Err(error),
            ready = ready => ready.map_err(ReaderError::from),
        };
        let (error, latch) = match caught_up {
            Err(error) => (error, latch),
            Ok(()) => {
                self.bootstrap.tracker.done();
                let (position, records) = (applied.seq(), self.bootstrap.store.len());
                drop(latch);
                tracing::info!(log = log.kind(), position, records, "ready");
                let error = reading.await;
                let latch = self.readiness.hold(Scope::All, "gap", error.to_string());
                (error, latch)
            }
        };
        let state = match error {
            ReaderError::Diverged { .. } => "diverged",
            _ => "gap",
        };
        latch.say(state, error.to_string());
        tracing::error!(%error, "log reader stopped");
        (error, latch)
    }

    fn ending(&self, error: &ReaderError) -> Ending {
        match error {
            _ if !self.bootstrap.log.shared() => Ending::Stay,
            ReaderError::Diverged { .. } => Ending::Resync { doubtful: true },
            ReaderError::Gap { .. } | ReaderError::Log(ReadError::Trimmed { .. }) => {
                Ending::Resync { doubtful: false }
            }
            ReaderError::Log(_) => Ending::Stay,
        }
    }
}

fn state_of(error: &BootstrapError) -> &'static str {
    match error {
        BootstrapError::Log(_) => "gap",
        _ => "no-source",
    }
}
