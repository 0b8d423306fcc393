//! Writes and parses the gzip members of native files.

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::format::{EndRecord, HeadRecord, csv_name};

/// The longest inflated text of a member. Bounds a reader's memory, whatever a file declares.
pub(super) const TEXT_BYTES_MAX: usize = 1024 * 1024;
/// The longest member. Deflate adds 5 bytes per 16 KiB of incompressible data.
pub(super) const MEMBER_BYTES_MAX: usize =
    TEXT_BYTES_MAX + TEXT_BYTES_MAX / 1024 + HEADER_BYTES_MAX;
/// More than the longest FEXTRA and name of a header.
const HEADER_BYTES_MAX: usize = 8 * 1024;

/// ID1, ID2, and CM for deflate.
const MAGIC: [u8; 3] = [0x1f, 0x8b, 8];
const FLAG_EXTRA: u8 = 4;
const FLAG_NAME: u8 = 8;
/// OS: unknown, so that files do not depend on the system.
const OS_UNKNOWN: u8 = 255;
/// Bytes before the length of FEXTRA.
pub(super) const FIXED_BYTES: usize = 10;
/// Enough bytes for [`kind_of`].
pub(super) const START_BYTES: usize = FIXED_BYTES + 4;
/// CRC-32 and inflated length.
pub(super) const TRAILER_BYTES: usize = 8;

/// The name of the FEXTRA subfield.
const SUBFIELD: [u8; 2] = *b"GS";
const KIND_HEAD: u8 = b'H';
const KIND_ROWS: u8 = b'M';
const KIND_END: u8 = b'E';
/// The deflate stream of an empty text.
const DEFLATED_EMPTY: [u8; 2] = [3, 0];

/// Appends a member's header with `content` in the subfield. `name` is FNAME and MTIME.
fn write_header(out: &mut Vec<u8>, kind: u8, content: &[u8], name: Option<(&str, u32)>) {
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

/// The content of a head or an end: the CRC-32 of the JSON, and the JSON.
#[expect(clippy::expect_used, reason = "both records are strings and numbers")]
fn checked_json(record: &impl Serialize) -> Vec<u8> {
    let json = serde_json::to_vec(record).expect("a head or an end is JSON");
    [&libdeflater::crc32(&json).to_le_bytes(), &json[..]].concat()
}

/// Appends the first member: `head`, and the header row `text`.
pub(super) fn write_head(out: &mut Vec<u8>, head: &HeadRecord, text: &[u8]) {
    let mtime_s = u32::try_from(head.created_ns / 1_000_000_000).unwrap_or(0);
    let name = csv_name(head.created_ns);
    write_header(out, KIND_HEAD, &checked_json(head), Some((&name, mtime_s)));
    // One final block, stored without compression.
    let length = text.len() as u16;
    out.push(1);
    out.extend_from_slice(&length.to_le_bytes());
    out.extend_from_slice(&(!length).to_le_bytes());
    out.extend_from_slice(text);
    write_trailer(out, text);
}

/// Appends a member of rows: `text`, compressed by `deflate`.
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
    let start = out.len();
    write_header(out, KIND_ROWS, &[0; 12], None);
    let content_at = out.len() - 12;
    let deflate_at = out.len();
    out.resize(deflate_at + deflate.deflate_compress_bound(text.len()), 0);
    let deflated = deflate.deflate_compress(text, &mut out[deflate_at..]);
    let deflated = deflated.expect("the output is as long as the library's bound");
    out.truncate(deflate_at + deflated);
    write_trailer(out, text);
    let length = (out.len() - start) as u32;
    let numbers = [length, text.len() as u32, rows].map(u32::to_le_bytes);
    out[content_at..deflate_at].copy_from_slice(numbers.as_flattened());
}

/// Appends the last member.
pub(super) fn write_end(out: &mut Vec<u8>, end: &EndRecord) {
    write_header(out, KIND_END, &checked_json(end), None);
    out.extend_from_slice(&DEFLATED_EMPTY);
    write_trailer(out, &[]);
}

fn write_trailer(out: &mut Vec<u8>, text: &[u8]) {
    out.extend_from_slice(&libdeflater::crc32(text).to_le_bytes());
    out.extend_from_slice(&(text.len() as u32).to_le_bytes());
}

/// The kind of a member, from its first bytes.
pub(super) enum MemberKind {
    /// Not a gzip member.
    NotGzip,
    /// A gzip member of another program.
    ThirdParty,
    /// A member of this program, with the length of its FEXTRA in bytes.
    Native(usize),
    /// A gzip member with an extra field that may be a damaged one of this program.
    Unknown,
}

