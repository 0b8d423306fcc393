//! A patch, a deletion and a record as JSON, read and written.

use std::fmt;

use serde::de::{self, Deserialize, Deserializer, MapAccess, Visitor};

use super::{Changes, FIELDS, Patch, USER_ID, USER_ID_BYTES_MAX, UserGrade, Write, check_user_id};

/// The name of the one key in a deletion's JSON.
const DELETE: &str = "delete";

impl<S: AsRef<str>> Patch<S> {
    /// Appends the patch as the JSON object that `POST /set` takes.
    pub fn write_json(&self, out: &mut Vec<u8>) {
        write_user_id(self.user_id.as_ref(), out);
        for (index, value) in self.changes.iter() {
            write_field(index, value, out);
        }
        out.push(b'}');
    }
}

impl<S: AsRef<str>> Write<S> {
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

impl<S: AsRef<str>> UserGrade<S> {
    /// Appends the record as the JSON object that `GET /get` answers.
    pub fn write_json(&self, out: &mut Vec<u8>) {
        write_user_id(self.user_id.as_ref(), out);
        for (index, value) in self.values.iter().enumerate() {
            write_field(index, *value, out);
        }
        out.push(b'}');
    }
}

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

#[expect(clippy::indexing_slicing, reason = "`index` is a field's")]
fn write_field(index: usize, value: i64, out: &mut Vec<u8>) {
    out.extend_from_slice(b",\"");
    out.extend_from_slice(FIELDS[index].as_bytes());
    out.extend_from_slice(b"\":");
    out.extend_from_slice(itoa::Buffer::new().format(value).as_bytes());
}

impl Write {
    /// Reads a patch as [`Patch::write_json`] writes it onto the end of `writes`; what follows it. `None` for
    /// any other text, be it another way to write a patch or none: that is for a parser to say.
    pub(crate) fn read_set<'a>(json: &'a str, writes: &mut Vec<Self>) -> Option<&'a str> {
        let rest = json
            .strip_prefix("{\"")?
            .strip_prefix(USER_ID)?
            .strip_prefix("\":\"")?;
        let (user_id, rest) = read_id(rest)?;
        // Filled in where it is to be: a patch that is moved there is waited for, each value having
        // been written by itself.
        let Write::Set(Patch { changes, .. }) = writes.push_mut(Write::Set(Patch {
            user_id: user_id.into(),
            changes: Changes::default(),
        })) else {
            return None;
        };
        let mut rest = rest.strip_prefix('"')?;
        let mut next = 0;
        while let Some(field) = rest.strip_prefix(",\"") {
            let (index, value) = read_name(field).filter(|(index, _)| *index >= next)?;
            let (value, after) = read_integer(value)?;
            changes.set(index, value);
            next = index + 1;
            rest = after;
        }
        rest.strip_prefix('}')
    }
}

/// Reads an id that has no escapes, up to its quote.
fn read_id(json: &str) -> Option<(&str, &str)> {
    let plain = plain_len(json.as_bytes());
    let (user_id, rest) = json.split_at_checked(plain)?;
    if rest.starts_with('"') && (1..=USER_ID_BYTES_MAX).contains(&plain) {
        return Some((user_id, rest));
    }
    let end = json.bytes().position(|byte| matches!(byte, b'"' | b'\\'))?;
    let (user_id, rest) = json.split_at_checked(end)?;
    check_user_id(user_id).ok()?;
    Some((user_id, rest))
}

/// How many bytes `text` begins with that stand for themselves in JSON and that an id may have: printable ASCII
/// without quote and backslash; of the last seven it may count none. Looks at eight at once (SWAR, as in "Bit
/// Twiddling Hacks", "Determine if a word has a byte less than n"); ADR 0004 has the
/// measurements.
fn plain_len(text: &[u8]) -> usize {
    const ONES: u64 = u64::from_ne_bytes([1; 8]);
    /// Has the high bit of each byte that is less than `least`, 0x80 at most; exact up to the first of
    /// them, since a borrow reaches later ones alone.
    fn below(word: u64, least: u8) -> u64 {
        word.wrapping_sub(ONES * u64::from(least)) & !word
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

/// Which field's name `json` begins with, and its value with what follows it.
fn read_name(json: &str) -> Option<(usize, &str)> {
    // Nothing else is done in this loop, so that it is unrolled and each name compared as what it is.
    FIELDS.iter().enumerate().find_map(|(index, name)| {
        let value = json.strip_prefix(name)?.strip_prefix("\":")?;
        Some((index, value))
    })
}

/// Reads an integer as [`write_field`] writes it, and what follows it. In one pass, where finding its end and
/// parsing it are two.
fn read_integer(json: &str) -> Option<(i64, &str)> {
    let digits = json.strip_prefix('-').unwrap_or(json);
    // Summed below zero: `i64::MIN` has no positive counterpart.
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
    // JSON has no leading zeros, and a parser may take -0 for a fraction.
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
#[expect(clippy::indexing_slicing, reason = "`index` is a field's")]
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
                let name = FIELDS[index];
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
