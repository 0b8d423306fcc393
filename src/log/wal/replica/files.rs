//! The files of a replica's WAL: opens, writes, trims and quarantines them. All calls block.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
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
/// A longer file is no segment: the last write to one has at most one record beyond a chunk.
const FILE_BYTES_MAX: u64 = 64 << 20;
/// No log has so many batches.
const SEQ_MAX: Seq = 1 << 62;
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
    /// The last batch of a valid record after a damaged one.
    pub(super) known_end: Seq,
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

/// A log of which `dir` holds a WAL, other than `ignored`; `None` if there is none.
///
/// # Errors
/// A directory cannot be read.
pub fn log_of_wal(dir: &Path, ignored: Option<&LogId>) -> io::Result<Option<LogId>> {
    let logs = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        logs => logs?,
    };
    for entry in logs {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let log = LogId(name.into());
        let is_log = RandomId::parse(&log.0).is_some() && Some(&log) != ignored;
        if is_log && !segment::list(&path)?.segments.is_empty() {
            return Ok(Some(log));
        }
    }
    Ok(None)
}

/// The header of a segment, or why it is invalid.
fn read_header(file: &File) -> io::Result<Result<SegmentHeader, String>> {
    let mut header = Vec::new();
    segment::read_at(file, 0, HEADER_BYTES as usize, &mut header)?;
    let header = SegmentHeader::read(&header);
    let bytes = file.metadata()?.len();
    Ok(header.and_then(|header| match header.start.seq {
        ..SEQ_MAX if bytes <= FILE_BYTES_MAX => Ok(header),
        ..SEQ_MAX => Err(format!("it has {bytes} bytes")),
        seq => Err(format!("it begins after batch {seq}")),
    }))
}

/// Opens the WAL of `log`.
pub(super) fn open(config: &WalConfig, log: RandomId) -> io::Result<(RunWriter, WalFiles)> {
    fs::create_dir_all(&config.dir)?;
    let found = segment::list(&config.dir)?;
    for unfinished in &found.unfinished {
        fs::remove_file(unfinished)?;
    }
    let (mut files, mut is_broken) = (WalFiles::default(), false);
    for first in found.segments {
        let path = segment::path(&config.dir, first);
        let file = File::open(&path)?;
        match read_header(&file)? {
            Ok(header) if header.log == log && header.first() == first => {
                files.segments.push(SegmentInfo {
                    start: header.start,
                    continues: header.continues && !is_broken,
                    bytes: file.metadata()?.len(),
                });
                is_broken = false;
            }
            found => {
                let why = found
                    .err()
                    .unwrap_or_else(|| "it belongs elsewhere".to_owned());
                tracing::error!(path = %path.display(), why, "WAL segment is damaged");
                quarantine(&path, "damaged")?;
                is_broken = true;
            }
        }
    }
    let mut writer = RunWriter::default();
    writer.open_newest(config, &mut files)?;
    segment::sync_dir(&config.dir)?;
    Ok((writer, files))
}

/// Opens the newest segment and truncates it after its last valid record. Quarantines it if a valid
/// record cannot be understood, as one of a newer program.
fn open_segment(
    config: &WalConfig,
    newest: &mut SegmentInfo,
    known_end: &mut Seq,
) -> io::Result<Option<ActiveFile>> {
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
    let rest = bytes.get(at..).unwrap_or_default();
    let steps = (0..rest.len()).step_by(record::ALIGNMENT);
    let later = steps.filter_map(|at| record::read(rest.get(at..)?));
    if let Some(later) = later.map(|record| record.seq).max() {
        // The stream has these batches, unless the broker has lost them.
        let damaged = last.seq + 1;
        let copy = unused(&path, "damaged")?;
        tracing::error!(copy = %copy.display(), damaged, later, "a record of the WAL is damaged");
        fs::copy(&path, copy)?;
        *known_end = later.max(*known_end);
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
    /// Opens the newest segment that can be read.
    fn open_newest(&mut self, config: &WalConfig, files: &mut WalFiles) -> io::Result<()> {
        (self.active, files.last) = (None, None);
        let WalFiles {
            segments,
            last,
            known_end,
        } = files;
        while let Some(newest) = segments.last_mut() {
            if let Some(active) = open_segment(config, newest, known_end)? {
                *last = Some(active.last);
                self.active = Some(active);
                return Ok(());
            }
            segments.pop();
        }
        Ok(())
    }

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
        let mut continues = self.active.as_ref().is_some_and(joins);
        let last = files.lock().last;
        if !continues && last.is_some_and(|last| chunk.previous.seq < last.seq) {
            // The stream delivers batches that these segments should contain: they have a hole or
            // another history.
            self.quarantine_from(config, files, chunk.previous.seq, "superseded")?;
            self.open_newest(config, &mut files.lock())?;
            loop {
                let newest = files.lock().segments.last().copied();
                let is_ahead = |active: &ActiveFile| active.last.seq > chunk.previous.seq;
                let is_ahead = self.active.as_ref().is_some_and(is_ahead);
                let Some(newest) = newest.filter(|_| is_ahead) else {
                    break;
                };
                self.quarantine_from(config, files, newest.start.seq, "superseded")?;
                self.open_newest(config, &mut files.lock())?;
            }
            continues = self.active.as_ref().is_some_and(joins);
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
            // Somebody may have removed it.
            if let Some(written) = found(fs::metadata(&path))? {
                let age = SystemTime::now().duration_since(written.modified()?);
                if age.unwrap_or_default() < KEEP_FOR {
                    return Ok(());
                }
                found(fs::remove_file(&path))?;
            }
            files.lock().segments.remove(0);
        }
    }

    /// Renames the segments whose records all come after `seq`, so that nothing reads them again.
    pub(super) fn quarantine_from(
        &mut self,
        config: &WalConfig,
        files: &Mutex<WalFiles>,
        seq: Seq,
        why: &str,
    ) -> io::Result<()> {
        self.active = None;
        loop {
            let newest = files.lock().segments.last().copied();
            let Some(newest) = newest.filter(|newest| newest.start.seq >= seq) else {
                break;
            };
            quarantine(&segment::path(&config.dir, newest.start.seq + 1), why)?;
            files.lock().segments.pop();
        }
        if seq == 0 {
            let mut files = files.lock();
            (files.last, files.known_end) = (None, 0);
        }
        segment::sync_dir(&config.dir)
    }
}

/// `None` if the file does not exist.
fn found<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        result => result.map(Some),
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
    tracing::warn!(path = %path.display(), why, "WAL segment quarantined");
    fs::rename(path, unused(path, why)?)
}

/// `path` with the extension `why`, and a number if that exists.
fn unused(path: &Path, why: &str) -> io::Result<PathBuf> {
    let mut unused = path.with_added_extension(why);
    let mut count = 1;
    while unused.try_exists()? {
        count += 1;
        unused = path.with_added_extension(format!("{why}-{count}"));
    }
    Ok(unused)
}

/// Why the record after `last` in `bytes` cannot be read.
pub(super) fn damaged(last: &Position) -> ReadError {
    ReadError::damaged(last.seq + 1, "the WAL ends before it or is damaged there")
}
