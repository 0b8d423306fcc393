//! Which requests are plain. Header lines are read by `httparse`, as hyper does.
//!
//! `tests/fuzz` holds this against a plain reading of the same rules.

use std::mem::MaybeUninit;

use httparse::{Header, Request, Status};

/// Header lines of a plain request, at most: a browser sends fifteen.
const LINES_MAX: usize = 24;
/// How the target of a plain read begins; what follows is the id as it is.
const GET_TARGET: &str = "/get?user_id=";
const SET_TARGET: &str = "/set";
/// Header lines that change nothing about the answer. One that is not among these may: its request is
/// hyper's.
const HARMLESS: [&str; 8] = [
    "host",
    "user-agent",
    "accept",
    "accept-encoding",
    "accept-language",
    "cache-control",
    "pragma",
    "traceparent",
];

/// What bytes are not, if no plain request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Other {
    /// The beginning of a header, or nothing: what it comes to is not known yet.
    Begun,
    /// Another request, or none at all.
    NotPlain,
}

/// A plain `POST /set`.
#[derive(Debug, PartialEq, Eq)]
pub struct Set<'a> {
    /// The value of its `Authorization`, if it has one.
    pub authorization: Option<&'a [u8]>,
    /// Its body, whole.
    pub body: &'a [u8],
    /// Bytes of the request.
    pub len: usize,
}

/// Whom the request at the beginning of `bytes` asks for, and its length in bytes, if it is a plain read.
///
/// # Errors
/// It is something else, or not whole.
pub fn get(bytes: &[u8]) -> Result<(&str, usize), Other> {
    let mut lines = [const { MaybeUninit::uninit() }; LINES_MAX];
    let (head, len) = head(bytes, &mut lines, "GET")?;
    let user_id = head.path.and_then(|path| path.strip_prefix(GET_TARGET));
    let user_id = user_id.ok_or(Other::NotPlain)?;
    let plain = head.headers.iter().all(is_harmless) && user_id.bytes().all(stands_for_itself);
    plain.then_some((user_id, len)).ok_or(Other::NotPlain)
}

/// The request at the beginning of `bytes`, if it is a plain write. One whose body is not whole is hyper's, who
/// waits for it no longer than may be.
///
/// # Errors
/// It is something else, or its header is not whole.
pub fn set(bytes: &[u8]) -> Result<Set<'_>, Other> {
    let mut lines = [const { MaybeUninit::uninit() }; LINES_MAX];
    let (head, head_len) = head(bytes, &mut lines, "POST")?;
    written(&head, head_len, bytes).ok_or(Other::NotPlain)
}

fn written<'a>(head: &Request<'_, 'a>, head_len: usize, bytes: &'a [u8]) -> Option<Set<'a>> {
    if head.path != Some(SET_TARGET) {
        return None;
    }
    let (mut authorization, mut body_len, mut is_json) = (None, None, false);
    for line in head.headers.iter() {
        let not_plain = if named(line, "content-length") {
            body_len.replace(number(line.value)?).is_some()
        } else if named(line, "authorization") {
            authorization.replace(line.value).is_some()
        } else if named(line, "content-type") {
            let json = line.value.eq_ignore_ascii_case(b"application/json");
            std::mem::replace(&mut is_json, true) || !json
        } else {
            !is_harmless(line)
        };
        if not_plain {
            return None;
        }
    }
    let len = head_len.checked_add(body_len?)?;
    let body = bytes.get(head_len..len)?;
    is_json.then_some(Set {
        authorization,
        body,
        len,
    })
}

/// The request line and header lines of a request with `method`, and their length.
fn head<'a, 'lines>(
    bytes: &'a [u8],
    lines: &'lines mut [MaybeUninit<Header<'a>>],
    method: &str,
) -> Result<(Request<'lines, 'a>, usize), Other> {
    let mut request = Request::new(&mut []);
    match request.parse_with_uninit_headers(bytes, lines) {
        Ok(Status::Complete(len))
            if request.method == Some(method) && request.version == Some(1) =>
        {
            Ok((request, len))
        }
        Ok(Status::Partial) => Err(Other::Begun),
        Ok(Status::Complete(_)) | Err(_) => Err(Other::NotPlain),
    }
}

fn named(line: &Header<'_>, name: &str) -> bool {
    line.name.eq_ignore_ascii_case(name)
}

fn is_harmless(line: &Header<'_>) -> bool {
    let keeps_alive =
        || named(line, "connection") && line.value.eq_ignore_ascii_case(b"keep-alive");
    HARMLESS.iter().any(|harmless| named(line, harmless)) || keeps_alive()
}

/// A length as RFC 9110 writes one; longer ones than are read at a time are hyper's.
fn number(digits: &[u8]) -> Option<usize> {
    let sane = (1..=4).contains(&digits.len()) && digits.iter().all(u8::is_ascii_digit);
    let digits = sane.then(|| std::str::from_utf8(digits).ok())??;
    digits.parse().ok()
}