/// Whether a gzip file can begin with `start`, which may be short.
pub(super) fn is_gzip_prefix(start: &[u8]) -> bool {
    start
        .iter()
        .zip(MAGIC)
        .all(|(found, wanted)| *found == wanted)
}

/// Whether a native member, other than a first one, begins in `bytes`.
pub(super) fn contains_native_member(bytes: &[u8]) -> bool {
    let mut header = Vec::with_capacity(FIXED_BYTES);
    write_header(&mut header, KIND_ROWS, &[], None);
    let (fixed, _) = header.split_at(FIXED_BYTES);
    bytes
        .windows(FIXED_BYTES + 4)
        .any(|window| window.starts_with(fixed) && window.ends_with(&SUBFIELD))
}

fn bits_between(one: [u8; 2], other: [u8; 2]) -> u32 {
    (u16::from_le_bytes(one) ^ u16::from_le_bytes(other)).count_ones()
}

/// Examines the fixed part, the length of FEXTRA and the name of the first subfield: 14 bytes.
pub(super) fn kind_of(start: &[u8]) -> MemberKind {
    let Some((fixed, rest)) = start.split_at_checked(FIXED_BYTES) else {
        return MemberKind::NotGzip;
    };
    if !fixed.starts_with(&MAGIC) {
        return MemberKind::NotGzip;
    }
    if fixed.get(3).is_none_or(|flags| flags & FLAG_EXTRA == 0) {
        return MemberKind::ThirdParty;
    }
    match *rest {
        [low, high, first, second, ..] if [first, second] == SUBFIELD => {
            MemberKind::Native(usize::from(u16::from_le_bytes([low, high])))
        }
        // Those of bgzip, mgzip and others, but not this program's with one or two flipped bits.
        [_, _, first, second, ..] if bits_between([first, second], SUBFIELD) > 2 => {
            MemberKind::ThirdParty
        }
        _ => MemberKind::Unknown,
    }
}

/// The content of the subfield.
pub(super) enum MemberRecord {
    Head(HeadRecord),
    Rows {
        /// The length of the member.
        member_bytes: u32,
        /// The length of the inflated text.
        text_bytes: u32,
        rows: u32,
    },
    End(EndRecord),
}

/// Parses FEXTRA.
pub(super) fn parse_extra(extra: &[u8]) -> Result<MemberRecord, &'static str> {
    let wrong = "the extra field of a gzip header is malformed";
    let rest = extra.strip_prefix(&SUBFIELD).ok_or(wrong)?;
    let (length, rest) = rest.split_first_chunk::<2>().ok_or(wrong)?;
    if usize::from(u16::from_le_bytes(*length)) != rest.len() {
        return Err(wrong);
    }
    let (kind, content) = rest.split_first().ok_or(wrong)?;
    match *kind {
        KIND_HEAD => Ok(MemberRecord::Head(parse(content)?)),
        KIND_ROWS => {
            let ([member_bytes, text_bytes, rows], []) = content.as_chunks() else {
                return Err(wrong);
            };
            Ok(MemberRecord::Rows {
                member_bytes: u32::from_le_bytes(*member_bytes),
                text_bytes: u32::from_le_bytes(*text_bytes),
                rows: u32::from_le_bytes(*rows),
            })
        }
        KIND_END => Ok(MemberRecord::End(parse(content)?)),
        _ => Err(wrong),
    }
}

fn parse<T: DeserializeOwned>(content: &[u8]) -> Result<T, &'static str> {
    let (_, json) = content
        .split_first_chunk::<4>()
        .filter(|(crc, json)| libdeflater::crc32(json) == u32::from_le_bytes(**crc))
        .ok_or("a record in a gzip header does not match its CRC-32")?;
    serde_json::from_slice(json).map_err(|_| "a record in a gzip header is not valid JSON")
}

/// Inflates a member of rows into `text`, which must become `expected_bytes` long.
pub(super) fn inflate(
    deflated: &[u8],
    trailer: &[u8],
    expected_bytes: usize,
    inflate: &mut libdeflater::Decompressor,
    text: &mut Vec<u8>,
) -> Result<(), &'static str> {
    text.resize(expected_bytes, 0);
    let inflated = inflate
        .deflate_decompress(deflated, text)
        .map_err(|_| "a member cannot be inflated")?;
    let mut expected = Vec::with_capacity(TRAILER_BYTES);
    write_trailer(&mut expected, text);
    match inflated == expected_bytes && expected == trailer {
        true => Ok(()),
        false => Err("the inflated length or CRC-32 of a member is wrong"),
    }
}
