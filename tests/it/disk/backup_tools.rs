//! Backups read by Python and zcat, and a backup written to a device, which needs a mount
//! namespace.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;

use gradestore::grade::FIELDS;
use tempfile::tempdir;

use super::backup::{Grades, IDS, backup_command, set_edge_case_grades};
use crate::harness::backup_files::fetch_backup;
use crate::harness::{Node, run, wrapped_by};

/// Reads a file with Python's gzip and csv modules and prints it as JSON.
const PYTHON: &str = "
import csv, gzip, json, sys
with gzip.open(sys.argv[1], 'rt', encoding='utf-8', newline='') as file:
    rows = [dict(row) for row in csv.DictReader(file, strict=True)]
json.dump(rows, sys.stdout)
";

#[tokio::test]
async fn other_tools_read_all_rows_of_a_backup() {
    let node = Node::start().await;
    let grades = set_edge_case_grades(&node).await;
    let directory = tempdir().unwrap();
    let path = directory.path().join("grades.csv.gz");
    fs::write(&path, fetch_backup(&node).await).unwrap();

    let python = run(Command::new("python3").args(["-c", PYTHON]).arg(&path));
    assert!(python.status.success(), "{python:?}");
    let rows: Vec<BTreeMap<String, String>> = serde_json::from_slice(&python.stdout).unwrap();
    let found: Grades = rows
        .iter()
        .map(|row| {
            assert_eq!(row.len(), 1 + FIELDS.len());
            let values = FIELDS.iter().map(|field| row[*field].parse().unwrap());
            (row["user_id"].clone(), values.collect())
        })
        .collect();
    assert_eq!((found, rows.len()), (grades, IDS.len()));

    let zcat = run(Command::new("zcat").arg(&path));
    assert!(zcat.status.success() && zcat.stderr.is_empty(), "{zcat:?}");
    let text = String::from_utf8(zcat.stdout).unwrap();
    assert_eq!(text.lines().count(), 1 + IDS.len());
    let header = format!("\"user_id\",\"{}\"", FIELDS.join("\",\""));
    assert_eq!(text.lines().next(), Some(&*header));
}

#[tokio::test]
async fn the_backup_command_writes_to_a_device_without_replacing_it() {
    let node = Node::start().await;
    set_edge_case_grades(&node).await;
    let directory = tempdir().unwrap();
    let path = directory.path().join("null");
    fs::write(&path, "").unwrap();
    // A bind mount of /dev/null, visible to the command only, protects the machine's own.
    let mount = "mount --bind /dev/null \"$0\" && \"$@\" && test -c \"$0\" && ls -A \"${0%/*}\"";
    let mut unshare = vec!["unshare", "--mount"];
    if !rustix::process::geteuid().is_root() {
        unshare.push("--map-root-user");
    }
    unshare.extend(["sh", "-c", mount, path.to_str().unwrap()]);
    let command = backup_command(&format!("http://{}", node.write), &path);
    let kept = run(&mut wrapped_by(&unshare, &command));
    assert!(kept.status.success(), "{kept:?}");
    assert_eq!(kept.stdout, b"null\n");
    let printed = String::from_utf8(kept.stderr).unwrap();
    let rows = format!("rows      {}", IDS.len());
    assert!(printed.lines().any(|line| line == rows), "{printed}");
}
