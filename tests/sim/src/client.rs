//! Clients: they send requests and check the answers.

use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use gradestore::grade::{Changes, FIELDS, Patch, Values, Write};
use gradestore::log::{Chain, Seq};
use gradestore::replication::peer_client::GRADE_POSITION;
use http::header::{AUTHORIZATION, CONTENT_TYPE};
use http::{Request, StatusCode};
use http_body_util::BodyExt;
use tokio::time::{Instant, sleep};
use tower::ServiceExt;

use crate::check;
use crate::process::{Knobs, Process};
use crate::world::World;

/// The Basic credentials of `sim:secret`.
pub const AUTHORIZED: &str = "Basic c2ltOnNlY3JldA==";
/// The timeout of a request: the waits in the queue and for the log, and a margin.
const ANSWER_WAIT_MAX: Duration = Duration::from_secs(6);

/// The number of writes of which a recovered node must acknowledge one, and the pause after each.
const SETS_MAX: usize = 3;
const RECOVERED_AFTER: Duration = Duration::from_secs(30);

/// One request of a client, after its think time.
#[derive(Debug, Clone)]
pub struct Op {
    pub think_ms: u64,
    pub node: usize,
    pub user: u8,
    pub kind: OpKind,
}

#[derive(Debug, Clone)]
pub enum OpKind {
    /// Sets the fields of these bits, each to a value that no other write has. The client may
    /// disconnect after `disconnect_after_ms`.
    Set {
        fields: u8,
        disconnect_after_ms: Option<u64>,
    },
    /// Deletes the record; may disconnect as well.
    Delete {
        disconnect_after_ms: Option<u64>,
    },
    Get,
    /// A read that must see the client's last write.
    GetOwnWrite,
}

/// One client, which sends one request at a time.
pub struct Client {
    pub world: World,
    pub knobs: Knobs,
    pub number: usize,
    /// The last position that it received, and the chain there.
    last: Option<(Seq, Chain)>,
    sets: i64,
    acknowledged: u64,
    /// Its writes that were rejected. They must not be in any log.
    pub rejected: Vec<Write>,
    /// Its other writes. A deletion is equal to any other deletion of the same user.
    pub sent: Vec<Write>,
}

enum ClientAnswer {
    /// There is no process, or it has ended.
    ConnectionBroken,
    Response(Response),
}

impl Client {
    pub fn new(world: World, knobs: Knobs, number: usize) -> Self {
        Self {
            world,
            knobs,
            number,
            last: None,
            sets: 0,
            acknowledged: 0,
            rejected: Vec::new(),
            sent: Vec::new(),
        }
    }

    /// Sets one field at `node`, which must acknowledge a write: no fault is active, although the
    /// node may notice only now that the log is another one.
    pub async fn set_at(&mut self, node: usize) {
        let kind = OpKind::Get;
        let (think_ms, user) = (0, 0);
        let op = Op {
            think_ms,
            node,
            user,
            kind,
        };
        let before = self.acknowledged;
        for _ in 0..SETS_MAX {
            self.set(&op, 1, None).await;
            if self.acknowledged > before || self.world.violated() {
                return;
            }
            sleep(RECOVERED_AFTER).await;
        }
        self.violate(format!(
            "node {node} has recovered, but acknowledges no write"
        ));
    }

    pub async fn run(mut self, ops: Vec<Op>) -> Self {
        for op in ops {
            sleep(Duration::from_millis(op.think_ms)).await;
            match op.kind {
                OpKind::Set {
                    fields,
                    disconnect_after_ms,
                } => self.set(&op, fields, disconnect_after_ms).await,
                OpKind::Delete {
                    disconnect_after_ms,
                } => self.delete(&op, disconnect_after_ms).await,
                OpKind::Get => self.get(&op, None).await,
                OpKind::GetOwnWrite => self.get(&op, self.last).await,
            }
            if self.world.violated() {
                break;
            }
        }
        self
    }

