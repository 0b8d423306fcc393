//! The broker, as the JetStream log of one process reaches it: connections, requests and their
//! answers, consumers.
//!
//! What one connection carries arrives in the order in which it was sent. A cut link delays it for as
//! long as the connection lasts. What was under way when a client ended its connection may still
//! arrive, later than what it has sent over the next one.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_nats::jetstream::stream::Config;
use futures_util::FutureExt;
use futures_util::future::{BoxFuture, pending};
use gradestore::log::broker::{
    Asked, Broker, BrokerError, ConnectError, Connection, Consumer, Delivered, InfoSource,
    Outgoing, RawMessage, Stored, StreamInfo,
};
use gradestore::log::{Announce, Announcement, RandomId, Seq};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use crate::broker::Message;
use crate::message::Delivery;
use crate::world::{Isolated, Link, State, World};

/// How long a connection may take to be made.
const CONNECT_WAIT_MAX: Duration = Duration::from_secs(3);
/// How long the broker may take to answer.
const ANSWER_WAIT_MAX: Duration = Duration::from_secs(2);
/// A consumer without heartbeats has ended after this.
const HEARTBEATS_MISSED: Duration = Duration::from_secs(1);
/// How long other replicas' announcements are waited for.
const ANNOUNCE_WAIT: Duration = Duration::from_millis(100);
/// Messages that arrive at once, at most.
pub const ARRIVE_MAX: usize = 6;
const MESSAGE_BYTES_MAX: usize = 1 << 20;

/// The broker, for one process.
pub struct SimBroker {
    world: World,
    node: usize,
    /// Cancelled when the process is no more.
    gone: CancellationToken,
    /// Its consumers.
    consumers: Arc<AtomicUsize>,
}

impl SimBroker {
    pub fn new(world: World, node: usize, gone: CancellationToken) -> Self {
        Self {
            world,
            node,
            gone,
            consumers: Arc::default(),
        }
    }

    async fn connect(&self) -> Result<Arc<dyn Connection>, ConnectError> {
        let (world, node) = (&self.world, self.node);
        sleep(world.latency(node)).await;
        world.thawed(node).await;
        if !world.lock().broker.up {
            return Err(ConnectError::Unreachable("connection refused".into()));
        }
        let cut = {
            let slot = world.slot(node);
            slot.mute || slot.deaf
        };
        if cut {
            sleep(CONNECT_WAIT_MAX).await;
            return Err(ConnectError::Unreachable("timed out".into()));
        }
        sleep(world.latency(node)).await;
        if self.gone.is_cancelled() {
            return pending().await;
        }
        if !world.lock().broker.up {
            return Err(ConnectError::Unreachable("connection reset".into()));
        }
        let link = world.lock().connect(node);
        let (packets, received) = mpsc::unbounded_channel();
        tokio::spawn(carry(world.clone(), node, Arc::clone(&link), received));
        Ok(Arc::new(SimConnection {
            wire: Wire {
                world: world.clone(),
                node,
                link,
            },
            packets,
            consumers: Arc::clone(&self.consumers),
        }))
    }
}

impl Broker for SimBroker {
    fn connect(&self) -> BoxFuture<'_, Result<Arc<dyn Connection>, ConnectError>> {
        self.connect().boxed()
    }

    fn servers(&self) -> String {
        "sim".to_owned()
    }

    fn random_id(&self) -> Result<RandomId, getrandom::Error> {
        Ok(RandomId::of(self.world.lock().next_id()))
    }
}

/// One end of a connection.
#[derive(Clone)]
struct Wire {
    world: World,
    node: usize,
    link: Arc<Link>,
}

/// Something on its way to the broker.
struct Packet {
    sent_at: Instant,
    /// How often the broker's clock had jumped then.
    jumps: u32,
    publishes: bool,
    arrive: Box<dyn FnOnce(bool) + Send>,
}

/// Carries what one connection sends, in order.
async fn carry(
    world: World,
    node: usize,
    link: Arc<Link>,
    mut packets: mpsc::UnboundedReceiver<Packet>,
) {
    let mut arrives_at = Instant::now();
    while let Some(packet) = packets.recv().await {
        arrives_at = arrives_at.max(packet.sent_at + world.latency(node));
        sleep_until(arrives_at).await;
        while !link.is_dead() && world.slot(node).sends_nothing() {
            world.wait().await;
        }
        let held = match packet.publishes {
            true => world.slot(node).hold_next.take(),
            false => None,
        };
        if let Some(ms) = held {
            sleep(Duration::from_millis(ms)).await;
        }
        // What was under way while minutes passed has long arrived, or never will.
        let late = packet.jumps != world.lock().broker.jumps;
        if link.is_dead() || (late && link.ended.is_cancelled()) {
            return;
        }
        (packet.arrive)(late);
    }
}

