//! The simulated broker: one stream of raw messages, and its faults.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use async_nats::jetstream::stream::Config;
use async_nats::{HeaderMap, HeaderName, HeaderValue};
use bytes::Bytes;
use gradestore::log::broker::{BrokerError, InfoSource, RawMessage, Stored, StreamInfo};
use gradestore::log::{LogId, Position, Seq};
use tokio::time::Instant;

use crate::ledger::Ledger;
use crate::message::{self, Delivery};

/// The start of the broker's clock, in nanoseconds since 1970.
const START_NS: u64 = 1_700_000_000_000_000_000;
/// The key of the log's id in the stream's metadata.
const LOG_ID_KEY: &str = "gradestore-log-id";
/// The header by which the broker detects duplicates.
const ID_HEADER: &str = "Nats-Msg-Id";

/// A message that is being published.
#[derive(Debug, Clone)]
pub struct Message {
    pub header_block: Option<Bytes>,
    pub payload: Bytes,
    /// The value of `Nats-Msg-Id`.
    pub id: Option<Box<str>>,
    pub expected_last: Option<Seq>,
    /// The node that sent it; `None` for another publisher.
    pub sender: Option<usize>,
}

impl Message {
    /// A message of the replica at `node`.
    pub fn of_replica(
        node: usize,
        headers: &HeaderMap,
        payload: Bytes,
        expected_last: Option<Seq>,
    ) -> Self {
        let line = |name: &HeaderName, value: &HeaderValue| format!("{name}: {value}\r\n");
        let lines = headers.iter().map(|(name, values)| {
            let lines = values.iter().map(|value| line(name, value));
            lines.collect::<String>()
        });
        // The hash map has no defined order.
        let mut lines: Vec<_> = lines.collect();
        lines.sort_unstable();
        let block = format!("NATS/1.0\r\n{}\r\n", lines.concat());
        Self {
            header_block: Some(block.into()),
            payload,
            id: headers.get(ID_HEADER).map(|id| id.as_str().into()),
            expected_last,
            sender: Some(node),
        }
    }
}

/// A message in the stream.
pub struct Entry {
    pub time_ns: u64,
    /// Its position in the log's history.
    pub position: Position,
    message: Message,
    /// How the client library handles it.
    pub delivery: Delivery,
}

impl Entry {
    pub fn payload(&self) -> Bytes {
        self.message.payload.clone()
    }
}

struct Stream {
    config: Config,
    log: LogId,
    /// The position before its first batch.
    base: Position,
}

/// The broker's current faults. Counters are used where faults may overlap.
#[derive(Default)]
pub struct BrokerFaults {
    /// The stream has no leader.
    pub no_leader: u32,
    /// Requests get no answer while the stream has no leader, instead of an error.
    pub silent: bool,
    /// The metadata group of the servers has no leader, so no consumer can be created.
    pub no_metadata_leader: u32,
    /// The leader reaches no majority.
    pub no_quorum: u32,
    /// The storage is full.
    pub full: u32,
    /// The stream is missing, and comes back later.
    pub gone: u32,
    /// The leader has not read the rest of its Raft log yet, and reports this end.
    pub short: Option<Seq>,
}

pub struct Broker {
    pub up: bool,
    /// Whether it is three servers or one.
    pub clustered: bool,
    pub faults: BrokerFaults,
    /// Messages that a leader without a majority accepted. Some are stored later.
    proposed: Vec<Message>,
    stream: Option<Stream>,
    started: Instant,
    /// How far its clock has jumped ahead.
    jumped: Duration,
    /// How often its clock has jumped.
    pub jumps: u32,
    first: Seq,
    entries: VecDeque<Entry>,
    /// The position of the last batch, or the stream's base.
    last: Option<Position>,
    /// The last time that any batch was stored at.
    last_time_ns: u64,
    /// Message ids, with the time and the sequence number at which they were stored.
    known: HashMap<Box<str>, (u64, Seq)>,
    /// Ids of batches in the stream that replicas have sent.
    by_replicas: HashMap<Box<str>, Seq>,
    /// The last id under which a replica has sent a batch.
    pub last_id: Option<Box<str>>,
    /// The number of messages that end the connection or are not delivered.
    pub unreadable: usize,
}

