//! Writes many users' grades with `POST /set`, reads all with `GET /get`, and compares.
//!
//! The values depend on the user's number only: every field, negative values, zeros, the extremes
//! of `i64`. One user in ten is written in two requests with different fields, another is set to
//! ones first and then to its values, so that a lost field or an ignored zero shows. Exit code 0:
//! every response matched byte by byte; 1: prints the first difference.
//!
//! `GRADESTORE_PASSWORD=secret cargo run --release --example roundtrip -- --users 1000000`

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use gradestore::grade::{FIELD_COUNT, FIELDS, USER_ID};
use tokio::task::JoinSet;

use connection::{Connection, Error, basic, user_id};

mod connection;

/// Writes many users' grades, reads all and compares
#[derive(Parser, Clone)]
struct Args {
    /// Number of users
    #[arg(long, default_value_t = 1_000_000)]
    users: u64,
    /// Keep-alive connections, each with one request at a time
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..))]
    connections: u64,
    /// URL of the write port
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8080")]
    write: String,
    /// URL of the read port
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8081")]
    read: String,
    #[arg(long, default_value = "admin")]
    username: String,
    #[arg(long, env = "GRADESTORE_PASSWORD", hide_env_values = true)]
    password: String,
}

#[tokio::main]
async fn main() -> ExitCode {
    match run(&Args::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "roundtrip: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: &Args) -> Result<(), Error> {
    let mut out = io::stdout();
    let (users, connections) = (args.users, args.connections);
    writeln!(out, "{users} users over {connections} connections")?;
    for phase in [Phase::Set, Phase::Get] {
        let began = Instant::now();
        let mut tasks = JoinSet::new();
        for first in 0..connections {
            tasks.spawn(phase.run(args.clone(), first));
        }
        let mut requests = 0;
        while let Some(ended) = tasks.join_next().await {
            requests += ended??;
        }
        let took_s = began.elapsed().as_secs_f64();
        let rate = requests as f64 / took_s;
        let name = phase.name();
        writeln!(
            out,
            "{name}: {requests} requests in {took_s:.2} s, {rate:.0} a second"
        )?;
    }
    writeln!(out, "all equal")?;
    Ok(())
}

#[derive(Clone, Copy)]
enum Phase {
    Set,
    Get,
}

impl Phase {
    fn name(self) -> &'static str {
        match self {
            Self::Set => "POST /set",
            Self::Get => "GET /get",
        }
    }

    /// Handles every `connections`-th user from `first` on, over one connection. Returns the
    /// number of requests.
    async fn run(self, args: Args, first: u64) -> Result<u64, Error> {
        let basic = basic(&args.username, &args.password)?;
        let mut connection = match self {
            Self::Set => Connection::open(&args.write).await?,
            Self::Get => Connection::open(&args.read).await?,
        };
        let mut requests = 0;
        for user in (first..args.users).step_by(args.connections as usize) {
            match self {
                Self::Set => {
                    for fields in patches(user) {
                        let body = json(user, &fields);
                        let request = connection.set_request(&basic, &body);
                        expect(&mut connection, &request, 204, "").await?;
                        requests += 1;
                    }
                }
                Self::Get => {
                    let request = connection.get_request(user);
                    expect(&mut connection, &request, 200, &grade(user)).await?;
                    requests += 1;
                }
            }
        }
        Ok(requests)
    }
}

fn value(user: u64, field: usize) -> i64 {
    // Distinct for each user and field.
    let n = user * FIELD_COUNT as u64 + field as u64;
    match n % 101 {
        0 => i64::MIN,
        1 => i64::MAX,
        2..20 => 0,
        odd if odd % 2 == 1 => -(n as i64),
        _ => n as i64,
    }
}

/// The fields of each request for one user.
fn patches(user: u64) -> Vec<Vec<(usize, i64)>> {
    let all: Vec<_> = (0..FIELD_COUNT).map(|f| (f, value(user, f))).collect();
    match user % 10 {
        0 => all.chunks(FIELD_COUNT.div_ceil(2)).map(Vec::from).collect(),
        1 => vec![(0..FIELD_COUNT).map(|f| (f, 1)).collect(), all],
        _ => vec![all],
    }
}

/// The expected response for one user.
fn grade(user: u64) -> String {
    let all: Vec<_> = (0..FIELD_COUNT).map(|f| (f, value(user, f))).collect();
    json(user, &all)
}

/// Written here, because the library is what is tested.
fn json(user: u64, fields: &[(usize, i64)]) -> String {
    let mut json = format!(r#"{{"{USER_ID}":"{}""#, user_id(user));
    for (field, value) in fields {
        let name = FIELDS.get(*field).copied().unwrap_or_default();
        let _ = write!(json, r#","{name}":{value}"#);
    }
    json.push('}');
    json
}

/// Sends `request`; any other status or body is an error.
async fn expect(
    connection: &mut Connection,
    request: &str,
    status: u16,
    body: &str,
) -> Result<(), Error> {
    match connection.ask(request).await {
        Ok((answered, got)) if answered == status && got == body.as_bytes() => Ok(()),
        Ok((answered, got)) => Err(format!(
            "{}\n  wanted {status} {body}\n  got    {answered} {}",
            shown(request),
            String::from_utf8_lossy(got)
        )
        .into()),
        Err(error) => Err(format!("{}: no response: {error}", shown(request)).into()),
    }
}

/// A request without its header, which has the password.
fn shown(request: &str) -> String {
    let line = request.lines().next().unwrap_or_default();
    let body = request.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    format!("{line} {body}")
}
