//! Keeps the invariant:
//!
//! > A replica's state is exactly its log's batches, in order, up to its position.
//!
//! Every write, whether a patch or a deletion, is applied at its batch's position in the log. That
//! includes this process' own writes. So:
//!
//! - [`Writer`] collects waiting writes into a batch and appends it to the log. It touches no
//!   record.
//! - [`Applier`] applies the log's entries in order, checks that none is missing, and answers the
//!   requests whose writes were in them. A batch that this process sent carries a ticket; the log
//!   returns its writes from memory, without decoding them.
//! - [`AppliedIndex`] is the position. A write is answered only after the position covers it, so a
//!   client that has the answer can read its write at once.
//!
//! [`ReplicaDriver`] recovers a state at a position ([`Bootstrap`]: from a snapshot, a peer's
//! backup or the whole log) and then applies the log. If the log has trimmed batches that this
//! replica has not applied, or a majority of the replicas has another digest ([`Checkpoints`]), the
//! replica becomes unready, discards its state and bootstraps again.
//!
//! If a client disconnects, its request is still written once; only the answer is dropped.

mod applied;
mod applier;
mod bootstrap;
mod buffered;
mod checkpoint;
mod complete_state;
mod driver;
pub mod memory;
pub mod peer_client;
mod peers;
mod seed;
mod snapshotter;
pub mod state;
mod tracker;
mod votes;
mod waiters;
mod writer;

pub use applied::{AppliedIndex, AtPosition, WaitError};
pub use applier::{Applier, ApplyError};
pub use bootstrap::{Attempts, Bootstrap, BootstrapError, CompleteFrom};
pub use buffered::{BufferCounts, Buffered};
pub use checkpoint::{CheckpointMetrics, Checkpoints};
pub use complete_state::{CompleteState, StateReplaced};
pub use driver::ReplicaDriver;
pub use peers::{Peer, Peers, SILENCE_MAX};
pub use seed::restore_seed;
pub use snapshotter::{LastSnapshot, Snapshotter, backup_head};
pub use tracker::{Restore, RestoreTracker, Stage};
pub use writer::{BulkWriter, PendingWrite, WriteError, Writer, WriterLimits, WriterTask};
