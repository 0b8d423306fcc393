//! Clients that record their operations with times.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde_json::{Map, Value};
use tokio::task::JoinSet;

use super::checker::{State, keys};
use crate::harness::backup_files::Rng;
use crate::harness::cluster::broker::FIELDS;
use crate::harness::wire::{Response, eventually, with_timeout};
use crate::harness::{AUTHORIZATION, Ports};

pub(crate) const REPLICAS: usize = 3;
/// Few, so that clients conflict.
pub(crate) const USERS: usize = 3;
const CLIENTS: usize = 12;
/// The timeout of a client. A frozen replica does not respond for longer.
const RESPONSE_TIMEOUT: Duration = Duration::from_millis(300);
/// After a rejected request.
const BACKOFF: Duration = Duration::from_millis(5);

/// An operation and its result.
#[derive(Debug, Clone)]
pub(crate) enum Operation {
    Set {
        fields: [Option<i64>; FIELDS.len()],
        outcome: Outcome,
    },
    Delete {
        outcome: Outcome,
    },
    /// A read that returned; `position` is its `Grade-Position`.
    Get {
        position: Option<u64>,
        found: State,
    },
}

impl Operation {
    /// The outcome of a write.
    pub(crate) fn outcome(&self) -> Option<Outcome> {
        match self {
            Self::Set { outcome, .. } | Self::Delete { outcome } => Some(*outcome),
            Self::Get { .. } => None,
        }
    }
}

/// What a client knows of its write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Acknowledged at this position.
    Written(u64),
    /// Rejected, or the connection was refused.
    NotWritten,
    /// It may take effect once, now or later, or never.
    Unknown,
}

/// One request. Times are nanoseconds of one clock.
#[derive(Debug, Clone)]
pub(crate) struct Record {
    pub(crate) client: usize,
    pub(crate) replica: usize,
    pub(crate) user: usize,
    pub(crate) invoked: u64,
    pub(crate) returned: u64,
    pub(crate) operation: Operation,
}

pub(crate) fn user_id(user: usize) -> String {
    format!("user-{user}")
}

/// Clients that use all replicas, whatever their state, until [`Recorder::stop`].
pub(crate) struct Recorder {
    replicas: Arc<Mutex<Vec<Ports>>>,
    stop: Arc<AtomicBool>,
    answered: Arc<[AtomicUsize; REPLICAS]>,
    clients: JoinSet<Vec<Record>>,
}