impl Broker {
    pub fn new(clustered: bool) -> Self {
        Self {
            up: true,
            clustered,
            faults: BrokerFaults::default(),
            proposed: Vec::new(),
            stream: None,
            started: Instant::now(),
            jumped: Duration::ZERO,
            jumps: 0,
            first: 1,
            entries: VecDeque::new(),
            last: None,
            last_time_ns: 0,
            known: HashMap::new(),
            by_replicas: HashMap::new(),
            last_id: None,
            unreadable: 0,
        }
    }

    /// The log in the stream, if there is one.
    pub fn log(&self) -> Option<&LogId> {
        self.stream.as_ref().map(|stream| &stream.log)
    }

    pub fn first(&self) -> Seq {
        self.first
    }

    pub fn end(&self) -> Seq {
        self.first + self.entries.len() as Seq - 1
    }

    /// The end of the stream that is visible now.
    pub fn visible_end(&self) -> Seq {
        let short = self.faults.short.unwrap_or(Seq::MAX);
        self.end().min(short)
    }

    /// The broker's time.
    pub fn now_ns(&self) -> u64 {
        let elapsed = self.started.elapsed() + self.jumped;
        START_NS + u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX)
    }

    /// Moves the broker's clock ahead.
    pub fn jump(&mut self, by: Duration) {
        self.jumped += by;
        self.jumps += 1;
    }

    /// The last batch.
    pub fn last(&self) -> Option<Position> {
        self.last
    }

    pub fn get(&self, seq: Seq) -> Option<&Entry> {
        let index = seq.checked_sub(self.first)?;
        self.entries.get(usize::try_from(index).ok()?)
    }

    /// The value of the last `Grade-Checkpoint` header in the stream.
    pub fn last_vote(&self) -> Option<String> {
        self.entries.iter().rev().find_map(|entry| {
            let Delivery::Ordinary(Some(headers)) = &entry.delivery else {
                return None;
            };
            Some(headers.get("Grade-Checkpoint")?.as_str().to_owned())
        })
    }

    pub fn raw(&self, seq: Seq) -> Option<RawMessage> {
        let entry = self.get(seq)?;
        Some(RawMessage {
            seq,
            time_ns: entry.time_ns,
            header_block: entry
                .message
                .header_block
                .as_ref()
                .map(|block| block.to_vec()),
            payload: entry.message.payload.to_vec(),
        })
    }

    /// The stream's info, from a server that is up to date.
    pub fn info(&self) -> Result<StreamInfo, BrokerError> {
        let stream = self.stream.as_ref().ok_or(BrokerError::NoStream)?;
        Ok(StreamInfo {
            config: stream.config.clone(),
            first: self.first,
            last: self.visible_end(),
            source: match self.clustered {
                true => InfoSource::Leader,
                false => InfoSource::Unclustered,
            },
        })
    }

    pub fn create(&mut self, config: Config) -> Result<StreamInfo, BrokerError> {
        match &self.stream {
            Some(stream) if stream.config.metadata != config.metadata => {
                let why = "stream name already in use with a different configuration";
                return Err(BrokerError::Rejected(why.into()));
            }
            Some(_) => {}
            None => {
                let id = config.metadata.get(LOG_ID_KEY);
                let log = LogId(id.map(String::as_str).unwrap_or_default().into());
                self.set_up(config, log);
            }
        }
        self.info()
    }

    fn set_up(&mut self, config: Config, log: LogId) {
        let base = Position::base(&log, 0, 0);
        self.stream = Some(Stream { config, log, base });
        self.last = Some(base);
        self.first = 1;
    }

    /// Stores `message`, or rejects it. A `late` message was sent before the clock jumped, so ids
    /// from before the jump still count as duplicates. The outer error is a violation.
    pub fn publish(
        &mut self,
        message: Message,
        late: bool,
        ledger: &mut Ledger,
    ) -> Result<Result<Stored, BrokerError>, String> {
        let (Some(stream), Some(last)) = (&self.stream, self.last) else {
            return Ok(Err(BrokerError::NoResponders("there is no stream".into())));
        };
        let wrong_end = message.expected_last.is_some_and(|seq| seq != self.end());
        let wrong_end = wrong_end.then(|| BrokerError::WrongLastSequence {
            expected: message.expected_last.unwrap_or_default(),
            end: Some(self.end()),
        });
        let window_ns = stream.config.duplicate_window.as_nanos() as u64;
        let now_ns = self.now_ns();
        let known = message.id.as_ref().and_then(|id| self.known.get(id));
        let known = known.filter(|(at_ns, _)| late || now_ns - at_ns < window_ns);
        let duplicate = known.map(|(_, seq)| Stored {
            seq: *seq,
            duplicate: true,
        });
        // A single server checks the end first, a cluster the id.
        let rejected = match (self.clustered, wrong_end, duplicate) {
            (true, _, Some(duplicate)) | (false, None, Some(duplicate)) => Some(Ok(duplicate)),
            (_, Some(wrong_end), _) => Some(Err(wrong_end)),
            (_, None, None) => None,
        };
        if let Some(rejected) = rejected {
            return Ok(rejected);
        }
        let seq = self.end() + 1;
        let mut stored_before = None;
        if let Some(id) = &message.id {
            self.known.insert(id.clone(), (now_ns, seq));
            if message.sender.is_some() {
                stored_before = self.by_replicas.insert(id.clone(), seq);
                self.last_id = Some(id.clone());
            }
        }
        self.last_time_ns = now_ns.max(self.last_time_ns + 1);
        let time_ns = self.last_time_ns;
        let decoded = message::decode(message.header_block.as_deref(), &message.payload);
        let position = decoded.position(&last, time_ns, &message.payload);
        let writes = decoded.writes();
        ledger.record(position, writes);
        let delivery = decoded.delivery;
        self.unreadable += usize::from(!matches!(delivery, Delivery::Ordinary(_)));
        self.last = Some(position);
        let id = message.id.clone();
        self.entries.push_back(Entry {
            time_ns,
            position,
            message,
            delivery,
        });
        match stored_before {
            Some(before) => Err(format!(
                "batch {} is in the log twice, at {before} and {seq}",
                id.unwrap_or_default()
            )),
            None => Ok(Ok(Stored {
                seq,
                duplicate: false,
            })),
        }
    }

    /// Keeps `message` until there is a majority again.
    pub fn propose(&mut self, message: Message) {
        self.proposed.push(message);
    }

    /// Takes the messages that a leader without a majority accepted.
    pub fn take_proposed(&mut self) -> Vec<Message> {
        std::mem::take(&mut self.proposed)
    }

    /// Removes all but the last `keep` batches.
    pub fn trim(&mut self, keep: usize) {
        while self.entries.len() > keep {
            self.entries.pop_front();
            self.first += 1;
        }
    }

    /// Loses the last `count` batches.
    pub fn lose_last(&mut self, count: usize, ledger: &mut Ledger) {
        for _ in 0..count {
            let Some(lost) = self.entries.pop_back() else {
                return;
            };
            ledger.lose(lost.position.chain);
            if let Some(id) = &lost.message.id {
                self.known.remove(id);
                self.by_replicas.remove(id);
            }
            let before = self.entries.back().map(|entry| entry.position);
            let base = self.stream.as_ref().map(|stream| stream.base);
            self.last = before.or_else(|| match lost.position.seq {
                1 => base,
                _ => ledger.before(&lost.position),
            });
        }
    }

    /// Replaces the stream with a new one for another log.
    pub fn recreate(&mut self, id: &str, ledger: &mut Ledger) {
        let Some(stream) = self.stream.take() else {
            return;
        };
        ledger.lose_all();
        let mut config = stream.config;
        config.metadata.insert(LOG_ID_KEY.to_owned(), id.to_owned());
        self.entries.clear();
        self.proposed.clear();
        self.known.clear();
        self.by_replicas.clear();
        self.set_up(config, LogId(id.into()));
    }
}
