//! gradestore
pub mod app;
pub mod config;
pub mod grade;
pub mod health;
pub mod http;
pub mod log;
pub mod readiness;
pub mod replication;
pub mod store;
pub mod telemetry;
