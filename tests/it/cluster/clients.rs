//! Clients that follow readiness: each goes to whichever replica says that it is ready, and to the
//! next one where that is not so any more.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use parking_lot::Mutex;
use tokio::task::JoinSet;

use crate::harness::cluster::broker::{AckedWrite, FIELDS, Write};
use crate::harness::wire::{Response, with_timeout};
use crate::harness::{AUTHORIZATION, Ports};

/// Where the replicas are now.
type Replicas = Arc<Mutex<Vec<Ports>>>;

/// Clients that work until they are told to stop.
pub(crate) struct Clients {
    replicas: Replicas,
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicUsize>,
    clients: JoinSet<Vec<AckedWrite>>,
}

impl Clients {
    /// Six that write, and read back what they have written: each its own users, so it knows what
    /// must be there. With `always` some replica must answer each read, and each with what was
    /// written; else replicas may be gone.
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

    /// The replica at `index` is there now.
    pub(crate) fn set_replica(&self, index: usize, ports: &Ports) {
        self.replicas.lock()[index] = ports.clone();
    }

    /// Writes that have been answered so far.
    pub(crate) fn answered(&self) -> usize {
        self.answered.load(Ordering::Relaxed)
    }

    /// Stops them; what was answered.
    pub(crate) async fn stop(self) -> Vec<AckedWrite> {
        self.stop.store(true, Ordering::Relaxed);
        let all = with_timeout("the clients' end", self.clients.join_all()).await;
        all.into_iter().flatten().collect()
    }
}

struct Client {
    id: usize,
    replicas: Replicas,
    always: bool,
    /// What was answered last.
    written: BTreeMap<(String, usize), i64>,
    /// What was sent since and not answered: it may have been stored, or be stored later.
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

    /// The replicas that are ready, each client's `nth` first.
    async fn replicas(&self, nth: usize) -> Vec<Ports> {
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

    /// Tries once; the position if that was answered.
    async fn write(&self, write: &Write) -> Option<u64> {
        let replicas = self.replicas(0).await;
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

    /// Reads at `position` from the first that answers, which is not the one that was written to if
    /// there are two.
    async fn read(&self, key: &(String, usize), position: u64) {
        let (user, field) = key;
        for replica in self.replicas(1).await {
            let url = format!("http://{}/get?user_id={user}", replica.read);
            let request = replica.client.get(url).header("grade-position", position);
            // One that went away between two requests.
            let Ok(response) = with_timeout("GET /get", request.send()).await else {
                continue;
            };
            let response = Response::of(response).await;
            match response.status {
                200 => return self.compare(key, response.json()[FIELDS[*field]].as_i64().unwrap()),
                404 if !self.written.keys().any(|(written, _)| written == user) => return,
                // It said that it was ready, so it is on its way out.
                503 => assert!(
                    response.body.contains("not ready (stopping)"),
                    "{response:?}"
                ),
                _ => panic!("{response:?}"),
            }
        }
        assert!(!self.always, "no replica answers a read");
    }

    fn compare(&self, key: &(String, usize), found: i64) {
        let written = self.written.get(key).copied().unwrap_or(0);
        let mut unacked = self.unacked.get(key).into_iter().flatten();
        let known = found == written || unacked.any(|value| *value == found);
        assert!(known, "{key:?}: {found} in place of {written}");
    }
}
