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
use tokio::sync::mpsc;

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

/// Parts of a response that are buffered between the network and its reader.
const PARTS_MAX: usize = 16;
/// Characters of an error response that are shown.
const SHOWN_CHARS_MAX: usize = 500;
/// Bytes of an error response that are read, and for how long.
const ERROR_BYTES_MAX: usize = 64 * 1024;
const ERROR_WAIT_MAX: Duration = Duration::from_secs(5);

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
    /// The request failed, or the response broke off.
    #[error("{url}: {error}")]
    Http {
        /// The URL of the request.
        url: String,
        /// What went wrong.
        error: String,
    },
    /// The node answered with an error.
    #[error("{url} answered {status}: {body}")]
    Refused {
        /// The URL of the request.
        url: String,
        /// The status.
        status: u16,
        /// The response's text.
        body: String,
    },
}

/// The user name and the password for requests. Never printed.
#[derive(Clone)]
pub struct Account {
    /// The name.
    pub username: Arc<str>,
    /// The password.
    pub password: Arc<str>,
}

impl fmt::Debug for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Account(..)")
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
    /// Asks the node whose write port is at `node_url` which backup it would send.
    ///
    /// # Errors
    /// It does not answer, or would send none.
    fn offer<'a>(&'a self, node_url: &'a str) -> BoxFuture<'a, Result<Offer, RemoteError>>;

    /// Starts to fetch that backup.
    ///
    /// # Errors
    /// It does not answer, or not with a backup.
    fn backup<'a>(&'a self, node_url: &'a str) -> BoxFuture<'a, Result<Incoming, RemoteError>>;
}

/// A backup that is being received.
pub struct Incoming {
    /// Its headers.
    pub offer: Offer,
    /// Its bytes, for a thread that may block.
    pub source: Box<dyn Read + Unpin + Send>,
    /// Passes the response on to `source`; must be polled to the end. Fails if the response breaks
    /// off.
    pub feed: BoxFuture<'static, Result<(), RemoteError>>,
}

impl PeerClient for Client {
    fn offer<'a>(&'a self, node_url: &'a str) -> BoxFuture<'a, Result<Offer, RemoteError>> {
        self.offer(node_url).boxed()
    }

    fn backup<'a>(&'a self, node_url: &'a str) -> BoxFuture<'a, Result<Incoming, RemoteError>> {
        async move {
            let download = self.backup(node_url).await?;
            let (sender, parts) = Parts::channel();
            Ok(Incoming {
                offer: download.offer.clone(),
                source: Box::new(parts),
                feed: download.pass_on(sender, |_| Ok(())).boxed(),
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
            Ok(Offer::of(response.headers()).node)
        }
        .boxed()
    }
}

/// The HTTP client.
#[derive(Clone)]
pub struct Client {
    http: reqwest::Client,
    account: Account,
    /// The compression of requested backups.
    compression: Compression,
}

/// The headers of a backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    /// Its position; `None` if the response has none, as from another kind of server.
    pub position: Option<Seq>,
    /// The id of the node that sends it.
    pub node: Option<Box<str>>,
}

impl Offer {
    fn of(headers: &HeaderMap) -> Self {
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
        account: Account,
        silence_max: Duration,
        compression: Compression,
    ) -> Result<Self, reqwest::Error> {
        let http = reqwest::Client::builder()
            .connect_timeout(silence_max)
            .read_timeout(silence_max)
            // The password is for the node at this URL only.
            .redirect(reqwest::redirect::Policy::none())
            .build()?;
        Ok(Self {
            http,
            account,
            compression,
        })
    }

    /// Requests the backup of the node whose write port is at `node_url`.
    ///
    /// # Errors
    /// It does not answer, or not with a backup.
    pub async fn backup(&self, node_url: &str) -> Result<Download, RemoteError> {
        let url = format!("{node_url}/backup");
        let response = self.ask(reqwest::Method::GET, &url).await?;
        Ok(Download {
            offer: Offer::of(response.headers()),
            url,
            response,
        })
    }

    /// Asks that node which backup it would send.
    ///
    /// # Errors
    /// It does not answer, or would send none.
    pub async fn offer(&self, node_url: &str) -> Result<Offer, RemoteError> {
        let url = format!("{node_url}/backup");
        let response = self.ask(reqwest::Method::HEAD, &url).await?;
        Ok(Offer::of(response.headers()))
    }

