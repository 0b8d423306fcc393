//! What a grade is: its fields, its limits, its JSON and its digest; and what a write does to it.
//! Pure, and the only file that knows the fields.
//!
//! Adding a field is one more name in [`FIELDS`]. Everything else (the patch reader, the JSON
//! answer, the digest, the store's record) is driven by that list; `tests/` proves it by adding one
//! to a copy of this crate. Names stay in order and are never removed: a field's place in the list
//! is what a stored record and a digest know it by.

use std::fmt;
use std::ops::AddAssign;

use serde::de::{self, Deserialize, Deserializer, MapAccess, Visitor};
use xxhash_rust::xxh3::xxh3_128;

use crate::hex;

/// The fields of a grade beside its key, in the order of every answer and every file. All are
/// `i64`; one that was never set reads as 0.
pub const FIELDS: &[&str] = &[
    // Limit for paying later.
    "postpaid_limit",
    // The loyal customer's discount, percent.
    "spp",
    // Fee for delivery.
    "shipping_fee",
    // Fee for a return.
    "return_fee",
];

/// How many fields a grade has.
pub const FIELD_COUNT: usize = FIELDS.len();

/// The key's name in JSON, in a query and in a file.
pub const USER_ID: &str = "user_id";

/// The longest user id, in bytes of UTF-8.
pub const USER_ID_BYTES_MAX: usize = 256;

/// The values of one grade, in the order of [`FIELDS`].
pub type Values = [i64; FIELD_COUNT];

// A patch marks the fields it carries in one `u32`.
const _: () = assert!(FIELD_COUNT <= 32);

/// Why a string is no user id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum UserIdError {
    /// No bytes at all.
    #[error("user_id is empty; send 1 to {USER_ID_BYTES_MAX} bytes of UTF-8")]
    Empty,
    /// More than [`USER_ID_BYTES_MAX`] bytes.
    #[error("user_id has {bytes} bytes; at most {USER_ID_BYTES_MAX} are allowed")]
    TooLong {
        /// The length that was sent.
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
    // Printable ASCII needs no decoding, and nearly every id is just that.
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

/// Some fields and the values they are to take: what a patch does to a record.
///
/// Setting is all it can do, never adding, so applying the same changes again in the same order
/// ends in the same record.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Changes {
    set: u32,
    values: Values,
}

impl Changes {
    /// Carries every field.
    #[must_use]
    pub fn all(values: Values) -> Self {
        let set = FIELDS.iter().fold(0, |set, _| set << 1 | 1);
        Self { set, values }
    }

    /// Carries `value` for the field at `index` of [`FIELDS`]; an index past the end is ignored.
    pub fn set(&mut self, index: usize, value: i64) {
        if let Some(slot) = self.values.get_mut(index) {
            *slot = value;
            self.set |= 1 << index;
        }
    }

    /// Whether the field at `index` is carried.
    #[must_use]
    pub fn has(&self, index: usize) -> bool {
        index < FIELD_COUNT && self.set & (1 << index) != 0
    }

    /// The carried fields: index in [`FIELDS`] and value.
    pub fn iter(&self) -> impl Iterator<Item = (usize, i64)> + '_ {
        self.values
            .iter()
            .copied()
            .enumerate()
            .filter(|(index, _)| self.has(*index))
    }

    /// Sets the carried fields in `values` and leaves the others.
    pub fn apply_to(&self, values: &mut Values) {
        for (index, (slot, value)) in values.iter_mut().zip(self.values).enumerate() {
            if self.set & (1 << index) != 0 {
                *slot = value;
            }
        }
    }
}

/// One write: a user id and the fields it carries. `S` is `Box<str>` where the patch is kept and
/// `&str` where it is only passed through.
///
/// A patch that came through [`Deserialize`] is valid: its id passed [`check_user_id`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Patch<S = Box<str>> {
    /// Whose grade it is.
    pub user_id: S,
    /// The fields and their new values.
    pub changes: Changes,
}

impl<S: AsRef<str>> Patch<S> {
    /// The same patch, owning its id.
    pub fn to_owned(&self) -> Patch {
        Patch {
            user_id: Box::from(self.user_id.as_ref()),
            changes: self.changes,
        }
    }

    /// Appends the patch as the JSON object that `POST /set` takes.
    pub fn write_json(&self, out: &mut Vec<u8>) {
        write_user_id(self.user_id.as_ref(), out);
        for (index, value) in self.changes.iter() {
            write_field(index, value, out);
        }
        out.push(b'}');
    }
}

