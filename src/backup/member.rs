//! One gzip member of our own files: the mirror of writing and reading its header.

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{Head, csv_name};

/// The longest text that a member inflates to. Bounds what a reader sets aside, whatever a file
/// claims.
pub(super) const TEXT_BYTES_MAX: usize = 1024 * 1024;
/// The longest member. Deflate adds 5 bytes to 16 KiB that it can't shrink; the rest is header.
pub(super) const MEMBER_BYTES_MAX: usize =
    TEXT_BYTES_MAX + TEXT_BYTES_MAX / 1024 + HEADER_BYTES_MAX;
/// A header's longest FEXTRA and name, with room.
const HEADER_BYTES_MAX: usize = 8 * 1024;

/// ID1, ID2, and CM for deflate.
const MAGIC: [u8; 3] = [0x1f, 0x8b, 8];
const FLAG_EXTRA: u8 = 4;
const FLAG_NAME: u8 = 8;
/// OS: unknown. What made the file does not depend on it.
const OS_UNKNOWN: u8 = 255;
/// Bytes before FEXTRA's length.
pub(super) const FIXED_BYTES: usize = 10;
/// CRC-32 and length.
pub(super) const TRAILER_BYTES: usize = 8;

/// The name of our subfield.
pub(super) const SUBFIELD: [u8; 2] = *b"GS";
const KIND_HEAD: u8 = b'H';
const KIND_ROWS: u8 = b'M';
const KIND_END: u8 = b'E';
/// What an empty text deflates to.
const DEFLATED_NOTHING: [u8; 2] = [3, 0];

/// Begins a member: all of its header, with `content` in our subfield.
fn begin(out: &mut Vec<u8>, kind: u8, content: &[u8], name: Option<(&str, u32)>) {
    out.extend_from_slice(&MAGIC);
    out.push(FLAG_EXTRA | if name.is_some() { FLAG_NAME } else { 0 });
    out.extend_from_slice(&name.map_or(0, |(_, mtime_s)| mtime_s).to_le_bytes());
    out.push(0);
    out.push(OS_UNKNOWN);
    let content_bytes = content.len() as u16 + 1;
    out.extend_from_slice(&(content_bytes + 4).to_le_bytes());
    out.extend_from_slice(&SUBFIELD);
    out.extend_from_slice(&content_bytes.to_le_bytes());
    out.push(kind);
    out.extend_from_slice(content);
    if let Some((name, _)) = name {
        out.extend_from_slice(name.as_bytes());
        out.push(0);
    }
}

#[expect(clippy::expect_used, reason = "both records are strings and numbers")]
fn json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("a head or an end is JSON")
}

/// The first member: `head`, and the header row `text`.
pub(super) fn write_head(out: &mut Vec<u8>, head: &Head, text: &[u8]) {
    let mtime_s = u32::try_from(head.time_ns / 1_000_000_000).unwrap_or(0);
    let name = csv_name(head.time_ns);
    begin(out, KIND_HEAD, &json(head), Some((&name, mtime_s)));
    // Stored as it is: one final block without compression.
    let length = text.len() as u16;
    out.push(1);
    out.extend_from_slice(&length.to_le_bytes());
    out.extend_from_slice(&(!length).to_le_bytes());
    out.extend_from_slice(text);
    write_trailer(out, text);
}

/// A member of rows: `text`, deflated by `deflate`.
#[expect(
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "`out` only grows"
)]
pub(super) fn write_rows(
    out: &mut Vec<u8>,
    text: &[u8],
    rows: u32,
    deflate: &mut libdeflater::Compressor,
) {
    let begin_at = out.len();
    begin(out, KIND_ROWS, &[0; 12], None);
    let content_at = out.len() - 12;
    let deflate_at = out.len();
    out.resize(deflate_at + deflate.deflate_compress_bound(text.len()), 0);
    let deflated = deflate.deflate_compress(text, &mut out[deflate_at..]);
    let deflated = deflated.expect("the output is as long as the library's bound");
    out.truncate(deflate_at + deflated);
    write_trailer(out, text);
    let length = (out.len() - begin_at) as u32;
    let numbers = [length, text.len() as u32, rows].map(u32::to_le_bytes);
    out[content_at..deflate_at].copy_from_slice(numbers.as_flattened());
}

/// The last member.
pub(super) fn write_end(out: &mut Vec<u8>, end: &super::End) {
    let json = json(end);
    let mut content = libdeflater::crc32(&json).to_le_bytes().to_vec();
    content.extend_from_slice(&json);
    begin(out, KIND_END, &content, None);
    out.extend_from_slice(&DEFLATED_NOTHING);
    write_trailer(out, &[]);
}

