//! One process' connections to the broker.
//!
//! A connection delivers messages in the order in which they were sent. A cut link delays them for
//! as long as the connection lasts. Messages in flight when a client ends its connection may still
//! arrive, even after messages that it has sent over the next one.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_nats::jetstream::stream::Config;
use futures_util::FutureExt;
use futures_util::future::{BoxFuture, pending};
use gradestore::log::broker::{
    Broker, BrokerConnection, BrokerError, ConnectError, Consumer, Outgoing, PeerQuery, RawMessage,
    Stored, StreamInfo,
};
use gradestore::log::{Announce, Announcement, RandomId, Seq};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use crate::broker::Message;
use crate::consumer::SimConsumer;
use crate::server::ServerRequest;
use crate::world::{Link, World};

/// The timeout for connecting.
const CONNECT_WAIT_MAX: Duration = Duration::from_secs(3);
/// The timeout of a request.
const ANSWER_WAIT_MAX: Duration = Duration::from_secs(2);
/// How long announcements of other replicas are collected.
const ANNOUNCE_WAIT: Duration = Duration::from_millis(100);
const MESSAGE_BYTES_MAX: usize = 1 << 20;

/// The broker as one process sees it.
pub struct SimBroker {
    world: World,
    node: usize,
    /// Cancelled when the process has ended.
    gone: CancellationToken,
    /// The number of its consumers.
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

