//! The value of a batch in the log on disk. Nothing panics. A decoded batch is the same after
//! encoding and decoding it again, and its bytes are the same except for the spelling of the JSON.

use gradestore::log::{BatchId, LogId, Position, RandomId, ReadError, stored};

/// Format, time, writer id and batch sequence number.
const HEADER_BYTES: usize = 1 + 8 + 16 + 8;

pub(crate) fn check(value: &[u8]) {
    let previous = Position::base(&LogId("fuzz".into()), 6, 0);
    let entry = match stored::read(&previous, value) {
        Ok(entry) => entry,
        Err(error) => {
            match value.first() {
                Some(2..) => assert!(matches!(error, ReadError::NewerFormat { seq: 7, .. })),
                _ => assert!(matches!(error, ReadError::Damaged { seq: 7, .. })),
            }
            return;
        }
    };
    let number = |at: usize| u64::from_le_bytes(value[at..at + 8].try_into().unwrap());
    let writer = u128::from(number(9)) | u128::from(number(17)) << 64;
    let id = BatchId {
        writer: RandomId::of(writer),
        seq: number(25),
    };
    let time_ns = entry.position.time_ns;
    let mut written = Vec::new();
    let position = stored::write(&previous, time_ns, id, &entry.batch.writes, &mut written);
    assert_eq!(written[..HEADER_BYTES], value[..HEADER_BYTES]);
    let again = stored::read(&previous, &written).expect("an encoded batch can be decoded");
    assert_eq!(again.position, position);
    assert_eq!(again.batch.writes, entry.batch.writes);
    let mut twice = Vec::new();
    stored::write(&previous, time_ns, id, &again.batch.writes, &mut twice);
    assert_eq!(twice, written);
}
