//! Reads any other gzip CSV: one member or many, columns in any order, quoted or not, LF or CRLF.
//!
//! Speed is not what this is for; every form that other tools write is.

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

use super::reader::Sink;
use super::{BackupError, Progress, Row, Summary};
use crate::grade::{Digest, FIELDS, USER_ID, Values, check_user_id};
use crate::store::RecordBatch;

/// The longest row of a foreign file. Also what stops a small file that inflates to one endless
/// row.
const ROW_BYTES_MAX: u64 = 64 * 1024;
/// What csv-async and the decoder may read ahead of the row that is parsed.
const AHEAD_BYTES: u64 = 64 * 1024;

/// A blocking reader as an async one that is always ready.
struct AlwaysReady<R> {
    source: R,
    bytes: Arc<AtomicU64>,
}

impl<R: Read + Unpin> AsyncRead for AlwaysReady<R> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        room: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = self.source.read(room.initialize_unfilled())?;
        room.advance(read);
        self.bytes.fetch_add(read as u64, Ordering::Relaxed);
        Poll::Ready(Ok(()))
    }
}

/// Ends with an error when more has been read than the row being parsed may need.
struct RowBounded<R> {
    source: R,
    given: u64,
    /// Where the last whole row ended; the parser moves it.
    row_end: Arc<AtomicU64>,
    lines: Arc<Mutex<Lines>>,
}

/// Where lines end in what has been read. csv-async counts a line when it has passed what ends it,
/// which of `\r\n` is the next row.
#[derive(Default)]
struct Lines {
    /// Lines that ended before the row that was parsed last.
    before: u64,
    /// Where those after them end, as far as the text has been read.
    ends: VecDeque<u64>,
}

impl Lines {
    /// The line of a row that ends, with what ends it, before `end`.
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

impl<R: AsyncRead + Unpin> AsyncRead for RowBounded<R> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        room: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let allowed = self.row_end.load(Ordering::Relaxed) + ROW_BYTES_MAX + AHEAD_BYTES;
        if self.given > allowed {
            let why = format!("a row is longer than {ROW_BYTES_MAX} bytes");
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, why)));
        }
        let before = room.filled().len();
        let polled = Pin::new(&mut self.source).poll_read(cx, room);
        let read = room.filled().get(before..).unwrap_or_default();
        let breaks = (self.given..).zip(read).filter(|(_, byte)| **byte == b'\n');
        self.lines.lock().ends.extend(breaks.map(|(at, _)| at));
        self.given += read.len() as u64;
        polled
    }
}

/// Where each column of the file goes.
struct Columns {
    user_id: usize,
    /// The column of each of [`FIELDS`]; those that a file lacks read as 0.
    fields: Vec<Option<usize>>,
}

impl Columns {
    fn of(header: &StringRecord) -> Result<Self, BackupError> {
        let wrong = |what: String| BackupError::Header { what };
        let mut user_id = None;
        let mut fields = vec![None; FIELDS.len()];
        for (at, name) in header.iter().enumerate() {
            // Some programs begin a UTF-8 file with a byte order mark.
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
                return Err(wrong(format!("column {name} stands there twice")));
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
            *value = number
                .ok_or_else(|| wrong(name, format!("{shown:?} is not an integer of 64 bits")))?;
        }
        Ok(Row { user_id, values })
    }
}

pub(super) fn read(
    source: impl Read + Unpin + Send,
    sink: &Sink<'_>,
    progress: &Progress,
) -> Result<Summary, BackupError> {
    let bytes = Arc::new(AtomicU64::new(0));
    let row_end = Arc::new(AtomicU64::new(0));
    let lines = Arc::<Mutex<Lines>>::default();
    let source = AlwaysReady {
        source,
        bytes: Arc::clone(&bytes),
    };
    let mut inflated = GzipDecoder::new(BufReader::with_capacity(64 * 1024, source));
    // The default stops after the first member, in silence.
    inflated.multiple_members(true);
    let bounded = RowBounded {
        source: inflated,
        given: 0,
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
    // Nothing in this pipe ever waits, so one poll a record is all it takes.
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
            let named = Columns::of(&record)?;
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
                wanted: columns.width(),
            });
        }
        let row = columns.row(&record, rows, line)?;
        // The rows of a batch follow each other line by line.
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
            what: "there is none".to_owned(),
        });
    }
    Ok(Summary {
        records: None,
        rows,
        digest,
        bytes: bytes.load(Ordering::Relaxed),
    })
}
