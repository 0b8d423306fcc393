//! Clients that follow readiness: each uses a replica that is ready, and fails over to the next
//! one.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use parking_lot::Mutex;
use tokio::task::JoinSet;

use crate::harness::cluster::broker::{AckedWrite, FIELDS, Write};
use crate::harness::wire::{Response, with_timeout};
use crate::harness::{AUTHORIZATION, Ports};

/// The current ports of each replica.
type Replicas = Arc<Mutex<Vec<Ports>>>;

/// Clients that run until [`Clients::stop`].
pub(crate) struct Clients {
    replicas: Replicas,
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicUsize>,
    clients: JoinSet<Vec<AckedWrite>>,
}

impl Clients {
    /// Starts six clients that write and read their own users, so that each knows the expected
    /// values. With `always`, some replica must answer each read.
    pub(crate) fn start(replicas: Vec<Ports>, always: bool) -> Self {
        let replicas = Arc::new(Mutex::new(replicas));
        let (stop, answered) = (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default());
        let mut clients = JoinSet::new();
        for id in 0..6 {
            let client = Client {
                id,
                replicas: Arc::clone(&replicas),
                always,
                written: BTreeMap::new(),
                unacked: BTreeMap::new(),
            };
            clients.spawn(client.run(Arc::clone(&stop), Arc::clone(&answered)));
        }
        Self {
            replicas,
            stop,
            answered,
            clients,
        }
    }

    /// Makes the clients use these ports for the replica at `index`.
    pub(crate) fn set_replica(&self, index: usize, ports: &Ports) {
        self.replicas.lock()[index] = ports.clone();
    }

    /// The number of acknowledged writes so far.
    pub(crate) fn answered(&self) -> usize {
        self.answered.load(Ordering::Relaxed)
    }

    /// Stops the clients; returns the acknowledged writes.
    pub(crate) async fn stop(self) -> Vec<AckedWrite> {
        self.stop.store(true, Ordering::Relaxed);
        let all = with_timeout("the end of the clients", self.clients.join_all()).await;
        all.into_iter().flatten().collect()
    }
}

struct Client {
    id: usize,
    replicas: Replicas,
    always: bool,
    /// The last acknowledged value.
    written: BTreeMap<(String, usize), i64>,
    /// Values that were sent since and not acknowledged: they may be stored now or later.
    unacked: BTreeMap<(String, usize), Vec<i64>>,
}

impl Client {
    async fn run(mut self, stop: Arc<AtomicBool>, count: Arc<AtomicUsize>) -> Vec<AckedWrite> {
        let mut answered = Vec::new();
        for number in 0.. {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            let write = Write {
                user: format!("user-{}-{}", self.id, number % 5),
                field: number % FIELDS.len(),
                value: (self.id * 1_000_000_000 + number) as i64,
            };
            let key = (write.user.clone(), write.field);
            if let Some(position) = self.write(&write).await {
                self.written.insert(key.clone(), write.value);
                let write = write.into();
                answered.push(AckedWrite { position, write });
                count.fetch_add(1, Ordering::Relaxed);
            } else {
                self.unacked
                    .entry(key.clone())
                    .or_default()
                    .push(write.value);
            }
            if let Some(AckedWrite { position, .. }) = answered.last() {
                self.read(&key, *position).await;
            }
        }
        answered
    }

    /// The ready replicas, starting with the `nth` after this client's own.
    async fn ready_replicas(&self, nth: usize) -> Vec<Ports> {
        let mut replicas = self.replicas.lock().clone();
        let count = replicas.len();
        replicas.rotate_left((self.id + nth) % count);
        let mut ready = Vec::new();
        for replica in replicas {
            let asked = replica
                .client
                .get(format!("http://{}/readyz/write", replica.ops));
            if matches!(asked.send().await, Ok(response) if response.status() == 200) {
                ready.push(replica);
            }
        }
        ready
    }

    /// Sends a write once; returns its position if it was acknowledged.
    async fn write(&self, write: &Write) -> Option<u64> {
        let replicas = self.ready_replicas(0).await;
        let replica = replicas.first()?;
        let request = replica.client.post(format!("http://{}/set", replica.write));
        let request = request
            .header("authorization", AUTHORIZATION)
            .header("content-type", "application/json")
            .body(write.json());
        let response = with_timeout("POST /set", request.send()).await.ok()?;
        let response = Response::of(response).await;
        match response.status {
            204 => Some(response.position()),
            503 | 504 => None,
            _ => panic!("{response:?}"),
        }
    }

    /// Reads at `position` from the first replica that responds: not the one that was written to,
    /// if another is ready.
    async fn read(&self, key: &(String, usize), position: u64) {
        let (user, field) = key;
        for replica in self.ready_replicas(1).await {
            let url = format!("http://{}/get?user_id={user}", replica.read);
            let request = replica.client.get(url).header("grade-position", position);
            // The replica stopped after it said that it was ready.
            let Ok(response) = with_timeout("GET /get", request.send()).await else {
                continue;
            };
            let response = Response::of(response).await;
            match response.status {
                200 => {
                    return self
                        .assert_expected(key, response.json()[FIELDS[*field]].as_i64().unwrap());
                }
                404 if !self.written.keys().any(|(written, _)| written == user) => return,
                // It was ready a moment ago, so it must be stopping.
                503 => assert!(
                    response.body.contains("not ready (stopping)"),
                    "{response:?}"
                ),
                _ => panic!("{response:?}"),
            }
        }
        assert!(!self.always, "no replica answers a read");
    }

    fn assert_expected(&self, key: &(String, usize), found: i64) {
        let written = self.written.get(key).copied().unwrap_or(0);
        let mut unacked = self.unacked.get(key).into_iter().flatten();
        let known = found == written || unacked.any(|value| *value == found);
        assert!(known, "{key:?}: {found} in place of {written}");
    }
}
