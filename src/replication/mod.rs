//! Keeps the invariant:
//!
//! > A replica's state is exactly its log's batches, in order, up to its position.
//!
//! No write, be it a patch or a deletion, is applied anywhere but at its batch's place in the log,
//! this process's own too. So:
//!
//! - [`Writer`] collects waiting writes into a batch and appends it to the log. It touches no
//!   record.
//! - [`Reader`] takes the log's entries one after the other, demands that each is the one after
//!   the last, applies it, and then answers the requests whose writes were in it. A batch that
//!   this process sent is known by its origin and number; the log hands its writes back as they
//!   were, where it still has them, so that nothing is decoded.
//! - [`Applied`] is the position. A reply never leaves before the position covers its write: who
//!   got one reads the write back at once.
//!
//! [`Follower`] gets the state to a position ([`Bootstrap`]: a snapshot, a peer's backup or the whole
//! log) and keeps it there. When the log goes on without this replica, because it was away for too
//! long, or when its peers say that it holds something else than they do ([`Checkpoints`]), it is
//! not ready, and begins anew.
//!
//! A request that went away loses nothing and doubles nothing: its write stays in its batch, only
//! nobody hears the answer.

mod applied;
mod bootstrap;
mod buffered;
mod checkpoint;
mod follower;
mod own;
mod peers;
mod reader;
mod seed;
mod snapshotter;
mod tracker;
mod waiters;
mod writer;

pub use applied::{Applied, AtPosition, Position, WaitError};
pub use bootstrap::{Bootstrap, BootstrapError, Tried};
pub use buffered::{BufferCounts, Buffered};
pub use checkpoint::{CheckpointMetrics, Checkpoints};
pub use follower::Follower;
pub use own::OwnBatches;
pub use peers::{Peer, Peers, SILENCE_MAX};
pub use reader::{Reader, ReaderError};
pub use seed::restore_seed;
pub use snapshotter::{LastSnapshot, Snapshotter, backup_head};
pub use tracker::{Restore, RestoreTracker, Stage};
pub use writer::{Bulk, HandedIn, WriteError, Writer, WriterLimits, WriterTask};
