//! Writes and reads at fixed rates, remembers every acknowledged write, and reads them back.
//!
//! Each request has its due time, whether or not earlier ones have been answered; the latency of a
//! request counts from then. Prints a line of JSON each second. Reads commands from stdin, one per
//! line; the end of stdin ends the program immediately:
//!
//! - `phase`: prints the measurements since the last such command
//! - `stop`: sends no more requests; prints the same after the last response
//! - `check URL`: reads every acknowledged write from a node's read port, and prints what is
//!   missing
//!
//! Each user is written by one connection only, so [`Ledger`] knows the values that must be found.

use std::cell::RefCell;
use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::process::ExitCode;
use std::rc::Rc;
use std::time::Duration;

use clap::Parser;
use gradestore::grade::{FIELD_COUNT, FIELDS, USER_ID};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::task::{JoinSet, LocalSet};
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep, sleep_until};

use connection::{Connection, Error, basic, user_id};
use ledger::{Ledger, check};

mod connection;
mod ledger;

/// Between two attempts to reach a node.
const RECONNECT_PAUSE: Duration = Duration::from_millis(100);
/// A write with this status was rejected, and is not stored.
const REJECTED: u16 = 503;
/// `load/generate.py` adds a suffix to these users' ids.
const ODD: u64 = 1000;
const ODD_REST: u64 = 7;

/// Writes and reads at fixed rates, and reads back the acknowledged writes
#[derive(Parser)]
struct Args {
    /// URL of a write port; may be repeated
    #[arg(long, value_name = "URL", required = true)]
    write: Vec<String>,
    /// URL of a read port; may be repeated
    #[arg(long, value_name = "URL", required = true)]
    read: Vec<String>,
    /// Number of users
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(10_000..))]
    users: u64,
    #[arg(long, default_value_t = 10_000)]
    writes_per_s: u64,
    #[arg(long, default_value_t = 1_000)]
    reads_per_s: u64,
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u64).range(1..1000))]
    write_connections: u64,
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..1000))]
    read_connections: u64,
    #[arg(long, default_value = "admin")]
    username: String,
    #[arg(long, env = "GRADESTORE_PASSWORD", hide_env_values = true)]
    password: String,
}

/// The measurements of one kind of request.
#[derive(Default)]
struct Measured {
    /// Of this second.
    second_us: Vec<u32>,
    /// Of this phase, up to this second.
    phase_us: Vec<u32>,
    errors: u64,
    first_error: Option<String>,
}

impl Measured {
    fn answered(&mut self, since: Instant) {
        let took_us = since.elapsed().as_micros();
        self.second_us
            .push(u32::try_from(took_us).unwrap_or(u32::MAX));
    }

    fn failed(&mut self, error: String) {
        self.errors += 1;
        self.first_error.get_or_insert(error);
    }

    fn end_second(&mut self) -> Value {
        let mut second_us = std::mem::take(&mut self.second_us);
        let summary = self.summary(&mut second_us);
        self.phase_us.append(&mut second_us);
        summary
    }

    fn end_phase(&mut self) -> Value {
        self.phase_us.append(&mut self.second_us);
        let mut phase_us = std::mem::take(&mut self.phase_us);
        let summary = self.summary(&mut phase_us);
        self.errors = 0;
        summary
    }

    fn summary(&self, took_us: &mut [u32]) -> Value {
        took_us.sort_unstable();
        let at = |share: f64| {
            let index = (took_us.len() as f64 * share) as usize;
            took_us.get(index).or(took_us.last()).copied()
        };
        json!({
            "answered": took_us.len(),
            "errors": self.errors,
            "first_error": self.first_error,
            "p50_us": at(0.5),
            "p99_us": at(0.99),
            "max_us": at(1.0),
        })
    }
}

#[derive(Default)]
struct State {
    writes: Measured,
    reads: Measured,
    stopped: bool,
    ledger: Ledger,
}

type Shared = Rc<RefCell<State>>;

fn main() -> ExitCode {
    let run = || -> Result<(), Error> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let args: &'static Args = Box::leak(Box::new(Args::parse()));
        runtime.block_on(LocalSet::new().run_until(run(args)))
    };
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "steady: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: &'static Args) -> Result<(), Error> {
    let state = Shared::default();
    let mut commands = commands();
    let mut load = start(args, &state);
    let second = Duration::from_secs(1);
    let mut seconds = interval_at(Instant::now() + second, second);
    seconds.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let command = tokio::select! {
            _ = seconds.tick(), if !load.is_empty() => {
                let mut state = state.borrow_mut();
                print_measured("second", state.writes.end_second(), state.reads.end_second())?;
                continue;
            }
            command = commands.recv() => command,
        };
        let Some(command) = command else {
            return Ok(());
        };
        match command.split_once(' ').unwrap_or((&command, "")) {
            ("phase", _) => end_phase(&state)?,
            ("stop", _) => {
                state.borrow_mut().stopped = true;
                while let Some(ended) = load.join_next().await {
                    ended?;
                }
                end_phase(&state)?;
            }
            ("check", url) => {
                let due = state.borrow().ledger.due();
                print(&check(url, due).await?)?;
            }
            _ => return Err(format!("no such command: {command}").into()),
        }
    }
}

