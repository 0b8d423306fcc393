//! Reads gzip CSV files of other programs: any number of members, columns in any order, quoted or
//! not, LF, CR LF or CR. Accepts all common forms of RFC 4180 at the cost of speed.

use std::collections::HashSet;
use std::io::{self, Cursor, Read};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use async_compression::tokio::bufread::GzipDecoder;
use csv_async::{AsyncReader, AsyncReaderBuilder, ErrorKind, StringRecord, Trim};
use foldhash::fast::FixedState;
use futures_util::FutureExt;
use tokio::io::{AsyncBufRead, AsyncRead, AsyncReadExt, BufReader, Chain, ReadBuf};
use xxhash_rust::xxh3::xxh3_128;

use super::error::BackupError;
use super::progress::{ReadProgress, RowSink, Summary};
use super::row::Row;
use super::strict_csv::StrictCsv;
use crate::grade::{Digest, FIELDS, USER_ID, Values, check_user_id};
use crate::store::RecordBatch;

/// The byte order mark with which some programs begin a text.
const BOM: &[u8] = "\u{feff}".as_bytes();

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
        let at = self.bytes.load(Ordering::Relaxed);
        let read = self.source.read(buffer.initialize_unfilled());
        let read = read.map_err(|error| io::Error::other(BackupError::Io { at, error }))?;
        buffer.advance(read);
        self.bytes.fetch_add(read as u64, Ordering::Relaxed);
        Poll::Ready(Ok(()))
    }
}

/// Inflates all members of a gzip file. Like gzip, it ignores zero bytes after the last one, with
/// which tapes and copies by block pad a file.
struct GzipMembers<R> {
    /// The current member; only `None` while it is replaced.
    member: Option<GzipDecoder<R>>,
    is_padded: bool,
}

impl<R: AsyncBufRead + Unpin> GzipMembers<R> {
    fn new(source: R) -> Self {
        Self {
            member: Some(GzipDecoder::new(source)),
            is_padded: false,
        }
    }

    /// Whether another member follows the current one, which has ended.
    fn poll_next_member(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        let Some(rest) = self.member.as_mut().map(GzipDecoder::get_mut) else {
            return Poll::Ready(Ok(false));
        };
        loop {
            let bytes = ready!(Pin::new(&mut *rest).poll_fill_buf(cx))?;
            match bytes.iter().take_while(|byte| **byte == 0).count() {
                _ if bytes.is_empty() => return Poll::Ready(Ok(false)),
                0 if self.is_padded => {
                    let what = "data after the zero bytes that pad the file";
                    return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, what)));
                }
                0 => break,
                zeros => Pin::new(&mut *rest).consume(zeros),
            }
            self.is_padded = true;
        }
        let ended = self.member.take();
        self.member = ended.map(|ended| GzipDecoder::new(ended.into_inner()));
        Poll::Ready(Ok(true))
    }
}

