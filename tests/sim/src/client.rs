//! Clients: what they ask, and whether what they are told is true.

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

/// `sim:secret`, as Basic authentication wants it.
pub const AUTHORIZED: &str = "Basic c2ltOnNlY3JldA==";
/// No answer takes longer: the waits for a place in a batch and for the batch, and some.
const ANSWER_MAX: Duration = Duration::from_secs(6);

/// How often a node that is well may leave a write unanswered, and the pause after each.
const SETS_MAX: usize = 3;
const RECOVERED_AFTER: Duration = Duration::from_secs(30);

/// What a client does, after a while.
#[derive(Debug, Clone)]
pub struct Op {
    pub think_ms: u64,
    pub node: usize,
    pub user: u8,
    pub kind: OpKind,
}

#[derive(Debug, Clone)]
pub enum OpKind {
    /// Sets the fields of these bits, each to a value that no other write has; hangs up after
    /// `hang_up_ms`, if given.
    Set {
        fields: u8,
        hang_up_ms: Option<u64>,
    },
    /// Removes the record; may hang up as well.
    Delete {
        hang_up_ms: Option<u64>,
    },
    Get,
    /// A read that wants to see the client's last write.
    GetOwn,
}

/// One client: it does one thing after the other.
pub struct Client {
    pub world: World,
    pub knobs: Knobs,
    pub number: usize,
    /// The last position it was told, and the chain there.
    last: Option<(Seq, Chain)>,
    sets: i64,
    writes_answered: u64,
    /// Its writes that were refused: they must be nowhere.
    pub refused: Vec<Write>,
    /// Those that were not: one deletion is as another.
    pub sent: Vec<Write>,
}

