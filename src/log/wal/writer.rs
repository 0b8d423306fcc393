//! The thread that writes: it syncs each batch before it publishes it to readers.
//!
//! When a write or a sync fails, the batch may or may not be on the disk, and the page cache may
//! differ from the disk. The thread then starts a new segment with that batch, so that the log
//! ignores it in the old segment, and publishes it once the new segment is synced. Until then it
//! accepts no other batch.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use tokio::sync::{oneshot, watch};

use super::segment::{self, ActiveSegment, HEADER_BYTES, SegmentHeader};
use super::{WalShared, WalSizes, format, record};
use crate::log::{AppendError, Batch, BatchId, Entry, Position, RandomId, Seq, now_ns};
use crate::sys::host::disk_space;

/// The interval of retries during a write stall.
const RETRY_INTERVAL: Duration = Duration::from_millis(250);

/// A batch to append, and the channel for the result.
pub(super) struct AppendRequest {
    pub(super) batch: Batch,
    pub(super) reply: oneshot::Sender<Result<(), AppendError>>,
}

/// A batch that may or may not be on the disk.
pub(super) struct UncertainAppend {
    batch: Batch,
    reply: oneshot::Sender<Result<(), AppendError>>,
}

/// Why batches are rejected.
pub(super) struct WriteStall {
    why: Arc<str>,
    /// The length of the record that could not be written.
    record_bytes: u64,
    tried: Instant,
}

/// The state of the thread.
pub(super) struct WalWriter {
    pub(super) shared: Arc<WalShared>,
    /// The last durable batch. Dropped with the thread, which closes the log.
    pub(super) end: watch::Sender<Seq>,
    /// The last durable batch's position.
    pub(super) last: Position,
    /// The id of this process as a writer, and the sequence number of its last batch.
    pub(super) writer: RandomId,
    pub(super) written: u64,
    /// `None` after a failure: the next batch starts a segment.
    pub(super) active: Option<ActiveSegment>,
    /// The batch of a failed write.
    pub(super) uncertain: Option<UncertainAppend>,
    pub(super) stall: Option<WriteStall>,
    /// A buffer for the encoded batch.
    pub(super) record: Vec<u8>,
}

