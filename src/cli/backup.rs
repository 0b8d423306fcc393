//! `gradestore backup` and `gradestore verify`.

use std::fs::{self, File};
use std::io::{self, BufReader, Write};
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use tokio::task::block_in_place;
use tokio::time::Instant;

use crate::backup::{BackupError, ReadProgress, Summary, read, rfc3339};
use crate::cli::BackupArgs;
use crate::replication::peer_client::{
    BodyReader, Client, ClientCredentials, Compression, Download, RemoteError,
};
use crate::store::RecordBatch;
use crate::sys::progress::Bar;

/// How long the node may send nothing.
const SILENCE_MAX: Duration = Duration::from_secs(30);

/// Why a backup was not downloaded.
#[derive(Debug, thiserror::Error)]
pub enum DownloadError {
    /// The node can't be reached, rejected the request or aborted the response.
    #[error("{0}; no file was written")]
    Remote(#[from] RemoteError),
    /// The response is not a valid backup.
    #[error("the backup from {url} is invalid: {error}; no file was written")]
    Invalid {
        /// The URL of the backup.
        url: String,
        /// What is wrong with the backup.
        error: BackupError,
    },
    /// The file can't be written.
    #[error("cannot write {path}: {error}")]
    Write {
        /// The file.
        path: PathBuf,
        /// The system's error.
        error: io::Error,
    },
}

/// Downloads a backup to a temporary file, verifies it at the same time, and renames the file once the
/// backup is complete.
///
/// Writing may block, on a pipe indefinitely, so this needs a runtime with several threads.
///
/// # Errors
/// See [`DownloadError`]. An existing file of that name is then unchanged; standard output has the part
/// that arrived.
pub async fn backup(args: &BackupArgs, password: &str) -> Result<Summary, DownloadError> {
    let path = args.output.as_path();
    let write_error = |error| DownloadError::Write {
        path: path.to_owned(),
        error,
    };
    let target = target_of(path);
    let path = target.as_path();
    let account = ClientCredentials {
        username: args.credentials.username.as_str().into(),
        password: password.into(),
    };
    let client = Client::new(account, SILENCE_MAX, Compression::Always).map_err(|error| {
        RemoteError::Http {
            url: args.from.clone(),
            error: error.to_string(),
        }
    })?;
    let download = client.backup(&args.from).await?;
    if path == Path::new("-") {
        return copy(download, &mut io::stdout(), write_error).await;
    }
    if fs::metadata(path).is_ok_and(|metadata| !metadata.is_file()) {
        // A device or a pipe can't be replaced by a renamed file.
        let file = block_in_place(|| File::options().write(true).open(path));
        let mut file = file.map_err(write_error)?;
        return copy(download, &mut file, write_error).await;
    }
    let directory = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let mut partial = path.as_os_str().to_owned();
    partial.push(format!(".{}.partial", std::process::id()));
    let partial = Partial(PathBuf::from(partial));
    let mut file = File::create(&partial.0).map_err(write_error)?;
    let summary = copy(download, &mut file, write_error).await?;
    file.sync_all().map_err(write_error)?;
    fs::rename(&partial.0, path).map_err(write_error)?;
    let synced = File::open(directory).and_then(|directory| directory.sync_all());
    synced.map_err(write_error)?;
    Ok(summary)
}

/// The target of a link, which may not exist yet. The backup replaces the target, not the link.
fn target_of(path: &Path) -> PathBuf {
    fs::canonicalize(path).unwrap_or_else(|_| match fs::read_link(path) {
        Ok(target) => path.parent().unwrap_or(Path::new("")).join(target),
        Err(_) => path.to_owned(),
    })
}

/// A temporary file, which is removed when this is dropped, unless it was renamed.
struct Partial(PathBuf);

impl Drop for Partial {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

async fn copy(
    download: Download,
    out: &mut impl Write,
    write_error: impl Fn(io::Error) -> DownloadError,
) -> Result<Summary, DownloadError> {
    let url = download.url.clone();
    let (sender, parts) = BodyReader::channel();
    let progress = Arc::new(ReadProgress::default());
    let verifier = {
        let progress = Arc::clone(&progress);
        thread::spawn(move || read(parts, &RecordBatch::digest, &progress))
    };
    let bar = Bar::new(0, Instant::now());
    let passed_on = download.pass_on(sender, |part| {
        bar.set(progress.rows(), progress.bytes());
        block_in_place(|| out.write_all(part)).map_err(&write_error)
    });
    passed_on.await?;
    out.flush().map_err(&write_error)?;
    let verified = verifier.join().unwrap_or_else(|panic| resume_unwind(panic));
    verified.map_err(|error| DownloadError::Invalid { url, error })
}

/// Reads and checks the backup at `path`.
///
/// # Errors
/// The backup is incomplete or damaged.
pub fn verify(path: &Path) -> Result<Summary, BackupError> {
    let file = File::open(path).map_err(BackupError::Open)?;
    let bytes_total = file.metadata().map_or(0, |metadata| metadata.len());
    let progress = ReadProgress::default();
    let bar = Bar::new(bytes_total, Instant::now());
    thread::scope(|scope| {
        let reader = scope.spawn(|| read(BufReader::new(file), &RecordBatch::digest, &progress));
        while !reader.is_finished() {
            bar.set(progress.rows(), progress.bytes());
            thread::sleep(Duration::from_millis(50));
        }
        reader.join().unwrap_or_else(|panic| resume_unwind(panic))
    })
}

/// The text that the commands print at the end.
#[must_use]
pub fn describe(summary: &Summary) -> String {
    let mut lines = format!("rows      {}\nbytes     {}\n", summary.rows, summary.bytes);
    match &summary.records {
        Some((head, end)) => {
            lines += &format!("time      {}\n", rfc3339(head.created_ns));
            lines += &format!("log       {}\n", head.log_id);
            lines += &format!("position  {} to {}\n", head.position, end.position);
            lines += &format!("digest    {}\n", summary.digest);
            lines += &format!("checksum  {}\n", end.checksum);
        }
        None => {
            lines += &format!("digest    {}\n", summary.digest);
            lines += "not made by gradestore: no position, time or checksum to compare with\n";
        }
    }
    lines
}
