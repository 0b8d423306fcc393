//! Requests of the fast path, compared with a simple parser: lines, words between single spaces, a
//! name before the first colon. The simple parser must agree with every request that the fast path
//! accepts. The fast path must accept every request that is strictly well-formed.

use gradestore::http::fast::request::{BODY_BYTES_MAX, Get, NotFast, Set, get, set};

/// Repeated here, so that a change in the program alone is detected.
const FALLBACK: [&str; 5] = [
    "content-encoding",
    "expect",
    "transfer-encoding",
    "upgrade",
    "x-request-id",
];
const LINES_MAX: usize = 100;

pub(crate) fn check(data: &[u8]) {
    let (read, write) = (get(data), set(data));
    assert!(read.is_err() || write.is_err());
    let head = head(data);
    let wanted_read = head.as_ref().and_then(Head::read);
    let wanted_write = head.as_ref().and_then(Head::write);
    match &head {
        Some(head) => {
            assert!(read != Err(NotFast::Incomplete) && write != Err(NotFast::Incomplete));
            if head.strict || read.is_ok() {
                assert_eq!(read.ok(), wanted_read);
            }
            if head.strict || write.is_ok() {
                assert_eq!(write.ok(), wanted_write);
            }
        }
        None => assert!(read.is_err() && write.is_err()),
    }
    // The result does not depend on later bytes; there is none before the header is complete.
    let sum: usize = data.iter().map(|byte| usize::from(*byte)).sum();
    let part = &data[..sum % (data.len() + 1)];
    if let Ok(Get { len, .. }) = read {
        let wanted = match part.len() < len {
            true => Err(NotFast::Incomplete),
            false => read,
        };
        assert_eq!(get(part), wanted);
    }
    if let Ok(Set { body_at, .. }) = write {
        let wanted = match part.len() < body_at {
            true => Err(NotFast::Incomplete),
            false => write,
        };
        assert_eq!(set(part), wanted);
    }
}

/// A complete header.
struct Head<'a> {
    request: Vec<&'a str>,
    /// Names in lower case, values without the space around them.
    lines: Vec<(String, &'a [u8])>,
    len: usize,
    /// Whether it is strictly well-formed, without anything that parsers may treat differently.
    strict: bool,
}

impl<'a> Head<'a> {
    fn named(&self, wanted: &str) -> Vec<&'a [u8]> {
        let of_name = self.lines.iter().filter(|(name, _)| name == wanted);
        of_name.map(|(_, value)| *value).collect()
    }

    fn host(&self) -> Option<&'a [u8]> {
        match self.named("host")[..] {
            [host] => Some(host),
            _ => None,
        }
    }

    /// Whether no header sends the request to the router.
    fn is_fast(&self) -> bool {
        let left_to_router = |(name, value): &(String, &[u8])| {
            FALLBACK.contains(&name.as_str())
                || name == "connection" && !value.eq_ignore_ascii_case(b"keep-alive")
        };
        self.lines.len() <= LINES_MAX && !self.lines.iter().any(left_to_router)
    }

    fn read(&self) -> Option<Get<'a>> {
        let ["GET", target, "HTTP/1.1"] = self.request[..] else {
            return None;
        };
        let user_id = target.strip_prefix("/get?user_id=")?;
        let is_value = |c: char| c.is_ascii_alphanumeric() || "-._~:@%+".contains(c);
        let position = match &self.named("grade-position")[..] {
            [] => None,
            [digits] => Some(number(digits, 19)?),
            _ => return None,
        };
        let fast = self.is_fast()
            && self.named("content-length").is_empty()
            && user_id.chars().all(is_value);
        fast.then_some(Get {
            user_id,
            host: self.host()?,
            position,
            len: self.len,
        })
    }

    fn write(&self) -> Option<Set<'a>> {
        if self.request != ["POST", "/set", "HTTP/1.1"] || !self.is_fast() {
            return None;
        }
        let ([kind], [length]) = (
            &self.named("content-type")[..],
            &self.named("content-length")[..],
        ) else {
            return None;
        };
        let authorization = self.named("authorization");
        let body_len = number(length, 4)? as usize;
        let fast = kind.eq_ignore_ascii_case(b"application/json")
            && authorization.len() <= 1
            && body_len <= BODY_BYTES_MAX;
        fast.then_some(Set {
            host: self.host()?,
            authorization: authorization.first().copied(),
            body_at: self.len,
            len: self.len + body_len,
        })
    }
}

fn number(digits: &[u8], digits_max: usize) -> Option<u64> {
    let digits = str::from_utf8(digits).ok()?;
    let valid = digits.len() <= digits_max && digits.bytes().all(|digit| digit.is_ascii_digit());
    digits.parse().ok().filter(|_| valid)
}

fn head(data: &[u8]) -> Option<Head<'_>> {
    let mut lines = Vec::new();
    let (mut at, mut strict) = (0, true);
    loop {
        let end = at + data[at..].iter().position(|byte| *byte == b'\n')?;
        let line = data[at..end].strip_suffix(b"\r");
        strict &= line.is_some();
        let line = line.unwrap_or(&data[at..end]);
        strict &= line.iter().all(|byte| matches!(byte, b' '..=b'~'));
        at = end + 1;
        match (line.is_empty(), lines.is_empty()) {
            // Some clients send an empty line first.
            (true, true) => strict = false,
            (true, false) => break,
            (false, _) => lines.push(line),
        }
    }
    let mut lines = lines.into_iter();
    let request = str::from_utf8(lines.next()?).ok()?;
    let lines = lines.map(|line| {
        let colon = line.iter().position(|byte| *byte == b':')?;
        let name = str::from_utf8(&line[..colon]).ok()?;
        strict &= !name.is_empty();
        strict &= name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        Some((name.to_ascii_lowercase(), line[colon + 1..].trim_ascii()))
    });
    let lines = lines.collect::<Option<_>>()?;
    Some(Head {
        request: request.split(' ').collect(),
        lines,
        len: at,
        strict,
    })
}
