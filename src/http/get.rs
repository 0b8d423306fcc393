//! The read port: `GET /get?user_id=ID`; for many at once `GET /get?user_ids=A&user_ids=B`, or
//! `POST /get` with the ids in the body, which may be longer than a URL.

use std::borrow::Cow;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::Response;
use axum::routing::get;
use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderValue};
use percent_encoding::percent_decode;

use super::GRADE_POSITION;
use super::body::{self, JSON, content_type};
use super::error::ApiError;
use super::fast::{GetOutcome, GetRoute, request};
use super::host::is_percent_encoding_valid;
use crate::grade::{USER_ID, UserGrade, check_user_id};
use crate::log::{Log, Seq};
use crate::replication::state::Readiness;
use crate::replication::{AppliedIndex, WaitError};
use crate::store::Store;

/// The query parameter of a request for many users; one per user.
const USER_IDS: &str = "user_ids";
/// The maximum number of users in one request.
pub const USER_IDS_MAX: usize = 1000;
/// The maximum distance of `Grade-Position` past the end of the log.
///
/// A process learns the end from the batches that it receives, so a position that another replica
/// has acknowledged may be past it by the batches in flight. Beyond this distance waiting is
/// useless: a stream stores at most 130,000 batches/s (`load/results/jetstream.txt`), so a replica
/// that is 1,000,000 batches behind needs more than 7 s to catch up, and a read waits for 5 s. The
/// status is 503, not 400, because another replica may have applied the position.
pub const POSITION_AHEAD_MAX: Seq = 1_000_000;

/// The state of the read port.
#[derive(Clone)]
pub struct ReadState {
    /// The records.
    pub store: Store,
    /// The position of the records.
    pub applied: AppliedIndex,
    /// The log that the replica applies.
    pub log: Arc<dyn Log>,
    /// Whether the replica serves reads.
    pub readiness: Readiness,
    /// How long a body may take to arrive.
    pub body_wait_max: Duration,
    /// How long a read with `Grade-Position` may wait.
    pub position_wait_max: Duration,
    /// The maximum number of reads that wait at once.
    pub position_waits_max: usize,
}

/// The port's routes.
pub fn routes(state: ReadState) -> Router {
    Router::new()
        .route(
            "/get",
            get(get_grade)
                .post(get_listed)
                .fallback(|| async { ApiError::MethodNotAllowed("GET, HEAD, POST") }),
        )
        .fallback(|| async {
            ApiError::RouteUnknown(
                "GET /get?user_id=ID, GET /get?user_ids=ID&user_ids=ID, POST /get, GET /readyz",
            )
        })
        .with_state(state)
}

impl GetRoute for ReadState {
    fn get(&self, request: &request::Get<'_>, body: &mut Vec<u8>) -> GetOutcome {
        if request
            .position
            .is_some_and(|wanted| self.applied.seq() < wanted)
        {
            return GetOutcome::Fallback;
        }
        let Ok(user_id) = decode_id(request.user_id) else {
            return GetOutcome::Fallback;
        };
        match append_one(self, &user_id, body) {
            Ok(()) => GetOutcome::Grade,
            // At debug level the router logs this error.
            Err(ApiError::UserUnknown) if !tracing::enabled!(tracing::Level::DEBUG) => {
                body.extend_from_slice(&USER_UNKNOWN);
                GetOutcome::NotFound
            }
            Err(_) => GetOutcome::Fallback,
        }
    }
}

/// The body of the response for an unknown user.
static USER_UNKNOWN: LazyLock<Vec<u8>> = LazyLock::new(|| ApiError::UserUnknown.to_json());

async fn get_grade(State(state): State<ReadState>, request: Request) -> Result<Response, ApiError> {
    wait_for(&state, position_of(request.headers())?).await?;
    let json = match parse_query(request.uri().query().unwrap_or_default())? {
        GetQuery::One(user_id) => one(&state, &user_id)?,
        GetQuery::Many(user_ids) => many(&state, &user_ids)?,
    };
    Ok(respond(json))
}

/// `POST /get`: the ids are in the body.
async fn get_listed(
    State(state): State<ReadState>,
    request: Request,
) -> Result<Response, ApiError> {
    content_type(request.headers(), &[JSON])?;
    let position = position_of(request.headers())?;
    let body = body::read(request, state.body_wait_max).await?;
    let user_ids = parse_list(&body)?;
    wait_for(&state, position).await?;
    Ok(respond(many(&state, &user_ids)?))
}

