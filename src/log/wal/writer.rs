//! The one thread that writes: takes batches, makes each durable, and only then shows it.
//!
//! When a write or a sync fails, what became of the batch is not known: what the system shows of the
//! file need not be what the disk has. The thread then begins a new segment with that batch, which
//! takes it out of the old one whatever is there, and shows it once that has synced. Until then
//! nothing else is taken.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use tokio::sync::{oneshot, watch};

use super::recovery::Pen;
use super::segment::{self, HEADER_BYTES, Header};
use super::{Shared, Sizes, format, record};
use crate::log::{AppendError, Batch, BatchId, Entry, Position, RandomId, Seq, now_ns};
use crate::sys::host::disk_space;

/// How often a thread that refuses batches looks whether it still must.
const LOOK_AGAIN_EVERY: Duration = Duration::from_millis(250);

/// A batch, and where its sender waits for the verdict.
pub(super) struct Append {
    pub(super) batch: Batch,
    pub(super) verdict: oneshot::Sender<Result<(), AppendError>>,
}

/// A batch of which it is not known whether it is in the log.
pub(super) struct Doubt {
    batch: Batch,
    verdict: oneshot::Sender<Result<(), AppendError>>,
}

/// Why no batch is taken.
pub(super) struct Refusing {
    why: Arc<str>,
    /// The length of the record that there was no room for.
    record_bytes: u64,
    looked: Instant,
}

/// The thread's state.
pub(super) struct Keeper {
    pub(super) shared: Arc<Shared>,
    /// The last durable batch, for all to see. Dropped with the thread, which closes the log.
    pub(super) end: watch::Sender<Seq>,
    /// The last durable batch's position.
    pub(super) last: Position,
    /// This process, as the writer of its batches, and how many it has written.
    pub(super) writer: RandomId,
    pub(super) written: u64,
    /// `None` after a failure: what is written next begins a segment.
    pub(super) pen: Option<Pen>,
    /// The batch that a failure left in doubt.
    pub(super) doubt: Option<Doubt>,
    pub(super) refusing: Option<Refusing>,
    /// Where batches are encoded.
    pub(super) record: Vec<u8>,
}

impl Pen {
    /// Makes room up to `end`. After an error nothing may be written here any more: what the file
    /// has from its last record on is not known.
    fn make_room(&mut self, end: u64) -> io::Result<()> {
        let made = segment::write_zeros(&self.file, self.room_end, end);
        if let Err(error) = made.and_then(|()| self.file.sync_all()) {
            // Others may need what was taken of the disk.
            let _ = self.file.set_len(self.room_end);
            return Err(error);
        }
        self.room_end = end;
        Ok(())
    }
}

