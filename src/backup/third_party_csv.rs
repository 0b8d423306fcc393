//! Reads gzip CSV files of other programs: any number of members, columns in any order, quoted or
//! not, LF or CRLF. Accepts all common forms at the cost of speed.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

use async_compression::tokio::bufread::GzipDecoder;
use csv_async::{AsyncReaderBuilder, StringRecord, Trim};
use futures_util::FutureExt;
use parking_lot::Mutex;
use tokio::io::{AsyncRead, BufReader, ReadBuf};

use super::error::BackupError;
use super::progress::{ReadProgress, RowSink, Summary};
use super::row::Row;
use crate::grade::{Digest, FIELDS, USER_ID, Values, check_user_id};
use crate::store::RecordBatch;

/// The longest row. Stops early on a small file that inflates to one endless row.
const ROW_BYTES_MAX: u64 = 64 * 1024;
/// How far csv-async and the decoder may read ahead of the current row.
const AHEAD_BYTES: u64 = 64 * 1024;

/// Adapts a blocking reader to an async one that is always ready.
struct AlwaysReady<R> {
    source: R,
    bytes: Arc<AtomicU64>,
}

impl<R: Read + Unpin> AsyncRead for AlwaysReady<R> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = self.source.read(buffer.initialize_unfilled())?;
        buffer.advance(read);
        self.bytes.fetch_add(read as u64, Ordering::Relaxed);
        Poll::Ready(Ok(()))
    }
}

/// Fails when the current row is longer than [`ROW_BYTES_MAX`].
struct RowLimiter<R> {
    source: R,
    bytes_read: u64,
    /// The end of the last complete row, which the parser updates.
    row_end: Arc<AtomicU64>,
    lines: Arc<Mutex<LineEnds>>,
}

/// The ends of lines in the text. csv-async's own count is late after `\r\n`: it reads the `\n`
/// together with the next row.
#[derive(Default)]
struct LineEnds {
    /// The number of lines that ended before the last parsed row.
    before: u64,
    /// The offsets of later line ends, as far as the text was read.
    ends: VecDeque<u64>,
}

impl LineEnds {
    /// The line of the row that ends, including its line break, before `end`.
    fn of_row(&mut self, end: u64) -> u64 {
        while self
            .ends
            .pop_front_if(|line_end| *line_end + 1 < end)
            .is_some()
        {
            self.before += 1;
        }
        self.before + 1
    }
}

impl<R: AsyncRead + Unpin> AsyncRead for RowLimiter<R> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let allowed = self.row_end.load(Ordering::Relaxed) + ROW_BYTES_MAX + AHEAD_BYTES;
        if self.bytes_read > allowed {
            let why = format!("a row is longer than {ROW_BYTES_MAX} bytes");
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, why)));
        }
        let before = buffer.filled().len();
        let polled = Pin::new(&mut self.source).poll_read(cx, buffer);
        let read = buffer.filled().get(before..).unwrap_or_default();
        let breaks = (self.bytes_read..)
            .zip(read)
            .filter(|(_, byte)| **byte == b'\n');
        self.lines.lock().ends.extend(breaks.map(|(at, _)| at));
        self.bytes_read += read.len() as u64;
        polled
    }
}

/// The columns of the file.
struct ColumnMap {
    user_id: usize,
    /// The column of each of [`FIELDS`]. Missing ones read as 0.
    fields: Vec<Option<usize>>,
}

impl ColumnMap {
    fn of(header: &StringRecord) -> Result<Self, BackupError> {
        let wrong = |what: String| BackupError::Header { what };
        let mut user_id = None;
        let mut fields = vec![None; FIELDS.len()];
        for (at, name) in header.iter().enumerate() {
            // Some programs write a byte order mark.
            let name = if at == 0 {
                name.trim_start_matches('\u{feff}')
            } else {
                name
            };
            let slot = match FIELDS.iter().position(|field| *field == name) {
                Some(index) => fields.get_mut(index),
                None if name == USER_ID => Some(&mut user_id),
                None => None,
            };
            let Some(slot) = slot else {
                let name: String = name.chars().take(40).collect();
                return Err(wrong(format!("unknown column {name:?}")));
            };
            if slot.replace(at).is_some() {
                return Err(wrong(format!("column {name} appears twice")));
            }
        }
        match user_id {
            Some(user_id) => Ok(Self { user_id, fields }),
            None => Err(wrong(format!("column {USER_ID} is missing"))),
        }
    }

