//! The files of a replica's WAL: opens, writes, trims and quarantines them. All calls block.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;

use super::super::segment::{self, HEADER_BYTES, SegmentHeader};
use super::super::{format, record};
use super::{RecordChunk, WalConfig};
use crate::log::{LogId, Position, RandomId, ReadError, Seq};
use crate::sys::files;
use crate::sys::host::disk_space;

/// When a segment is full. The last write to it may exceed this.
const SEGMENT_BYTES: u64 = if cfg!(test) { 8 << 10 } else { 16 << 20 };
/// Segments that were written during this time are kept: a client of the log may still read them.
const KEEP_FOR: Duration = Duration::from_secs(600);
/// With less free space, only those segments are kept that a start needs.
const FREE_BYTES_MIN: u64 = 64 << 20;

/// The segments, in order, and the end of the newest one.
#[derive(Default)]
pub(super) struct WalFiles {
    pub(super) segments: Vec<SegmentInfo>,
    /// The last position that was written; `None` before the first.
    pub(super) last: Option<Position>,
}

/// A segment.
#[derive(Debug, Clone, Copy)]
pub(super) struct SegmentInfo {
    /// The position before its first record.
    pub(super) start: Position,
    /// Whether it continues the segment before it.
    pub(super) continues: bool,
    pub(super) bytes: u64,
}

impl WalFiles {
    /// The position before the newest run.
    pub(super) fn run_start(&self) -> Option<Position> {
        let newest = self.segments.iter().rposition(|segment| !segment.continues);
        Some(self.segments.get(newest.unwrap_or(0))?.start)
    }

    pub(super) fn bytes(&self) -> u64 {
        self.segments.iter().map(|segment| segment.bytes).sum()
    }
}

/// Writes the newest segment.
#[derive(Default)]
pub(super) struct RunWriter {
    /// `None` after a failure: the next record begins a run.
    active: Option<ActiveFile>,
    /// Segments that end at or before this position are not needed to start.
    pub(super) needed_after: Seq,
}

struct ActiveFile {
    file: File,
    /// The end of its last record.
    at: u64,
    last: Position,
}

/// The log of the newest segment of a replica's WAL in `dir`; `None` if there is no segment.
///
/// # Errors
/// A file cannot be read, or no segment has a valid header.
pub fn log_of_wal(dir: &Path) -> io::Result<Option<LogId>> {
    let found = match segment::list(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        found => found?,
    };
    let mut damaged = None;
    for first in found.segments.into_iter().rev() {
        let header = read_header(&File::open(segment::path(dir, first))?)?;
        match header {
            Ok(header) => return Ok(Some(LogId(header.log.to_string().into()))),
            Err(why) => damaged = Some(io::Error::other(why)),
        }
    }
    damaged.map_or(Ok(None), Err)
}

/// The header of a segment, or why it is invalid.
fn read_header(file: &File) -> io::Result<Result<SegmentHeader, String>> {
    let mut header = Vec::new();
    segment::read_at(file, 0, HEADER_BYTES as usize, &mut header)?;
    Ok(SegmentHeader::read(&header))
}

/// Opens the WAL of `log`.
pub(super) fn open(config: &WalConfig, log: RandomId) -> io::Result<(RunWriter, WalFiles)> {
    fs::create_dir_all(&config.dir)?;
    let found = segment::list(&config.dir)?;
    for unfinished in &found.unfinished {
        fs::remove_file(unfinished)?;
    }
    let mut files = WalFiles::default();
    for first in found.segments {
        let path = segment::path(&config.dir, first);
        let file = File::open(&path)?;
        match read_header(&file)? {
            Ok(header) if header.log == log && header.first() == first => {
                files.segments.push(SegmentInfo {
                    start: header.start,
                    continues: header.continues,
                    bytes: file.metadata()?.len(),
                });
            }
            Ok(_) => quarantine(&path, "other-log")?,
            Err(why) => {
                tracing::error!(path = %path.display(), why, "WAL segment is damaged");
                quarantine(&path, "damaged")?;
            }
        }
    }
    let mut writer = RunWriter::default();
    while let Some(newest) = files.segments.last_mut() {
        match open_newest(config, newest)? {
            Some(active) => {
                files.last = Some(active.last);
                writer.active = Some(active);
                break;
            }
            None => drop(files.segments.pop()),
        }
    }
    segment::sync_dir(&config.dir)?;
    Ok((writer, files))
}

/// Opens the newest segment and truncates it after its last valid record. Quarantines it if a valid
/// record cannot be understood, as one of a newer program.
fn open_newest(config: &WalConfig, newest: &mut SegmentInfo) -> io::Result<Option<ActiveFile>> {
    let path = segment::path(&config.dir, newest.start.seq + 1);
    let file = File::options().read(true).write(true).open(&path)?;
    let mut bytes = Vec::new();
    segment::read_at(&file, 0, newest.bytes as usize, &mut bytes)?;
    let (mut last, mut at) = (newest.start, HEADER_BYTES as usize);
    while let Some(record) = bytes.get(at..).and_then(record::read)
        && record.seq == last.seq + 1
    {
        match format::position(&last, record.value) {
            Ok(position) => last = position,
            Err(error) => {
                tracing::error!(path = %path.display(), %error, "cannot read the WAL");
                quarantine(&path, "unreadable")?;
                return Ok(None);
            }
        }
        at += record.bytes;
    }
    if at < bytes.len() {
        let (seq, cut_bytes) = (last.seq, bytes.len() - at);
        tracing::warn!(
            seq,
            cut_bytes,
            "truncated the WAL after its last valid record"
        );
        file.set_len(at as u64)?;
    }
    file.sync_all()?;
    newest.bytes = at as u64;
    Ok(Some(ActiveFile {
        file,
        at: at as u64,
        last,
    }))
}

