//! Files that an earlier build wrote are read: see tests/golden.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use flate2::read::GzDecoder;
use tempfile::tempdir;

use crate::harness::backup_files::{program_restoring, program_with_data_dir};
use crate::harness::{Node, Ports};

pub(crate) fn golden(path: &str) -> PathBuf {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    golden.join(path)
}

/// Checks that a node holds exactly the records of the golden files.
pub(crate) async fn assert_golden_records(node: &Ports) {
    let expected = [
        (
            "alice",
            r#"{"user_id":"alice","postpaid_limit":0,"spp":6,"shipping_fee":0,"return_fee":-9223372036854775808}"#,
        ),
        (
            "bob",
            r#"{"user_id":"bob","postpaid_limit":0,"spp":0,"shipping_fee":0,"return_fee":0}"#,
        ),
        (
            "привет 😀, \"b\"",
            r#"{"user_id":"привет 😀, \"b\"","postpaid_limit":9223372036854775807,"spp":0,"shipping_fee":0,"return_fee":0}"#,
        ),
    ];
    for (user_id, grade) in expected {
        assert_eq!(node.get(user_id).await.body, grade);
    }
    node.get("deleted")
        .await
        .expect_problem(404, "user-unknown");
    assert_eq!(node.status().await["records"], 3);
}

const SNAPSHOT: &str = "snapshots/grades-00000000000000000003.csv.gz";

/// Copies the golden data directory, with its log unpacked, into the empty directory `dir`.
pub(crate) fn copy_golden_data(dir: &Path) {
    for folder in ["log", "snapshots"] {
        fs::create_dir(dir.join(folder)).unwrap();
    }
    for file in ["replica-id", SNAPSHOT] {
        fs::copy(golden("data").join(file), dir.join(file)).unwrap();
    }
    let segment = "log/00000000000000000001.seg";
    let packed = File::open(golden("data").join(format!("{segment}.gz"))).unwrap();
    let mut unpacked = File::create(dir.join(segment)).unwrap();
    io::copy(&mut GzDecoder::new(packed), &mut unpacked).unwrap();
}

#[tokio::test]
async fn a_golden_data_directory_is_read() {
    let directory = tempdir().unwrap();
    let dir = directory.path();
    copy_golden_data(dir);
    let node = Node::start_with(&mut program_with_data_dir(dir)).await;
    let status = node.status().await;
    assert_eq!(
        status["restore"]["source"],
        dir.join(SNAPSHOT).to_str().unwrap()
    );
    assert_eq!(status["position"], 5);
    assert_golden_records(&node).await;
}

#[tokio::test]
async fn a_golden_backup_is_restored() {
    let node = Node::start_with(&mut program_restoring(&golden("backup.csv.gz"))).await;
    assert_golden_records(&node).await;
    assert_eq!(node.status().await["position"], 5);
}
