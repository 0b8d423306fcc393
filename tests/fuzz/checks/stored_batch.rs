//! The value of a batch in the log on disk. Nothing panics; what is read is written as the same bytes, but
//! for the way in which its JSON is spelled, and read as the same.

use gradestore::log::{ReadError, stored};

/// Format, time, origin and number.
const HEADER_BYTES: usize = 1 + 8 + 16 + 8;

pub(crate) fn check(value: &[u8]) {
    let entry = match stored::read(7, value) {
        Ok(entry) => entry,
        Err(error) => {
            assert!(matches!(error, ReadError::Damaged { seq: 7, .. }));
            return;
        }
    };
    let mut written = Vec::new();
    stored::write(&entry, &mut written);
    assert_eq!(written[..HEADER_BYTES], value[..HEADER_BYTES]);
    let again = stored::read(7, &written).expect("what we write we read");
    assert_eq!((again.seq, again.time_ns), (7, entry.time_ns));
    assert_eq!(again.batch.origin, entry.batch.origin);
    assert_eq!(again.batch.number, entry.batch.number);
    assert_eq!(again.batch.writes, entry.batch.writes);
    let mut twice = Vec::new();
    stored::write(&again, &mut twice);
    assert_eq!(twice, written);
}
