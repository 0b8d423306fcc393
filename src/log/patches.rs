//! A batch's patches as bytes: a JSON array of what `POST /set` takes.

use std::sync::Arc;

use crate::grade::Patch;
use crate::json;

/// What a patch of one field takes, about.
const PATCH_BYTES: usize = 40;

/// Appends `patches` to `out`.
pub(super) fn write(patches: &[Patch], out: &mut Vec<u8>) {
    out.push(b'[');
    for (index, patch) in patches.iter().enumerate() {
        if index > 0 {
            out.push(b',');
        }
        patch.write_json(out);
    }
    out.push(b']');
}

/// Reads what [`write()`] wrote.
///
/// # Errors
/// The bytes are no array of valid patches; says what is wrong.
pub(super) fn read(json: &[u8]) -> Result<Arc<[Patch]>, Box<str>> {
    if let Some(patches) = read_written(json) {
        return Ok(patches);
    }
    json::in_place(json, |bytes, buffers| {
        simd_json::serde::from_slice_with_buffers::<Vec<Patch<&str>>>(bytes, buffers)
            .map(|patches| patches.iter().map(Patch::to_owned).collect())
            .map_err(|error| error.to_string().into())
    })
}

/// Reads what [`write()`] wrote, byte for byte, as nearly every batch is; what has escapes in it, or
/// was written by another program, is `None`. In a third of the parser's time: `benches/README.md`.
fn read_written(json: &[u8]) -> Option<Arc<[Patch]>> {
    let mut rest = std::str::from_utf8(json).ok()?.strip_prefix('[')?;
    let mut patches = Vec::with_capacity(rest.len() / PATCH_BYTES);
    loop {
        let (patch, after) = Patch::read_written(rest)?;
        patches.push(patch.to_owned());
        match after.strip_prefix(',') {
            Some(next) => rest = next,
            None => return (after == "]").then(|| patches.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grade::Changes;

    #[test]
    fn what_was_written_is_read() {
        let mut changes = Changes::default();
        changes.set(1, i64::MIN);
        let patches = [
            ("a", Changes::default()),
            ("\"\\é\u{1f600}", changes),
            ("a", changes),
        ]
        .map(|(user_id, changes)| Patch {
            user_id: user_id.into(),
            changes,
        });
        for patches in [&patches[..], &patches[..1], &[]] {
            let mut json = Vec::new();
            write(patches, &mut json);
            assert_eq!(read(&json).as_deref(), Ok(patches));
        }
    }

    #[test]
    fn what_is_no_array_of_patches_is_refused() {
        for json in [
            "",
            "{}",
            "[1]",
            "[[]]",
            r#"[{"spp":1}]"#,
            r#"[{"user_id":"a"}"#,
        ] {
            assert!(read(json.as_bytes()).is_err(), "{json}");
        }
    }
}
