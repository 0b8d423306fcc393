//! Clients of all three replicas. They record the outcome of each write, and check that no read
//! returns data older than an acknowledged write.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::future::join_all;
use parking_lot::Mutex;
use tokio::sync::{OwnedRwLockWriteGuard, RwLock};
use tokio::task::JoinSet;

use crate::harness::backup_files::Rng;
use crate::harness::cluster::broker::{AckedWrite, FIELDS, Write};
use crate::harness::wire::{Response, eventually, with_timeout};
use crate::harness::{AUTHORIZATION, Ports};

/// Two writers per replica.
const WRITERS: usize = 6;
/// The number of users of each writer. No other client writes these users.
const USERS: usize = 5;
/// The timeout of a request.
const RESPONSE_WAIT_MAX: Duration = Duration::from_secs(15);
/// The pause between two requests of one client, so that the clients use little CPU.
const PAUSE: Duration = Duration::from_millis(30);
/// The values of writer `n` begin at `n` times this.
const VALUES_PER_WRITER: i64 = 1_000_000_000;

/// The outcomes of all writes.
#[derive(Default)]
pub(crate) struct Record {
    /// Response 204.
    pub(crate) acknowledged: Vec<AckedWrite>,
    /// Response 503 or 507, or connection refused: not written.
    pub(crate) rejected: Vec<Write>,
    /// Response 504, or the connection broke: may have been written.
    pub(crate) unknown: Vec<Write>,
}

/// The clients, which send requests until `stop`.
pub(crate) struct Load {
    shared: Arc<Shared>,
    clients: JoinSet<()>,
}

struct Shared {
    replicas: Mutex<[Option<Ports>; 3]>,
    stop: AtomicBool,
    /// Each write holds a read lock. `pause` takes the write lock.
    gate: Arc<RwLock<()>>,
    /// Acknowledged writes of each replica.
    acknowledged: [AtomicUsize; 3],
    /// Writes in flight to each replica.
    in_flight: [AtomicUsize; 3],
    record: Mutex<Record>,
}

