//! `X-Request-Id`: names a request in its answer and in the log line of one that failed.
//!
//! A client may bring one, and gets it back with every answer. Else one is made, but for a `GET /get`, a
//! `POST /set` of one patch or a `DELETE /set` that succeeds: nobody asks for it there, and it would cost
//! what those routes are spared.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};

use http::{HeaderMap, HeaderName, HeaderValue};

/// The header's name.
pub(super) const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// The longest one that is taken from a client: enough for two UUIDs or a trace's name.
const BYTES_MAX: usize = 128;

/// Counts from a number of this process' own, so that two processes make no two alike.
static NEXT: LazyLock<AtomicU64> =
    LazyLock::new(|| AtomicU64::new(getrandom::u64().unwrap_or_default()));

/// The one that a client sent, unless there are two, or it is long, or has what is not printable ASCII
/// in it: it goes into logs.
pub(super) fn sent(headers: &HeaderMap) -> Option<HeaderValue> {
    let mut sent = headers.get_all(X_REQUEST_ID).iter();
    let id = sent.next()?;
    let sane = sent.next().is_none()
        && (1..=BYTES_MAX).contains(&id.len())
        && id.as_bytes().iter().all(u8::is_ascii_graphic);
    sane.then(|| id.clone())
}

/// A new one: 16 hexadecimal digits.
#[expect(clippy::expect_used, reason = "it can't fail")]
pub(super) fn made() -> HeaderValue {
    let id = NEXT.fetch_add(1, Ordering::Relaxed);
    HeaderValue::try_from(format!("{id:016x}")).expect("digits are a header's value")
}
