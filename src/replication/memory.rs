//! The memory limit of a replica. Above it the replica rejects writes that would create a record.
//!
//! All replicas hold the same records, so without a limit a client that creates records would make
//! all of them run out of memory at about the same batch. A replica whose memory in use exceeds
//! `--memory-max` is *full* until that falls below 0.95 of the limit, and announces it. A write for
//! a user without a record is then rejected before it is submitted, by the full replica and by
//! every replica that knows of a full, ready peer. Updates and deletes are accepted. Nothing is
//! rejected when a batch is applied: the state stays a function of the log.
//!
//! The check is not exact. Creates are accepted between two samples and until peers know of the
//! full replica, and queued writes are always applied: `docs/operations/sizing.md` gives the
//! measured overshoot.
//!
//! # What counts as in use
//!
//! Resident memory, which the kernel's limits count, minus the space of deleted records that the
//! store reuses ([`Store::reusable_bytes`]). Resident memory alone does not fall when records are
//! deleted. Where the address space is limited below the memory (`ulimit -v`), the size of the address
//! space counts instead of resident memory.

use std::fs::File;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use indicatif::BinaryBytes;
use parking_lot::Mutex;
use tokio::time::MissedTickBehavior;

use crate::backup;
use crate::store::Store;
use crate::sys::host::{self, MemoryLimit};

/// How often memory is measured.
const SAMPLE_EVERY: Duration = Duration::from_millis(100);
/// A full replica accepts new users again below this percentage of its limit.
const RESUME_PERCENT: u64 = 95;
/// The minimum size of a record: 32 bytes in the store and 5 in the index.
const RECORD_BYTES_MIN: u64 = 37;

/// The value of `--memory-max`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryMax {
    /// A number of bytes.
    Bytes(u64),
    /// A percentage of the memory that the process may use.
    Percent(u8),
}

impl MemoryMax {
    /// An empty node uses 11 MiB.
    const BYTES_MIN: u64 = 16 << 20;

    /// The limit in bytes of a process that may use `limit`.
    #[must_use]
    pub fn bytes(self, limit: u64) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Percent(percent) => limit / 100 * u64::from(percent),
        }
    }
}

impl FromStr for MemoryMax {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Some(number) = text.strip_suffix('%') {
            return match number.trim_end().parse() {
                Ok(percent @ 1..=100) => Ok(Self::Percent(percent)),
                _ => Err("a percentage must be from 1% to 100%"),
            };
        }
        match parse_bytes(text) {
            Ok(bytes) if bytes >= Self::BYTES_MIN => Ok(Self::Bytes(bytes)),
            Ok(_) => Err("it must be at least 16MiB"),
            Err(error) => Err(error),
        }
    }
}

/// Parses a number of bytes, such as `8GiB`.
///
/// # Errors
/// The reason why it is invalid.
pub fn parse_bytes(text: &str) -> Result<u64, &'static str> {
    let number_end = text.find(|c: char| !c.is_ascii_digit());
    let (number, unit) = text.split_at(number_end.unwrap_or(text.len()));
    let number: u64 = number.parse().map_err(|_| "it must be a whole number")?;
    let unit_bytes: u64 = match unit.trim_start().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kb" => 1000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        "tib" => 1 << 40,
        _ => return Err("its unit must be B, kB, MB, GB, TB, KiB, MiB, GiB or TiB"),
    };
    let bytes = number.checked_mul(unit_bytes);
    bytes.ok_or("it must be less than 16EiB")
}

/// Why a write that would create a record is rejected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreFull {
    /// This replica is full.
    #[error(
        "the store is full: this replica has {} of memory in use and --memory-max is {}; new users \
         are rejected, updates and deletes are accepted; delete users, or raise --memory-max on \
         every replica",
        BinaryBytes(*.used_bytes),
        BinaryBytes(*.max_bytes)
    )]
    Here {
        /// The memory in use.
        used_bytes: u64,
        /// The limit.
        max_bytes: u64,
    },
    /// A peer is full.
    #[error(
        "the store is full: replica {url} has reached its --memory-max; new users are rejected, \
         updates and deletes are accepted; delete users, or raise --memory-max there"
    )]
    Peer {
        /// The URL of its write port.
        url: Box<str>,
    },
}

/// The records do not fit into the memory that the process may use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{records} records need at least {} of memory, and {limit} is {}; raise it or use a larger \
     machine",
    BinaryBytes(*.needed_bytes),
    BinaryBytes(.limit.bytes)
)]
pub struct DoesNotFit {
    records: u64,
    needed_bytes: u64,
    limit: MemoryLimit,
}

/// A replica's memory, as `/status` reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryUse {
    /// The memory in use; 0 where `/proc` is not mounted.
    pub used_bytes: u64,
    /// The limit.
    pub max_bytes: u64,
    /// Whether this replica is full.
    pub full: bool,
    /// Whether writes for new users are accepted: neither this replica nor a ready peer is full.
    pub creates: bool,
}

