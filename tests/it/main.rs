//! A node as its clients and operators meet it: through sockets, signals and its command line.
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
