//! Reads the format that this program writes: one thread reads the members, others inflate and
//! parse them.

use std::io::Read;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;

use parking_lot::Mutex;
use xxhash_rust::xxh3::Xxh3Default;

use super::error::BackupError;
use super::format::{EndRecord, FORMAT, HeadRecord, POSITION_MAX};
use super::member::{self, FIXED_BYTES, MemberKind, MemberRecord, START_BYTES, TRAILER_BYTES};
use super::parallelism::threads_for;
use super::progress::{ReadProgress, RowSink, Summary};
use super::row;
use crate::grade::Digest;
use crate::log::Seq;
use crate::store::RecordBatch;

/// The longest FNAME of the first member.
const NAME_BYTES_MAX: usize = 256;

/// A member of rows before it is inflated.
struct RowsMember {
    /// Its offset in the file.
    at: u64,
    first_row: u64,
    fields: usize,
    text_bytes: usize,
    rows: u32,
    /// The deflate stream and the trailer.
    bytes: Vec<u8>,
}

/// Reads one file.
pub(super) struct NativeReader<'a, R> {
    source: R,
    /// Bytes read so far.
    at: u64,
    /// The checksum of the members before the last.
    hash: Xxh3Default,
    progress: &'a ReadProgress,
}

impl<'a, R: Read> NativeReader<'a, R> {
    pub(super) fn new(source: R, progress: &'a ReadProgress) -> Self {
        Self {
            source,
            at: 0,
            hash: Xxh3Default::new(),
            progress,
        }
    }

    /// Bytes read so far.
    pub(super) fn at(&self) -> u64 {
        self.at
    }

    /// Reads the whole file with at most `threads_max` parsing threads.
    pub(super) fn read(
        mut self,
        threads_max: usize,
        sink: &RowSink<'_>,
    ) -> Result<Summary, BackupError> {
        let (head, fields) = self.read_head()?;
        self.progress.set_fields(0..fields);
        self.progress.set_head(head.clone());
        let threads = threads_for(head.rows_expected).min(threads_max);
        let (end, rows, checksum, digest) = match threads {
            1 => self.read_sequential(fields, sink)?,
            _ => self.read_parallel(threads, fields, sink)?,
        };
        self.finish(head, end, rows, digest, checksum)
    }

    /// On this thread only, so that the order of rows is that of the file.
    fn read_sequential(
        &mut self,
        fields: usize,
        sink: &RowSink<'_>,
    ) -> Result<(EndRecord, u64, u128, Digest), BackupError> {
        let progress = self.progress;
        let mut parser = MemberParser::new(sink, progress);
        let (end, rows, checksum) =
            self.read_members(fields, &mut |member| parser.parse(&member))?;
        Ok((end, rows, checksum, parser.digest))
    }

    fn read_parallel(
        &mut self,
        threads: usize,
        fields: usize,
        sink: &RowSink<'_>,
    ) -> Result<(EndRecord, u64, u128, Digest), BackupError> {
        let progress = self.progress;
        let digest = Mutex::new(Digest::default());
        let (sender, queue) = sync_channel::<RowsMember>(threads);
        let queue = Mutex::new(queue);
        let failed = AtomicBool::new(false);
        let (end, rows, checksum) = thread::scope(|scope| {
            let parsers: Vec<_> = (0..threads)
                .map(|_| {
                    scope.spawn(|| {
                        let parse = AssertUnwindSafe(|| parse_members(&queue, sink, progress));
                        let parsed = catch_unwind(parse);
                        if !matches!(parsed, Ok(Ok(_))) {
                            failed.store(true, Ordering::Relaxed);
                            // Drain the queue, so that the reading thread does not block on it.
                            while queue.lock().recv().is_ok() {}
                        }
                        let parsed = parsed.unwrap_or_else(|panic| resume_unwind(panic));
                        parsed.map(|added| *digest.lock() += added)
                    })
                })
                .collect();
            let read = self.read_members(fields, &mut |member| {
                // Stops the reading. The parser's own error is returned instead of this one.
                let at = member.at;
                let what = "a member could not be parsed";
                match sender.send(member).is_err() || failed.load(Ordering::Relaxed) {
                    true => Err(BackupError::Damaged { at, what }),
                    false => Ok(()),
                }
            });
            drop(sender);
            let mut parsed = Ok(());
            for parser in parsers {
                let ended = parser.join().unwrap_or_else(|panic| resume_unwind(panic));
                parsed = parsed.and(ended);
            }
            // A parser's error takes precedence, because it stopped the reading.
            parsed.and(read)
        })?;
        Ok((end, rows, checksum, digest.into_inner()))
    }

