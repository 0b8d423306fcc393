//! Clients of all three replicas. They record the outcome of each write, and check that no read
//! returns less than was acknowledged.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::future::join_all;
use parking_lot::Mutex;
use tokio::sync::{OwnedRwLockWriteGuard, RwLock};
use tokio::task::JoinSet;

use crate::broker::{Answered, FIELDS, Write};
use crate::disk::Rng;
use crate::harness::{AUTHORIZATION, Ports};
use crate::wire::{Answer, eventually, in_time};

/// Two writers per replica.
const WRITERS: usize = 6;
/// Users of each writer; no other writes them.
const USERS: usize = 5;
/// The timeout of a request.
const SILENCE_MAX: Duration = Duration::from_secs(15);
/// The pause between two requests of one client.
const PAUSE: Duration = Duration::from_millis(30);
/// Values of one writer lie between its number times this and the next one's.
const VALUES: i64 = 1_000_000_000;

/// The outcomes of all writes.
#[derive(Default)]
pub(crate) struct Record {
    /// 204.
    pub(crate) answered: Vec<Answered>,
    /// 503, 507, or connection refused: not written.
    pub(crate) refused: Vec<Write>,
    /// 504, or the connection broke: the outcome is unknown.
    pub(crate) unknown: Vec<Write>,
}

/// Clients that run until [`Load::stop`].
pub(crate) struct Load {
    shared: Arc<LoadState>,
    clients: JoinSet<()>,
}

struct LoadState {
    replicas: Mutex<[Option<Ports>; 3]>,
    stop: AtomicBool,
    /// Held by each write.
    gate: Arc<RwLock<()>>,
    answered: [AtomicUsize; 3],
    /// Writes that have been sent and have no outcome yet.
    waiting: [AtomicUsize; 3],
    record: Mutex<Record>,
}

impl Load {
    /// Starts clients of replicas that are not running yet.
    pub(crate) fn start() -> Self {
        let shared = Arc::new(LoadState {
            replicas: Mutex::default(),
            stop: AtomicBool::new(false),
            gate: Arc::default(),
            answered: Default::default(),
            waiting: Default::default(),
            record: Mutex::default(),
        });
        let mut clients = JoinSet::new();
        for id in 0..WRITERS {
            clients.spawn(write(Arc::clone(&shared), id));
        }
        for index in 0..3 {
            clients.spawn(read(Arc::clone(&shared), index));
        }
        Self { shared, clients }
    }

    /// Directs the clients of replica `index` to `ports`.
    pub(crate) fn replica(&self, index: usize, ports: &Ports) {
        self.shared.replicas.lock()[index] = Some(ports.clone());
    }

    /// Waits until each of `replicas` has acknowledged `more` writes.
    pub(crate) async fn progress(&self, replicas: &[usize], more: usize) {
        let all = replicas.iter().map(|index| self.progress_at(*index, more));
        join_all(all).await;
    }

    async fn progress_at(&self, index: usize, more: usize) {
        let answered = &self.shared.answered[index];
        let wanted = answered.load(Ordering::Relaxed) + more;
        eventually(
            &format!("writes answered by {}", b"abc"[index] as char),
            async || (answered.load(Ordering::Relaxed) >= wanted).then_some(()),
        )
        .await;
    }

    /// Whether each writer of the replica at `index` waits for an answer.
    pub(crate) fn all_wait(&self, index: usize) -> bool {
        self.shared.waiting[index].load(Ordering::Relaxed) == WRITERS / 3
    }

    /// Waits for the writes in flight, and pauses the writers until the guard is dropped.
    pub(crate) async fn pause(&self) -> OwnedRwLockWriteGuard<()> {
        let gate = Arc::clone(&self.shared.gate);
        in_time("a pause of the writers", gate.write_owned()).await
    }