struct SimConnection {
    wire: Wire,
    packets: mpsc::UnboundedSender<Packet>,
    consumers: Arc<AtomicUsize>,
}

/// A request that has arrived.
struct Arrived<'a> {
    state: &'a mut State,
    node: usize,
    /// The server that it came to, if that is isolated.
    isolated: Option<Isolated>,
    /// The broker's clock has jumped since it was sent.
    late: bool,
}

impl Arrived<'_> {
    /// An error for what only the stream's leader does; `Some(None)`: no answer comes.
    fn leader(&mut self) -> Option<Option<BrokerError>> {
        if self.isolated.is_some() {
            return Some(None);
        }
        let troubles = &self.state.broker.troubles;
        if troubles.leaderless > 0 || troubles.short.is_some() {
            let error = BrokerError::NoResponders("no leader".into());
            return Some((!troubles.silent).then_some(error));
        }
        if troubles.gone > 0 {
            return Some(Some(BrokerError::NoStream));
        }
        None
    }

    fn info(&mut self) -> Option<Result<StreamInfo, BrokerError>> {
        let mut info = self.state.broker.info();
        if let Some(isolated) = &self.isolated {
            let leads = isolated.leader_until.is_some_and(|at| Instant::now() < at);
            if let Ok(info) = &mut info {
                (info.first, info.last) = (isolated.first, isolated.last);
                info.source = match leads {
                    true => InfoSource::Leader,
                    false => InfoSource::Follower,
                };
            }
            return Some(info);
        }
        let troubles = &self.state.broker.troubles;
        if troubles.gone > 0 {
            return Some(Err(BrokerError::NoStream));
        }
        if troubles.leaderless > 0 {
            if troubles.silent {
                return None;
            }
            if self.state.rng.bool() {
                return Some(Err(BrokerError::NoResponders("no leader".into())));
            }
            let follower = |info: &mut StreamInfo| info.source = InfoSource::Follower;
            let _ = info.as_mut().map(follower);
        }
        Some(info)
    }

    fn publish(&mut self, message: Message) -> Option<Result<Stored, BrokerError>> {
        let no_leader = || Err(BrokerError::NoResponders("no leader".into()));
        if let Some(isolated) = &self.isolated {
            // A leader takes it and can't have it stored.
            let leads = isolated.leader_until.is_some_and(|at| Instant::now() < at);
            return (!leads).then(no_leader);
        }
        let troubles = &self.state.broker.troubles;
        if troubles.leaderless > 0 || troubles.gone > 0 || troubles.short.is_some() {
            return Some(no_leader());
        }
        if troubles.quorumless > 0 {
            self.state.broker.propose(message);
            return None;
        }
        if troubles.full > 0 {
            let why = "insufficient resources (code 503, error code 10023)";
            return Some(Err(BrokerError::Refused(why.into())));
        }
        self.state.publish(message, self.late)
    }

    /// `held` says whether others held data when the request was sent: it can't be taken back.
    fn create(&mut self, config: Config, held: bool) -> Option<Result<StreamInfo, BrokerError>> {
        match self.leader() {
            // The one that is lost may be restored; another one in its place may not be.
            Some(Some(BrokerError::NoStream)) if held => {
                let node = self.node;
                let what = format!("node {node} creates a stream, and others hold data");
                self.state.violate(what);
            }
            None | Some(Some(BrokerError::NoStream)) => {}
            Some(error) => return error.map(Err),
        }
        Some(self.state.broker.create(config))
    }

    fn message(&mut self, seq: Seq) -> Option<Result<Option<RawMessage>, BrokerError>> {
        let broker = &self.state.broker;
        if broker.troubles.gone > 0 {
            let why = "stream not found (error 10059)";
            return Some(Err(BrokerError::Refused(why.into())));
        }
        let end = match &self.isolated {
            Some(isolated) => isolated.last,
            None => broker.shown_end(),
        };
        Some(Ok(broker.raw(seq).filter(|_| seq <= end)))
    }
}

