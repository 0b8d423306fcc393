//! The check of the `Authorization` header. The input has one line each for a kind, a name, a
//! password and every header value.
//!
//! The check accepts `Basic` in any case, then one or more spaces, then the canonical base64 of
//! name, colon and password (RFC 4648), and nothing else.

use gradestore::http::Credentials;
use http::header::AUTHORIZATION;
use http::{HeaderMap, HeaderValue};

pub(crate) fn check(data: &[u8]) {
    let mut lines = data.split(|byte| *byte == b'\n');
    let kind = lines.next().unwrap_or_default();
    let mut text = || str::from_utf8(lines.next()?).ok();
    let (Some(username), Some(password)) = (text(), text()) else {
        return;
    };
    if username.is_empty() || username.contains(':') || password.is_empty() {
        // The configuration rejects these.
        return;
    }
    let expected = base64(format!("{username}:{password}").as_bytes());
    let mut headers = HeaderMap::new();
    let mut sent = Vec::new();
    for line in lines {
        let line = match kind {
            // The value itself; a prefix of the right value; or name and password to encode.
            b"r" => line.to_vec(),
            b"a" => [line, expected.as_bytes()].concat(),
            _ => format!("Basic {}", base64(line)).into_bytes(),
        };
        let Ok(value) = HeaderValue::from_bytes(&line) else {
            return;
        };
        headers.append(AUTHORIZATION, value);
        sent.push(line);
    }
    let wanted = match &sent[..] {
        [line] => basic(line).is_some_and(|sent| sent == expected.as_bytes()),
        _ => false,
    };
    let checked = Credentials::new(username, password).check(&headers);
    assert_eq!(checked.is_ok(), wanted);
    if let Err(error) = checked {
        assert_eq!(error.kind().1, "unauthorized");
    }
}

/// The part after the scheme.
fn basic(line: &[u8]) -> Option<&[u8]> {
    let (scheme, rest) = line.split_at_checked(5)?;
    let spaces = rest.iter().take_while(|byte| **byte == b' ').count();
    (scheme.eq_ignore_ascii_case(b"basic") && spaces > 0).then(|| &rest[spaces..])
}

fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for three in bytes.chunks(3) {
        let at = |index: usize| u32::from(three.get(index).copied().unwrap_or_default());
        let bits = at(0) << 16 | at(1) << 8 | at(2);
        for index in 0..4 {
            let letter = LETTERS[(bits >> (18 - 6 * index)) as usize & 63];
            text.push(if index > three.len() {
                '='
            } else {
                letter.into()
            });
        }
    }
    text
}
