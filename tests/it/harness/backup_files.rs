//! Data directories, backup files and their contents.

use std::fs::File;
use std::io::{Read, Write as _};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use flate2::Compression;
use flate2::write::GzEncoder;
use gradestore::backup::{
    BackupWriter, ChunkSource, FORMAT, HeadRecord, ReadProgress, Summary, restore, rfc3339,
};
use gradestore::grade::{Changes, FIELD_COUNT, Patch, Values, Write};
use gradestore::log::{Chain, DiskLog, Log, Position};
use gradestore::store::Store;
use rustix::fs::OFlags;

use crate::harness::wire::{eventually, with_timeout};
use crate::harness::{ANY_PORTS, AUTHORIZATION, PASSWORD, Ports, program, run};

/// The program with the data directory `dir`.
pub(crate) fn program_with_data_dir(dir: &Path) -> Command {
    let mut command = program();
    command
        .env_remove("GRADESTORE_EPHEMERAL")
        .env("GRADESTORE_PASSWORD", PASSWORD)
        .args(ANY_PORTS)
        .arg("--data-dir")
        .arg(dir);
    command
}

/// The ephemeral program, restored from `file`.
pub(crate) fn program_restoring(file: &Path) -> Command {
    let mut command = program();
    command
        .env("GRADESTORE_PASSWORD", PASSWORD)
        .args(ANY_PORTS)
        .arg("--restore-from")
        .arg(file);
    command
}

/// The state of a node.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct NodeState {
    pub(crate) position: u64,
    pub(crate) records: u64,
    pub(crate) digest: String,
}

impl NodeState {
    pub(crate) async fn of(node: &Ports) -> Self {
        let status = node.status().await;
        Self {
            position: status["position"].as_u64().unwrap(),
            records: status["records"].as_u64().unwrap(),
            digest: status["digest"].as_str().unwrap().to_owned(),
        }
    }

    pub(crate) fn of_store(store: &Store, position: u64) -> Self {
        Self {
            position,
            records: store.len() as u64,
            digest: store.digest().to_string(),
        }
    }
}

/// `GET /backup` with the password.
pub(crate) async fn request_backup(node: &Ports) -> reqwest::Response {
    let request = node.client.get(format!("http://{}/backup", node.write));
    let request = request.header("authorization", AUTHORIZATION);
    with_timeout("GET /backup", request.send()).await.unwrap()
}

/// A complete backup of `node`.
pub(crate) async fn fetch_backup(node: &Ports) -> Vec<u8> {
    let response = request_backup(node).await;
    assert_eq!(response.status(), 200);
    with_timeout("a backup", response.bytes())
        .await
        .unwrap()
        .to_vec()
}

/// Reads a valid backup into a store.
#[track_caller]
pub(crate) fn read_backup(file: &[u8]) -> (Store, Summary) {
    let store = Store::new();
    let summary = restore(file, &store, &ReadProgress::default()).unwrap();
    (store, summary)
}

/// Applies the batches after `after` up to `through`, and checks their order.
pub(crate) async fn replay(log: &DiskLog, store: &Store, after: u64, through: u64) {
    let mut subscription = log
        .subscribe(log.position(after).unwrap().unwrap())
        .await
        .unwrap();
    let mut applied = after;
    while applied < through {
        let mut entries = Vec::new();
        let next = subscription.next(&mut entries);
        with_timeout("the next batches", next).await.unwrap();
        for entry in entries
            .iter()
            .take_while(|entry| entry.position.seq <= through)
        {
            assert_eq!(entry.position.seq, applied + 1);
            applied = entry.position.seq;
            store.apply_all(&entry.batch.writes);
        }
    }
}

/// Reproducible random numbers.
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        // xorshift64*
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

