//! The read port: `GET /get?user_id=ID`.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Request, State};
use axum::response::Response;
use axum::routing::get;
use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderValue, Method, Uri};
use percent_encoding::percent_decode;

use super::GRADE_POSITION;
use super::answer::{Answer, AnswerBody, boxed};
use super::error::ApiError;
use super::listener::{Direct, Directly};
use crate::grade::{USER_ID, UserGrade, check_user_id};
use crate::log::Seq;
use crate::readiness::Readiness;
use crate::replication::Applied;
use crate::store::Store;

/// What the read port answers from.
#[derive(Clone)]
pub struct ReadState {
    /// The records.
    pub store: Store,
    /// How far they have come.
    pub applied: Applied,
    /// Whether they may be shown.
    pub readiness: Readiness,
    /// How long a read with `Grade-Position` may wait.
    pub position_wait_max: Duration,
}

/// The port's routes.
pub fn routes(state: ReadState) -> Router {
    Router::new()
        .route(
            "/get",
            get(get_grade).fallback(|| async { ApiError::MethodNotAllowed("GET, HEAD") }),
        )
        .fallback(|| async { ApiError::RouteUnknown("GET /get?user_id=ID") })
        .with_state(state)
}

/// The way past the router: a plain `GET /get` is answered at once, without a future of its own or
/// a boxed one of axum's. Worth a tenth of the server's CPU time a request (`load/README.md`).
pub fn direct(state: ReadState) -> Direct {
    Arc::new(move |request| {
        let plain = request.method() == Method::GET
            && request.uri().path() == "/get"
            && !request.headers().contains_key(GRADE_POSITION);
        match plain {
            true => {
                let answer = answer(&state, request.uri());
                Directly::Now(answer.unwrap_or_else(Answer::from))
            }
            false => Directly::Router(request),
        }
    })
}

async fn get_grade(State(state): State<ReadState>, request: Request) -> Result<Response, ApiError> {
    if let Some(wanted) = position_of(request.headers())? {
        state.readiness.reads()?;
        if !state
            .applied
            .wait_for(wanted, state.position_wait_max)
            .await
        {
            let applied = state.applied.seq();
            return Err(ApiError::PositionNotReached { wanted, applied });
        }
    }
    answer(&state, request.uri()).map(boxed)
}

/// The grade that `uri` asks for, as it is now.
fn answer(state: &ReadState, uri: &Uri) -> Result<Answer, ApiError> {
    let user_id = user_id_of(uri.query().unwrap_or_default())?;
    let store = &state.store;
    let values = state
        .readiness
        .read(|| store.epoch(), || store.get(&user_id))?;
    let values = values.ok_or(ApiError::UserUnknown)?;
    let user_id = user_id.as_ref();
    let mut json = Vec::with_capacity(192);
    UserGrade { user_id, values }.write_json(&mut json);
    let mut response = Answer::new(AnswerBody::Whole(Some(json.into())));
    let json_type = HeaderValue::from_static("application/json");
    response.headers_mut().insert(CONTENT_TYPE, json_type);
    Ok(response)
}

/// The one `user_id` in a query of `application/x-www-form-urlencoded`; other names are ignored.
///
/// Stricter than a form: a broken percent sign or bytes that are no UTF-8 are errors, since a
/// guess would read another user's grade.
///
/// # Errors
/// There is not one, it is wrongly encoded, or it can be no id.
pub fn user_id_of(query: &str) -> Result<Cow<'_, str>, ApiError> {
    let mut found = None;
    for pair in query.split('&') {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        if name == USER_ID || decoded(name).is_ok_and(|name| name == USER_ID) {
            if found.is_some() {
                return Err(ApiError::UserIdRepeated);
            }
            found = Some(value);
        }
    }
    let user_id = decoded(found.ok_or(ApiError::UserIdMissing)?)?;
    check_user_id(&user_id).map_err(ApiError::UserIdInvalid)?;
    Ok(user_id)
}

fn decoded(text: &str) -> Result<Cow<'_, str>, ApiError> {
    if !text.bytes().any(|byte| matches!(byte, b'%' | b'+')) {
        return Ok(Cow::Borrowed(text));
    }
    let hex_follows = |rest: &str| {
        let hex = rest.as_bytes().get(..2);
        hex.is_some_and(|hex| hex.iter().all(u8::is_ascii_hexdigit))
    };
    if !text.split('%').skip(1).all(hex_follows) {
        let broken = "after % two hexadecimal digits must follow; a percent sign itself is %25";
        return Err(ApiError::QueryEncoding(broken));
    }
    let spaced = text.replace('+', " ");
    let text = percent_decode(spaced.as_bytes()).decode_utf8();
    let text = text.map_err(|_| ApiError::QueryEncoding("the bytes must be UTF-8"))?;
    Ok(Cow::Owned(text.into_owned()))
}

/// The position that a read wants to see, if it says one.
///
/// # Errors
/// It is no number, or more than one.
pub fn position_of(headers: &HeaderMap) -> Result<Option<Seq>, ApiError> {
    let mut given = headers.get_all(GRADE_POSITION).iter();
    let Some(position) = given.next() else {
        return Ok(None);
    };
    let digits = position
        .to_str()
        .ok()
        .filter(|text| given.next().is_none() && text.bytes().all(|byte| byte.is_ascii_digit()));
    let position = digits.and_then(|digits| digits.parse().ok());
    position.map(Some).ok_or(ApiError::PositionInvalid)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn outcome(query: &str) -> Result<String, &'static str> {
        user_id_of(query)
            .map(Cow::into_owned)
            .map_err(|error| error.kind().1)
    }

    #[test]
    fn finds_the_one_user_id() {
        for (query, wanted) in [
            ("user_id=alice", Ok("alice")),
            ("x=1&user_id=alice&y", Ok("alice")),
            ("user_id=a+b%2Bc%20d", Ok("a b+c d")),
            ("user%5Fid=alice", Ok("alice")),
            ("user_id=%C3%A9", Ok("é")),
            ("user_id=a=b", Ok("a=b")),
            ("", Err("user-id-missing")),
            ("USER_ID=a", Err("user-id-missing")),
            ("user_id", Err("user-id-invalid")),
            ("user_id=", Err("user-id-invalid")),
            ("user_id=%00", Err("user-id-invalid")),
            ("user_id=a&user_id=a", Err("user-id-repeated")),
            ("user_id=a&user%5fid=a", Err("user-id-repeated")),
            ("user_id=%", Err("query-encoding")),
            ("user_id=%4", Err("query-encoding")),
            ("user_id=%zz", Err("query-encoding")),
            ("user_id=%ff", Err("query-encoding")),
            ("user_id=%ED%A0%80", Err("query-encoding")),
        ] {
            assert_eq!(outcome(query).as_deref(), wanted.as_deref(), "{query}");
        }
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_found(id in "\\PC{1,64}") {
            prop_assume!(check_user_id(&id).is_ok());
            let encoded = percent_encoding::utf8_percent_encode(&id, percent_encoding::NON_ALPHANUMERIC);
            prop_assert_eq!(outcome(&format!("user_id={encoded}")), Ok(id));
        }

        #[test]
        fn no_query_panics(query in "[a-z_=&%+0-9]{0,40}|(user_id=[%0-9a-f]{0,9}&?){0,3}") {
            let _ = outcome(&query);
        }
    }
}
