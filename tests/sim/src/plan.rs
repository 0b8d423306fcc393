//! The plan of a run: everything that its seed determines before it starts.

use std::time::Duration;

use gradestore::log::WalSync;

use crate::client::{Op, OpKind};
use crate::hostile::HostileMessage;
use crate::process::Knobs;

/// The plan of one run. Removing events leaves a valid plan.
#[derive(Debug, Clone)]
pub struct Plan {
    pub seed: u64,
    pub nodes: usize,
    /// Whether the broker is three servers or one.
    pub clustered: bool,
    pub knobs: Knobs,
    pub latency_ms: std::ops::Range<u64>,
    pub clients: Vec<Vec<Op>>,
    /// Faults with their times in milliseconds, in order.
    pub faults: Vec<(u64, Fault)>,
}

/// A fault, and its duration in milliseconds.
#[derive(Debug, Clone)]
pub enum Fault {
    /// Cuts the link between node and broker, in one direction or both.
    Cut {
        node: usize,
        outbound_cut: bool,
        inbound_cut: bool,
        ms: u64,
    },
    Slow {
        node: usize,
        ms: u64,
    },
    /// Cuts the connections between this node and the others.
    PeersCut {
        node: usize,
        ms: u64,
    },
    Kill {
        node: usize,
        wipe: bool,
        ms: u64,
    },
    Stop {
        node: usize,
        ms: u64,
    },
    /// The broker is down and comes back with all its data.
    BrokerDown {
        ms: u64,
    },
    /// The broker restarts without its last batches.
    BrokerLosesBatches {
        batches: usize,
    },
    /// The node restarts, and the broker loses batches that the node has not read, right after it
    /// has reported the log's end to the node.
    BrokerLosesUnreadBatches {
        node: usize,
        wipe: bool,
        ms: u64,
    },
    Trim {
        keep: usize,
    },
    Recreate,
    /// A message is not delivered.
    DropDelivery {
        node: usize,
    },
    /// A message is delivered twice.
    RepeatDelivery {
        node: usize,
    },
    /// An acknowledgement of the broker is lost.
    LoseAck {
        node: usize,
    },
    /// The node's next publish arrives late.
    DelayPublish {
        node: usize,
        ms: u64,
    },
    /// The server that the node is connected to loses its routes. It keeps reporting the stream's
    /// state as of `lag` batches before.
    Isolate {
        node: usize,
        lag: u64,
        leader: bool,
        heartbeats: bool,
        ms: u64,
    },
    /// The stream has no leader. Requests get no answer if `silent`, an error otherwise.
    NoLeader {
        silent: bool,
        ms: u64,
    },
    /// All consumers are lost, and none can be created because the metadata group has no leader.
    NoConsumers {
        ms: u64,
    },
    /// The leader reaches no majority. Messages are stored later, or never.
    NoQuorum {
        ms: u64,
    },
    /// The storage is full.
    StorageFull {
        ms: u64,
    },
    /// The stream is missing, and comes back.
    StreamGone {
        ms: u64,
    },
    /// A server that restarts has not read the last batches of its Raft log yet.
    ShorterStream {
        batches: u64,
        ms: u64,
    },
    /// Another publisher sends a message.
    Publish {
        what: HostileMessage,
    },
    /// The node's process and its clock are suspended while minutes pass for the broker. Its
    /// connection survives if `alive`. With `stored` this happens right after the broker has stored
    /// a message of the node.
    Suspend {
        node: usize,
        alive: bool,
        stored: bool,
        ms: u64,
    },
    /// A record in the node's memory is corrupted.
    Corrupt {
        node: usize,
    },
    /// The next backup that the node sends is truncated, or has one bit flipped.
    TruncateBackup {
        node: usize,
        after: usize,
    },
    CorruptBackup {
        node: usize,
        at: usize,
    },
}

