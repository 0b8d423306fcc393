//! Faults of the log itself: it loses all of its batches, or the first ones.

use async_nats::jetstream::stream::Config;

use crate::fault::wait_until_not_writable;
use crate::harness::cluster::broker::STREAM;
use crate::harness::cluster::proxy::Rules;
use crate::harness::cluster::seeded::assert_serves_nothing;
use crate::scene::{A, B, C, Scene};
use crate::stage::Stage;

/// The number of batches that remain after a trim beyond the replica's position.
const REMAINING: u64 = 5;

/// The broker restarts with an empty disk. No replica serves data, because none can continue on
/// the new log. Then the operator restores the stream, as the replicas' reason says.
pub(crate) async fn wiped(scene: &mut Scene) {
    let kept = scene.broker().kill_and_copy();
    scene.broker().roll_back(tempfile::tempdir().unwrap()).await;
    for index in [B, C] {
        let node = scene.node(index);
        let before = scene.position(index).await;
        let gap = |status: &serde_json::Value| status["state"] == "gap";
        let status = node.status_where("gap", gap).await;
        let reason = status["reason"].as_str().unwrap();
        let hints = ["does not exist", "restore the stream"];
        assert!(hints.iter().all(|hint| reason.contains(hint)), "{reason}");
        let status = assert_serves_nothing(node, &["gap"]).await;
        // The replica keeps the acknowledged writes, because an operator may need them.
        assert_eq!(status["position"], before);
        assert!(status["records"].as_u64() > Some(0));
    }
    scene.release().await;
    if scene.stage == Stage::Stopping {
        scene.wait_for_exit().await;
    } else {
        let stuck =
            |status: &serde_json::Value| status["state"] == "gap" || status["state"] == "no-source";
        let status = scene.node(A).status_where("gap or no source", stuck).await;
        assert_ne!(status["reason"], "");
        assert_serves_nothing(scene.node(A), &["gap", "no-source"]).await;
    }
    // The operator restores the stream.
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

/// The stream removes batches that the replica under test has applied.
pub(crate) async fn trimmed_behind(scene: &mut Scene) {
    let quiet = scene.load.pause().await;
    scene.read_log().await;
    let applied = match scene.stage {
        Stage::Restoring => scene.trimmable_through,
        _ => scene.position(A).await,
    };
    trim(scene, applied).await;
    drop(quiet);
    scene.load.progress(&[B, C], 10).await;
    scene.resume().await;
    let resyncs = scene.node(A).metric("gradestore_resyncs_total").await;
    assert_eq!(resyncs, Some(0.0));
}

/// The stream removes batches that the replica under test has not read, because it was cut off.
pub(crate) async fn trimmed_beyond(scene: &mut Scene) {
    scene.set_link(Rules::BLACKHOLE);
    scene.proxy().cut();
    wait_until_not_writable(scene, A).await;
    scene.load.progress(&[B, C], 10).await;
    let quiet = scene.load.pause().await;
    scene.read_log().await;
    let end = scene.reference.position;
    assert!(scene.position(A).await + 1 < end - REMAINING);
    trim(scene, end - REMAINING).await;
    drop(quiet);
    scene.set_link(Rules::default());
    scene.resume().await;
    if !matches!(scene.stage, Stage::Stopping | Stage::Restoring) {
        // The replica may report ready again before it notices that the log was trimmed.
        let node = scene.node(A);
        node.metric_reaches("gradestore_resyncs_total", 1.0).await;
    }
}

/// Trims the stream through position `through`. No client may write meanwhile.
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
