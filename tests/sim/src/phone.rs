//! How one node reaches another: its real routes, over a way that may break.

use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use bytes::{Bytes, BytesMut};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use gradestore::log::AskNode;
use gradestore::replication::peer_client::{
    GRADE_COMPRESSION, GRADE_NODE, GRADE_POSITION, IF_SLOW, Incoming, Offer, PeerClient,
    RemoteError,
};
use http::header::AUTHORIZATION;
use http::{HeaderMap, Method, Request, StatusCode};
use http_body_util::BodyExt;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

use crate::client::AUTHORIZED;
use crate::coroutine::{PipeSender, pipe};
use crate::world::World;

/// After so much silence a node is taken for away.
const SILENCE_MAX: Duration = Duration::from_secs(5);

/// Where `node` is reached.
pub fn url(node: usize) -> String {
    format!("http://node-{node}")
}

/// The way from one node to the others.
pub struct Phone {
    world: World,
    from: usize,
}

impl Phone {
    pub fn new(world: World, from: usize) -> Self {
        Self { world, from }
    }

    async fn ask(&self, method: Method, node_url: &str) -> Result<(Call, Response), RemoteError> {
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
        let call = Call {
            world: self.world.clone(),
            url: node_url.to_owned(),
            ends: [self.from, to],
            gone: process.gone.clone(),
        };
        call.wait(Duration::ZERO).await?;
        let request = Request::builder()
            .method(method)
            .uri("/backup")
            .header(AUTHORIZATION, AUTHORIZED)
            .header(GRADE_COMPRESSION, IF_SLOW)
            .body(Body::empty())
            .expect("a request");
        let response = tokio::select! {
            biased;
            () = call.gone.cancelled() => return Err(broken("connection reset")),
            response = process.write.oneshot(request) => response.expect("an answer"),
        };
        match response.status() {
            StatusCode::OK => Ok((call, response)),
            status => {
                let body = response.into_body().collect().await.expect("a body");
                Err(RemoteError::Refused {
                    url: node_url.to_owned(),
                    status: status.as_u16(),
                    body: String::from_utf8_lossy(&body.to_bytes()).into_owned(),
                })
            }
        }
    }
}

fn offer_of(headers: &HeaderMap) -> Offer {
    let text = |name| headers.get(name)?.to_str().ok();
    Offer {
        position: text(GRADE_POSITION).and_then(|position| position.parse().ok()),
        node: text(GRADE_NODE).map(Into::into),
    }
}

impl PeerClient for Phone {
    fn offer<'a>(&'a self, node_url: &'a str) -> BoxFuture<'a, Result<Offer, RemoteError>> {
        async move {
            let (_, response) = self.ask(Method::HEAD, node_url).await?;
            Ok(offer_of(response.headers()))
        }
        .boxed()
    }

    fn backup<'a>(&'a self, node_url: &'a str) -> BoxFuture<'a, Result<Incoming, RemoteError>> {
        async move {
            let (call, response) = self.ask(Method::GET, node_url).await?;
            let offer = offer_of(response.headers());
            let (sender, source) = pipe();
            let mut slot = self.world.slot(call.ends[1]);
            let fault = Fault {
                break_after: slot.break_backup_after.take(),
                change_at: slot.change_backup_at.take(),
            };
            drop(slot);
            Ok(Incoming {
                offer,
                source: Box::new(source),
                feed: call.pass_on(response.into_body(), sender, fault).boxed(),
            })
        }
        .boxed()
    }
}

impl AskNode for Phone {
    /// A node that is starting has no routes here, and cannot be reached. All announce the URL by
    /// which they are known, so nothing depends on it.
    fn node<'a>(&'a self, node_url: &'a str) -> BoxFuture<'a, Result<Option<Box<str>>, Box<str>>> {
        async move {
            let offer = self.offer(node_url).await;
            Ok(offer.map_err(|error| error.to_string())?.node)
        }
        .boxed()
    }
}

/// What happens to one backup on its way.
struct Fault {
    break_after: Option<usize>,
    change_at: Option<usize>,
}

/// A connection between two nodes.
struct Call {
    world: World,
    url: String,
    ends: [usize; 2],
    gone: CancellationToken,
}

impl Call {
    fn broken(&self, error: &str) -> RemoteError {
        RemoteError::Http {
            url: self.url.clone(),
            error: error.to_owned(),
        }
    }

    /// The time that something takes from end to end; an error if it does not arrive.
    async fn wait(&self, time: Duration) -> Result<(), RemoteError> {
        sleep(time).await;
        for end in self.ends {
            self.world.thawed(end).await;
        }
        let apart = self.ends.iter().any(|end| self.world.slot(*end).apart);
        if self.gone.is_cancelled() {
            return Err(self.broken("connection reset"));
        }
        if apart {
            sleep(SILENCE_MAX).await;
            return Err(self.broken("silent"));
        }
        Ok(())
    }

    async fn pass_on(
        self,
        mut body: Body,
        sender: PipeSender,
        mut fault: Fault,
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
            let Ok(mut part) = frame.into_data() else {
                continue;
            };
            self.wait(self.world.latency(self.ends[1])).await?;
            let end = sent + part.len();
            if let Some(at) = fault.change_at.filter(|at| (sent..end).contains(at)) {
                fault.change_at = None;
                part = changed(&part, at - sent);
            }
            if fault.break_after.is_some_and(|at| at < end) {
                let whole = fault.break_after.unwrap_or_default() - sent;
                sender.send(part.slice(..whole)).await;
                return Err(self.broken("connection reset"));
            }
            sent = end;
            if !sender.send(part).await {
                return Ok(());
            }
        }
    }
}

fn changed(part: &Bytes, at: usize) -> Bytes {
    let mut changed = BytesMut::from(&part[..]);
    changed[at] ^= 0x10;
    changed.freeze()
}
