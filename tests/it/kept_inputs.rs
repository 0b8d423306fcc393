//! Runs the checks of `tests/fuzz` on its seeds and on the inputs that fuzzing has kept.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use flate2::read::GzDecoder;

#[path = "../fuzz/checks/backup_reader.rs"]
mod backup_reader;
#[path = "../fuzz/checks/basic_header.rs"]
mod basic_header;
#[path = "../fuzz/checks/config.rs"]
mod config;
#[path = "../fuzz/checks/fast_request.rs"]
mod fast_request;
#[path = "../fuzz/checks/header_block.rs"]
mod header_block;
#[path = "../fuzz/checks/log_message.rs"]
mod log_message;
#[path = "../fuzz/checks/patch_body.rs"]
mod patch_body;
#[path = "../fuzz/checks/position_header.rs"]
mod position_header;
#[path = "../fuzz/checks/query.rs"]
mod query;
#[path = "../fuzz/checks/stored_batch.rs"]
mod stored_batch;

#[test]
fn kept_backups_pass() {
    check_each("backup_reader", backup_reader::check);
}

#[test]
fn kept_authorization_headers_pass() {
    check_each("basic_header", basic_header::check);
}

#[test]
fn kept_command_lines_pass() {
    // Without setting the variables, because other tests run in this process.
    check_each("config", |input| config::check(config::input(input)));
}

#[test]
fn kept_header_blocks_pass() {
    check_each("header_block", header_block::check);
}

#[test]
fn kept_log_messages_pass() {
    check_each("log_message", log_message::check);
}

#[test]
fn kept_patch_bodies_pass() {
    check_each("patch_body", patch_body::check);
}

#[test]
fn kept_fast_path_requests_pass() {
    check_each("fast_request", fast_request::check);
}

#[test]
fn kept_position_headers_pass() {
    check_each("position_header", position_header::check);
}

#[test]
fn kept_queries_pass() {
    check_each("query", query::check);
}

#[test]
fn kept_stored_batches_pass() {
    check_each("stored_batch", stored_batch::check);
}

fn check_each(target: &str, check: impl Fn(&[u8])) {
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz");
    let mut tried = 0;
    let mut one = |name: &str, input: &[u8]| {
        // Shown if the check panics.
        println!("{target}: {name}");
        check(input);
        tried += 1;
    };
    for file in fs::read_dir(fuzz.join("seeds").join(target)).unwrap() {
        let path = file.unwrap().path();
        one(&path.display().to_string(), &fs::read(&path).unwrap());
    }
    let archive = fuzz.join(format!("kept/{target}.tar.gz"));
    // A new target has no archive yet.
    if archive.exists() {
        for (name, input) in kept(&archive) {
            one(&name, &input);
        }
    }
    assert!(tried > 3, "{tried}");
}

/// The files in a plain tar archive: for each a header of 512 bytes and the content, padded to a
/// multiple of that.
fn kept(archive: &PathBuf) -> Vec<(String, Vec<u8>)> {
    let mut tar = Vec::new();
    let file = fs::File::open(archive).unwrap();
    GzDecoder::new(file).read_to_end(&mut tar).unwrap();
    let mut files = Vec::new();
    let mut rest = &tar[..];
    while let Some((header, after)) = rest
        .split_at_checked(512)
        .filter(|(header, _)| header[0] != 0)
    {
        let text = |field: &[u8]| {
            let end = field
                .iter()
                .position(|byte| *byte == 0)
                .unwrap_or(field.len());
            String::from_utf8(field[..end].to_vec()).unwrap()
        };
        let size = usize::from_str_radix(text(&header[124..136]).trim(), 8).unwrap();
        files.push((text(&header[..100]), after[..size].to_vec()));
        rest = &after[size.next_multiple_of(512)..];
    }
    files
}