    /// Stops the clients and returns the outcomes of their writes.
    pub(crate) async fn stop(&mut self) -> Record {
        self.shared.stop.store(true, Ordering::Relaxed);
        while let Some(ended) = in_time("the clients' end", self.clients.join_next()).await {
            ended.unwrap();
        }
        std::mem::take(&mut *self.shared.record.lock())
    }
}

async fn write(shared: Arc<LoadState>, id: usize) {
    let index = id % 3;
    let mut count = 0_usize;
    while !shared.stop.load(Ordering::Relaxed) {
        let in_flight = shared.gate.read().await;
        let ports = shared.replicas.lock()[index].clone();
        if let Some(ports) = ports {
            count += 1;
            let write = Write {
                user: format!("client {id} user {}", count % USERS),
                field: count / USERS % FIELDS.len(),
                value: id as i64 * VALUES + count as i64,
            };
            shared.waiting[index].fetch_add(1, Ordering::Relaxed);
            let outcome = send(&ports, &write).await;
            shared.waiting[index].fetch_sub(1, Ordering::Relaxed);
            let mut record = shared.record.lock();
            match outcome {
                Outcome::Answered(position) => {
                    let write = write.into();
                    record.answered.push(Answered { position, write });
                    shared.answered[index].fetch_add(1, Ordering::Relaxed);
                }
                Outcome::Refused => record.refused.push(write),
                Outcome::Unknown => record.unknown.push(write),
            }
        }
        drop(in_flight);
        tokio::time::sleep(PAUSE).await;
    }
}

enum Outcome {
    Answered(u64),
    Refused,
    Unknown,
}

async fn send(ports: &Ports, write: &Write) -> Outcome {
    let request = ports.client.post(format!("http://{}/set", ports.write));
    let request = request
        .timeout(SILENCE_MAX)
        .header("authorization", AUTHORIZATION)
        .header("content-type", "application/json")
        .body(write.json());
    match request.send().await {
        Ok(answer) => match answer.status().as_u16() {
            204 => Outcome::Answered(Answer::of(answer).await.position()),
            503 | 507 => Outcome::Refused,
            504 => Outcome::Unknown,
            other => panic!("a write was answered with {other}"),
        },
        Err(error) if error.is_connect() => Outcome::Refused,
        Err(_) => Outcome::Unknown,
    }
}

/// Reads acknowledged writes of all replicas from the replica at `index`.
async fn read(shared: Arc<LoadState>, index: usize) {
    let mut rng = Rng(index as u64 + 1);
    while !shared.stop.load(Ordering::Relaxed) {
        tokio::time::sleep(PAUSE).await;
        let ports = shared.replicas.lock()[index].clone();
        let answered = {
            let answered = &shared.record.lock().answered;
            // A recent one.
            let back = rng.below(20) as usize + 1;
            answered.get(answered.len().saturating_sub(back)).cloned()
        };
        let (Some(ports), Some(Answered { position, write })) = (ports, answered) else {
            continue;
        };
        let write = write.set().unwrap();
        let url = format!("http://{}/get?user_id={}", ports.read, write.user);
        let request = ports.client.get(url).timeout(SILENCE_MAX);
        let Ok(answer) = request.header("grade-position", position).send().await else {
            continue;
        };
        let status = answer.status().as_u16();
        let Ok(body) = answer.text().await else {
            continue;
        };
        assert!(
            matches!(status, 200 | 503),
            "a read of {write:?}: {status} {body}"
        );
        if status == 200 {
            let grade: serde_json::Value = serde_json::from_str(&body).unwrap();
            assert_not_before(write, grade[FIELDS[write.field]].as_i64().unwrap());
        }
    }
}

/// Values of one writer only grow: `found` must be `answered` or a later value of the same writer.
pub(crate) fn assert_not_before(answered: &Write, found: i64) {
    let sound = found >= answered.value && found / VALUES == answered.value / VALUES;
    assert!(sound, "{found} in place of {answered:?}");
}
