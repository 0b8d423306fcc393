//! Encodes a batch's writes as a JSON array of patches, as `POST /set` takes them, and of
//! deletions, `{"delete":"ID"}`.

use std::sync::Arc;

use simd_json::Buffers;
use simd_json::serde::from_slice_with_buffers;

use crate::grade::Write;
use crate::sys::json;

/// The format of batches. A message with another format was written by a newer program.
pub(super) const FORMAT: u8 = 1;

/// The approximate size of a patch of one field.
const PATCH_BYTES: usize = 40;

/// Appends `writes` to `out`.
pub(super) fn write(writes: &[Write], out: &mut Vec<u8>) {
    out.push(b'[');
    for (index, write) in writes.iter().enumerate() {
        if index > 0 {
            out.push(b',');
        }
        write.write_json(out);
    }
    out.push(b']');
}

/// Reads the output of [`write()`].
///
/// # Errors
/// The bytes are not an array of patches and deletions; says why.
pub(super) fn read(json: &[u8]) -> Result<Arc<[Write]>, Box<str>> {
    match read_fast(json) {
        Some(writes) => Ok(writes),
        None => json::in_place(json, parse),
    }
}

fn parse(json: &mut [u8], buffers: &mut Buffers) -> Result<Arc<[Write]>, Box<str>> {
    let read = from_slice_with_buffers::<Vec<Write<&str>>>(json, buffers)
        .map(|writes| writes.iter().map(Write::to_owned).collect());
    read.map_err(|error| error.to_string().into())
}

