//! The three ports of a node, and requests to them.

use std::net::SocketAddr;

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::Value;

use super::AUTHORIZATION;
use super::wire::{RawConnection, Response, eventually, with_timeout};

/// The addresses of a node's ports, and an HTTP client.
#[derive(Clone)]
pub(crate) struct Ports {
    pub(crate) write: SocketAddr,
    pub(crate) read: SocketAddr,
    pub(crate) ops: SocketAddr,
    pub(crate) client: reqwest::Client,
}

impl Ports {
    pub(crate) fn new(write: SocketAddr, read: SocketAddr, ops: SocketAddr) -> Self {
        Self {
            write,
            read,
            ops,
            client: reqwest::Client::builder().no_proxy().build().unwrap(),
        }
    }

    /// `POST /set` with the password.
    pub(crate) async fn set(&self, body: impl Into<reqwest::Body>) -> Response {
        let request = self.client.post(format!("http://{}/set", self.write));
        let request = request
            .header("authorization", AUTHORIZATION)
            .header("content-type", "application/json")
            .body(body);
        Response::of(with_timeout("POST /set", request.send()).await.unwrap()).await
    }

    /// `GET /get`.
    pub(crate) async fn get(&self, user_id: &str) -> Response {
        let user_id = utf8_percent_encode(user_id, NON_ALPHANUMERIC);
        let url = format!("http://{}/get?user_id={user_id}", self.read);
        Response::of(
            with_timeout(&url, self.client.get(&url).send())
                .await
                .unwrap(),
        )
        .await
    }

    /// `GET` on the ops port.
    pub(crate) async fn ops(&self, path: &str) -> Response {
        self.get_from(self.ops, path).await
    }

    /// `GET` on one of the ports.
    pub(crate) async fn get_from(&self, port: SocketAddr, path: &str) -> Response {
        let url = format!("http://{port}{path}");
        Response::of(
            with_timeout(&url, self.client.get(&url).send())
                .await
                .unwrap(),
        )
        .await
    }

    /// `DELETE /set` with the password.
    pub(crate) async fn delete(&self, user_id: &str) -> Response {
        let user_id = utf8_percent_encode(user_id, NON_ALPHANUMERIC);
        let url = format!("http://{}/set?user_id={user_id}", self.write);
        let request = self
            .client
            .delete(url)
            .header("authorization", AUTHORIZATION);
        Response::of(with_timeout("DELETE /set", request.send()).await.unwrap()).await
    }

    /// `POST /set` with one patch a line.
    pub(crate) async fn set_lines(&self, body: impl Into<reqwest::Body>) -> Response {
        let request = self.client.post(format!("http://{}/set", self.write));
        let request = request
            .header("authorization", AUTHORIZATION)
            .header("content-type", "application/x-ndjson")
            .body(body);
        Response::of(with_timeout("POST /set", request.send()).await.unwrap()).await
    }

    /// `GET /status`.
    pub(crate) async fn status(&self) -> Value {
        self.ops("/status").await.json()
    }

    /// Waits until `/status` satisfies `condition`.
    pub(crate) async fn status_where(
        &self,
        what: &str,
        condition: impl Fn(&Value) -> bool,
    ) -> Value {
        eventually(what, async || {
            let status = self.status().await;
            condition(&status).then_some(status)
        })
        .await
    }

    /// The value of a metric, named with its labels.
    pub(crate) async fn metric(&self, name: &str) -> Option<f64> {
        let metrics = self.ops("/metrics").await.body;
        let mut lines = metrics.lines();
        let value = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
        Some(value.parse().unwrap())
    }

    /// Waits until a metric has this value.
    pub(crate) async fn metric_reaches(&self, name: &str, value: f64) {
        eventually(&format!("{name} {value}"), async || {
            self.metric(name).await.filter(|now| *now == value)
        })
        .await;
    }
}

/// The bytes of `POST /set`; `framing` is the headers that frame the body.
pub(crate) fn set_request_framed(framing: &str, body: &str) -> String {
    format!(
        "POST /set HTTP/1.1\r\nhost: localhost\r\nauthorization: {AUTHORIZATION}\r\n\
         content-type: application/json\r\n{framing}\r\n\r\n{body}"
    )
}

/// The same with a content-length.
pub(crate) fn set_request(body: &str) -> String {
    set_request_framed(&format!("content-length: {}", body.len()), body)
}

/// The bytes of `DELETE /set`.
pub(crate) fn delete_request(query: &str) -> String {
    format!(
        "DELETE /set{query} HTTP/1.1\r\nhost: localhost\r\nauthorization: {AUTHORIZATION}\r\n\r\n"
    )
}

/// The bytes of `GET /get`.
pub(crate) fn get_request(query: &str, headers: &str) -> String {
    format!("GET /get{query} HTTP/1.1\r\nhost: localhost\r\n{headers}\r\n")
}

/// A bulk write whose header has arrived and whose body has not.
pub(crate) async fn incomplete_ndjson_request(node: &Ports) -> RawConnection {
    let mut connection = RawConnection::connect(node.write).await;
    let framing = "transfer-encoding: chunked";
    let request = set_request_framed(framing, "").replace("/json", "/x-ndjson");
    connection.send(request).await;
    node.metric_reaches("gradestore_http_requests_in_flight", 2.0)
        .await;
    connection
}

/// A write whose header has arrived and whose body has not.
pub(crate) async fn incomplete_set_request(node: &Ports, body: &str) -> RawConnection {
    let mut connection = RawConnection::connect(node.write).await;
    connection
        .send(set_request(body).strip_suffix(body).unwrap())
        .await;
    node.metric_reaches("gradestore_http_requests_in_flight", 2.0)
        .await;
    connection
}

/// Sends a write that cannot be acknowledged yet; returns once the node handles it.
pub(crate) async fn pending_set(node: &Ports, body: &str) -> RawConnection {
    let name = "gradestore_http_requests_in_flight";
    let running = node.metric(name).await.unwrap();
    let mut connection = RawConnection::connect(node.write).await;
    connection.send(set_request(body)).await;
    node.metric_reaches(name, running + 1.0).await;
    connection
}
