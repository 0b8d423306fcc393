//! The broker, a replica or both are killed at each stage of a replica's bootstrap.

use crate::harness::Node;
use crate::harness::backup_files::fetch_backup;
use crate::harness::cluster::broker::AckedWrite;
use crate::harness::cluster::proxy::{Proxy, Rules};
use crate::harness::cluster::seeded::{SeededCluster, assert_serves_nothing};
use crate::harness::cluster::throttle::Throttle;

/// Where the bootstrap is paused.
#[derive(Clone, Copy, PartialEq, Eq)]
enum BootstrapStage {
    /// Half of the rows are loaded.
    Rows,
    /// Half of the rows are loaded and batches are buffered.
    Buffering,
    /// All rows are loaded, and the last batches of the log are missing.
    CatchingUp,
    /// Everything is applied, and the replica does not know the end of the log.
    BeforeReady,
}

/// What is killed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Victim {
    Broker,
    Replica,
    Both,
}

/// A replica whose bootstrap is paused at a stage.
struct Scenario {
    cluster: SeededCluster,
    first: Node,
    peer_throttle: Throttle,
    broker_proxy: Proxy,
    late: Node,
    answered: Vec<AckedWrite>,
}

impl Scenario {
    async fn launch(cluster: &SeededCluster, broker_proxy: &Proxy) -> Node {
        Node::launch(&mut cluster.replica_through("late", broker_proxy.address)).await
    }

    async fn paused_at(stage: BootstrapStage) -> Self {
        let mut cluster = SeededCluster::with_rows(8000).await;
        let peer_throttle = Throttle::without_target(u64::MAX).await;
        let first = cluster.start_first_behind(&peer_throttle).await;
        let mut answered = cluster.write(&first, 5).await;
        let size = fetch_backup(&first).await.len() as u64;
        peer_throttle.set_limit(size / 2);
        let broker_proxy = Proxy::to(cluster.broker.address).await;
        let late = Self::launch(&cluster, &broker_proxy).await;
        peer_throttle.wait_until_limited(1).await;
        if stage != BootstrapStage::Rows {
            answered.extend(cluster.write(&first, 10).await);
            late.status_where("10 batches", |status| {
                status["restore"]["buffered_batches"] == 10
            })
            .await;
        }
        let rules = Rules {
            hold_batches: stage == BootstrapStage::CatchingUp,
            drop_replies: stage == BootstrapStage::BeforeReady,
            ..Rules::default()
        };
        broker_proxy.set(rules);
        if stage == BootstrapStage::CatchingUp {
            answered.extend(cluster.write(&first, 5).await);
        }
        let position = answered.last().unwrap().position;
        let expected = match stage {
            BootstrapStage::Rows | BootstrapStage::Buffering => ("restoring", "restoring", 0),
            BootstrapStage::CatchingUp => ("catching-up", "catching-up", position - 5),
            BootstrapStage::BeforeReady => ("catching-up", "catching-up", position),
        };
        if matches!(
            stage,
            BootstrapStage::CatchingUp | BootstrapStage::BeforeReady
        ) {
            peer_throttle.remove_limit();
        }
        late.status_where("the stage", |status| {
            let (state, restore, position) = expected;
            status["state"] == state
                && status["restore"]["stage"] == restore
                && status["position"] == position
        })
        .await;
        assert_serves_nothing(&late, &[expected.0]).await;
        Self {
            cluster,
            first,
            peer_throttle,
            broker_proxy,
            late,
            answered,
        }
    }

    async fn recovers_after_kill_of(mut self, scenarios: Victim) {
        let alive = match scenarios {
            Victim::Broker => Some(self.late),
            Victim::Replica | Victim::Both => {
                self.late.kill();
                None
            }
        };
        if scenarios != Victim::Replica {
            self.cluster.broker.kill();
            self.cluster.broker.restart().await;
        }
        self.broker_proxy.set(Rules::default());
        self.peer_throttle.remove_limit();
        let late = match alive {
            Some(late) => late,
            None => Self::launch(&self.cluster, &self.broker_proxy).await,
        };
        let answered = self.cluster.write(&self.first, 5).await;
        self.answered.extend(answered);
        let nodes = [&*self.first, &*late];
        self.cluster.check(&nodes, &self.answered).await;
    }
}

macro_rules! scenarios {
    ($($name:ident: $scenarios:ident, $stage:ident;)*) => {
        $(
            #[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                Scenario::paused_at(BootstrapStage::$stage).await.recovers_after_kill_of(Victim::$scenarios).await;
            }
        )*
    };
}

scenarios! {
    the_broker_dies_while_rows_come_in: Broker, Rows;
    the_broker_dies_while_batches_wait: Broker, Buffering;
    the_broker_dies_while_the_log_is_caught_up_with: Broker, CatchingUp;
    the_broker_dies_just_before_ready: Broker, BeforeReady;
    the_replica_dies_while_rows_come_in: Replica, Rows;
    the_replica_dies_while_batches_wait: Replica, Buffering;
    the_replica_dies_while_the_log_is_caught_up_with: Replica, CatchingUp;
    the_replica_dies_just_before_ready: Replica, BeforeReady;
    both_die_while_rows_come_in: Both, Rows;
    both_die_while_batches_wait: Both, Buffering;
    both_die_while_the_log_is_caught_up_with: Both, CatchingUp;
    both_die_just_before_ready: Both, BeforeReady;
}