impl Keeper {
    /// Runs until nobody can send any more.
    pub(super) fn run(mut self, queue: &Receiver<Append>) {
        loop {
            let received = match self.refusing.is_some() {
                true => queue.recv_timeout(LOOK_AGAIN_EVERY),
                false => queue.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
            match received {
                Ok(append) => self.take(append),
                Err(RecvTimeoutError::Timeout) => {
                    let _ = self.look_again();
                }
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
    }

    /// Makes a batch durable and shows it, or refuses it.
    fn take(&mut self, Append { batch, verdict }: Append) {
        let entry = self.look_again().and_then(|()| {
            let placed = self.place(batch);
            placed.inspect_err(|why| self.refuse(why))
        });
        let entry = match entry {
            Ok(entry) => entry,
            Err(why) => {
                // Who hung up needs no answer.
                let _ = verdict.send(Err(AppendError::Refused(why)));
                return;
            }
        };
        match self.write() {
            Ok(()) => {
                self.show(entry);
                let _ = verdict.send(Ok(()));
            }
            Err(why) => {
                self.refuse(&why);
                let batch = entry.batch;
                self.doubt = Some(Doubt { batch, verdict });
            }
        }
    }

    /// Encodes a batch as the next one and makes room for it.
    fn place(&mut self, batch: Batch) -> Result<Entry, Arc<str>> {
        let seq = self.last.seq + 1;
        // A clock that was set back must not make the log's time go back.
        let time_ns = now_ns().max(self.last.time_ns);
        self.written += 1;
        let id = BatchId {
            writer: self.writer,
            seq: self.written,
        };
        let value = |out: &mut Vec<u8>| format::write(&self.last, time_ns, id, &batch.writes, out);
        let position = record::write(seq, value, &mut self.record)
            .map_err(|error| self.shared.failure(&error))?;
        self.make_room(seq, self.record.len() as u64)?;
        Ok(Entry { position, batch })
    }

    /// Makes sure that the record of batch `seq` fits where the pen is. Nothing of it is written yet,
    /// so when this fails the batch is not in the log.
    fn make_room(&mut self, seq: Seq, record_bytes: u64) -> Result<(), Arc<str>> {
        let sizes = self.shared.sizes;
        // Said while there is still room here: what this node writes beside the log needs some as well.
        self.shared.ask_for(0)?;
        if let Some(pen) = &mut self.pen {
            let end = pen.at + record_bytes;
            if end <= pen.room_end {
                return Ok(());
            }
            if end <= HEADER_BYTES + sizes.segment_bytes || pen.at == HEADER_BYTES {
                let steps = (end - HEADER_BYTES).next_multiple_of(sizes.step_bytes);
                let room_end = HEADER_BYTES + steps;
                self.shared.ask_for(room_end - pen.room_end)?;
                match pen.make_room(room_end) {
                    Ok(()) => return Ok(()),
                    Err(error) => tracing::warn!(%error, "log's file does not grow"),
                }
            }
        }
        let room_bytes = record_bytes.next_multiple_of(sizes.step_bytes);
        self.shared.ask_for(HEADER_BYTES + room_bytes)?;
        self.begin(seq, room_bytes)
    }

    /// Begins a segment with batch `seq`.
    fn begin(&mut self, seq: Seq, room_bytes: u64) -> Result<(), Arc<str>> {
        // If this fails the new file may be there all the same. Then the old one must not get this
        // batch: at the next start it would count for nothing.
        self.pen = None;
        let header = Header {
            log: self.shared.log,
            base: self.shared.base,
            start: self.last,
        };
        let file = segment::create(&self.shared.dir, &header, room_bytes)
            .map_err(|error| self.shared.failure(&error))?;
        self.pen = Some(Pen {
            file,
            at: HEADER_BYTES,
            room_end: HEADER_BYTES + room_bytes,
        });
        let mut segments = self.shared.segments.lock();
        if segments.last() != Some(&seq) {
            segments.push(seq);
        }
        Ok(())
    }

    /// Writes and syncs the record, for which there is room.
    fn write(&mut self) -> Result<(), Arc<str>> {
        let Some(pen) = &mut self.pen else {
            return Err(self.shared.failure(&io::Error::other("it is not open")));
        };
        match self.shared.write(&pen.file, pen.at, &self.record) {
            Ok(()) => {
                pen.at += self.record.len() as u64;
                Ok(())
            }
            Err(error) => {
                self.pen = None;
                Err(self.shared.failure(&error))
            }
        }
    }

    /// Lets readers have a durable batch.
    fn show(&mut self, entry: Entry) {
        self.last = entry.position;
        let seq = entry.position.seq;
        self.shared.recent.lock().push(entry);
        self.end.send_replace(seq);
    }

    /// Takes no batch any more, until [`look_again`](Self::look_again) finds that it can.
    fn refuse(&mut self, why: &Arc<str>) {
        if self.refusing.is_none() {
            tracing::error!(%why, "log refuses batches");
        }
        *self.shared.refusal.lock() = Some(Arc::clone(why));
        self.refusing = Some(Refusing {
            why: Arc::clone(why),
            record_bytes: self.record.len() as u64,
            looked: Instant::now(),
        });
    }

    /// Whether a batch may be taken now: looks, now and then, whether what kept it is over.
    fn look_again(&mut self) -> Result<(), Arc<str>> {
        let Some(refusing) = &self.refusing else {
            return Ok(());
        };
        if refusing.looked.elapsed() < LOOK_AGAIN_EVERY {
            return Err(Arc::clone(&refusing.why));
        }
        let record_bytes = refusing.record_bytes;
        let able = match self.doubt.take() {
            Some(doubt) => self.settle(doubt),
            None => self.make_room(self.last.seq + 1, record_bytes),
        };
        match &able {
            Ok(()) => self.accept(),
            Err(why) => self.refuse(why),
        }
        able
    }

    /// Takes batches again.
    fn accept(&mut self) {
        if self.refusing.take().is_some() {
            *self.shared.refusal.lock() = None;
            tracing::info!("log takes batches again");
        }
    }

    /// Writes the batch in doubt at the begin of a new segment.
    fn settle(&mut self, doubt: Doubt) -> Result<(), Arc<str>> {
        let placed = self.place(doubt.batch.clone());
        let written = placed.and_then(|entry| self.write().map(|()| entry));
        match written {
            Ok(entry) => {
                // Before its sender hears of it and sends the next.
                self.accept();
                self.show(entry);
                let _ = doubt.verdict.send(Ok(()));
                Ok(())
            }
            Err(why) => {
                self.doubt = Some(doubt);
                Err(why)
            }
        }
    }
}

impl Shared {
    /// Writes over zeros, and syncs.
    fn write(&self, file: &File, at: u64, record: &[u8]) -> io::Result<()> {
        #[cfg(test)]
        if let Some(fault) = self.fault.lock().as_mut() {
            fault(file, at, record)?;
        }
        file.write_all_at(record, at)?;
        // Neither the file's length nor its blocks change; the time of change need not be synced.
        file.sync_data()
    }

    /// Whether the disk has `bytes` for the log.
    fn ask_for(&self, bytes: u64) -> Result<(), Arc<str>> {
        let dir = self.dir.display();
        let free_bytes = match disk_space(&self.dir) {
            Ok(room) => room.free,
            Err(error) => return Err(format!("the disk of {dir} can't be asked: {error}").into()),
        };
        let wanted_bytes = self.sizes.reserve_bytes.saturating_add(bytes);
        match free_bytes < wanted_bytes {
            true => Err(format!(
                "the disk of {dir} is full: {free_bytes} bytes free, {wanted_bytes} are wanted for \
                 the log to go on; free some"
            )
            .into()),
            false => Ok(()),
        }
    }

    /// Why nothing is taken after `error`, and what to do.
    fn failure(&self, error: &io::Error) -> Arc<str> {
        let dir = self.dir.display();
        match error.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
                format!("the disk of {dir} is full: {error}; free some").into()
            }
            _ => format!(
                "the log in {dir} failed: {error}; it is tried again in a new file, check the disk"
            )
            .into(),
        }
    }
}

impl Sizes {
    /// What a node runs with.
    pub(super) const NODE: Self = Self {
        // Of some hundred batches, so that making room is a small part of what they take.
        step_bytes: 1024 * 1024,
        // What a trim may leave behind.
        segment_bytes: 16 * 1024 * 1024,
        reserve_bytes: 1024 * 1024,
    };
}
