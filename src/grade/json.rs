//! Patches, deletions and records as JSON.

use std::fmt;

use serde::de::{self, Deserialize, Deserializer, MapAccess, Visitor};

use super::{Changes, FIELDS, Patch, USER_ID, USER_ID_BYTES_MAX, UserGrade, Write, check_user_id};

/// The only key of a deletion.
const DELETE: &str = "delete";

impl<S: AsRef<str>> Patch<S> {
    /// Appends the patch as the JSON object that `POST /set` accepts.
    pub fn write_json(&self, out: &mut Vec<u8>) {
        write_user_id(self.user_id.as_ref(), out);
        for (index, value) in self.changes.iter() {
            write_field(index, value, out);
        }
        out.push(b'}');
    }
}

impl<S: AsRef<str>> Write<S> {
    /// Appends the write as JSON: a patch as `POST /set` accepts it, or `{"delete":"ID"}`.
    pub fn write_json(&self, out: &mut Vec<u8>) {
        match self {
            Self::Set(patch) => patch.write_json(out),
            Self::Delete(user_id) => {
                write_id(DELETE, user_id.as_ref(), out);
                out.push(b'}');
            }
        }
    }
}

impl<S: AsRef<str>> UserGrade<S> {
    /// Appends the record as the JSON object that `GET /get` returns.
    pub fn write_json(&self, out: &mut Vec<u8>) {
        write_user_id(self.user_id.as_ref(), out);
        for (index, value) in self.values.iter().enumerate() {
            write_field(index, *value, out);
        }
        out.push(b'}');
    }
}

fn write_user_id(user_id: &str, out: &mut Vec<u8>) {
    write_id(USER_ID, user_id, out);
}

/// Starts an object with an id under `key`.
fn write_id(key: &str, user_id: &str, out: &mut Vec<u8>) {
    out.extend_from_slice(b"{\"");
    out.extend_from_slice(key.as_bytes());
    out.extend_from_slice(b"\":\"");
    // A valid id has no control characters, so only these two need an escape.
    let mut rest = user_id.as_bytes();
    while let Some(at) = rest.iter().position(|byte| matches!(byte, b'"' | b'\\')) {
        let (unescaped, special) = rest.split_at(at);
        out.extend_from_slice(unescaped);
        out.push(b'\\');
        let (byte, after) = special.split_at(1);
        out.extend_from_slice(byte);
        rest = after;
    }
    out.extend_from_slice(rest);
    out.push(b'"');
}

#[expect(clippy::indexing_slicing, reason = "`index` is that of a field")]
fn write_field(index: usize, value: i64, out: &mut Vec<u8>) {
    out.extend_from_slice(b",\"");
    out.extend_from_slice(FIELDS[index].as_bytes());
    out.extend_from_slice(b"\":");
    out.extend_from_slice(itoa::Buffer::new().format(value).as_bytes());
}

impl Write {
    /// Parses a patch in exactly the form of [`Patch::write_json`] and appends it to `writes`.
    /// Returns the rest of the text. `None` for any other text, which may still be a valid patch:
    /// the caller then uses a JSON parser.
    pub(crate) fn parse_set<'a>(json: &'a str, writes: &mut Vec<Self>) -> Option<&'a str> {
        let rest = json
            .strip_prefix("{\"")?
            .strip_prefix(USER_ID)?
            .strip_prefix("\":\"")?;
        let (user_id, rest) = parse_id(rest)?;
        // Filled in place: moving a patch right after its values were written one by one would
        // stall on store-to-load forwarding.
        let Write::Set(Patch { changes, .. }) = writes.push_mut(Write::Set(Patch {
            user_id: user_id.into(),
            changes: Changes::default(),
        })) else {
            return None;
        };
        let mut rest = rest.strip_prefix('"')?;
        let mut next = 0;
        while let Some(field) = rest.strip_prefix(",\"") {
            let (index, value) = parse_name(field).filter(|(index, _)| *index >= next)?;
            let (value, after) = parse_integer(value)?;
            changes.set(index, value);
            next = index + 1;
            rest = after;
        }
        rest.strip_prefix('}')
    }
}

