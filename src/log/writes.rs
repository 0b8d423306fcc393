//! A batch's writes as bytes: a JSON array of what `POST /set` takes and, in format 2, of deletions.
//!
//! A batch without a deletion is of format 1, as before there were any, so programs from then go on
//! reading it; at one of format 2 they stop.

use std::sync::Arc;

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
    json::in_place(json, |bytes, buffers| {
        let read = match format {
            Format::Patches => simd_json::serde::from_slice_with_buffers::<Vec<Patch<&str>>>(
                bytes, buffers,
            )
            .map(|patches| {
                patches
                    .iter()
                    .map(|patch| Write::Set(patch.to_owned()))
                    .collect()
            }),
            Format::Writes => {
                simd_json::serde::from_slice_with_buffers::<Vec<Write<&str>>>(bytes, buffers)
                    .map(|writes| writes.iter().map(Write::to_owned).collect())
            }
        };
        read.map_err(|error| error.to_string().into())
    })
}

#[cfg(test)]
mod tests {
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
}