impl Load {
    /// Starts the clients. They send nothing to a replica before `set_replica`.
    pub(crate) fn start() -> Self {
        let shared = Arc::new(Shared {
            replicas: Mutex::default(),
            stop: AtomicBool::new(false),
            gate: Arc::default(),
            acknowledged: Default::default(),
            in_flight: Default::default(),
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

    /// Sets the addresses of the replica at `index`.
    pub(crate) fn set_replica(&self, index: usize, ports: &Ports) {
        self.shared.replicas.lock()[index] = Some(ports.clone());
    }

    /// Waits until each of these replicas has acknowledged `more` further writes.
    pub(crate) async fn progress(&self, replicas: &[usize], more: usize) {
        let all = replicas.iter().map(|index| self.progress_at(*index, more));
        join_all(all).await;
    }

    async fn progress_at(&self, index: usize, more: usize) {
        let acknowledged = &self.shared.acknowledged[index];
        let wanted = acknowledged.load(Ordering::Relaxed) + more;
        eventually(
            &format!("writes acknowledged by {}", b"abc"[index] as char),
            async || (acknowledged.load(Ordering::Relaxed) >= wanted).then_some(()),
        )
        .await;
    }

    /// Whether every writer of the replica at `index` has a write in flight.
    pub(crate) fn all_in_flight(&self, index: usize) -> bool {
        self.shared.in_flight[index].load(Ordering::Relaxed) == WRITERS / 3
    }

    /// Waits for the writes in flight, and blocks new ones until the guard is dropped.
    pub(crate) async fn pause(&self) -> OwnedRwLockWriteGuard<()> {
        let gate = Arc::clone(&self.shared.gate);
        with_timeout("a pause of the writers", gate.write_owned()).await
    }

    /// Stops the clients and returns the outcomes of their writes.
    pub(crate) async fn stop(&mut self) -> Record {
        self.shared.stop.store(true, Ordering::Relaxed);
        while let Some(ended) =
            with_timeout("the end of the clients", self.clients.join_next()).await
        {
            ended.unwrap();
        }
        std::mem::take(&mut *self.shared.record.lock())
    }
}

async fn write(shared: Arc<Shared>, id: usize) {
    let index = id % 3;
    let mut count = 0_usize;
    while !shared.stop.load(Ordering::Relaxed) {
        let guard = shared.gate.read().await;
        let ports = shared.replicas.lock()[index].clone();
        if let Some(ports) = ports {
            count += 1;
            let write = Write {
                user: format!("client {id} user {}", count % USERS),
                field: count / USERS % FIELDS.len(),
                value: id as i64 * VALUES_PER_WRITER + count as i64,
            };
            shared.in_flight[index].fetch_add(1, Ordering::Relaxed);
            let outcome = send(&ports, &write).await;
            shared.in_flight[index].fetch_sub(1, Ordering::Relaxed);
            let mut record = shared.record.lock();
            match outcome {
                Outcome::AckedWrite(position) => {
                    let write = write.into();
                    record.acknowledged.push(AckedWrite { position, write });
                    shared.acknowledged[index].fetch_add(1, Ordering::Relaxed);
                }
                Outcome::Rejected => record.rejected.push(write),
                Outcome::Unknown => record.unknown.push(write),
            }
        }
        drop(guard);
        tokio::time::sleep(PAUSE).await;
    }
}

enum Outcome {
    AckedWrite(u64),
    Rejected,
    Unknown,
}

async fn send(ports: &Ports, write: &Write) -> Outcome {
    let request = ports.client.post(format!("http://{}/set", ports.write));
    let request = request
        .timeout(RESPONSE_WAIT_MAX)
        .header("authorization", AUTHORIZATION)
        .header("content-type", "application/json")
        .body(write.json());
    match request.send().await {
        Ok(response) => match response.status().as_u16() {
            204 => Outcome::AckedWrite(Response::of(response).await.position()),
            503 | 507 => Outcome::Rejected,
            504 => Outcome::Unknown,
            other => panic!("unexpected status of a write: {other}"),
        },
        Err(error) if error.is_connect() => Outcome::Rejected,
        Err(_) => Outcome::Unknown,
    }
}

/// Reads writes that any replica has acknowledged, from the replica at `index`.
async fn read(shared: Arc<Shared>, index: usize) {
    let mut rng = Rng(index as u64 + 1);
    while !shared.stop.load(Ordering::Relaxed) {
        tokio::time::sleep(PAUSE).await;
        let ports = shared.replicas.lock()[index].clone();
        let acknowledged = {
            let all = &shared.record.lock().acknowledged;
            // One of the last 20.
            let back = rng.below(20) as usize + 1;
            all.get(all.len().saturating_sub(back)).cloned()
        };
        let (Some(ports), Some(AckedWrite { position, write })) = (ports, acknowledged) else {
            continue;
        };
        let write = write.set().unwrap();
        let url = format!("http://{}/get?user_id={}", ports.read, write.user);
        let request = ports.client.get(url).timeout(RESPONSE_WAIT_MAX);
        let Ok(response) = request.header("grade-position", position).send().await else {
            continue;
        };
        let status = response.status().as_u16();
        let Ok(body) = response.text().await else {
            continue;
        };
        assert!(
            matches!(status, 200 | 503),
            "unexpected response to a read of {write:?}: {status} {body}"
        );
        if status == 200 {
            let grade: serde_json::Value = serde_json::from_str(&body).unwrap();
            assert_not_older(write, grade[FIELDS[write.field]].as_i64().unwrap());
        }
    }
}

/// Checks that a read returned `acknowledged` or a later write of the same writer. The values of
/// one writer only increase.
pub(crate) fn assert_not_older(acknowledged: &Write, found: i64) {
    let same_writer = found / VALUES_PER_WRITER == acknowledged.value / VALUES_PER_WRITER;
    assert!(
        same_writer && found >= acknowledged.value,
        "found {found} instead of {acknowledged:?}"
    );
}
