//! Requests that are answered past hyper, beside a plain reading of the rules: lines, words between
//! single spaces, a name before the first colon. What is taken must read so; what reads so without any
//! liberty must be taken.

use gradestore::http::fast::request::{Other, Set, get, set};

/// Said here once more, so that no line becomes harmless by one change alone.
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
const LINES_MAX: usize = 24;

pub(crate) fn check(data: &[u8]) {
    let (read, write) = (get(data), set(data));
    assert!(read.is_err() || write.is_err());
    let head = head(data);
    let wanted_read = head.as_ref().and_then(Head::read);
    let wanted_write = head.as_ref().and_then(|head| head.write(data));
    match &head {
        Some(head) => {
            assert!(read != Err(Other::Begun) && write != Err(Other::Begun));
            if head.strict || read.is_ok() {
                assert_eq!(read.ok(), wanted_read);
            }
            if head.strict || write.is_ok() {
                assert_eq!(write.as_ref().ok(), wanted_write.as_ref());
            }
        }
        None => assert!(read.is_err() && write.is_err()),
    }
    // The same, however much of what follows is there; and nothing, as long as it is not whole.
    let sum: usize = data.iter().map(|byte| usize::from(*byte)).sum();
    let part = &data[..sum % (data.len() + 1)];
    if let Ok((_, len)) = read {
        assert_eq!(
            get(part),
            if part.len() < len {
                Err(Other::Begun)
            } else {
                read
            }
        );
    }
    if let (Ok(whole), Some(head)) = (&write, &head) {
        let wanted = match part.len() {
            cut if cut < head.len => Err(Other::Begun),
            cut if cut < whole.len => Err(Other::NotPlain),
            _ => write,
        };
        assert_eq!(set(part), wanted);
    }
}

/// A whole header.
struct Head<'a> {
    request: Vec<&'a str>,
    /// Names in lower case, values without the space around them.
    lines: Vec<(String, &'a [u8])>,
    len: usize,
    /// Whether it takes no liberty that a parser may allow or not.
    strict: bool,
}

impl<'a> Head<'a> {
    fn read(&self) -> Option<(&'a str, usize)> {
        let ["GET", target, "HTTP/1.1"] = self.request[..] else {
            return None;
        };
        let id = target.strip_prefix("/get?user_id=")?;
        let plain = |c: char| c.is_ascii_alphanumeric() || "-._~:@".contains(c);
        let harmless = self.lines.iter().all(is_harmless);
        let plain = harmless && self.lines.len() <= LINES_MAX && id.chars().all(plain);
        plain.then_some((id, self.len))
    }

    fn write(&self, data: &'a [u8]) -> Option<Set<'a>> {
        if self.request != ["POST", "/set", "HTTP/1.1"] || self.lines.len() > LINES_MAX {
            return None;
        }
        let named = |wanted: &str| -> Vec<&'a [u8]> {
            let of_name = self.lines.iter().filter(|(name, _)| name == wanted);
            of_name.map(|(_, value)| *value).collect()
        };
        let ([kind], [length]) = (&named("content-type")[..], &named("content-length")[..]) else {
            return None;
        };
        let authorization = named("authorization");
        let own = ["content-type", "content-length", "authorization"];
        let mut others = self
            .lines
            .iter()
            .filter(|(name, _)| !own.contains(&name.as_str()));
        let digits = str::from_utf8(length).ok()?;
        let sane = digits.len() <= 4 && digits.bytes().all(|digit| digit.is_ascii_digit());
        let plain = kind.eq_ignore_ascii_case(b"application/json")
            && sane
            && authorization.len() <= 1
            && others.all(is_harmless);
        let len = self.len + digits.parse::<usize>().ok().filter(|_| plain)?;
        Some(Set {
            authorization: authorization.first().copied(),
            body: data.get(self.len..len)?,
            len,
        })
    }
}

fn is_harmless((name, value): &(String, &[u8])) -> bool {
    let keeps_alive = name == "connection" && value.eq_ignore_ascii_case(b"keep-alive");
    HARMLESS.contains(&name.as_str()) || keeps_alive
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
            // Some begin with an empty line.
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
