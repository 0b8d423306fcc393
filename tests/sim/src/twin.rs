//! The log's twin: as a process sees the JetStream log, with a broker that is part of the
//! simulation. What it promises is what the real one does: see `gradestore::log::Log`.

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use gradestore::log::{
    Announce, Announcement, AppendError, Batch, Entry, Extent, Log, LogId, Origin, ReadError, Seq,
    Subscription,
};
use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout};

use crate::broker::DEDUP_WINDOW;
use crate::coroutine;
use crate::world::World;

/// How long an answer may take before a batch is sent again.
const ACK_WAIT: Duration = Duration::from_millis(1500);
/// Entries handed out at once.
pub const GIVE_MAX: usize = 6;

pub struct Twin(Arc<Shared>);

struct Shared {
    world: World,
    node: usize,
    origin: Origin,
    id: LogId,
    extent: Mutex<Extent>,
    lost: Mutex<Option<ReadError>>,
    /// The last own batch that came back.
    back: Mutex<u64>,
}

impl Twin {
    /// Opens the log; waits for the broker.
    pub async fn open(world: World, node: usize, origin: Origin) -> Self {
        loop {
            let rtt = world.latency(node);
            sleep(rtt).await;
            {
                let mut state = world.lock();
                let slot = &state.nodes[node];
                if !slot.mute && !slot.deaf && state.session(node).is_ok() {
                    let extent = Mutex::new(state.broker.extent());
                    let id = state.broker.id.clone();
                    drop(state);
                    return Self(Arc::new(Shared {
                        world,
                        node,
                        origin,
                        id,
                        extent,
                        lost: Mutex::default(),
                        back: Mutex::default(),
                    }));
                }
            }
            world.wait().await;
        }
    }
}

impl Shared {
    fn session(&self) -> Result<u64, Arc<str>> {
        if let Some(error) = &*self.lost.lock() {
            return Err(error.to_string().into());
        }
        self.world.lock().session(self.node).map_err(Into::into)
    }

    async fn next_session(&self) -> Result<u64, ReadError> {
        loop {
            if let Some(error) = &*self.lost.lock() {
                return Err(error.clone());
            }
            if let Ok(session) = self.session() {
                return Ok(session);
            }
            self.world.wait().await;
        }
    }

    fn lose(&self, error: &ReadError) {
        if !matches!(error, ReadError::Trimmed { .. }) {
            *self.lost.lock() = Some(error.clone());
            self.world.change();
        }
    }

    /// A question to the broker and its answer; `false` if either was lost.
    async fn round_trip(&self, session: u64) -> bool {
        sleep(self.world.latency(self.node)).await;
        let reached = !self.world.slot(self.node).mute;
        sleep(self.world.latency(self.node)).await;
        let answered = !self.world.slot(self.node).deaf;
        if reached && answered && self.session() == Ok(session) {
            return true;
        }
        sleep(ACK_WAIT).await;
        false
    }

    /// Looks at the stream: whether it is the same still, and how far it goes.
    async fn look_now(&self) -> Result<(Extent, u64), ReadError> {
        loop {
            let session = self.next_session().await?;
            if !self.round_trip(session).await {
                continue;
            }
            let state = self.world.lock();
            if state.broker.id != self.id {
                return Err(ReadError::Replaced {
                    was: self.id.clone(),
                    is: state.broker.id.clone(),
                });
            }
            let extent = state.broker.extent();
            *self.extent.lock() = extent;
            return Ok((extent, session));
        }
    }