impl<'a> Patch<&'a str> {
    /// Reads a patch as [`write_json`](Self::write_json) writes it, and what follows it. `None` for
    /// any other text, be it another way to write a patch or none: that is for a parser to say.
    pub(crate) fn read_written(json: &'a str) -> Option<(Self, &'a str)> {
        let rest = json
            .strip_prefix("{\"")?
            .strip_prefix(USER_ID)?
            .strip_prefix("\":\"")?;
        let end = rest.bytes().position(|byte| matches!(byte, b'"' | b'\\'))?;
        let (user_id, rest) = rest.split_at_checked(end)?;
        check_user_id(user_id).ok()?;
        let mut rest = rest.strip_prefix('"')?;
        let mut changes = Changes::default();
        for (index, name) in FIELDS.iter().enumerate() {
            let Some((value, after)) = read_field(rest, name) else {
                continue;
            };
            changes.set(index, value);
            rest = after;
        }
        Some((Self { user_id, changes }, rest.strip_prefix('}')?))
    }
}

/// Reads what [`write_field`] wrote, and what follows it.
fn read_field<'a>(json: &'a str, name: &str) -> Option<(i64, &'a str)> {
    let number = json
        .strip_prefix(",\"")?
        .strip_prefix(name)?
        .strip_prefix("\":")?;
    let digits = number.strip_prefix('-').unwrap_or(number);
    let len = digits.bytes().position(|byte| !byte.is_ascii_digit())?;
    // JSON has no leading zeros, and a parser may take -0 for a fraction.
    if digits.starts_with('0') && (len > 1 || digits.len() < number.len()) {
        return None;
    }
    let (number, rest) = number.split_at_checked(number.len() - digits.len() + len)?;
    Some((number.parse().ok()?, rest))
}

/// The name of the one key in a deletion's JSON.
const DELETE: &str = "delete";

/// What the log holds of one request: fields to set, or a record to remove.
///
/// Neither depends on what was there, so the same writes again in the same order end in the same
/// records.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Write<S = Box<str>> {
    /// Sets fields of a record; makes it if there is none.
    Set(Patch<S>),
    /// Removes the record of this user, if there is one.
    Delete(S),
}

impl<S: AsRef<str>> Write<S> {
    /// The same write, owning its id.
    pub fn to_owned(&self) -> Write {
        match self {
            Self::Set(patch) => Write::Set(patch.to_owned()),
            Self::Delete(user_id) => Write::Delete(Box::from(user_id.as_ref())),
        }
    }

    /// Whose grade it is.
    pub fn user_id(&self) -> &str {
        match self {
            Self::Set(patch) => patch.user_id.as_ref(),
            Self::Delete(user_id) => user_id.as_ref(),
        }
    }

    /// Whether it removes a record.
    pub fn deletes(&self) -> bool {
        matches!(self, Self::Delete(_))
    }

    /// Appends the write as JSON: a patch as `POST /set` takes it, or `{"delete":"ID"}`.
    pub fn write_json(&self, out: &mut Vec<u8>) {
        match self {
            Self::Set(patch) => patch.write_json(out),
            Self::Delete(user_id) => {
                write_id_as(DELETE, user_id.as_ref(), out);
                out.push(b'}');
            }
        }
    }
}

impl<S> From<Patch<S>> for Write<S> {
    fn from(patch: Patch<S>) -> Self {
        Self::Set(patch)
    }
}

/// One record: a user id and all its values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UserGrade<S = Box<str>> {
    /// Whose grade it is.
    pub user_id: S,
    /// What it is, in the order of [`FIELDS`].
    pub values: Values,
}

impl<S: AsRef<str>> UserGrade<S> {
    /// Appends the record as the JSON object that `GET /get` answers.
    pub fn write_json(&self, out: &mut Vec<u8>) {
        write_user_id(self.user_id.as_ref(), out);
        for (index, value) in self.values.iter().enumerate() {
            write_field(index, *value, out);
        }
        out.push(b'}');
    }

    /// What the record adds to the store's digest.
    pub fn digest(&self) -> Digest {
        // Most ids are short, and room that is not there need not be cleared.
        match self.user_id.as_ref().len() {
            0..=SHORT_ID => self.digest_in::<{ record_bytes(SHORT_ID) }>(),
            _ => self.digest_in::<{ record_bytes(USER_ID_BYTES_MAX) }>(),
        }
    }

    fn digest_in<const BYTES: usize>(&self) -> Digest {
        let user_id = self.user_id.as_ref();
        let mut bytes = RecordBytes::<BYTES>::default();
        // The length first, so that no id can look like an id and a field.
        bytes.push(&(user_id.len() as u64).to_le_bytes());
        bytes.push(user_id.as_bytes());
        for (index, value) in self.values.iter().enumerate() {
            if *value != 0 {
                bytes.push(&[index as u8]);
                bytes.push(&value.to_le_bytes());
            }
        }
        Digest(xxh3_128(bytes.filled()))
    }
}