    async fn set(&mut self, op: &Op, fields: u8, disconnect_after_ms: Option<u64>) {
        let mut changes = Changes::default();
        for index in (0..FIELDS.len()).filter(|index| fields >> index & 1 == 1) {
            self.sets += 1;
            changes.set(index, self.number as i64 * 1_000_000 + self.sets);
        }
        let user_id = format!("user-{}", op.user).into();
        let patch = Patch { user_id, changes };
        let mut json = Vec::new();
        patch.write_json(&mut json);
        let request = Request::post("/set")
            .header(AUTHORIZATION, AUTHORIZED)
            .header(CONTENT_TYPE, "application/json")
            .body(Body::from(json))
            .expect("a request");
        self.write(op, Write::Set(patch), request, disconnect_after_ms)
            .await;
    }

    async fn delete(&mut self, op: &Op, disconnect_after_ms: Option<u64>) {
        let user_id = format!("user-{}", op.user);
        let request = Request::delete(format!("/set?user_id={user_id}"))
            .header(AUTHORIZATION, AUTHORIZED)
            .body(Body::empty())
            .expect("a request");
        let write = Write::Delete(user_id.into());
        self.write(op, write, request, disconnect_after_ms).await;
    }

    async fn write(
        &mut self,
        op: &Op,
        write: Write,
        request: Request<Body>,
        disconnect_after_ms: Option<u64>,
    ) {
        let quiet = self.world.lock().is_quiet();
        let sent = self.send(op.node, request, true);
        let disconnect_after = Duration::from_millis(disconnect_after_ms.unwrap_or(u64::MAX / 4));
        let sent = tokio::time::timeout(disconnect_after, sent).await;
        let rejected = matches!(
            &sent,
            Ok((_, ClientAnswer::Response(response)))
                if response.status() == StatusCode::SERVICE_UNAVAILABLE
        );
        match rejected {
            true => self.rejected.push(write.clone()),
            false => self.sent.push(write.clone()),
        }
        let Ok((process, answer)) = sent else {
            return self.note(op, || format!("writes {write:?} and disconnects"));
        };
        let ClientAnswer::Response(response) = answer else {
            return self.note(op, || format!("writes {write:?}: connection broken"));
        };
        let status = response.status();
        match (status, process) {
            (StatusCode::NO_CONTENT, Some(process)) => {
                let seq = response.headers().get(GRADE_POSITION);
                let seq = seq.and_then(|seq| seq.to_str().ok()?.parse().ok());
                let seq: Seq = seq.unwrap_or_default();
                self.note(op, || format!("writes {write:?}: batch {seq}"));
                self.check_acknowledged(op.node, &process, &write, seq);
            }
            (StatusCode::SERVICE_UNAVAILABLE, _) => {
                self.note(op, || format!("writes {write:?}: rejected"));
            }
            (StatusCode::GATEWAY_TIMEOUT, _) => {
                self.note(op, || format!("writes {write:?}: outcome unknown"));
                if quiet && self.world.lock().is_quiet() {
                    self.violate("a write's outcome is unknown, and no fault is active".to_owned());
                }
            }
            _ => self.violate(format!("a valid write was answered with {status}")),
        }
    }

    /// An acknowledged write is in the log at the position in the answer, the replica that answered
    /// serves it, and the positions that one client receives increase.
    fn check_acknowledged(&mut self, node: usize, process: &Process, write: &Write, seq: Seq) {
        let position = process.node.applied.position();
        let state = self.world.lock();
        let entry = state.ledger.find(position.chain, seq);
        let there = entry.is_some_and(|entry| entry.writes.contains(write));
        let chain = entry.map(|entry| entry.position.chain);
        let back = self
            .last
            .filter(|(last, chain)| *last >= seq && state.ledger.holds(*chain));
        drop(state);
        if !there {
            self.violate(format!(
                "node {node} at batch {} acknowledged a write with batch {seq}, which does not contain it",
                position.seq,
            ));
        }
        if let Some((last, _)) = back {
            self.violate(format!("positions went back from {last} to {seq}"));
        }
        self.last = chain.map(|chain| (seq, chain));
        {
            let mut state = self.world.lock();
            state.acknowledged += 1;
            let slot = &mut state.nodes[node];
            let before = slot
                .acknowledged
                .as_ref()
                .filter(|(log, _)| *log == process.log);
            let last = before.map_or(seq, |(_, before)| seq.max(*before));
            slot.acknowledged = Some((process.log.clone(), last));
        }
        self.acknowledged += 1;
        check::check_node(&self.world, node, process, &self.knobs, true);
    }