enum Answer {
    /// There is no process, or there is none any more.
    Broken,
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
            writes_answered: 0,
            refused: Vec::new(),
            sent: Vec::new(),
        }
    }

    /// Sets one field at `node`, which must answer in the end: nothing is wrong any more, though it may
    /// only notice by this that the log is another one.
    pub async fn set_at(&mut self, node: usize) {
        let kind = OpKind::Get;
        let (think_ms, user) = (0, 0);
        let op = Op {
            think_ms,
            node,
            user,
            kind,
        };
        let before = self.writes_answered;
        for _ in 0..SETS_MAX {
            self.set(&op, 1, None).await;
            if self.writes_answered > before || self.world.violated() {
                return;
            }
            sleep(RECOVERED_AFTER).await;
        }
        self.violate(format!("node {node} is well, and answered no write"));
    }

    pub async fn run(mut self, ops: Vec<Op>) -> Self {
        for op in ops {
            sleep(Duration::from_millis(op.think_ms)).await;
            match op.kind {
                OpKind::Set { fields, hang_up_ms } => self.set(&op, fields, hang_up_ms).await,
                OpKind::Delete { hang_up_ms } => self.delete(&op, hang_up_ms).await,
                OpKind::Get => self.get(&op, None).await,
                OpKind::GetOwn => self.get(&op, self.last).await,
            }
            if self.world.violated() {
                break;
            }
        }
        self
    }

    async fn set(&mut self, op: &Op, fields: u8, hang_up_ms: Option<u64>) {
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
        self.write(op, Write::Set(patch), request, hang_up_ms).await;
    }

    async fn delete(&mut self, op: &Op, hang_up_ms: Option<u64>) {
        let user_id = format!("user-{}", op.user);
        let request = Request::delete(format!("/set?user_id={user_id}"))
            .header(AUTHORIZATION, AUTHORIZED)
            .body(Body::empty())
            .expect("a request");
        let write = Write::Delete(user_id.into());
        self.write(op, write, request, hang_up_ms).await;
    }

    async fn write(
        &mut self,
        op: &Op,
        write: Write,
        request: Request<Body>,
        hang_up_ms: Option<u64>,
    ) {
        let quiet = self.world.lock().is_quiet();
        let asked = self.ask(op.node, request, true);
        let hang_up = Duration::from_millis(hang_up_ms.unwrap_or(u64::MAX / 4));
        let asked = tokio::time::timeout(hang_up, asked).await;
        let refused = matches!(
            &asked,
            Ok((_, Answer::Response(response)))
                if response.status() == StatusCode::SERVICE_UNAVAILABLE
        );
        match refused {
            true => self.refused.push(write.clone()),
            false => self.sent.push(write.clone()),
        }
        let Ok((process, answer)) = asked else {
            return self.note(op, || format!("writes {write:?} and hangs up"));
        };
        let Answer::Response(response) = answer else {
            return self.note(op, || format!("writes {write:?}: connection broken"));
        };
        let status = response.status();
        match (status, process) {
            (StatusCode::NO_CONTENT, Some(process)) => {
                let seq = response.headers().get(GRADE_POSITION);
                let seq = seq.and_then(|seq| seq.to_str().ok()?.parse().ok());
                let seq: Seq = seq.unwrap_or_default();
                self.note(op, || format!("writes {write:?}: batch {seq}"));
                self.check_answered(op.node, &process, &write, seq);
            }
            (StatusCode::SERVICE_UNAVAILABLE, _) => {
                self.note(op, || format!("writes {write:?}: refused"));
            }
            (StatusCode::GATEWAY_TIMEOUT, _) => {
                self.note(op, || format!("writes {write:?}: outcome unknown"));
                if quiet && self.world.lock().is_quiet() {
                    self.violate("a write's outcome is unknown, and nothing is wrong".to_owned());
                }
            }
            _ => self.violate(format!("a good write was answered with {status}")),
        }
    }

    /// An answered write is in the log where the answer says, the replica that answered shows it,
    /// and what one client is told never goes back.
    fn check_answered(&mut self, node: usize, process: &Process, write: &Write, seq: Seq) {
        let position = process.node.applied.position();
        let state = self.world.lock();
        let place = state.ledger.find(position.chain, seq);
        let there = place.is_some_and(|place| place.writes.contains(write));
        let chain = place.map(|place| place.position.chain);
        let back = self
            .last
            .filter(|(last, chain)| *last >= seq && state.ledger.holds(*chain));
        drop(state);
        if !there {
            self.violate(format!(
                "node {node} at batch {} answered a write with batch {seq}, which does not hold it",
                position.seq,
            ));
        }
        if let Some((last, _)) = back {
            self.violate(format!("positions went back from {last} to {seq}"));
        }
        self.last = chain.map(|chain| (seq, chain));
        self.world.lock().answered += 1;
        self.writes_answered += 1;
        check::look(&self.world, node, process, &self.knobs, true);
    }

    async fn get(&mut self, op: &Op, own: Option<(Seq, Chain)>) {
        let user_id = format!("user-{}", op.user);
        let mut request = Request::get(format!("/get?user_id={user_id}"));
        if let Some((seq, _)) = own {
            request = request.header(GRADE_POSITION, seq);
        }
        let request = request.body(Body::empty()).expect("a request");
        let (process, answer) = self.ask(op.node, request, false).await;
        let (Answer::Response(response), Some(process)) = (answer, process) else {
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
            _ => return self.violate(format!("a good read was answered with {status}")),
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
                "node {} at batch {seq} shows {user_id} as {shown:?}, not {expected:?}",
                op.node
            ));
        }
        if own.is_some_and(|(wanted, _)| wanted > seq) {
            self.violate(format!("a read that wanted {own:?} was answered at {seq}"));
        }
    }

    /// Asks the process at `node`, from which the answer may never come.
    async fn ask(
        &self,
        node: usize,
        request: Request<Body>,
        write: bool,
    ) -> (Option<Process>, Answer) {
        sleep(self.world.latency(node)).await;
        let Some(process) = self.world.slot(node).process.clone() else {
            return (None, Answer::Broken);
        };
        let router = match write {
            true => process.write.clone(),
            false => process.read.clone(),
        };
        self.world.thawed(node).await;
        let begun = Instant::now();
        let _running = Running::new(&self.world, node);
        let answer = tokio::select! {
            biased;
            () = process.gone.cancelled() => Answer::Broken,
            response = router.oneshot(request) => Answer::Response(response.expect("an answer")),
            () = sleep(ANSWER_MAX) => {
                self.violate(format!("node {node} has not answered since {:?}", begun.elapsed()));
                Answer::Broken
            }
        };
        self.world.thawed(node).await;
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

/// A request that a node is at.
struct Running {
    world: World,
    node: usize,
}

impl Running {
    fn new(world: &World, node: usize) -> Self {
        world.slot(node).requests += 1;
        Self {
            world: world.clone(),
            node,
        }
    }
}

impl Drop for Running {
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
