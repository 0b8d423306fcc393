//! The replicas on one stream find each other as instances of a NATS service, so that `nats micro ls`
//! and `nats micro stats gradestore` show them too.
//!
//! What is known of a replica for good is its metadata; what changes (its state, its position) stands
//! in the statistics of its one endpoint, which the broker's clients gather from all instances at
//! once. The endpoint answers the same by itself, on a subject of the replica's own.

use std::collections::{BTreeMap, HashMap};
use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use async_nats::service::{Service, ServiceExt, Stats};
use async_nats::{HeaderMap, Subscriber};
use bytes::Bytes;
use futures_util::StreamExt;
use tokio_util::sync::CancellationToken;

use super::Shared;
use super::link::{Backoff, Session};
use crate::log::{Announce, Announcement};

/// The service's name.
const SERVICE: &str = "gradestore";
/// Asks all instances of it.
const ASK_ALL: &str = "$SRV.STATS.gradestore";
/// How long the first answer is waited for, and after each one another: all are asked at once.
const FIRST_WAIT_MAX: Duration = Duration::from_millis(300);
const NEXT_WAIT_MAX: Duration = Duration::from_millis(100);
/// How long answers are gathered at most, however many come.
const GATHER_MAX: Duration = Duration::from_secs(2);

/// Tells whoever asks of this replica, over whichever connection there is, until `stop`.
pub(super) async fn announce(shared: Arc<Shared>, announce: Announce, stop: CancellationToken) {
    let announced = async {
        let mut backoff = Backoff::new();
        while let Ok(session) = shared.next_session().await {
            match answer(&session, &announce).await {
                Ok(()) => backoff = Backoff::new(),
                Err(error) => tracing::warn!(error, "replica not announced"),
            }
            backoff.pause().await;
        }
    };
    stop.run_until_cancelled(announced).await;
}

/// Answers for as long as `session` lasts.
async fn answer(session: &Session, announce: &Announce) -> Result<(), async_nats::Error> {
    let me = announce();
    let metadata = [("node", &me.node), ("url", &me.url), ("log", &me.log_id)];
    let metadata = metadata.map(|(key, value)| (key.to_owned(), value.to_string()));
    let said = Arc::clone(announce);
    let service = session
        .context
        .client()
        .service_builder()
        .description("a replicated in-memory store of user grades")
        .metadata(HashMap::from(metadata))
        .stats_handler(move |_, _| serde_json::to_value(said()).unwrap_or_default())
        .start(SERVICE, &me.version)
        .await?;
    let subject = format!("{SERVICE}.status.{}", me.node);
    let mut asked = service
        .endpoint_builder()
        .name("status")
        .add(subject)
        .await?;
    loop {
        tokio::select! {
            Some(request) = asked.next() => {
                let said = serde_json::to_vec(&announce())?;
                request.respond(Ok(said.into())).await?;
            }
            () = session.ended.cancelled() => break,
        }
    }
    Service::stop(service).await
}

/// Asks all replicas; those that answer soon, by node.
pub(super) async fn ask(
    session: &Session,
) -> Result<Vec<Announcement>, Box<dyn Error + Send + Sync>> {
    let client = session.context.client();
    let inbox = client.new_inbox();
    let mut answers: Subscriber = client.subscribe(inbox.clone()).await?;
    client
        .publish_with_reply_and_headers(ASK_ALL, inbox, HeaderMap::new(), Bytes::new())
        .await?;
    let mut found = BTreeMap::new();
    let gather = async {
        let mut wait_max = FIRST_WAIT_MAX;
        while let Ok(Some(answer)) = tokio::time::timeout(wait_max, answers.next()).await {
            wait_max = NEXT_WAIT_MAX;
            // Others may have a service of this name; what they say is none of ours.
            let Ok(stats) = serde_json::from_slice::<Stats>(&answer.payload) else {
                continue;
            };
            let said = stats
                .endpoints
                .into_iter()
                .filter_map(|endpoint| endpoint.data);
            for said in said {
                if let Ok(said) = serde_json::from_value::<Announcement>(said) {
                    found.insert(said.node.clone(), said);
                }
            }
        }
    };
    let _ = tokio::time::timeout(GATHER_MAX, gather).await;
    Ok(found.into_values().collect())
}
