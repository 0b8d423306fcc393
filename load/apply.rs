//! Measures how fast a replica applies the batches of others, compared with parsing the messages.
//!
//! The messages are in memory as JetStream stores them: no NATS, no network, no HTTP. `parse`
//! reads each payload with simd-json and reused buffers into patches with borrowed ids, and drops
//! them. `read` decodes headers and payload like a replica. `apply` adds the replica's applier.
//! All run in turns, each round with another store of the same users.
//!
//! `cargo run --release --example apply -- --users 1000000 --patches 4000000 --rounds 5`

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use clap::Parser;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use gradestore::grade::{Changes, FIELD_COUNT, Patch, Values, Write};
use gradestore::log::{
    Batch, BatchId, ClusterKey, Entry, InFlight, Log, LogId, MemoryLog, Position, RandomId,
    ReadError, Subscription, message,
};
use gradestore::replication::state::Readiness;
use gradestore::replication::{
    AppliedIndex, Applier, ApplyError, CheckpointMetrics, Checkpoints, CompleteFrom,
};
use gradestore::store::Store;
use metrics::{Counter, Histogram};

/// The node's own allocator.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Messages per call, as in the log's subscription.
const MESSAGES_AT_ONCE: usize = 16;

#[derive(Parser)]
struct Args {
    /// Users
    #[arg(long, default_value_t = 1_000_000)]
    users: u64,
    /// Patches a round
    #[arg(long, default_value_t = 4_000_000)]
    patches: u64,
    /// Patches a message
    #[arg(long, default_value_t = 64)]
    batch: u64,
    /// Rounds
    #[arg(long, default_value_t = 5)]
    rounds: u32,
}

type Error = Box<dyn std::error::Error>;
type Message = (async_nats::HeaderMap, Bytes);

struct Messages<'a> {
    rest: std::slice::Iter<'a, Message>,
    last: Position,
    in_flight: InFlight,
}

impl Subscription for Messages<'_> {
    fn next<'a>(&'a mut self, entries: &'a mut Vec<Entry>) -> BoxFuture<'a, Result<(), ReadError>> {
        for (headers, payload) in self.rest.by_ref().take(MESSAGES_AT_ONCE) {
            let (headers, batch) = read(headers, payload, &self.in_flight);
            let time_ns = self.last.time_ns + 1;
            self.last = self.last.next(time_ns, headers.chain_entry(payload));
            entries.push(Entry {
                position: self.last,
                batch,
                message: None,
            });
        }
        let ended = match entries.is_empty() {
            true => Err(ReadError::Closed),
            false => Ok(()),
        };
        async { ended }.boxed()
    }
}

fn read(
    headers: &async_nats::HeaderMap,
    payload: &Bytes,
    in_flight: &InFlight,
) -> (message::BatchHeaders, Batch) {
    let batch = message::read(Some(headers), payload, in_flight);
    batch.unwrap_or_else(|_| panic!("a message cannot be decoded"))
}

/// The number of patches that simd-json finds.
fn parse(messages: &[Message]) -> Result<usize, Error> {
    let mut buffers = simd_json::Buffers::default();
    let mut json = Vec::new();
    let mut parsed = 0;
    for (_, payload) in messages {
        json.clear();
        json.extend_from_slice(payload);
        let patches: Vec<Patch<&str>> =
            simd_json::serde::from_slice_with_buffers(&mut json, &mut buffers)?;
        parsed += black_box(patches).len();
    }
    Ok(parsed)
}

fn messages(args: &Args, writer: RandomId) -> Vec<Message> {
    let mut state = 1_u64;
    let mut random = move || {
        // SplitMix64.
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb) >> 16
    };
    let mut batch = |seq| {
        let writes: Arc<[Write]> = (0..args.batch)
            .map(|_| {
                let user_id = (1_000_000_000_000 + random() % args.users).to_string();
                let (field, value) = (random() as usize % FIELD_COUNT, random() as i64 % 1000);
                let mut changes = Changes::default();
                changes.set(field, value);
                Write::Set(Patch {
                    user_id: user_id.into(),
                    changes,
                })
            })
            .collect();
        let id = BatchId { writer, seq };
        (message::headers(id), message::payload(&writes))
    };
    (1..=args.patches / args.batch).map(&mut batch).collect()
}

fn applier(args: &Args) -> Applier {
    let store = Store::new();
    for user in 0..args.users {
        store.apply_all(&[Write::Set(Patch {
            user_id: (1_000_000_000_000 + user).to_string(),
            changes: Changes::all(Values::default()),
        })]);
    }
    let (replica, metrics) = (RandomId::of(1), CheckpointMetrics::noop());
    let log = MemoryLog::new(replica, 0);
    let key = ClusterKey::derive("");
    Applier {
        checkpoints: Checkpoints::new(replica, log.id(), key, None, metrics),
        log: Arc::new(log),
        store,
        applied: AppliedIndex::new(base()),
        in_flight: InFlight::default(),
        patches: Counter::noop(),
        deletions: Counter::noop(),
        round_trip: Histogram::noop(),
    }
}

fn base() -> Position {
    Position::base(&LogId("apply".into()), 0, 0)
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    let args = Args::parse();
    let messages = messages(&args, RandomId::random()?);
    let patches = messages.len() as u64 * args.batch;
    for round in 1..=args.rounds {
        let (applier, in_flight) = (applier(&args), InFlight::default());
        let started = Instant::now();
        let parsed = parse(&messages)?;
        assert_eq!(parsed as u64, patches);
        let parse_us = started.elapsed().as_micros();
        let started = Instant::now();
        let read: usize = messages
            .iter()
            .map(|(headers, payload)| black_box(read(headers, payload, &in_flight)).1.writes.len())
            .sum();
        assert_eq!(read as u64, patches);
        let read_us = started.elapsed().as_micros();
        let started = Instant::now();
        let mut all = Messages {
            rest: messages.iter(),
            last: base(),
            in_flight,
        };
        let ended = applier
            .run(&mut all, CompleteFrom::default(), &Readiness::starting(""))
            .await;
        assert!(matches!(ended, ApplyError::Log(ReadError::Closed)));
        assert_eq!(applier.applied.seq(), messages.len() as u64);
        let apply_us = started.elapsed().as_micros();
        println!(
            "round {round} patches {patches} parse_us {parse_us} read_us {read_us} apply_us {apply_us}"
        );
    }
    Ok(())
}
