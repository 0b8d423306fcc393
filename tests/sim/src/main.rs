//! The simulator: real nodes on a simulated broker, in one thread and on a clock of its own, from a
//! seed. See README.md.

mod broker;
mod check;
mod client;
mod coroutine;
mod hostile;
mod ledger;
mod message;
mod paused;
mod phone;
mod plan;
mod process;
mod run;
mod shrink;
mod wire;
mod world;

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

use clap::Parser;
use parking_lot::Mutex;
use plan::Plan;

/// One run in so many is made twice, to see that it is the same.
const REPEATED: u64 = 50;

/// Runs a cluster through what can go wrong, once a seed.
#[derive(Parser)]
struct Args {
    /// How many runs.
    #[arg(long, default_value_t = 1000)]
    seeds: u64,
    /// The first seed.
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// Runs side by side; each is in one thread.
    #[arg(long, default_value_t = 2)]
    side_by_side: usize,
    /// Only this seed, with its history.
    #[arg(long)]
    seed: Option<u64>,
    /// With what the nodes log.
    #[arg(long)]
    log: bool,
    /// Failing runs that are looked for before the shortest is shown.
    #[arg(long, default_value_t = 5)]
    failures: usize,
    /// A failing history is not made shorter.
    #[arg(long)]
    as_it_is: bool,
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
        Some(seed) => one(seed, &args),
        None => many(&args),
    }
}

fn one(seed: u64, args: &Args) -> ExitCode {
    let plan = Plan::of(seed);
    let outcome = run::run(&plan, true);
    if outcome.violation.is_some() {
        return show(&plan, args);
    }
    outcome.history.iter().for_each(|line| println!("{line}"));
    println!("seed {seed}: no violation");
    ExitCode::SUCCESS
}

fn many(args: &Args) -> ExitCode {
    let begun = Instant::now();
    let next = AtomicU64::new(args.from);
    let enough = AtomicBool::new(false);
    let totals = Mutex::new(Totals::default());
    thread::scope(|scope| {
        for _ in 0..args.side_by_side {
            scope.spawn(|| {
                while !enough.load(Ordering::Relaxed) {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= args.from + args.seeds {
                        break;
                    }
                    let plan = Plan::of(seed);
                    let outcome = run::run(&plan, false);
                    let same = !seed.is_multiple_of(REPEATED) || repeats(&plan);
                    let mut totals = totals.lock();
                    totals.count(plan, &outcome, same);
                    if totals.failed.len() >= args.failures {
                        enough.store(true, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    let mut totals = totals.into_inner();
    let took_s = begun.elapsed().as_secs_f64();
    println!(
        "{} runs from seed {} in {took_s:.1} s, {:.0} a second: {} writes answered, {} runs in which \
         nobody had the data in the end",
        totals.runs,
        args.from,
        totals.runs as f64 / took_s,
        totals.answered,
        totals.nobody,
    );
    if let Some(seed) = totals.differed {
        println!("seed {seed} does not give the same history twice");
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
    answered: u64,
    nobody: u64,
    failed: Vec<Plan>,
    differed: Option<u64>,
}

impl Totals {
    fn count(&mut self, plan: Plan, outcome: &run::Outcome, same: bool) {
        self.runs += 1;
        self.answered += outcome.answered;
        self.nobody += u64::from(outcome.nobody);
        if !same {
            self.differed = Some(plan.seed);
        }
        if outcome.violation.is_some() {
            self.failed.push(plan);
        }
    }
}

fn repeats(plan: &Plan) -> bool {
    let (one, other) = (run::run(plan, true).history, run::run(plan, true).history);
    let mut lines = one.iter().zip(&other);
    if let Some((one, other)) = lines.find(|(one, other)| one != other) {
        println!(
            "seed {}:\n{one}\n  is in the same place of a second run\n{other}",
            plan.seed
        );
    }
    one == other
}

/// Prints a failing run, made as short as it goes.
fn show(plan: &Plan, args: &Args) -> ExitCode {
    let shortest = match args.as_it_is {
        true => plan.clone(),
        false => shrink::shrink(plan),
    };
    let outcome = run::run(&shortest, true);
    println!(
        "seed {}, of {} events these {} are enough; {} nodes, {:?}",
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
    fn nothing_that_must_not_happen_does() {
        for seed in 0..300 {
            let outcome = run::run(&Plan::of(seed), false);
            assert_eq!(outcome.violation, None, "seed {seed}");
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_history() {
        for seed in 1000..1010 {
            assert!(repeats(&Plan::of(seed)), "seed {seed}");
        }
    }
}
