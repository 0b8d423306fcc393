//! A batch's writes as bytes: a JSON array of what `POST /set` takes and, in format 2, of deletions.
//!
//! A batch without a deletion is of format 1, as before there were any, so programs from then go on
//! reading it; at one of format 2 they stop.

use std::sync::Arc;

use simd_json::Buffers;
use simd_json::serde::from_slice_with_buffers;

use crate::grade::{Patch, Write};
use crate::json;

/// How a batch's writes are spelled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    /// Patches alone.
    Patches,
    /// Patches and deletions.
    Writes,
}

impl Format {
    /// The oldest format that has all of `writes`.
    pub(super) fn of(writes: &[Write]) -> Self {
        match writes.iter().any(Write::deletes) {
            true => Self::Writes,
            false => Self::Patches,
        }
    }

    /// The format known by `number`, if this program knows it.
    pub(super) fn numbered(number: u64) -> Option<Self> {
        [Self::Patches, Self::Writes]
            .into_iter()
            .find(|format| u64::from(format.number()) == number)
    }

    pub(super) fn number(self) -> u8 {
        match self {
            Self::Patches => 1,
            Self::Writes => 2,
        }
    }
}

/// What a patch of one field takes, about.
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

/// Reads what [`write()`] wrote, in its format.
///
/// # Errors
/// The bytes are no array of what the format has; says what is wrong.
pub(super) fn read(format: Format, json: &[u8]) -> Result<Arc<[Write]>, Box<str>> {
    if format == Format::Patches
        && let Some(writes) = read_written(json)
    {
        return Ok(writes);
    }
    json::in_place(json, |bytes, buffers| parse(format, bytes, buffers))
}

fn parse(format: Format, json: &mut [u8], buffers: &mut Buffers) -> Result<Arc<[Write]>, Box<str>> {
    let read = match format {
        Format::Patches => {
            from_slice_with_buffers::<Vec<Patch<&str>>>(json, buffers).map(|patches| {
                let patches = patches.iter().map(Patch::to_owned);
                patches.map(Write::Set).collect()
            })
        }
        Format::Writes => from_slice_with_buffers::<Vec<Write<&str>>>(json, buffers)
            .map(|writes| writes.iter().map(Write::to_owned).collect()),
    };
    read.map_err(|error| error.to_string().into())
}

/// Reads patches that [`write()`] wrote, byte for byte, as nearly every batch is; what has escapes in
/// it, or was written by another program, is `None`. What it is worth: `load/README.md`.
fn read_written(json: &[u8]) -> Option<Arc<[Write]>> {
    let mut rest = std::str::from_utf8(json).ok()?.strip_prefix('[')?;
    let mut writes = Vec::with_capacity(rest.len() / PATCH_BYTES);
    loop {
        let after = Write::read_set(rest, &mut writes)?;
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
    use crate::grade::Changes;

    #[test]
    fn what_was_written_is_read() {
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
        for (count, format) in [
            (0, Format::Patches),
            (1, Format::Patches),
            (3, Format::Patches),
            (4, Format::Writes),
            (5, Format::Writes),
        ] {
            let writes = &writes[..count];
            assert_eq!(Format::of(writes), format);
            assert_eq!(Format::numbered(format.number().into()), Some(format));
            let mut json = Vec::new();
            write(writes, &mut json);
            assert_eq!(read(Format::Writes, &json).as_deref(), Ok(writes));
            let as_patches = read(Format::Patches, &json);
            match format {
                Format::Patches => assert_eq!(as_patches.as_deref(), Ok(writes)),
                Format::Writes => assert!(as_patches.unwrap_err().contains("delete")),
            }
        }
        assert_eq!([0, 3].map(Format::numbered), [None, None]);
    }

    #[test]
    fn what_is_no_array_of_writes_is_refused() {
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
            for format in [Format::Patches, Format::Writes] {
                assert!(read(format, json.as_bytes()).is_err(), "{json}");
            }
        }
    }

    fn parsed(json: &[u8]) -> Result<Arc<[Write]>, Box<str>> {
        json::in_place(json, |bytes, buffers| {
            parse(Format::Patches, bytes, buffers)
        })
    }

    /// Whether `json` is read without the parser, which then reads the same.
    fn is_read_written(json: &str) -> bool {
        let read = read_written(json.as_bytes());
        if let Some(read) = &read {
            assert_eq!(parsed(json.as_bytes()).as_ref(), Ok(read), "{json}");
        }
        read.is_some()
    }

    #[test]
    fn an_id_that_is_read_without_the_parser_is_one() {
        // It is looked at by eight bytes, but for the last seven of a batch.
        for end in ["\",\"spp\":-1}]", "\"}]"] {
            for (len, at) in (1..=17).flat_map(|len| (0..len).map(move |at| (len, at))) {
                for byte in 0..0x80_u8 {
                    let mut id = vec![b'a'; len];
                    id[at] = byte;
                    let id = String::from_utf8(id).unwrap();
                    let plain = matches!(byte, b' '..=b'~') && !matches!(byte, b'"' | b'\\');
                    let read = is_read_written(&format!(r#"[{{"user_id":"{id}{end}"#));
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
            assert_eq!(is_read_written(&json), valid, "{id:?}");
            assert_eq!(parsed(json.as_bytes()).is_ok(), valid, "{id:?}");
        }
    }

    #[test]
    fn fields_that_are_read_without_the_parser_are_as_they_are_written() {
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
            assert_eq!(is_read_written(&json), written, "{json}");
        }
    }

    proptest! {
        /// What is read without the parser is what the parser reads, and it is what was written.
        #[test]
        fn what_is_read_without_the_parser_is_the_same(json in prop_oneof![
            r#"\[(\{"user_id":"[a\\\\"é]{0,3}"(,"(postpaid_limit|spp|return_fee|x)": ?-?[0-9]{0,20}){0,3}\}[,\]]?){1,3}"#,
            r#"\[\{"user_id":"[ab]{1,3}"(,"spp":-?(0|[1-9][0-9]{0,19}))?(,"return_fee":-?[1-9])?\}\]"#,
        ]) {
            let parsed = parsed(json.as_bytes());
            if let Some(writes) = read_written(json.as_bytes()) {
                prop_assert_eq!(Ok(&writes), parsed.as_ref());
                let mut written = Vec::new();
                write(&writes, &mut written);
                prop_assert_eq!(json.as_bytes(), written);
            } else if let Ok(writes) = parsed {
                let mut written = Vec::new();
                write(&writes, &mut written);
                // Escapes alone are left to the parser.
                prop_assert!(json.as_bytes() != written || json.contains('\\') || writes.is_empty());
            }
        }
    }
}
