//! `GET /openapi.json`: what all three ports answer, for programs. The document stands in `openapi.json`;
//! the fields of a grade, which only [`grade`](crate::grade) knows, and the version are put in here.

use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::HeaderValue;
use http::header::CONTENT_TYPE;
use serde_json::{Value, json};

use crate::grade::FIELDS;
use crate::http::error::ApiError;

const DOCUMENT: &str = include_str!("openapi.json");

/// The document, made once.
#[derive(Clone)]
pub(super) struct OpenApi(Option<Bytes>);

impl OpenApi {
    pub(super) fn new() -> Self {
        let document = document().and_then(|document| serde_json::to_vec(&document));
        Self(document.ok().map(Bytes::from))
    }

    pub(super) fn answer(self) -> Response {
        let Some(document) = self.0 else {
            return ApiError::Internal.into_response();
        };
        let json_type = HeaderValue::from_static("application/json");
        ([(CONTENT_TYPE, json_type)], document).into_response()
    }
}

fn document() -> serde_json::Result<Value> {
    let mut document: Value = serde_json::from_str(DOCUMENT)?;
    if let Some(version) = document.pointer_mut("/info/version") {
        *version = env!("CARGO_PKG_VERSION").into();
    }
    for (schema, always) in [("Patch", false), ("Grade", true)] {
        let Some(schema) = document.pointer_mut(&format!("/components/schemas/{schema}")) else {
            continue;
        };
        for field in FIELDS {
            if let Some(properties) = schema["properties"].as_object_mut() {
                let integer = json!({
                    "type": "integer", "format": "int64", "minimum": i64::MIN, "maximum": i64::MAX,
                });
                properties.insert((*field).to_owned(), integer);
            }
            if let Some(required) = schema["required"].as_array_mut().filter(|_| always) {
                required.push((*field).into());
            }
        }
    }
    Ok(document)
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;
    use crate::grade::UserIdError;
    use crate::http::route::Route;
    use crate::replication::WriteError;
    use crate::replication::memory::StoreFull;
    use crate::replication::state::{NodeState, Unready};

    /// The error after `error`. Who adds one is made to give it a place here.
    fn next(error: &ApiError) -> Option<ApiError> {
        use ApiError as E;
        Some(match error {
            E::NotJson(_) => E::BodyNotUtf8 { at: 0 },
            E::BodyNotUtf8 { .. } => E::BodyBroken,
            E::BodyBroken => E::NotAPatch(String::new()),
            E::NotAPatch(_) => E::UserIdMissing,
            E::UserIdMissing => E::UserIdRepeated,
            E::UserIdRepeated => E::UserIdAndIds,
            E::UserIdAndIds => E::UserIdsHere,
            E::UserIdsHere => E::UserIdsTooMany { found: 0 },
            E::UserIdsTooMany { .. } => E::UserIdInvalid(UserIdError::Empty),
            E::UserIdInvalid(_) => E::QueryEncoding(""),
            E::QueryEncoding(_) => E::PositionInvalid,
            E::PositionInvalid => E::Unauthorized,
            E::Unauthorized => E::UserUnknown,
            E::UserUnknown => E::RouteUnknown(""),
            E::RouteUnknown(_) => E::MethodNotAllowed(""),
            E::MethodNotAllowed(_) => E::BodySlow { seconds: 0 },
            E::BodySlow { .. } => E::BodyTooLarge { limit_bytes: 0 },
            E::BodyTooLarge { .. } => E::UnsupportedMediaType,
            E::UnsupportedMediaType => E::BadLine {
                line: 0,
                accepted: 0,
                what: String::new(),
            },
            // It is of its cause's kind.
            E::BadLine { .. } => E::InPart {
                accepted: 0,
                cause: Box::new(E::BodyBroken),
            },
            E::InPart { .. } => E::NotReady(Unready {
                state: NodeState::Starting,
                reason: "".into(),
            }),
            E::NotReady(_) => E::PositionNotReached {
                wanted: 0,
                applied: 0,
            },
            E::PositionNotReached { .. } => E::PositionTooFar { wanted: 0, end: 0 },
            E::PositionTooFar { .. } => E::PositionWaitsFull { waits_max: 0 },
            E::PositionWaitsFull { .. } => E::QueueFull,
            E::QueueFull => E::BackupsRunning,
            E::BackupsRunning => E::NotWritten("".into()),
            E::NotWritten(_) => E::OutcomeUnknown(WriteError::OutcomeUnknown),
            E::OutcomeUnknown(_) => E::StoreFull(StoreFull::Peer { url: "".into() }),
            E::StoreFull(_) => E::LineStoreFull {
                line: 0,
                accepted: 0,
                full: StoreFull::Peer { url: "".into() },
            },
            E::LineStoreFull { .. } => E::Internal,
            E::Internal => return None,
        })
    }

    fn kinds() -> BTreeSet<(u16, &'static str)> {
        let first = ApiError::NotJson(String::new());
        let all = std::iter::successors(Some(first), next);
        all.map(|error| error.kind())
            .map(|(status, cause)| (status.as_u16(), cause))
            .collect()
    }

    #[test]
    fn the_document_has_every_route_and_no_other() {
        let document = document().unwrap();
        let paths: BTreeSet<&str> = document["paths"]
            .as_object()
            .unwrap()
            .keys()
            .map(String::as_str)
            .collect();
        let routes: BTreeSet<&str> = Route::ALL.into_iter().filter_map(Route::path).collect();
        assert_eq!(paths, routes);
        assert_eq!(document["info"]["version"], env!("CARGO_PKG_VERSION"));
    }

    #[test]
    fn the_document_has_every_problem_with_its_status_and_no_other() {
        let document = document().unwrap();
        let mut documented = BTreeSet::new();
        let mut of_name: BTreeMap<&str, u64> = BTreeMap::new();
        for (name, response) in document["components"]["responses"].as_object().unwrap() {
            let schema = &response["content"]["application/problem+json"]["schema"]["allOf"][1];
            let status = schema["properties"]["status"]["const"].as_u64().unwrap();
            of_name.insert(name, status);
            for cause in schema["properties"]["type"]["enum"].as_array().unwrap() {
                let (_, cause) = cause.as_str().unwrap().rsplit_once(':').unwrap();
                documented.insert((status as u16, cause));
            }
        }
        assert_eq!(documented, kinds());
        // And each stands under its own status.
        for path in document["paths"].as_object().unwrap().values() {
            for operation in path
                .as_object()
                .unwrap()
                .values()
                .filter(|part| part["responses"].is_object())
            {
                for (status, response) in operation["responses"].as_object().unwrap() {
                    let Some(reference) = response["$ref"].as_str() else {
                        continue;
                    };
                    let (_, name) = reference.rsplit_once('/').unwrap();
                    assert_eq!(of_name.get(name).unwrap().to_string(), *status, "{name}");
                }
            }
        }
    }

    #[test]
    fn the_page_of_errors_names_every_problem_at_its_status() {
        let page = include_str!("../../../docs/api.md");
        for (status, cause) in kinds()
            .into_iter()
            .filter(|(_, cause)| *cause != "internal")
        {
            let row = format!("| {status} |");
            let named = page
                .lines()
                .any(|line| line.starts_with(&row) && line.contains(&format!("`{cause}`")));
            assert!(named, "{status} {cause}");
        }
    }

    #[test]
    fn the_document_has_the_fields_of_a_grade() {
        let document = document().unwrap();
        for (schema, required) in [("Patch", 1), ("Grade", 1 + FIELDS.len())] {
            let schema = &document["components"]["schemas"][schema];
            assert_eq!(schema["required"].as_array().unwrap().len(), required);
            for field in FIELDS {
                assert_eq!(schema["properties"][field]["format"], "int64");
            }
        }
    }
}
