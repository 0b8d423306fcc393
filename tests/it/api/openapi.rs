//! `GET /openapi.json`.

use serde_json::json;

use crate::harness::Node;
use crate::harness::wire::Response;

#[tokio::test]
async fn the_document_names_ports_security_and_version() {
    let node = Node::start().await;
    let response = node.ops("/openapi.json").await;
    assert_eq!(
        (response.status, response.header("content-type")),
        (200, "application/json")
    );
    let document = response.json();
    assert_eq!(document["openapi"], "3.1.0");
    assert_eq!(document["info"]["version"], env!("CARGO_PKG_VERSION"));
    for (path, port) in [
        ("/set", "8080"),
        ("/backup", "8080"),
        ("/get", "8081"),
        ("/status", "8082"),
    ] {
        let server = &document["paths"][path]["servers"][0];
        assert_eq!(server["variables"]["port"]["default"], port, "{path}");
    }
    for (path, method, security) in [
        ("/set", "post", json!([{"basic": []}])),
        ("/set", "delete", json!([{"basic": []}])),
        ("/backup", "get", json!([{"basic": []}])),
        ("/get", "get", json!(null)),
    ] {
        assert_eq!(
            document["paths"][path][method]["security"], security,
            "{path}"
        );
    }
    let request = node
        .client
        .post(format!("http://{}/openapi.json", node.ops));
    Response::of(request.send().await.unwrap())
        .await
        .expect_problem(405, "method-not-allowed");
}
