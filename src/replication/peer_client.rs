//! The HTTP client for other nodes: fetches their backups and sends them writes.

use std::fmt;
use std::io::{self, Read};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use http::header::{CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderMap, HeaderName, StatusCode};
use parking_lot::RwLock;
use reqwest::RequestBuilder;
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::log::{AskNode, Seq};

/// A position: of a write or a backup in its answer, or in a read that must see that position.
pub const GRADE_POSITION: HeaderName = HeaderName::from_static("grade-position");
/// The id of the node that sends a backup.
pub const GRADE_NODE: HeaderName = HeaderName::from_static("grade-node");

/// With [`IF_SLOW`], requests a backup that is compressed only if the connection is slow.
/// Compression is most of the sender's work (ADR 0006), and a node that restores the backup
/// at once gains nothing from it.
pub const GRADE_COMPRESSION: HeaderName = HeaderName::from_static("grade-compression");
/// The value of that header.
pub const IF_SLOW: &str = "if-slow";

/// Chunks of a response that are buffered between the network and its reader.
const CHUNKS_MAX: usize = 16;
/// The most characters of an error response that an error message contains.
const DETAIL_CHARS_MAX: usize = 500;
/// The most bytes of an error response that are read, and the timeout.
const ERROR_BYTES_MAX: usize = 64 * 1024;
const ERROR_WAIT_MAX: Duration = Duration::from_secs(5);
/// The least pace of a peer's backup, 10 KB/s: a tenth of a slow but usable link.
const WINDOW: Duration = Duration::from_secs(20);
const WINDOW_BYTES_MIN: u64 = 200_000;

/// Why a request to a node failed.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    /// The connection could not be made.
    #[error("{url}: {error}")]
    Unreachable {
        /// The URL of the request.
        url: String,
        /// What went wrong.
        error: String,
    },
    /// The request failed, or the response was interrupted.
    #[error("{url}: {error}")]
    Http {
        /// The URL of the request.
        url: String,
        /// What went wrong.
        error: String,
    },
    /// The node answered with an error.
    #[error("{url} answered {status}: {body}")]
    ErrorStatus {
        /// The URL of the request.
        url: String,
        /// The status.
        status: u16,
        /// The response's text.
        body: String,
    },
}

/// The user name and the password for requests. Clones share the password, which may be replaced.
/// Never printed.
#[derive(Clone)]
pub struct ClientCredentials {
    username: Arc<str>,
    password: Arc<RwLock<Arc<str>>>,
}

impl ClientCredentials {
    /// Credentials of this name and password.
    #[must_use]
    pub fn new(username: &str, password: &str) -> Self {
        Self {
            username: username.into(),
            password: Arc::new(RwLock::new(password.into())),
        }
    }

    /// The name.
    #[must_use]
    pub fn username(&self) -> &str {
        &self.username
    }

    /// The current password.
    #[must_use]
    pub fn password(&self) -> Arc<str> {
        Arc::clone(&self.password.read())
    }

    /// Replaces the password, for the requests that follow.
    pub fn replace_password(&self, password: &str) {
        *self.password.write() = password.into();
    }

    fn add_to(&self, request: RequestBuilder) -> RequestBuilder {
        request.basic_auth(&self.username, Some(self.password()))
    }
}

impl fmt::Debug for ClientCredentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClientCredentials(..)")
    }
}

/// When a backup is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Always, for a backup that is kept.
    Always,
    /// Only if the connection is slow, for a backup that is restored at once.
    IfSlow,
}

/// Requests to other nodes.
pub trait PeerClient: Send + Sync + 'static {
    /// Requests the headers of the backup that the node at `node_url`, its write port, would send.
    ///
    /// # Errors
    /// The node does not answer, or answers with an error.
    fn backup_headers<'a>(
        &'a self,
        node_url: &'a str,
    ) -> BoxFuture<'a, Result<BackupHeaders, RemoteError>>;

    /// Starts the download of that backup.
    ///
    /// # Errors
    /// The node does not answer, or answers with an error.
    fn backup<'a>(&'a self, node_url: &'a str) -> BoxFuture<'a, Result<BackupStream, RemoteError>>;
}

/// A backup that is being downloaded.
pub struct BackupStream {
    /// Its headers.
    pub headers: BackupHeaders,
    /// Its bytes, for a thread that may block.
    pub source: Box<dyn Read + Unpin + Send>,
    /// Copies the response to `source`; must be polled to completion. Fails if the transfer is
    /// interrupted.
    pub pump: BoxFuture<'static, Result<(), RemoteError>>,
}

impl PeerClient for Client {
    fn backup_headers<'a>(
        &'a self,
        node_url: &'a str,
    ) -> BoxFuture<'a, Result<BackupHeaders, RemoteError>> {
        self.backup_headers(node_url).boxed()
    }

    fn backup<'a>(&'a self, node_url: &'a str) -> BoxFuture<'a, Result<BackupStream, RemoteError>> {
        async move {
            let mut download = self.backup(node_url).await?;
            download.pace = Some(Pace::default());
            let (sender, source) = BodyReader::channel();
            Ok(BackupStream {
                headers: download.headers.clone(),
                source: Box::new(source),
                pump: download.pass_on(sender, |_| Ok(())).boxed(),
            })
        }
        .boxed()
    }
}

