//! Keeps the invariant:
//!
//! > A replica's state is exactly its log's batches, in order, up to its position.
//!
//! No write, be it a patch or a deletion, is applied anywhere but at its batch's place in the log,
//! this process's own too. So:
//!
//! - [`Writer`] collects waiting writes into a batch and appends it to the log. It touches no
//!   record.
//! - [`Applier`] takes the log's entries one after the other, demands that each is the one after
//!   the last, applies it, and then answers the requests whose writes were in it. A batch that
//!   this process sent carries a ticket; the log hands its writes back from memory, so that nothing
//!   is decoded.
//! - [`Applied`] is the position. A reply never leaves before the position covers its write: who
//!   got one reads the write back at once.
//!
//! [`ReplicaDriver`] gets the state to a position ([`Bootstrap`]: a snapshot, a peer's backup or the
//! whole log) and keeps it there. When the log goes on without this replica, because it was away for
//! too long, or when a majority of the replicas holds something else ([`Checkpoints`]), it is not ready, discards
//! its state and recovers from a peer.
//!
//! A request whose client went away is still written once: only its answer is dropped.

mod applied;
mod applier;
mod bootstrap;
mod buffered;
mod checkpoint;
mod driver;
mod peers;
mod seed;
mod snapshotter;
mod tracker;
mod votes;
mod waiters;
mod writer;

pub use applied::{Applied, AtPosition, WaitError};
pub use applier::{Applier, ApplyError};
pub use bootstrap::{Bootstrap, BootstrapError, CompleteFrom, Tried};
pub use buffered::{BufferCounts, Buffered};
pub use checkpoint::{CheckpointMetrics, Checkpoints};
pub use driver::ReplicaDriver;
pub use peers::{Peer, Peers, SILENCE_MAX};
pub use seed::restore_seed;
pub use snapshotter::{LastSnapshot, Snapshotter, backup_head};
pub use tracker::{Restore, RestoreTracker, Stage};
pub use writer::{BulkWriter, PendingWrite, WriteError, Writer, WriterLimits, WriterTask};