impl State {
    /// Stores `message`, or not.
    pub fn publish(&mut self, message: Message, late: bool) -> Option<Result<Stored, BrokerError>> {
        let sender = message.sender;
        match self.broker.publish(message, late, &mut self.ledger) {
            Ok(stored) => {
                if let (Ok(_), Some(node)) = (&stored, sender) {
                    let slot = &mut self.nodes[node];
                    let log = slot.process.as_ref().map(|process| &process.log);
                    let is_other = log.is_some_and(|log| self.broker.log() != Some(log));
                    slot.refused_since = None;
                    slot.unstored_since = None;
                    slot.frozen |= std::mem::take(&mut slot.freeze_when_stored);
                    if is_other {
                        self.violate(format!("node {node} appends to another log"));
                    }
                }
                Some(stored)
            }
            Err(violation) => {
                self.violate(violation);
                None
            }
        }
    }
}

impl SimConnection {
    /// Sends a request. `act` is what the server does; it answers, or not.
    async fn request<T: Send + 'static>(
        &self,
        publishes: bool,
        act: impl FnOnce(Arrived) -> Option<Result<T, BrokerError>> + Send + 'static,
    ) -> Result<T, BrokerError> {
        let ended = || BrokerError::NoAnswer("the connection has ended".into());
        if !publishes {
            self.wire.world.lock().count_request(self.wire.node);
        }
        if self.wire.link.ended.is_cancelled() {
            return Err(ended());
        }
        let (answer, answered) = oneshot::channel();
        let wire = self.wire.clone();
        let arrive = move |late| {
            let answer_is = {
                let mut state = wire.world.lock();
                let state = &mut *state;
                let isolated = state.nodes[wire.node].isolated_for(&wire.link).cloned();
                act(Arrived {
                    state,
                    node: wire.node,
                    isolated,
                    late,
                })
            };
            wire.world.change();
            if let Some(answer_is) = answer_is {
                tokio::spawn(wire.answer(publishes, answer_is, answer));
            }
        };
        let packet = Packet {
            sent_at: Instant::now(),
            jumps: self.wire.world.lock().broker.jumps,
            publishes,
            arrive: Box::new(arrive),
        };
        // The other end is there as long as this one is, unless the connection is dead.
        let _ = self.packets.send(packet);
        let answered = async {
            match answered.await {
                Ok(answer) => answer,
                // It was lost; nobody says so.
                Err(_) => pending().await,
            }
        };
        tokio::select! {
            biased;
            answered = timeout(ANSWER_WAIT_MAX, answered) => {
                let silent = |_| BrokerError::NoAnswer("no answer within 2 s".into());
                answered.map_err(silent)?
            }
            () = self.wire.link.ended.cancelled() => Err(ended()),
        }
    }

    async fn consume(&self, from: Seq) -> Result<Box<dyn Consumer>, BrokerError> {
        let node = self.wire.node;
        let created = self.request(false, move |mut arrived| {
            if let Some(error) = arrived.leader() {
                return error.map(Err);
            }
            let state = arrived.state;
            if state.broker.troubles.metadata_leaderless > 0 {
                return None;
            }
            let unreadable = state.broker.unreadable;
            let slot = &mut state.nodes[node];
            slot.consumer += 1;
            let generation = slot.consumer;
            if let Err(count) = slot.count_consume(unreadable) {
                state.violate(format!("node {node} has made {count} consumers in 30 s"));
            }
            Some(Ok(generation))
        });
        let generation = created.await?;
        if self.consumers.fetch_add(1, Ordering::Relaxed) > 0 {
            let what = format!("node {node} reads with two consumers");
            self.wire.world.violate(what);
        }
        Ok(Box::new(SimConsumer {
            wire: self.wire.clone(),
            generation,
            wanted: from,
            arrived: VecDeque::new(),
            silent_since: None,
            consumers: Arc::clone(&self.consumers),
        }))
    }

    async fn ask_peers(&self, who: Asked, nonce: RandomId) -> Result<Vec<Announcement>, String> {
        let link = Arc::clone(&self.wire.link);
        let (node, to) = (self.wire.node, link);
        let asked = self.request(false, move |arrived| {
            let alone = arrived.isolated.is_some() && to.to_isolated;
            let slots = arrived.state.nodes.iter().enumerate();
            let heard = slots.filter(|(other, slot)| {
                let there = !slot.sends_nothing() && !slot.receives_nothing();
                *other == node || (there && !alone && slot.isolated.is_none())
            });
            let said = heard.flat_map(|(_, slot)| &slot.announces);
            Some(Ok(said
                .map(|(_, said)| Arc::clone(said))
                .collect::<Vec<_>>()))
        });
        let asked = match asked.await {
            Ok(asked) => asked,
            Err(_) if !self.wire.link.ended.is_cancelled() => Vec::new(),
            Err(error) => return Err(error.to_string()),
        };
        let nonce = nonce.to_string();
        match who {
            Asked::All => {
                sleep(ANNOUNCE_WAIT).await;
                Ok(asked.iter().map(|announce| announce(&nonce)).collect())
            }
            Asked::Replica(replica) => {
                let replica = replica.to_string();
                let mut said: Vec<_> = asked.iter().map(|announce| announce(&nonce)).collect();
                said.retain(|said| *said.replica == *replica);
                Ok(said)
            }
        }
    }
}

