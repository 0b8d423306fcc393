//! Operations: the command line, the ops port, logs, limits and shutdown.

pub(crate) mod logs;
pub(crate) mod memory_max;
pub(crate) mod sd_notify;

mod cli;
#[cfg(feature = "test-all")]
mod curl;
mod endpoints;
mod import;
#[cfg(feature = "test-all")]
mod page;
mod shutdown;
mod signals;
