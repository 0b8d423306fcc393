//! What is printed.

use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::fault::Fault;
use crate::scene::Logs;
use crate::stage::Stage;

/// Where the logs of failed cells are kept, below the project's directory.
const KEPT: &str = "target/faults";

/// What became of a cell.
#[derive(Debug, Clone)]
pub(crate) enum Outcome {
    /// It held, and took so long.
    Ok(Duration),
    /// It did not.
    Failed(String),
    /// The two do not go together.
    NotApplicable(&'static str),
}

impl Outcome {
    /// Keeps what the cell's processes said.
    pub(crate) fn failed(fault: Fault, stage: Stage, why: String, logs: &Logs) -> Self {
        let dir = format!("{KEPT}/{}-{}", fault.name(), stage.name());
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(&dir);
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        for (name, said) in logs.lock().iter() {
            fs::write(path.join(format!("{name}.log")), &*said.lock()).unwrap();
        }
        fs::write(path.join("why"), &why).unwrap();
        // Of a panic the place stands first.
        let why = why.replace('\n', " ");
        let why: String = why.chars().take(300).collect();
        Self::Failed(format!("{why} (logs in {dir})"))
    }
}

/// All cells that were run.
#[derive(Default)]
pub(crate) struct Table(Vec<(Fault, Stage, Outcome)>);

impl Table {
    /// Adds a cell, and says what became of it.
    pub(crate) fn add(&mut self, fault: Fault, stage: Stage, outcome: Outcome) {
        let said = match &outcome {
            Outcome::Ok(took) => format!("ok {:.1} s", took.as_secs_f64()),
            Outcome::Failed(why) => format!("FAILED: {why}"),
            Outcome::NotApplicable(why) => format!("n/a: {why}"),
        };
        println!("{}/{}: {said}", fault.name(), stage.name());
        self.0.push((fault, stage, outcome));
    }

    pub(crate) fn failed(&self) -> bool {
        let failed = |(_, _, outcome): &(_, _, Outcome)| matches!(outcome, Outcome::Failed(_));
        self.0.iter().any(failed)
    }

    /// A row a fault, a column a stage; in full words what did not hold or does not apply.
    pub(crate) fn print(&self, took: Duration) {
        let stages = Stage::ALL.map(Stage::name);
        println!("\n| | {} |\n|{}", stages.join(" | "), " --- |".repeat(7));
        for fault in Fault::ALL {
            let cells = Stage::ALL.map(|stage| self.short(fault, stage));
            if cells.iter().any(|cell| !cell.is_empty()) {
                println!("| {} | {} |", fault.name(), cells.join(" | "));
            }
        }
        let count = |wanted: fn(&Outcome) -> bool| {
            let cells = self.0.iter();
            cells.filter(|(_, _, outcome)| wanted(outcome)).count()
        };
        println!(
            "\n{} cells in {} s: {} ok, {} failed, {} n/a",
            self.0.len(),
            took.as_secs(),
            count(|outcome| matches!(outcome, Outcome::Ok(_))),
            count(|outcome| matches!(outcome, Outcome::Failed(_))),
            count(|outcome| matches!(outcome, Outcome::NotApplicable(_))),
        );
    }

    fn short(&self, fault: Fault, stage: Stage) -> String {
        let cell = self.0.iter().find(|(f, s, _)| (*f, *s) == (fault, stage));
        match cell.map(|(_, _, outcome)| outcome) {
            None => String::new(),
            Some(Outcome::Ok(took)) => format!("ok {:.1} s", took.as_secs_f64()),
            Some(Outcome::Failed(_)) => "FAILED".to_owned(),
            Some(Outcome::NotApplicable(why)) => format!("n/a: {why}"),
        }
    }
}
