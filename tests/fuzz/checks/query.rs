//! The query of `GET /get`, compared with a simple parser: pairs separated by `&`, a name and a
//! value around the first `=`, `+` for a space, two hexadecimal digits after `%`, UTF-8. The query
//! has one `user_id`, or `user_ids`. For a valid query the parser of the URL standard must return
//! the same ids.

use gradestore::grade::{USER_ID, check_user_id};
use gradestore::http::get::{GetQuery, USER_IDS_MAX, parse_query, parse_user_id};

pub(crate) fn check(data: &[u8]) {
    let Ok(query) = str::from_utf8(data) else {
        return;
    };
    let pairs = query.split('&').map(|pair| match pair.find('=') {
        Some(at) => (&pair[..at], &pair[at + 1..]),
        None => (pair, ""),
    });
    let named = |wanted: &str| -> Vec<&str> {
        let pairs = pairs.clone();
        let of_name = pairs.filter(|(name, _)| decoded(name).as_deref() == Some(wanted));
        of_name.map(|(_, value)| value).collect()
    };
    let id_in = |value: &str| match decoded(value) {
        None => Err("query-encoding"),
        Some(id) if check_user_id(&id).is_err() => Err("user-id-invalid"),
        Some(id) => Ok(id),
    };
    let (one, many) = (named(USER_ID), named("user_ids"));
    let wanted = match (&one[..], &many[..]) {
        ([], []) => Err("user-id-missing"),
        ([value], []) => id_in(value).map(|id| vec![id]),
        (_, []) => Err("user-id-repeated"),
        ([], _) if many.len() > USER_IDS_MAX => Err("user-ids-too-many"),
        ([], _) => many.iter().map(|value| id_in(value)).collect(),
        // The error depends on the order of the pairs.
        _ => {
            let found = parse_query(query).map_err(|error| error.kind().1);
            assert!(matches!(found, Err("user-id-and-ids" | "user-id-repeated")));
            assert!(one.len() > 1 || found == Err("user-id-and-ids"));
            return;
        }
    };
    let name = if many.is_empty() { USER_ID } else { "user_ids" };
    if let Ok(ids) = &wanted {
        let lenient = form_urlencoded::parse(data).filter(|(found, _)| found == name);
        assert!(
            lenient
                .map(|(_, id)| id.into_owned())
                .eq(ids.iter().cloned())
        );
    }
    let found = parse_query(query).map(|query| match query {
        GetQuery::One(id) => vec![id.into_owned()],
        GetQuery::Many(ids) => ids.into_iter().map(|id| id.into_owned()).collect(),
    });
    let found = found.map_err(|error| error.kind().1);
    assert_eq!(found, wanted);
    let alone = parse_user_id(query).map_err(|error| error.kind().1);
    match many.is_empty() || wanted.is_err() {
        true => assert_eq!(alone.map(|id| vec![id.into_owned()]), wanted),
        false => assert_eq!(alone, Err("user-ids-here")),
    }
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
