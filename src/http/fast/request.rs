//! Parses the requests that the fast path answers, with `httparse`, as hyper does.
//!
//! Only a few headers affect the response. Hyper and the router answer a request that has one of them
//! that the fast path does not support.
//!
//! `tests/fuzz` compares this parser with a simple implementation of the same rules.

use std::mem::MaybeUninit;

use httparse::{Header, Request, Status};

use crate::log::Seq;

/// The maximum number of header lines, as in hyper.
const LINES_MAX: usize = 100;
/// The target of a read, up to the id.
const GET_TARGET: &str = "/get?user_id=";
const SET_TARGET: &str = "/set";
/// The largest body of a write on the fast path, in bytes.
pub const BODY_BYTES_MAX: usize = 8 * 1024;

/// Why the fast path does not handle a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotFast {
    /// The header is not complete.
    Incomplete,
    /// Another request, or an invalid one, which hyper handles.
    Fallback,
}

/// `GET /get?user_id=ID`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Get<'a> {
    /// The id as in the query: it may be percent-encoded.
    pub user_id: &'a str,
    /// `Host`.
    pub host: &'a [u8],
    /// `Grade-Position`.
    pub position: Option<Seq>,
    /// The length of the request in bytes.
    pub len: usize,
}

/// `POST /set` of one patch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Set<'a> {
    /// `Host`.
    pub host: &'a [u8],
    /// The value of `Authorization`.
    pub authorization: Option<&'a [u8]>,
    /// The offset of the body.
    pub body_at: usize,
    /// The length of the request in bytes, with its body, which may not have arrived yet.
    pub len: usize,
}

/// Parses the read at the beginning of `bytes`.
///
/// # Errors
/// See [`NotFast`].
pub fn get(bytes: &[u8]) -> Result<Get<'_>, NotFast> {
    let mut lines = [const { MaybeUninit::uninit() }; LINES_MAX];
    let (head, len) = head(bytes, &mut lines, "GET")?;
    let user_id = head.path.and_then(|path| path.strip_prefix(GET_TARGET));
    let user_id = user_id.filter(|user_id| user_id.bytes().all(is_value));
    let user_id = user_id.ok_or(NotFast::Fallback)?;
    let (mut host, mut position) = (None, None);
    for line in head.headers.iter() {
        let supported = match RelevantHeader::of(line) {
            None => true,
            Some(RelevantHeader::Host) => host.replace(line.value).is_none(),
            Some(RelevantHeader::GradePosition) => {
                let wanted = parse_position(line.value).ok_or(NotFast::Fallback)?;
                position.replace(wanted).is_none()
            }
            Some(RelevantHeader::Connection) => keeps_alive(line.value),
            // They have no effect on a read.
            Some(RelevantHeader::Authorization | RelevantHeader::ContentType) => true,
            Some(RelevantHeader::ContentLength | RelevantHeader::Unsupported) => false,
        };
        if !supported {
            return Err(NotFast::Fallback);
        }
    }
    Ok(Get {
        user_id,
        host: host.ok_or(NotFast::Fallback)?,
        position,
        len,
    })
}

/// Parses the write at the beginning of `bytes`. Its body may be incomplete.
///
/// # Errors
/// See [`NotFast`].
pub fn set(bytes: &[u8]) -> Result<Set<'_>, NotFast> {
    let mut lines = [const { MaybeUninit::uninit() }; LINES_MAX];
    let (head, body_at) = head(bytes, &mut lines, "POST")?;
    set_of(&head, body_at).ok_or(NotFast::Fallback)
}

fn set_of<'a>(head: &Request<'_, 'a>, body_at: usize) -> Option<Set<'a>> {
    if head.path != Some(SET_TARGET) {
        return None;
    }
    let (mut host, mut authorization) = (None, None);
    let (mut body_len, mut is_json) = (None, false);
    for line in head.headers.iter() {
        let supported = match RelevantHeader::of(line) {
            None => true,
            Some(RelevantHeader::Host) => host.replace(line.value).is_none(),
            Some(RelevantHeader::ContentLength) => body_len.replace(length(line.value)?).is_none(),
            Some(RelevantHeader::Authorization) => authorization.replace(line.value).is_none(),
            Some(RelevantHeader::ContentType) => {
                let json = line.value.eq_ignore_ascii_case(b"application/json");
                !std::mem::replace(&mut is_json, true) && json
            }
            Some(RelevantHeader::Connection) => keeps_alive(line.value),
            // A write does not wait for a position.
            Some(RelevantHeader::GradePosition) => true,
            Some(RelevantHeader::Unsupported) => false,
        };
        if !supported {
            return None;
        }
    }
    let (host, body_len) = (host?, body_len?);
    is_json.then_some(Set {
        host,
        authorization,
        body_at,
        len: body_at + body_len,
    })
}

