//! Model checks of lock-free code with [loom](https://docs.rs/loom), which tries every thread
//! interleaving and every value that the memory model allows.
//!
//! The code under test is `src/replication/state.rs` and `src/replication/waiters.rs`, compiled
//! with loom's atomics and locks. The store, its replacement and the applier are models: `Store`,
//! `replace_state` and `AppliedIndex` below.
#![cfg(test)]
#![allow(dead_code, reason = "the tests use a part of the code under test")]

#[path = "../../../src/replication/state.rs"]
mod state;

#[path = "../../../src/replication/waiters.rs"]
mod waiters;

mod sys {
    pub(crate) mod sync;
}

/// Replaces `src/log/mod.rs`.
mod log {
    pub(crate) type Seq = u64;
}

use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Wake, Waker};

use loom::model;
use loom::model::Builder;
use loom::thread;

use state::{NodeState, Readiness};
use sys::sync::Mutex;
use sys::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use waiters::Waiters;

/// A model of `src/store/mod.rs`: an epoch, and shards that are locked one after the other. Each of
/// its two shards has one record. A state is complete if both have the same value.
struct Store {
    epoch: AtomicU64,
    shards: [Mutex<Option<u64>>; 2],
}

impl Store {
    fn new(record: u64) -> Self {
        Self {
            epoch: AtomicU64::new(0),
            shards: [(); 2].map(|()| Mutex::new(Some(record))),
        }
    }

    fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    fn get(&self, shard: usize) -> Option<u64> {
        *self.shards[shard].lock()
    }

    /// Models `Store::clear` and a restore.
    fn replace(&self, record: u64) {
        self.epoch.fetch_add(1, Ordering::AcqRel);
        for record in [None, Some(record)] {
            for shard in &self.shards {
                *shard.lock() = record;
            }
        }
    }
}

fn ready() -> Readiness {
    let readiness = Readiness::starting("");
    readiness.set_ready();
    readiness
}

/// Models the recovery from a gap: unready, cleared, restored, ready.
fn replace_state(readiness: &Readiness, store: &Store, record: u64) {
    readiness.block(NodeState::Restoring, "");
    store.replace(record);
    readiness.set_ready();
}

/// `GET /get` returns a value of a complete state, and never an older one than before.
#[test]
fn a_read_never_sees_a_state_that_is_being_replaced() {
    model(|| {
        let readiness = ready();
        let store = Arc::new(Store::new(1));
        let replacing = {
            let (readiness, store) = (readiness.clone(), Arc::clone(&store));
            thread::spawn(move || replace_state(&readiness, &store, 2))
        };
        let mut last = 1;
        for _ in 0..2 {
            if let Ok(found) = readiness.read(|| store.epoch(), || store.get(0)) {
                let found = found.expect("both states have the record");
                assert!(found >= last);
                last = found;
            }
        }
        replacing.join().unwrap();
        assert_eq!(
            readiness.read(|| store.epoch(), || store.get(0)),
            Ok(Some(2))
        );
    });
}

/// `CompleteState`, as backups and snapshots use it (`src/replication/complete_state.rs`): the
/// state is complete at the start, and the epoch is the same after each piece.
#[test]
fn a_scan_within_one_epoch_sees_one_state() {
    model(|| {
        let readiness = ready();
        let store = Arc::new(Store::new(1));
        let replacing = {
            let (readiness, store) = (readiness.clone(), Arc::clone(&store));
            thread::spawn(move || replace_state(&readiness, &store, 2))
        };
        if let Ok(epoch) = readiness.complete_epoch(|| store.epoch()) {
            let pieces = [0, 1].map(|shard| {
                let piece = store.get(shard);
                epoch.is(store.epoch()).then_some(piece)
            });
            if let [Some(one), Some(other)] = pieces {
                assert!(one.is_some() && one == other, "{one:?} and {other:?}");
            }
        }
        replacing.join().unwrap();
    });
}

