//! `gradestore backup` and `gradestore verify`.

use std::fs::{self, File, Permissions};
use std::io::{self, BufReader, Read, Write};
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use tokio::task::spawn_blocking;
use tokio::time::Instant;

use crate::backup::{BackupError, ReadProgress, Summary, read, rfc3339};
use crate::cli::BackupArgs;
use crate::replication::peer_client::{
    BodyReader, Client, ClientCredentials, Compression, Download, RemoteError,
};
use crate::store::RecordBatch;
use crate::sys::files;
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
/// backup is complete. When the future is dropped, the temporary file is removed.
///
/// # Errors
/// See [`DownloadError`]. An existing file of that name is then unchanged; standard output has the part
/// that arrived.
pub async fn backup(args: &BackupArgs, password: &str) -> Result<Summary, DownloadError> {
    let path = target_of(&args.output);
    let write_error = |error| DownloadError::Write {
        path: args.output.clone(),
        error,
    };
    let account = ClientCredentials::new(&args.credentials.username, password);
    let client = Client::new(account, SILENCE_MAX, Compression::Always).map_err(|error| {
        RemoteError::Http {
            url: args.from.clone(),
            error: error.to_string(),
        }
    })?;
    let download = client.backup(&args.from).await?;
    if path == Path::new("-") {
        return copy(download, || Ok(io::stdout()), write_error).await;
    }
    let existing = fs::metadata(&path).ok();
    if existing
        .as_ref()
        .is_some_and(|metadata| !metadata.is_file())
    {
        // A device or a pipe can't be replaced by a renamed file. Opening a pipe waits for its reader.
        let open = move || File::options().write(true).open(path);
        return copy(download, open, write_error).await;
    }
    let (partial, file) = Partial::create(&path).map_err(write_error)?;
    let open = move || Ok(file);
    let summary = copy(download, open, write_error).await?;
    partial
        .rename(&path, existing.map(|file| file.permissions()))
        .map_err(write_error)?;
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

impl Partial {
    /// Creates the temporary file for `path`. Only its owner can read it.
    fn create(path: &Path) -> io::Result<(Self, File)> {
        let mut partial = path.as_os_str().to_owned();
        partial.push(format!(".{}.partial", std::process::id()));
        let partial = Self(PathBuf::from(partial));
        // A killed process with the same id, as in a container, may have left one.
        let file = files::create(&partial.0)?;
        Ok((partial, file))
    }

    /// Renames the file to `path`, with the `permissions` of the file that it replaces. Syncs the
    /// directory.
    fn rename(self, path: &Path, permissions: Option<Permissions>) -> io::Result<()> {
        if let Some(permissions) = permissions {
            fs::set_permissions(&self.0, permissions)?;
        }
        fs::rename(&self.0, path)?;
        let directory = match path.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        File::open(directory)?.sync_all()
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Something to write a backup to.
trait Output: Write + Send {
    /// Writes everything to its place.
    fn finish(&mut self) -> io::Result<()>;
}

impl Output for File {
    fn finish(&mut self) -> io::Result<()> {
        match self.metadata()?.is_file() {
            true => self.sync_all(),
            false => Ok(()),
        }
    }
}

impl Output for io::Stdout {
    fn finish(&mut self) -> io::Result<()> {
        self.flush()
    }
}

/// Verifies the download while it writes it. Both run on another thread, because a write may block,
/// on a pipe indefinitely, and a signal must still end the command.
async fn copy<W: Output>(
    download: Download,
    open: impl FnOnce() -> io::Result<W> + Send + 'static,
    write_error: impl Fn(io::Error) -> DownloadError,
) -> Result<Summary, DownloadError> {
    let url = download.url.clone();
    let (sender, parts) = BodyReader::channel();
    let progress = Arc::new(ReadProgress::default());
    let reading = Arc::clone(&progress);
    let copied = spawn_blocking(move || {
        let mut tee = Tee {
            source: parts,
            out: open()?,
            failed: None,
        };
        let verified = read(&mut tee, &RecordBatch::digest, &reading);
        match tee.failed {
            Some(error) => Err(error),
            None => tee.out.finish().map(|()| verified),
        }
    });
    let bar = Bar::new(0, Instant::now());
    let passed_on = download.pass_on(sender, |_part| {
        bar.set(progress.rows(), progress.bytes());
        Ok::<_, RemoteError>(())
    });
    passed_on.await?;
    let copied = copied
        .await
        .unwrap_or_else(|failed| match failed.try_into_panic() {
            Ok(panic) => resume_unwind(panic),
            Err(cancelled) => Err(io::Error::other(cancelled)),
        });
    let verified = copied.map_err(write_error)?;
    verified.map_err(|error| DownloadError::Invalid { url, error })
}

/// Writes what it reads.
struct Tee<R, W> {
    source: R,
    out: W,
    /// Why a write failed.
    failed: Option<io::Error>,
}

impl<R: Read, W: Write> Read for Tee<R, W> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.source.read(buffer)?;
        let part = buffer.get(..read).unwrap_or_default();
        match self.out.write_all(part) {
            Ok(()) => Ok(read),
            Err(error) => {
                self.failed = Some(error);
                Err(io::ErrorKind::Other.into())
            }
        }
    }
}

/// Opens a file to read, or standard input for `-`. Returns it and its size, or 0 if the size is
/// unknown.
pub(super) fn open(path: &Path) -> Result<(Box<dyn Read + Unpin + Send>, u64), BackupError> {
    if path == Path::new("-") {
        return Ok((Box::new(io::stdin()), 0));
    }
    let file = File::open(path).map_err(BackupError::Open)?;
    let bytes_total = file.metadata().map_or(0, |metadata| metadata.len());
    Ok((Box::new(BufReader::new(file)), bytes_total))
}

/// Reads and checks the backup at `path`, or on standard input for `-`.
///
/// # Errors
/// The backup cannot be read, is incomplete or damaged.
pub fn verify(path: &Path) -> Result<Summary, BackupError> {
    let (source, bytes_total) = open(path)?;
    let progress = ReadProgress::default();
    let bar = Bar::new(bytes_total, Instant::now());
    thread::scope(|scope| {
        let reader = scope.spawn(|| read(source, &RecordBatch::digest, &progress));
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