    fn width(&self) -> usize {
        1 + self.fields.iter().flatten().count()
    }

    fn row<'a>(
        &self,
        record: &'a StringRecord,
        row: u64,
        line: u64,
    ) -> Result<Row<'a>, BackupError> {
        let wrong = |column, what| BackupError::Value {
            row,
            line,
            column,
            what,
        };
        let user_id = record.get(self.user_id).unwrap_or_default();
        check_user_id(user_id).map_err(|error| wrong(USER_ID, error.to_string()))?;
        let mut values = Values::default();
        for ((value, at), name) in values.iter_mut().zip(&self.fields).zip(FIELDS) {
            let Some(text) = at.and_then(|at| record.get(at)) else {
                continue;
            };
            let digits = text.strip_prefix('-').unwrap_or(text);
            let plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
            let number = plain.then(|| text.parse().ok()).flatten();
            let shown: String = text.chars().take(40).collect();
            *value =
                number.ok_or_else(|| wrong(name, format!("{shown:?} is not a 64-bit integer")))?;
        }
        Ok(Row { user_id, values })
    }
}

pub(super) fn read(
    source: impl Read + Unpin + Send,
    sink: &RowSink<'_>,
    progress: &ReadProgress,
) -> Result<Summary, BackupError> {
    let bytes = Arc::new(AtomicU64::new(0));
    let row_end = Arc::new(AtomicU64::new(0));
    let lines = Arc::<Mutex<LineEnds>>::default();
    let source = AlwaysReady {
        source,
        bytes: Arc::clone(&bytes),
    };
    let mut inflated = GzipDecoder::new(BufReader::with_capacity(64 * 1024, source));
    // The default silently stops after the first member.
    inflated.multiple_members(true);
    let bounded = RowLimiter {
        source: inflated,
        bytes_read: 0,
        row_end: Arc::clone(&row_end),
        lines: Arc::clone(&lines),
    };
    let mut csv = AsyncReaderBuilder::new()
        .flexible(true)
        .has_headers(false)
        .trim(Trim::None)
        .create_reader(bounded);
    let mut record = StringRecord::new();
    let mut rows = 0;
    let mut digest = Digest::default();
    let mut batch = RecordBatch::default();
    let mut columns = None;
    // No reader in this chain is ever pending, so one poll per record is enough.
    let mut next = |record: &mut StringRecord, row: u64| -> Result<bool, BackupError> {
        let read = csv.read_record(record).now_or_never();
        let more = read
            .unwrap_or(Ok(false))
            .map_err(|error| BackupError::Unreadable {
                row,
                error: error.to_string(),
            })?;
        row_end.store(csv.position().byte(), Ordering::Relaxed);
        Ok(more)
    };
    while next(&mut record, rows)? {
        let Some(columns) = &columns else {
            let named = ColumnMap::of(&record)?;
            let there = named.fields.iter().enumerate();
            progress.set_fields(there.filter_map(|(index, at)| at.map(|_| index)));
            columns = Some(named);
            continue;
        };
        rows += 1;
        let line = lines.lock().of_row(row_end.load(Ordering::Relaxed));
        if record.len() != columns.width() {
            return Err(BackupError::Columns {
                row: rows,
                line,
                found: record.len(),
                expected: columns.width(),
            });
        }
        let row = columns.row(&record, rows, line)?;
        // The rows of a batch are on consecutive lines.
        let follows = line == progress.line() + batch.len() as u64;
        if batch.is_full() || !(follows || batch.is_empty()) {
            digest += sink(&batch);
            batch.clear();
        }
        if batch.is_empty() {
            progress.set_line(line);
        }
        batch.push(row.user_id, row.values);
        progress.add_rows(1);
        progress.set_bytes(bytes.load(Ordering::Relaxed));
    }
    digest += sink(&batch);
    if columns.is_none() {
        return Err(BackupError::Header {
            what: "the file is empty".to_owned(),
        });
    }
    Ok(Summary {
        records: None,
        rows,
        digest,
        bytes: bytes.load(Ordering::Relaxed),
    })
}
