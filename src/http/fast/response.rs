//! The answers to plain requests, as hyper would write them.

use std::cell::RefCell;
use std::time::{Duration, Instant, SystemTime};

use crate::log::Seq;

thread_local! {
    /// Room to make answers in, kept.
    static ANSWERS: RefCell<Answers> = RefCell::new(Answers::new());
}

/// Answers, one behind the other.
pub(super) struct Answers {
    out: Vec<u8>,
    json: Vec<u8>,
    /// As the `date` line has it.
    date: String,
    /// When it is another second; `None` before the first answer.
    date_until: Option<Instant>,
}

impl Answers {
    fn new() -> Self {
        Self {
            out: Vec::new(),
            json: Vec::new(),
            date: String::new(),
            date_until: None,
        }
    }

    /// Hands this thread's to `make`, with none in it yet.
    pub(super) fn with<T>(make: impl FnOnce(&mut Self) -> T) -> T {
        ANSWERS.with_borrow_mut(|answers| {
            answers.out.clear();
            make(answers)
        })
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.out
    }

    /// Adds the grade that `show` gives; `false` if it gives none.
    pub(super) fn grade(&mut self, now: Instant, show: impl FnOnce(&mut Vec<u8>) -> bool) -> bool {
        self.json.clear();
        if !show(&mut self.json) {
            return false;
        }
        self.out.extend_from_slice(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: ",
        );
        self.number(self.json.len() as u64);
        self.end(now);
        self.out.extend_from_slice(&self.json);
        true
    }

    /// Adds that a write was applied with batch `seq`, and whether the connection ends.
    pub(super) fn written(&mut self, seq: Seq, closes: bool, now: Instant) {
        self.out
            .extend_from_slice(b"HTTP/1.1 204 No Content\r\ngrade-position: ");
        self.number(seq);
        if closes {
            self.out.extend_from_slice(b"\r\nconnection: close");
        }
        self.end(now);
    }

    fn number(&mut self, number: u64) {
        let mut digits = itoa::Buffer::new();
        self.out.extend_from_slice(digits.format(number).as_bytes());
    }

    /// Ends the header lines with the date.
    fn end(&mut self, now: Instant) {
        if self.date_until.is_none_or(|until| now >= until) {
            let time = SystemTime::now();
            self.date = httpdate::fmt_http_date(time);
            let since = time.duration_since(SystemTime::UNIX_EPOCH);
            let into_second = Duration::from_nanos(since.unwrap_or_default().subsec_nanos().into());
            let left = Duration::from_secs(1).saturating_sub(into_second);
            self.date_until = Some(now + left);
        }
        self.out.extend_from_slice(b"\r\ndate: ");
        self.out.extend_from_slice(self.date.as_bytes());
        self.out.extend_from_slice(b"\r\n\r\n");
    }
}
