//! Notifications to systemd while a replica restores.

use rustix::process::Signal;

use crate::harness::Node;
use crate::harness::backup_files::backup_of;
use crate::harness::cluster::broker::replica_at;
use crate::harness::cluster::seeded::Cluster;
use crate::harness::cluster::throttle::Throttle;
use crate::ops::sd_notify::Supervisor;

#[tokio::test(flavor = "multi_thread")]
async fn a_node_is_started_when_it_answers_reads_and_asks_for_time_until_then() {
    let mut cluster = Cluster::of(30_000).await;
    let throttle = Throttle::to_nobody(u64::MAX).await;
    let first = cluster.first_behind(&throttle).await;
    cluster.write(&first, 3).await;
    throttle.limit(backup_of(&first).await.len() as u64 / 2);
    let supervisor = Supervisor::new();
    let mut command = replica_at(cluster.broker.address);
    let mut late = Node::launch(supervisor.over(&mut command)).await;
    throttle.reached(1).await;
    late.status_where("rows", |status| {
        status["restore"]["rows"].as_u64() > Some(0)
    })
    .await;

    let rows = |line: &str| {
        line.starts_with("STATUS=restoring: ") && line.ends_with(" of about 30000 rows")
    };
    let told = supervisor.until(rows).await;
    assert!(
        told.iter()
            .any(|line| line == "EXTEND_TIMEOUT_USEC=30000000"),
        "{told:?}"
    );
    // Later ones too: the timeout is extended again and again.
    let told = [
        told,
        supervisor.until(|line| line.starts_with("EXTEND_")).await,
    ]
    .concat();
    assert!(
        !told.iter().any(|line| line.starts_with("READY")),
        "{told:?}"
    );
    assert_eq!(late.ops("/readyz").await.status, 503);

    throttle.open();
    supervisor.until(|line| line == "READY=1").await;
    assert_eq!(late.ops("/readyz").await.status, 200);
    late.signal(Signal::TERM);
    let told = supervisor.until(|line| line == "STOPPING=1").await;
    assert!(
        told.iter().any(|line| line == "STATUS=stopping"),
        "{told:?}"
    );
    assert_eq!(late.exit().await.code(), Some(0));
}