impl Wire {
    /// Brings `what` to the client.
    async fn answer<T>(self, to_publish: bool, what: T, answer: oneshot::Sender<T>) {
        sleep(self.world.latency(self.node)).await;
        while !self.link.ended.is_cancelled() && self.world.slot(self.node).receives_nothing() {
            self.world.wait().await;
        }
        let lost = to_publish && std::mem::take(&mut self.world.slot(self.node).ack_lost);
        if !lost && !self.link.ended.is_cancelled() {
            // The client may have given up.
            let _ = answer.send(what);
        }
    }

    fn end(&self) {
        let mut state = self.world.lock();
        self.link.end(&mut state.rng);
    }
}

impl Drop for SimConnection {
    fn drop(&mut self) {
        self.wire.end();
    }
}

impl Connection for SimConnection {
    fn ended(&self) -> &CancellationToken {
        &self.wire.link.ended
    }

    fn message_bytes_max(&self) -> usize {
        MESSAGE_BYTES_MAX
    }

    fn is_clustered(&self) -> bool {
        self.wire.world.lock().broker.clustered
    }

    fn stream_info(&self) -> BoxFuture<'_, Result<StreamInfo, BrokerError>> {
        async {
            let info = self.request(false, |mut arrived| arrived.info()).await;
            let (world, node) = (&self.wire.world, self.wire.node);
            // Before there is a consumer the node asks where to read from.
            let reads = self.consumers.load(Ordering::Relaxed) > 0;
            if info.is_ok() && reads && world.lock().lose_unread(node) {
                world.change();
            }
            info
        }
        .boxed()
    }

    fn create_stream(&self, config: Config) -> BoxFuture<'_, Result<StreamInfo, BrokerError>> {
        let held = self.wire.world.lock().is_held_elsewhere(self.wire.node);
        self.request(false, move |mut arrived| arrived.create(config, held))
            .boxed()
    }

    fn publish(&self, message: Outgoing) -> BoxFuture<'_, Result<Stored, BrokerError>> {
        let Outgoing {
            headers,
            payload,
            expected_last,
        } = message;
        let message = Message::of_replica(self.wire.node, &headers, payload, expected_last);
        async move {
            let (world, node) = (&self.wire.world, self.wire.node);
            if expected_last.is_none() {
                let mut slot = world.slot(node);
                slot.unstored_since.get_or_insert_with(Instant::now);
            }
            let published = self.request(true, |mut arrived| arrived.publish(message));
            let published = published.await;
            if let Err(BrokerError::Refused(_)) = &published {
                let mut slot = world.slot(node);
                slot.refused_since.get_or_insert_with(Instant::now);
            }
            published
        }
        .boxed()
    }

    fn consume(&self, from: Seq) -> BoxFuture<'_, Result<Box<dyn Consumer>, BrokerError>> {
        self.consume(from).boxed()
    }

    fn message(&self, seq: Seq) -> BoxFuture<'_, Result<Option<RawMessage>, BrokerError>> {
        self.request(false, move |mut arrived| arrived.message(seq))
            .boxed()
    }

    fn announce(
        &self,
        announce: Announce,
        stop: CancellationToken,
    ) -> BoxFuture<'_, Result<(), String>> {
        async move {
            let _announced = Announced::new(&self.wire, announce);
            tokio::select! {
                biased;
                () = stop.cancelled() => {}
                () = self.wire.link.ended.cancelled() => {}
            }
            Ok(())
        }
        .boxed()
    }

    fn ask_peers(
        &self,
        to: Asked,
        nonce: RandomId,
    ) -> BoxFuture<'_, Result<Vec<Announcement>, String>> {
        self.ask_peers(to, nonce).boxed()
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        async { self.wire.end() }.boxed()
    }
}

/// Others hear the announcement as long as this is there.
struct Announced {
    world: World,
    node: usize,
    id: u64,
}

impl Announced {
    fn new(wire: &Wire, announce: Announce) -> Self {
        let mut state = wire.world.lock();
        let id = state.next_id() as u64;
        state.nodes[wire.node].announces.push((id, announce));
        Self {
            world: wire.world.clone(),
            node: wire.node,
            id,
        }
    }
}

impl Drop for Announced {
    fn drop(&mut self) {
        let mut slot = self.world.slot(self.node);
        slot.announces.retain(|(id, _)| *id != self.id);
    }
}

