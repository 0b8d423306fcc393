//! Integration tests: nodes as child processes or in this process, used through sockets, signals
//! and the command line.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "a test may panic, its helpers too"
)]

mod harness;

mod api;
#[cfg(feature = "test-all")]
mod cluster;
mod disk;
mod ops;

mod fifth_field;
mod kept_inputs;
mod layers;