impl WalWriter {
    /// Runs until all senders are gone.
    pub(super) fn run(mut self, queue: &Receiver<AppendRequest>) {
        loop {
            let received = match self.stall.is_some() {
                true => queue.recv_timeout(RETRY_INTERVAL),
                false => queue.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
            match received {
                Ok(request) => self.append(request),
                Err(RecvTimeoutError::Timeout) => {
                    let _ = self.retry();
                }
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
    }

    /// Writes, syncs and publishes a batch, or rejects it.
    fn append(&mut self, AppendRequest { batch, reply }: AppendRequest) {
        let entry = self.retry().and_then(|()| {
            let encoded = self.encode(batch);
            encoded.inspect_err(|why| self.stall_writes(why))
        });
        let entry = match entry {
            Ok(entry) => entry,
            Err(why) => {
                // The sender may be gone.
                let _ = reply.send(Err(AppendError::Refused(why)));
                return;
            }
        };
        match self.write() {
            Ok(()) => {
                self.publish(entry);
                let _ = reply.send(Ok(()));
            }
            Err(error) => {
                let why = self.shared.failure_reason(&error);
                self.stall_writes(&why);
                if error.kind() == ErrorKind::FileTooLarge {
                    // A part of the record is missing, so the batch is not in the log.
                    let _ = reply.send(Err(AppendError::Refused(why)));
                    return;
                }
                let batch = entry.batch;
                self.uncertain = Some(UncertainAppend { batch, reply });
            }
        }
    }

    /// Encodes the next batch and reserves space for it.
    fn encode(&mut self, batch: Batch) -> Result<Entry, Arc<str>> {
        let seq = self.last.seq + 1;
        // The log's time never goes back, even if the clock does.
        let time_ns = now_ns().max(self.last.time_ns);
        self.written += 1;
        let id = BatchId {
            writer: self.writer,
            seq: self.written,
        };
        let value = |out: &mut Vec<u8>| format::write(&self.last, time_ns, id, &batch.writes, out);
        self.record.clear();
        let position = record::append(seq, value, &mut self.record)
            .map_err(|error| self.shared.failure_reason(&error))?;
        self.reserve_space(seq, self.record.len() as u64)?;
        Ok(Entry {
            position,
            batch,
            message: None,
        })
    }

    /// Reserves space for the record of batch `seq` in the active segment or in a new one. If this
    /// fails, the batch is not in the log.
    fn reserve_space(&mut self, seq: Seq, record_bytes: u64) -> Result<(), Arc<str>> {
        let sizes = self.shared.sizes;
        // Stalls while the segment still has space, because snapshots need some, too.
        self.shared.check_free_space(0)?;
        if let Some(active) = &mut self.active {
            let end = active.at + record_bytes;
            if end <= active.zeroed_end {
                return Ok(());
            }
            if end <= HEADER_BYTES + sizes.segment_bytes || active.at == HEADER_BYTES {
                let steps = (end - HEADER_BYTES).next_multiple_of(sizes.step_bytes);
                let zeroed_end = HEADER_BYTES + steps;
                self.shared
                    .check_free_space(zeroed_end - active.zeroed_end)?;
                match active.reserve_space(zeroed_end) {
                    Ok(()) => return Ok(()),
                    Err(error) => {
                        tracing::warn!(%error, "cannot extend the log's segment; starting another")
                    }
                }
            }
        }
        let space_bytes = record_bytes.next_multiple_of(sizes.step_bytes);
        self.shared.check_free_space(HEADER_BYTES + space_bytes)?;
        self.start_segment(seq, space_bytes)
    }

    /// Starts a segment with batch `seq`.
    fn start_segment(&mut self, seq: Seq, space_bytes: u64) -> Result<(), Arc<str>> {
        // Even if this fails, the new file may exist. Then the batch must not be written to the old
        // segment: recovery would ignore it there.
        self.active = None;
        let header = SegmentHeader {
            log: self.shared.log,
            base: self.shared.base,
            start: self.last,
            continues: self.last.seq > self.shared.base,
        };
        let file = segment::create(&self.shared.dir, &header, space_bytes)
            .map_err(|error| self.shared.failure_reason(&error))?;
        self.active = Some(ActiveSegment {
            file,
            at: HEADER_BYTES,
            zeroed_end: HEADER_BYTES + space_bytes,
        });
        let mut segments = self.shared.segments.lock();
        if segments.last() != Some(&seq) {
            segments.push(seq);
        }
        Ok(())
    }

    /// Writes and syncs the record in the reserved space.
    fn write(&mut self) -> io::Result<()> {
        let Some(active) = &mut self.active else {
            return Err(io::Error::other("no active segment"));
        };
        match self.shared.write(&active.file, active.at, &self.record) {
            Ok(()) => {
                active.at += self.record.len() as u64;
                Ok(())
            }
            Err(error) => {
                self.active = None;
                Err(error)
            }
        }
    }

    /// Makes a durable batch visible to readers.
    fn publish(&mut self, entry: Entry) {
        self.last = entry.position;
        let seq = entry.position.seq;
        self.shared.recent.lock().push(entry);
        self.end.send_replace(seq);
    }

    /// Rejects batches until [`retry`](Self::retry) succeeds.
    fn stall_writes(&mut self, why: &Arc<str>) {
        if self.stall.is_none() {
            tracing::error!(%why, "disk log rejects writes");
        }
        *self.shared.stall_reason.lock() = Some(Arc::clone(why));
        self.stall = Some(WriteStall {
            why: Arc::clone(why),
            record_bytes: self.record.len() as u64,
            tried: Instant::now(),
        });
    }

    /// Fails during a write stall. Tries to end it once per [`RETRY_INTERVAL`].
    fn retry(&mut self) -> Result<(), Arc<str>> {
        let Some(stall) = &self.stall else {
            return Ok(());
        };
        if stall.tried.elapsed() < RETRY_INTERVAL {
            return Err(Arc::clone(&stall.why));
        }
        let record_bytes = stall.record_bytes;
        let retried = match self.uncertain.take() {
            Some(uncertain) => self.retry_in_new_segment(uncertain),
            None => self.reserve_space(self.last.seq + 1, record_bytes),
        };
        match &retried {
            Ok(()) => self.accept_writes(),
            Err(why) => self.stall_writes(why),
        }
        retried
    }

    /// Ends a write stall.
    fn accept_writes(&mut self) {
        if self.stall.take().is_some() {
            *self.shared.stall_reason.lock() = None;
            tracing::info!("disk log accepts writes again");
        }
    }

    /// Writes the batch of a failed write as the first of a new segment.
    fn retry_in_new_segment(&mut self, uncertain: UncertainAppend) -> Result<(), Arc<str>> {
        let encoded = self.encode(uncertain.batch.clone());
        let written = encoded.and_then(|entry| {
            let written = self.write();
            written.map_err(|error| self.shared.failure_reason(&error))?;
            Ok(entry)
        });
        match written {
            Ok(entry) => {
                // Before the sender gets the result and sends the next batch.
                self.accept_writes();
                self.publish(entry);
                let _ = uncertain.reply.send(Ok(()));
                Ok(())
            }
            Err(why) => {
                self.uncertain = Some(uncertain);
                Err(why)
            }
        }
    }
}

impl WalShared {
    /// Writes over the zeros, and syncs.
    fn write(&self, file: &File, at: u64, record: &[u8]) -> io::Result<()> {
        #[cfg(test)]
        if let Some(fault) = self.fault.lock().as_mut() {
            fault(file, at, record)?;
        }
        file.write_all_at(record, at)?;
        // The length and the blocks of the file do not change, so only data must be synced.
        file.sync_data()
    }

    /// Fails if the disk has less than `bytes` plus the reserve. If the space is unknown, the write
    /// shows whether there is enough.
    fn check_free_space(&self, bytes: u64) -> Result<(), Arc<str>> {
        let dir = self.dir.display();
        let free_bytes = match disk_space(&self.dir) {
            Ok(Some(space)) => space.free,
            Ok(None) => return Ok(()),
            Err(error) => return Err(format!("cannot get the free space of {dir}: {error}").into()),
        };
        let needed_bytes = self.sizes.reserve_bytes.saturating_add(bytes);
        match free_bytes < needed_bytes {
            true => Err(format!(
                "the disk of {dir} is full: {free_bytes} bytes free, {needed_bytes} needed; free \
                 some space"
            )
            .into()),
            false => Ok(()),
        }
    }

    /// The reason for a write stall after `error`, and what to do.
    fn failure_reason(&self, error: &io::Error) -> Arc<str> {
        let dir = self.dir.display();
        match error.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
                format!("the disk of {dir} is full: {error}; free some space").into()
            }
            ErrorKind::FileTooLarge => format!(
                "writing to the log in {dir} failed: {error}; raise the limit of the file size \
                 (ulimit -f)"
            )
            .into(),
            _ => format!(
                "writing to the log in {dir} failed: {error}; retrying in a new file; check the disk"
            )
            .into(),
        }
    }
}

impl WalSizes {
    /// The sizes that a node uses.
    pub(super) const NODE: Self = Self {
        // Some hundred batches, so that zeroing is a small part of the work.
        step_bytes: 1024 * 1024,
        // A trim may leave this much.
        segment_bytes: 16 * 1024 * 1024,
        reserve_bytes: 1024 * 1024,
    };
}
