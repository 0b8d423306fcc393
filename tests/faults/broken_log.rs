//! Faults of the log itself: what it held is gone, or some of it.

use async_nats::jetstream::stream::Config;

use crate::fault::not_writable;
use crate::harness::cluster::broker::STREAM;
use crate::harness::cluster::proxy::Rules;
use crate::harness::cluster::seeded::assert_serves_nothing;
use crate::scene::{A, B, C, Scene};
use crate::stage::Stage;

/// Batches that are left when the stream forgets all it may.
const LEFT: u64 = 5;

/// The broker comes back with an empty disk: nobody serves what nobody can go on from. Then the
/// operator does what the replicas say.
pub(crate) async fn wiped(scene: &mut Scene) {
    let kept = scene.broker().kill_and_copy();
    scene.broker().roll_back(tempfile::tempdir().unwrap()).await;
    for index in [B, C] {
        let node = scene.node(index);
        let before = scene.position(index).await;
        let gap = |status: &serde_json::Value| status["state"] == "gap";
        let status = node.status_where("gap", gap).await;
        let reason = status["reason"].as_str().unwrap();
        let printed = ["does not exist", "restore the stream"];
        assert!(
            printed.iter().all(|printed| reason.contains(printed)),
            "{reason}"
        );
        let status = assert_serves_nothing(node, &["gap"]).await;
        // What was answered is still there, for whoever can make use of it.
        assert_eq!(status["position"], before);
        assert!(status["records"].as_u64() > Some(0));
    }
    scene.release().await;
    if scene.stage == Stage::Stopping {
        scene.wait_for_exit().await;
    } else {
        let lost =
            |status: &serde_json::Value| status["state"] == "gap" || status["state"] == "no-source";
        let status = scene.node(A).status_where("gap or no source", lost).await;
        assert_ne!(status["reason"], "");
        assert_serves_nothing(scene.node(A), &["gap", "no-source"]).await;
    }
    // As the reason says: restore the stream.
    for index in [A, B, C] {
        scene.kill(index);
    }
    scene.broker().roll_back(kept).await;
    for index in [B, C, A] {
        scene.start(index).await;
    }
    for index in [A, B, C] {
        scene.ready(index).await;
    }
}

/// The stream forgets what the replica under test has already.
pub(crate) async fn trimmed_behind(scene: &mut Scene) {
    let quiet = scene.load.pause().await;
    scene.read().await;
    let has = match scene.stage {
        Stage::Restoring => scene.held_at,
        _ => scene.position(A).await,
    };
    trim(scene, has).await;
    drop(quiet);
    scene.load.progress(&[B, C], 10).await;
    scene.go_on().await;
    let resyncs = scene.node(A).metric("gradestore_resyncs_total").await;
    assert_eq!(resyncs, Some(0.0));
}

/// The stream forgets what the replica under test has not read, because it was cut off.
pub(crate) async fn trimmed_beyond(scene: &mut Scene) {
    scene.connection(Rules::BLACKHOLE);
    scene.proxy().cut();
    not_writable(scene, A).await;
    scene.load.progress(&[B, C], 10).await;
    let quiet = scene.load.pause().await;
    scene.read().await;
    let end = scene.reference.position;
    assert!(scene.position(A).await + 1 < end - LEFT);
    trim(scene, end - LEFT).await;
    drop(quiet);
    scene.connection(Rules::default());
    scene.go_on().await;
    if !matches!(scene.stage, Stage::Stopping | Stage::Restoring) {
        // It may have been ready once more before it looked at the log.
        let node = scene.node(A);
        node.metric_reaches("gradestore_resyncs_total", 1.0).await;
    }
}

/// Makes the stream forget all up to `through`; nobody may write meanwhile.
async fn trim(scene: &Scene, through: u64) {
    let end = scene.reference.position;
    let context = scene.client().await;
    let stream = context.get_stream(STREAM).await.unwrap();
    let config = stream.cached_info().config.clone();
    for max_messages in [i64::try_from(end - through).unwrap().max(1), -1] {
        let config = Config {
            max_messages,
            ..config.clone()
        };
        context.update_stream(config).await.unwrap();
    }
    let trimmed = context.get_stream(STREAM).await.unwrap();
    let first = trimmed.cached_info().state.first_sequence;
    assert_eq!(first, (through + 1).min(end));
}
