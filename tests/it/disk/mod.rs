//! The data directory of one node, its backups, and how it recovers from them.

mod backup;
#[cfg(feature = "test-all")]
mod backup_tools;
mod backup_under_writes;
mod damaged_backups;
mod file_size_limit;
#[cfg(feature = "test-all")]
mod full_disk;
pub(crate) mod golden;
mod interrupted_backups;
mod kills;
mod recovery;
mod restore_from;
mod trim;
