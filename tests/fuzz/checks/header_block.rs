//! Header blocks as a stream stores them: any bytes.
//!
//! Nothing panics. A readable block is UTF-8 and begins with the version. Its headers, written out in
//! the plain form, are read again as the same.

use async_nats::HeaderMap;
use gradestore::log::header_block;

pub(crate) fn check(block: &[u8]) {
    let Ok(headers) = header_block::parse(block) else {
        return;
    };
    assert!(block.starts_with(b"NATS/1.0") && str::from_utf8(block).is_ok());
    let mut plain = "NATS/1.0\r\n".to_owned();
    let mut wanted = HeaderMap::new();
    for (name, values) in headers.iter() {
        for value in values {
            let value = value.as_str();
            assert!(!value.contains(['\r', '\n']) && value == value.trim_end());
            plain += &format!("{name}: {value}\r\n");
            // A value may begin with white space only if its first line is empty.
            wanted.append(name.clone(), value.trim_start());
        }
    }
    plain += "\r\n";
    assert_eq!(header_block::parse(plain.as_bytes()), Ok(wanted));
}