impl<R: AsyncBufRead + Unpin> AsyncRead for GzipMembers<R> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buffer.filled().len();
        while let Some(member) = &mut this.member {
            ready!(Pin::new(member).poll_read(cx, buffer))?;
            let has_ended = buffer.filled().len() == before && buffer.remaining() > 0;
            if !has_ended || !ready!(this.poll_next_member(cx))? {
                break;
            }
        }
        Poll::Ready(Ok(()))
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

    /// The indexes of the [`FIELDS`] that the file has.
    fn present(&self) -> impl Iterator<Item = usize> {
        let fields = self.fields.iter().enumerate();
        fields.filter_map(|(index, at)| at.map(|_| index))
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
        if record.len() != self.width() {
            return Err(BackupError::Columns {
                row,
                line,
                found: record.len(),
                expected: self.width(),
            });
        }
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

type Text<R> = Chain<Cursor<Vec<u8>>, GzipMembers<BufReader<AlwaysReady<R>>>>;

/// The rows of a file.
struct Rows<R> {
    csv: AsyncReader<StrictCsv<Text<R>>>,
    /// The last row.
    record: StringRecord,
    /// The rows so far, with the header row.
    count: u64,
    /// Compressed bytes read so far.
    bytes: Arc<AtomicU64>,
}

impl<R: Read + Unpin + Send> Rows<R> {
    fn open(source: R) -> Result<Self, BackupError> {
        let bytes = Arc::<AtomicU64>::default();
        let source = AlwaysReady {
            source,
            bytes: Arc::clone(&bytes),
        };
        let mut text = GzipMembers::new(BufReader::with_capacity(64 * 1024, source));
        let mut start = Vec::new();
        let mut first = (&mut text).take(BOM.len() as u64);
        let read = first.read_to_end(&mut start).now_or_never();
        read.unwrap_or(Ok(0))
            .map_err(|error| unreadable(0, error))?;
        if start == BOM {
            start.clear();
        }
        let csv = AsyncReaderBuilder::new()
            .flexible(true)
            .has_headers(false)
            .trim(Trim::None)
            .create_reader(StrictCsv::new(AsyncReadExt::chain(
                Cursor::new(start),
                text,
            )));
        Ok(Self {
            csv,
            record: StringRecord::new(),
            count: 0,
            bytes,
        })
    }

    /// Reads the next row. Returns its line.
    fn next(&mut self) -> Result<Option<u64>, BackupError> {
        // No reader in this chain is ever pending, so one poll per row is enough.
        let read = self.csv.read_record(&mut self.record).now_or_never();
        let is_row = read
            .unwrap_or(Ok(false))
            .map_err(|error| self.error(error))?;
        if !is_row {
            return Ok(None);
        }
        self.count += 1;
        Ok(self.csv.get_mut().next_row_line())
    }

    fn error(&mut self, error: csv_async::Error) -> BackupError {
        let text = error.to_string();
        match error.into_kind() {
            ErrorKind::Io(error) => unreadable(self.count.saturating_sub(1), error),
            ErrorKind::Utf8 { .. } => BackupError::Csv {
                row: self.count,
                line: self.csv.get_mut().next_row_line().unwrap_or(0),
                what: "it is not UTF-8",
            },
            _ => unreadable(self.count.saturating_sub(1), io::Error::other(text)),
        }
    }
}

/// The error of a reader in the chain, after the complete row `row`.
fn unreadable(row: u64, error: io::Error) -> BackupError {
    error
        .downcast()
        .unwrap_or_else(|error| BackupError::Unreadable {
            row,
            error: error.to_string(),
        })
}

pub(super) fn read(
    source: impl Read + Unpin + Send,
    sink: &RowSink<'_>,
    progress: &ReadProgress,
) -> Result<Summary, BackupError> {
    let mut csv = Rows::open(source)?;
    if csv.next()?.is_none() {
        return Err(BackupError::Header {
            what: "the file is empty".to_owned(),
        });
    }
    let columns = ColumnMap::of(&csv.record)?;
    progress.set_fields(columns.present());
    let mut rows = 0;
    let mut digest = Digest::default();
    let mut batch = RecordBatch::default();
    let mut users = HashSet::<u128, FixedState>::default();
    while let Some(line) = csv.next()? {
        rows += 1;
        let row = columns.row(&csv.record, rows, line)?;
        if !users.insert(xxh3_128(row.user_id.as_bytes())) {
            return Err(BackupError::Value {
                row: rows,
                line,
                column: USER_ID,
                what: format!("{:?} is in an earlier row too; keep one row", row.user_id),
            });
        }
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
        progress.set_bytes(csv.bytes.load(Ordering::Relaxed));
    }
    digest += sink(&batch);
    Ok(Summary {
        records: None,
        rows,
        digest,
        bytes: csv.bytes.load(Ordering::Relaxed),
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::GzEncoder;
    use proptest::prelude::*;

    use super::super::strict_csv::{QUOTE_IN_UNQUOTED, TEXT_AFTER_QUOTE};
    use super::*;

    type CsvRow = (u64, Vec<String>);

    fn gzip(text: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(text).unwrap();
        encoder.finish().unwrap()
    }

    /// The rows of a file with their lines, and the error after them.
    fn rows_of(file: &[u8]) -> (Vec<CsvRow>, Option<String>) {
        let mut rows = Vec::new();
        let mut csv = match Rows::open(file) {
            Ok(csv) => csv,
            Err(error) => return (rows, Some(error.to_string())),
        };
        loop {
            match csv.next() {
                Ok(Some(line)) => rows.push((line, csv.record.iter().map(str::to_owned).collect())),
                Ok(None) => return (rows, None),
                Err(error) => return (rows, Some(error.to_string())),
            }
        }
    }

    fn strip_break(text: &str) -> Option<&str> {
        let breaks = ["\r\n", "\n", "\r"].iter();
        breaks.filter_map(|end| text.strip_prefix(end)).next()
    }

    /// The field at the start of `text` and the text after it, by the grammar of RFC 4180.
    fn field(text: &str) -> Option<(String, &str)> {
        let Some(mut rest) = text.strip_prefix('"') else {
            let end = text.find([',', '\r', '\n']).unwrap_or(text.len());
            let (field, rest) = text.split_at(end);
            return (!field.contains('"')).then(|| (field.to_owned(), rest));
        };
        let mut field = String::new();
        loop {
            let (part, after) = rest.split_once('"')?;
            field += part;
            match after.strip_prefix('"') {
                Some(more) => {
                    field.push('"');
                    rest = more;
                }
                None => return Some((field, after)),
            }
        }
    }

    /// The rows that a simple reader finds before the first error, and whether there is one.
    fn simple_rows(text: &str) -> (Vec<CsvRow>, bool) {
        let (mut rest, mut line, mut rows) = (text, 1, Vec::new());
        while !rest.is_empty() {
            if let Some(after) = strip_break(rest) {
                (rest, line) = (after, line + 1);
                continue;
            }
            let (first, mut fields) = (line, Vec::new());
            loop {
                let Some((value, after)) = field(rest) else {
                    return (rows, true);
                };
                let breaks = value.replace("\r\n", "\n");
                line += breaks.matches(['\r', '\n']).count() as u64;
                fields.push(value);
                rest = after;
                match after.strip_prefix(',') {
                    Some(next) => rest = next,
                    None if after.is_empty() || strip_break(after).is_some() => break,
                    None => return (rows, true),
                }
            }
            rows.push((first, fields));
            if let Some(after) = strip_break(rest) {
                (rest, line) = (after, line + 1);
            }
        }
        (rows, false)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn a_strict_reader_finds_the_same_rows_and_errors(
            text in "(\"[a,\r\n]{0,2}(\"\")?[a\\\\]?\"|[a\\\\ ]{1,2}|[\",\r\n]|\r\n){0,12}",
            cut in any::<prop::sample::Index>(),
            bom in any::<bool>(),
        ) {
            let (wanted, invalid) = simple_rows(&text);
            let file = if bom { format!("\u{feff}{text}") } else { text };
            let (one, two) = file.as_bytes().split_at(cut.index(file.len() + 1));
            let (rows, error) = rows_of(&[gzip(one), gzip(two)].concat());
            prop_assert_eq!(rows, wanted);
            prop_assert_eq!(error.is_some(), invalid, "{:?}", error);
        }
    }

    #[test]
    fn text_that_is_not_csv_is_refused_with_row_and_line() {
        let header = "user_id,spp\r\na,1\r\n";
        for (rows, row, line, what) in [
            ("\"bo\"b,1\n", "row 2", 3, TEXT_AFTER_QUOTE),
            ("\"bob\" ,1\n", "row 2", 3, TEXT_AFTER_QUOTE),
            ("\"a\\\"b\",1\n", "row 2", 3, TEXT_AFTER_QUOTE),
            ("b,\"1\"2\n", "row 2", 3, TEXT_AFTER_QUOTE),
            ("b,1\n\nc,\"2\"\"3\"4\n", "row 3", 5, TEXT_AFTER_QUOTE),
            ("bo\"b,1\n", "row 2", 3, QUOTE_IN_UNQUOTED),
            ("bob\",1\n", "row 2", 3, QUOTE_IN_UNQUOTED),
            (" \"bob\",1\n", "row 2", 3, QUOTE_IN_UNQUOTED),
            ("b,1\"\n", "row 2", 3, QUOTE_IN_UNQUOTED),
            ("\"b,1\nc,1\n", "row 2", 3, "the text ends inside quotes"),
            ("b,\"1", "row 2", 3, "the text ends inside quotes"),
        ] {
            let (read, error) = rows_of(&gzip(format!("{header}{rows}").as_bytes()));
            let wanted = format!("{row} (line {line}) is not valid CSV: {what}");
            assert_eq!(error.as_deref(), Some(&*wanted), "{rows:?}");
            // The rows before it were passed on.
            assert_eq!(read[1], (2, vec!["a".to_owned(), "1".to_owned()]));
        }
        let (_, error) = rows_of(&gzip(b"user_id,\"spp\"x\na,1\n"));
        let error = error.unwrap();
        assert!(
            error.starts_with("the header row (line 1) is not"),
            "{error}"
        );
        let (_, error) = rows_of(&gzip(b"user_id\n\n\xe9\n"));
        let wanted = "row 1 (line 3) is not valid CSV: it is not UTF-8";
        assert_eq!(error.as_deref(), Some(wanted));
    }

    #[test]
    fn zero_bytes_after_the_last_member_are_ignored() {
        let file = gzip(b"user_id\na\n");
        let (wanted, _) = rows_of(&file);
        for zeros in [1, 512, 200_000] {
            let mut padded = [&file[..], &vec![0; zeros]].concat();
            assert_eq!(rows_of(&padded), (wanted.clone(), None));
            padded.extend_from_slice(&gzip(b"b\n"));
            let (rows, error) = rows_of(&padded);
            assert_eq!(rows, wanted);
            assert!(error.unwrap().contains("data after the zero bytes"));
        }
    }
}
