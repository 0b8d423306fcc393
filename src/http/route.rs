//! The routes, as metrics and log lines name them.

use std::ops::Index;

/// A route of one of the three ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Route {
    /// `POST /set` and `DELETE /set` of one user.
    Set,
    /// `GET /get`.
    Get,
    /// `POST /set` of many lines. It has a separate name because its latency depends on its body.
    SetLines,
    Backup,
    Livez,
    Readyz,
    ReadyzWrite,
    Metrics,
    Status,
    StatusPage,
    OpenApi,
    /// Any other path.
    Other,
}

impl Route {
    /// All routes, in the order of their discriminants.
    pub(super) const ALL: [Self; 12] = [
        Self::Set,
        Self::Get,
        Self::SetLines,
        Self::Backup,
        Self::Livez,
        Self::Readyz,
        Self::ReadyzWrite,
        Self::Metrics,
        Self::Status,
        Self::StatusPage,
        Self::OpenApi,
        Self::Other,
    ];

    /// The route of a request's path. [`SetLines`](Self::SetLines) has the path of
    /// [`Set`](Self::Set) and is known from the request's content type only.
    pub(super) fn of_path(path: &str) -> Self {
        Self::ALL
            .into_iter()
            .find(|route| route.path() == Some(path))
            .unwrap_or(Self::Other)
    }

    /// The path; `None` for a route that a path alone does not determine.
    pub(super) const fn path(self) -> Option<&'static str> {
        match self {
            Self::SetLines | Self::Other => None,
            _ => Some(self.name()),
        }
    }

    /// The value of the label `route`.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Set => "/set",
            Self::Get => "/get",
            Self::SetLines => "/set lines",
            Self::Backup => "/backup",
            Self::Livez => "/livez",
            Self::Readyz => "/readyz",
            Self::ReadyzWrite => "/readyz/write",
            Self::Metrics => "/metrics",
            Self::Status => "/status",
            Self::StatusPage => "/",
            Self::OpenApi => "/openapi.json",
            Self::Other => "other",
        }
    }

    /// Whether it reads or writes single users: many short requests per second.
    pub(super) const fn is_hot(self) -> bool {
        matches!(self, Self::Set | Self::Get)
    }

    /// Whether it belongs to the ops port.
    pub(super) const fn is_ops(self) -> bool {
        match self {
            Self::Set | Self::Get | Self::SetLines | Self::Backup | Self::Other => false,
            Self::Livez
            | Self::Readyz
            | Self::ReadyzWrite
            | Self::Metrics
            | Self::Status
            | Self::StatusPage
            | Self::OpenApi => true,
        }
    }
}

/// One value per route.
pub(super) struct PerRoute<T>([T; Route::ALL.len()]);

impl<T> PerRoute<T> {
    pub(super) fn new(value_of: impl FnMut(Route) -> T) -> Self {
        Self(Route::ALL.map(value_of))
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (Route, &T)> {
        Route::ALL.into_iter().zip(&self.0)
    }
}

impl<T> Index<Route> for PerRoute<T> {
    type Output = T;

    #[expect(clippy::indexing_slicing, reason = "`ALL` has each route once")]
    fn index(&self, route: Route) -> &T {
        &self.0[route as usize]
    }
}

#[expect(clippy::indexing_slicing, reason = "evaluated at compile time")]
const _: () = {
    let mut index = 0;
    while index < Route::ALL.len() {
        assert!(Route::ALL[index] as usize == index);
        index += 1;
    }
};
