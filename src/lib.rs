//! gradestore: a replicated in-memory store of user grades.
//!
//! Comments name the decision records of `docs/internals/adr` by their numbers, as in "ADR 0002".
//!
//! Modules in dependency order, lowest first; a module uses only those above it in this list.
//!
//! - [`sys`]: thread pools, critical tasks, memory limits and disk space.
//! - [`grade`]: grades, patches and deletions. The only module that knows the fields.
//! - [`store`]: the records in memory, sharded; get, apply, scan, digest.
//! - [`log`]: the one total order of batches, as a trait, and the hash of its history. In memory, on
//!   disk (`wal`) and in a NATS stream (`jetstream`).
//! - [`backup`]: backups and snapshots: the file format, its writer and its reader.
//! - [`replication`]: the invariant, *a replica's state is exactly its log's batches, in order, up
//!   to its position*; group commit, ordered apply, recovery, snapshots, votes, readiness, the
//!   memory limit, and requests to other nodes.
//! - [`telemetry`]: logs and metrics.
//! - [`http`]: the read, write and ops port.
//! - [`node`]: a node's configuration, data directory, tasks and lifecycle.
//! - [`cli`]: flags, and the client commands.
//!
//! # One write, from socket to reply
//!
//! 1. [`http::listener`] accepts the connection. Most requests take the fast path to [`http::set`];
//!    others go through hyper and the router. [`http::set`] checks the password and readiness, and
//!    parses the body into a [`Patch`](grade::Patch).
//! 2. [`Writer::write`](replication::Writer::write) puts the write into a bounded queue and waits.
//! 3. [`WriterTask`](replication::WriterTask) collects all waiting writes into one
//!    [`Batch`](log::Batch), registers it as [in flight](log::InFlight) and appends it to the log. While
//!    a batch is in flight the next one fills, without a timer.
//! 4. The log assigns the position of the batch and delivers it. [`Applier`](replication::Applier)
//!    checks that it is the next one, applies its writes to the [`Store`](store::Store), advances the
//!    applied index and completes the requests.
//! 5. The response is 204 with the position. By then the store has the patch.

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