impl Recorder {
    pub(crate) fn start(replicas: Vec<Ports>) -> Self {
        assert_eq!(replicas.len(), REPLICAS);
        let replicas = Arc::new(Mutex::new(replicas));
        let (stop, answered) = (Arc::<AtomicBool>::default(), Arc::default());
        let mut clients = JoinSet::new();
        let clock = Instant::now();
        for id in 0..CLIENTS {
            let client = Client {
                id,
                clock,
                random: Rng(id as u64 + 1),
                replicas: Arc::clone(&replicas),
                position: None,
                writes: 0,
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

    /// Waits until one replica, or all of them, have returned this many more successful responses.
    pub(crate) async fn wait_for_responses(&self, replica: Option<usize>, responses: usize) {
        let now = || match replica {
            Some(replica) => self.answered[replica].load(Ordering::Relaxed),
            None => self
                .answered
                .iter()
                .map(|one| one.load(Ordering::Relaxed))
                .sum(),
        };
        let expected = now() + responses;
        eventually("more answers", async || (now() >= expected).then_some(())).await;
    }

    /// Stops the clients; returns their records.
    pub(crate) async fn stop(self) -> Vec<Record> {
        self.stop.store(true, Ordering::Relaxed);
        let all = with_timeout("the end of the clients", self.clients.join_all()).await;
        all.into_iter().flatten().collect()
    }
}

struct Client {
    id: usize,
    clock: Instant,
    random: Rng,
    replicas: Arc<Mutex<Vec<Ports>>>,
    /// The position of its last acknowledged write.
    position: Option<u64>,
    writes: usize,
}

impl Client {
    async fn run(
        mut self,
        stop: Arc<AtomicBool>,
        answered: Arc<[AtomicUsize; REPLICAS]>,
    ) -> Vec<Record> {
        let mut records = Vec::new();
        while !stop.load(Ordering::Relaxed) {
            let replica = self.replica();
            let user = self.random.below(USERS as u64) as usize;
            let ports = self.replicas.lock()[replica].clone();
            let write = self.random.below(2) == 0;
            let invoked = self.now();
            let operation = match write {
                true if self.random.below(6) == 0 => Some(self.delete(&ports, user).await),
                true => Some(self.set(&ports, user).await),
                false => self.get(&ports, user).await,
            };
            let returned = self.now();
            let was_answered = operation.as_ref().is_some_and(|operation| {
                let outcome = operation.outcome();
                outcome.is_none_or(|outcome| matches!(outcome, Outcome::Written(_)))
            });
            if let Some(operation) = operation {
                records.push(Record {
                    client: self.id,
                    replica,
                    user,
                    invoked,
                    returned,
                    operation,
                });
            }
            match was_answered {
                true => _ = answered[replica].fetch_add(1, Ordering::Relaxed),
                false => tokio::time::sleep(BACKOFF).await,
            }
        }
        records
    }

    /// Half of the clients use one replica each, so that a frozen replica does not stop all
    /// clients.
    fn replica(&mut self) -> usize {
        match self.id % 2 {
            0 => self.id / 2 % REPLICAS,
            _ => self.random.below(REPLICAS as u64) as usize,
        }
    }

    fn now(&self) -> u64 {
        self.clock.elapsed().as_nanos() as u64
    }

    /// Random fields with values that no other write sets.
    fn fields(&mut self) -> [Option<i64>; FIELDS.len()] {
        self.writes += 1;
        let value = (self.id * 1_000_000 + self.writes) as i64;
        let which = 1 + self.random.below((1 << FIELDS.len()) - 1);
        std::array::from_fn(|field| (which >> field & 1 == 1).then_some(value))
    }

    async fn set(&mut self, ports: &Ports, user: usize) -> Operation {
        let fields = self.fields();
        let mut patch = Map::from_iter([("user_id".to_owned(), Value::from(user_id(user)))]);
        patch.extend(keys(&fields).map(|(field, value)| (FIELDS[field].to_owned(), value.into())));
        let request = ports.client.post(format!("http://{}/set", ports.write));
        let request = request
            .header("authorization", AUTHORIZATION)
            .header("content-type", "application/json")
            .body(Value::from(patch).to_string());
        let outcome = self.write(request).await;
        Operation::Set { fields, outcome }
    }

    async fn delete(&mut self, ports: &Ports, user: usize) -> Operation {
        let url = format!("http://{}/set?user_id={}", ports.write, user_id(user));
        let request = ports.client.delete(url);
        let request = request.header("authorization", AUTHORIZATION);
        let outcome = self.write(request).await;
        Operation::Delete { outcome }
    }

    async fn write(&mut self, request: reqwest::RequestBuilder) -> Outcome {
        let outcome = match response(request).await {
            Ok(Some(response)) => match response.status {
                204 => Outcome::Written(response.position()),
                503 => Outcome::NotWritten,
                504 => Outcome::Unknown,
                _ => panic!("{response:?}"),
            },
            // Nothing was sent.
            Err(error) if error.is_connect() => Outcome::NotWritten,
            Ok(None) | Err(_) => Outcome::Unknown,
        };
        if let Outcome::Written(position) = outcome {
            self.position = Some(position);
        }
        outcome
    }

    /// A read, every other time at the position of this client's last write. `None` if it failed.
    async fn get(&mut self, ports: &Ports, user: usize) -> Option<Operation> {
        let url = format!("http://{}/get?user_id={}", ports.read, user_id(user));
        let mut request = ports.client.get(url);
        let position = self.position.filter(|_| self.random.below(2) == 0);
        if let Some(position) = position {
            request = request.header("grade-position", position);
        }
        let response = response(request).await.ok()??;
        let found = match response.status {
            200 => {
                let grade = response.json();
                Some(FIELDS.map(|field| grade[field].as_i64().unwrap()))
            }
            404 => None,
            503 => return None,
            _ => panic!("{response:?}"),
        };
        Some(Operation::Get { position, found })
    }
}

/// The response to a request; `None` after the timeout.
async fn response(request: reqwest::RequestBuilder) -> Result<Option<Response>, reqwest::Error> {
    let operation = async {
        let response = request.send().await?;
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let body = response.text().await?;
        Ok(Response {
            status,
            headers,
            body,
        })
    };
    match tokio::time::timeout(RESPONSE_TIMEOUT, operation).await {
        Ok(answered) => answered.map(Some),
        Err(_elapsed) => Ok(None),
    }
}
