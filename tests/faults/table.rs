//! The result table.

use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::fault::Fault;
use crate::scene::Logs;
use crate::stage::Stage;

/// Where the logs of failed cells are kept, below the project's directory.
const KEPT: &str = "target/faults";

/// The result of a cell.
#[derive(Debug, Clone)]
pub(crate) enum Outcome {
    /// All invariants held; the duration.
    Ok(Duration),
    /// An invariant was violated, or the cell timed out.
    Failed(String),
}

impl Outcome {
    /// Saves the logs of the cell's processes.
    pub(crate) fn failed(fault: Fault, stage: Stage, why: String, logs: &Logs) -> Self {
        let dir = format!("{KEPT}/{}-{}", fault.name(), stage.name());
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(&dir);
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        for (name, said) in logs.lock().iter() {
            fs::write(path.join(format!("{name}.log")), &*said.lock()).unwrap();
        }
        fs::write(path.join("why"), &why).unwrap();
        // A panic begins with its location.
        let why = why.replace('\n', " ");
        let why: String = why.chars().take(300).collect();
        Self::Failed(format!("{why} (logs in {dir})"))
    }
}

/// All cells that were run.
#[derive(Default)]
pub(crate) struct Table(Vec<(Fault, Stage, Outcome)>);

impl Table {
    /// Adds a cell and prints its result.
    pub(crate) fn add(&mut self, fault: Fault, stage: Stage, outcome: Outcome) {
        let said = match &outcome {
            Outcome::Ok(took) => format!("ok {:.1} s", took.as_secs_f64()),
            Outcome::Failed(why) => format!("FAILED: {why}"),
        };
        println!("{}/{}: {said}", fault.name(), stage.name());
        self.0.push((fault, stage, outcome));
    }

    pub(crate) fn failed(&self) -> bool {
        let failed = |(_, _, outcome): &(_, _, Outcome)| matches!(outcome, Outcome::Failed(_));
        self.0.iter().any(failed)
    }

    /// Prints a table for one server and one for three: one row per fault, one column per stage.
    /// The reasons of failures were printed before.
    pub(crate) fn print(&self, took: Duration) {
        let (of_three, of_one): (Vec<_>, _) =
            Fault::all().partition(|fault| matches!(fault, Fault::Servers(_)));
        self.print_board(&of_one);
        self.print_board(&of_three);
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
