//! A node's log, with a pause where blocking work reads its id.

use std::sync::Arc;

use futures_util::future::BoxFuture;
use gradestore::log::{
    Announce, Announcement, Answers, AppendError, Batch, Bounds, Entry, JetStreamLog, Log,
    LogCounts, LogId, Position, ReadError, Seq, Subscription, TrimError, WalStatus,
};
use gradestore::sys::tasks::TaskEnded;

use crate::coroutine;
use crate::world::World;

/// Forwards every call. A snapshot reads the log's id after its position and before the records, so
/// simulated time passes between the two.
pub struct PausedLog {
    pub log: JetStreamLog,
    pub world: World,
}

impl Log for PausedLog {
    fn kind(&self) -> &'static str {
        self.log.kind()
    }

    fn id(&self) -> LogId {
        coroutine::pause(self.world.runtime(), self.world.pause(0..40));
        self.log.id()
    }

    fn first(&self) -> Seq {
        self.log.first()
    }

    fn end(&self) -> Seq {
        self.log.end()
    }

    fn in_flight_max(&self) -> usize {
        self.log.in_flight_max()
    }

    fn append(&self, batch: Batch) -> BoxFuture<'_, Result<(), AppendError>> {
        self.log.append(batch)
    }

    fn unwritable(&self) -> Option<Arc<str>> {
        self.log.unwritable()
    }

    fn reject(&self) -> Option<Arc<str>> {
        self.log.reject()
    }

    fn check_append(&self) {
        self.log.check_append();
    }

    fn is_verified(&self) -> bool {
        self.log.is_verified()
    }

    fn set_verified(&self) {
        self.log.set_verified();
    }

    fn failed(&self) -> BoxFuture<'_, TaskEnded> {
        self.log.failed()
    }

    fn problem(&self) -> Option<Arc<str>> {
        self.log.problem()
    }

    fn counts(&self) -> LogCounts {
        self.log.counts()
    }

    fn fetch_bounds(&self) -> BoxFuture<'_, Result<Bounds, ReadError>> {
        self.log.fetch_bounds()
    }

    fn announce(&self, announce: Announce) {
        self.log.announce(announce);
    }

    fn peers(&self) -> BoxFuture<'_, Vec<Announcement>> {
        self.log.peers()
    }

    fn is_replicated(&self) -> bool {
        self.log.is_replicated()
    }

    fn trim(&self, through: Seq) -> BoxFuture<'_, Result<(), TrimError>> {
        self.log.trim(through)
    }

    fn record(&self, previous: &Position, entry: &Entry, own: Option<Answers>) {
        self.log.record(previous, entry, own);
    }

    fn quarantine_wal(&self, why: &'static str) -> BoxFuture<'_, ()> {
        self.log.quarantine_wal(why)
    }

    fn sync_wal(&self) -> BoxFuture<'_, ()> {
        self.log.sync_wal()
    }

    fn wal_replayed(&self) -> BoxFuture<'_, ()> {
        self.log.wal_replayed()
    }

    fn wal_status(&self) -> Option<WalStatus> {
        self.log.wal_status()
    }

    fn subscribe(
        &self,
        after: Position,
    ) -> BoxFuture<'_, Result<Box<dyn Subscription>, ReadError>> {
        self.log.subscribe(after)
    }
}