/// Decides whether writes that would create a record are accepted. Clones share the state.
#[derive(Clone)]
pub struct MemoryGuard(Arc<MemoryGuardInner>);

struct MemoryGuardInner {
    max_bytes: u64,
    limit: MemoryLimit,
    /// Whether this replica or a ready peer is full. The only field that a write reads while none
    /// is.
    rejecting: AtomicBool,
    full: AtomicBool,
    full_peer: Mutex<Option<Box<str>>>,
}

impl MemoryGuard {
    /// A guard that accepts every write until [`watch`](Self::watch) runs.
    #[must_use]
    pub fn new(max: MemoryMax) -> Self {
        let limit = host::memory_limit();
        let max_bytes = max.bytes(limit.bytes);
        if max_bytes > limit.bytes {
            tracing::warn!(
                memory_max_bytes = max_bytes,
                memory_limit_bytes = limit.bytes,
                "--memory-max is above {limit}, which ends the process first"
            );
        }
        Self(Arc::new(MemoryGuardInner {
            max_bytes,
            limit,
            rejecting: AtomicBool::new(false),
            full: AtomicBool::new(false),
            full_peer: Mutex::default(),
        }))
    }

    /// Whether a write that sets fields of `user_id` may be submitted.
    ///
    /// # Errors
    /// It would create a record, and this replica or a ready peer is full.
    pub fn admit(&self, store: &Store, user_id: &str) -> Result<(), StoreFull> {
        match self.0.rejecting.load(Ordering::Relaxed) && !store.contains(user_id) {
            true => Err(self.store_full(store)),
            false => Ok(()),
        }
    }

    #[cold]
    fn store_full(&self, store: &Store) -> StoreFull {
        match self.0.full_peer.lock().clone() {
            Some(url) if !self.is_full() => StoreFull::Peer { url },
            _ => StoreFull::Here {
                used_bytes: self.0.used_bytes(store),
                max_bytes: self.0.max_bytes,
            },
        }
    }

    /// Whether this replica is full, as it announces to its peers.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.0.full.load(Ordering::Relaxed)
    }

    /// Measures memory now.
    #[must_use]
    pub fn measure(&self, store: &Store) -> MemoryUse {
        MemoryUse {
            used_bytes: self.0.used_bytes(store),
            max_bytes: self.0.max_bytes,
            full: self.is_full(),
            creates: !self.0.rejecting.load(Ordering::Relaxed),
        }
    }

    /// Measures memory and looks for a full peer every 100 ms; never returns.
    pub async fn watch(self, store: Store, full_peer: impl Fn() -> Option<Box<str>>) {
        let mut every = tokio::time::interval(SAMPLE_EVERY);
        every.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            every.tick().await;
            self.update(self.0.sample(&store), full_peer());
        }
    }

    fn update(&self, used_bytes: u64, full_peer: Option<Box<str>>) {
        let max_bytes = self.0.max_bytes;
        let was_full = self.is_full();
        let full = is_full(was_full, used_bytes, max_bytes);
        let rejecting = full || full_peer.is_some();
        match (was_full, full) {
            (false, true) => tracing::error!(
                used_bytes,
                max_bytes,
                "store full: rejecting writes for new users; delete users or raise --memory-max"
            ),
            (true, false) => tracing::info!(
                used_bytes,
                max_bytes,
                "store not full any more: accepting writes for new users"
            ),
            _ => {}
        }
        let mut known = self.0.full_peer.lock();
        if *known != full_peer {
            match &full_peer {
                Some(peer) => {
                    tracing::warn!(peer, "a peer is full: rejecting writes for new users")
                }
                None => tracing::info!("no peer is full any more"),
            }
            *known = full_peer;
        }
        self.0.full.store(full, Ordering::Relaxed);
        self.0.rejecting.store(rejecting, Ordering::Relaxed);
    }
}

impl MemoryGuardInner {
    /// The memory in use; 0 where `/proc` is not mounted.
    fn used_bytes(&self, store: &Store) -> u64 {
        let reusable = store.reusable_bytes();
        self.counted_bytes().saturating_sub(reusable)
    }

    /// The same, without the cost of [`Store::reusable_bytes`] while it cannot change the result.
    fn sample(&self, store: &Store) -> u64 {
        let counted = self.counted_bytes();
        match is_full(true, counted, self.max_bytes) {
            true => counted.saturating_sub(store.reusable_bytes()),
            false => counted,
        }
    }

    fn counted_bytes(&self) -> u64 {
        let memory = host::process_memory();
        memory.map_or(0, |memory| memory.counted_by(self.limit.kind))
    }
}

fn is_full(was_full: bool, used_bytes: u64, max_bytes: u64) -> bool {
    match was_full {
        true => used_bytes >= max_bytes / 100 * RESUME_PERCENT,
        false => used_bytes > max_bytes,
    }
}