struct SimConsumer {
    wire: Wire,
    generation: u64,
    wanted: Seq,
    /// What has arrived and was not taken yet.
    arrived: VecDeque<Delivered>,
    /// Since when no heartbeats come.
    silent_since: Option<Instant>,
    consumers: Arc<AtomicUsize>,
}

/// Whether a consumer has something to deliver.
enum Available {
    Yes,
    /// Not now; it says so by heartbeats.
    Nothing,
    /// Not now, and it says nothing.
    Silent,
    Deleted,
}

impl SimConsumer {
    fn available(&self) -> Available {
        let mut state = self.wire.world.lock();
        let state = &mut *state;
        let (slot, broker) = (&state.nodes[self.wire.node], &state.broker);
        if slot.consumer != self.generation {
            return Available::Deleted;
        }
        if slot.receives_nothing() {
            return Available::Silent;
        }
        if let Some(isolated) = slot.isolated_for(&self.wire.link) {
            return match isolated.heartbeats {
                true => Available::Nothing,
                false => Available::Silent,
            };
        }
        let troubles = &broker.troubles;
        if troubles.gone > 0 {
            return Available::Deleted;
        }
        match broker.shown_end() >= self.wanted {
            true if troubles.leaderless == 0 && !slot.loses_unread => Available::Yes,
            _ => Available::Nothing,
        }
    }

    async fn arrive(&mut self) -> Result<(), BrokerError> {
        let error = |why: &str| Err(BrokerError::NoAnswer(why.into()));
        if self.wire.link.ended.is_cancelled() {
            return error("the connection has ended");
        }
        match self.available() {
            Available::Yes => {
                self.silent_since = None;
                sleep(self.wire.world.latency(self.wire.node)).await;
                if matches!(self.available(), Available::Yes) {
                    self.take();
                }
                return Ok(());
            }
            Available::Nothing => self.silent_since = None,
            Available::Silent => {
                let since = *self.silent_since.get_or_insert_with(Instant::now);
                if since.elapsed() >= HEARTBEATS_MISSED {
                    return error("missed idle heartbeat");
                }
            }
            Available::Deleted => return error("consumer deleted"),
        }
        tokio::select! {
            biased;
            () = self.wire.link.ended.cancelled() => {}
            () = self.wire.world.wait() => {}
        }
        Ok(())
    }

    /// Some messages arrive.
    fn take(&mut self) {
        let mut state = self.wire.world.lock();
        let state = &mut *state;
        let slot = &mut state.nodes[self.wire.node];
        let (broker, end) = (&state.broker, state.broker.shown_end());
        // Trimmed before the consumer came to them: the next one that it gets shows a gap.
        if self.wanted < broker.first() {
            slot.losses += 1;
            self.wanted = broker.first();
        }
        let delivered = |seq: Seq| {
            let entry = broker.get(seq)?;
            let Delivery::Ordinary(headers) = &entry.delivery else {
                return None;
            };
            Some(Delivered {
                seq,
                time_ns: entry.time_ns,
                pending: end - seq,
                headers: headers.clone(),
                payload: entry.payload(),
            })
        };
        if std::mem::take(&mut slot.repeat_next) {
            self.arrived.extend(delivered(self.wanted - 1));
        }
        // One that nothing comes after could not be missed.
        if self.wanted < end && std::mem::take(&mut slot.lose_next) {
            slot.losses += 1;
            self.wanted += 1;
        }
        for _ in 0..state.rng.usize(1..=ARRIVE_MAX) {
            let Some(entry) = broker.get(self.wanted).filter(|_| self.wanted <= end) else {
                break;
            };
            match entry.delivery {
                Delivery::Ordinary(_) => self.arrived.extend(delivered(self.wanted)),
                Delivery::Status => {}
                Delivery::EndsConnection => {
                    self.wire.link.end(&mut state.rng);
                    break;
                }
            }
            self.wanted += 1;
        }
    }
}

impl Consumer for SimConsumer {
    fn next(&mut self) -> BoxFuture<'_, Result<Delivered, BrokerError>> {
        async {
            loop {
                if let Some(delivered) = self.arrived.pop_front() {
                    return Ok(delivered);
                }
                self.arrive().await?;
            }
        }
        .boxed()
    }

    fn try_next(&mut self) -> Option<Result<Delivered, BrokerError>> {
        self.arrived.pop_front().map(Ok)
    }
}

impl Drop for SimConsumer {
    fn drop(&mut self) {
        self.consumers.fetch_sub(1, Ordering::Relaxed);
    }
}