/// Bytes of an id that is called short: a UUID is.
const SHORT_ID: usize = 40;

fn write_user_id(user_id: &str, out: &mut Vec<u8>) {
    write_id_as(USER_ID, user_id, out);
}

/// Begins an object with an id under `key`.
fn write_id_as(key: &str, user_id: &str, out: &mut Vec<u8>) {
    out.extend_from_slice(b"{\"");
    out.extend_from_slice(key.as_bytes());
    out.extend_from_slice(b"\":\"");
    // A valid id has no control characters, so these two are all that JSON wants escaped.
    let mut rest = user_id.as_bytes();
    while let Some(at) = rest.iter().position(|byte| matches!(byte, b'"' | b'\\')) {
        let (plain, special) = rest.split_at(at);
        out.extend_from_slice(plain);
        out.push(b'\\');
        let (byte, after) = special.split_at(1);
        out.extend_from_slice(byte);
        rest = after;
    }
    out.extend_from_slice(rest);
    out.push(b'"');
}

fn write_field(index: usize, value: i64, out: &mut Vec<u8>) {
    out.extend_from_slice(b",\"");
    out.extend_from_slice(FIELDS.get(index).copied().unwrap_or_default().as_bytes());
    out.extend_from_slice(b"\":");
    out.extend_from_slice(itoa::Buffer::new().format(value).as_bytes());
}

impl<'de, S> Deserialize<'de> for Patch<S>
where
    S: Deserialize<'de> + AsRef<str>,
{
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // Asked for a map and nothing else: a derived struct would take an array as well.
        deserializer.deserialize_map(PatchVisitor(std::marker::PhantomData))
    }
}

struct PatchVisitor<S>(std::marker::PhantomData<S>);

impl<'de, S> Visitor<'de> for PatchVisitor<S>
where
    S: Deserialize<'de> + AsRef<str>,
{
    type Value = Patch<S>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with user_id and any of the fields")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let first = map.next_key()?;
        patch_in(map, first)
    }
}

/// Reads a patch whose first key has been read.
fn patch_in<'de, S, A>(mut map: A, first: Option<Key>) -> Result<Patch<S>, A::Error>
where
    S: Deserialize<'de> + AsRef<str>,
    A: MapAccess<'de>,
{
    let mut user_id: Option<S> = None;
    let mut changes = Changes::default();
    let mut next = first;
    while let Some(key) = next {
        match key {
            Key::UserId if user_id.is_some() => {
                return Err(de::Error::duplicate_field(USER_ID));
            }
            Key::UserId => {
                let id: S = map.next_value()?;
                check_user_id(id.as_ref()).map_err(de::Error::custom)?;
                user_id = Some(id);
            }
            Key::Field(index) => {
                let name = FIELDS.get(index).copied().unwrap_or_default();
                if changes.has(index) {
                    return Err(de::Error::duplicate_field(name));
                }
                changes.set(index, map.next_value_seed(Integer(name))?);
            }
            Key::Delete => return Err(unknown_field(DELETE)),
        }
        next = map.next_key()?;
    }
    match user_id {
        Some(user_id) => Ok(Patch { user_id, changes }),
        None => Err(de::Error::missing_field(USER_ID)),
    }
}

impl<'de, S> Deserialize<'de> for Write<S>
where
    S: Deserialize<'de> + AsRef<str>,
{
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(WriteVisitor(std::marker::PhantomData))
    }
}

struct WriteVisitor<S>(std::marker::PhantomData<S>);

impl<'de, S> Visitor<'de> for WriteVisitor<S>
where
    S: Deserialize<'de> + AsRef<str>,
{
    type Value = Write<S>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with user_id and any of the fields, or with delete alone")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let first = map.next_key()?;
        if !matches!(first, Some(Key::Delete)) {
            return patch_in(map, first).map(Write::Set);
        }
        let user_id: S = map.next_value()?;
        check_user_id(user_id.as_ref()).map_err(de::Error::custom)?;
        match map.next_key::<Key>()? {
            None => Ok(Write::Delete(user_id)),
            Some(_) => Err(de::Error::custom("a deletion has one key, delete")),
        }
    }
}

enum Key {
    UserId,
    Field(usize),
    Delete,
}

fn unknown_field<E: de::Error>(name: &str) -> E {
    E::custom(format_args!(
        "unknown field {:?}; known are {USER_ID}, {}",
        shortened(name),
        FIELDS.join(", ")
    ))
}

