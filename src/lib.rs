//! gradestore: a replicated in-memory store of user grades.
//!
//! Modules in dependency order, lowest first; a module uses only those above it in this list.
//!
//! - [`sys`]: thread pools, critical tasks, control groups and disks.
//! - [`grade`]: grades, patches and deletions. The only module that knows the fields.
//! - [`store`]: the records in memory, sharded; get, apply, scan, digest.
//! - [`log`]: the one total order of batches, as a trait, and the hash of its history. In memory, on
//!   disk (`wal`) and in a NATS stream (`jetstream`).
//! - [`backup`]: the store as a file: format, reading, writing, snapshots.
//! - [`replication`]: the invariant, *a replica's state is exactly its log's batches, in order, up
//!   to its applied index*; group commit, ordered apply, recovery, snapshots, votes, readiness, the
//!   memory limit, and requests to other nodes.
//! - [`telemetry`]: logs and metrics.
//! - [`http`]: three ports.
//! - [`node`]: a node's configuration, data directory, tasks and life.
//! - [`cli`]: flags, and the client commands.
//!
//! # One write, from socket to reply
//!
//! 1. [`http::listener`] accepts the connection. Most requests take the fast path to [`http::set`];
//!    hyper and the router bring any other there. The password and readiness are checked, and the body
//!    is parsed into a [`Patch`](grade::Patch).
//! 2. [`Writer::write`](replication::Writer::write) puts the write into a bounded queue and waits.
//! 3. [`WriterTask`](replication::WriterTask) takes all that waits as one [`Batch`](log::Batch),
//!    registers it as [in flight](log::InFlight) and appends it to the log. While a batch is in flight
//!    the next one fills: there is no timer.
//! 4. The log gives the batch its position and delivers it. [`Applier`](replication::Applier) checks
//!    that it is the next one, applies its writes to the [`Store`](store::Store), advances the applied
//!    index and answers the requests.
//! 5. 204 goes out with the position. The store holds the patch since before that.

pub mod backup;
pub mod cli;
pub mod grade;
pub mod http;
pub mod log;
pub mod node;
pub mod replication;
pub mod store;
pub mod sys;
pub mod telemetry;
