//! Checks that a text is CSV (RFC 4180) while csv-async reads it.
//!
//! csv-async accepts every text. It drops a quote after a closing quote, appends text that follows
//! one, and ends a quoted field at the end of the text, so the value differs from what the file's
//! author meant. It also counts lines wrongly where they end in CR.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, ReadBuf};

use super::error::BackupError;

/// The longest row, with the empty lines before it. Stops early on a small file that inflates to
/// one endless row.
const ROW_BYTES_MAX: u64 = 64 * 1024;

pub(super) const TEXT_AFTER_QUOTE: &str =
    "text after a closing quote; write a quote in a field as two quotes";
pub(super) const QUOTE_IN_UNQUOTED: &str =
    "a quote inside a field without quotes; put the field in quotes and write it as two quotes";

/// Passes a text on to the parser up to the first row that is not CSV, and then fails with a
/// [`BackupError`].
pub(super) struct StrictCsv<R> {
    source: R,
    syntax: Syntax,
    /// An error behind the rows that the parser has received.
    failed: Option<BackupError>,
}

impl<R> StrictCsv<R> {
    pub(super) fn new(source: R) -> Self {
        Self {
            source,
            syntax: Syntax::default(),
            failed: None,
        }
    }

    /// The line of the next row of the parser, from 1.
    pub(super) fn next_row_line(&mut self) -> Option<u64> {
        self.syntax.row_lines.pop_front()
    }
}

impl<R: AsyncRead + Unpin> AsyncRead for StrictCsv<R> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buffer.filled().len();
        if this.failed.is_none() {
            ready!(Pin::new(&mut this.source).poll_read(cx, buffer))?;
            let read = buffer.filled().get(before..).unwrap_or_default();
            let checked = match read {
                [] => this.syntax.end().map_err(|what| (0, what)),
                _ => this.syntax.check(read),
            };
            if let Err((valid_bytes, what)) = checked {
                this.failed = Some(this.syntax.error(what));
                buffer.set_filled(before + valid_bytes);
            }
        }
        let more = buffer.filled().len() > before;
        match this.failed.take_if(|_| !more) {
            Some(error) => Poll::Ready(Err(io::Error::other(error))),
            None => Poll::Ready(Ok(())),
        }
    }
}

/// Where in a row the text is.
#[derive(Debug, Clone, Copy, Default)]
enum State {
    /// Before a row. Empty lines are no rows.
    #[default]
    RowStart,
    FieldStart,
    Unquoted,
    Quoted,
    /// After a quote in a quoted field: the end of the field, or the first of two quotes.
    QuoteInQuoted,
}

/// The state of the check.
#[derive(Debug, Default)]
struct Syntax {
    state: State,
    /// The line breaks so far. CR LF is one.
    breaks: u64,
    after_cr: bool,
    /// The number of rows so far, including the header row and an incomplete last one.
    rows: u64,
    /// The line of the last one.
    row_line: u64,
    /// Bytes since the row before it ended.
    row_bytes: u64,
    /// The lines of the rows that the parser has not returned yet.
    row_lines: VecDeque<u64>,
}

impl Syntax {
    /// Checks the next bytes. An error has the number of bytes before the invalid one.
    fn check(&mut self, bytes: &[u8]) -> Result<(), (usize, &'static str)> {
        for (at, byte) in bytes.iter().enumerate() {
            self.step(*byte).map_err(|what| (at, what))?;
        }
        Ok(())
    }

    fn step(&mut self, byte: u8) -> Result<(), &'static str> {
        let is_break = matches!(byte, b'\r' | b'\n');
        let is_between_rows = matches!(self.state, State::RowStart) && is_break;
        if matches!(self.state, State::RowStart) && !is_break {
            self.rows += 1;
            self.row_line = self.breaks + 1;
            self.row_lines.push_back(self.row_line);
        }
        self.row_bytes += 1;
        if self.row_bytes > ROW_BYTES_MAX {
            return Err("it is longer than 64 KiB");
        }
        self.state = match (self.state, byte) {
            (State::RowStart | State::FieldStart | State::QuoteInQuoted, b'"') => State::Quoted,
            (State::Quoted, b'"') => State::QuoteInQuoted,
            (State::Quoted, _) => State::Quoted,
            (_, b',') => State::FieldStart,
            (_, b'\r' | b'\n') => State::RowStart,
            (State::QuoteInQuoted, _) => return Err(TEXT_AFTER_QUOTE),
            (State::Unquoted, b'"') => return Err(QUOTE_IN_UNQUOTED),
            (State::RowStart | State::FieldStart | State::Unquoted, _) => State::Unquoted,
        };
        if is_break && !(byte == b'\n' && self.after_cr) {
            self.breaks += 1;
        }
        self.after_cr = byte == b'\r';
        if matches!(self.state, State::RowStart) && !is_between_rows {
            self.row_bytes = 0;
        }
        Ok(())
    }

    /// Checks the end of the text.
    fn end(&self) -> Result<(), &'static str> {
        match self.state {
            State::Quoted => Err("the text ends inside quotes"),
            _ => Ok(()),
        }
    }

    fn error(&self, what: &'static str) -> BackupError {
        BackupError::Csv {
            row: self.rows.saturating_sub(1),
            line: self.row_line,
            what,
        }
    }
}
