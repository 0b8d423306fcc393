//! The headers of every response.
//!
//! No cache may answer for the node, because a read must see all earlier writes. No browser may take a
//! response for a script, or give it to a page of another server.

use http::header::{CACHE_CONTROL, X_CONTENT_TYPE_OPTIONS};
use http::{HeaderName, HeaderValue};

pub(super) const COMMON_HEADERS: [(HeaderName, HeaderValue); 3] = [
    (CACHE_CONTROL, HeaderValue::from_static("no-store")),
    (
        HeaderName::from_static("cross-origin-resource-policy"),
        HeaderValue::from_static("same-origin"),
    ),
    (X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
];

/// The same as lines of a header, each after the end of another line.
pub(super) const COMMON_LINES: &[u8] = b"\r\ncache-control: no-store\r\n\
    cross-origin-resource-policy: same-origin\r\nx-content-type-options: nosniff";