/// Whether a byte of a query is one of the value, and nothing else: RFC 3986's unreserved ones, and two
/// that ids are often made with.
fn stands_for_itself(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~' | b':' | b'@')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_a_plain_read() {
        let whole =
            "GET /get?user_id=a-Z.0_~:@ HTTP/1.1\r\nHost: x\r\nconnection: Keep-Alive\r\n\r\n";
        assert_eq!(get(whole.as_bytes()), Ok(("a-Z.0_~:@", whole.len())));
        let next = format!("{whole}GET /");
        assert_eq!(get(next.as_bytes()), Ok(("a-Z.0_~:@", whole.len())));
        for len in 0..whole.len() {
            assert_eq!(get(&whole.as_bytes()[..len]), Err(Other::Begun), "{len}");
        }
        assert_eq!(set(whole.as_bytes()), Err(Other::NotPlain));
    }

    #[test]
    fn what_is_a_plain_write() {
        let head = "POST /set HTTP/1.1\r\nHost: x\r\nCONTENT-type: Application/JSON\r\nContent-Length: 2\r\n";
        let whole = format!("{head}Authorization: Basic eDp5\r\n\r\n{{}}");
        let wanted = Set {
            authorization: Some(b"Basic eDp5"),
            body: b"{}",
            len: whole.len(),
        };
        assert_eq!(set(whole.as_bytes()), Ok(wanted));
        let next = format!("{whole}POST /");
        assert_eq!(set(next.as_bytes()).map(|set| set.len), Ok(whole.len()));
        for len in 0..whole.len() {
            let wanted = match len < whole.len() - "{}".len() {
                true => Other::Begun,
                false => Other::NotPlain,
            };
            assert_eq!(set(&whole.as_bytes()[..len]), Err(wanted), "{len}");
        }
        let nobody = format!("{head}\r\n{{}}");
        let authorization = set(nobody.as_bytes()).map(|set| set.authorization);
        assert_eq!(authorization, Ok(None));
        assert_eq!(get(whole.as_bytes()), Err(Other::NotPlain));
    }

    #[test]
    fn what_is_hypers() {
        for target in [
            "/get",
            "/get?user_ids=a",
            "/get?user_id=a&x",
            "/get?user_id=a%20",
            "/get?user_id=a+b",
            "/get?user_id=a=b",
            "/get?user_id=a#",
            "/get?user_id=é",
            "/get/?user_id=a",
            "http://x/get?user_id=a",
        ] {
            let request = format!("GET {target} HTTP/1.1\r\nhost: x\r\n\r\n");
            assert_eq!(get(request.as_bytes()), Err(Other::NotPlain), "{target}");
        }
        for target in ["/set?", "/set/", "/get", "http://x/set"] {
            let lines = "content-type: application/json\r\ncontent-length: 2";
            let request = format!("POST {target} HTTP/1.1\r\n{lines}\r\n\r\n{{}}");
            assert_eq!(set(request.as_bytes()), Err(Other::NotPlain), "{target}");
        }
        for line in [
            "GET /get?user_id=a HTTP/1.0",
            "HEAD /get?user_id=a HTTP/1.1",
            "get /get?user_id=a HTTP/1.1",
        ] {
            let request = format!("{line}\r\nhost: x\r\n\r\n");
            assert_eq!(get(request.as_bytes()), Err(Other::NotPlain), "{line}");
        }
        for line in [
            "connection: close",
            "connection: keep-alive, te",
            "connection: upgrade",
            "content-length: 0",
            "transfer-encoding: chunked",
            "expect: 100-continue",
            "upgrade: h2c",
            "grade-position: 1",
            "x-request-id: a",
            "x: y",
        ] {
            let read = format!("GET /get?user_id=a HTTP/1.1\r\nhost: x\r\n{line}\r\n\r\n");
            assert_eq!(get(read.as_bytes()), Err(Other::NotPlain), "{line}");
            let lines = format!("content-type: application/json\r\ncontent-length: 2\r\n{line}");
            let write = format!("POST /set HTTP/1.1\r\n{lines}\r\n\r\n{{}}");
            assert_eq!(set(write.as_bytes()), Err(Other::NotPlain), "{line}");
        }
        for lines in [
            "content-type: application/json",
            "content-length: 2",
            "content-type: application/json; charset=utf-8\r\ncontent-length: 2",
            "content-type: application/x-ndjson\r\ncontent-length: 2",
            "content-type: application/json\r\ncontent-type: application/json\r\ncontent-length: 2",
            "content-type: application/json\r\ncontent-length: +2",
            "content-type: application/json\r\ncontent-length: 2, 2",
            "content-type: application/json\r\ncontent-length: 00002",
            "content-type: application/json\r\ncontent-length: 99999999999999999999",
            "content-type: application/json\r\ncontent-length:",
            "authorization: a\r\nauthorization: b\r\ncontent-type: application/json\r\ncontent-length: 2",
        ] {
            let request = format!("POST /set HTTP/1.1\r\n{lines}\r\n\r\n{{}}");
            assert_eq!(set(request.as_bytes()), Err(Other::NotPlain), "{lines}");
        }
    }
}
