//! Resident bytes per record and the time to fill, of the store and of `scc::HashMap` with the same
//! records. Measures each row in a new process.
//!
//! `cargo bench --bench memory`, or `-- 8000000 10000000` for other counts.

#![expect(clippy::expect_used, reason = "a bench may panic")]

mod stores;

use std::process::Command;
use std::time::Instant;

use gradestore::store::Store;
use stores::{Grades, Scc, check, filled, with_id};

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let [row, store, id_bytes, count] = args.as_slice()
        && row == "row"
    {
        let id_bytes = id_bytes.parse().expect("a length");
        let count = count.parse().expect("a count");
        match store.as_str() {
            Store::NAME => show_row::<Store>(count, id_bytes),
            _ => show_row::<Scc>(count, id_bytes),
        }
        return;
    }
    let mut counts: Vec<&str> = args.iter().map(String::as_str).collect();
    counts.retain(|arg| arg.parse::<u64>().is_ok());
    if counts.is_empty() {
        // Without `--bench` this is a test run.
        counts = match args.iter().any(|arg| arg == "--bench") {
            true => vec!["10000", "1000000", "8000000", "10000000"],
            false => vec!["10000"],
        };
    }
    println!("| records | id bytes | store | RSS bytes per record | fill ns per record |");
    println!("| ---: | ---: | --- | ---: | ---: |");
    for count in counts {
        for id_bytes in ["13", "36"] {
            for store in [Store::NAME, Scc::NAME] {
                let this = std::env::current_exe().expect("the path of this program");
                let ran = Command::new(this)
                    .args(["row", store, id_bytes, count])
                    .status();
                assert!(ran.expect("a child").success(), "{store} {count} failed");
            }
        }
    }
}

fn show_row<G: Grades>(count: u64, id_bytes: usize) {
    let before = rss_bytes();
    let started = Instant::now();
    let grades: G = filled(count, id_bytes);
    let took = started.elapsed();
    let record_bytes = (rss_bytes() - before) as f64 / count as f64;
    let record_ns = took.as_nanos() as f64 / count as f64;
    println!(
        "| {count} | {id_bytes} | {} | {record_bytes:.0} | {record_ns:.0} |",
        G::NAME
    );
    check(&grades, count);
    let last = with_id(count - 1, id_bytes, |id| grades.get(id));
    assert!(last.is_some());
}

fn rss_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let rss = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = rss.and_then(|rss| rss.trim().strip_suffix(" kB"));
    kib.and_then(|kib| kib.parse::<u64>().ok())
        .expect("VmRSS in kB")
        * 1024
}
