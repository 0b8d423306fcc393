//! The status page of the ops port: `GET /`. It is complete without JavaScript; its script only
//! refreshes it.

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
use crate::http::ops::status::{NodeStatus, PortStatus, RestoreStatus};
use crate::http::ops::traffic::RouteTraffic;
use crate::log::now_ns;
use crate::replication::state::{NodeState, Unready};
use crate::sys::host::host_name;

const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");

/// The status page.
#[derive(Template)]
#[template(path = "page.html")]
pub(super) struct StatusPage<'a> {
    headline: String,
    severity: Severity,
    reason: Option<&'a str>,
    reads: bool,
    writes: bool,
    host: String,
    /// `None` while the log is being opened.
    status: Option<&'a NodeStatus>,
    /// When the page was rendered.
    at: String,
}

/// How urgently a state needs an operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Severity {
    Ok,
    /// The state may pass without an operator.
    Wait,
    /// An operator should look.
    Bad,
}

impl Severity {
    fn of(state: NodeState) -> Self {
        match state {
            NodeState::Ready => Self::Ok,
            NodeState::Starting
            | NodeState::Restoring
            | NodeState::CatchingUp
            | NodeState::ReadOnly
            | NodeState::Stopping => Self::Wait,
            NodeState::Gap | NodeState::NoSource | NodeState::OtherLog | NodeState::Diverged => {
                Self::Bad
            }
        }
    }

    /// The class in `page.css`.
    fn class(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Wait => "wait",
            Self::Bad => "bad",
        }
    }

    /// The percent-encoded colour of the icon, which works on light and dark backgrounds.
    fn colour(self) -> &'static str {
        match self {
            Self::Ok => "%232e9e4f",
            Self::Wait => "%23d69413",
            Self::Bad => "%23dc4a41",
        }
    }
}

impl<'a> StatusPage<'a> {
    /// The page of a running node.
    pub(super) fn of(status: &'a NodeStatus) -> Self {
        Self {
            reason: status.reason.as_deref(),
            reads: status.reads,
            writes: status.writes,
            status: Some(status),
            ..Self::in_state(status.state)
        }
    }

    /// The page of a node that opens its log.
    pub(super) fn opening(unready: &'a Unready) -> Self {
        Self {
            reason: Some(&unready.reason),
            ..Self::in_state(unready.state)
        }
    }

    fn in_state(state: NodeState) -> Self {
        Self {
            headline: format::title(state.name()),
            severity: Severity::of(state),
            reason: None,
            reads: false,
            writes: false,
            host: host_name(),
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

    /// The length of the window of the rates.
    fn window_s(&self) -> Option<f64> {
        Some(self.status?.traffic.as_ref()?.window_s)
    }

    /// Open connections of all ports.
    fn connections(&self) -> u64 {
        self.of_all_ports(|port| port.connections)
    }

    /// Connections that the node has closed, of all ports.
    fn cut(&self) -> u64 {
        self.of_all_ports(|port| port.connections_cut)
    }

    fn of_all_ports(&self, count_of: impl FnMut(&PortStatus) -> u64) -> u64 {
        let ports = self.status.map_or(&[][..], |status| &status.ports);
        ports.iter().map(count_of).sum()
    }

    fn restore(&self) -> Option<&RestoreStatus> {
        self.status?.restore.as_ref()
    }
}

impl IntoResponse for StatusPage<'_> {
    fn into_response(self) -> Response {
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

/// The Content-Security-Policy: allows only this style and this script, by their hashes. Nonces do not
/// work, because a refreshed page has another nonce than the policy of the first one.
#[expect(clippy::expect_used, reason = "the policy is ASCII")]
static POLICY: LazyLock<HeaderValue> = LazyLock::new(|| {
    let hash = |text: &str| STANDARD.encode(Sha256::digest(text));
    let policy = format!(
        "default-src 'none'; script-src 'sha256-{}'; style-src 'sha256-{}'; img-src data:; \
         connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        hash(SCRIPT),
        hash(STYLE)
    );
    HeaderValue::try_from(policy).expect("ASCII is a valid header value")
});
