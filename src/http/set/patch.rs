//! Parses patches.

use serde::de::IgnoredAny;

use crate::grade::Patch;
use crate::http::error::ApiError;
use crate::sys::json;

/// Parses the body of `POST /set`.
///
/// # Errors
/// The body is not UTF-8, not JSON, or not a patch.
pub fn parse_patch(body: &[u8]) -> Result<Patch, ApiError> {
    let parsed = json::in_place(body, |bytes, buffers| {
        simd_json::serde::from_slice_with_buffers::<Patch<&str>>(bytes, buffers)
            .map(|patch| patch.to_owned())
    });
    parsed.map_err(|_| explain(body))
}

/// Finds the error in a body that simd-json rejected. simd-json does not distinguish invalid JSON from
/// valid JSON with, for example, a number beyond 64 bits, and its messages have no location.
fn explain(body: &[u8]) -> ApiError {
    let text = match std::str::from_utf8(body) {
        Ok(text) => text,
        Err(error) => {
            return ApiError::BodyNotUtf8 {
                at: error.valid_up_to(),
            };
        }
    };
    if text.starts_with('\u{feff}') {
        return ApiError::ByteOrderMark;
    }
    // This checks only the grammar, at any depth: neither the range of numbers nor surrogate pairs.
    if let Err(error) = serde_json::from_str::<IgnoredAny>(text) {
        return ApiError::NotJson(error.to_string());
    }
    match serde_json::from_str::<Patch<String>>(text) {
        // The grammar is valid. The remaining syntax errors are numbers beyond the range of a float,
        // and escapes of half a surrogate pair.
        Err(error) if error.to_string().contains("number out of range") => {
            ApiError::NotAPatch(format!("{error}; send 64-bit integers"))
        }
        Err(error) if error.is_syntax() => ApiError::NotAPatch(format!(
            "a \\u escape is half of a surrogate pair ({error}); escape both halves, or neither"
        )),
        Err(error) => ApiError::NotAPatch(error.to_string()),
        Ok(_) => ApiError::NotAPatch("simd-json rejected it".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn cause(body: &[u8]) -> &'static str {
        match parse_patch(body) {
            Ok(_) => "ok",
            Err(error) => error.kind().1,
        }
    }

    #[test]
    fn distinguishes_invalid_json_from_invalid_patches() {
        let deep = "[".repeat(30_000);
        let deep_whole = format!("{deep}{}", "]".repeat(30_000));
        let nested = format!(r#"{{"user_id":"a","spp":{deep_whole}}}"#);
        for (body, wanted) in [
            (&br#"{"user_id":"a","spp":-9223372036854775808}"#[..], "ok"),
            (br#" {"spp":9223372036854775807,"user_id":"a"} "#, "ok"),
            (br#"{"user_id":"a"}"#, "ok"),
            (br#"{"user_id":"\ud83d\ude00"}"#, "ok"),
            (b"", "not-json"),
            (b"{", "not-json"),
            (b"nul", "not-json"),
            (br#"{"user_id":"a"} x"#, "not-json"),
            (br#"{"user_id":"a"}{"user_id":"a"}"#, "not-json"),
            (br#"{"user_id":"a",}"#, "not-json"),
            (br#"{"user_id":"a","spp":01}"#, "not-json"),
            (br#"{"user_id":"a","spp":NaN}"#, "not-json"),
            (b"{\"user_id\":\"a\0\"}", "not-json"),
            (deep.as_bytes(), "not-json"),
            (b"\xef\xbb\xbf{}", "not-json"),
            (b"{\"user_id\":\"\xff\"}", "body-not-utf8"),
            (b"{\"user_id\":\"\xed\xa0\x80\"}", "body-not-utf8"),
            (b"[]", "not-a-patch"),
            (b"null", "not-a-patch"),
            (deep_whole.as_bytes(), "not-a-patch"),
            (nested.as_bytes(), "not-a-patch"),
            (br#"{"user_id":"\ud800"}"#, "not-a-patch"),
            (br#"{"user_id":"\u0000"}"#, "not-a-patch"),
            (br#"{"user_id":"a","spp":1.0}"#, "not-a-patch"),
            (br#"{"user_id":"a","spp":1e2}"#, "not-a-patch"),
            (
                br#"{"user_id":"a","spp":9223372036854775808}"#,
                "not-a-patch",
            ),
            (
                br#"{"user_id":"a","spp":-9223372036854775809}"#,
                "not-a-patch",
            ),
            (
                br#"{"user_id":"a","spp":123456789012345678901234567890}"#,
                "not-a-patch",
            ),
            (br#"{"user_id":"a","spp":1e999}"#, "not-a-patch"),
        ] {
            let shown = String::from_utf8_lossy(body.get(..60).unwrap_or(body));
            assert_eq!(cause(body), wanted, "{shown}");
        }
    }

    proptest! {
        /// simd-json accepts exactly the same bodies as serde_json.
        #[test]
        fn agrees_with_serde_json(body in prop_oneof![
            prop::collection::vec(any::<u8>(), 0..60),
            r#"[{\[]"(user_id|spp|s\\u0070p|x)":("[a\\u0041é"]{0,3}"|-?[0-9]{1,20}|null|1\.0|[0-9]e1)(,"(user_id|spp|return_fee)":("a"|-?[0-9]{1,19})){0,3}[}\]]"#
                .prop_map(String::into_bytes),
        ]) {
            // serde_json parses -0 as a float.
            prop_assume!(!body.windows(2).any(|two| two == b"-0"));
            let serde = serde_json::from_slice::<Patch<String>>(&body).ok();
            let simd = parse_patch(&body).ok();
            prop_assert_eq!(simd, serde.map(|patch| patch.to_owned()));
        }
    }
}
