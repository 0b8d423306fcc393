//! What is to happen in a run: everything that is drawn from its seed before it begins.

use std::time::Duration;

use crate::client::{Op, OpKind};
use crate::hostile::Hostile;
use crate::process::Knobs;

/// One run's course. What is left of it after parts were taken out is a course too.
#[derive(Debug, Clone)]
pub struct Plan {
    pub seed: u64,
    pub nodes: usize,
    /// Whether the broker is three servers, or one.
    pub clustered: bool,
    pub knobs: Knobs,
    pub latency_ms: std::ops::Range<u64>,
    pub clients: Vec<Vec<Op>>,
    /// In the order of their times.
    pub faults: Vec<(u64, Fault)>,
}

/// Something that goes wrong, and for how long.
#[derive(Debug, Clone)]
pub enum Fault {
    /// What the node sends to the broker is lost; or what the broker sends; or both.
    Cut {
        node: usize,
        mute: bool,
        deaf: bool,
        ms: u64,
    },
    Slow {
        node: usize,
        ms: u64,
    },
    /// The nodes can't reach this one.
    Apart {
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
    /// The broker is away and forgets nothing.
    BrokerAway {
        ms: u64,
    },
    /// The broker comes back without its last batches.
    BrokerLoses {
        batches: usize,
    },
    /// The node starts, and the broker loses batches that the node has not read yet, right after it
    /// has told the node where the log ends.
    BrokerLosesUnread {
        node: usize,
        wipe: bool,
        ms: u64,
    },
    Trim {
        keep: usize,
    },
    Recreate,
    /// A delivery is left out.
    Lose {
        node: usize,
    },
    /// One comes again.
    Repeat {
        node: usize,
    },
    /// An answer of the broker is lost.
    LoseAck {
        node: usize,
    },
    /// What the node publishes next is under way for a long time.
    Hold {
        node: usize,
        ms: u64,
    },
    /// The server that the node is connected to loses its routes and repeats numbers from then,
    /// or from `lag` batches before.
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
    /// Its leader reaches no majority: what is sent is stored later, or never.
    NoQuorum {
        ms: u64,
    },
    /// Its storage is full.
    Full {
        ms: u64,
    },
    /// It is not there, and then it is again.
    Gone {
        ms: u64,
    },
    /// A server that starts has not read the last batches of its Raft log yet.
    Short {
        batches: u64,
        ms: u64,
    },
    /// Another publisher sends something.
    Publish {
        what: Hostile,
    },
    /// The node's process stands still, and with it its clock: for the broker minutes pass. Its
    /// connection is still there afterwards, or not. With `stored` this happens right after the
    /// broker has stored something of it.
    Suspend {
        node: usize,
        alive: bool,
        stored: bool,
        ms: u64,
    },
    /// A record in the node's memory changes.
    Corrupt {
        node: usize,
    },
    /// The next backup that the node gives breaks off; or has a bit changed.
    BreakBackup {
        node: usize,
        after: usize,
    },
    ChangeBackup {
        node: usize,
        at: usize,
    },
}

impl Plan {
    pub fn of(seed: u64) -> Self {
        let mut rng = fastrand::Rng::with_seed(seed ^ 0x9e37_79b9_7f4a_7c15);
        let nodes = [1, 2, 3, 3, 3, 4][rng.usize(..6)];
        let users = rng.u8(1..10);
        let knobs = Knobs {
            // One that is alone and keeps nothing may not create the stream.
            snapshots: rng.bool() || nodes == 1,
            snapshot_interval: Duration::from_millis(rng.u64(1000..9000)),
            checkpoint_interval: Duration::from_millis(rng.u64(300..6000)),
            buffer_bytes_max: [1, 500, 1 << 20][rng.usize(..3)],
            batch_patches_max: [1, 3, 64][rng.usize(..3)],
            queue_requests_max: [2, 16, 256][rng.usize(..3)],
            chunk_text_bytes: [1, 1, 60, 1 << 20][rng.usize(..4)],
            backups_max: rng.usize(1..3),
            by_hand: rng.u8(..4) == 0,
            expect_peers: nodes,
            work_wait_ms: [1, 30, 300][rng.usize(..3)],
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
                    what: Hostile::draw(&mut rng),
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
        // A log that lost its last batches and then its first ones may be one that nobody can tell
        // from the one before.
        let loses_last = |(_, fault): &(u64, Fault)| {
            matches!(
                fault,
                Fault::BrokerLoses { .. } | Fault::BrokerLosesUnread { .. }
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

    /// How much happens in it.
    pub fn size(&self) -> usize {
        self.faults.len() + self.clients.iter().map(Vec::len).sum::<usize>()
    }

    /// Whether a node may have to begin with another state.
    pub fn loses_log(&self) -> bool {
        let loses =
            |(_, fault): &(u64, Fault)| matches!(fault, Fault::Lose { .. } | Fault::Trim { .. });
        self.loses_history() || self.faults.iter().any(loses)
    }

    /// The node with a changed record, if there is one.
    pub fn corrupted(&self) -> Option<usize> {
        let corrupted = |(_, fault): &(u64, Fault)| match fault {
            Fault::Corrupt { node } => Some(*node),
            _ => None,
        };
        self.faults.iter().find_map(corrupted)
    }

    /// Whether the log may lose what nodes have applied: then a node may need help.
    pub fn loses_history(&self) -> bool {
        let loses = |(_, fault): &(u64, Fault)| {
            matches!(
                fault,
                Fault::BrokerLoses { .. } | Fault::BrokerLosesUnread { .. } | Fault::Recreate
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
                hang_up_ms: (rng.u8(..12) == 0).then(|| rng.u64(0..60)),
            },
            6 | 7 => OpKind::Delete {
                hang_up_ms: (rng.u8(..12) == 0).then(|| rng.u64(0..60)),
            },
            8 | 9 => OpKind::Get,
            _ => OpKind::GetOwn,
        },
    };
    (0..rng.usize(3..50)).map(|_| op(rng)).collect()
}

/// With `history` also what takes answered writes away.
fn fault(rng: &mut fastrand::Rng, nodes: usize, clustered: bool, history: bool) -> Fault {
    let node = rng.usize(..nodes);
    let ms = [300, 2500, 9000][rng.usize(..3)];
    let ms = rng.u64(ms / 3..ms);
    match rng.u8(..if history { 42 } else { 34 }) {
        0..=2 => {
            let ways = rng.u8(1..4);
            Fault::Cut {
                node,
                mute: ways & 1 != 0,
                deaf: ways & 2 != 0,
                ms,
            }
        }
        3 => Fault::Slow { node, ms },
        4 => Fault::Apart { node, ms },
        5..=8 => Fault::Kill {
            node,
            wipe: rng.bool(),
            ms,
        },
        9 | 10 => Fault::Stop { node, ms },
        11 | 12 => Fault::BrokerAway { ms },
        13 | 14 => Fault::Trim {
            keep: rng.usize(..12),
        },
        15 => Fault::Repeat { node },
        16 => Fault::LoseAck { node },
        17 => Fault::Hold { node, ms },
        18 => Fault::BreakBackup {
            node,
            after: rng.usize(..1500),
        },
        19 => Fault::ChangeBackup {
            node,
            at: rng.usize(..1500),
        },
        20 | 21 => Fault::Lose { node },
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
        26 | 27 => Fault::Full { ms },
        28 if clustered => Fault::Gone {
            ms: rng.u64(1000..40_000),
        },
        29 if clustered => Fault::Short {
            batches: rng.u64(1..4),
            ms: rng.u64(1000..20_000),
        },
        28..=31 => Fault::Publish {
            what: Hostile::draw(rng),
        },
        32 | 33 => Fault::Suspend {
            node,
            alive: rng.bool(),
            stored: rng.bool(),
            ms: rng.u64(100..2000),
        },
        34 | 35 => Fault::BrokerLoses {
            batches: rng.usize(1..6),
        },
        36..=39 => Fault::BrokerLosesUnread {
            node,
            wipe: rng.bool(),
            ms: rng.u64(50..1000),
        },
        _ => Fault::Recreate,
    }
}
