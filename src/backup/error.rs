//! What can be wrong with a backup file.

use std::io;

/// Why a backup was refused. `row` counts from 1, the header row not counted; `line` counts those of
/// the text.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// The file could not be read.
    #[error("cannot read on at byte {at}: {error}")]
    Io {
        /// How far reading came.
        at: u64,
        /// What the system said.
        error: io::Error,
    },
    /// The file ends before its end record.
    #[error(
        "cut off at byte {at}: the end record is missing; the backup broke off or was copied in part, fetch it again"
    )]
    Truncated {
        /// Where it ends.
        at: u64,
    },
    /// A member is not as the format says, or its bits have changed.
    #[error("damaged at byte {at}: {what}; fetch the backup again")]
    Damaged {
        /// Where the member begins.
        at: u64,
        /// What is wrong.
        what: &'static str,
    },
    /// Something follows the end record.
    #[error(
        "bytes follow the end of the backup at byte {at}; remove them or fetch the backup again"
    )]
    Trailing {
        /// Where the backup ended.
        at: u64,
    },
    /// The file is of a later version.
    #[error(
        "the backup has format {found}, this program reads up to {known}; use a newer gradestore"
    )]
    Newer {
        /// The file's version.
        found: u32,
        /// The newest one that is read.
        known: u32,
    },
    /// What was counted is not what the end record says.
    #[error(
        "{what} differ: the end record says {recorded}, the file has {found}; fetch the backup again"
    )]
    Mismatch {
        /// Rows, digest or checksum.
        what: &'static str,
        /// What should be there.
        recorded: String,
        /// What is there.
        found: String,
    },
    /// The file is no gzip.
    #[error("not a gzip file; a backup is a .csv.gz as GET /backup gives it")]
    NotGzip,
    /// The gzip or CSV of a foreign file can't be read.
    #[error("cannot be read as gzip and CSV after row {row}: {error}")]
    Unreadable {
        /// The last whole row.
        row: u64,
        /// What the decoder said.
        error: String,
    },
    /// The header row is wrong.
    #[error("the header row is wrong: {what}; it must name {}", wanted_columns())]
    Header {
        /// What is wrong with it.
        what: String,
    },
    /// A row has too many or too few columns.
    #[error("row {row} has {found} columns where the header row has {wanted} (line {line})")]
    Columns {
        /// Which row.
        row: u64,
        /// Its line.
        line: u64,
        /// Its columns.
        found: usize,
        /// The header's.
        wanted: usize,
    },
    /// A value can't be one.
    #[error("row {row}, column {column} (line {line}): {what}")]
    Value {
        /// Which row.
        row: u64,
        /// Its line.
        line: u64,
        /// Which column.
        column: &'static str,
        /// What is wrong.
        what: String,
    },
    /// One user has two rows.
    #[error("{rows} rows but {users} different users: a user_id stands in the file twice")]
    Repeated {
        /// Rows.
        rows: u64,
        /// Different ids among them.
        users: u64,
    },
}

fn wanted_columns() -> String {
    format!(
        "{}, {}",
        crate::grade::USER_ID,
        crate::grade::FIELDS.join(", ")
    )
}
