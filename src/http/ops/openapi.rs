//! `GET /openapi.json`: the OpenAPI document of all three ports. The source is `openapi.json`. This
//! module adds the fields of a grade, which only [`grade`](crate::grade) knows, and the version.

use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::HeaderValue;
use http::header::CONTENT_TYPE;
use serde_json::{Value, json};

use crate::grade::FIELDS;
use crate::http::error::ApiError;

const DOCUMENT: &str = include_str!("openapi.json");

/// The serialized document.
#[derive(Clone)]
pub(super) struct OpenApi(Option<Bytes>);

impl OpenApi {
    pub(super) fn new() -> Self {
        let document = document().and_then(|document| serde_json::to_vec(&document));
        Self(document.ok().map(Bytes::from))
    }
}

impl IntoResponse for OpenApi {
    fn into_response(self) -> Response {
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
    for (schema, is_required) in [("Patch", false), ("Grade", true)] {
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
            if let Some(required) = schema["required"].as_array_mut().filter(|_| is_required) {
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

    /// The error after `error`. The match is exhaustive, so that every new error gets tested.
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
            E::UserIdsHere => E::UserIdsTooMany { found: 0, limit: 0 },
            E::UserIdsTooMany { .. } => E::UserIdInvalid(UserIdError::Empty),
            E::UserIdInvalid(_) => E::QueryEncoding(""),
            E::QueryEncoding(_) => E::PositionInvalid,
            E::PositionInvalid => E::HostInvalid,
            E::HostInvalid => E::HostUnknown(String::new()),
            E::HostUnknown(_) => E::TransferEncoding,
            E::TransferEncoding => E::ContentEncoding(String::new()),
            E::ContentEncoding(_) => E::ByteOrderMark,
            E::ByteOrderMark => E::NotUserIds(String::new()),
            E::NotUserIds(_) => E::Unauthorized,
            E::Unauthorized => E::UserUnknown,
            E::UserUnknown => E::RouteUnknown(""),
            E::RouteUnknown(_) => E::MethodNotAllowed(""),
            E::MethodNotAllowed(_) => E::BodySlow { seconds: 0 },
            E::BodySlow { .. } => E::BodyTooLarge { limit_bytes: 0 },
            E::BodyTooLarge { .. } => E::UnsupportedMediaType {
                found: String::new(),
                accepted: &[],
            },
            E::UnsupportedMediaType { .. } => E::BadLine {
                line: 0,
                accepted: 0,
                what: String::new(),
            },
            // Its kind is that of its cause.
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
            E::PositionNotReached { .. } => E::PositionTooFar {
                wanted: 0,
                end: 0,
                ahead_max: 0,
            },
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
            .map(|(status, problem)| (status.as_u16(), problem))
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
        let mut statuses: BTreeMap<&str, u64> = BTreeMap::new();
        for (name, response) in document["components"]["responses"].as_object().unwrap() {
            let schema = &response["content"]["application/problem+json"]["schema"]["allOf"][1];
            let status = schema["properties"]["status"]["const"].as_u64().unwrap();
            statuses.insert(name, status);
            for problem in schema["properties"]["type"]["enum"].as_array().unwrap() {
                let (_, problem) = problem.as_str().unwrap().rsplit_once(':').unwrap();
                documented.insert((status as u16, problem));
            }
        }
        assert_eq!(documented, kinds());
        // Every route lists each response under its status.
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
                    assert_eq!(statuses.get(name).unwrap().to_string(), *status, "{name}");
                }
            }
        }
    }

    #[test]
    fn the_api_documentation_lists_every_problem_at_its_status() {
        let page = include_str!("../../../docs/api.md");
        for (status, problem) in kinds()
            .into_iter()
            .filter(|(_, problem)| *problem != "internal")
        {
            let row = format!("| {status} |");
            let listed = page
                .lines()
                .any(|line| line.starts_with(&row) && line.contains(&format!("`{problem}`")));
            assert!(listed, "{status} {problem}");
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