/// Reads patches in exactly the form of [`write()`], which nearly all batches have. `None` for a
/// batch with a deletion, with escapes, or in another form. Measurements: ADR 0004.
fn read_fast(json: &[u8]) -> Option<Arc<[Write]>> {
    let mut rest = std::str::from_utf8(json).ok()?.strip_prefix('[')?;
    let mut writes = Vec::with_capacity(rest.len() / PATCH_BYTES);
    loop {
        let after = Write::parse_set(rest, &mut writes)?;
        match after.strip_prefix(',') {
            Some(next) => rest = next,
            None => return (after == "]").then(|| writes.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::grade::{Changes, Patch};

    #[test]
    fn writes_round_trip() {
        let mut changes = Changes::default();
        changes.set(1, i64::MIN);
        let set = |user_id: &str, changes| {
            let user_id = user_id.into();
            Write::Set(Patch { user_id, changes })
        };
        let id = "\"\\é\u{1f600}";
        let writes = [
            set("a", Changes::default()),
            set(id, changes),
            set("a", changes),
            Write::Delete(id.into()),
            set(id, changes),
        ];
        for count in 0..=writes.len() {
            let mut json = Vec::new();
            write(&writes[..count], &mut json);
            assert_eq!(read(&json).as_deref(), Ok(&writes[..count]));
        }
    }

    #[test]
    fn other_json_is_rejected() {
        for json in [
            "",
            "{}",
            "[1]",
            "[[]]",
            r#"[{"spp":1}]"#,
            r#"[{"user_id":"a"}"#,
            r#"[{"delete":"a","spp":1}]"#,
            r#"[{"delete":""}]"#,
        ] {
            assert!(read(json.as_bytes()).is_err(), "{json}");
        }
    }

    fn parsed(json: &[u8]) -> Result<Arc<[Write]>, Box<str>> {
        json::in_place(json, parse)
    }

    /// Whether the fast path reads `json`. Checks that the parser then returns the same.
    fn is_read_fast(json: &str) -> bool {
        let read = read_fast(json.as_bytes());
        if let Some(read) = &read {
            assert_eq!(parsed(json.as_bytes()).as_ref(), Ok(read), "{json}");
        }
        read.is_some()
    }

    #[test]
    fn the_fast_path_accepts_only_valid_ids() {
        // The fast path tests eight bytes at once, except the last seven of a batch.
        for end in ["\",\"spp\":-1}]", "\"}]"] {
            for (len, at) in (1..=17).flat_map(|len| (0..len).map(move |at| (len, at))) {
                for byte in 0..0x80_u8 {
                    let mut id = vec![b'a'; len];
                    id[at] = byte;
                    let id = String::from_utf8(id).unwrap();
                    let plain = matches!(byte, b' '..=b'~') && !matches!(byte, b'"' | b'\\');
                    let read = is_read_fast(&format!(r#"[{{"user_id":"{id}{end}"#));
                    assert_eq!(read, plain, "{byte} at {at} of {len}");
                }
            }
        }
        for (id, valid) in [
            ("", false),
            (&"a".repeat(256), true),
            (&"a".repeat(257), false),
            (&"é".repeat(128), true),
            (&"é".repeat(129), false),
            ("\u{80}", false),
            ("\u{85}", false),
            ("aaaaaaaa\u{9f}", false),
            ("\u{a0}", true),
            ("aaaaaaa\u{7ff}", true),
        ] {
            let json = format!(r#"[{{"user_id":"{id}","spp":1}}]"#);
            assert_eq!(is_read_fast(&json), valid, "{id:?}");
            assert_eq!(parsed(json.as_bytes()).is_ok(), valid, "{id:?}");
        }
    }

    #[test]
    fn the_fast_path_accepts_only_the_written_form_of_fields() {
        for (fields, written) in [
            ("", true),
            (r#","spp":0"#, true),
            (r#","spp":7"#, true),
            (r#","spp":-1"#, true),
            (r#","spp":9223372036854775807"#, true),
            (r#","spp":-9223372036854775808"#, true),
            (
                r#","postpaid_limit":1,"spp":2,"shipping_fee":3,"return_fee":4"#,
                true,
            ),
            (r#","spp":-0"#, false),
            (r#","spp":00"#, false),
            (r#","spp":01"#, false),
            (r#","spp":-01"#, false),
            (r#","spp":-"#, false),
            (r#","spp":"#, false),
            (r#","spp":--1"#, false),
            (r#","spp":+1"#, false),
            (r#","spp":1.0"#, false),
            (r#","spp":1e1"#, false),
            (r#","spp": 1"#, false),
            (r#","spp":9223372036854775808"#, false),
            (r#","spp":-9223372036854775809"#, false),
            (r#","spp":18446744073709551616"#, false),
            (r#","spp":00000000000000000000"#, false),
            (r#","spp":1,"spp":1"#, false),
            (r#","return_fee":1,"spp":1"#, false),
            (r#","spp2":1"#, false),
            (r#","sp":1"#, false),
            (r#",spp":1"#, false),
            (r#",""#, false),
            (",", false),
        ] {
            let json = format!(r#"[{{"user_id":"a"{fields}}}]"#);
            assert_eq!(is_read_fast(&json), written, "{json}");
        }
    }

    proptest! {
        /// The fast path reads the same as the parser, and only the written form.
        #[test]
        fn the_fast_path_agrees_with_the_parser(json in prop_oneof![
            r#"\[(\{"user_id":"[a\\\\"é]{0,3}"(,"(postpaid_limit|spp|return_fee|x)": ?-?[0-9]{0,20}){0,3}\}[,\]]?){1,3}"#,
            r#"\[\{"user_id":"[ab]{1,3}"(,"spp":-?(0|[1-9][0-9]{0,19}))?(,"return_fee":-?[1-9])?\}\]"#,
        ]) {
            let parsed = parsed(json.as_bytes());
            if let Some(writes) = read_fast(json.as_bytes()) {
                prop_assert_eq!(Ok(&writes), parsed.as_ref());
                let mut written = Vec::new();
                write(&writes, &mut written);
                prop_assert_eq!(json.as_bytes(), written);
            } else if let Ok(writes) = parsed {
                let mut written = Vec::new();
                write(&writes, &mut written);
                // The fast path leaves only escapes to the parser.
                prop_assert!(json.as_bytes() != written || json.contains('\\') || writes.is_empty());
            }
        }
    }
}