/// A store with random values below `bound`. A backup has 35 bytes a row if that is `u64::MAX`.
pub(crate) fn random_store(rows: u64, bound: u64) -> Store {
    let (store, mut rng) = (Store::new(), Rng(rows));
    for row in 0..rows {
        let values: Values = std::array::from_fn::<_, FIELD_COUNT, _>(|_| rng.below(bound) as i64);
        store.apply_all(&[Write::Set(Patch {
            user_id: format!("user {row}"),
            changes: Changes::all(values),
        })]);
    }
    store
}

/// A backup of `store` at `position` of another log.
pub(crate) fn backup_file(store: &Store, position: u64) -> Vec<u8> {
    backup_file_with_head(
        store,
        &HeadRecord {
            format: FORMAT,
            created_ns: 1_700_000_000_000_000_000,
            log_id: "another".into(),
            position,
            time_ns: 1_700_000_000_000_000_000,
            chain: Chain::default(),
            previous_chain: Chain::default(),
            rows_expected: store.len() as u64,
            shard_seed: None,
        },
    )
}

/// A backup of `store` with this head, taken without concurrent writes.
pub(crate) fn backup_file_with_head(store: &Store, head: &HeadRecord) -> Vec<u8> {
    backup_file_ending_at(store, head, &head.position())
}

/// A backup of `store` with this head, taken until `end` was applied.
pub(crate) fn backup_file_ending_at(store: &Store, head: &HeadRecord, end: &Position) -> Vec<u8> {
    let (mut writer, mut file) = BackupWriter::start(head);
    let source = ChunkSource::new(store);
    while let Some(chunk) = source.next() {
        writer.add(&chunk);
        file.extend_from_slice(&chunk.bytes);
    }
    file.extend_from_slice(&writer.end(end));
    file
}

/// Writes [`backup_file`] into `dir`.
pub(crate) fn write_backup_file(dir: &Path, store: &Store, position: u64) -> PathBuf {
    let path = dir.join(format!("at-{position}.csv.gz"));
    std::fs::write(&path, backup_file(store, position)).unwrap();
    path
}

/// The sorted file names in a directory.
pub(crate) fn file_names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    let name = |entry: std::io::Result<std::fs::DirEntry>| {
        entry.unwrap().file_name().into_string().unwrap()
    };
    let mut names: Vec<String> = entries.map(name).collect();
    names.sort();
    names
}

/// Creates a named pipe.
pub(crate) fn make_pipe(path: &Path) {
    let made = run(Command::new("mkfifo").arg(path));
    assert!(made.status.success(), "{made:?}");
}

/// Creates a named pipe and opens it for reading, without waiting for a writer.
pub(crate) fn open_pipe(path: &Path) -> File {
    make_pipe(path);
    let mut options = File::options();
    let options = options.read(true);
    let options = options.custom_flags(OFlags::NONBLOCK.bits() as i32);
    options.open(path).unwrap()
}

/// Reads `pipe` until no writer has it open.
pub(crate) async fn read_pipe_to_end(pipe: &mut File) -> Vec<u8> {
    let mut bytes = Vec::new();
    eventually("the end of the pipe", async || {
        // `WouldBlock` before the end.
        pipe.read_to_end(&mut bytes).ok()
    })
    .await;
    bytes
}

/// The time in a file name such as `grades-20260131T235959Z.csv.gz`.
#[track_caller]
pub(crate) fn time_in_file_name(disposition: &str) -> String {
    let name = disposition.strip_prefix("attachment; filename=\"grades-");
    let time = name.and_then(|name| name.strip_suffix(".csv.gz\""));
    time.unwrap_or_else(|| panic!("{disposition}")).to_owned()
}

/// The current time in the format of the file names.
pub(crate) fn now() -> String {
    let since = std::time::UNIX_EPOCH.elapsed().unwrap();
    rfc3339(u64::try_from(since.as_nanos()).unwrap()).replace(['-', ':'], "")
}

/// `text` as one gzip member.
pub(crate) fn gzip(text: &[u8]) -> Vec<u8> {
    let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
    gzip.write_all(text).unwrap();
    gzip.finish().unwrap()
}
