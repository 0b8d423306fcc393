//! A node as its clients and operators meet it: through sockets, signals and its command line.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "a test may panic, its helpers too"
)]

mod broker;
mod browser;
mod clients;
mod disk;
mod fake_peer;
mod harness;
mod held_log;
mod nats;
mod proxy;
mod seeded;
mod small_disk;
mod throttle;
mod wire;

mod backup;
mod bootstrap;
mod broken_off;
mod broker_faults;
mod broker_refusals;
mod cli;
mod cluster;
mod concurrency;
mod creation;
mod damaged;
mod delete;
mod divergence;
mod drain;
mod durable;
mod fifth_field;
mod full_disk;
mod get;
mod hostile;
mod import;
mod kept_inputs;
mod layers;
mod limits;
mod linearizable;
mod lines;
mod log_faults;
mod logs;
mod memory_max;
mod openapi;
mod ops;
mod outrun;
mod page;
mod peers;
mod plain;
mod recover;
mod restart;
mod restore_from;
mod set;
mod stages;
mod stall;
mod supervisor;
mod three_servers;
mod trim;
mod under_writes;
mod unreadable_header;
mod votes;
mod write_health;