impl AskNode for Client {
    fn node<'a>(&'a self, node_url: &'a str) -> BoxFuture<'a, Result<Option<Box<str>>, Box<str>>> {
        async move {
            let url = format!("{node_url}/backup");
            let response = self.http.head(&url).send().await;
            let response = response.map_err(|error| failed(&url, &error).to_string())?;
            Ok(BackupHeaders::read(response.headers()).node)
        }
        .boxed()
    }
}

/// The HTTP client.
#[derive(Clone)]
pub struct Client {
    http: reqwest::Client,
    credentials: ClientCredentials,
    /// The compression of requested backups.
    compression: Compression,
}

/// The headers of a backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupHeaders {
    /// Its position; `None` if the response has none, as from another kind of server.
    pub position: Option<Seq>,
    /// The id of the node that sends it.
    pub node: Option<Box<str>>,
}

impl BackupHeaders {
    /// Reads them from a response.
    #[must_use]
    pub fn read(headers: &HeaderMap) -> Self {
        let text = |name| headers.get(name)?.to_str().ok();
        Self {
            position: text(GRADE_POSITION).and_then(|position| position.parse().ok()),
            node: text(GRADE_NODE).map(Into::into),
        }
    }
}

impl Client {
    /// A client whose requests fail after `silence_max` without a byte from the node, and which
    /// requests backups with this `compression`.
    ///
    /// # Errors
    /// The client can't be set up.
    pub fn new(
        credentials: ClientCredentials,
        silence_max: Duration,
        compression: Compression,
    ) -> Result<Self, reqwest::Error> {
        let http = reqwest::Client::builder()
            .connect_timeout(silence_max)
            .read_timeout(silence_max)
            // The password is for the node at this URL only, not for another one or a proxy of
            // the environment.
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .build()?;
        Ok(Self {
            http,
            credentials,
            compression,
        })
    }

    /// Requests the backup of the node whose write port is at `node_url`.
    ///
    /// # Errors
    /// The node does not answer, or answers with an error.
    pub async fn backup(&self, node_url: &str) -> Result<Download, RemoteError> {
        let url = format!("{node_url}/backup");
        let response = self.ask(reqwest::Method::GET, &url).await?;
        Ok(Download {
            headers: BackupHeaders::read(response.headers()),
            url,
            response,
            pace: None,
        })
    }

    /// Requests only the headers of that backup.
    ///
    /// # Errors
    /// The node does not answer, or answers with an error.
    pub async fn backup_headers(&self, node_url: &str) -> Result<BackupHeaders, RemoteError> {
        let url = format!("{node_url}/backup");
        let response = self.ask(reqwest::Method::HEAD, &url).await?;
        Ok(BackupHeaders::read(response.headers()))
    }

    async fn ask(
        &self,
        method: reqwest::Method,
        url: &str,
    ) -> Result<reqwest::Response, RemoteError> {
        let mut request = self.credentials.add_to(self.http.request(method, url));
        if self.compression == Compression::IfSlow {
            request = request.header(GRADE_COMPRESSION, IF_SLOW);
        }
        let response = request.send().await.map_err(|error| failed(url, &error))?;
        if response.status() == StatusCode::OK {
            return Ok(response);
        }
        let ErrorResponse { status, detail, .. } = ErrorResponse::read(response).await;
        Err(RemoteError::ErrorStatus {
            url: url.to_owned(),
            status,
            body: detail,
        })
    }

    /// Sends `lines`, one patch each, to the node whose write port is at `node_url`. Returns the
    /// position of the last one, or the node's error response.
    ///
    /// # Errors
    /// The node does not answer.
    pub async fn set_lines(
        &self,
        node_url: &str,
        lines: Bytes,
    ) -> Result<Result<Seq, ErrorResponse>, RemoteError> {
        let url = format!("{node_url}/set");
        let request = self.credentials.add_to(self.http.post(&url));
        let request = request.header(CONTENT_TYPE, NDJSON).body(lines);
        let response = request.send().await;
        let response = response.map_err(|error| failed(&url, &error))?;
        let position = BackupHeaders::read(response.headers()).position;
        match position.filter(|_| response.status() == StatusCode::OK) {
            Some(position) => Ok(Ok(position)),
            None => Ok(Err(ErrorResponse::read(response).await)),
        }
    }
}

/// The media type of patches, one per line.
const NDJSON: &str = "application/x-ndjson";

/// An error response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ErrorResponse {
    /// The status.
    pub status: u16,
    /// The reason, as text.
    pub detail: String,
    /// The number of lines that were accepted before the error.
    pub accepted: u64,
    /// The line that was rejected, if one was.
    pub line: Option<u64>,
    /// When to try again.
    pub retry_after: Option<Duration>,
}