/// Waits until this replica has applied `position`.
async fn wait_for(state: &ReadState, position: Option<Seq>) -> Result<(), ApiError> {
    let Some(wanted) = position else {
        return Ok(());
    };
    state.readiness.check()?;
    if state.applied.seq() >= wanted {
        return Ok(());
    }
    let end = state.log.end();
    if wanted.saturating_sub(end) > POSITION_AHEAD_MAX {
        let ahead_max = POSITION_AHEAD_MAX;
        return Err(ApiError::PositionTooFar {
            wanted,
            end,
            ahead_max,
        });
    }
    let (wait_max, waits_max) = (state.position_wait_max, state.position_waits_max);
    let waited = state
        .applied
        .wait_for_timeout(wanted, wait_max, waits_max)
        .await;
    waited.map_err(|error| match error {
        WaitError::TimedOut => ApiError::PositionNotReached {
            wanted,
            applied: state.applied.seq(),
        },
        WaitError::TooManyWaiters => ApiError::PositionWaitsFull { waits_max },
    })
}

fn respond(json: Vec<u8>) -> Response {
    let mut response = Response::new(Body::from(json));
    let json_type = HeaderValue::from_static(JSON);
    response.headers_mut().insert(CONTENT_TYPE, json_type);
    response
}

/// One user's grade as JSON.
fn one(state: &ReadState, user_id: &str) -> Result<Vec<u8>, ApiError> {
    let mut json = Vec::with_capacity(192);
    append_one(state, user_id, &mut json)?;
    Ok(json)
}

fn append_one(state: &ReadState, user_id: &str, json: &mut Vec<u8>) -> Result<(), ApiError> {
    let store = &state.store;
    let values = state
        .readiness
        .read(|| store.epoch(), || store.get(user_id))?;
    let values = values.ok_or(ApiError::UserUnknown)?;
    UserGrade { user_id, values }.write_json(json);
    Ok(())
}

/// The grades of `user_ids` as a JSON array in request order, with `null` for unknown users. Each
/// grade is consistent. Together they are not a snapshot, because writes continue between the lookups.
fn many(state: &ReadState, user_ids: &[Cow<'_, str>]) -> Result<Vec<u8>, ApiError> {
    let store = &state.store;
    let found = state.readiness.read(
        || store.epoch(),
        || -> Vec<_> { user_ids.iter().map(|user_id| store.get(user_id)).collect() },
    )?;
    let mut json = Vec::with_capacity(2 + 192 * user_ids.len());
    json.push(b'[');
    for (index, (user_id, values)) in user_ids.iter().zip(found).enumerate() {
        if index > 0 {
            json.push(b',');
        }
        match values {
            Some(values) => UserGrade { user_id, values }.write_json(&mut json),
            None => json.extend_from_slice(b"null"),
        }
    }
    json.push(b']');
    Ok(json)
}

/// The users that a query asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GetQuery<'a> {
    /// `user_id`.
    One(Cow<'a, str>),
    /// All `user_ids`, in request order.
    Many(Vec<Cow<'a, str>>),
}

/// Parses a query in `application/x-www-form-urlencoded`: one `user_id`, or one to [`USER_IDS_MAX`]
/// `user_ids`. Other parameters are ignored.
///
/// Stricter than HTML forms: invalid percent-encoding and invalid UTF-8 are errors, because a guess
/// could return another user's grade.
///
/// # Errors
/// The query has no id, more than one `user_id`, both parameters or too many ids; or an id is not
/// valid.
pub fn parse_query(query: &str) -> Result<GetQuery<'_>, ApiError> {
    let mut user_id = None;
    for pair in query.split('&') {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        if name == USER_ID {
            if user_id.replace(value).is_some() {
                return Err(ApiError::UserIdRepeated);
            }
            continue;
        }
        match decode(name).as_deref() {
            Ok(USER_ID) if user_id.replace(value).is_some() => {
                return Err(ApiError::UserIdRepeated);
            }
            Ok(USER_IDS) => return parse_user_ids(query).map(GetQuery::Many),
            _ => {}
        }
    }
    decode_id(user_id.ok_or(ApiError::UserIdMissing)?).map(GetQuery::One)
}

/// Parses a query with a single `user_id`; see [`parse_query`].
///
/// # Errors
/// The query does not have exactly one id, or the id is not valid.
pub fn parse_user_id(query: &str) -> Result<Cow<'_, str>, ApiError> {
    match parse_query(query)? {
        GetQuery::One(user_id) => Ok(user_id),
        GetQuery::Many(_) => Err(ApiError::UserIdsHere),
    }
}

/// Parses a query that has `user_ids`.
fn parse_user_ids(query: &str) -> Result<Vec<Cow<'_, str>>, ApiError> {
    let mut user_ids = Vec::new();
    for pair in query.split('&') {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        match decode(name).as_deref() {
            Ok(USER_ID) => return Err(ApiError::UserIdAndIds),
            Ok(USER_IDS) => user_ids.push(value),
            _ => {}
        }
    }
    check_count(user_ids.len())?;
    user_ids.into_iter().map(decode_id).collect()
}

