use std::pin::{Pin, pin};
use std::sync::atomic::AtomicUsize;
use std::task::{Context, Poll, Wake, Waker};

use proptest::prelude::*;

use super::*;
use crate::log::LogId;

const WAIT_MAX: Duration = Duration::from_secs(3600);
const WAITERS_MAX: usize = 4;

fn at(seq: Seq) -> Position {
    Position::base(&LogId("log".into()), seq, 0)
}

/// Counts how often it is woken.
#[derive(Default)]
struct WakeCounter(AtomicUsize);

impl Wake for WakeCounter {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

impl WakeCounter {
    fn woken(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }

    fn poll<T>(self: &Arc<Self>, future: Pin<&mut impl Future<Output = T>>) -> Poll<T> {
        future.poll(&mut Context::from_waker(&Waker::from(Arc::clone(self))))
    }
}

/// Does what the applier does for a batch.
fn apply(applied: &AppliedIndex, seq: Seq) {
    applied.advance(at(seq), || {});
    applied.notify();
}

fn waiting(applied: &AppliedIndex) -> usize {
    applied.0.waiters.len()
}

#[tokio::test]
async fn a_batch_wakes_the_waiters_that_it_reached_once_and_no_other() {
    let applied = AppliedIndex::new(at(0));
    let tasks = [1, 2, 2, 3, Seq::MAX].map(|seq| (seq, Arc::<WakeCounter>::default()));
    let mut waits: Vec<_> = tasks
        .iter()
        .map(|(seq, _)| Box::pin(applied.wait_for(*seq)))
        .collect();
    for ((_, task), wait) in tasks.iter().zip(&mut waits) {
        assert!(task.poll(wait.as_mut()).is_pending());
    }
    let woken = || tasks.each_ref().map(|(_, task)| task.woken());
    // Several batches are announced at once.
    applied.advance(at(1), || {});
    apply(&applied, 2);
    assert_eq!(woken(), [1, 1, 1, 0, 0]);
    applied.notify();
    assert_eq!((woken(), waiting(&applied)), ([1, 1, 1, 0, 0], 2));
    apply(&applied, 3);
    assert_eq!((woken(), waiting(&applied)), ([1, 1, 1, 1, 0], 1));
    for ((seq, task), wait) in tasks.iter().zip(&mut waits) {
        assert_eq!(task.poll(wait.as_mut()).is_ready(), *seq <= 3, "{seq}");
    }
}

#[tokio::test]
async fn all_waiters_for_one_position_are_woken() {
    let applied = AppliedIndex::new(at(0));
    let task = Arc::<WakeCounter>::default();
    let mut waits: Vec<_> = (0..1000).map(|_| Box::pin(applied.wait_for(7))).collect();
    for wait in &mut waits {
        assert!(task.poll(wait.as_mut()).is_pending());
    }
    apply(&applied, 6);
    assert_eq!(task.woken(), 0);
    apply(&applied, 7);
    assert_eq!((task.woken(), waiting(&applied)), (1000, 0));
}

#[tokio::test]
async fn polling_again_replaces_the_waker() {
    let applied = AppliedIndex::new(at(0));
    let [before, now] = [(); 2].map(|()| Arc::<WakeCounter>::default());
    let mut wait = pin!(applied.wait_for(1));
    assert!(before.poll(wait.as_mut()).is_pending());
    assert!(now.poll(wait.as_mut()).is_pending());
    assert_eq!(waiting(&applied), 1);
    apply(&applied, 1);
    assert_eq!((before.woken(), now.woken()), (0, 1));
    assert!(now.poll(wait.as_mut()).is_ready());
}

#[tokio::test]
async fn dropping_a_wait_removes_it_and_no_other_at_its_position() {
    let applied = AppliedIndex::new(at(0));
    let [gone, stays] = [(); 2].map(|()| Arc::<WakeCounter>::default());
    let mut wait = pin!(applied.wait_for(1));
    {
        let mut dropped = pin!(applied.wait_for(1));
        assert!(gone.poll(dropped.as_mut()).is_pending());
        assert!(stays.poll(wait.as_mut()).is_pending());
        assert_eq!(waiting(&applied), 2);
    }
    assert_eq!(waiting(&applied), 1);
    apply(&applied, 1);
    assert_eq!((gone.woken(), stays.woken()), (0, 1));
}

#[tokio::test]
async fn a_wait_goes_on_when_the_state_is_cleared_before_it_is_polled() {
    let applied = AppliedIndex::new(at(0));
    let task = Arc::<WakeCounter>::default();
    let mut wait = pin!(applied.wait_for(2));
    assert!(task.poll(wait.as_mut()).is_pending());
    apply(&applied, 2);
    applied.cleared();
    assert!(task.poll(wait.as_mut()).is_pending());
    applied.restored(at(3));
    assert_eq!(task.woken(), 2);
    assert!(task.poll(wait.as_mut()).is_ready());
}

#[tokio::test(start_paused = true)]
async fn a_wait_that_timed_out_is_removed() {
    let applied = AppliedIndex::new(at(0));
    let second = Duration::from_secs(1);
    let waited = applied.wait_for_timeout(1, second, WAITERS_MAX).await;
    assert_eq!((waited, waiting(&applied)), (Err(WaitError::TimedOut), 0));
}

#[tokio::test]
async fn a_waiter_beyond_the_limit_is_refused_and_reach_has_no_limit() {
    let applied = AppliedIndex::new(at(0));
    let task = Arc::<WakeCounter>::default();
    let mut waits: Vec<_> = (1..)
        .take(WAITERS_MAX)
        .map(|seq| Box::pin(applied.wait_for_timeout(seq, WAIT_MAX, WAITERS_MAX)))
        .collect();
    for wait in &mut waits {
        assert!(task.poll(wait.as_mut()).is_pending());
    }
    let refused = Poll::Ready(Err(WaitError::TooManyWaiters));
    let one_more = || Box::pin(applied.wait_for_timeout(9, WAIT_MAX, WAITERS_MAX));
    assert_eq!(task.poll(one_more().as_mut()), refused);
    let mut wait = pin!(applied.wait_for(9));
    assert!(task.poll(wait.as_mut()).is_pending());
    // Polling a waiter again is not one more.
    assert!(task.poll(waits[3].as_mut()).is_pending());
    assert_eq!(waiting(&applied), WAITERS_MAX + 1);
    // An applied position needs no wait, so no limit applies.
    apply(&applied, 2);
    let mut reached = pin!(applied.wait_for_timeout(2, WAIT_MAX, 0));
    assert_eq!(task.poll(reached.as_mut()), Poll::Ready(Ok(())));
    assert!(task.poll(one_more().as_mut()).is_pending());
}

#[derive(Debug, Clone)]
enum WaitStep {
    Wait(Seq),
    Drop(usize),
    Apply(Seq),
}

fn step() -> impl Strategy<Value = WaitStep> {
    prop_oneof![
        (0..20u64).prop_map(WaitStep::Wait),
        (0..20usize).prop_map(WaitStep::Drop),
        (1..3u64).prop_map(WaitStep::Apply),
    ]
}

proptest! {
    /// The model is a list of all waiters.
    #[test]
    fn waiters_are_woken_as_in_a_list(steps in proptest::collection::vec(step(), 0..60)) {
        let applied = AppliedIndex::new(at(0));
        let mut waits = Vec::new();
        for step in steps {
            match step {
                WaitStep::Wait(seq) => {
                    let (task, mut wait) = (Arc::<WakeCounter>::default(), Box::pin(applied.wait_for(seq)));
                    let reached = task.poll(wait.as_mut()).is_ready();
                    prop_assert_eq!(reached, seq <= applied.seq());
                    if !reached {
                        waits.push((seq, task, wait));
                    }
                }
                WaitStep::Drop(index) if index < waits.len() => drop(waits.remove(index)),
                WaitStep::Drop(_) => {}
                WaitStep::Apply(count) => apply(&applied, applied.seq() + count),
            }
            for (seq, task, _) in &waits {
                prop_assert_eq!(task.woken(), usize::from(*seq <= applied.seq()));
            }
            let later = waits.iter().filter(|(seq, ..)| *seq > applied.seq()).count();
            prop_assert_eq!(waiting(&applied), later);
        }
    }
}
