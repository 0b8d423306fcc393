//! `GET /get`.

use std::time::Duration;

use crate::harness::wire::{RawConnection, Response};
use crate::harness::{InProcessNode, Node, Ports, get_request};

async fn send_get(node: &Ports, query: &str, headers: &str) -> Response {
    let mut connection = RawConnection::connect(node.read).await;
    connection.send(get_request(query, headers)).await;
    connection.response().await
}

#[tokio::test]
async fn the_user_id_is_form_decoded() {
    let node = Node::start().await;
    node.set(r#"{"user_id":"a b+é😀","spp":1}"#)
        .await
        .position();
    for query in [
        "?user_id=a%20b%2Bé😀",
        "?user_id=a+b%2b%c3%a9%F0%9F%98%80",
        "?x=1&user%5Fid=%61+b%2B%C3%A9%F0%9F%98%80&y",
    ] {
        let response = send_get(&node, query, "").await;
        assert_eq!(response.status, 200, "{query}: {}", response.body);
        assert_eq!(response.json()["user_id"], "a b+é😀");
    }
}

#[tokio::test]
async fn a_query_without_exactly_one_user_is_rejected() {
    let node = Node::start().await;
    let long = format!("?user_id={}", "x".repeat(257));
    for (query, status, cause) in [
        ("", 400, "user-id-missing"),
        ("?", 400, "user-id-missing"),
        ("?user=a", 400, "user-id-missing"),
        ("?USER_ID=a", 400, "user-id-missing"),
        ("?user_id=a&user_id=a", 400, "user-id-repeated"),
        ("?user_id=a&user%5fid=b", 400, "user-id-repeated"),
        ("?user_id", 400, "user-id-invalid"),
        ("?user_id=", 400, "user-id-invalid"),
        ("?user_id=%00", 400, "user-id-invalid"),
        ("?user_id=a%0a", 400, "user-id-invalid"),
        (&long, 400, "user-id-invalid"),
        ("?user_id=%", 400, "query-encoding"),
        ("?user_id=%zz", 400, "query-encoding"),
        ("?user_id=%ff", 400, "query-encoding"),
        ("?user_id=%ed%a0%80", 400, "query-encoding"),
        ("?user_id=nobody", 404, "user-unknown"),
    ] {
        send_get(&node, query, "")
            .await
            .expect_problem(status, cause);
    }
}

#[tokio::test]
async fn user_ids_are_answered_in_request_order_with_null_for_unknown_users() {
    let node = Node::start().await;
    for (user, spp) in [("a", 1), ("b +é", 2), ("\"c\"", 3)] {
        let patch = serde_json::json!({ "user_id": user, "spp": spp });
        node.set(patch.to_string()).await.position();
    }
    let response = send_get(
        &node,
        "?user_ids=b+%2b%C3%A9&x=1&user_ids=nobody&user%5Fids=a&user_ids=%22c%22&user_ids=a",
        "",
    )
    .await;
    assert_eq!(response.status, 200, "{}", response.body);
    assert_eq!(response.header("content-type"), "application/json");
    let rest = r#""shipping_fee":0,"return_fee":0}"#;
    let grade = |user: &str, spp: u8| {
        format!(r#"{{"user_id":"{user}","postpaid_limit":0,"spp":{spp},{rest}"#)
    };
    let expected = [
        grade("b +é", 2),
        "null".to_owned(),
        grade("a", 1),
        grade(r#"\"c\""#, 3),
        grade("a", 1),
    ];
    assert_eq!(response.body, format!("[{}]", expected.join(",")));
    assert_eq!(send_get(&node, "?user_ids=nobody", "").await.body, "[null]");
    let most = format!("?{}", ["user_ids=a"; 1000].join("&"));
    let all = send_get(&node, &most, "").await.json();
    assert_eq!(all.as_array().unwrap().len(), 1000);

    let long = format!("?user_ids={}", "x".repeat(257));
    let more = format!("{most}&user_ids=a");
    for (query, cause) in [
        ("?user_ids=a&user_id=a", "user-id-and-ids"),
        ("?user_id=a&user_ids=a", "user-id-and-ids"),
        ("?user_ids=a&user_ids=", "user-id-invalid"),
        (&long, "user-id-invalid"),
        ("?user_ids=%zz", "query-encoding"),
        (&more, "user-ids-too-many"),
    ] {
        send_get(&node, query, "").await.expect_problem(400, cause);
    }
}

/// `POST /get`.
async fn post(node: &Ports, content_type: &str, headers: &str, body: &str) -> Response {
    let mut connection = RawConnection::connect(node.read).await;
    let request = format!(
        "POST /get HTTP/1.1\r\nhost: localhost\r\ncontent-type: {content_type}\r\n\
         content-length: {}\r\n{headers}\r\n{body}",
        body.len()
    );
    connection.request(request).await
}

#[tokio::test]
async fn the_ids_in_a_body_are_answered_like_those_in_a_query() {
    let node = Node::start().await;
    node.set(r#"{"user_id":"b +é","spp":2}"#).await.position();
    let queried = send_get(&node, "?user_ids=b+%2b%C3%A9&user_ids=nobody", "").await;
    for (content_type, body) in [
        ("application/json", r#"["b +é","nobody"]"#),
        (
            "Application/JSON; charset=utf-8",
            " [ \"b +\\u00e9\" , \"nobody\" ]\n",
        ),
    ] {
        let response = post(&node, content_type, "", body).await;
        assert_eq!((response.status, &response.body), (200, &queried.body));
        assert_eq!(response.header("content-type"), "application/json");
    }
    assert_eq!(post(&node, "application/json", "", "[]").await.body, "[]");
    // A thousand UUIDs, which no URL can hold behind most proxies.
    let ids: Vec<String> = (0..1000).map(|id| format!("{id:036}")).collect();
    let most = serde_json::to_string(&ids).unwrap();
    let all = post(&node, "application/json", "", &most).await.json();
    assert_eq!(all.as_array().unwrap().len(), 1000);

    let more = serde_json::to_string(&vec!["a"; 1001]).unwrap();
    let long = format!(r#"["{}"]"#, "x".repeat(257));
    let large = format!("[{}]", " ".repeat(64 * 1024));
    for (body, status, cause) in [
        ("", 400, "not-user-ids"),
        ("[", 400, "not-user-ids"),
        (r#"{"user_ids":["a"]}"#, 400, "not-user-ids"),
        (r#"["a",1]"#, 400, "not-user-ids"),
        (r#"["a",null]"#, 400, "not-user-ids"),
        (r#"[["a"]]"#, 400, "not-user-ids"),
        (r#"["a"] x"#, 400, "not-user-ids"),
        (r#"["\ud800"]"#, 400, "not-user-ids"),
        ("\u{feff}[\"a\"]", 400, "not-json"),
        (r#"["a",""]"#, 400, "user-id-invalid"),
        (r#"["a\u0000"]"#, 400, "user-id-invalid"),
        (&long, 400, "user-id-invalid"),
        (&more, 400, "user-ids-too-many"),
        (&large, 413, "body-too-large"),
    ] {
        let response = post(&node, "application/json", "", body).await;
        response.expect_problem(status, cause);
    }
    for content_type in ["", "text/plain", "application/x-www-form-urlencoded"] {
        let response = post(&node, content_type, "", "[]").await;
        let detail = response.expect_problem(415, "unsupported-media-type");
        assert!(detail.contains("application/json") && detail.contains(content_type));
        assert_eq!(response.header("accept"), "application/json");
    }
    let gzip = "content-encoding: gzip\r\n";
    let response = post(&node, "application/json", gzip, "[]").await;
    response.expect_problem(415, "content-encoding");
    assert_eq!(response.header("accept-encoding"), "identity");
    let position = "grade-position: x\r\n";
    let response = post(&node, "application/json", position, "[]").await;
    response.expect_problem(400, "position-invalid");
}

#[tokio::test]
async fn a_read_by_body_waits_for_its_position() {
    let node = Node::start().await;
    let position = "grade-position: 1\r\n";
    let read = post(&node, "application/json", position, r#"["a"]"#);
    let write = async {
        node.metric_reaches("gradestore_http_requests_in_flight", 2.0)
            .await;
        node.set(r#"{"user_id":"a","spp":7}"#).await.position();
    };
    let (read, ()) = tokio::join!(read, write);
    assert_eq!(read.json()[0]["spp"], 7);
}

#[tokio::test]
async fn a_read_of_many_users_waits_for_its_position() {
    let node = Node::start().await;
    let mut reader = RawConnection::connect(node.read).await;
    let query = "?user_ids=a&user_ids=b";
    reader
        .send(get_request(query, "grade-position: 2\r\n"))
        .await;
    node.metric_reaches("gradestore_http_requests_in_flight", 2.0)
        .await;
    for user in ["a", "b"] {
        node.set(format!(r#"{{"user_id":"{user}","spp":1}}"#))
            .await
            .position();
    }
    let both = reader.response().await.json();
    assert_eq!((&both[0]["spp"], &both[1]["spp"]), (&1.into(), &1.into()));
    let headers = "grade-position: x\r\n";
    send_get(&node, query, headers)
        .await
        .expect_problem(400, "position-invalid");
}

#[tokio::test]
async fn head_returns_the_headers_of_get_without_a_body() {
    let node = Node::start().await;
    node.set(r#"{"user_id":"a","spp":1}"#).await.position();
    let head = async |user_id: &str| {
        let url = format!("http://{}/get?user_id={user_id}", node.read);
        Response::of(node.client.head(url).send().await.unwrap()).await
    };
    let (got, asked) = (node.get("a").await, head("a").await);
    assert_eq!((asked.status, asked.body.as_str()), (200, ""));
    assert_eq!(asked.header("content-length"), got.body.len().to_string());
    assert_eq!(head("nobody").await.status, 404);
}

#[tokio::test]
async fn other_methods_and_paths_are_rejected_with_the_allowed_ones() {
    let node = Node::start().await;
    for method in ["PUT", "PATCH", "DELETE", "OPTIONS"] {
        let url = format!("http://{}/get?user_id=a", node.read);
        let request = node.client.request(method.parse().unwrap(), url);
        let response = Response::of(request.send().await.unwrap()).await;
        response.expect_problem(405, "method-not-allowed");
        assert_eq!(response.header("allow"), "GET, HEAD, POST");
    }
    for path in ["/", "/set", "/get/", "/metrics"] {
        let request = node.client.get(format!("http://{}{path}", node.read));
        let detail = Response::of(request.send().await.unwrap())
            .await
            .expect_problem(404, "route-unknown");
        assert!(detail.contains("GET /get"), "{detail}");
    }
}

#[tokio::test]
async fn a_read_waits_for_its_position() {
    let node = Node::start().await;
    let mut reader = RawConnection::connect(node.read).await;
    reader
        .send(get_request("?user_id=a", "grade-position: 2\r\n"))
        .await;
    node.metric_reaches("gradestore_http_requests_in_flight", 2.0)
        .await;
    node.set(r#"{"user_id":"a","spp":1}"#).await.position();
    node.set(r#"{"user_id":"a","spp":2}"#).await.position();
    assert_eq!(reader.response().await.json()["spp"], 2);
    // An applied position is not waited for.
    for position in ["0", "2", "0002"] {
        let response = send_get(
            &node,
            "?user_id=a",
            &format!("Grade-Position: {position}\r\n"),
        )
        .await;
        assert_eq!(response.json()["spp"], 2);
    }
}

#[tokio::test]
async fn a_position_that_is_not_reached_in_time_returns_503() {
    let node = InProcessNode::start(|config| {
        config.http.position_wait_max = Duration::from_millis(50);
        // A read that timed out frees its place.
        config.http.position_waits_max = 1;
    })
    .await;
    node.set(r#"{"user_id":"a","spp":1}"#).await.position();
    // The last one is at the maximum distance past the end of the log.
    for position in ["2", "3", "1000001"] {
        let headers = format!("grade-position: {position}\r\n");
        let detail = send_get(&node, "?user_id=a", &headers)
            .await
            .expect_problem(503, "position-not-reached");
        let expected = format!("this replica has applied position 1, and not yet {position};");
        assert!(detail.starts_with(&expected), "{detail}");
    }
}

#[tokio::test]
async fn a_position_far_past_the_end_of_the_log_is_rejected_immediately() {
    // Longer than the test waits for a response.
    let node =
        InProcessNode::start(|config| config.http.position_wait_max = Duration::from_secs(3600))
            .await;
    for end in 0..2 {
        for position in [1_000_001 + end, u64::MAX] {
            let headers = format!("grade-position: {position}\r\n");
            let detail = send_get(&node, "?user_id=a", &headers)
                .await
                .expect_problem(503, "position-not-reached");
            let expected = format!(
                "Grade-Position {position} is more than 1000000 past the end of the log, {end};"
            );
            assert!(detail.starts_with(&expected), "{detail}");
        }
        node.set(r#"{"user_id":"a","spp":1}"#).await.position();
    }
}

#[tokio::test]
async fn waiting_reads_beyond_the_limit_are_rejected_immediately() {
    let node = InProcessNode::start(|config| {
        config.http.position_wait_max = Duration::from_secs(3600);
        config.http.position_waits_max = 2;
    })
    .await;
    let wait = async |position: u64| {
        let mut reader = RawConnection::connect(node.read).await;
        let headers = format!("grade-position: {position}\r\n");
        reader.send(get_request("?user_id=a", &headers)).await;
        reader
    };
    // The request for the metrics counts too.
    let in_flight = async |count: f64| {
        node.metric_reaches("gradestore_http_requests_in_flight", count)
            .await;
    };
    let mut first = wait(1).await;
    let mut second = wait(3).await;
    in_flight(3.0).await;
    let detail = wait(1)
        .await
        .response()
        .await
        .expect_problem(503, "position-not-reached");
    assert!(
        detail.starts_with("too many reads wait for a Grade-Position (limit 2);"),
        "{detail}"
    );
    let set = async |spp: u64| {
        let patch = format!(r#"{{"user_id":"a","spp":{spp}}}"#);
        assert_eq!(node.set(patch).await.position(), spp);
    };
    set(1).await;
    assert_eq!(first.response().await.json()["spp"], 1);
    in_flight(2.0).await;
    // An answered read frees its place.
    let mut third = wait(2).await;
    in_flight(3.0).await;
    set(2).await;
    assert_eq!(third.response().await.json()["spp"], 2);
    set(3).await;
    assert_eq!(second.response().await.json()["spp"], 3);
}

#[tokio::test]
async fn an_invalid_position_is_rejected() {
    let node = Node::start().await;
    for headers in [
        "grade-position:\r\n",
        "grade-position: x\r\n",
        "grade-position: -1\r\n",
        "grade-position: +1\r\n",
        "grade-position: 1.0\r\n",
        "grade-position: 0x1\r\n",
        "grade-position: 1 1\r\n",
        "grade-position: 18446744073709551616\r\n",
        "grade-position: 0\r\ngrade-position: 0\r\n",
        "grade-position: é\r\n",
    ] {
        send_get(&node, "?user_id=a", headers)
            .await
            .expect_problem(400, "position-invalid");
    }
}
