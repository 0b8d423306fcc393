//! Replicas and nats-servers as processes.

pub(crate) mod forged_messages;

mod bootstrap;
mod broker_errors;
mod broker_faults;
mod clients;
mod divergence;
mod fake_peer;
mod golden;
mod http;
mod kills_during_bootstrap;
mod linearizable;
mod log_faults;
mod memory_max;
mod password;
mod peers;
mod replication;
mod restarts;
mod sd_notify;
mod slow_restores;
mod stream_creation;
mod streams;
mod three_servers;
mod unreadable_headers;
mod wal;
mod write_health;