    async fn ask(
        &self,
        method: reqwest::Method,
        url: &str,
    ) -> Result<reqwest::Response, RemoteError> {
        let Account { username, password } = &self.account;
        let request = self.http.request(method, url);
        let mut request = request.basic_auth(username, Some(password));
        if self.compression == Compression::IfSlow {
            request = request.header(GRADE_COMPRESSION, IF_SLOW);
        }
        let response = request.send().await.map_err(|error| failed(url, &error))?;
        if response.status() == StatusCode::OK {
            return Ok(response);
        }
        let Refusal { status, detail, .. } = Refusal::read(response).await;
        Err(RemoteError::Refused {
            url: url.to_owned(),
            status,
            body: detail,
        })
    }

    /// Sends `lines`, one patch each, to the node whose write port is at `node_url`. Returns the
    /// position of the last one, or the node's refusal.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn set_lines(
        &self,
        node_url: &str,
        lines: Bytes,
    ) -> Result<Result<Seq, Refusal>, RemoteError> {
        let url = format!("{node_url}/set");
        let Account { username, password } = &self.account;
        let request = self.http.post(&url).basic_auth(username, Some(password));
        let request = request.header(CONTENT_TYPE, NDJSON).body(lines);
        let response = request.send().await;
        let response = response.map_err(|error| failed(&url, &error))?;
        let position = Offer::of(response.headers()).position;
        match position.filter(|_| response.status() == StatusCode::OK) {
            Some(position) => Ok(Ok(position)),
            None => Ok(Err(Refusal::read(response).await)),
        }
    }
}

/// The media type of patches, one per line.
const NDJSON: &str = "application/x-ndjson";

/// An error response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The status.
    pub status: u16,
    /// The reason, for people.
    pub detail: String,
    /// Lines that were accepted before.
    pub accepted: u64,
    /// The line that was rejected, if one was.
    pub line: Option<u64>,
    /// When to try again.
    pub retry_after: Option<Duration>,
}

impl Refusal {
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
        // In a problem document, `detail` is the text for people.
        let problem = serde_json::from_slice::<serde_json::Value>(&body).unwrap_or_default();
        let number = |name: &str| problem.get(name)?.as_u64();
        let detail = problem.get("detail").and_then(|detail| detail.as_str());
        let detail = match detail {
            Some(detail) => detail.into(),
            None => String::from_utf8_lossy(&body),
        };
        Self {
            status: response.status().as_u16(),
            detail: detail.chars().take(SHOWN_CHARS_MAX).collect(),
            accepted: number("accepted").unwrap_or(0),
            line: number("line"),
            retry_after: retry_after.map(Duration::from_secs),
        }
    }
}

/// The response with a backup.
pub struct Download {
    /// Its headers.
    pub offer: Offer,
    /// Its URL.
    pub url: String,
    response: reqwest::Response,
}

impl Download {
    /// Passes each part of the response to `also`, and then to the reader of `parts`. Ends early if
    /// the reader is gone.
    ///
    /// # Errors
    /// The response breaks off or stalls, or `also` fails.
    pub async fn pass_on<E: From<RemoteError>>(
        mut self,
        parts: PartSender,
        mut also: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        loop {
            let part = self.response.chunk().await;
            let part = part.map_err(|error| failed(&self.url, &error))?;
            let Some(part) = part else {
                return Ok(());
            };
            also(&part)?;
            if parts.0.send(part).await.is_err() {
                // The reader is gone, and reports the reason itself.
                return Ok(());
            }
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

/// The text of an error and of its sources: the outermost one says only that something failed.
fn cause(error: &reqwest::Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

/// Sends parts of a response to [`Parts`]. Dropping it ends the reader.
pub struct PartSender(mpsc::Sender<Bytes>);

/// Reads parts of a response, on a thread that may block.
pub struct Parts {
    received: mpsc::Receiver<Bytes>,
    current: Bytes,
}

impl Parts {
    /// A sender and its reader, with a buffer of a few parts between them.
    #[must_use]
    pub fn channel() -> (PartSender, Self) {
        let (sender, received) = mpsc::channel(PARTS_MAX);
        let current = Bytes::new();
        (PartSender(sender), Self { received, current })
    }
}

impl Read for Parts {
    #[expect(clippy::indexing_slicing, reason = "`length` is at most both lengths")]
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            match self.received.blocking_recv() {
                Some(part) => self.current = part,
                None => return Ok(0),
            }
        }
        let length = room.len().min(self.current.len());
        room[..length].copy_from_slice(&self.current.split_to(length));
        Ok(length)
    }
}
