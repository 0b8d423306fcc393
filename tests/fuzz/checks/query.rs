//! The query of `GET /get`, beside a plain reading of the rules: parts between `&`, a name and a value
//! around the first `=`, `+` for a space, two hexadecimal digits after `%`, UTF-8. Where those hold, the
//! URL standard's own parser must see the same.

use gradestore::grade::{USER_ID, check_user_id};
use gradestore::http::read::user_id_of;

pub(crate) fn check(data: &[u8]) {
    let Ok(query) = str::from_utf8(data) else {
        return;
    };
    let pairs = query.split('&').map(|pair| match pair.find('=') {
        Some(at) => (&pair[..at], &pair[at + 1..]),
        None => (pair, ""),
    });
    let values: Vec<_> = pairs
        .filter(|(name, _)| decoded(name).as_deref() == Some(USER_ID))
        .map(|(_, value)| value)
        .collect();
    let wanted = match values[..] {
        [] => Err("user-id-missing"),
        [value] => match decoded(value) {
            None => Err("query-encoding"),
            Some(id) if check_user_id(&id).is_err() => Err("user-id-invalid"),
            Some(id) => Ok(id),
        },
        _ => Err("user-id-repeated"),
    };
    if let Ok(id) = &wanted {
        let mut lenient = form_urlencoded::parse(data).filter(|(name, _)| name == USER_ID);
        assert_eq!(lenient.next().as_ref().map(|(_, id)| &**id), Some(&**id));
    }
    let found = user_id_of(query).map(|id| id.into_owned());
    assert_eq!(found.map_err(|error| error.kind().1), wanted);
}

fn decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'+' => b' ',
            b'%' => hex(rest.next()?)? << 4 | hex(rest.next()?)?,
            _ => byte,
        });
    }
    String::from_utf8(bytes).ok()
}

fn hex(digit: u8) -> Option<u8> {
    let value = char::from(digit).to_digit(16)?;
    u8::try_from(value).ok()
}