/// Parses the body of `POST /get`: a JSON array of up to [`USER_IDS_MAX`] ids.
///
/// # Errors
/// The body is not such an array, or an id is not valid.
pub fn parse_list(body: &[u8]) -> Result<Vec<Cow<'static, str>>, ApiError> {
    if body.starts_with(b"\xef\xbb\xbf") {
        return Err(ApiError::ByteOrderMark);
    }
    let user_ids: Vec<String> =
        serde_json::from_slice(body).map_err(|error| ApiError::NotUserIds(error.to_string()))?;
    check_count(user_ids.len())?;
    for user_id in &user_ids {
        check_user_id(user_id).map_err(ApiError::UserIdInvalid)?;
    }
    Ok(user_ids.into_iter().map(Cow::Owned).collect())
}

fn check_count(found: usize) -> Result<(), ApiError> {
    match found > USER_IDS_MAX {
        true => Err(ApiError::UserIdsTooMany {
            found,
            limit: USER_IDS_MAX,
        }),
        false => Ok(()),
    }
}

/// Decodes and checks an id.
fn decode_id(value: &str) -> Result<Cow<'_, str>, ApiError> {
    let user_id = decode(value)?;
    check_user_id(&user_id).map_err(ApiError::UserIdInvalid)?;
    Ok(user_id)
}

/// Decodes a name or value of a query.
fn decode(text: &str) -> Result<Cow<'_, str>, ApiError> {
    if !text.bytes().any(|byte| matches!(byte, b'%' | b'+')) {
        return Ok(Cow::Borrowed(text));
    }
    if !is_percent_encoding_valid(text) {
        let what = "% must be followed by two hexadecimal digits; encode a percent sign as %25";
        return Err(ApiError::QueryEncoding(what));
    }
    let spaced = match text.contains('+') {
        true => Cow::Owned(text.replace('+', " ")),
        false => Cow::Borrowed(text),
    };
    let bytes = Cow::from(percent_decode(spaced.as_bytes())).into_owned();
    let text = String::from_utf8(bytes);
    let text = text.map_err(|_| ApiError::QueryEncoding("the bytes must be UTF-8"))?;
    Ok(Cow::Owned(text))
}

/// The `Grade-Position` of a read, if it has one.
///
/// # Errors
/// It is not a number, or is repeated.
pub fn position_of(headers: &HeaderMap) -> Result<Option<Seq>, ApiError> {
    let mut values = headers.get_all(GRADE_POSITION).iter();
    let Some(position) = values.next() else {
        return Ok(None);
    };
    let digits = position
        .to_str()
        .ok()
        .filter(|text| values.next().is_none() && text.bytes().all(|byte| byte.is_ascii_digit()));
    let position = digits.and_then(|digits| digits.parse().ok());
    position.map(Some).ok_or(ApiError::PositionInvalid)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn outcome(query: &str) -> Result<String, &'static str> {
        parse_user_id(query)
            .map(Cow::into_owned)
            .map_err(|error| error.kind().1)
    }

    #[test]
    fn parses_a_single_user_id() {
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

    #[test]
    fn parses_many_user_ids_in_order() {
        let most = vec!["user_ids=a"; USER_IDS_MAX].join("&");
        let more = format!("{most}&user_ids=a");
        for (query, wanted) in [
            ("user_ids=a", Ok(vec!["a"])),
            (
                "user_ids=b&x=1&user%5Fids=a+b&user_ids=b&",
                Ok(vec!["b", "a b", "b"]),
            ),
            (&most, Ok(vec!["a"; USER_IDS_MAX])),
            (&more, Err("user-ids-too-many")),
            ("user_ids=a&user_id=b", Err("user-id-and-ids")),
            ("user_id=b&user_ids=a", Err("user-id-and-ids")),
            ("user_id=b&user_id=b&user_ids=a", Err("user-id-repeated")),
            ("user_ids=a&user%5fid=b", Err("user-id-and-ids")),
            ("user_ids", Err("user-id-invalid")),
            ("user_ids=a&user_ids=", Err("user-id-invalid")),
            ("user_ids=a&user_ids=%0a", Err("user-id-invalid")),
            ("user_ids=a&user_ids=%zz", Err("query-encoding")),
            ("user_ids[]=a", Err("user-id-missing")),
            ("USER_IDS=a", Err("user-id-missing")),
        ] {
            let found = parse_query(query).map_err(|error| error.kind().1);
            let wanted = wanted.map(|ids| GetQuery::Many(ids.into_iter().map(Cow::from).collect()));
            assert_eq!(found, wanted, "{query:.60}");
        }
        assert_eq!(outcome("user_ids=a"), Err("user-ids-here"));
    }

    proptest! {
        #[test]
        fn decodes_every_encoded_id(id in "\\PC{1,64}") {
            prop_assume!(check_user_id(&id).is_ok());
            let encoded = percent_encoding::utf8_percent_encode(&id, percent_encoding::NON_ALPHANUMERIC);
            prop_assert_eq!(outcome(&format!("user_id={encoded}")), Ok(id));
        }

        #[test]
        fn no_query_panics(query in "[a-z_=&%+0-9]{0,40}|(user_ids?=[%0-9a-f]{0,9}&?){0,3}") {
            let _ = (outcome(&query), parse_query(&query));
        }
    }
}
