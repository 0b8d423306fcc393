//! The one thread that writes: takes batches, makes each durable, and only then shows it.
//!
//! When the library fails, what became of the batch at hand is not known. The thread then closes
//! the database, opens it again and looks: a batch that is there is delivered, one that is not is
//! refused. Until that is known nothing else is taken.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use fjall::{Database, PersistMode};
use tokio::sync::{oneshot, watch};

use super::shelf::{Segment, Shelf, new_segment, plain};
use super::{Shared, Sizes, format};
use crate::log::{AppendError, Batch, Entry, Seq, now_ns};

/// How often a thread that refuses batches looks whether it still must.
const LOOK_AGAIN_EVERY: Duration = Duration::from_millis(250);
/// How often it looks whether a table got written that it waits for.
const TABLE_POLL_EVERY: Duration = Duration::from_millis(2);
/// How long it waits for that; a disk that takes longer is as good as failed.
const TABLE_WAIT_MAX: Duration = Duration::from_secs(30);
/// Memory tables that may wait to be written while another fills.
const TABLES_WAITING_MAX: usize = 2;

/// A batch, and where its sender waits for the verdict.
pub(super) struct Append {
    pub(super) batch: Batch,
    pub(super) verdict: oneshot::Sender<Result<(), AppendError>>,
}

/// Where the next batch goes.
pub(super) struct Pen {
    db: Database,
    segment: Segment,
    /// Written to the segment.
    segment_bytes: u64,
    /// Written since the memory table was last handed on.
    table_bytes: u64,
}

impl Pen {
    pub(super) fn new(shelf: &Shelf) -> Option<Self> {
        let segment = shelf.segments.last()?.clone();
        Some(Self {
            db: shelf.db.clone(),
            segment_bytes: segment.keyspace.disk_space(),
            segment,
            table_bytes: 0,
        })
    }

    /// Has the memory table written to the disk, by the library's worker.
    fn hand_on(&mut self) -> fjall::Result<()> {
        self.segment.keyspace.rotate_memtable()?;
        self.table_bytes = 0;
        Ok(())
    }
}

/// A batch of which it is not known whether it is in the log.
pub(super) struct Doubt {
    entry: Entry,
    verdict: oneshot::Sender<Result<(), AppendError>>,
    /// Whether it may be written once more if it is not.
    again: bool,
}

/// The thread's state.
pub(super) struct Keeper {
    pub(super) shared: Arc<Shared>,
    /// The last durable batch, for all to see. Dropped with the thread, which closes the log.
    pub(super) end: watch::Sender<Seq>,
    /// The last batch's time.
    pub(super) time_ns: u64,
    /// `None` while the database is closed.
    pub(super) pen: Option<Pen>,
    /// The batch that a failure left in doubt.
    pub(super) doubt: Option<Doubt>,
    /// Where batches are encoded.
    pub(super) value: Vec<u8>,
}

