//! `X-Request-Id`: identifies a request in its response, and in the log if it failed.
//!
//! The node returns the id that a client sent. Otherwise it generates one, except for a successful
//! `GET /get`, `POST /set` of one patch, or `DELETE /set`, where the cost would be noticeable.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};

use http::{HeaderMap, HeaderName, HeaderValue};

pub(super) const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// The longest id that is accepted from a client: enough for two UUIDs or a trace id.
const BYTES_MAX: usize = 128;

/// Starts at a random number, so that two processes do not generate the same ids.
#[expect(
    clippy::expect_used,
    reason = "the process needed random numbers to start"
)]
static NEXT: LazyLock<AtomicU64> = LazyLock::new(|| {
    let random = getrandom::u64();
    AtomicU64::new(random.expect("the system still has random numbers"))
});

/// The id that the client sent. It is ignored if it is repeated, too long, or not printable ASCII,
/// because it goes into the log.
pub(super) fn from_client(headers: &HeaderMap) -> Option<HeaderValue> {
    let mut sent = headers.get_all(X_REQUEST_ID).iter();
    let id = sent.next()?;
    let valid = sent.next().is_none()
        && (1..=BYTES_MAX).contains(&id.len())
        && id.as_bytes().iter().all(u8::is_ascii_graphic);
    valid.then(|| id.clone())
}

/// A new id of 16 hexadecimal digits.
#[expect(clippy::expect_used, reason = "it can't fail")]
pub(super) fn generate() -> HeaderValue {
    let id = NEXT.fetch_add(1, Ordering::Relaxed);
    HeaderValue::try_from(format!("{id:016x}")).expect("digits are a valid header value")
}