/// Parses the request line and header lines of a request with `method`. Returns them and their length.
fn head<'a, 'lines>(
    bytes: &'a [u8],
    lines: &'lines mut [MaybeUninit<Header<'a>>],
    method: &str,
) -> Result<(Request<'lines, 'a>, usize), NotFast> {
    let mut request = Request::new(&mut []);
    match request.parse_with_uninit_headers(bytes, lines) {
        Ok(Status::Complete(len))
            if request.method == Some(method) && request.version == Some(1) =>
        {
            Ok((request, len))
        }
        Ok(Status::Partial) => Err(NotFast::Incomplete),
        Ok(Status::Complete(_)) | Err(_) => Err(NotFast::Fallback),
    }
}

/// A header that may affect the response.
enum RelevantHeader {
    Authorization,
    Connection,
    ContentLength,
    ContentType,
    GradePosition,
    Host,
    /// A header that the fast path does not support.
    Unsupported,
}

impl RelevantHeader {
    fn of(line: &Header<'_>) -> Option<Self> {
        let named = |name: &str| line.name.eq_ignore_ascii_case(name);
        // The length rules out most names.
        match line.name.len() {
            4 if named("host") => Some(Self::Host),
            6 if named("expect") => Some(Self::Unsupported),
            7 if named("upgrade") => Some(Self::Unsupported),
            10 if named("connection") => Some(Self::Connection),
            12 if named("content-type") => Some(Self::ContentType),
            12 if named("x-request-id") => Some(Self::Unsupported),
            13 if named("authorization") => Some(Self::Authorization),
            14 if named("content-length") => Some(Self::ContentLength),
            14 if named("grade-position") => Some(Self::GradePosition),
            16 if named("content-encoding") => Some(Self::Unsupported),
            17 if named("transfer-encoding") => Some(Self::Unsupported),
            _ => None,
        }
    }
}

fn keeps_alive(value: &[u8]) -> bool {
    value.eq_ignore_ascii_case(b"keep-alive")
}

/// Parses `Content-Length` (RFC 9110).
fn length(digits: &[u8]) -> Option<usize> {
    let length = number(digits, 4)?;
    usize::try_from(length)
        .ok()
        .filter(|length| *length <= BODY_BYTES_MAX)
}

fn parse_position(digits: &[u8]) -> Option<Seq> {
    number(digits, 19)
}

fn number(digits: &[u8], digits_max: usize) -> Option<u64> {
    let valid = (1..=digits_max).contains(&digits.len()) && digits.iter().all(u8::is_ascii_digit);
    let digits = valid.then(|| std::str::from_utf8(digits).ok())??;
    digits.parse().ok()
}

