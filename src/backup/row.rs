//! Writes and parses rows of native files.
//!
//! Native files use a subset of RFC 4180 that is fast to write and parse: a quoted header row,
//! columns in the order of [`FIELDS`], unquoted numbers, and a user id in quotes unless it has only
//! letters, digits and `-_.:@/`. csv-async, which reads third-party files, takes twice as long to parse and three times
//! as long to write: ADR 0006.

use crate::grade::{FIELD_COUNT, FIELDS, USER_ID, UserGrade, Values, check_user_id};

use super::BackupError;

/// One row, whose id borrows from the text.
pub type Row<'a> = UserGrade<&'a str>;

/// The longest row: an id of doubled quotes, in quotes, and the numbers.
pub(super) const ROW_BYTES_MAX: usize = 2 * crate::grade::USER_ID_BYTES_MAX + 3 + FIELD_COUNT * 21;
/// The shortest row: an id of one byte, and zeros.
pub(super) const ROW_BYTES_MIN: usize = 2 + FIELD_COUNT * 2;

/// Numbers of at most this many digits fit in 64 bits.
const SAFE_DIGITS: usize = 19;

/// The line of row `row`. Line 1 is the header row, and ids have no line breaks.
pub(super) fn line_of(row: u64) -> u64 {
    row + 1
}

/// The header row, in quotes: tools that guess whether a file has quotes look only at its first
/// rows, and the first id that needs them may come later.
pub(super) fn write_header(out: &mut Vec<u8>) {
    for (index, name) in [USER_ID].iter().chain(FIELDS).enumerate() {
        if index > 0 {
            out.push(b',');
        }
        out.push(b'"');
        out.extend_from_slice(name.as_bytes());
        out.push(b'"');
    }
    out.push(b'\n');
}

/// Appends one row.
pub(super) fn write(user_id: &str, values: &Values, out: &mut Vec<u8>) {
    if user_id.bytes().all(needs_no_quotes) {
        out.extend_from_slice(user_id.as_bytes());
    } else {
        out.push(b'"');
        for byte in user_id.bytes() {
            if byte == b'"' {
                out.push(b'"');
            }
            out.push(byte);
        }
        out.push(b'"');
    }
    let mut number = itoa::Buffer::new();
    for value in values {
        out.push(b',');
        out.extend_from_slice(number.format(*value).as_bytes());
    }
    out.push(b'\n');
}

#[expect(clippy::indexing_slicing, reason = "a byte is below 256")]
const fn needs_no_quotes(byte: u8) -> bool {
    NEEDS_NO_QUOTES[byte as usize]
}

/// The bytes that need no quotes.
#[expect(clippy::indexing_slicing, reason = "the loop checks the bound")]
const NEEDS_NO_QUOTES: [bool; 256] = {
    let mut plain = [false; 256];
    let mut byte = 0;
    while byte < plain.len() {
        plain[byte] = (byte as u8).is_ascii_alphanumeric()
            || matches!(byte as u8, b'-' | b'_' | b'.' | b':' | b'@' | b'/');
        byte += 1;
    }
    plain
};

/// How many of [`FIELDS`] a header row has. A file of an older version has fewer; the others read
/// as 0.
pub(super) fn parse_header(line: &str) -> Result<usize, BackupError> {
    let wrong = |what: String| BackupError::Header { what };
    let line = line.strip_suffix('\n').unwrap_or(line);
    let mut columns = line.split(',').map(|column| {
        let unquoted = column
            .strip_prefix('"')
            .and_then(|name| name.strip_suffix('"'));
        unquoted.ok_or_else(|| wrong(format!("column {} has no quotes", start(column))))
    });
    if columns.next().transpose()? != Some(USER_ID) {
        return Err(wrong(format!("the first column is not {USER_ID}")));
    }
    let mut fields = 0;
    for column in columns {
        let column = column?;
        match FIELDS.get(fields) {
            Some(field) if *field == column => fields += 1,
            _ => {
                let what = format!("unknown column {:?}, use a newer gradestore", start(column));
                return Err(wrong(what));
            }
        }
    }
    Ok(fields)
}