    async fn publish(&self, batch: Batch) -> Result<(), AppendError> {
        let mut session = self.session().map_err(AppendError::Refused)?;
        let give_up_at = Instant::now() + DEDUP_WINDOW / 3;
        loop {
            let (answer, answered) = oneshot::channel();
            tokio::spawn(deliver(
                self.world.clone(),
                self.node,
                batch.clone(),
                answer,
            ));
            let acked = async {
                match answered.await {
                    Ok(()) => {}
                    // It was lost: nobody will say so.
                    Err(_) => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = self.came_back(batch.number) => return Ok(()),
                acked = timeout(ACK_WAIT, acked) => if acked.is_ok() {
                    return Ok(());
                },
                () = self.ended(session) => {}
            }
            let next = tokio::time::timeout_at(give_up_at, self.next_session());
            session = tokio::select! {
                biased;
                () = self.came_back(batch.number) => return Ok(()),
                next = next => match next {
                    Ok(Ok(next)) if Instant::now() < give_up_at => next,
                    _ => return Err(AppendError::Unknown),
                },
            };
        }
    }

    async fn came_back(&self, number: u64) {
        while *self.back.lock() < number {
            self.world.wait().await;
        }
    }

    async fn ended(&self, session: u64) {
        while self.session() == Ok(session) {
            self.world.wait().await;
        }
    }
}

/// A batch on its way to the broker, whatever becomes of its sender, and the answer on its way back.
async fn deliver(world: World, node: usize, batch: Batch, answer: oneshot::Sender<()>) {
    if world.slot(node).mute {
        return;
    }
    sleep(world.latency(node)).await;
    let again = {
        let mut state = world.lock();
        if state.nodes[node].mute || !state.broker.up {
            return;
        }
        let state = &mut *state;
        let end = state.broker.end();
        state.broker.store(batch.clone(), false, &mut state.ledger);
        (state.broker.end() > end) && std::mem::take(&mut state.nodes[node].store_twice)
    };
    world.change();
    if again {
        // One that was thought lost comes late, when the broker does not know it any more.
        let world = world.clone();
        tokio::spawn(async move {
            sleep(Duration::from_secs(3)).await;
            let mut state = world.lock();
            let state = &mut *state;
            state.broker.store(batch, true, &mut state.ledger);
            world.change();
        });
    }
    sleep(world.latency(node)).await;
    let lost = {
        let mut slot = world.slot(node);
        slot.deaf || std::mem::take(&mut slot.ack_lost)
    };
    if !lost {
        let _ = answer.send(());
    }
}

impl Log for Twin {
    fn kind(&self) -> &'static str {
        "sim"
    }

    fn id(&self) -> LogId {
        // Blocking work asks for it between taking a position and reading records.
        let world = &self.0.world;
        coroutine::pause(world.runtime(), world.pause(0..40));
        self.0.id.clone()
    }

    fn first(&self) -> Seq {
        self.0.extent.lock().first
    }

    fn end(&self) -> Seq {
        self.0.extent.lock().end
    }

    fn in_flight_max(&self) -> usize {
        1
    }

    fn append(&self, batch: Batch) -> BoxFuture<'_, Result<(), AppendError>> {
        self.0.publish(batch).boxed()
    }

    fn away(&self) -> Option<Arc<str>> {
        self.0.session().err()
    }

    fn look(&self) -> BoxFuture<'_, Result<Extent, ReadError>> {
        async {
            let looked = self.0.look_now().await;
            let looked = looked.inspect_err(|error| self.0.lose(error));
            looked.map(|(extent, _)| extent)
        }
        .boxed()
    }

    fn announce(&self, announce: Announce) {
        self.0.world.slot(self.0.node).announce = Some(announce);
    }

    fn peers(&self) -> BoxFuture<'_, Vec<Announcement>> {
        async {
            let Ok(session) = self.0.session() else {
                return Vec::new();
            };
            if !self.0.round_trip(session).await {
                return Vec::new();
            }
            let others: Vec<Announce> = {
                let state = self.0.world.lock();
                let heard = |(node, slot): (usize, &crate::world::Slot)| {
                    let there = node != self.0.node && !slot.mute && !slot.deaf;
                    slot.announce.clone().filter(|_| there)
                };
                state.nodes.iter().enumerate().filter_map(heard).collect()
            };
            let said = others.iter().map(|announce| announce());
            said.filter(|said| said.log_id == self.0.id.0).collect()
        }
        .boxed()
    }

    fn shared(&self) -> bool {
        true
    }

    fn subscribe(&self, after: Seq) -> BoxFuture<'_, Result<Box<dyn Subscription>, ReadError>> {
        TwinSubscription::begin(Arc::clone(&self.0), after + 1, None).boxed()
    }

    fn resume(
        &self,
        after: Seq,
        time_ns: u64,
    ) -> BoxFuture<'_, Result<Box<dyn Subscription>, ReadError>> {
        TwinSubscription::begin(Arc::clone(&self.0), after + 1, Some(time_ns)).boxed()
    }
}

