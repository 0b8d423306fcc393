//! Errors of backup files.

use std::io;
use std::path::Path;

use crate::log::Seq;

/// Why a backup was rejected. `row` counts rows from 1, without the header row; `line` counts lines
/// of the text from 1, with it.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// The file cannot be opened.
    #[error("cannot open the file: {0}")]
    Open(io::Error),
    /// The file cannot be read.
    #[error("read error at byte {at}: {error}")]
    Io {
        /// Bytes read before the error.
        at: u64,
        /// The system's error.
        error: io::Error,
    },
    /// The file ends before its end record.
    #[error(
        "truncated at byte {at}: the end record is missing; the backup was aborted, copied in part \
         or is corrupt, fetch it again"
    )]
    Truncated {
        /// The length of the file.
        at: u64,
    },
    /// A member is malformed, or its bytes have changed.
    #[error("damaged at byte {at}: {what}; fetch the backup again")]
    Damaged {
        /// The offset of the member.
        at: u64,
        /// The reason.
        what: &'static str,
    },
    /// There is data after the end record.
    #[error(
        "unexpected data after the end of the backup at byte {at}; remove it or fetch the backup \
         again"
    )]
    Trailing {
        /// The length of the backup.
        at: u64,
    },
    /// A position that no log has.
    #[error(
        "impossible position {position}: positions of this backup are from {previous} to {max}; \
         fetch the backup again",
        max = super::format::POSITION_MAX
    )]
    Position {
        /// The position in the record.
        position: Seq,
        /// The position before it in the file.
        previous: Seq,
    },
    /// A newer program wrote the file.
    #[error(
        "the backup has format {found}, this program reads up to {known}; use a newer gradestore"
    )]
    Newer {
        /// The file's format.
        found: u32,
        /// The newest known format.
        known: u32,
    },
    /// The content does not match the end record.
    #[error(
        "{what} differ: the end record has {recorded}, the file {found}; fetch the backup again"
    )]
    Mismatch {
        /// Row counts, digests or checksums.
        what: &'static str,
        /// The value in the end record.
        recorded: String,
        /// The value of the file.
        found: String,
    },
    /// The file is not a gzip file.
    #[error(
        "not a gzip file; compress CSV with gzip first; if this was a backup of gradestore, fetch it \
         again"
    )]
    NotGzip,
    /// The gzip or CSV of a third-party file cannot be read.
    #[error("cannot be read as gzip and CSV after row {row}: {error}")]
    Unreadable {
        /// The last complete row.
        row: u64,
        /// The decoder's error.
        error: String,
    },
    /// A row of a third-party file is not CSV.
    #[error("{} (line {line}) is not valid CSV: {what}", row_name(*row))]
    Csv {
        /// The row, or 0 for the header row.
        row: u64,
        /// The line on which it begins.
        line: u64,
        /// The reason.
        what: &'static str,
    },
    /// The header row is invalid.
    #[error("invalid header row: {what}; the columns are {}", expected_columns())]
    Header {
        /// The reason.
        what: String,
    },
    /// A row has too many or too few columns.
    #[error("row {row} has {found} columns, the header row has {expected} (line {line})")]
    Columns {
        /// The row.
        row: u64,
        /// Its line.
        line: u64,
        /// The number of its columns.
        found: usize,
        /// The number of columns in the header row.
        expected: usize,
    },
    /// A value is invalid.
    #[error("row {row}, column {column} (line {line}): {what}")]
    Value {
        /// The row.
        row: u64,
        /// Its line.
        line: u64,
        /// The column.
        column: &'static str,
        /// The reason.
        what: String,
    },
    /// A user has more than one row.
    #[error("{rows} rows but {users} different users: a user_id appears twice")]
    Repeated {
        /// The number of rows.
        rows: u64,
        /// The number of different ids.
        users: u64,
    },
}

impl BackupError {
    /// The text of the error with the name of the file.
    #[must_use]
    pub fn in_file(&self, path: &Path) -> String {
        let path = path.display();
        match self {
            Self::Open(error) => format!("cannot open {path}: {error}"),
            _ => format!("{path}: {self}"),
        }
    }

    /// Whether the content of the file is wrong, so that reading it again cannot succeed.
    #[must_use]
    pub fn is_damage(&self) -> bool {
        !matches!(self, Self::Open(_) | Self::Io { .. } | Self::Newer { .. })
    }
}

fn row_name(row: u64) -> String {
    match row {
        0 => "the header row".to_owned(),
        _ => format!("row {row}"),
    }
}

fn expected_columns() -> String {
    format!(
        "{}, {}",
        crate::grade::USER_ID,
        crate::grade::FIELDS.join(", ")
    )
}
