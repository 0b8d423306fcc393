//! Grades: their fields, limits, JSON and digest, and the writes that change them. Performs no I/O.
//!
//! To add a field, append its name to [`FIELDS`] and raise the `FORMAT` of `log::codec`, so that
//! older versions stop at a batch that may have the field. The patch parser, the JSON response, the
//! digest and the store's record all derive from that list; `tests/it/fifth_field.rs` adds a field to
//! a copy of this crate. Never reorder or remove names: stored records and digests identify a field
//! by its index.

mod digest;
mod json;

pub use digest::Digest;
pub(crate) use digest::digests;

/// The fields of a grade, in the order of all responses and files. All are `i64`. Unset fields read
/// as 0.
pub const FIELDS: &[&str] = &[
    // The limit for deferred payment.
    "postpaid_limit",
    // The discount for regular customers, in percent.
    "spp",
    // The fee for a delivery.
    "shipping_fee",
    // The fee for a return.
    "return_fee",
];

/// How many fields a grade has.
pub const FIELD_COUNT: usize = FIELDS.len();

/// The name of the key in JSON, queries and files.
pub const USER_ID: &str = "user_id";

/// The longest user id, in bytes of UTF-8.
pub const USER_ID_BYTES_MAX: usize = 256;

/// The values of one grade, in the order of [`FIELDS`].
pub type Values = [i64; FIELD_COUNT];

// A patch marks the fields it carries in one `u32`.
const _: () = assert!(FIELD_COUNT <= 32);

/// Why a string is not a valid user id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum UserIdError {
    /// The id is empty.
    #[error("user_id is empty; send 1 to {USER_ID_BYTES_MAX} bytes of UTF-8")]
    Empty,
    /// More than [`USER_ID_BYTES_MAX`] bytes.
    #[error("user_id has {bytes} bytes; at most {USER_ID_BYTES_MAX} are allowed")]
    TooLong {
        /// Its length.
        bytes: usize,
    },
    /// A control character (Unicode category Cc).
    #[error(
        "user_id has the control character U+{code:04X} at byte {at}; control characters are not allowed"
    )]
    Control {
        /// The character's code point.
        code: u32,
        /// Its byte offset in the id.
        at: usize,
    },
}

/// Checks a user id: 1 to [`USER_ID_BYTES_MAX`] bytes, no control characters.
///
/// # Errors
/// The first rule that `id` breaks.
pub fn check_user_id(id: &str) -> Result<(), UserIdError> {
    if id.is_empty() {
        return Err(UserIdError::Empty);
    }
    if id.len() > USER_ID_BYTES_MAX {
        return Err(UserIdError::TooLong { bytes: id.len() });
    }
    // Nearly all ids are printable ASCII, which needs no decoding.
    if id.bytes().all(|byte| (0x20..0x7f).contains(&byte)) {
        return Ok(());
    }
    match id.char_indices().find(|(_, c)| c.is_control()) {
        Some((at, c)) => Err(UserIdError::Control {
            code: u32::from(c),
            at,
        }),
        None => Ok(()),
    }
}

/// The fields that a patch sets, with their new values.
///
/// A patch sets values and never adds to them, so applying it again is idempotent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Changes {
    set: u32,
    values: Values,
}

impl Changes {
    /// Sets all fields.
    #[must_use]
    pub fn all(values: Values) -> Self {
        let set = FIELDS.iter().fold(0, |set, _| set << 1 | 1);
        Self { set, values }
    }

    /// Sets the field at `index` of [`FIELDS`]. Ignores an index past the end.
    pub fn set(&mut self, index: usize, value: i64) {
        if let Some(slot) = self.values.get_mut(index) {
            *slot = value;
            self.set |= 1 << index;
        }
    }

    /// Whether the field at `index` is set.
    #[must_use]
    pub fn has(&self, index: usize) -> bool {
        index < FIELD_COUNT && self.set & (1 << index) != 0
    }

