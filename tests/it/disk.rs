//! Data directories, backups and what is in them.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use gradestore::backup::{
    BackupWriter, ChunkSource, FORMAT, HeadRecord, ReadProgress, Summary, restore, rfc3339,
};
use gradestore::grade::{Changes, FIELD_COUNT, Patch, Values, Write};
use gradestore::log::{Chain, DiskLog, Log, Position};
use gradestore::store::Store;
use rustix::fs::OFlags;

use crate::harness::{ANY_PORTS, AUTHORIZATION, PASSWORD, Ports, program, run};
use crate::wire::{eventually, in_time};

/// The program on the data directory `dir`.
pub(crate) fn program_on(dir: &Path) -> Command {
    let mut command = program();
    command
        .env_remove("GRADESTORE_EPHEMERAL")
        .env("GRADESTORE_PASSWORD", PASSWORD)
        .args(ANY_PORTS)
        .arg("--data-dir")
        .arg(dir);
    command
}

/// The program without a disk, begun from `file`.
pub(crate) fn program_from(file: &Path) -> Command {
    let mut command = program();
    command
        .env("GRADESTORE_PASSWORD", PASSWORD)
        .args(ANY_PORTS)
        .arg("--restore-from")
        .arg(file);
    command
}

/// What a node holds.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Held {
    pub(crate) position: u64,
    pub(crate) records: u64,
    pub(crate) digest: String,
}

impl Held {
    pub(crate) async fn by(node: &Ports) -> Self {
        let status = node.ops("/status").await.json();
        Self {
            position: status["position"].as_u64().unwrap(),
            records: status["records"].as_u64().unwrap(),
            digest: status["digest"].as_str().unwrap().to_owned(),
        }
    }

    pub(crate) fn in_store(store: &Store, position: u64) -> Self {
        Self {
            position,
            records: store.len() as u64,
            digest: store.digest().to_string(),
        }
    }
}

/// `GET /backup`, as it should be done.
pub(crate) async fn ask_backup(node: &Ports) -> reqwest::Response {
    let request = node.client.get(format!("http://{}/backup", node.write));
    let request = request.header("authorization", AUTHORIZATION);
    in_time("GET /backup", request.send()).await.unwrap()
}

/// A whole backup of `node`.
pub(crate) async fn backup_of(node: &Ports) -> Vec<u8> {
    let response = ask_backup(node).await;
    assert_eq!(response.status(), 200);
    in_time("a backup", response.bytes())
        .await
        .unwrap()
        .to_vec()
}

/// The store that a good backup holds, and what it says of itself.
#[track_caller]
pub(crate) fn restored(file: &[u8]) -> (Store, Summary) {
    let store = Store::new();
    let summary = restore(file, &store, &ReadProgress::default()).unwrap();
    (store, summary)
}

/// Applies the batches after `after` up to `through`, each in its place.
pub(crate) async fn replay(log: &DiskLog, store: &Store, after: u64, through: u64) {
    let mut subscription = log
        .subscribe(log.position(after).unwrap().unwrap())
        .await
        .unwrap();
    let mut applied = after;
    while applied < through {
        let mut entries = Vec::new();
        let next = subscription.next(&mut entries);
        in_time("the next batches", next).await.unwrap();
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

/// Numbers that look random and are the same in every run.
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

/// A store with values below `bound`; the larger that is, the larger are its backups: 35 bytes a
/// row with all of `u64`.
pub(crate) fn store_of(rows: u64, bound: u64) -> Store {
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

/// A backup of `store`, as if taken at `position` of another log.
pub(crate) fn file_of(store: &Store, position: u64) -> Vec<u8> {
    file_with(
        store,
        &HeadRecord {
            format: FORMAT,
            log_id: "another".into(),
            position,
            time_ns: 1_700_000_000_000_000_000,
            chain: Chain::default(),
            previous_chain: Chain::default(),
            rows_expected: store.len() as u64,
        },
    )
}

/// A backup of `store` that begins so; it was made while nothing was applied.
pub(crate) fn file_with(store: &Store, head: &HeadRecord) -> Vec<u8> {
    file_until(store, head, &head.position())
}

/// A backup of `store` that begins so and was made until `end` was applied.
pub(crate) fn file_until(store: &Store, head: &HeadRecord, end: &Position) -> Vec<u8> {
    let (mut writer, mut file) = BackupWriter::start(head);
    let source = ChunkSource::new(store);
    while let Some(chunk) = source.next() {
        writer.add(&chunk);
        file.extend_from_slice(&chunk.bytes);
    }
    file.extend_from_slice(&writer.end(end));
    file
}

/// The same as a file in `dir`.
pub(crate) fn write_file_of(dir: &Path, store: &Store, position: u64) -> PathBuf {
    let path = dir.join(format!("at-{position}.csv.gz"));
    std::fs::write(&path, file_of(store, position)).unwrap();
    path
}

/// The names in a directory, in order.
pub(crate) fn names_in(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    let name = |entry: std::io::Result<std::fs::DirEntry>| {
        entry.unwrap().file_name().into_string().unwrap()
    };
    let mut names: Vec<String> = entries.map(name).collect();
    names.sort();
    names
}

/// Makes a named pipe.
pub(crate) fn make_pipe(path: &Path) {
    let made = run(Command::new("mkfifo").arg(path));
    assert!(made.status.success(), "{made:?}");
}

/// Makes a named pipe and opens it to read what comes, without waiting for anybody to write.
pub(crate) fn open_pipe(path: &Path) -> File {
    make_pipe(path);
    let mut options = File::options();
    let options = options.read(true);
    let options = options.custom_flags(OFlags::NONBLOCK.bits() as i32);
    options.open(path).unwrap()
}

/// All that comes through `pipe` until nobody has it open for writing.
pub(crate) async fn rest_of(pipe: &mut File) -> Vec<u8> {
    let mut bytes = Vec::new();
    eventually("the pipe's end", async || {
        // `WouldBlock` while there is no end.
        pipe.read_to_end(&mut bytes).ok()
    })
    .await;
    bytes
}

/// The time of a file name such as `grades-2026-01-31T23:59:59Z.csv.gz`.
#[track_caller]
pub(crate) fn time_named(disposition: &str) -> String {
    let name = disposition.strip_prefix("attachment; filename=\"grades-");
    let time = name.and_then(|name| name.strip_suffix(".csv.gz\""));
    time.unwrap_or_else(|| panic!("{disposition}")).to_owned()
}

/// Now, as file names have it.
pub(crate) fn now() -> String {
    let since = std::time::UNIX_EPOCH.elapsed().unwrap();
    rfc3339(u64::try_from(since.as_nanos()).unwrap())
}
