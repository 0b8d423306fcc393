//! What threads may see of each other's steps, tried in every order and with every value that the memory
//! model allows, by [loom](https://docs.rs/loom).
//!
//! The code is `src/replication/state.rs` and `src/replication/waiters.rs` themselves, over loom's atomics and
//! locks in place of the machine's. The store, the steps of who makes it anew, and what applies batches
//! are models: see `Store` and `AppliedIndex` below for what they stand for.
#![cfg(test)]
#![allow(dead_code, reason = "what is checked has more than is called")]

#[path = "../../../src/replication/state.rs"]
mod state;

#[path = "../../../src/replication/waiters.rs"]
mod waiters;

mod sys {
    pub(crate) mod sync;
}

/// In place of `src/log/mod.rs`.
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

/// As `src/store/mod.rs`: an epoch, and shards that are locked one after the other. Each of its two shards
/// has one record, and a state is whole if both have the same in it.
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

    /// As `Store::clear` and a restore after it.
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

/// As a replica recovers from a gap: unready, cleared, restored, ready.
fn replace_state(readiness: &Readiness, store: &Store, record: u64) {
    readiness.block(NodeState::Restoring, "");
    store.replace(record);
    readiness.set_ready();
}

/// `GET /get`: what is answered was there, and never goes back.
#[test]
fn a_read_sees_no_state_that_is_being_replaced() {
    model(|| {
        let readiness = ready();
        let store = Arc::new(Store::new(1));
        let maker = {
            let (readiness, store) = (readiness.clone(), Arc::clone(&store));
            thread::spawn(move || replace_state(&readiness, &store, 2))
        };
        let mut last = 1;
        for _ in 0..2 {
            if let Ok(found) = readiness.read(|| store.epoch(), || store.get(0)) {
                let found = found.expect("a record was there before and after");
                assert!(found >= last);
                last = found;
            }
        }
        maker.join().unwrap();
        assert_eq!(
            readiness.read(|| store.epoch(), || store.get(0)),
            Ok(Some(2))
        );
    });
}

/// As `CompleteState`, for backups and snapshots (`src/replication/complete_state.rs`): whether the state is
/// complete, and after each piece whether the epoch is the same.
#[test]
fn a_scan_that_ends_in_its_epoch_saw_one_state() {
    model(|| {
        let readiness = ready();
        let store = Arc::new(Store::new(1));
        let maker = {
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
        maker.join().unwrap();
    });
}

/// A replica that changes its reason is not ready in between.
#[test]
fn one_reason_after_another_leaves_no_gap() {
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

/// Whoever finds a replica ready sees what was done before it was.
#[test]
fn what_was_done_before_it_was_ready_is_seen() {
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

/// A replica that stops is not made ready by the task that drives it.
#[test]
fn a_stop_is_final() {
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

/// As `src/replication/applied/mod.rs`: a position and its waiters.
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

/// Whether a task was woken.
struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Release);
    }
}

/// Waits for `seq`, which `applying` applies: its task must have been woken once that is done.
fn wait(applied: &AppliedIndex, seq: u64, applying: thread::JoinHandle<()>) {
    let woken = Arc::new(Woken(AtomicBool::new(false)));
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
    let mut bounded = Builder::new();
    // Every order of three threads takes two minutes, this seconds.
    bounded.preemption_bound = Some(3);
    bounded.check(|| {
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