struct TwinSubscription {
    shared: Arc<Shared>,
    wanted: Seq,
    before_ns: Option<u64>,
    session: Option<u64>,
}

impl TwinSubscription {
    async fn begin(
        shared: Arc<Shared>,
        wanted: Seq,
        before_ns: Option<u64>,
    ) -> Result<Box<dyn Subscription>, ReadError> {
        let mut this = Self {
            shared,
            wanted,
            before_ns,
            session: None,
        };
        this.session = Some(this.check().await?);
        Ok(Box::new(this))
    }

    /// Whether the log goes on from here; the connection it was asked over.
    async fn check(&self) -> Result<u64, ReadError> {
        let (extent, session) = self.shared.look_now().await?;
        let (wanted, Extent { first, end }) = (self.wanted, extent);
        if wanted < first {
            return Err(ReadError::Trimmed { first, wanted });
        }
        if wanted > end + 1 {
            let applied = wanted - 1;
            return Err(ReadError::Shorter { end, applied });
        }
        let state = self.shared.world.lock();
        let seq = wanted - 1;
        match (state.broker.get(seq), self.before_ns) {
            (Some(before), Some(time_ns)) if before.time_ns != time_ns => {
                Err(ReadError::Rewritten { seq })
            }
            _ => Ok(session),
        }
    }

    /// Whether there is something to give over the connection that is there.
    fn available(&mut self) -> bool {
        let mut state = self.shared.world.lock();
        let session = state.session(self.shared.node).ok();
        let broker = &state.broker;
        if session != self.session
            || broker.id != self.shared.id
            || self.wanted < broker.extent().first
        {
            self.session = None;
            return false;
        }
        let slot = &state.nodes[self.shared.node];
        self.wanted <= broker.end() && !slot.deaf
    }

    async fn give(&mut self, entries: &mut Vec<Entry>) -> Result<(), ReadError> {
        loop {
            if let Some(error) = &*self.shared.lost.lock() {
                return Err(error.clone());
            }
            if self.session.is_none() {
                let session = self.check().await;
                self.session = Some(session.inspect_err(|error| self.shared.lose(error))?);
            }
            if !self.available() {
                if self.session.is_some() {
                    self.shared.world.wait().await;
                }
                continue;
            }
            sleep(self.shared.world.latency(self.shared.node)).await;
            // From here on nothing waits, so nothing that was taken can be dropped.
            if self.available() {
                self.take(entries);
                return Ok(());
            }
        }
    }

    fn take(&mut self, entries: &mut Vec<Entry>) {
        let mut state = self.shared.world.lock();
        let state = &mut *state;
        let slot = &mut state.nodes[self.shared.node];
        if std::mem::take(&mut slot.repeat_next) {
            entries.extend(state.broker.get(self.wanted - 1).cloned());
        }
        // One that nothing comes after could not be missed.
        if self.wanted < state.broker.end() && std::mem::take(&mut slot.lose_next) {
            slot.losses += 1;
            self.wanted += 1;
        }
        for _ in 0..state.rng.usize(1..=GIVE_MAX) {
            let Some(entry) = state.broker.get(self.wanted) else {
                break;
            };
            self.wanted += 1;
            self.before_ns = Some(entry.time_ns);
            if entry.batch.origin == self.shared.origin {
                let mut back = self.shared.back.lock();
                *back = entry.batch.number.max(*back);
            }
            entries.push(entry.clone());
        }
        let end = state.broker.end();
        let mut extent = self.shared.extent.lock();
        extent.end = end.max(extent.end);
        drop(extent);
        self.shared.world.change();
    }
}

impl Subscription for TwinSubscription {
    fn next<'a>(&'a mut self, entries: &'a mut Vec<Entry>) -> BoxFuture<'a, Result<(), ReadError>> {
        self.give(entries).boxed()
    }
}
