//! The reference for the JetStream log: one message per write.
//!
//! Sends what a replica without group commit would send: each patch as one message with the
//! headers of a batch, through the JetStream context of the client library, with at most `--in-
//! flight` unacknowledged messages. Nothing reads the stream, and there are no clients.
//!
//! Creates a stream, which must not exist, and removes it at the end. The last line has the number
//! of acknowledged messages and the time in microseconds.
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

/// As many as in `load/set.lua`.
const USERS: u64 = 100_000;

/// Publishes one message per write, and counts the acknowledgements
#[derive(Parser, Clone)]
struct Args {
    /// URL of NATS
    #[arg(long, value_name = "URL", default_value = "nats://127.0.0.1:4222")]
    nats_url: String,
    /// Stream to create, and to remove at the end
    #[arg(long, default_value = "PUBLISH")]
    stream: String,
    /// Maximum number of unacknowledged messages
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..=4096))]
    in_flight: u64,
    /// Duration in seconds
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
    // The settings of the log's stream, without the protection against removal.
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
    // In its own task, beside that of the connection.
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

/// Publishes until the time is up and every message is acknowledged; returns the number of
/// messages and the time.
async fn publish(context: Context, subject: String, args: Args) -> Result<(u64, Duration), Error> {
    let began = Instant::now();
    let until = began + Duration::from_secs(args.seconds);
    // Acknowledgements arrive in the order of the messages, so waiting for the oldest is enough.
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

/// The headers of a batch, one batch for each write.
fn headers(write: u64) -> HeaderMap {
    let id = format!("00000000000000000000000000000001-{write}");
    let mut headers = HeaderMap::new();
    headers.insert("Grade-Format", "1");
    headers.insert("Grade-Batch", id.as_str());
    headers.insert("Nats-Msg-Id", id);
    headers
}

/// One field of one user, as in `load/set.lua`.
fn patch(write: u64) -> String {
    let user = 1_000_000_000_000 + write.wrapping_mul(7_919) % USERS;
    let field = FIELDS.iter().cycle().nth(write as usize % FIELDS.len());
    let field = field.copied().unwrap_or_default();
    format!(r#"{{"{USER_ID}":"{user}","{field}":{}}}"#, write % 1_000)
}