/// Parses an id without escapes. The rest starts at its closing quote.
fn parse_id(json: &str) -> Option<(&str, &str)> {
    let len = unescaped_len(json.as_bytes());
    let (user_id, rest) = json.split_at_checked(len)?;
    if rest.starts_with('"') && (1..=USER_ID_BYTES_MAX).contains(&len) {
        return Some((user_id, rest));
    }
    let end = json.bytes().position(|byte| matches!(byte, b'"' | b'\\'))?;
    let (user_id, rest) = json.split_at_checked(end)?;
    check_user_id(user_id).ok()?;
    Some((user_id, rest))
}

/// The length of the prefix of `text` that is valid in an id and needs no escape in JSON: printable
/// ASCII without quote and backslash. May leave out up to seven bytes at the end, because it tests
/// eight bytes at once (SWAR: "Bit Twiddling Hacks", "Determine if a word has a byte less than n").
/// Measurements: ADR 0004.
fn unescaped_len(text: &[u8]) -> usize {
    const ONES: u64 = u64::from_ne_bytes([1; 8]);
    /// Sets the high bit of each byte that is less than `bound`, which is at most 0x80. Exact up to
    /// the first such byte, because a borrow affects only later bytes.
    fn below(word: u64, bound: u8) -> u64 {
        word.wrapping_sub(ONES * u64::from(bound)) & !word
    }
    let is = |word: u64, byte: u8| below(word ^ (ONES * u64::from(byte)), 1);
    let (words, _) = text.as_chunks::<8>();
    for (index, word) in words.iter().enumerate() {
        let word = u64::from_le_bytes(*word);
        let beyond = word | word.wrapping_add(ONES);
        let others = below(word, b' ') | beyond | is(word, b'"') | is(word, b'\\');
        let others = others & (ONES * 0x80);
        if others != 0 {
            return index * 8 + others.trailing_zeros() as usize / 8;
        }
    }
    words.as_flattened().len()
}

/// Parses a field's name. Returns its index and the rest, which starts at its value.
fn parse_name(json: &str) -> Option<(usize, &str)> {
    // The loop does nothing else, so that the compiler unrolls it with constant names.
    FIELDS.iter().enumerate().find_map(|(index, name)| {
        let value = json.strip_prefix(name)?.strip_prefix("\":")?;
        Some((index, value))
    })
}

/// Parses an integer in the form of [`write_field`]. Returns it and the rest. Needs one pass over
/// the digits; finding the end first would need two.
fn parse_integer(json: &str) -> Option<(i64, &str)> {
    let digits = json.strip_prefix('-').unwrap_or(json);
    // A negative sum, because `i64::MIN` has no positive counterpart.
    let mut negative = 0_i64;
    let mut len = 0;
    for byte in digits.bytes() {
        let digit = byte.wrapping_sub(b'0');
        if digit > 9 {
            break;
        }
        negative = negative.checked_mul(10)?.checked_sub(digit.into())?;
        len += 1;
    }
    let is_negative = digits.len() < json.len();
    // JSON has no leading zeros, and a parser may read -0 as a float.
    if len == 0 || digits.starts_with('0') && (len > 1 || is_negative) {
        return None;
    }
    let value = match is_negative {
        true => negative,
        false => negative.checked_neg()?,
    };
    Some((value, digits.get(len..)?))
}

impl<'de, S> Deserialize<'de> for Patch<S>
where
    S: Deserialize<'de> + AsRef<str>,
{
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // A derived implementation would also accept an array.
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
        visit_patch(map, first)
    }
}

