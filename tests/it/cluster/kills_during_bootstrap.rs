//! The broker, the replica or both killed in each stage of a start from nothing.

use crate::harness::Node;
use crate::harness::backup_files::backup_of;
use crate::harness::cluster::broker::Answered;
use crate::harness::cluster::proxy::{Proxy, Rules};
use crate::harness::cluster::seeded::{Cluster, serves_nothing};
use crate::harness::cluster::throttle::Throttle;

/// Where the replica is held.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Half of the rows are in.
    Rows,
    /// And batches wait for them.
    Buffering,
    /// All rows are in, and the log's last batches are not.
    CatchingUp,
    /// Everything is in, and the replica has not heard where the log ends.
    BeforeReady,
}

/// Who is killed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Killed {
    Broker,
    Replica,
    Both,
}

/// A replica that is held in a stage.
struct Held {
    cluster: Cluster,
    first: Node,
    to_peer: Throttle,
    to_broker: Proxy,
    late: Node,
    answered: Vec<Answered>,
}

impl Held {
    async fn launch(cluster: &Cluster, to_broker: &Proxy) -> Node {
        Node::launch(&mut cluster.with_dir_at("late", to_broker.address)).await
    }

    async fn at(stage: Stage) -> Self {
        let mut cluster = Cluster::of(8000).await;
        let to_peer = Throttle::to_nobody(u64::MAX).await;
        let first = cluster.first_behind(&to_peer).await;
        let mut answered = cluster.write(&first, 5).await;
        let size = backup_of(&first).await.len() as u64;
        to_peer.limit(size / 2);
        let to_broker = Proxy::to(cluster.broker.address).await;
        let late = Self::launch(&cluster, &to_broker).await;
        to_peer.reached(1).await;
        if stage != Stage::Rows {
            answered.extend(cluster.write(&first, 10).await);
            late.status_where("10 batches", |status| {
                status["restore"]["buffered_batches"] == 10
            })
            .await;
        }
        let rules = Rules {
            hold_batches: stage == Stage::CatchingUp,
            mute: stage == Stage::BeforeReady,
            ..Rules::default()
        };
        to_broker.set(rules);
        if stage == Stage::CatchingUp {
            answered.extend(cluster.write(&first, 5).await);
        }
        let position = answered.last().unwrap().position;
        let stages = match stage {
            Stage::Rows | Stage::Buffering => ("restoring", "restoring", 0),
            Stage::CatchingUp => ("catching-up", "catching-up", position - 5),
            Stage::BeforeReady => ("catching-up", "catching-up", position),
        };
        if matches!(stage, Stage::CatchingUp | Stage::BeforeReady) {
            to_peer.open();
        }
        late.status_where("the stage", |status| {
            let (state, restore, position) = stages;
            status["state"] == state
                && status["restore"]["stage"] == restore
                && status["position"] == position
        })
        .await;
        serves_nothing(&late, &[stages.0]).await;
        Self {
            cluster,
            first,
            to_peer,
            to_broker,
            late,
            answered,
        }
    }

    async fn survives(mut self, killed: Killed) {
        let alive = match killed {
            Killed::Broker => Some(self.late),
            Killed::Replica | Killed::Both => {
                self.late.kill();
                None
            }
        };
        if killed != Killed::Replica {
            self.cluster.broker.kill();
            self.cluster.broker.restart().await;
        }
        self.to_broker.set(Rules::default());
        self.to_peer.open();
        let late = match alive {
            Some(late) => late,
            None => Self::launch(&self.cluster, &self.to_broker).await,
        };
        let answered = self.cluster.write(&self.first, 5).await;
        self.answered.extend(answered);
        let nodes = [&*self.first, &*late];
        self.cluster.check(&nodes, &self.answered).await;
    }
}

macro_rules! killed {
    ($($name:ident: $killed:ident, $stage:ident;)*) => {
        $(
            #[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                Held::at(Stage::$stage).await.survives(Killed::$killed).await;
            }
        )*
    };
}

killed! {
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