impl Keeper {
    /// Runs until nobody can send any more, then closes the database.
    pub(super) fn run(mut self, queue: &Receiver<Append>) {
        loop {
            // In its own statement: the lock must not be held while waiting.
            let refusing = self.shared.refusal.lock().is_some();
            let received = match refusing {
                true => queue.recv_timeout(LOOK_AGAIN_EVERY),
                false => queue.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
            match received {
                Ok(append) => self.take(append),
                Err(RecvTimeoutError::Timeout) => {
                    let _ = self.ready();
                }
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        if let Some(pen) = self.pen.take()
            && let Err(error) = pen.db.persist(PersistMode::SyncAll)
        {
            tracing::error!(error = plain(&error), "log not synced at close");
        }
        self.close();
    }

    /// Makes a batch durable and shows it, or refuses it.
    fn take(&mut self, Append { batch, verdict }: Append) {
        if let Err(why) = self.ready() {
            // Who hung up needs no answer.
            let _ = verdict.send(Err(AppendError::Refused(why)));
            return;
        }
        let seq = *self.end.borrow() + 1;
        let entry = Entry {
            seq,
            // A clock that was set back must not make the log's time go back.
            time_ns: now_ns().max(self.time_ns),
            batch,
        };
        match self.write(&entry) {
            Ok(()) => {
                self.show(entry);
                let _ = verdict.send(Ok(()));
            }
            Err(error) => {
                self.fail(&error);
                self.doubt = Some(Doubt {
                    entry,
                    verdict,
                    again: true,
                });
            }
        }
    }

    /// Writes and syncs.
    fn write(&mut self, entry: &Entry) -> fjall::Result<()> {
        let sizes = self.shared.sizes;
        let pen = self.pen.as_mut().ok_or(fjall::Error::Poisoned)?;
        if pen.table_bytes >= sizes.table_bytes {
            // So that memory, and what is still to be written when the disk is nearly full, stay
            // within bounds. This is where a slow disk slows writers down.
            wait_for_tables(pen, TABLES_WAITING_MAX)?;
            pen.hand_on()?;
            if pen.segment_bytes >= sizes.segment_bytes {
                pen.segment = new_segment(&pen.db, entry.seq)?;
                pen.segment_bytes = 0;
                if let Some(shelf) = self.shared.shelf.write().as_mut() {
                    shelf.segments.push(pen.segment.clone());
                }
            }
        }
        format::write(entry, &mut self.value);
        let bytes = self.value.len() as u64;
        pen.segment_bytes += bytes;
        pen.table_bytes += bytes;
        let keyspace = &pen.segment.keyspace;
        keyspace.insert(format::key(entry.seq), self.value.as_slice())?;
        // Data is enough: fdatasync writes the file's length and where its blocks are, too; what
        // it leaves out is the time of change.
        pen.db.persist(PersistMode::SyncData)
    }

    /// Lets readers have a durable batch.
    fn show(&mut self, entry: Entry) {
        self.time_ns = entry.time_ns;
        let seq = entry.seq;
        self.shared.recent.lock().push(entry);
        self.end.send_replace(seq);
    }

    /// Whether a batch may be written now: the database is open and the disk has room.
    fn ready(&mut self) -> Result<(), Arc<str>> {
        let able = self.reopen().and_then(|()| self.room());
        let mut refusal = self.shared.refusal.lock();
        match (&able, refusal.is_some()) {
            (Err(why), false) => tracing::error!(why = &**why, "log refuses batches"),
            (Ok(()), true) => tracing::info!("log takes batches again"),
            _ => {}
        }
        *refusal = able.clone().err();
        able
    }

    /// Whether the disk has room for a batch.
    fn room(&mut self) -> Result<(), Arc<str>> {
        let Err(why) = self.shared.room() else {
            return Ok(());
        };
        // The reserve is for this: the library lets go of a journal, and of the files of dropped
        // segments that it had a part of, only when all in it is in tables. Without this a trim
        // might free nothing, and writing, which would, never begin again.
        if let Some(pen) = self.pen.as_mut()
            && pen.table_bytes > 0
            && let Err(error) = pen.hand_on()
        {
            self.fail(&error);
        }
        // It also keeps the files of dropped segments open, and their bytes taken, until it is
        // closed. The next look opens it again.
        if self.shared.dropped.swap(false, Ordering::AcqRel) {
            self.close();
        }
        Err(why)
    }

    /// Closes the database after a failure.
    fn fail(&mut self, error: &fjall::Error) {
        let why = self.failure(&plain(error));
        tracing::error!(why = &*why, "log failed");
        *self.shared.refusal.lock() = Some(why);
        self.close();
    }

    /// Closes the database, until [`reopen`](Self::reopen). Readers that need it wait.
    fn close(&mut self) {
        self.pen = None;
        *self.shared.shelf.write() = None;
    }

    fn failure(&self, why: &str) -> Arc<str> {
        let dir = self.shared.dir.display();
        format!("the log in {dir} failed: {why}; it is being reopened, check the disk").into()
    }

    /// Answers who waits for a batch that was in doubt, now that it is known whether it is there.
    fn settle(&mut self, doubt: Doubt, there: bool) -> Result<(), Arc<str>> {
        let written = match (there, doubt.again && self.room().is_ok()) {
            (true, _) => Ok(()),
            // It is not, so it can be written again: what failed was often an earlier one's table,
            // for want of room that there is now.
            (false, true) => self.write(&doubt.entry).map_err(Some),
            (false, false) => Err(None),
        };
        match written {
            Ok(()) => {
                self.show(doubt.entry);
                let _ = doubt.verdict.send(Ok(()));
                Ok(())
            }
            Err(None) => {
                let why = self.failure("the batch is not in it");
                let _ = doubt.verdict.send(Err(AppendError::Refused(why)));
                Ok(())
            }
            Err(Some(error)) => {
                self.fail(&error);
                self.doubt = Some(Doubt {
                    again: false,
                    ..doubt
                });
                Err(self.failure(&plain(&error)))
            }
        }
    }

    /// Opens the database again if it is closed, and settles the batch in doubt.
    fn reopen(&mut self) -> Result<(), Arc<str>> {
        if self.pen.is_some() {
            return Ok(());
        }
        let end = *self.end.borrow();
        let shelf = Shelf::open(&self.shared.dir).map_err(|e| self.failure(&e.to_string()))?;
        let mut pen = Pen::new(&shelf).ok_or_else(|| self.failure("it has no segment"))?;
        if shelf.id != self.shared.id || shelf.end < end {
            return Err(self.failure("batches that were in it are gone"));
        }
        // After a failed sync the system may show what the disk does not have. What opening found
        // is believed once it is in tables of their own, newly written and synced.
        wait_for_tables(&mut pen, 1).map_err(|error| self.failure(&plain(&error)))?;
        let there = shelf.end > end;
        self.shared.adopt(shelf);
        self.pen = Some(pen);
        if let Some(doubt) = self.doubt.take() {
            self.settle(doubt, there)?;
        }
        tracing::info!(end = *self.end.borrow(), "log reopened");
        Ok(())
    }
}

/// Waits until fewer than `waiting_max` memory tables wait to be written.
fn wait_for_tables(pen: &mut Pen, waiting_max: usize) -> fjall::Result<()> {
    let begun = Instant::now();
    while pen.segment.keyspace.sealed_memtable_count() >= waiting_max {
        // Writes nothing; says whether the worker that writes tables has failed.
        pen.db.persist(PersistMode::Buffer)?;
        if begun.elapsed() > TABLE_WAIT_MAX {
            return Err(fjall::Error::Io(std::io::ErrorKind::TimedOut.into()));
        }
        thread::sleep(TABLE_POLL_EVERY);
    }
    Ok(())
}

impl Sizes {
    /// What a node runs with. Memory holds up to three tables of the log, and a crash leaves as
    /// much to be read from the journal; a segment is what a trim may leave behind.
    pub(super) const NODE: Self = Self {
        table_bytes: 4 * 1024 * 1024,
        segment_bytes: 16 * 1024 * 1024,
        // Three tables that are still to be written, the one of a merge's, and room for the
        // library's own notes and for a batch in the journal.
        reserve_bytes: 24 * 1024 * 1024,
    };
}
