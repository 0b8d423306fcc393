//! The ops port's page for people: `GET /`. It is whole as it is served; its script only asks for it
//! again and again.

use std::sync::LazyLock;

use askama::Template;
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, X_CONTENT_TYPE_OPTIONS};
use http::{HeaderMap, HeaderValue};
use sha2::{Digest, Sha256};

use crate::backup::rfc3339;
use crate::http::error::ApiError;
use crate::http::ops::format;
use crate::http::ops::status::{RestoreStatus, Status};
use crate::http::ops::traffic::RouteTraffic;
use crate::log::now_ns;
use crate::replication::state::{NodeState, Unready};

const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");

/// The page.
#[derive(Template)]
#[template(path = "page.html")]
pub(super) struct View<'a> {
    headline: String,
    level: Level,
    reason: Option<&'a str>,
    reads: bool,
    writes: bool,
    node: &'a str,
    /// `None` while the log is being opened.
    status: Option<&'a Status>,
    /// When this was so.
    at: String,
}

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Level {
    Ok,
    /// It may pass by itself.
    Wait,
    /// Somebody should look.
    Bad,
}

impl Level {
    fn of(state: NodeState) -> Self {
        match state {
            NodeState::Ready => Self::Ok,
            NodeState::Gap | NodeState::NoSource | NodeState::OtherLog | NodeState::Diverged => {
                Self::Bad
            }
            _ => Self::Wait,
        }
    }

    fn class(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Wait => "wait",
            Self::Bad => "bad",
        }
    }

    /// Of the icon, which stands on the browser's own ground.
    fn colour(self) -> &'static str {
        match self {
            Self::Ok => "%232e9e4f",
            Self::Wait => "%23d69413",
            Self::Bad => "%23dc4a41",
        }
    }
}

impl<'a> View<'a> {
    /// Of a node that runs.
    pub(super) fn of(status: &'a Status) -> Self {
        Self {
            reason: status.reason.as_deref(),
            reads: status.reads,
            writes: status.writes,
            node: &status.node,
            status: Some(status),
            ..Self::in_state(status.state)
        }
    }

    /// Of one that has no log yet.
    pub(super) fn opening(unready: &'a Unready) -> Self {
        Self {
            reason: Some(&unready.reason),
            ..Self::in_state(unready.state)
        }
    }

    fn in_state(state: NodeState) -> Self {
        let (first, rest) = state.name().split_at(1);
        Self {
            headline: format!("{}{}", first.to_uppercase(), rest.replace('-', " ")),
            level: Level::of(state),
            reason: None,
            reads: false,
            writes: false,
            node: "",
            status: None,
            at: rfc3339(now_ns()),
        }
    }

    fn traffic(&self) -> [(&'static str, Option<&RouteTraffic>); 2] {
        let traffic = self.status.and_then(|status| status.traffic.as_ref());
        [
            ("Reads", traffic.map(|traffic| &traffic.reads)),
            ("Writes", traffic.map(|traffic| &traffic.writes)),
        ]
    }

    fn restore(&self) -> Option<&RestoreStatus> {
        self.status?.restore.as_ref()
    }

    /// The page, and what forbids a browser to take anything in it for more than text.
    pub(super) fn answer(self) -> Response {
        let Ok(html) = self.render() else {
            return ApiError::Internal.into_response();
        };
        let fixed = HeaderValue::from_static;
        let headers = HeaderMap::from_iter([
            (CONTENT_TYPE, fixed("text/html; charset=utf-8")),
            (CACHE_CONTROL, fixed("no-store")),
            (X_CONTENT_TYPE_OPTIONS, fixed("nosniff")),
            (CONTENT_SECURITY_POLICY, POLICY.clone()),
        ]);
        (headers, html).into_response()
    }
}

/// Which style and which script are the page's own, by their hashes. A nonce would not do: the page
/// that the script asks for comes with another one, and the policy of the first holds for it.
#[expect(clippy::expect_used, reason = "the policy is ASCII")]
static POLICY: LazyLock<HeaderValue> = LazyLock::new(|| {
    let hash = |text: &str| STANDARD.encode(Sha256::digest(text));
    let policy = format!(
        "default-src 'none'; script-src 'sha256-{}'; style-src 'sha256-{}'; img-src data:; \
         connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        hash(SCRIPT),
        hash(STYLE)
    );
    HeaderValue::try_from(policy).expect("ASCII is a header's value")
});
