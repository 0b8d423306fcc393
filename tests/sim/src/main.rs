//! The simulator: real nodes on a simulated broker, in one thread with a simulated clock, driven by
//! a seed. See README.md.

mod broker;
mod check;
mod client;
mod connection;
mod consumer;
mod coroutine;
mod fault;
mod hostile;
mod ledger;
mod message;
mod paused;
mod peer_client;
mod plan;
mod process;
mod run;
mod server;
mod shrink;
mod world;

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

use clap::Parser;
use parking_lot::Mutex;
use plan::Plan;

/// One run in this many is repeated twice, to check that it is deterministic.
const REPEAT_EVERY: u64 = 50;

/// Runs a cluster with random faults, once per seed.
#[derive(Parser)]
struct Args {
    /// The number of runs.
    #[arg(long, default_value_t = 1000)]
    seeds: u64,
    /// The first seed.
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// The number of runs in parallel; each has one thread.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Run this seed only, and print its history.
    #[arg(long)]
    seed: Option<u64>,
    /// Print the nodes' logs.
    #[arg(long)]
    log: bool,
    /// Stop after this many failing runs, and print the shortest.
    #[arg(long, default_value_t = 5)]
    failures: usize,
    /// Print a failing history without shortening it.
    #[arg(long)]
    no_shrink: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if args.log {
        tracing_subscriber::fmt()
            .with_max_level(tracing::Level::DEBUG)
            .without_time()
            .init();
    }
    match args.seed {
        Some(seed) => run_one(seed, &args),
        None => run_many(&args),
    }
}

fn run_one(seed: u64, args: &Args) -> ExitCode {
    let plan = Plan::of(seed);
    let outcome = run::run(&plan, true);
    if outcome.violation.is_some() {
        return show(&plan, args);
    }
    outcome.history.iter().for_each(|line| println!("{line}"));
    println!("seed {seed}: no violation");
    ExitCode::SUCCESS
}

fn run_many(args: &Args) -> ExitCode {
    let started = Instant::now();
    let next = AtomicU64::new(args.from);
    let stop = AtomicBool::new(false);
    let totals = Mutex::new(Totals::default());
    thread::scope(|scope| {
        for _ in 0..args.threads {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= args.from + args.seeds {
                        break;
                    }
                    let plan = Plan::of(seed);
                    let outcome = run::run(&plan, false);
                    let same = !seed.is_multiple_of(REPEAT_EVERY) || is_deterministic(&plan);
                    let mut totals = totals.lock();
                    totals.count(plan, &outcome, same);
                    if totals.failed.len() >= args.failures {
                        stop.store(true, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    let mut totals = totals.into_inner();
    let took_s = started.elapsed().as_secs_f64();
    println!(
        "{} runs from seed {} in {took_s:.1} s, {:.0} a second: {} writes acknowledged, {} runs that lost \
         all data",
        totals.runs,
        args.from,
        totals.runs as f64 / took_s,
        totals.acknowledged,
        totals.data_lost,
    );
    if let Some(seed) = totals.not_deterministic {
        println!("seed {seed} gave two different histories");
        return ExitCode::FAILURE;
    }
    totals.failed.sort_by_key(Plan::size);
    for plan in &totals.failed {
        println!("seed {} violates, {} events", plan.seed, plan.size());
    }
    match totals.failed.first() {
        Some(shortest) => show(shortest, args),
        None => ExitCode::SUCCESS,
    }
}

#[derive(Default)]
struct Totals {
    runs: u64,
    acknowledged: u64,
    data_lost: u64,
    failed: Vec<Plan>,
    not_deterministic: Option<u64>,
}

impl Totals {
    fn count(&mut self, plan: Plan, outcome: &run::Outcome, same: bool) {
        self.runs += 1;
        self.acknowledged += outcome.acknowledged;
        self.data_lost += u64::from(outcome.data_lost);
        if !same {
            self.not_deterministic = Some(plan.seed);
        }
        if outcome.violation.is_some() {
            self.failed.push(plan);
        }
    }
}

fn is_deterministic(plan: &Plan) -> bool {
    let (one, other) = (run::run(plan, true).history, run::run(plan, true).history);
    let mut lines = one.iter().zip(&other);
    if let Some((one, other)) = lines.find(|(one, other)| one != other) {
        println!(
            "seed {}:\n{one}\n  differs from a second run:\n{other}",
            plan.seed
        );
    }
    one == other
}

/// Prints a failing run, shortened.
fn show(plan: &Plan, args: &Args) -> ExitCode {
    let shortest = match args.no_shrink {
        true => plan.clone(),
        false => shrink::shrink(plan),
    };
    let outcome = run::run(&shortest, true);
    println!(
        "seed {}: of {} events, these {} suffice to fail; {} nodes, {:?}",
        plan.seed,
        plan.size(),
        shortest.size(),
        shortest.nodes,
        shortest.knobs,
    );
    outcome.history.iter().for_each(|line| println!("{line}"));
    println!("{}", outcome.violation.unwrap_or_default());
    ExitCode::FAILURE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_run_violates_an_invariant() {
        for seed in 0..300 {
            let outcome = run::run(&Plan::of(seed), false);
            assert_eq!(outcome.violation, None, "seed {seed}");
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_history() {
        for seed in 1000..1010 {
            assert!(is_deterministic(&Plan::of(seed)), "seed {seed}");
        }
    }
}
