//! The responses of the fast path, byte for byte those of hyper.

use std::cell::RefCell;
use std::time::{Duration, Instant, SystemTime};

use super::GetOutcome;
use crate::http::common_headers::COMMON_LINES;
use crate::http::request_id;
use crate::log::Seq;

thread_local! {
    /// Buffers for responses, reused by all connections of a thread.
    static RESPONSES: RefCell<Responses> = RefCell::new(Responses::new());
}

/// Consecutive responses in one buffer.
pub(super) struct Responses {
    out: Vec<u8>,
    /// The body of the current response.
    body: Vec<u8>,
    /// The value of the header `date`.
    date: String,
    /// The end of the second that `date` names; `None` before the first response.
    date_until: Option<Instant>,
}

impl Responses {
    fn new() -> Self {
        Self {
            out: Vec::new(),
            body: Vec::new(),
            date: String::new(),
            date_until: None,
        }
    }

    /// Calls `run` with the empty buffer of this thread.
    pub(super) fn with<T>(run: impl FnOnce(&mut Self) -> T) -> T {
        RESPONSES.with_borrow_mut(|responses| {
            responses.out.clear();
            run(responses)
        })
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.out
    }

    /// Adds the response to a read, whose body `read` appends.
    pub(super) fn read(
        &mut self,
        now: Instant,
        read: impl FnOnce(&mut Vec<u8>) -> GetOutcome,
    ) -> GetOutcome {
        self.body.clear();
        let outcome = read(&mut self.body);
        match outcome {
            GetOutcome::Grade => self.out.extend_from_slice(
                b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: ",
            ),
            GetOutcome::NotFound => {
                self.out.extend_from_slice(
                    b"HTTP/1.1 404 Not Found\r\ncontent-type: application/problem+json\r\n\
                      content-length: ",
                );
            }
            GetOutcome::Fallback => return outcome,
        }
        self.number(self.body.len() as u64);
        self.out.extend_from_slice(COMMON_LINES);
        if let GetOutcome::NotFound = outcome {
            self.out.extend_from_slice(b"\r\nx-request-id: ");
            self.out
                .extend_from_slice(request_id::generate().as_bytes());
        }
        self.end(now);
        self.out.extend_from_slice(&self.body);
        outcome
    }

    /// Adds the response to a write that was applied with batch `seq`.
    pub(super) fn written(&mut self, seq: Seq, closes: bool, now: Instant) {
        self.out
            .extend_from_slice(b"HTTP/1.1 204 No Content\r\ngrade-position: ");
        self.number(seq);
        if closes {
            self.out.extend_from_slice(b"\r\nconnection: close");
        }
        self.out.extend_from_slice(COMMON_LINES);
        self.end(now);
    }

    fn number(&mut self, number: u64) {
        let mut digits = itoa::Buffer::new();
        self.out.extend_from_slice(digits.format(number).as_bytes());
    }

    /// Adds `date` and ends the header.
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