    /// The fields that are set: index in [`FIELDS`] and value.
    pub fn iter(&self) -> impl Iterator<Item = (usize, i64)> + '_ {
        self.values
            .iter()
            .copied()
            .enumerate()
            .filter(|(index, _)| self.has(*index))
    }

    /// Applies the changes to `values`.
    pub fn apply_to(&self, values: &mut Values) {
        for (index, (slot, value)) in values.iter_mut().zip(self.values).enumerate() {
            if self.set & (1 << index) != 0 {
                *slot = value;
            }
        }
    }
}

/// A partial update of one record. `S` is `Box<str>` for a patch that is stored and `&str` for a
/// borrowed one.
///
/// [`serde::Deserialize`] validates the id with [`check_user_id`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Patch<S = Box<str>> {
    /// The user.
    pub user_id: S,
    /// The fields and their new values.
    pub changes: Changes,
}

impl<S: AsRef<str>> Patch<S> {
    /// A copy that owns its id.
    pub fn to_owned(&self) -> Patch {
        Patch {
            user_id: Box::from(self.user_id.as_ref()),
            changes: self.changes,
        }
    }
}

/// One write in the log: fields to set, or a record to remove.
///
/// Neither depends on the previous state, so replaying writes in order is idempotent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Write<S = Box<str>> {
    /// Sets fields of a record; inserts it if it does not exist.
    Set(Patch<S>),
    /// Removes the record of this user, if it exists.
    Delete(S),
}

impl<S: AsRef<str>> Write<S> {
    /// A copy that owns its id.
    pub fn to_owned(&self) -> Write {
        match self {
            Self::Set(patch) => Write::Set(patch.to_owned()),
            Self::Delete(user_id) => Write::Delete(Box::from(user_id.as_ref())),
        }
    }

    /// The user.
    pub fn user_id(&self) -> &str {
        match self {
            Self::Set(patch) => patch.user_id.as_ref(),
            Self::Delete(user_id) => user_id.as_ref(),
        }
    }

    /// Whether this is a deletion.
    pub fn is_delete(&self) -> bool {
        matches!(self, Self::Delete(_))
    }
}

impl<S> From<Patch<S>> for Write<S> {
    fn from(patch: Patch<S>) -> Self {
        Self::Set(patch)
    }
}