/// The lines of stdin, read by a thread.
fn commands() -> mpsc::UnboundedReceiver<String> {
    let (sender, commands) = mpsc::unbounded_channel();
    std::thread::spawn(move || {
        for line in io::stdin().lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    commands
}

fn end_phase(state: &Shared) -> Result<(), Error> {
    let mut state = state.borrow_mut();
    print_measured("phase", state.writes.end_phase(), state.reads.end_phase())
}

fn print_measured(what: &str, writes: Value, reads: Value) -> Result<(), Error> {
    print(&json!({ "what": what, "writes": writes, "reads": reads }))
}

fn print(line: &Value) -> Result<(), Error> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")?;
    Ok(out.flush()?)
}

fn start(args: &'static Args, state: &Shared) -> JoinSet<()> {
    let started = Instant::now();
    let mut load = JoinSet::new();
    for index in 0..args.write_connections {
        let due = Due::new(started, index, args.write_connections, args.writes_per_s);
        load.spawn_local(write(args, index, due, Rc::clone(state)));
    }
    for index in 0..args.read_connections {
        let due = Due::new(started, index, args.read_connections, args.reads_per_s);
        load.spawn_local(read(args, index, due, Rc::clone(state)));
    }
    load
}

/// The due times of one connection's requests.
struct Due {
    next: Instant,
    every: Duration,
}

impl Due {
    fn new(started: Instant, index: u64, connections: u64, per_s: u64) -> Self {
        let between = Duration::from_secs_f64(1.0 / per_s.max(1) as f64);
        Self {
            next: started + between * index as u32,
            every: between * connections as u32,
        }
    }

    /// Waits for the next due time and returns it. A late timer does not count as latency.
    async fn wait(&mut self) -> Instant {
        let due = self.next;
        self.next += self.every;
        if due <= Instant::now() {
            return due;
        }
        sleep_until(due).await;
        Instant::now()
    }
}

async fn write(args: &'static Args, index: u64, mut due: Due, state: Shared) {
    let url = nth(&args.write, index);
    let Ok(basic) = basic(&args.username, &args.password) else {
        return;
    };
    let mut connection = None;
    let mut random = Random::new(index);
    let mut body = String::new();
    for count in 1i64.. {
        let since = due.wait().await;
        if state.borrow().stopped {
            return;
        }
        let user = random.user(args.users, args.write_connections, index);
        let field = count as usize % FIELD_COUNT;
        body.clear();
        let name = FIELDS.get(field).copied().unwrap_or_default();
        let _ = write!(
            body,
            r#"{{"{USER_ID}":"{}","{name}":{count}}}"#,
            user_id(user)
        );
        let answer = ask(&mut connection, url, 204, |to| {
            to.set_request(&basic, &body)
        })
        .await;
        let state = &mut *state.borrow_mut();
        match answer {
            Ok(()) => {
                state.writes.answered(since);
                state.ledger.answered((user, field), count);
            }
            Err(failed) => {
                state.writes.failed(failed.error.to_string());
                if failed.unknown {
                    state.ledger.unknown((user, field), count);
                }
            }
        }
    }
}

async fn read(args: &'static Args, index: u64, mut due: Due, state: Shared) {
    let url = nth(&args.read, index);
    let mut connection = None;
    let mut random = Random::new(u64::MAX - index);
    loop {
        let since = due.wait().await;
        if state.borrow().stopped {
            return;
        }
        let user = random.user(args.users, 1, 0);
        let answer = ask(&mut connection, url, 200, |to| to.get_request(user)).await;
        let reads = &mut state.borrow_mut().reads;
        match answer {
            Ok(()) => reads.answered(since),
            Err(failed) => reads.failed(failed.error.to_string()),
        }
    }
}

/// Distributes the connections over the nodes.
fn nth(urls: &[String], index: u64) -> &str {
    let index = index as usize % urls.len();
    urls.get(index).map_or("", String::as_str)
}

/// A failed request.
struct Failed {
    /// Whether it may have been executed, now or later.
    unknown: bool,
    error: Error,
}

/// Sends one request; any status but `wanted` is an error, after which the connection is replaced.
async fn ask(
    connection: &mut Option<Connection>,
    url: &str,
    wanted: u16,
    request: impl FnOnce(&Connection) -> String,
) -> Result<(), Failed> {
    let mut open = match connection.take() {
        Some(open) => open,
        None => match Connection::open(url).await {
            Ok(open) => open,
            Err(error) => {
                sleep(RECONNECT_PAUSE).await;
                let unknown = false;
                return Err(Failed { unknown, error });
            }
        },
    };
    let request = request(&open);
    let (status, body) = open.ask(&request).await.map_err(|error| Failed {
        unknown: true,
        error,
    })?;
    if status != wanted {
        let body = String::from_utf8_lossy(body);
        return Err(Failed {
            unknown: status != REJECTED,
            error: format!("{url}: {status} {body}").into(),
        });
    }
    *connection = Some(open);
    Ok(())
}

/// xorshift64.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        // Odd times odd is never 0.
        Self((seed.wrapping_mul(2) + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15))
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A random one of `index`, `index + step`, ... with an id without suffix.
    fn user(&mut self, users: u64, step: u64, index: u64) -> u64 {
        loop {
            let user = self.next() % (users / step) * step + index;
            if user % ODD != ODD_REST {
                return user;
            }
        }
    }
}