/// Checks that `records` more fit into the memory that the process may use. This is a lower bound:
/// long ids and wide values need more.
///
/// # Errors
/// They do not fit.
pub fn check_fits(records: u64) -> Result<(), DoesNotFit> {
    let limit = host::memory_limit();
    let in_use = host::process_memory().map_or(0, |memory| memory.counted_by(limit.kind));
    fits(records, in_use, limit)
}

fn fits(records: u64, in_use: u64, limit: MemoryLimit) -> Result<(), DoesNotFit> {
    let records_bytes = records.saturating_mul(RECORD_BYTES_MIN);
    let needed_bytes = in_use.saturating_add(records_bytes);
    match needed_bytes <= limit.bytes {
        true => Ok(()),
        false => Err(DoesNotFit {
            records,
            needed_bytes,
            limit,
        }),
    }
}

/// The same for the backup at `path`. Returns `Ok` if it can't be read, because restoring it will
/// report why.
///
/// # Errors
/// Its records do not fit.
pub fn check_file_fits(path: &Path) -> Result<(), DoesNotFit> {
    let head = File::open(path).ok().map(backup::read_head);
    let Some(Ok(Some(head))) = head else {
        return Ok(());
    };
    check_fits(head.rows_expected)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grade::{Changes, Patch};
    use crate::sys::host::MemoryLimitKind;

    #[test]
    fn sizes_are_bytes_with_a_unit_or_a_percentage() {
        for (text, wanted) in [
            ("16777216", MemoryMax::Bytes(16 << 20)),
            ("900MB", MemoryMax::Bytes(900_000_000)),
            ("900 mb", MemoryMax::Bytes(900_000_000)),
            ("8GiB", MemoryMax::Bytes(8 << 30)),
            ("16777216B", MemoryMax::Bytes(16 << 20)),
            ("1TB", MemoryMax::Bytes(1_000_000_000_000)),
            ("80%", MemoryMax::Percent(80)),
            ("100%", MemoryMax::Percent(100)),
        ] {
            assert_eq!(text.parse(), Ok(wanted), "{text}");
        }
        for (text, why) in [
            ("", "whole number"),
            ("MB", "whole number"),
            ("-1GB", "whole number"),
            ("1.5GB", "unit"),
            ("8G", "unit"),
            ("8GiB/s", "unit"),
            ("15MiB", "at least 16MiB"),
            ("0%", "1% to 100%"),
            ("101%", "1% to 100%"),
            ("300%", "1% to 100%"),
            ("16777216TiB", "less than 16EiB"),
        ] {
            let error = text.parse::<MemoryMax>().unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
        assert_eq!(MemoryMax::Percent(80).bytes(1000), 800);
        assert_eq!(MemoryMax::Bytes(7).bytes(1000), 7);
    }

    #[test]
    fn a_replica_is_full_above_its_limit_until_below_95_percent_of_it() {
        let mut full = false;
        for (used, wanted) in [
            (950, false),
            (1000, false),
            (1001, true),
            (1000, true),
            (950, true),
            (949, false),
            (1000, false),
            (2000, true),
            (0, false),
        ] {
            full = is_full(full, used, 1000);
            assert_eq!(full, wanted, "{used}");
        }
    }

    #[test]
    fn a_full_replica_and_one_with_a_full_peer_reject_only_new_users() {
        let guard = MemoryGuard::new(MemoryMax::Bytes(1000));
        let store = Store::new();
        store.apply(&Patch {
            user_id: "known",
            changes: Changes::default(),
        });
        let admits = || [guard.admit(&store, "known"), guard.admit(&store, "new")];
        assert_eq!(admits(), [Ok(()), Ok(())]);
        guard.update(1001, None);
        let [known, new] = admits();
        assert_eq!(known, Ok(()));
        assert!(matches!(
            new,
            Err(StoreFull::Here {
                max_bytes: 1000,
                ..
            })
        ));
        assert!(guard.is_full() && !guard.measure(&store).creates);
        // A peer's state is not announced as this replica's.
        guard.update(0, Some("http://peer".into()));
        let url = "http://peer".into();
        assert_eq!(admits(), [Ok(()), Err(StoreFull::Peer { url })]);
        assert!(!guard.is_full() && !guard.measure(&store).creates);
        guard.update(0, None);
        assert_eq!(admits(), [Ok(()), Ok(())]);
        assert!(guard.measure(&store).creates);
    }

    #[test]
    fn the_error_of_a_backup_that_does_not_fit_says_how_much_it_needs() {
        let limit = MemoryLimit {
            bytes: 1 << 30,
            kind: MemoryLimitKind::ControlGroup,
        };
        assert_eq!(fits(10_000_000, 11 << 20, limit), Ok(()));
        let error = fits(40_000_000, 11 << 20, limit).unwrap_err().to_string();
        assert_eq!(
            error,
            "40000000 records need at least 1.39 GiB of memory, and the memory limit of the control \
             group is 1.00 GiB; raise it or use a larger machine"
        );
        assert!(fits(u64::MAX, 0, limit).is_err());
    }
}