fn write_trailer(out: &mut Vec<u8>, text: &[u8]) {
    out.extend_from_slice(&libdeflater::crc32(text).to_le_bytes());
    out.extend_from_slice(&(text.len() as u32).to_le_bytes());
}

/// Whether a member is as gzip has it and what its FEXTRA holds, told from its first bytes.
pub(super) enum Kind {
    /// No gzip.
    NotGzip,
    /// Gzip, without an extra field or with another program's.
    Foreign,
    /// Ours: FEXTRA's bytes are so many.
    Ours(usize),
    /// An extra field that may have been ours.
    Unknown,
}

/// Whether `start`, which may be short, can be how a gzip file begins.
pub(super) fn begins_gzip(start: &[u8]) -> bool {
    start
        .iter()
        .zip(MAGIC)
        .all(|(found, wanted)| *found == wanted)
}

/// Whether one of our members of rows, or an end, begins in `bytes`.
pub(super) fn begins_ours(bytes: &[u8]) -> bool {
    let mut header = Vec::with_capacity(FIXED_BYTES);
    begin(&mut header, KIND_ROWS, &[], None);
    let (fixed, _) = header.split_at(FIXED_BYTES);
    bytes
        .windows(FIXED_BYTES + 4)
        .any(|window| window.starts_with(fixed) && window.ends_with(&SUBFIELD))
}

fn bits_between(one: [u8; 2], other: [u8; 2]) -> u32 {
    (u16::from_le_bytes(one) ^ u16::from_le_bytes(other)).count_ones()
}

/// Looks at the fixed part, FEXTRA's length and the first subfield's name: 14 bytes.
pub(super) fn kind_of(start: &[u8]) -> Kind {
    let Some((fixed, rest)) = start.split_at_checked(FIXED_BYTES) else {
        return Kind::NotGzip;
    };
    if !fixed.starts_with(&MAGIC) {
        return Kind::NotGzip;
    }
    if fixed.get(3).is_none_or(|flags| flags & FLAG_EXTRA == 0) {
        return Kind::Foreign;
    }
    match *rest {
        [low, high, first, second, ..] if [first, second] == SUBFIELD => {
            Kind::Ours(usize::from(u16::from_le_bytes([low, high])))
        }
        // bgzip's, mgzip's and others'; but not what a flipped bit or two would make of ours.
        [_, _, first, second, ..] if bits_between([first, second], SUBFIELD) > 2 => Kind::Foreign,
        _ => Kind::Unknown,
    }
}

/// Our subfield's content, by kind of member.
pub(super) enum Content {
    Head(Head),
    Rows { member: u32, text: u32, rows: u32 },
    End(super::End),
}

/// Reads FEXTRA. The error says what is wrong.
pub(super) fn content_of(extra: &[u8]) -> Result<Content, &'static str> {
    let wrong = "the extra field of a gzip header is not as it should be";
    let rest = extra.strip_prefix(&SUBFIELD).ok_or(wrong)?;
    let (length, rest) = rest.split_first_chunk::<2>().ok_or(wrong)?;
    if usize::from(u16::from_le_bytes(*length)) != rest.len() {
        return Err(wrong);
    }
    let (kind, content) = rest.split_first().ok_or(wrong)?;
    match *kind {
        KIND_HEAD => Ok(Content::Head(parse(content)?)),
        KIND_ROWS => {
            let ([member, text, rows], []) = content.as_chunks() else {
                return Err(wrong);
            };
            Ok(Content::Rows {
                member: u32::from_le_bytes(*member),
                text: u32::from_le_bytes(*text),
                rows: u32::from_le_bytes(*rows),
            })
        }
        KIND_END => {
            let (crc, json) = content.split_first_chunk::<4>().ok_or(wrong)?;
            if libdeflater::crc32(json) != u32::from_le_bytes(*crc) {
                return Err("the end record has changed");
            }
            Ok(Content::End(parse(json)?))
        }
        _ => Err(wrong),
    }
}

fn parse<T: DeserializeOwned>(json: &[u8]) -> Result<T, &'static str> {
    serde_json::from_slice(json).map_err(|_| "a record in a gzip header can't be read")
}

/// Inflates a member of rows into `text`, which gets exactly `wanted` bytes.
pub(super) fn inflate(
    deflated: &[u8],
    trailer: &[u8],
    wanted: usize,
    inflate: &mut libdeflater::Decompressor,
    text: &mut Vec<u8>,
) -> Result<(), &'static str> {
    text.resize(wanted, 0);
    let inflated = inflate
        .deflate_decompress(deflated, text)
        .map_err(|_| "a member does not inflate")?;
    let mut expected = Vec::with_capacity(TRAILER_BYTES);
    write_trailer(&mut expected, text);
    match inflated == wanted && expected == trailer {
        true => Ok(()),
        false => Err("a member's length or CRC-32 is wrong"),
    }
}
