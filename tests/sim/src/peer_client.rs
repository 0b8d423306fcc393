//! Requests between nodes: the real routes, over a connection that may break.

use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use bytes::{Bytes, BytesMut};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use gradestore::log::AskNode;
use gradestore::replication::peer_client::{
    BackupHeaders, BackupStream, GRADE_COMPRESSION, IF_SLOW, PeerClient, RemoteError,
};
use http::header::AUTHORIZATION;
use http::{Method, Request, StatusCode};
use http_body_util::BodyExt;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

use crate::client::AUTHORIZED;
use crate::coroutine::{PipeSender, pipe};
use crate::world::World;

/// The read timeout of a request.
const SILENCE_MAX: Duration = Duration::from_secs(5);

/// The URL of `node`.
pub fn url(node: usize) -> String {
    format!("http://node-{node}")
}

/// The client that one node uses for the others.
pub struct SimPeerClient {
    world: World,
    from: usize,
}

impl SimPeerClient {
    pub fn new(world: World, from: usize) -> Self {
        Self { world, from }
    }

    async fn request(
        &self,
        method: Method,
        node_url: &str,
    ) -> Result<(PeerConnection, Response), RemoteError> {
        let broken = |error: &str| RemoteError::Http {
            url: node_url.to_owned(),
            error: error.to_owned(),
        };
        let to = node_url
            .rsplit('-')
            .next()
            .and_then(|node| node.parse().ok());
        let to = to.ok_or_else(|| broken("no such node"))?;
        sleep(self.world.latency(to)).await;
        let process = self.world.slot(to).process.clone();
        let process = process.ok_or_else(|| broken("connection refused"))?;
        let connection = PeerConnection {
            world: self.world.clone(),
            url: node_url.to_owned(),
            ends: [self.from, to],
            gone: process.gone.clone(),
        };
        connection.wait(Duration::ZERO).await?;
        let request = Request::builder()
            .method(method)
            .uri("/backup")
            .header(AUTHORIZATION, AUTHORIZED)
            .header(GRADE_COMPRESSION, IF_SLOW)
            .body(Body::empty())
            .expect("a request");
        let response = tokio::select! {
            biased;
            () = connection.gone.cancelled() => return Err(broken("connection reset")),
            response = process.write.oneshot(request) => response.expect("an answer"),
        };
        match response.status() {
            StatusCode::OK => Ok((connection, response)),
            status => {
                let body = response.into_body().collect().await.expect("a body");
                Err(RemoteError::ErrorStatus {
                    url: node_url.to_owned(),
                    status: status.as_u16(),
                    body: String::from_utf8_lossy(&body.to_bytes()).into_owned(),
                })
            }
        }
    }
}

impl PeerClient for SimPeerClient {
    fn backup_headers<'a>(
        &'a self,
        node_url: &'a str,
    ) -> BoxFuture<'a, Result<BackupHeaders, RemoteError>> {
        async move {
            let (_, response) = self.request(Method::HEAD, node_url).await?;
            Ok(BackupHeaders::read(response.headers()))
        }
        .boxed()
    }

    fn backup<'a>(&'a self, node_url: &'a str) -> BoxFuture<'a, Result<BackupStream, RemoteError>> {
        async move {
            let (connection, response) = self.request(Method::GET, node_url).await?;
            let headers = BackupHeaders::read(response.headers());
            let (sender, source) = pipe();
            let mut slot = self.world.slot(connection.ends[1]);
            let fault = TransferFault {
                truncate_at: slot.truncate_next_backup_at.take(),
                corrupt_at: slot.corrupt_next_backup_at.take(),
            };
            drop(slot);
            Ok(BackupStream {
                headers,
                source: Box::new(source),
                pump: connection.pump(response.into_body(), sender, fault).boxed(),
            })
        }
        .boxed()
    }
}

impl AskNode for SimPeerClient {
    /// A node that is starting has no routes here and does not answer. That has no effect, because
    /// all nodes announce the URLs that the others use.
    fn node<'a>(&'a self, node_url: &'a str) -> BoxFuture<'a, Result<Option<Box<str>>, Box<str>>> {
        async move {
            let headers = self.backup_headers(node_url).await;
            Ok(headers.map_err(|error| error.to_string())?.node)
        }
        .boxed()
    }
}

/// The faults of one transfer.
struct TransferFault {
    truncate_at: Option<usize>,
    corrupt_at: Option<usize>,
}

/// A connection between two nodes.
struct PeerConnection {
    world: World,
    url: String,
    ends: [usize; 2],
    gone: CancellationToken,
}

impl PeerConnection {
    fn broken(&self, error: &str) -> RemoteError {
        RemoteError::Http {
            url: self.url.clone(),
            error: error.to_owned(),
        }
    }

    /// Waits for the latency `time`; fails if the other end is not reachable.
    async fn wait(&self, time: Duration) -> Result<(), RemoteError> {
        sleep(time).await;
        for end in self.ends {
            self.world.wait_until_resumed(end).await;
        }
        let is_cut = self
            .ends
            .iter()
            .any(|end| self.world.slot(*end).cut_from_peers);
        if self.gone.is_cancelled() {
            return Err(self.broken("connection reset"));
        }
        if is_cut {
            sleep(SILENCE_MAX).await;
            return Err(self.broken("timed out"));
        }
        Ok(())
    }

    async fn pump(
        self,
        mut body: Body,
        sender: PipeSender,
        mut fault: TransferFault,
    ) -> Result<(), RemoteError> {
        let mut sent = 0;
        loop {
            let frame = tokio::select! {
                biased;
                () = self.gone.cancelled() => return Err(self.broken("connection reset")),
                frame = body.frame() => frame,
            };
            let Some(frame) = frame else {
                return Ok(());
            };
            let frame = frame.map_err(|error| self.broken(&error.to_string()))?;
            let Ok(mut chunk) = frame.into_data() else {
                continue;
            };
            self.wait(self.world.latency(self.ends[1])).await?;
            let end = sent + chunk.len();
            if let Some(at) = fault.corrupt_at.filter(|at| (sent..end).contains(at)) {
                fault.corrupt_at = None;
                chunk = with_flipped_bit(&chunk, at - sent);
            }
            if fault.truncate_at.is_some_and(|at| at < end) {
                let rest = fault.truncate_at.unwrap_or_default() - sent;
                sender.send(chunk.slice(..rest)).await;
                return Err(self.broken("connection reset"));
            }
            sent = end;
            if !sender.send(chunk).await {
                return Ok(());
            }
        }
    }
}

fn with_flipped_bit(chunk: &Bytes, at: usize) -> Bytes {
    let mut changed = BytesMut::from(&chunk[..]);
    changed[at] ^= 0x10;
    changed.freeze()
}
