//! Checks the framing and the type of a body, and reads it into memory within bounds.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::task::Poll;
use std::time::Duration;

use axum::body::HttpBody;
use axum::extract::Request;
use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, TRANSFER_ENCODING};
use http::{HeaderMap, HeaderValue};
use http_body_util::BodyExt;

use super::error::{ApiError, excerpt};

/// The largest body that is read into memory, in bytes.
pub const BODY_BYTES_MAX: usize = 64 * 1024;

pub(super) const JSON: &str = "application/json";
pub(super) const NDJSON: &str = "application/x-ndjson";

const TOO_LARGE: ApiError = ApiError::BodyTooLarge {
    limit_bytes: BODY_BYTES_MAX,
};

/// Checks that a body has no transfer coding but `chunked`, and that only once (RFC 9112, section 6.1).
///
/// # Errors
/// It has another one.
pub(super) fn check_transfer_encoding(headers: &HeaderMap) -> Result<(), ApiError> {
    let mut codings = headers.get_all(TRANSFER_ENCODING).iter();
    let chunked = |value: &HeaderValue| value.as_bytes().eq_ignore_ascii_case(b"chunked");
    match (codings.next(), codings.next()) {
        (None, _) => Ok(()),
        (Some(coding), None) if chunked(coding) => Ok(()),
        _ => Err(ApiError::TransferEncoding),
    }
}

/// The one of `accepted` that `Content-Type` names, with or without parameters.
///
/// # Errors
/// It names another type, or the body is compressed.
pub(super) fn content_type(
    headers: &HeaderMap,
    accepted: &'static [&'static str],
) -> Result<&'static str, ApiError> {
    let mut encodings = headers.get_all(CONTENT_ENCODING).iter();
    if let Some(encoding) =
        encodings.find(|encoding| !encoding.as_bytes().eq_ignore_ascii_case(b"identity"))
    {
        return Err(ApiError::ContentEncoding(excerpt(encoding.as_bytes())));
    }
    let value = headers.get(CONTENT_TYPE);
    let text = value.and_then(|value| value.to_str().ok());
    let text = text.unwrap_or_default();
    let essence = text.split_once(';').map_or(text, |(essence, _)| essence);
    let named = |accepted: &&&str| essence.trim().eq_ignore_ascii_case(accepted);
    let found = accepted.iter().find(named).copied();
    found.ok_or_else(|| ApiError::UnsupportedMediaType {
        found: excerpt(value.map_or(b"", |value| value.as_bytes())),
        accepted,
    })
}

/// Reads the body of `request`.
///
/// # Errors
/// It has more than [`BODY_BYTES_MAX`], does not arrive within `wait_max`, or is malformed.
pub(super) async fn read(request: Request, wait_max: Duration) -> Result<Bytes, ApiError> {
    let length = request.headers().get(CONTENT_LENGTH);
    let length = length.and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if length.is_some_and(|bytes| bytes > BODY_BYTES_MAX as u64) {
        return Err(TOO_LARGE);
    }
    let mut body = pin!(collect(request.into_body()));
    if let Some(body) = poll_twice(body.as_mut()).await {
        return body;
    }
    let in_time = tokio::time::timeout(wait_max, body).await;
    in_time.unwrap_or(Err(ApiError::BodySlow {
        seconds: wait_max.as_secs(),
    }))
}

/// The output of `future` if it completes within two polls. A short body completes at the second one,
/// because hyper passes it on after the first. This saves a timer.
async fn poll_twice<T>(mut future: Pin<&mut impl Future<Output = T>>) -> Option<T> {
    let mut polled = false;
    poll_fn(|cx| match future.as_mut().poll(cx) {
        Poll::Ready(done) => Poll::Ready(Some(done)),
        Poll::Pending if polled => Poll::Ready(None),
        Poll::Pending => {
            polled = true;
            cx.waker().wake_by_ref();
            Poll::Pending
        }
    })
    .await
}

async fn collect<B>(mut body: B) -> Result<Bytes, ApiError>
where
    B: HttpBody<Data = Bytes> + Unpin,
{
    // Nearly every body arrives in one frame, which needs no copy.
    let (mut first, mut whole) = (Bytes::new(), BytesMut::new());
    while !body.is_end_stream()
        && let Some(frame) = body.frame().await
    {
        let frame = frame.map_err(|_| ApiError::BodyBroken)?;
        let Ok(data) = frame.into_data() else {
            continue;
        };
        if first.len().max(whole.len()) + data.len() > BODY_BYTES_MAX {
            return Err(TOO_LARGE);
        }
        if first.is_empty() {
            first = data;
            continue;
        }
        if whole.is_empty() {
            whole.extend_from_slice(&first);
        }
        whole.extend_from_slice(&data);
    }
    Ok(match whole.is_empty() {
        true => first,
        false => whole.freeze(),
    })
}
