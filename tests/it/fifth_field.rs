//! A new field needs one more name in `src/grade/mod.rs` and another format of batches, and files of
//! the old format stay readable. The test adds a field to a copy of the crate, runs the copy's unit
//! tests, except those of the write-ahead log, and uses the field.

use std::fs;
use std::path::Path;
use std::process::Command;

use tempfile::tempdir;

use crate::disk::golden::copy_golden_data;
use crate::harness::backup_files::program_with_data_dir;
use crate::harness::{ANY_PORTS, Node, PASSWORD, program_at, run};

/// The name of the copy and its program. Under the crate's own name cargo would put the build of
/// the copy in place of the program that other tests run.
const PACKAGE: &str = "gradestore-fifth-field";

fn copy(from: &Path, to: &Path) {
    if from.is_dir() {
        fs::create_dir(to).unwrap();
        for entry in fs::read_dir(from).unwrap() {
            let name = entry.unwrap().file_name();
            copy(&from.join(&name), &to.join(&name));
        }
    } else if from.exists() {
        fs::copy(from, to).unwrap();
    }
}

fn edit(path: &Path, old: &str, new: &str) {
    let text = fs::read_to_string(path).unwrap();
    assert_eq!(
        text.matches(old).count(),
        1,
        "{old:?} in {}",
        path.display()
    );
    fs::write(path, text.replace(old, new)).unwrap();
}

/// Copies the crate as the package [`PACKAGE`].
fn copy_crate(crate_copy: &Path) {
    let _ = fs::remove_dir_all(crate_copy);
    fs::create_dir(crate_copy).unwrap();
    for name in [
        "Cargo.toml",
        "Cargo.lock",
        "askama.toml",
        "docs",
        "src",
        "benches",
    ] {
        copy(
            &Path::new(env!("CARGO_MANIFEST_DIR")).join(name),
            &crate_copy.join(name),
        );
    }
    let manifest = crate_copy.join("Cargo.toml");
    // The copy lacks the files of these targets.
    edit(&manifest, "members = [\"load\", \"tests/sim\"]\n", "");
    let text = fs::read_to_string(&manifest).unwrap();
    let tables = text.split_inclusive("\n\n");
    let others: String = tables
        .filter(|table| !table.starts_with("[[test]]"))
        .collect();
    fs::write(&manifest, others).unwrap();
    edit(
        &manifest,
        "[package]\nname = \"gradestore\"\n",
        &format!("[lib]\nname = \"gradestore\"\n\n[package]\nname = \"{PACKAGE}\"\n"),
    );
    let locked = |name: &str| format!("[[package]]\nname = \"{name}\"\n");
    edit(
        &crate_copy.join("Cargo.lock"),
        &locked("gradestore"),
        &locked(PACKAGE),
    );
    // With an integration test cargo builds the program too, and the dependencies with the same
    // features as for the tests that run now.
    fs::create_dir(crate_copy.join("tests")).unwrap();
    fs::write(
        crate_copy.join("tests/built.rs"),
        "#[test]\nfn built() {}\n",
    )
    .unwrap();
}

#[tokio::test]
async fn a_fifth_field_needs_one_more_name_and_another_format() {
    // Always the same directory, so that a second run compiles little.
    let scratch = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let target = scratch.parent().unwrap();
    let crate_copy = scratch.join("fifth-field");
    copy_crate(&crate_copy);
    edit(
        &crate_copy.join("src/grade/mod.rs"),
        "    \"return_fee\",\n];",
        "    \"return_fee\",\n    \"fifth_fee\",\n];",
    );
    edit(
        &crate_copy.join("src/log/codec.rs"),
        "const FORMAT: u8 = 1;",
        "const FORMAT: u8 = 2;",
    );

    let tests = Command::new(env!("CARGO"))
        .args([
            "test",
            "--offline",
            "--locked",
            "--lib",
            "--test",
            "built",
            "--target-dir",
        ])
        .arg(target)
        // The tests take less time than optimizing the crate for them.
        .arg("--config")
        .arg(format!("profile.dev.package.{PACKAGE}.opt-level=0"))
        // The write-ahead log stores the bytes of `log::codec`, which is tested. Its own tests take
        // as long as all others together.
        .args(["--", "--skip", "log::wal"])
        .current_dir(&crate_copy)
        .output()
        .unwrap();
    let printed =
        String::from_utf8(tests.stdout).unwrap() + &String::from_utf8(tests.stderr).unwrap();
    assert!(tests.status.success(), "{printed}");

    let program = target.join("debug").join(PACKAGE);
    let directory = tempdir().unwrap();
    copy_golden_data(directory.path());
    let mut command = program_at(&program);
    command
        .args(ANY_PORTS)
        .arg("--data-dir")
        .arg(directory.path())
        .env("GRADESTORE_PASSWORD", PASSWORD)
        .env("GRADESTORE_EPHEMERAL", "false");
    let node = Node::start_with(&mut command).await;
    assert_eq!(node.status().await["records"], 3);
    assert_eq!(
        node.get("alice").await.body,
        r#"{"user_id":"alice","postpaid_limit":0,"spp":6,"shipping_fee":0,"return_fee":-9223372036854775808,"fifth_fee":0}"#
    );
    node.set(r#"{"user_id":"a","fifth_fee":5}"#)
        .await
        .position();
    node.set(r#"{"user_id":"a","spp":1}"#).await.position();
    assert_eq!(
        node.get("a").await.body,
        r#"{"user_id":"a","postpaid_limit":0,"spp":1,"shipping_fee":0,"return_fee":0,"fifth_fee":5}"#
    );
    let detail = node
        .set(r#"{"user_id":"a","fifth_fee":1.5}"#)
        .await
        .expect_problem(422, "not-a-patch");
    assert!(detail.contains("fifth_fee"), "{detail}");

    // The program without the field reads nothing of the new format, and says why.
    drop(node);
    let mut older = program_with_data_dir(directory.path());
    let printed = String::from_utf8(run(&mut older).stderr).unwrap();
    assert!(
        printed.contains("has format 2, newer than this program reads; update gradestore"),
        "{printed}"
    );
}