    /// Reads the first member. Returns its record, and the number of fields per row.
    pub(super) fn read_head(&mut self) -> Result<(HeadRecord, usize), BackupError> {
        let at = self.at;
        let damaged = |what| BackupError::Damaged { at, what };
        let (header, record) = self.read_header()?;
        let MemberRecord::Head(head) = record else {
            return Err(damaged("the first member is missing"));
        };
        if head.format > FORMAT {
            return Err(BackupError::Newer {
                found: head.format,
                known: FORMAT,
            });
        }
        check_positions(0, head.position)?;
        if head.log_id.chars().any(char::is_control) {
            return Err(damaged("the log id has a control character"));
        }
        let mut first = header;
        while self.read_exact(1, &mut first)?.is_none_or(|byte| byte != 0) {
            if first.len() > FIXED_BYTES + usize::from(u16::MAX) + NAME_BYTES_MAX {
                return Err(damaged("the name in the first gzip header is too long"));
            }
        }
        self.read_exact(5, &mut first)?;
        let length = match first.last_chunk::<5>() {
            Some([1, low, high, not_low, not_high]) if [!low, !high] == [*not_low, *not_high] => {
                usize::from(u16::from_le_bytes([*low, *high]))
            }
            _ => return Err(damaged("the header row is not one stored deflate block")),
        };
        let mut text = Vec::new();
        self.read_exact(length, &mut text)?;
        let mut trailer = Vec::new();
        self.read_exact(TRAILER_BYTES, &mut trailer)?;
        // Compares with what this program would write. The end's checksum covers the rest.
        let mut expected = Vec::new();
        member::write_head(&mut expected, &head, &text);
        first.extend_from_slice(&text);
        first.extend_from_slice(&trailer);
        if expected != first {
            return Err(damaged("the first member has changed"));
        }
        self.hash.update(&first);
        let line =
            std::str::from_utf8(&text).map_err(|_| damaged("the header row is not UTF-8"))?;
        let fields = row::parse_header(line)?;
        Ok((head, fields))
    }

    /// Passes the members of rows to `pass_on`. Returns the end record, the number of rows before
    /// it and the checksum.
    fn read_members(
        &mut self,
        fields: usize,
        pass_on: &mut dyn FnMut(RowsMember) -> Result<(), BackupError>,
    ) -> Result<(EndRecord, u64, u128), BackupError> {
        let mut rows_before = 0;
        loop {
            let at = self.at;
            let damaged = |what| BackupError::Damaged { at, what };
            let (header, record) = self.read_header()?;
            match record {
                MemberRecord::Head(_) => return Err(damaged("a second first member")),
                MemberRecord::Rows {
                    member_bytes,
                    text_bytes,
                    rows,
                } => {
                    let (member_bytes, text_bytes) = (member_bytes as usize, text_bytes as usize);
                    if member_bytes > member::MEMBER_BYTES_MAX
                        || text_bytes > member::TEXT_BYTES_MAX
                    {
                        return Err(damaged("the declared length of a member exceeds the limit"));
                    }
                    let rest = member_bytes.checked_sub(header.len());
                    let rest = rest.filter(|rest| *rest > TRAILER_BYTES);
                    let rest = rest.ok_or(damaged(
                        "the declared length of a member is less than its header",
                    ))?;
                    let mut bytes = Vec::with_capacity(rest);
                    self.read_exact(rest, &mut bytes)?;
                    self.hash.update(&header);
                    self.hash.update(&bytes);
                    pass_on(RowsMember {
                        at,
                        first_row: rows_before + 1,
                        fields,
                        text_bytes,
                        rows,
                        bytes,
                    })?;
                    rows_before += u64::from(rows);
                }
                MemberRecord::End(end) => {
                    let mut last = header;
                    self.read_exact(2 + TRAILER_BYTES, &mut last)?;
                    let mut expected = Vec::new();
                    member::write_end(&mut expected, &end);
                    if expected != last {
                        return Err(damaged("the last member has changed"));
                    }
                    return Ok((end, rows_before, self.hash.digest128()));
                }
            }
        }
    }

    /// Checks the end record.
    fn finish(
        mut self,
        head: HeadRecord,
        end: EndRecord,
        rows: u64,
        digest: Digest,
        checksum: u128,
    ) -> Result<Summary, BackupError> {
        check_positions(head.position, end.position)?;
        let at = self.at;
        let more = (&mut self.source).take(1).read_to_end(&mut Vec::new());
        if more.map_err(|error| BackupError::Io { at, error })? > 0 {
            return Err(BackupError::Trailing { at });
        }
        let checks = [
            ("row counts", end.rows.to_string(), rows.to_string()),
            ("digests", end.digest.clone(), digest.to_string()),
            (
                "checksums",
                end.checksum.clone(),
                format!("{checksum:032x}"),
            ),
        ];
        for (what, recorded, found) in checks {
            if recorded != found {
                return Err(BackupError::Mismatch {
                    what,
                    recorded,
                    found,
                });
            }
        }
        Ok(Summary {
            records: Some((head, end)),
            rows,
            digest,
            bytes: at,
        })
    }