/// One record: a user id and all values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UserGrade<S = Box<str>> {
    /// The user.
    pub user_id: S,
    /// The values, in the order of [`FIELDS`].
    pub values: Values,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn a(values: Values) -> UserGrade<&'static str> {
        UserGrade {
            user_id: "a",
            values,
        }
    }

    fn parse(text: &str) -> Result<Patch<String>, String> {
        serde_json::from_str(text).map_err(|error| error.to_string())
    }

    #[test]
    fn every_field_is_in_patches_records_and_digests() {
        let mut values = Values::default();
        let mut seen = vec![a(values).digest()];
        for (index, name) in FIELDS.iter().enumerate() {
            let value = i64::MIN + index as i64;
            let patch = parse(&format!(r#"{{"user_id":"a","{name}":{value}}}"#)).unwrap();
            assert_eq!(
                patch.changes.iter().collect::<Vec<_>>(),
                [(index, value)],
                "{name}"
            );
            patch.changes.apply_to(&mut values);
            let digest = a(values).digest();
            assert!(!seen.contains(&digest), "{name} does not count");
            seen.push(digest);

            let mut json = Vec::new();
            patch.write_json(&mut json);
            assert_eq!(parse(std::str::from_utf8(&json).unwrap()), Ok(patch));
        }
        let mut json = Vec::new();
        a(values).write_json(&mut json);
        let fields: Vec<String> = FIELDS
            .iter()
            .zip(values)
            .map(|(name, value)| format!(r#","{name}":{value}"#))
            .collect();
        assert_eq!(
            String::from_utf8(json).unwrap(),
            format!(r#"{{"user_id":"a"{}}}"#, fields.concat())
        );
    }

    #[test]
    fn an_invalid_patch_is_rejected_with_the_reason() {
        for (text, reason) in [
            ("[]", "an object"),
            (r#"["a",1,2,3,4]"#, "an object"),
            ("1", "an object"),
            ("{}", "missing field `user_id`"),
            (r#"{"user_id":""}"#, "user_id is empty"),
            (r#"{"user_id":"a\u0000"}"#, "U+0000 at byte 1"),
            (r#"{"user_id":"\u0085"}"#, "U+0085 at byte 0"),
            (r#"{"user_id":null}"#, "null"),
            (r#"{"user_id":7}"#, "string"),
            (
                r#"{"user_id":"a","user_id":"b"}"#,
                "duplicate field `user_id`",
            ),
            (
                r#"{"user_id":"a","spp":1,"s\u0070p":1}"#,
                "duplicate field `spp`",
            ),
            (r#"{"user_id":"a","SPP":1}"#, "unknown field \"SPP\""),
            (r#"{"user_id":"a","spp":null}"#, "spp is null"),
            (r#"{"user_id":"a","spp":1.0}"#, "fraction"),
            (r#"{"user_id":"a","spp":1e2}"#, "exponent"),
            (
                r#"{"user_id":"a","spp":9223372036854775808}"#,
                "out of range",
            ),
            (r#"{"user_id":"a","spp":"1"}"#, "a string"),
            (r#"{"user_id":"a","spp":[1]}"#, "an array"),
            (r#"{"user_id":"a","spp":{}}"#, "an object"),
            (r#"{"user_id":"a","spp":true}"#, "a boolean"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(reason), "{text}: {error}");
        }
        assert!(check_user_id(&"é".repeat(128)).is_ok());
        assert_eq!(
            check_user_id(&"é".repeat(129)),
            Err(UserIdError::TooLong { bytes: 258 })
        );
    }

    #[test]
    fn a_deletion_has_one_key_and_is_not_a_patch() {
        let read = |text: &str| serde_json::from_str::<Write<String>>(text);
        for id in ["a", "\"a\\b\"é\u{1f600}"] {
            let write = Write::Delete(id.to_owned());
            let mut json = Vec::new();
            write.write_json(&mut json);
            let json = std::str::from_utf8(&json).unwrap();
            assert_eq!(read(json).unwrap(), write);
            let error = parse(json).unwrap_err();
            assert!(error.contains("unknown field \"delete\""), "{error}");
        }
        let set = r#"{"user_id":"a","spp":1}"#;
        assert_eq!(read(set).unwrap(), Write::Set(parse(set).unwrap()));
        for (text, reason) in [
            (r#"{"delete":""}"#, "user_id is empty"),
            (r#"{"delete":"\u0000"}"#, "U+0000"),
            (r#"{"delete":null}"#, "null"),
            (r#"{"delete":1}"#, "string"),
            (r#"{"delete":"a","delete":"a"}"#, "one key"),
            (r#"{"delete":"a","spp":1}"#, "one key"),
            (r#"{"delete":"a","user_id":"a"}"#, "one key"),
            (r#"{"delete":"a","x":1}"#, "unknown field \"x\""),
            (
                r#"{"user_id":"a","delete":"a"}"#,
                "unknown field \"delete\"",
            ),
            (r#"{"Delete":"a"}"#, "unknown field \"Delete\""),
            ("{}", "missing field `user_id`"),
            (r#"["a"]"#, "an object"),
        ] {
            let error = read(text).unwrap_err().to_string();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }

    #[test]
    fn ids_are_escaped_in_json() {
        let mut json = Vec::new();
        let grade = UserGrade {
            user_id: "\"a\\b\"é\u{1f600}",
            values: Values::default(),
        };
        grade.write_json(&mut json);
        let value: serde_json::Value = serde_json::from_slice(&json).unwrap();
        assert_eq!(value["user_id"], "\"a\\b\"é\u{1f600}");
    }

    #[test]
    fn the_digest_is_stable() {
        // Other versions and stored files depend on this value.
        let mut values = Values::default();
        values[1] = 5;
        let grade = UserGrade {
            user_id: "alice",
            values,
        };
        assert_eq!(
            grade.digest().to_string(),
            "dd6a0570c454b97f66aac1625bf5536d"
        );
    }
}
