//! Another node, asked over HTTP: for its backup, which is read as it arrives, or to take lines.

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

use crate::log::Seq;

/// The header that says a position, in an answer to a write or with a backup, and in a read that
/// wants to see it.
pub const GRADE_POSITION: HeaderName = HeaderName::from_static("grade-position");
/// The header that says which process start a backup comes from.
pub const GRADE_NODE: HeaderName = HeaderName::from_static("grade-node");

/// The header by which a node asks for a backup that is compressed only where the way is slow, with
/// [`IF_SLOW`]: who reads it at once gains nothing by it, and it is most of the work of the node that
/// gives it (`load/README.md`).
pub const GRADE_COMPRESSION: HeaderName = HeaderName::from_static("grade-compression");
/// What that header says.
pub const IF_SLOW: &str = "if-slow";

/// Parts of an answer between the network and who reads it.
const PARTS_MAX: usize = 16;
/// Of an error answer no more than this is shown.
const SHOWN_CHARS_MAX: usize = 500;
/// Nor more than this read, nor for longer.
const ERROR_BYTES_MAX: usize = 64 * 1024;
const ERROR_WAIT_MAX: Duration = Duration::from_secs(5);

/// Why a node did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    /// Nobody listens there.
    #[error("{url}: {error}")]
    Unreachable {
        /// What was asked.
        url: String,
        /// What went wrong.
        error: String,
    },
    /// The node can't be asked or broke off.
    #[error("{url}: {error}")]
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
}

/// A name and a password to ask with. Never printed.
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

/// When a backup is to be compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// It will be kept.
    Always,
    /// It is read at once.
    IfSlow,
}

/// Other nodes, as this one reaches them.
pub trait Reach: Send + Sync + 'static {
    /// What backup the node whose write port is at `node_url` would give.
    ///
    /// # Errors
    /// It does not answer, or would give none.
    fn offer<'a>(&'a self, node_url: &'a str) -> BoxFuture<'a, Result<Offer, RemoteError>>;

    /// Which process listens at `node_url`, if it says so; a node that is starting does. The request
    /// carries no password.
    ///
    /// # Errors
    /// It does not answer.
    fn node<'a>(
        &'a self,
        node_url: &'a str,
    ) -> BoxFuture<'a, Result<Option<Box<str>>, RemoteError>>;

    /// Begins to fetch that backup.
    ///
    /// # Errors
    /// It does not answer, or not with a backup.
    fn backup<'a>(&'a self, node_url: &'a str) -> BoxFuture<'a, Result<Incoming, RemoteError>>;
}

/// A backup on its way to who reads it.
pub struct Incoming {
    /// What the node said of it.
    pub offer: Offer,
    /// What arrives, for a thread that may block.
    pub source: Box<dyn Read + Unpin + Send>,
    /// Keeps it arriving, to the end; an error if that was not the backup's.
    pub feed: BoxFuture<'static, Result<(), RemoteError>>,
}

impl Reach for Client {
    fn offer<'a>(&'a self, node_url: &'a str) -> BoxFuture<'a, Result<Offer, RemoteError>> {
        self.offer(node_url).boxed()
    }

    fn node<'a>(
        &'a self,
        node_url: &'a str,
    ) -> BoxFuture<'a, Result<Option<Box<str>>, RemoteError>> {
        async move {
            let url = format!("{node_url}/backup");
            let response = self.http.head(&url).send().await;
            let response = response.map_err(|error| failed(&url, &error))?;
            Ok(Offer::of(response.headers()).node)
        }
        .boxed()
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

/// Asks nodes.
#[derive(Clone)]
pub struct Client {
    http: reqwest::Client,
    account: Account,
    /// How backups are asked for.
    compression: Compression,
}

/// What a node says of a backup before the first row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    /// Its position; `None` where the answer does not say, as a foreign server's would not.
    pub position: Option<Seq>,
    /// The process start that it comes from.
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
    /// One that takes a node for away after `silence_max` without a byte from it, and wants backups
    /// compressed as `compression` says.
    ///
    /// # Errors
    /// The system refused.
    pub fn new(
        account: Account,
        silence_max: Duration,
        compression: Compression,
    ) -> Result<Self, reqwest::Error> {
        let http = reqwest::Client::builder()
            .connect_timeout(silence_max)
            .read_timeout(silence_max)
            // The password is for the node that was named, by hand or by itself.
            .redirect(reqwest::redirect::Policy::none())
            .build()?;
        Ok(Self {
            http,
            account,
            compression,
        })
    }

    /// Asks for the backup of the node whose write port is at `node_url`.
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

    /// Asks what backup that node would give.
    ///
    /// # Errors
    /// It does not answer, or would give none.
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

    /// Has the node whose write port is at `node_url` take `lines`, a patch each; the position of the
    /// last one, or what was refused.
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

/// The media type of patches, a line each.
const NDJSON: &str = "application/x-ndjson";

/// An answer that says no.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The status.
    pub status: u16,
    /// Why, for people.
    pub detail: String,
    /// Lines that were accepted before.
    pub accepted: u64,
    /// The line that was refused, if one was.
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
        // Of a problem the detail is for people.
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

/// A backup on its way.
pub struct Download {
    /// What the node said of it.
    pub offer: Offer,
    /// Where it comes from.
    pub url: String,
    response: reqwest::Response,
}

impl Download {
    /// Passes on what arrives, to the end: first to `also`, then to who reads. Ends early where
    /// nobody reads any more.
    ///
    /// # Errors
    /// The node broke off or fell silent, or what `also` says.
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
                // The reader has seen enough, and says what.
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

/// Where parts of an answer are handed in. Dropping it ends the [`Parts`].
pub struct PartSender(mpsc::Sender<Bytes>);

/// Parts of an answer, as a reader for a thread that may block.
pub struct Parts {
    received: mpsc::Receiver<Bytes>,
    current: Bytes,
}

impl Parts {
    /// A reader of what is handed in; a few parts wait between the two.
    #[must_use]
    pub fn channel() -> (PartSender, Self) {
        let (sender, received) = mpsc::channel(PARTS_MAX);
        let current = Bytes::new();
        (PartSender(sender), Self { received, current })
    }
}

impl Read for Parts {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            match self.received.blocking_recv() {
                Some(part) => self.current = part,
                None => return Ok(0),
            }
        }
        let length = room.len().min(self.current.len());
        let (from, to) = (self.current.split_to(length), room.get_mut(..length));
        to.unwrap_or_default().copy_from_slice(&from);
        Ok(length)
    }
}
