//! Notifications to systemd while a replica restores.

use rustix::process::Signal;

use crate::harness::Node;
use crate::harness::backup_files::fetch_backup;
use crate::harness::cluster::broker::replica_at;
use crate::harness::cluster::seeded::SeededCluster;
use crate::harness::cluster::throttle::Throttle;
use crate::ops::sd_notify::NotifySocket;

#[tokio::test(flavor = "multi_thread")]
async fn ready_is_sent_after_the_restore_and_the_timeout_extended_until_then() {
    let mut cluster = SeededCluster::with_rows(30_000).await;
    let throttle = Throttle::without_target(u64::MAX).await;
    let first = cluster.start_first_behind(&throttle).await;
    cluster.write(&first, 3).await;
    throttle.set_limit(fetch_backup(&first).await.len() as u64 / 2);
    let notify_socket = NotifySocket::new();
    let mut command = replica_at(cluster.broker.address);
    let mut late = Node::launch(notify_socket.configure(&mut command)).await;
    throttle.wait_until_limited(1).await;
    late.status_where("rows", |status| {
        status["restore"]["rows"].as_u64() > Some(0)
    })
    .await;

    let rows = |line: &str| {
        line.starts_with("STATUS=restoring: ") && line.ends_with(" of about 30000 rows")
    };
    let messages = notify_socket.messages_until(rows).await;
    assert!(
        messages
            .iter()
            .any(|line| line == "EXTEND_TIMEOUT_USEC=30000000"),
        "{messages:?}"
    );
    // The timeout is extended repeatedly.
    let messages = [
        messages,
        notify_socket
            .messages_until(|line| line.starts_with("EXTEND_"))
            .await,
    ]
    .concat();
    assert!(
        !messages.iter().any(|line| line.starts_with("READY")),
        "{messages:?}"
    );
    assert_eq!(late.ops("/readyz").await.status, 503);

    throttle.remove_limit();
    notify_socket.messages_until(|line| line == "READY=1").await;
    assert_eq!(late.ops("/readyz").await.status, 200);
    late.signal(Signal::TERM);
    let messages = notify_socket
        .messages_until(|line| line == "STOPPING=1")
        .await;
    assert!(
        messages.iter().any(|line| line == "STATUS=stopping"),
        "{messages:?}"
    );
    assert_eq!(late.wait_for_exit().await.code(), Some(0));
}
