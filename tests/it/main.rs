//! A node as its clients and operators meet it: through sockets, signals and its command line.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test may panic, its helpers too"
)]

mod broker;
mod harness;
mod held_log;
mod proxy;
mod wire;

mod broker_faults;
mod cli;
mod cluster;
mod concurrency;
mod drain;
mod fifth_field;
mod get;
mod hostile;
mod limits;
mod log_faults;
mod ops;
mod set;
mod stall;