impl<'de> Deserialize<'de> for Key {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct KeyVisitor;
        impl Visitor<'_> for KeyVisitor {
            type Value = Key;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a field's name")
            }

            fn visit_str<E: de::Error>(self, name: &str) -> Result<Key, E> {
                if name == USER_ID {
                    return Ok(Key::UserId);
                }
                match FIELDS.iter().position(|field| *field == name) {
                    Some(index) => Ok(Key::Field(index)),
                    None if name == DELETE => Ok(Key::Delete),
                    None => Err(unknown_field(name)),
                }
            }
        }
        deserializer.deserialize_identifier(KeyVisitor)
    }
}

/// Reads one field's value: an `i64` written as an integer.
struct Integer(&'static str);

impl Integer {
    fn wrong<E: de::Error>(&self, what: fmt::Arguments<'_>) -> E {
        E::custom(format_args!(
            "{} is {what}; send an integer from {} to {}",
            self.0,
            i64::MIN,
            i64::MAX
        ))
    }
}

impl<'de> de::DeserializeSeed<'de> for Integer {
    type Value = i64;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<i64, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Integer {
    type Value = i64;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "an integer for {}", self.0)
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<i64, E> {
        Ok(value)
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<i64, E> {
        i64::try_from(value).map_err(|_| self.wrong(format_args!("{value}, out of range")))
    }

    fn visit_f64<E: de::Error>(self, _: f64) -> Result<i64, E> {
        Err(self.wrong(format_args!(
            "out of range, or written with a fraction or an exponent"
        )))
    }

    fn visit_unit<E: de::Error>(self) -> Result<i64, E> {
        Err(self.wrong(format_args!("null")))
    }

    fn visit_bool<E: de::Error>(self, _: bool) -> Result<i64, E> {
        Err(self.wrong(format_args!("a boolean")))
    }

    fn visit_str<E: de::Error>(self, _: &str) -> Result<i64, E> {
        Err(self.wrong(format_args!("a string")))
    }

    fn visit_seq<A: de::SeqAccess<'de>>(self, _: A) -> Result<i64, A::Error> {
        Err(self.wrong(format_args!("an array")))
    }

    fn visit_map<A: MapAccess<'de>>(self, _: A) -> Result<i64, A::Error> {
        Err(self.wrong(format_args!("an object")))
    }
}

/// The beginning of a name that a client made up, short enough for a log line or an answer.
fn shortened(name: &str) -> &str {
    name.char_indices()
        .nth(40)
        .and_then(|(at, _)| name.get(..at))
        .unwrap_or(name)
}

/// A sum over records that does not depend on their order: two stores with equal digests hold, but
/// for a chance of 2^-128, equal records.
///
/// Each record counts as the XXH3-128 of its id and its fields that are not 0; the sum wraps.
/// Leaving out zeros lets replicas with and without a new, unset field agree.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Digest(pub u128);

impl Digest {
    /// Reads what displaying one writes.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        hex::parse(text).map(Self)
    }

    /// Takes `old` out of the sum and puts `new` in.
    pub fn replace(&mut self, old: Digest, new: Digest) {
        self.0 = self.0.wrapping_sub(old.0).wrapping_add(new.0);
    }
}

impl AddAssign for Digest {
    fn add_assign(&mut self, other: Self) {
        self.0 = self.0.wrapping_add(other.0);
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// Room on the stack for one record's canonical bytes.
struct RecordBytes<const BYTES: usize> {
    bytes: [u8; BYTES],
    len: usize,
}

/// Bytes that a record with an id of `id` bytes takes at most.
const fn record_bytes(id: usize) -> usize {
    8 + id + FIELD_COUNT * 9
}

impl<const BYTES: usize> Default for RecordBytes<BYTES> {
    fn default() -> Self {
        Self {
            bytes: [0; BYTES],
            len: 0,
        }
    }
}

impl<const BYTES: usize> RecordBytes<BYTES> {
    fn push(&mut self, part: &[u8]) {
        let end = self.len + part.len();
        if let Some(room) = self.bytes.get_mut(self.len..end) {
            room.copy_from_slice(part);
            self.len = end;
        }
    }

    fn filled(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
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
    fn every_field_goes_through_a_patch_a_record_and_a_digest() {
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
    fn a_patch_is_refused_with_the_reason() {
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
    fn a_deletion_is_an_object_with_one_key_and_no_patch() {
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
    fn an_id_is_escaped_as_json_wants() {
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
    fn the_digest_is_the_same_on_every_machine_and_for_ever() {
        // Replicas of other versions and stored files compare against this.
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