/// Whether a byte of a query is part of the value: the unreserved bytes of RFC 3986, two that ids often
/// contain, and those of a percent-encoded id.
fn is_value(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~:@%+".contains(&byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn get_of(lines: &str) -> Result<Option<Seq>, NotFast> {
        let request = format!("GET /get?user_id=a HTTP/1.1\r\nhost: x\r\n{lines}\r\n\r\n");
        get(request.as_bytes()).map(|get| get.position)
    }

    fn set_with(lines: &str) -> Result<usize, NotFast> {
        let request = format!("POST /set HTTP/1.1\r\nhost: x\r\n{lines}\r\n\r\n{{}}");
        set(request.as_bytes()).map(|set| set.len - set.body_at)
    }

    #[test]
    fn parses_reads() {
        let whole =
            "GET /get?user_id=a-Z.0_~:@%20+ HTTP/1.1\r\nHost: x\r\nconnection: Keep-Alive\r\n\r\n";
        let wanted = Get {
            user_id: "a-Z.0_~:@%20+",
            host: b"x",
            position: None,
            len: whole.len(),
        };
        assert_eq!(get(whole.as_bytes()), Ok(wanted));
        assert_eq!(get(format!("{whole}GET /").as_bytes()), Ok(wanted));
        for len in 0..whole.len() {
            assert_eq!(
                get(&whole.as_bytes()[..len]),
                Err(NotFast::Incomplete),
                "{len}"
            );
        }
        assert_eq!(set(whole.as_bytes()), Err(NotFast::Fallback));
        for lines in [
            "x-forwarded-for: 10.0.0.1\r\nvia: 1.1 proxy\r\ncookie: a=b; c=d\r\ntracestate: a=b",
            "accept: */*\r\ncontent-type: application/json\r\nauthorization: Basic eDp5",
            "x: y",
        ] {
            assert_eq!(get_of(lines), Ok(None), "{lines}");
        }
        assert_eq!(get_of("Grade-Position: 12"), Ok(Some(12)));
    }

    #[test]
    fn parses_writes() {
        let head = "POST /set HTTP/1.1\r\nHost: x\r\nvia: 1.1 proxy\r\nCONTENT-type: Application/JSON\r\nContent-Length: 2\r\n";
        let whole = format!("{head}Authorization: Basic eDp5\r\n\r\n{{}}");
        let wanted = Set {
            host: b"x",
            authorization: Some(b"Basic eDp5"),
            body_at: whole.len() - 2,
            len: whole.len(),
        };
        assert_eq!(set(format!("{whole}POST /").as_bytes()), Ok(wanted));
        for len in 0..=whole.len() {
            let wanted = match len < wanted.body_at {
                true => Err(NotFast::Incomplete),
                false => Ok(wanted),
            };
            assert_eq!(set(&whole.as_bytes()[..len]), wanted, "{len}");
        }
        let nobody = format!("{head}\r\n{{}}");
        let authorization = set(nobody.as_bytes()).map(|set| set.authorization);
        assert_eq!(authorization, Ok(None));
        assert_eq!(get(whole.as_bytes()), Err(NotFast::Fallback));
    }

    #[test]
    fn leaves_other_requests_to_hyper() {
        for target in [
            "/get",
            "/get?user_ids=a",
            "/get?user_id=a&x",
            "/get?user_id=a=b",
            "/get?user_id=a#",
            "/get?user_id=a\"",
            "/get?user_id=é",
            "/get/?user_id=a",
            "http://x/get?user_id=a",
        ] {
            let request = format!("GET {target} HTTP/1.1\r\nhost: x\r\n\r\n");
            assert_eq!(get(request.as_bytes()), Err(NotFast::Fallback), "{target}");
        }
        for target in ["/set?", "/set/", "/get", "http://x/set"] {
            let lines = "host: x\r\ncontent-type: application/json\r\ncontent-length: 2";
            let request = format!("POST {target} HTTP/1.1\r\n{lines}\r\n\r\n{{}}");
            assert_eq!(set(request.as_bytes()), Err(NotFast::Fallback), "{target}");
        }
        for line in [
            "GET /get?user_id=a HTTP/1.0",
            "HEAD /get?user_id=a HTTP/1.1",
            "get /get?user_id=a HTTP/1.1",
        ] {
            let request = format!("{line}\r\nhost: x\r\n\r\n");
            assert_eq!(get(request.as_bytes()), Err(NotFast::Fallback), "{line}");
        }
        for line in [
            "connection: close",
            "connection: keep-alive, te",
            "connection: upgrade",
            "transfer-encoding: chunked",
            "expect: 100-continue",
            "upgrade: h2c",
            "x-request-id: a",
            "content-encoding: gzip",
            "host: x",
        ] {
            assert_eq!(get_of(line), Err(NotFast::Fallback), "{line}");
            let lines = format!("content-type: application/json\r\ncontent-length: 2\r\n{line}");
            assert_eq!(set_with(&lines), Err(NotFast::Fallback), "{line}");
        }
        let no_host = "GET /get?user_id=a HTTP/1.1\r\nx: y\r\n\r\n";
        assert_eq!(get(no_host.as_bytes()), Err(NotFast::Fallback));
        for lines in [
            "content-length: 0",
            "grade-position: -1",
            "grade-position: 18446744073709551616",
            "grade-position: 1\r\ngrade-position: 1",
        ] {
            assert_eq!(get_of(lines), Err(NotFast::Fallback), "{lines}");
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
            "content-type: application/json\r\ncontent-length: 9999",
            "content-type: application/json\r\ncontent-length: 99999999999999999999",
            "content-type: application/json\r\ncontent-length:",
            "content-type: application/json\r\ncontent-length: 2\r\ncontent-length: 2",
            "authorization: a\r\nauthorization: b\r\ncontent-type: application/json\r\ncontent-length: 2",
        ] {
            assert_eq!(set_with(lines), Err(NotFast::Fallback), "{lines}");
        }
    }
}
