//! The fault matrix: faults times the stages of the replica under test. Each cell runs one broker
//! or a cluster of three, and three replicas with clients. The servers and replicas are real
//! processes; see README.md.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "a test may panic, its helpers too"
)]

#[path = "../it/harness/mod.rs"]
#[expect(
    dead_code,
    unused_imports,
    reason = "the harness is shared with other tests"
)]
mod harness;

mod broken_log;
mod clock;
mod fault;
mod load;
mod scene;
mod server_fault;
mod stage;
mod table;
mod verdict;

use std::panic::{self, AssertUnwindSafe};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::signal::unix::{SignalKind, signal};

use crate::fault::Fault;
use crate::scene::{Logs, Scene};
use crate::stage::Stage;
use crate::table::{Outcome, Table};

/// The timeout for shutting down the tasks of a cell.
const SHUTDOWN_MAX: Duration = Duration::from_secs(5);

/// The panics of the running cell, in order.
static PANICS: Mutex<Vec<String>> = Mutex::new(Vec::new());

fn main() -> ExitCode {
    // Such as `kill/restoring`, `kill` or `/restoring`. Without filters all cells run.
    let filters: Vec<String> = std::env::args().skip(1).collect();
    if let Some(unknown) = filters
        .iter()
        .find(|filter| !cells().any(|cell| matches(filter, &cell)))
    {
        eprintln!(
            "no cell matches {unknown}; an example of a cell is {}/{}",
            Fault::Kill.name(),
            Stage::Restoring.name()
        );
        return ExitCode::FAILURE;
    }
    panic::set_hook(Box::new(|info| PANICS.lock().push(info.to_string())));
    let started_at = Instant::now();
    let mut table = Table::default();
    for (fault, stage) in cells() {
        let wanted = filters.is_empty()
            || filters
                .iter()
                .any(|filter| matches(filter, &(fault, stage)));
        if !wanted {
            continue;
        }
        let Some(outcome) = run(fault, stage) else {
            return ExitCode::from(130);
        };
        table.add(fault, stage, outcome);
    }
    table.print(started_at.elapsed());
    match table.failed() {
        false => ExitCode::SUCCESS,
        true => ExitCode::FAILURE,
    }
}

fn cells() -> impl Iterator<Item = (Fault, Stage)> {
    let with_stages = |fault: Fault| fault.stages().iter().map(move |stage| (fault, *stage));
    Fault::all().flat_map(with_stages)
}

fn matches(filter: &str, (fault, stage): &(Fault, Stage)) -> bool {
    let (of_fault, of_stage) = filter.split_once('/').unwrap_or((filter, ""));
    let is = |wanted: &str, name| wanted.is_empty() || wanted == name;
    is(of_fault, fault.name()) && is(of_stage, stage.name())
}

/// Runs one cell; `None` after SIGINT or SIGTERM. Afterwards none of the cell's processes is
/// running.
fn run(fault: Fault, stage: Stage) -> Option<Outcome> {
    PANICS.lock().clear();
    let (logs, started_at) = (Logs::default(), Instant::now());
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let cell = async {
        let mut scene = Scene::new(fault, stage, logs.clone()).await;
        fault.prepare(&mut scene).await;
        stage.enter(&mut scene).await;
        fault.inject(&mut scene).await;
        verdict::check(scene, fault).await;
    };
    let watched = async {
        let mut interrupted = signal(SignalKind::interrupt()).unwrap();
        let mut terminated = signal(SignalKind::terminate()).unwrap();
        tokio::select! {
            ended = tokio::time::timeout(fault.time_max(), cell) => Some(ended),
            _ = interrupted.recv() => None,
            _ = terminated.recv() => None,
        }
    };
    let ended = panic::catch_unwind(AssertUnwindSafe(|| runtime.block_on(watched)));
    runtime.shutdown_timeout(SHUTDOWN_MAX);
    let reason = match ended {
        Ok(None) => return None,
        Ok(Some(Ok(()))) => return Some(Outcome::Ok(started_at.elapsed())),
        Ok(Some(Err(_elapsed))) => format!("timed out after {} s", fault.time_max().as_secs()),
        Err(_) => {
            let panics = PANICS.lock();
            panics.first().cloned().unwrap_or_default()
        }
    };
    Some(Outcome::failed(fault, stage, reason, &logs))
}