    async fn get(&mut self, op: &Op, own: Option<(Seq, Chain)>) {
        let user_id = format!("user-{}", op.user);
        let mut request = Request::get(format!("/get?user_id={user_id}"));
        if let Some((seq, _)) = own {
            request = request.header(GRADE_POSITION, seq);
        }
        let request = request.body(Body::empty()).expect("a request");
        let (process, answer) = self.send(op.node, request, false).await;
        let (ClientAnswer::Response(response), Some(process)) = (answer, process) else {
            return self.note(op, || format!("gets {user_id}: connection broken"));
        };
        let position = process.node.applied.position();
        let status = response.status();
        let shown = match status {
            StatusCode::OK => Some(values_of(response).await),
            StatusCode::NOT_FOUND => None,
            StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT => {
                return self.note(op, || format!("gets {user_id}: {status}"));
            }
            _ => return self.violate(format!("a valid read was answered with {status}")),
        };
        let seq = position.seq;
        self.note(op, || format!("gets {user_id}: {shown:?} at batch {seq}"));
        let state = self.world.lock();
        let expected = state.ledger.state(&position);
        let expected = expected.map(|(state, _)| state.get(&user_id).copied());
        drop(state);
        let is_corrupted = self.world.slot(op.node).is_corrupted;
        if expected != Some(shown) && !is_corrupted {
            self.violate(format!(
                "node {} at batch {seq} serves {user_id} as {shown:?}, not {expected:?}",
                op.node
            ));
        }
        if own.is_some_and(|(wanted, _)| wanted > seq) {
            self.violate(format!(
                "a read that must see {own:?} was answered at {seq}"
            ));
        }
    }

    /// Sends a request to the process at `node`. The answer may be lost.
    async fn send(
        &self,
        node: usize,
        request: Request<Body>,
        write: bool,
    ) -> (Option<Process>, ClientAnswer) {
        sleep(self.world.latency(node)).await;
        let Some(process) = self.world.slot(node).process.clone() else {
            return (None, ClientAnswer::ConnectionBroken);
        };
        let router = match write {
            true => process.write.clone(),
            false => process.read.clone(),
        };
        self.world.wait_until_resumed(node).await;
        let started = Instant::now();
        let _running = RequestGuard::new(&self.world, node);
        let answer = tokio::select! {
            biased;
            () = process.gone.cancelled() => ClientAnswer::ConnectionBroken,
            response = router.oneshot(request) => ClientAnswer::Response(response.expect("an answer")),
            () = sleep(ANSWER_WAIT_MAX) => {
                self.violate(format!("node {node} has not answered for {:?}", started.elapsed()));
                ClientAnswer::ConnectionBroken
            }
        };
        self.world.wait_until_resumed(node).await;
        (Some(process), answer)
    }

    fn note(&self, op: &Op, what: impl FnOnce() -> String) {
        let (number, node) = (self.number, op.node);
        self.world
            .note(|| format!("client {number} at node {node} {}", what()));
    }

    fn violate(&self, what: String) {
        self.world
            .violate(format!("client {}: {what}", self.number));
    }
}

/// Counts a request that a node is processing.
struct RequestGuard {
    world: World,
    node: usize,
}

impl RequestGuard {
    fn new(world: &World, node: usize) -> Self {
        world.slot(node).requests += 1;
        Self {
            world: world.clone(),
            node,
        }
    }
}

impl Drop for RequestGuard {
    fn drop(&mut self) {
        self.world.slot(self.node).requests -= 1;
        self.world.change();
    }
}

async fn values_of(response: Response) -> Values {
    let body = response.into_body().collect().await.expect("a body");
    let json: serde_json::Value = serde_json::from_slice(&body.to_bytes()).expect("JSON");
    let mut values = Values::default();
    for (value, name) in values.iter_mut().zip(FIELDS) {
        *value = json[name].as_i64().expect("an integer");
    }
    values
}