impl RunWriter {
    /// Writes and syncs `chunks`. After an error the next record begins a run.
    pub(super) fn write(
        &mut self,
        config: &WalConfig,
        log: RandomId,
        files: &Mutex<WalFiles>,
        chunks: &[RecordChunk],
    ) -> io::Result<()> {
        let written = (|| {
            for chunk in chunks.iter().filter(|chunk| !chunk.records.is_empty()) {
                self.write_chunk(config, log, files, chunk)?;
            }
            match &self.active {
                Some(active) => active.file.sync_data(),
                None => Ok(()),
            }
        })();
        if written.is_err() {
            self.active = None;
        }
        written
    }

    fn write_chunk(
        &mut self,
        config: &WalConfig,
        log: RandomId,
        files: &Mutex<WalFiles>,
        chunk: &RecordChunk,
    ) -> io::Result<()> {
        let joins = |active: &ActiveFile| active.last.is_same(&chunk.previous);
        let continues = self.active.as_ref().is_some_and(joins);
        let is_behind = files
            .lock()
            .last
            .is_some_and(|last| chunk.previous.seq < last.seq);
        if !continues && is_behind {
            // The stream delivered what these files should have had.
            self.quarantine_all(config, files, "superseded")?;
        }
        if !continues
            || self
                .active
                .as_ref()
                .is_none_or(|active| active.at >= SEGMENT_BYTES)
        {
            self.start_segment(config, log, files, &chunk.previous, continues)?;
        }
        let Some(active) = &mut self.active else {
            return Err(io::Error::other("no active segment"));
        };
        active.file.write_all_at(&chunk.records, active.at)?;
        active.at += chunk.records.len() as u64;
        active.last = chunk.last;
        let mut files = files.lock();
        files.last = Some(chunk.last);
        if let Some(newest) = files.segments.last_mut() {
            newest.bytes = active.at;
        }
        Ok(())
    }

    fn start_segment(
        &mut self,
        config: &WalConfig,
        log: RandomId,
        files: &Mutex<WalFiles>,
        start: &Position,
        continues: bool,
    ) -> io::Result<()> {
        // The new segment must not survive a crash that the end of the old one does not.
        if let Some(full) = &self.active {
            full.file.sync_data()?;
        }
        let is_short = |bytes: u64| bytes < FREE_BYTES_MIN;
        if disk_space(&config.dir)?.is_some_and(|space| is_short(space.free)) {
            self.trim(config, files, 0)?;
        }
        let header = SegmentHeader {
            log,
            base: 0,
            start: *start,
            continues,
        };
        let file = segment::create(&config.dir, &header, 0)?;
        self.active = Some(ActiveFile {
            file,
            at: HEADER_BYTES,
            last: *start,
        });
        let mut files = files.lock();
        // One without a record may have had this name.
        files
            .segments
            .retain(|segment| segment.start.seq != start.seq);
        files.segments.push(SegmentInfo {
            start: *start,
            continues,
            bytes: HEADER_BYTES,
        });
        files.last = Some(*start);
        Ok(())
    }

    /// Removes the oldest segments that no start needs while there are more than `keep_bytes`.
    pub(super) fn trim(
        &mut self,
        config: &WalConfig,
        files: &Mutex<WalFiles>,
        keep_bytes: u64,
    ) -> io::Result<()> {
        loop {
            let oldest = match &*files.lock() {
                all if all.bytes() <= keep_bytes => return Ok(()),
                WalFiles { segments, .. } => match segments.as_slice() {
                    [oldest, next, ..] if next.start.seq <= self.needed_after => *oldest,
                    _ => return Ok(()),
                },
            };
            let path = segment::path(&config.dir, oldest.start.seq + 1);
            let written = fs::metadata(&path).and_then(|metadata| metadata.modified());
            let age = SystemTime::now().duration_since(written?);
            if age.unwrap_or_default() < KEEP_FOR {
                return Ok(());
            }
            fs::remove_file(&path)?;
            files.lock().segments.remove(0);
        }
    }

    /// Renames all segments, so that nothing reads them again.
    pub(super) fn quarantine_all(
        &mut self,
        config: &WalConfig,
        files: &Mutex<WalFiles>,
        why: &str,
    ) -> io::Result<()> {
        self.active = None;
        let quarantined = std::mem::take(&mut *files.lock());
        for segment in quarantined.segments {
            quarantine(&segment::path(&config.dir, segment.start.seq + 1), why)?;
        }
        segment::sync_dir(&config.dir)
    }
}

/// Checks that a segment could be started in `dir`.
pub(super) fn check_writable(dir: &Path) -> io::Result<()> {
    let path = dir.join("check.new");
    let checked = files::create(&path).and_then(|file| {
        segment::write_zeros(&file, 0, HEADER_BYTES)?;
        file.sync_all()
    });
    let removed = fs::remove_file(&path);
    checked.and(removed)
}

/// Renames the segment at `path`. The file itself is unchanged.
fn quarantine(path: &Path, why: &str) -> io::Result<()> {
    let mut quarantined = path.with_added_extension(why);
    let mut count = 1;
    while quarantined.try_exists()? {
        count += 1;
        quarantined = path.with_added_extension(format!("{why}-{count}"));
    }
    tracing::warn!(path = %path.display(), why, "WAL segment quarantined");
    fs::rename(path, quarantined)
}

/// Why the record after `last` in `bytes` cannot be read.
pub(super) fn damaged(last: &Position) -> ReadError {
    ReadError::damaged(last.seq + 1, "the WAL ends before it or is damaged there")
}
