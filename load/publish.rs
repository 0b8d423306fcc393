//! The reference that the JetStream log is measured against: one message a write.
//!
//! What a replica without group commit would send: each patch a message of its own, with the headers
//! of a batch, published through the client library's JetStream context as fast as acks come back,
//! `--in-flight` of them outstanding at most. Nothing reads the stream and nothing answers a client.
//!
//! It makes its own stream, which must not be there before, and removes it at the end. The last line
//! says how many messages the broker took in how many microseconds.
//!
//! `cargo run --release --example publish -- --nats-url nats://127.0.0.1:4222`

use std::collections::VecDeque;
use std::io::{self, Write as _};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use async_nats::HeaderMap;
use async_nats::jetstream::stream::{Config, StorageType};
use async_nats::jetstream::{self, Context};
use clap::Parser;
use gradestore::grade::{FIELDS, USER_ID};

type Error = Box<dyn std::error::Error + Send + Sync>;

/// As many as `load/set.lua` sets.
const USERS: u64 = 100_000;

/// Publishes one message a write, and counts
#[derive(Parser, Clone)]
struct Args {
    /// Where the broker is
    #[arg(long, value_name = "URL", default_value = "nats://127.0.0.1:4222")]
    nats_url: String,
    /// The stream to make, and to remove at the end
    #[arg(long, default_value = "PUBLISH")]
    stream: String,
    /// How many messages may wait for their ack
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..=4096))]
    in_flight: u64,
    /// How long to publish
    #[arg(long, default_value_t = 5)]
    seconds: u64,
}

#[tokio::main]
async fn main() -> ExitCode {
    match run(Args::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "publish: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: Args) -> Result<(), Error> {
    let context = jetstream::new(async_nats::connect(&args.nats_url).await?);
    let subject = format!("{}.set", args.stream.to_lowercase());
    // What the log's stream has, but for what keeps it from being removed by mistake.
    let config = Config {
        name: args.stream.clone(),
        subjects: vec![subject.clone()],
        storage: StorageType::File,
        max_age: Duration::from_secs(24 * 3600),
        duplicate_window: Duration::from_secs(120),
        deny_delete: true,
        deny_purge: true,
        ..Config::default()
    };
    context.create_stream(config).await?;
    let stream = args.stream.clone();
    // In a task of its own, next to the one of the connection.
    let publishing = tokio::spawn(publish(context.clone(), subject, args));
    let published = publishing.await?;
    context.delete_stream(stream).await?;
    let (messages, took) = published?;
    let took_us = took.as_micros();
    let rate = messages as f64 / took.as_secs_f64();
    let mut out = io::stdout();
    writeln!(out, "{rate:.0} messages a second")?;
    writeln!(out, "messages {messages} duration_us {took_us}")?;
    Ok(())
}

/// Publishes until the time is up and every message is acknowledged; how many, in what time.
async fn publish(context: Context, subject: String, args: Args) -> Result<(u64, Duration), Error> {
    let began = Instant::now();
    let until = began + Duration::from_secs(args.seconds);
    // Acks come in the order of the messages: it is enough to wait for the oldest.
    let mut unacknowledged = VecDeque::new();
    let mut messages = 0;
    while Instant::now() < until {
        if unacknowledged.len() as u64 == args.in_flight
            && let Some(oldest) = unacknowledged.pop_front()
        {
            oldest.await?;
        }
        let payload = patch(messages).into();
        let ack = context.publish_with_headers(subject.clone(), headers(messages), payload);
        unacknowledged.push_back(ack.await?);
        messages += 1;
    }
    for ack in unacknowledged {
        ack.await?;
    }
    Ok((messages, began.elapsed()))
}

/// The headers of a batch, one for each write.
fn headers(write: u64) -> HeaderMap {
    let id = format!("00000000000000000000000000000001-{write}");
    let mut headers = HeaderMap::new();
    headers.insert("Grade-Format", "1");
    headers.insert("Grade-Batch", id.as_str());
    headers.insert("Nats-Msg-Id", id);
    headers
}

/// One field of one user, as `load/set.lua` sends it.
fn patch(write: u64) -> String {
    let user = 1_000_000_000_000 + write.wrapping_mul(7_919) % USERS;
    let field = FIELDS.iter().cycle().nth(write as usize % FIELDS.len());
    let field = field.copied().unwrap_or_default();
    format!(r#"{{"{USER_ID}":"{user}","{field}":{}}}"#, write % 1_000)
}