    async fn connect(&self) -> Result<Arc<dyn BrokerConnection>, ConnectError> {
        let (world, node) = (&self.world, self.node);
        sleep(world.latency(node)).await;
        world.wait_until_resumed(node).await;
        if !world.lock().broker.up {
            return Err(ConnectError::Unreachable("connection refused".into()));
        }
        let cut = {
            let slot = world.slot(node);
            slot.outbound_cut || slot.inbound_cut
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
        tokio::spawn(deliver(world.clone(), node, Arc::clone(&link), received));
        Ok(Arc::new(SimConnection {
            client_end: ConnectionEnd {
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
    fn connect(&self) -> BoxFuture<'_, Result<Arc<dyn BrokerConnection>, ConnectError>> {
        self.connect().boxed()
    }

    fn servers(&self) -> String {
        "sim".to_owned()
    }

    fn random_id(&self) -> Result<RandomId, getrandom::Error> {
        Ok(RandomId::of(self.world.lock().next_id()))
    }
}

/// A client's end of a connection.
#[derive(Clone)]
pub struct ConnectionEnd {
    pub world: World,
    pub node: usize,
    pub link: Arc<Link>,
}

/// A request on its way to the broker.
struct Packet {
    sent_at: Instant,
    /// How often the broker's clock had jumped when it was sent.
    jumps: u32,
    publishes: bool,
    arrive: Box<dyn FnOnce(bool) + Send>,
}

/// Delivers the packets of one connection, in order.
async fn deliver(
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
            true => world.slot(node).delay_next_publish_ms.take(),
            false => None,
        };
        if let Some(ms) = held {
            sleep(Duration::from_millis(ms)).await;
        }
        // A packet from before a jump of the clock has arrived long ago, or never will.
        let late = packet.jumps != world.lock().broker.jumps;
        if link.is_dead() || (late && link.ended.is_cancelled()) {
            return;
        }
        (packet.arrive)(late);
    }
}

struct SimConnection {
    client_end: ConnectionEnd,
    packets: mpsc::UnboundedSender<Packet>,
    consumers: Arc<AtomicUsize>,
}

impl SimConnection {
    /// Sends a request. `act` runs on the server; `None` if it does not answer.
    async fn request<T: Send + 'static>(
        &self,
        publishes: bool,
        act: impl FnOnce(ServerRequest) -> Option<Result<T, BrokerError>> + Send + 'static,
    ) -> Result<T, BrokerError> {
        let ended = || BrokerError::NoAnswer("the connection has ended".into());
        if !publishes {
            self.client_end
                .world
                .lock()
                .count_request(self.client_end.node);
        }
        if self.client_end.link.ended.is_cancelled() {
            return Err(ended());
        }
        let (answer, answered) = oneshot::channel();
        let client_end = self.client_end.clone();
        let arrive = move |late| {
            let reply = {
                let mut state = client_end.world.lock();
                let state = &mut *state;
                let isolated = state.nodes[client_end.node]
                    .isolated_for(&client_end.link)
                    .cloned();
                act(ServerRequest {
                    state,
                    node: client_end.node,
                    isolated,
                    late,
                })
            };
            client_end.world.change();
            if let Some(reply) = reply {
                tokio::spawn(client_end.answer(publishes, reply, answer));
            }
        };
        let packet = Packet {
            sent_at: Instant::now(),
            jumps: self.client_end.world.lock().broker.jumps,
            publishes,
            arrive: Box::new(arrive),
        };
        // The receiver exists as long as this sender, unless the connection is dead.
        let _ = self.packets.send(packet);
        let answered = async {
            match answered.await {
                Ok(answer) => answer,
                // The answer was lost.
                Err(_) => pending().await,
            }
        };
        tokio::select! {
            biased;
            answered = timeout(ANSWER_WAIT_MAX, answered) => {
                let silent = |_| BrokerError::NoAnswer("no answer within 2 s".into());
                answered.map_err(silent)?
            }
            () = self.client_end.link.ended.cancelled() => Err(ended()),
        }
    }

    async fn consume(&self, from: Seq) -> Result<Box<dyn Consumer>, BrokerError> {
        let node = self.client_end.node;
        let created = self.request(false, move |mut request| {
            if let Some(error) = request.leader() {
                return error.map(Err);
            }
            let state = request.state;
            if state.broker.faults.no_metadata_leader > 0 {
                return None;
            }
            let unreadable = state.broker.unreadable;
            let slot = &mut state.nodes[node];
            slot.consumer += 1;
            let generation = slot.consumer;
            if let Err(count) = slot.count_consume(unreadable) {
                state.violate(format!("node {node} has created {count} consumers in 30 s"));
            }
            Some(Ok(generation))
        });
        let generation = created.await?;
        if self.consumers.fetch_add(1, Ordering::Relaxed) > 0 {
            let what = format!("node {node} reads with two consumers");
            self.client_end.world.violate(what);
        }
        Ok(Box::new(SimConsumer {
            client_end: self.client_end.clone(),
            generation,
            next_seq: from,
            arrived: VecDeque::new(),
            silent_since: None,
            consumers: Arc::clone(&self.consumers),
        }))
    }

    async fn ask_peers(
        &self,
        query: PeerQuery,
        nonce: RandomId,
    ) -> Result<Vec<Announcement>, String> {
        let link = Arc::clone(&self.client_end.link);
        let (node, to) = (self.client_end.node, link);
        let announcing = self.request(false, move |request| {
            let is_isolated = request.isolated.is_some() && to.to_isolated;
            let slots = request.state.nodes.iter().enumerate();
            let reachable = slots.filter(|(other, slot)| {
                let is_connected = !slot.sends_nothing() && !slot.receives_nothing();
                *other == node || (is_connected && !is_isolated && slot.isolated.is_none())
            });
            let announcing = reachable.flat_map(|(_, slot)| &slot.announcing);
            Some(Ok(announcing
                .map(|(_, announce)| Arc::clone(announce))
                .collect::<Vec<_>>()))
        });
        let announcing = match announcing.await {
            Ok(announcing) => announcing,
            Err(_) if !self.client_end.link.ended.is_cancelled() => Vec::new(),
            Err(error) => return Err(error.to_string()),
        };
        let nonce = nonce.to_string();
        match query {
            PeerQuery::All => {
                sleep(ANNOUNCE_WAIT).await;
                Ok(announcing.iter().map(|announce| announce(&nonce)).collect())
            }
            PeerQuery::Replica(replica) => {
                let replica = replica.to_string();
                let mut announcements: Vec<_> =
                    announcing.iter().map(|announce| announce(&nonce)).collect();
                announcements.retain(|announcement| *announcement.replica == *replica);
                Ok(announcements)
            }
        }
    }
}

impl ConnectionEnd {
    /// Delivers `reply` to the client.
    async fn answer<T>(self, to_publish: bool, reply: T, answer: oneshot::Sender<T>) {
        sleep(self.world.latency(self.node)).await;
        while !self.link.ended.is_cancelled() && self.world.slot(self.node).receives_nothing() {
            self.world.wait().await;
        }
        let lost = to_publish && std::mem::take(&mut self.world.slot(self.node).lose_next_ack);
        if !lost && !self.link.ended.is_cancelled() {
            // The client may have timed out.
            let _ = answer.send(reply);
        }
    }

    fn close(&self) {
        let mut state = self.world.lock();
        self.link.end(&mut state.rng);
    }
}

impl Drop for SimConnection {
    fn drop(&mut self) {
        self.client_end.close();
    }
}

impl BrokerConnection for SimConnection {
    fn ended(&self) -> &CancellationToken {
        &self.client_end.link.ended
    }

    fn message_bytes_max(&self) -> usize {
        MESSAGE_BYTES_MAX
    }

    fn is_clustered(&self) -> bool {
        self.client_end.world.lock().broker.clustered
    }

    fn stream_info(&self) -> BoxFuture<'_, Result<StreamInfo, BrokerError>> {
        async {
            let info = self.request(false, |mut request| request.info()).await;
            let (world, node) = (&self.client_end.world, self.client_end.node);
            // Before it has a consumer, the node requests the info to find its start position.
            let reads = self.consumers.load(Ordering::Relaxed) > 0;
            if info.is_ok() && reads && world.lock().lose_unread(node) {
                world.change();
            }
            info
        }
        .boxed()
    }

    fn create_stream(&self, config: Config) -> BoxFuture<'_, Result<StreamInfo, BrokerError>> {
        let held = self
            .client_end
            .world
            .lock()
            .is_held_elsewhere(self.client_end.node);
        self.request(false, move |mut request| request.create(config, held))
            .boxed()
    }

