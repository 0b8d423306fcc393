//! How fast a replica applies the batches of others, beside parsing the same messages alone.
//!
//! The messages are as JetStream has them, in memory: no broker, no network, no HTTP. `parse` reads
//! each with simd-json and throws it away; `apply` puts the replica's own reader behind the same
//! reading. Both are run in turns, each round with another store of the same users.
//!
//! `cargo run --release --example apply -- --users 1000000 --patches 4000000 --rounds 5`

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use clap::Parser;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use gradestore::grade::{Changes, FIELD_COUNT, Patch, Values};
use gradestore::log::{Batch, Entry, Origin, ReadError, Seq, Subscription, message};
use gradestore::readiness::Readiness;
use gradestore::replication::{
    Applied, CheckpointMetrics, Checkpoints, OwnBatches, Reader, ReaderError,
};
use gradestore::store::Store;
use metrics::{Counter, Histogram};

/// Messages that are handed over at once, as the log's subscription does.
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
    seq: Seq,
}

impl Subscription for Messages<'_> {
    fn next<'a>(&'a mut self, entries: &'a mut Vec<Entry>) -> BoxFuture<'a, Result<(), ReadError>> {
        for (headers, payload) in self.rest.by_ref().take(MESSAGES_AT_ONCE) {
            self.seq += 1;
            entries.push(Entry {
                seq: self.seq,
                time_ns: self.seq,
                batch: read(headers, payload),
            });
        }
        let ended = match entries.is_empty() {
            true => Err(ReadError::Closed),
            false => Ok(()),
        };
        async { ended }.boxed()
    }
}

fn read(headers: &async_nats::HeaderMap, payload: &Bytes) -> Batch {
    let batch = message::read(Some(headers), payload, |_, _| None);
    batch.unwrap_or_else(|_| panic!("a message can't be read"))
}

fn messages(args: &Args, origin: Origin) -> Vec<Message> {
    let mut state = 1_u64;
    let mut random = move || {
        // SplitMix64.
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb) >> 16
    };
    let mut batch = |number| {
        let patches: Arc<[Patch]> = (0..args.batch)
            .map(|_| {
                let user_id = (1_000_000_000_000 + random() % args.users).to_string();
                let (field, value) = (random() as usize % FIELD_COUNT, random() as i64 % 1000);
                let mut changes = Changes::default();
                changes.set(field, value);
                Patch {
                    user_id: user_id.into(),
                    changes,
                }
            })
            .collect();
        let batch = Batch {
            origin,
            number,
            patches,
            checkpoint: None,
        };
        (message::headers(&batch), message::payload(&batch.patches))
    };
    (1..=args.patches / args.batch).map(&mut batch).collect()
}

fn reader(args: &Args) -> Result<Reader, Error> {
    let store = Store::new();
    for user in 0..args.users {
        store.apply(&Patch {
            user_id: (1_000_000_000_000 + user).to_string(),
            changes: Changes::all(Values::default()),
        });
    }
    let origin = Origin::random()?;
    Ok(Reader {
        store,
        applied: Applied::new(0),
        own: OwnBatches::default(),
        origin,
        checkpoints: Checkpoints::new(origin, None, CheckpointMetrics::noop()),
        patches: Counter::noop(),
        round_trip: Histogram::noop(),
    })
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    let args = Args::parse();
    let messages = messages(&args, Origin::random()?);
    let patches = messages.len() as u64 * args.batch;
    for round in 1..=args.rounds {
        let reader = reader(&args)?;
        let begun = Instant::now();
        let parsed: usize = messages
            .iter()
            .map(|(headers, payload)| std::hint::black_box(read(headers, payload)).patches.len())
            .sum();
        assert_eq!(parsed as u64, patches);
        let parse_us = begun.elapsed().as_micros();
        let begun = Instant::now();
        let mut all = Messages {
            rest: messages.iter(),
            seq: 0,
        };
        let ended = reader.run(&mut all, &Readiness::default(), &mut None).await;
        assert!(matches!(ended, ReaderError::Log(ReadError::Closed)));
        assert_eq!(reader.applied.seq(), messages.len() as u64);
        let apply_us = begun.elapsed().as_micros();
        println!("round {round} patches {patches} parse_us {parse_us} apply_us {apply_us}");
    }
    Ok(())
}
