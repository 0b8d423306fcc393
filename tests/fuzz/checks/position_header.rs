//! `Grade-Position` headers of a read, one per line of the input: none, or one 64-bit decimal
//! number.

use gradestore::http::GRADE_POSITION;
use gradestore::http::get::position_of;
use http::{HeaderMap, HeaderValue};

pub(crate) fn check(data: &[u8]) {
    let mut headers = HeaderMap::new();
    let mut lines = Vec::new();
    for line in data.split(|byte| *byte == b'\n').skip(1) {
        // hyper rejects the others.
        let Ok(value) = HeaderValue::from_bytes(line) else {
            return;
        };
        headers.append(GRADE_POSITION, value);
        lines.push(line);
    }
    let wanted = match lines[..] {
        [] => Some(None),
        [line] => number(line).map(Some),
        _ => None,
    };
    assert_eq!(position_of(&headers).ok(), wanted);
}

fn number(digits: &[u8]) -> Option<u64> {
    let (first, rest) = digits.split_first()?;
    let digit = |byte: &u8| byte.is_ascii_digit().then(|| u64::from(byte - b'0'));
    rest.iter().try_fold(digit(first)?, |number, byte| {
        number.checked_mul(10)?.checked_add(digit(byte)?)
    })
}