impl Plan {
    pub fn of(seed: u64) -> Self {
        let mut rng = fastrand::Rng::with_seed(seed ^ 0x9e37_79b9_7f4a_7c15);
        // Another one, so that the other choices are those of a simulation without WALs.
        let mut wal_rng = fastrand::Rng::with_seed(seed ^ 0x51ed_270b_9f1e_0a3d);
        let nodes = [1, 2, 3, 3, 3, 4][rng.usize(..6)];
        let users = rng.u8(1..10);
        let knobs = Knobs {
            // A single ephemeral node may not create the stream.
            snapshots: rng.bool() || nodes == 1,
            snapshot_interval: Duration::from_millis(rng.u64(1000..9000)),
            checkpoint_interval: Duration::from_millis(rng.u64(300..6000)),
            buffer_bytes_max: [1, 500, 1 << 20][rng.usize(..3)],
            batch_writes_max: [1, 3, 64][rng.usize(..3)],
            queue_requests_max: [2, 16, 256][rng.usize(..3)],
            chunk_text_bytes: [1, 1, 60, 1 << 20][rng.usize(..4)],
            backups_max: rng.usize(1..3),
            static_peers: rng.u8(..4) == 0,
            expect_peers: nodes,
            work_wait_ms: [1, 30, 300][rng.usize(..3)],
            wal: match wal_rng.u8(..4) {
                0 => None,
                1 => Some(WalSync::Always),
                _ => Some(WalSync::Every(Duration::from_millis(wal_rng.u64(1..200)))),
            },
        };
        let clients = (0..rng.usize(1..5)).map(|_| client(&mut rng, nodes, users));
        let clients: Vec<_> = clients.collect();
        let spans = clients
            .iter()
            .map(|ops: &Vec<Op>| ops.iter().map(|op| op.think_ms).sum());
        let end_ms = spans.max().unwrap_or(0u64) + 3000;
        let (clustered, history) = (rng.bool(), rng.u8(..5) == 0);
        let count = rng.usize(0..12);
        let (only_publishes, corrupts) = match rng.u8(..16) {
            0 | 1 => (true, false),
            2 if nodes > 2 => (true, true),
            _ => (false, false),
        };
        let faults = (0..count).map(|_| {
            let fault = match only_publishes {
                true => Fault::Publish {
                    what: HostileMessage::random(&mut rng),
                },
                false => fault(&mut rng, nodes, clustered, history),
            };
            (rng.u64(500..end_ms), fault)
        });
        let mut faults: Vec<_> = faults.collect();
        if corrupts {
            let node = rng.usize(..nodes);
            faults.push((rng.u64(500..end_ms), Fault::Corrupt { node }));
        }
        faults.sort_by_key(|(at, _)| *at);
        // A log that has lost its last batches and is then trimmed may be indistinguishable from
        // the one before.
        let loses_last = |(_, fault): &(u64, Fault)| {
            matches!(
                fault,
                Fault::BrokerLosesBatches { .. } | Fault::BrokerLosesUnreadBatches { .. }
            )
        };
        if faults.iter().any(loses_last) {
            faults.retain(|(_, fault)| !matches!(fault, Fault::Trim { .. }));
        }
        Self {
            seed,
            nodes,
            clustered,
            knobs,
            latency_ms: [0..2, 1..12, 1..80][rng.usize(..3)].clone(),
            clients,
            faults,
        }
    }

    /// The number of its events.
    pub fn size(&self) -> usize {
        self.faults.len() + self.clients.iter().map(Vec::len).sum::<usize>()
    }

    /// Whether a node may have to discard its state.
    pub fn loses_log(&self) -> bool {
        let loses = |(_, fault): &(u64, Fault)| {
            matches!(fault, Fault::DropDelivery { .. } | Fault::Trim { .. })
        };
        self.loses_history() || self.faults.iter().any(loses)
    }

    /// The node with a corrupted record, if there is one.
    pub fn corrupted(&self) -> Option<usize> {
        let corrupted = |(_, fault): &(u64, Fault)| match fault {
            Fault::Corrupt { node } => Some(*node),
            _ => None,
        };
        self.faults.iter().find_map(corrupted)
    }

