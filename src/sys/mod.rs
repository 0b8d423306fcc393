//! What the modules above need of the system and of libraries.
//!
//! - [`exec`]: thread pools for blocking work, with their priorities.
//! - [`tasks`]: tasks whose end is the end of the process.
//! - [`host`]: control groups, processors and disks.

pub(crate) mod backoff;
pub(crate) mod cancellable_reader;
pub mod exec;
pub(crate) mod hex;
pub mod host;
pub(crate) mod json;
pub mod progress;
pub(crate) mod sync;
pub mod tasks;