    fn publish(&self, message: Outgoing) -> BoxFuture<'_, Result<Stored, BrokerError>> {
        let Outgoing {
            headers,
            payload,
            expected_last,
        } = message;
        let message = Message::of_replica(self.client_end.node, &headers, payload, expected_last);
        async move {
            let (world, node) = (&self.client_end.world, self.client_end.node);
            if expected_last.is_none() {
                let mut slot = world.slot(node);
                slot.unstored_since.get_or_insert_with(Instant::now);
            }
            let published = self.request(true, |mut request| request.publish(message));
            let published = published.await;
            if let Err(BrokerError::Rejected(_)) = &published {
                let mut slot = world.slot(node);
                slot.rejected_since.get_or_insert_with(Instant::now);
            }
            published
        }
        .boxed()
    }

    fn consume(&self, from: Seq) -> BoxFuture<'_, Result<Box<dyn Consumer>, BrokerError>> {
        self.consume(from).boxed()
    }

    fn message(&self, seq: Seq) -> BoxFuture<'_, Result<Option<RawMessage>, BrokerError>> {
        self.request(false, move |mut request| request.message(seq))
            .boxed()
    }

    fn announce(
        &self,
        announce: Announce,
        stop: CancellationToken,
    ) -> BoxFuture<'_, Result<(), String>> {
        async move {
            let _announced = AnnouncementGuard::new(&self.client_end, announce);
            tokio::select! {
                biased;
                () = stop.cancelled() => {}
                () = self.client_end.link.ended.cancelled() => {}
            }
            Ok(())
        }
        .boxed()
    }

    fn ask_peers(
        &self,
        to: PeerQuery,
        nonce: RandomId,
    ) -> BoxFuture<'_, Result<Vec<Announcement>, String>> {
        self.ask_peers(to, nonce).boxed()
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        async { self.client_end.close() }.boxed()
    }
}

/// Withdraws the announcement when it is dropped.
struct AnnouncementGuard {
    world: World,
    node: usize,
    id: u64,
}

impl AnnouncementGuard {
    fn new(client_end: &ConnectionEnd, announce: Announce) -> Self {
        let mut state = client_end.world.lock();
        let id = state.next_id() as u64;
        state.nodes[client_end.node].announcing.push((id, announce));
        Self {
            world: client_end.world.clone(),
            node: client_end.node,
            id,
        }
    }
}

impl Drop for AnnouncementGuard {
    fn drop(&mut self) {
        let mut slot = self.world.slot(self.node);
        slot.announcing.retain(|(id, _)| *id != self.id);
    }
}
