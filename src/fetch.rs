//! `gradestore backup` and `gradestore verify`: backups from outside a node.

use std::fs::{self, File};
use std::io::{self, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::backup::{BackupError, Progress, Summary, read, rfc3339};
use crate::config::BackupArgs;
use crate::progress::Bar;

/// How long the node may be silent.
const SILENCE_MAX: Duration = Duration::from_secs(30);
/// Parts of an answer between the network and the verifier.
const PARTS_MAX: usize = 16;
/// Of an error answer no more than this is shown.
const SHOWN_CHARS_MAX: usize = 500;

/// Why a backup was not fetched.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The node can't be asked or broke off.
    #[error("{url}: {error}; nothing was kept")]
    Http {
        /// What was asked.
        url: String,
        /// What went wrong.
        error: String,
    },
    /// The node said no.
    #[error("{url} answered {status}: {body}")]
    Refused {
        /// What was asked.
        url: String,
        /// The status.
        status: u16,
        /// The answer.
        body: String,
    },
    /// What came is no whole backup.
    #[error("the backup from {url} is no good: {error}; nothing was kept")]
    Bad {
        /// What was asked.
        url: String,
        /// What is wrong with it.
        error: BackupError,
    },
    /// It can't be kept.
    #[error("cannot write {path}: {error}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
}

/// Fetches a backup, verifies it on the way and keeps it under the name wanted once it is whole.
///
/// # Errors
/// See [`FetchError`]; whatever stood under that name before is untouched then. Standard output has
/// got what came.
pub async fn backup(args: &BackupArgs, password: &str) -> Result<Summary, FetchError> {
    let url = format!("{}/backup", args.from);
    let path = args.output.as_path();
    let write_error = |error| FetchError::Write {
        path: path.to_owned(),
        error,
    };
    let response = ask(&url, &args.username, password).await?;
    if path == Path::new("-") {
        return copy(response, &url, &mut io::stdout(), write_error).await;
    }
    let directory = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let mut partial = path.as_os_str().to_owned();
    partial.push(format!(".{}.partial", std::process::id()));
    let partial = PathBuf::from(partial);
    let kept = async {
        let mut file = File::create(&partial).map_err(write_error)?;
        let summary = copy(response, &url, &mut file, write_error).await?;
        file.sync_all().map_err(write_error)?;
        fs::rename(&partial, path).map_err(write_error)?;
        let synced = File::open(directory).and_then(|directory| directory.sync_all());
        synced.map_err(write_error)?;
        Ok(summary)
    };
    let kept = kept.await;
    if kept.is_err() {
        let _ = fs::remove_file(&partial);
    }
    kept
}

async fn ask(url: &str, username: &str, password: &str) -> Result<reqwest::Response, FetchError> {
    let failed = |error: reqwest::Error| FetchError::Http {
        url: url.to_owned(),
        error: cause(&error),
    };
    let client = reqwest::Client::builder()
        .connect_timeout(SILENCE_MAX)
        .read_timeout(SILENCE_MAX);
    let client = client.build().map_err(failed)?;
    let request = client.get(url).basic_auth(username, Some(password));
    let response = request.send().await.map_err(failed)?;
    let status = response.status();
    if status.as_u16() != 200 {
        let body = response.text().await.unwrap_or_default();
        return Err(FetchError::Refused {
            url: url.to_owned(),
            status: status.as_u16(),
            body: body.chars().take(SHOWN_CHARS_MAX).collect(),
        });
    }
    Ok(response)
}

async fn copy(
    mut response: reqwest::Response,
    url: &str,
    out: &mut impl Write,
    write_error: impl Fn(io::Error) -> FetchError,
) -> Result<Summary, FetchError> {
    let (parts, received) = sync_channel::<Bytes>(PARTS_MAX);
    let progress = Arc::new(Progress::default());
    let verifier = {
        let progress = Arc::clone(&progress);
        thread::spawn(move || read(Parts::new(received), &|_| {}, &progress))
    };
    let bar = Bar::new(0, Instant::now());
    loop {
        let part = response.chunk().await.map_err(|error| FetchError::Http {
            url: url.to_owned(),
            error: cause(&error),
        })?;
        let Some(part) = part else {
            break;
        };
        out.write_all(&part).map_err(&write_error)?;
        if parts.send(part).is_err() {
            // The verifier has seen enough, and says what.
            break;
        }
        bar.set(progress.rows(), progress.bytes());
    }
    out.flush().map_err(&write_error)?;
    drop(parts);
    let verified = verifier.join().unwrap_or(Err(BackupError::Damaged {
        at: 0,
        what: "the thread that reads it has ended",
    }));
    verified.map_err(|error| FetchError::Bad {
        url: url.to_owned(),
        error,
    })
}

/// An error with what caused it: the outermost says only that something failed.
fn cause(error: &reqwest::Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

/// Parts that come from another thread, as a reader.
struct Parts {
    received: Receiver<Bytes>,
    current: Bytes,
}

impl Parts {
    fn new(received: Receiver<Bytes>) -> Self {
        Self {
            received,
            current: Bytes::new(),
        }
    }
}

impl Read for Parts {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            match self.received.recv() {
                Ok(part) => self.current = part,
                Err(_ended) => return Ok(0),
            }
        }
        let length = room.len().min(self.current.len());
        let (from, to) = (self.current.split_to(length), room.get_mut(..length));
        to.unwrap_or_default().copy_from_slice(&from);
        Ok(length)
    }
}

/// Reads the backup at `path` to its end.
///
/// # Errors
/// It is not whole or has changed; the error says where.
pub fn verify(path: &Path) -> Result<Summary, BackupError> {
    let file = File::open(path).map_err(|error| BackupError::Io { at: 0, error })?;
    let bytes_total = file.metadata().map_or(0, |metadata| metadata.len());
    let progress = Progress::default();
    let bar = Bar::new(bytes_total, Instant::now());
    thread::scope(|scope| {
        let reader = scope.spawn(|| read(BufReader::new(file), &|_| {}, &progress));
        while !reader.is_finished() {
            bar.set(progress.rows(), progress.bytes());
            thread::sleep(Duration::from_millis(50));
        }
        reader.join().unwrap_or(Err(BackupError::Damaged {
            at: 0,
            what: "the thread that reads it has ended",
        }))
    })
}

/// What a summary says, a line each, for people.
#[must_use]
pub fn describe(summary: &Summary) -> String {
    let mut lines = format!("rows      {}\nbytes     {}\n", summary.rows, summary.bytes);
    match &summary.records {
        Some((head, end)) => {
            lines += &format!("time      {}\n", rfc3339(head.time_ns));
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
