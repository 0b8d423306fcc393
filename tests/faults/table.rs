//! The results, and how they are printed.

use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::fault::Fault;
use crate::scene::Logs;
use crate::stage::Stage;

/// The directory for the output of failed cells, relative to the repository.
const LOGS_DIR: &str = "target/faults";

/// The result of a cell.
#[derive(Debug, Clone)]
pub(crate) enum Outcome {
    /// It passed, with its duration.
    Ok(Duration),
    /// It failed, with the reason.
    Failed(String),
}

impl Outcome {
    /// Saves the output of the cell's processes.
    pub(crate) fn failed(fault: Fault, stage: Stage, reason: String, logs: &Logs) -> Self {
        let dir = format!("{LOGS_DIR}/{}-{}", fault.name(), stage.name());
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(&dir);
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        for (name, printed) in logs.lock().iter() {
            fs::write(path.join(format!("{name}.log")), &*printed.lock()).unwrap();
        }
        fs::write(path.join("why"), &reason).unwrap();
        // The message of a panic begins with its location.
        let reason = reason.replace('\n', " ");
        let reason: String = reason.chars().take(300).collect();
        Self::Failed(format!("{reason} (logs in {dir})"))
    }
}

/// The results of the cells that have run.
#[derive(Default)]
pub(crate) struct Table(Vec<(Fault, Stage, Outcome)>);

impl Table {
    /// Adds the result of a cell, and prints it.
    pub(crate) fn add(&mut self, fault: Fault, stage: Stage, outcome: Outcome) {
        let printed = match &outcome {
            Outcome::Ok(took) => format!("ok {:.1} s", took.as_secs_f64()),
            Outcome::Failed(reason) => format!("FAILED: {reason}"),
        };
        println!("{}/{}: {printed}", fault.name(), stage.name());
        self.0.push((fault, stage, outcome));
    }

    pub(crate) fn failed(&self) -> bool {
        let failed = |(_, _, outcome): &(_, _, Outcome)| matches!(outcome, Outcome::Failed(_));
        self.0.iter().any(failed)
    }

    /// Prints one table for one server and one for three, with a row per fault and a column per
    /// stage. `add` has printed the reasons of failures.
    pub(crate) fn print(&self, took: Duration) {
        let (three_servers, one_server): (Vec<_>, _) =
            Fault::all().partition(|fault| matches!(fault, Fault::Servers(_)));
        self.print_board(&one_server);
        self.print_board(&three_servers);
        let failed = |(_, _, outcome): &&(_, _, Outcome)| matches!(outcome, Outcome::Failed(_));
        let (cells, failed) = (self.0.len(), self.0.iter().filter(failed).count());
        println!("\n{cells} cells in {} s, {failed} failed", took.as_secs());
    }

    fn print_board(&self, faults: &[Fault]) {
        let ran = |fault: &&Fault| self.0.iter().any(|(ran, ..)| ran == *fault);
        let ran: Vec<Fault> = faults.iter().filter(ran).copied().collect();
        let Some(stages) = ran.first().map(|fault| fault.stages()) else {
            return;
        };
        let names: Vec<_> = stages.iter().map(|stage| stage.name()).collect();
        let line = " --- |".repeat(stages.len() + 1);
        println!("\n| | {} |\n|{line}", names.join(" | "));
        for fault in ran {
            let cells = stages.iter().map(|stage| self.short(fault, *stage));
            let cells: Vec<String> = cells.collect();
            println!("| {} | {} |", fault.name(), cells.join(" | "));
        }
    }

    fn short(&self, fault: Fault, stage: Stage) -> String {
        let cell = self.0.iter().find(|(f, s, _)| (*f, *s) == (fault, stage));
        match cell.map(|(_, _, outcome)| outcome) {
            None => String::new(),
            Some(Outcome::Ok(took)) => format!("ok {:.1} s", took.as_secs_f64()),
            Some(Outcome::Failed(_)) => "FAILED".to_owned(),
        }
    }
}
