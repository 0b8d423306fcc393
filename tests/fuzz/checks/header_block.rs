//! Header blocks as a stream stores them: arbitrary bytes.
//!
//! Nothing panics. A readable block is UTF-8 and begins with the version. Its headers, written
//! in the simplest form, parse to the same headers.

use async_nats::HeaderMap;
use gradestore::log::header_block;

pub(crate) fn check(block: &[u8]) {
    let Ok(headers) = header_block::parse(block) else {
        return;
    };
    assert!(block.starts_with(b"NATS/1.0") && str::from_utf8(block).is_ok());
    let mut written = "NATS/1.0\r\n".to_owned();
    let mut wanted = HeaderMap::new();
    for (name, values) in headers.iter() {
        for value in values {
            let value = value.as_str();
            assert!(!value.contains(['\r', '\n']) && value == value.trim_end());
            written += &format!("{name}: {value}\r\n");
            // A value may begin with white space only if its first line is empty.
            wanted.append(name.clone(), value.trim_start());
        }
    }
    written += "\r\n";
    assert_eq!(header_block::parse(written.as_bytes()), Ok(wanted));
}