/// Reads the rest of a patch after its first key.
#[expect(clippy::indexing_slicing, reason = "`index` is that of a field")]
fn visit_patch<'de, S, A>(mut map: A, first: Option<JsonKey>) -> Result<Patch<S>, A::Error>
where
    S: Deserialize<'de> + AsRef<str>,
    A: MapAccess<'de>,
{
    let mut user_id: Option<S> = None;
    let mut changes = Changes::default();
    let mut next = first;
    while let Some(key) = next {
        match key {
            JsonKey::UserId if user_id.is_some() => {
                return Err(de::Error::duplicate_field(USER_ID));
            }
            JsonKey::UserId => {
                let id: S = map.next_value()?;
                check_user_id(id.as_ref()).map_err(de::Error::custom)?;
                user_id = Some(id);
            }
            JsonKey::Field(index) => {
                let name = FIELDS[index];
                if changes.has(index) {
                    return Err(de::Error::duplicate_field(name));
                }
                changes.set(index, map.next_value_seed(FieldSeed(name))?);
            }
            JsonKey::Delete => return Err(unknown_field(DELETE)),
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
        if !matches!(first, Some(JsonKey::Delete)) {
            return visit_patch(map, first).map(Write::Set);
        }
        let user_id: S = map.next_value()?;
        check_user_id(user_id.as_ref()).map_err(de::Error::custom)?;
        match map.next_key::<JsonKey>()? {
            None => Ok(Write::Delete(user_id)),
            Some(_) => Err(de::Error::custom("a deletion has one key, delete")),
        }
    }
}

enum JsonKey {
    UserId,
    Field(usize),
    Delete,
}

fn unknown_field<E: de::Error>(name: &str) -> E {
    E::custom(format_args!(
        "unknown field {:?}; known are {USER_ID}, {}",
        truncated(name),
        FIELDS.join(", ")
    ))
}

impl<'de> Deserialize<'de> for JsonKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct JsonKeyVisitor;
        impl Visitor<'_> for JsonKeyVisitor {
            type Value = JsonKey;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a field's name")
            }

            fn visit_str<E: de::Error>(self, name: &str) -> Result<JsonKey, E> {
                if name == USER_ID {
                    return Ok(JsonKey::UserId);
                }
                match FIELDS.iter().position(|field| *field == name) {
                    Some(index) => Ok(JsonKey::Field(index)),
                    None if name == DELETE => Ok(JsonKey::Delete),
                    None => Err(unknown_field(name)),
                }
            }
        }
        deserializer.deserialize_identifier(JsonKeyVisitor)
    }
}

/// Deserializes a field's value: an `i64` written as an integer. Has the field's name.
struct FieldSeed(&'static str);

impl FieldSeed {
    fn invalid<E: de::Error>(&self, what: fmt::Arguments<'_>) -> E {
        E::custom(format_args!(
            "{} is {what}; send an integer from {} to {}",
            self.0,
            i64::MIN,
            i64::MAX
        ))
    }
}

impl<'de> de::DeserializeSeed<'de> for FieldSeed {
    type Value = i64;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<i64, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for FieldSeed {
    type Value = i64;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "an integer for {}", self.0)
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<i64, E> {
        Ok(value)
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<i64, E> {
        i64::try_from(value).map_err(|_| self.invalid(format_args!("{value}, out of range")))
    }

    fn visit_f64<E: de::Error>(self, _: f64) -> Result<i64, E> {
        Err(self.invalid(format_args!(
            "out of range, or written with a fraction or an exponent"
        )))
    }

    fn visit_unit<E: de::Error>(self) -> Result<i64, E> {
        Err(self.invalid(format_args!("null")))
    }

    fn visit_bool<E: de::Error>(self, _: bool) -> Result<i64, E> {
        Err(self.invalid(format_args!("a boolean")))
    }

    fn visit_str<E: de::Error>(self, _: &str) -> Result<i64, E> {
        Err(self.invalid(format_args!("a string")))
    }

    fn visit_seq<A: de::SeqAccess<'de>>(self, _: A) -> Result<i64, A::Error> {
        Err(self.invalid(format_args!("an array")))
    }

    fn visit_map<A: MapAccess<'de>>(self, _: A) -> Result<i64, A::Error> {
        Err(self.invalid(format_args!("an object")))
    }
}

/// The first 40 characters of a client's text, for log lines and responses.
fn truncated(name: &str) -> &str {
    name.char_indices()
        .nth(40)
        .and_then(|(at, _)| name.get(..at))
        .unwrap_or(name)
}