/// Calls `row` with every row of `text`. Each has `fields` columns besides the id. The first has
/// the number `first_row`. Returns the number of rows.
#[expect(
    clippy::indexing_slicing,
    reason = "there are as many values as fields"
)]
pub(super) fn parse(
    text: &str,
    fields: usize,
    first_row: u64,
    mut row: impl FnMut(Row<'_>),
) -> Result<u32, BackupError> {
    let mut unquoted = String::new();
    let mut rest = text;
    let mut rows = 0;
    while !rest.is_empty() {
        let number = first_row + u64::from(rows);
        let user_id;
        (user_id, rest) =
            parse_user_id(rest, &mut unquoted).ok_or_else(|| unterminated_id(number))?;
        check_user_id(user_id).map_err(|error| BackupError::Value {
            row: number,
            line: line_of(number),
            column: USER_ID,
            what: error.to_string(),
        })?;
        let mut values = Values::default();
        for (index, value) in values.iter_mut().take(fields).enumerate() {
            let end = if index + 1 == fields { b'\n' } else { b',' };
            (*value, rest) = parse_number(rest, end).ok_or_else(|| BackupError::Value {
                row: number,
                line: line_of(number),
                column: FIELDS[index],
                what: format!(
                    "not a 64-bit integer, or not the last column: {:?}",
                    start(rest)
                ),
            })?;
        }
        row(Row { user_id, values });
        rows += 1;
    }
    Ok(rows)
}

fn unterminated_id(row: u64) -> BackupError {
    BackupError::Value {
        row,
        line: line_of(row),
        column: USER_ID,
        what: "the user id or its quotes do not end".to_owned(),
    }
}

/// The first 40 characters of a line, for an error message.
fn start(text: &str) -> &str {
    let line = text.split(['\n', '\r']).next().unwrap_or_default();
    line.char_indices()
        .nth(40)
        .and_then(|(at, _)| line.get(..at))
        .unwrap_or(line)
}

/// The id, and the text after its comma.
fn parse_user_id<'a: 'b, 'b>(
    text: &'a str,
    unquoted: &'b mut String,
) -> Option<(&'b str, &'a str)> {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.bytes().position(|byte| !needs_no_quotes(byte))?;
        let (id, rest) = text.split_at_checked(end)?;
        return Some((id, rest.strip_prefix(',')?));
    };
    unquoted.clear();
    let mut rest = quoted;
    loop {
        let (part, after) = rest.split_once('"')?;
        unquoted.push_str(part);
        match after.strip_prefix('"') {
            Some(after) => {
                unquoted.push('"');
                rest = after;
            }
            None => return Some((unquoted, after.strip_prefix(',')?)),
        }
    }
}

/// The number before `end`, and the text after that.
fn parse_number(text: &str, end: u8) -> Option<(i64, &str)> {
    let (negative, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text),
    };
    let mut count = 0;
    let mut value: u64 = 0;
    for byte in digits.bytes() {
        let digit = byte.wrapping_sub(b'0');
        if digit > 9 {
            break;
        }
        value = value.wrapping_mul(10).wrapping_add(u64::from(digit));
        count += 1;
    }
    if count == 0 || digits.as_bytes().get(count) != Some(&end) {
        return None;
    }
    if count > SAFE_DIGITS {
        value = digits.get(..count)?.parse().ok()?;
    }
    let value = match negative {
        true => 0_i64.checked_sub_unsigned(value)?,
        false => i64::try_from(value).ok()?,
    };
    Some((value, digits.get(count + 1..)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parsed(text: &str) -> Result<Vec<(String, Values)>, String> {
        let mut rows = Vec::new();
        let count = parse(text, FIELD_COUNT, 1, |row| {
            rows.push((row.user_id.to_owned(), row.values))
        });
        match count {
            Ok(count) => {
                assert_eq!(count as usize, rows.len());
                Ok(rows)
            }
            Err(error) => Err(error.to_string()),
        }
    }

    proptest! {
        #[test]
        fn rows_round_trip(rows in prop::collection::vec(
            ("[ -~é\u{2028}]{1,40}", any::<[i64; FIELD_COUNT]>()), 0..20,
        )) {
            let mut text = Vec::new();
            for (id, values) in &rows {
                let before = text.len();
                write(id, values, &mut text);
                prop_assert!(text.len() - before <= ROW_BYTES_MAX);
            }
            prop_assert_eq!(parsed(std::str::from_utf8(&text).unwrap()).unwrap(), rows);
        }

        #[test]
        fn no_input_panics(text in "[a,\"\n0-9-]{0,60}|\\PC{0,60}") {
            let _ = parsed(&text);
        }
    }

    #[test]
    fn errors_have_row_and_column() {
        let numbers = |values: [&str; FIELD_COUNT]| {
            format!("ok{}\n", ",0".repeat(FIELD_COUNT)) + "a," + &values.join(",") + "\n"
        };
        let zeros = ["0"; FIELD_COUNT];
        let mut values = zeros;
        values[1] = "9223372036854775808";
        let error = parsed(&numbers(values)).unwrap_err();
        assert!(
            error.starts_with(&format!("row 2, column {}", FIELDS[1])),
            "{error}"
        );
        for bad in ["", "-", "+1", "1.0", "1e3", " 1", "0x1"] {
            let mut values = zeros;
            values[FIELD_COUNT - 1] = bad;
            assert!(parsed(&numbers(values)).is_err(), "{bad:?}");
        }
        for bad in ["a", "\"a", "\"a\"b,", ",0,0,0,0\n", "a b,0,0,0,0\n"] {
            assert!(parsed(bad).is_err(), "{bad:?}");
        }
    }
}