    /// Reads a member's header up to the end of FEXTRA, and parses that.
    pub(super) fn read_header(&mut self) -> Result<(Vec<u8>, MemberRecord), BackupError> {
        let at = self.at;
        let damaged = |what| BackupError::Damaged { at, what };
        let mut header = Vec::with_capacity(64);
        self.read_exact(START_BYTES, &mut header)?;
        let MemberKind::Native(extra_bytes) = member::kind_of(&header) else {
            return Err(damaged("the next gzip member is not one of gradestore"));
        };
        let rest = (FIXED_BYTES + 2 + extra_bytes).checked_sub(START_BYTES);
        self.read_exact(
            rest.ok_or(damaged("an extra field is too short"))?,
            &mut header,
        )?;
        let extra = header.get(FIXED_BYTES + 2..).unwrap_or_default();
        let record = member::parse_extra(extra).map_err(damaged)?;
        Ok((header, record))
    }

    /// Appends exactly the next `wanted` bytes. Returns the last one.
    pub(super) fn read_exact(
        &mut self,
        wanted: usize,
        bytes: &mut Vec<u8>,
    ) -> Result<Option<u8>, BackupError> {
        let read = (&mut self.source).take(wanted as u64).read_to_end(bytes);
        let read = read.map_err(|error| BackupError::Io { at: self.at, error })?;
        self.at += read as u64;
        self.progress.set_bytes(self.at);
        match read == wanted {
            true => Ok(bytes.last().copied()),
            false => Err(BackupError::Truncated { at: self.at }),
        }
    }
}

/// Checks a position against the one before it and against the highest one.
pub(super) fn check_positions(previous: Seq, position: Seq) -> Result<(), BackupError> {
    match (previous..=POSITION_MAX).contains(&position) {
        true => Ok(()),
        false => Err(BackupError::Position { position, previous }),
    }
}

/// Parses members from the queue until it ends. Returns the digest of their rows.
fn parse_members(
    queue: &Mutex<Receiver<RowsMember>>,
    sink: &RowSink<'_>,
    progress: &ReadProgress,
) -> Result<Digest, BackupError> {
    let mut parser = MemberParser::new(sink, progress);
    loop {
        let member = queue.lock().recv();
        let Ok(member) = member else {
            return Ok(parser.digest);
        };
        parser.parse(&member)?;
    }
}

/// Inflates and parses members, with buffers that it reuses.
struct MemberParser<'a> {
    sink: &'a RowSink<'a>,
    progress: &'a ReadProgress,
    inflate: libdeflater::Decompressor,
    text: Vec<u8>,
    rows: RecordBatch,
    /// The sum of the rows' digests so far.
    digest: Digest,
}

impl<'a> MemberParser<'a> {
    fn new(sink: &'a RowSink<'a>, progress: &'a ReadProgress) -> Self {
        Self {
            sink,
            progress,
            inflate: libdeflater::Decompressor::new(),
            text: Vec::new(),
            rows: RecordBatch::default(),
            digest: Digest::default(),
        }
    }

    fn parse(&mut self, member: &RowsMember) -> Result<(), BackupError> {
        let damaged = |what| BackupError::Damaged {
            at: member.at,
            what,
        };
        let split = member.bytes.len().saturating_sub(TRAILER_BYTES);
        let (deflated, trailer) = member.bytes.split_at(split);
        let (inflate, text) = (&mut self.inflate, &mut self.text);
        member::inflate(deflated, trailer, member.text_bytes, inflate, text).map_err(damaged)?;
        let text = std::str::from_utf8(text).map_err(|_| damaged("a member is not UTF-8"))?;
        let (batch, sink, progress) = (&mut self.rows, self.sink, self.progress);
        batch.clear();
        let mut first_row = member.first_row;
        let mut pass_on = |batch: &mut RecordBatch| {
            progress.set_line(row::line_of(first_row));
            first_row += batch.len() as u64;
            self.digest += sink(batch);
            batch.clear();
        };
        let rows = row::parse(text, member.fields, member.first_row, |row| {
            batch.push(row.user_id, row.values);
            if batch.is_full() {
                pass_on(batch);
            }
        })?;
        pass_on(batch);
        if rows != member.rows {
            return Err(damaged(
                "a member does not have the declared number of rows",
            ));
        }
        self.progress.add_rows(u64::from(member.rows));
        Ok(())
    }
}