    /// Whether the log may lose batches that nodes have applied, so that an operator may be needed.
    pub fn loses_history(&self) -> bool {
        let loses = |(_, fault): &(u64, Fault)| {
            matches!(
                fault,
                Fault::BrokerLosesBatches { .. }
                    | Fault::BrokerLosesUnreadBatches { .. }
                    | Fault::Recreate
            )
        };
        self.faults.iter().any(loses)
    }
}

fn client(rng: &mut fastrand::Rng, nodes: usize, users: u8) -> Vec<Op> {
    let think_max = [20, 200, 1000][rng.usize(..3)];
    let home = rng.usize(..nodes);
    let roams = rng.bool();
    let op = |rng: &mut fastrand::Rng| Op {
        think_ms: rng.u64(0..think_max),
        node: if roams { rng.usize(..nodes) } else { home },
        user: rng.u8(..users),
        kind: match rng.u8(..12) {
            0..=5 => OpKind::Set {
                fields: rng.u8(1..16),
                disconnect_after_ms: (rng.u8(..12) == 0).then(|| rng.u64(0..60)),
            },
            6 | 7 => OpKind::Delete {
                disconnect_after_ms: (rng.u8(..12) == 0).then(|| rng.u64(0..60)),
            },
            8 | 9 => OpKind::Get,
            _ => OpKind::GetOwnWrite,
        },
    };
    (0..rng.usize(3..50)).map(|_| op(rng)).collect()
}

/// A random fault; with `history` also faults that lose acknowledged writes. Long, because it is a
/// table of probabilities.
fn fault(rng: &mut fastrand::Rng, nodes: usize, clustered: bool, history: bool) -> Fault {
    let node = rng.usize(..nodes);
    let ms = [300, 2500, 9000][rng.usize(..3)];
    let ms = rng.u64(ms / 3..ms);
    match rng.u8(..if history { 42 } else { 34 }) {
        0..=2 => {
            let ways = rng.u8(1..4);
            Fault::Cut {
                node,
                outbound_cut: ways & 1 != 0,
                inbound_cut: ways & 2 != 0,
                ms,
            }
        }
        3 => Fault::Slow { node, ms },
        4 => Fault::PeersCut { node, ms },
        5..=8 => Fault::Kill {
            node,
            wipe: rng.bool(),
            ms,
        },
        9 | 10 => Fault::Stop { node, ms },
        11 | 12 => Fault::BrokerDown { ms },
        13 | 14 => Fault::Trim {
            keep: rng.usize(..12),
        },
        15 => Fault::RepeatDelivery { node },
        16 => Fault::LoseAck { node },
        17 => Fault::DelayPublish { node, ms },
        18 => Fault::TruncateBackup {
            node,
            after: rng.usize(..1500),
        },
        19 => Fault::CorruptBackup {
            node,
            at: rng.usize(..1500),
        },
        20 | 21 => Fault::DropDelivery { node },
        22 | 23 if clustered => Fault::Isolate {
            node,
            lag: rng.u64(..4),
            leader: rng.bool(),
            heartbeats: rng.bool(),
            ms: rng.u64(1000..25_000),
        },
        24 if clustered => Fault::NoConsumers { ms },
        22..=25 => Fault::NoLeader {
            silent: rng.bool(),
            ms,
        },
        26 if clustered => Fault::NoQuorum { ms },
        26 | 27 => Fault::StorageFull { ms },
        28 if clustered => Fault::StreamGone {
            ms: rng.u64(1000..40_000),
        },
        29 if clustered => Fault::ShorterStream {
            batches: rng.u64(1..4),
            ms: rng.u64(1000..20_000),
        },
        28..=31 => Fault::Publish {
            what: HostileMessage::random(rng),
        },
        32 | 33 => Fault::Suspend {
            node,
            alive: rng.bool(),
            stored: rng.bool(),
            ms: rng.u64(100..2000),
        },
        34 | 35 => Fault::BrokerLosesBatches {
            batches: rng.usize(1..6),
        },
        36..=39 => Fault::BrokerLosesUnreadBatches {
            node,
            wipe: rng.bool(),
            ms: rng.u64(50..1000),
        },
        _ => Fault::Recreate,
    }
}