impl ErrorResponse {
    async fn read(mut response: reqwest::Response) -> Self {
        let retry_after = response.headers().get(RETRY_AFTER);
        let retry_after = retry_after.and_then(|after| after.to_str().ok()?.parse().ok());
        let mut body = Vec::new();
        let reading = async {
            while let Ok(Some(part)) = response.chunk().await
                && body.len() < ERROR_BYTES_MAX
            {
                body.extend_from_slice(&part);
            }
        };
        let _ = tokio::time::timeout(ERROR_WAIT_MAX, reading).await;
        // In a problem document (RFC 9457), `detail` is the readable text.
        let problem = serde_json::from_slice::<serde_json::Value>(&body).unwrap_or_default();
        let number = |name: &str| problem.get(name)?.as_u64();
        let detail = problem.get("detail").and_then(|detail| detail.as_str());
        let detail = match detail {
            Some(detail) => detail.into(),
            None => String::from_utf8_lossy(&body),
        };
        Self {
            status: response.status().as_u16(),
            detail: detail.chars().take(DETAIL_CHARS_MAX).collect(),
            accepted: number("accepted").unwrap_or(0),
            line: number("line"),
            retry_after: retry_after.map(Duration::from_secs),
        }
    }
}

/// The response with a backup.
pub struct Download {
    /// Its headers.
    pub headers: BackupHeaders,
    /// Its URL.
    pub url: String,
    response: reqwest::Response,
    /// Present if a slow download fails.
    pace: Option<Pace>,
}

impl Download {
    /// Passes each chunk of the response to `inspect`, and then to the reader of `chunks`. Ends
    /// early if the reader was dropped.
    ///
    /// # Errors
    /// The response is interrupted, stalls or is too slow, or `inspect` fails.
    pub async fn pass_on<E: From<RemoteError>>(
        mut self,
        chunks: BodySender,
        mut inspect: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        loop {
            let waiting_since = Instant::now();
            let chunk = self.response.chunk().await;
            let chunk = chunk.map_err(|error| failed(&self.url, &error))?;
            let Some(chunk) = chunk else {
                return Ok(());
            };
            if let Some(pace) = &mut self.pace {
                let in_time = pace.add(waiting_since.elapsed(), chunk.len());
                in_time.map_err(|error| RemoteError::Http {
                    url: self.url.clone(),
                    error,
                })?;
            }
            inspect(&chunk)?;
            if chunks.0.send(chunk).await.is_err() {
                // The reader has ended, and reports the reason.
                return Ok(());
            }
        }
    }
}

/// The pace of a download. A peer that sends a few bytes now and then would otherwise hold a
/// starting replica forever, because each of them resets the timeout of a read.
#[derive(Default)]
struct Pace {
    /// How long this window's chunks were waited for. The time for restoring them does not count.
    waited: Duration,
    bytes: u64,
}

impl Pace {
    /// Counts a chunk. The error is that its window had less than [`WINDOW_BYTES_MIN`].
    fn add(&mut self, waited: Duration, bytes: usize) -> Result<(), String> {
        self.waited += waited;
        self.bytes += bytes as u64;
        if self.waited < WINDOW {
            return Ok(());
        }
        let Self { waited, bytes } = std::mem::take(self);
        match bytes >= WINDOW_BYTES_MIN {
            true => Ok(()),
            false => Err(format!(
                "it is too slow: {bytes} bytes in {} s, and at least {WINDOW_BYTES_MIN} are expected \
                 in {} s",
                waited.as_secs(),
                WINDOW.as_secs()
            )),
        }
    }
}

fn failed(url: &str, error: &reqwest::Error) -> RemoteError {
    let (url, text) = (url.to_owned(), cause(error));
    match error.is_connect() {
        true => RemoteError::Unreachable { url, error: text },
        false => RemoteError::Http { url, error: text },
    }
}

/// The text of an error and its sources. The outermost one says only that something failed.
fn cause(error: &reqwest::Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

/// Sends chunks of a response to a [`BodyReader`], which ends when this is dropped.
pub struct BodySender(mpsc::Sender<Bytes>);

/// Reads chunks of a response, on a thread that may block.
pub struct BodyReader {
    received: mpsc::Receiver<Bytes>,
    current: Bytes,
}

impl BodyReader {
    /// A sender and its reader, with a buffer of a few chunks between them.
    #[must_use]
    pub fn channel() -> (BodySender, Self) {
        let (sender, received) = mpsc::channel(CHUNKS_MAX);
        let current = Bytes::new();
        (BodySender(sender), Self { received, current })
    }
}

impl Read for BodyReader {
    #[expect(clippy::indexing_slicing, reason = "`length` is at most both lengths")]
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            match self.received.blocking_recv() {
                Some(chunk) => self.current = chunk,
                None => return Ok(0),
            }
        }
        let length = buffer.len().min(self.current.len());
        buffer[..length].copy_from_slice(&self.current.split_to(length));
        Ok(length)
    }
}
