//! The NATS service by which replicas find each other.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use async_nats::service::{Service, ServiceExt};
use async_nats::{Client, StatusCode, Subscriber};
use futures_util::{StreamExt, stream};
use tokio_util::sync::CancellationToken;

use super::super::broker::PeerQuery;
use crate::log::{Announce, Announcement, RandomId};

/// The service by which replicas find each other, so that `nats micro ls` and
/// `nats micro stats gradestore` show them too.
pub(super) const SERVICE: &str = "gradestore";
/// The last word of the subject on which all replicas answer with their announcements. That of one
/// replica ends in its id. The service's own subjects have no place for a nonce, and the replicas of
/// all streams share them.
const ALL: &str = "all";
/// How long to wait for the first announcement, and for another one after each.
const FIRST_WAIT_MAX: Duration = Duration::from_millis(300);
const NEXT_WAIT_MAX: Duration = Duration::from_millis(100);
/// How long to wait for the answer of one replica. Without a subscriber NATS answers "no
/// responders" at once.
const REPLICA_WAIT_MAX: Duration = Duration::from_secs(1);
/// How long announcements are collected at most.
const COLLECT_MAX: Duration = Duration::from_secs(2);
/// How many announcements are collected at most: any client of the broker may send any number.
const ANNOUNCEMENTS_MAX: usize = 4096;

/// How the replicas of one stream reach each other over a connection.
pub(super) struct PeerService {
    pub(super) client: Client,
    /// Ends with the connection.
    pub(super) ended: CancellationToken,
    pub(super) stream: String,
    /// The prefix of the subjects.
    pub(super) prefix: String,
}

/// Answers requests for this replica's announcement until `stop` or until the connection has ended.
#[expect(clippy::expect_used, reason = "serializing an announcement can't fail")]
pub(super) async fn announce(
    peers: &PeerService,
    announce: Announce,
    stop: CancellationToken,
) -> Result<(), async_nats::Error> {
    let me = announce("");
    let metadata = [
        ("node", &me.node),
        ("replica", &me.replica),
        ("url", &me.url),
        ("log", &me.log_id),
        ("stream", &peers.stream.as_str().into()),
    ];
    let metadata = metadata.map(|(key, value)| (key.to_owned(), value.to_string()));
    let current = Arc::clone(&announce);
    let service = peers
        .client
        .service_builder()
        .description("a replicated in-memory database of user grades")
        .metadata(HashMap::from(metadata))
        .stats_handler(move |_, _| {
            // `nats micro stats` sends no nonce, so this answer is not signed.
            let mut announcement = current("");
            announcement.mac = None;
            serde_json::to_value(announcement).expect("an announcement is JSON")
        })
        .start(SERVICE, &me.version)
        .await?;
    let endpoint = |name: &str| {
        // A separate queue group for each process, so that every process answers.
        let endpoint = service.endpoint_builder().name(name);
        endpoint.queue_group(&me.node)
    };
    let prefix = &peers.prefix;
    let to_all = endpoint("status").add(format!("{prefix}{ALL}")).await?;
    let to_me = format!("{prefix}{}", me.replica);
    let to_me = endpoint("replica").add(to_me).await?;
    let mut requests = stream::select(to_all, to_me);
    loop {
        tokio::select! {
            Some(request) = requests.next() => {
                // If the payload is not a nonce, no replica accepts the answer.
                let nonce = str::from_utf8(&request.message.payload).unwrap_or_default();
                let answer = serde_json::to_vec(&announce(nonce))?;
                request.respond(Ok(answer.into())).await?;
            }
            () = peers.ended.cancelled() => break,
            () = stop.cancelled() => break,
        }
    }
    Service::stop(service).await
}

/// Collects announcements that are signed for `nonce`. They are not verified here.
pub(super) async fn ask_peers(
    peers: &PeerService,
    query: PeerQuery,
    nonce: RandomId,
) -> Result<Vec<Announcement>, async_nats::Error> {
    let PeerService { client, prefix, .. } = peers;
    let (subject, first_wait_max) = match query {
        PeerQuery::All => (format!("{prefix}{ALL}"), FIRST_WAIT_MAX),
        PeerQuery::Replica(replica) => (format!("{prefix}{replica}"), REPLICA_WAIT_MAX),
    };
    let inbox = client.new_inbox();
    let mut answers: Subscriber = client.subscribe(inbox.clone()).await?;
    client
        .publish_with_reply(subject, inbox, nonce.to_string().into())
        .await?;
    // Not one per process: a forged announcement must not hide the authentic one.
    let mut found = Vec::new();
    let collect = async {
        let mut wait_max = first_wait_max;
        while let Ok(Some(answer)) = tokio::time::timeout(wait_max, answers.next()).await {
            if answer.status == Some(StatusCode::NO_RESPONDERS) {
                break;
            }
            wait_max = NEXT_WAIT_MAX;
            if let Ok(peer) = serde_json::from_slice::<Announcement>(&answer.payload)
                && found.len() < ANNOUNCEMENTS_MAX
            {
                found.push(peer);
            }
        }
    };
    let _ = tokio::time::timeout(COLLECT_MAX, collect).await;
    Ok(found)
}
