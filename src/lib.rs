//! gradestore: a replicated in-memory store of user grades.
//!
//! A map of the rooms, from the bottom up. An arrow goes one way, from a room to those above it in
//! this list; none knows what comes after it.
//!
//! - [`grade`]: what a grade, a patch and a deletion are. The only room that knows the fields.
//! - [`blocking`]: where work goes that blocks a thread.
//! - [`store`]: the records in memory, sharded; get, apply, scan, digest.
//! - [`log`]: the one total order of batches, as a trait and its kinds.
//! - [`backup`]: the store as a file: format, reading, writing, snapshots.
//! - [`memory`]: the memory limit: whether a write may create a record.
//! - [`remote`]: another node, asked over HTTP.
//! - [`readiness`]: whether this replica may answer, and if not, why.
//! - [`replication`]: the invariant, *a replica's state is exactly its log's batches, in order, up
//!   to its position*; group commit on the way in, ordered apply on the way out; getting to a
//!   position at the start, and snapshots.
//! - [`http`]: three ports; [`telemetry`]: logs and metrics; [`machine`]: what it gives the process;
//!   [`progress`]: bars; [`supervisor`]: what systemd is told.
//! - [`storage`]: the data directory; [`config`]: from flags to what a node is built from; [`node`]:
//!   its parts and tasks; [`app`]: its ports and its life.
//! - [`fetch`], [`import`] and [`health`]: what the program does from outside a node.
//!
//! # One write, from socket to reply
//!
//! 1. [`http::listener`] has accepted the connection and sees what comes first: a plain request, as
//!    nearly all are, goes to [`http::write`] at once. Any other is read by hyper, and the router hands
//!    it to the same room. There the password and readiness are checked and the body is parsed into a
//!    [`Patch`](grade::Patch).
//! 2. [`Writer::write`](replication::Writer::write) puts the write into a bounded queue and waits.
//! 3. [`WriterTask`](replication::WriterTask) takes all that waits as one
//!    [`Batch`](log::Batch), notes who waits for it and appends it to the log. While batches
//!    are under way the next one fills: there is no timer.
//! 4. The log gives the batch its place. [`Reader`](replication::Reader) gets it back, sees that
//!    it is the next one and its own, applies the writes to the [`Store`](store::Store), moves
//!    the position on and answers the requests.
//! 5. 204 goes out with the position. The store has held the patch since before that.

pub mod app;
pub mod backup;
pub mod blocking;
pub mod config;
pub mod critical;
pub mod fetch;
pub mod grade;
pub mod health;
mod hex;
pub mod http;
pub mod import;
mod json;
pub mod log;
pub mod machine;
pub mod memory;
pub mod node;
pub mod progress;
pub mod readiness;
pub mod remote;
pub mod replication;
pub mod storage;
pub mod store;
pub mod supervisor;
mod sync;
pub mod telemetry;