/// A replica that changes its reason does not become ready in between.
#[test]
fn a_change_of_the_reason_does_not_make_a_replica_ready() {
    model(|| {
        let readiness = Readiness::starting("");
        let changes = {
            let readiness = readiness.clone();
            thread::spawn(move || readiness.block(NodeState::Gap, ""))
        };
        for _ in 0..2 {
            let unready = readiness.check().expect_err("it is never ready");
            assert!([NodeState::Starting, NodeState::Gap].contains(&unready.state));
        }
        changes.join().unwrap();
        assert_eq!(readiness.state(), NodeState::Gap);
    });
}

/// A thread that sees a ready replica also sees all writes before it became ready.
#[test]
fn readiness_publishes_earlier_writes() {
    model(|| {
        let readiness = Readiness::starting("");
        let restored = Arc::new(AtomicU64::new(0));
        let restore = {
            let (restored, readiness) = (Arc::clone(&restored), readiness.clone());
            thread::spawn(move || {
                restored.store(1, Ordering::Relaxed);
                readiness.set_ready();
            })
        };
        if readiness.check().is_ok() {
            assert_eq!(restored.load(Ordering::Relaxed), 1);
        }
        restore.join().unwrap();
    });
}

/// The driver cannot make a replica ready that is shutting down.
#[test]
fn a_shutdown_is_final() {
    model(|| {
        let readiness = Readiness::starting("");
        let driver = {
            let readiness = readiness.clone();
            thread::spawn(move || {
                readiness.set_ready();
                readiness.block(NodeState::Gap, "");
                readiness.set_ready();
            })
        };
        readiness.block(NodeState::Stopping, "");
        assert_eq!(readiness.state(), NodeState::Stopping);
        driver.join().unwrap();
        assert_eq!(readiness.state(), NodeState::Stopping);
    });
}

/// A model of `src/replication/applied/mod.rs`: a position and its waiters.
struct AppliedIndex {
    seq: AtomicU64,
    waiters: Waiters,
}

impl AppliedIndex {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            seq: AtomicU64::new(0),
            waiters: Waiters::new(),
        })
    }

    fn seq(&self) -> u64 {
        self.seq.load(Ordering::Acquire)
    }

    fn apply(&self, seq: u64) {
        self.seq.store(seq, Ordering::Release);
        self.waiters.wake(seq);
    }
}

/// Records whether a task was woken.
struct WakeRecorder(AtomicBool);

impl Wake for WakeRecorder {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Release);
    }
}

/// Waits for `seq`, which `applying` applies. The waiting task must be woken by the end of that.
fn wait(applied: &AppliedIndex, seq: u64, applying: thread::JoinHandle<()>) {
    let woken = Arc::new(WakeRecorder(AtomicBool::new(false)));
    let waker = Waker::from(Arc::clone(&woken));
    let mut wait = pin!(applied.waiters.wait(seq, 2, || applied.seq() >= seq));
    let pending = wait
        .as_mut()
        .poll(&mut Context::from_waker(&waker))
        .is_pending();
    applying.join().unwrap();
    assert!(!pending || woken.0.load(Ordering::Acquire), "not woken");
}

/// A read waits for a position while that batch is applied.
#[test]
fn no_wakeup_is_lost_while_a_batch_is_applied() {
    model(|| {
        let applied = AppliedIndex::new();
        let applying = {
            let applied = Arc::clone(&applied);
            thread::spawn(move || applied.apply(1))
        };
        wait(&applied, 1, applying);
    });
}

/// The same while another read begins to wait for a later position and is dropped.
#[test]
fn no_wakeup_is_lost_while_another_waiter_is_added_and_removed() {
    let mut builder = Builder::new();
    // All interleavings of three threads take two minutes; with this bound it is seconds.
    builder.preemption_bound = Some(3);
    builder.check(|| {
        let applied = AppliedIndex::new();
        let applying = {
            let applied = Arc::clone(&applied);
            thread::spawn(move || applied.apply(1))
        };
        let other = {
            let applied = Arc::clone(&applied);
            thread::spawn(move || {
                let mut wait = pin!(applied.waiters.wait(2, 2, || applied.seq() >= 2));
                let mut cx = Context::from_waker(Waker::noop());
                assert!(wait.as_mut().poll(&mut cx).is_pending());
            })
        };
        wait(&applied, 1, applying);
        other.join().unwrap();
    });
}
