//! Interfaces to the operating system and to libraries.
//!
//! - [`exec`]: thread pools for blocking work, with their priorities.
//! - [`files`]: new files that only this user can read.
//! - [`tasks`]: tasks whose failure ends the process.
//! - [`host`]: memory limits and disk space.
//! - [`progress`]: a progress bar.
//! - [`signals`]: signals that would end the process.
//! - `backoff`, `cancellable_reader`, `hex`, `json`, `sync`: small wrappers.

pub(crate) mod backoff;
pub(crate) mod cancellable_reader;
pub mod exec;
pub mod files;
pub(crate) mod hex;
pub mod host;
pub(crate) mod json;
pub mod progress;
pub mod signals;
pub(crate) mod sync;
pub mod tasks;
