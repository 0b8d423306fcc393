//! `POST /set`.

use std::time::Duration;

use crate::harness::wire::{RawConnection, Response};
use crate::harness::{AUTHORIZATION, InProcessNode, Node, set_request, set_request_framed};

#[tokio::test]
async fn a_write_returns_its_position_and_is_readable() {
    let node = Node::start().await;
    let response = node.set(r#"{"user_id":"alice","spp":5}"#).await;
    assert_eq!((response.position(), response.body.as_str()), (1, ""));
    let response = node.set(r#"{"user_id":"alice","return_fee":-7}"#).await;
    assert_eq!(response.position(), 2);
    let response = node.get("alice").await;
    assert_eq!(response.status, 200);
    assert_eq!(response.header("content-type"), "application/json");
    assert_eq!(
        response.body,
        r#"{"user_id":"alice","postpaid_limit":0,"spp":5,"shipping_fee":0,"return_fee":-7}"#
    );
}

#[tokio::test]
async fn patches_merge_and_may_set_zero_and_the_extreme_values() {
    let node = Node::start().await;
    for (patch, values) in [
        (r#"{"user_id":"a"}"#, [0, 0, 0, 0]),
        (r#"{"user_id":"a","spp":5}"#, [0, 5, 0, 0]),
        (
            r#"{"shipping_fee":9223372036854775807,"user_id":"a","return_fee":-9223372036854775808}"#,
            [0, 5, i64::MAX, i64::MIN],
        ),
        (r#"{"user_id":"a","spp":0}"#, [0, 0, i64::MAX, i64::MIN]),
        (
            r#"{"user_id":"a","postpaid_limit":-1,"shipping_fee":0}"#,
            [-1, 0, 0, i64::MIN],
        ),
        (
            r#" { "user_id" : "\u0061" , "s\u0070p" : -0 } "#,
            [-1, 0, 0, i64::MIN],
        ),
        (r#"{"user_id":"a"}"#, [-1, 0, 0, i64::MIN]),
    ] {
        node.set(patch).await.position();
        let grade = node.get("a").await.json();
        let names = ["postpaid_limit", "spp", "shipping_fee", "return_fee"];
        assert_eq!(
            names.map(|name| grade[name].as_i64().unwrap()),
            values,
            "{patch}"
        );
    }
    assert_eq!(node.status().await["records"], 1);
}

/// JSON bodies that are not a patch, each with a part of the expected `detail`.
fn invalid_patches() -> Vec<(String, &'static str)> {
    let nested = "[".repeat(20_000) + &"]".repeat(20_000);
    let long = "x".repeat(257);
    [
        ("[]", "an object"),
        (r#"["a",1,2,3,4]"#, "an object"),
        (r#"[{"user_id":"a","spp":1}]"#, "an object"),
        ("null", "an object"),
        ("7", "an object"),
        (r#""a""#, "an object"),
        ("{}", "user_id"),
        (r#"{"spp":1}"#, "user_id"),
        (r#"{"user_id":"a","discount":1}"#, "discount"),
        (r#"{"user_id":"a","SPP":1}"#, "SPP"),
        (r#"{"user_id":"a","spp":1,"spp":1}"#, "spp"),
        (r#"{"user_id":"a","spp":1,"s\u0070p":2}"#, "spp"),
        (r#"{"user_id":"a","user_id":"a"}"#, "user_id"),
        (r#"{"user_id":"a","user\u005fid":"b"}"#, "user_id"),
        (r#"{"user_id":"a","spp":null}"#, "spp"),
        (r#"{"user_id":"a","spp":true}"#, "spp"),
        (r#"{"user_id":"a","spp":"1"}"#, "spp"),
        (r#"{"user_id":"a","spp":[1]}"#, "spp"),
        (r#"{"user_id":"a","spp":{}}"#, "spp"),
        (r#"{"user_id":"a","spp":1.0}"#, "spp"),
        (r#"{"user_id":"a","spp":1e2}"#, "spp"),
        // Out of the range of f64, so some parsers do not accept them as numbers.
        (r#"{"user_id":"a","spp":1e400}"#, "64-bit integers"),
        (r#"{"user_id":"a","spp":-1E400}"#, "64-bit integers"),
        (r#"{"user_id":"a","spp":9223372036854775808}"#, "spp"),
        (r#"{"user_id":"a","spp":-9223372036854775809}"#, "spp"),
        (
            r#"{"user_id":"a","spp":123456789012345678901234567890}"#,
            "spp",
        ),
        (r#"{"user_id":null}"#, "string"),
        (r#"{"user_id":7}"#, "string"),
        (r#"{"user_id":""}"#, "empty"),
        (r#"{"user_id":"a\u0000b"}"#, "U+0000"),
        (r#"{"user_id":"a\n"}"#, "U+000A"),
        (r#"{"user_id":"\u007f"}"#, "U+007F"),
        (r#"{"user_id":"\u0085"}"#, "U+0085"),
        (r#"{"user_id":"\ud800"}"#, "hex escape"),
        (r#"{"user_id":"\udc00\ud800"}"#, "hex escape"),
    ]
    .map(|(body, named)| (body.to_owned(), named))
    .into_iter()
    .chain([
        (format!(r#"{{"user_id":"{long}"}}"#), "257"),
        (format!(r#"{{"user_id":"a","spp":{nested}}}"#), "spp"),
        (nested, "an object"),
    ])
    .collect()
}

/// Bodies that are not JSON.
fn invalid_json() -> Vec<(Vec<u8>, &'static str)> {
    let open = "[".repeat(60_000).into_bytes();
    [
        (&b""[..], "not-json"),
        (b"{", "not-json"),
        (b"user_id=a&spp=1", "not-json"),
        (br#"{"user_id":"a",}"#, "not-json"),
        (br#"{'user_id':'a'}"#, "not-json"),
        (br#"{"user_id":"a","spp":01}"#, "not-json"),
        (br#"{"user_id":"a","spp":+1}"#, "not-json"),
        (br#"{"user_id":"a","spp":0x1}"#, "not-json"),
        (br#"{"user_id":"a","spp":NaN}"#, "not-json"),
        (br#"{"user_id":"a"}{"user_id":"b"}"#, "not-json"),
        (br#"{"user_id":"a"} /* */"#, "not-json"),
        (b"{\"user_id\":\"a\nb\"}", "not-json"),
        (b"{\"user_id\":\"a\0\"}", "not-json"),
        (b"\xef\xbb\xbf{\"user_id\":\"a\"}", "not-json"),
        (b"{\"user_id\":\"\xff\"}", "body-not-utf8"),
        (b"{\"user_id\":\"\xc0\x80\"}", "body-not-utf8"),
        (b"{\"user_id\":\"\xed\xa0\x80\"}", "body-not-utf8"),
    ]
    .map(|(body, cause)| (body.to_owned(), cause))
    .into_iter()
    .chain([(open, "not-json")])
    .collect()
}

/// Every bad body, with the expected status and problem.
pub(crate) fn bad_bodies() -> Vec<(Vec<u8>, u16, &'static str)> {
    let invalid_patches = invalid_patches().into_iter();
    let invalid_patches = invalid_patches.map(|(body, _)| (body.into_bytes(), 422, "not-a-patch"));
    let invalid_json = invalid_json().into_iter();
    invalid_patches
        .chain(invalid_json.map(|(body, cause)| (body, 400, cause)))
        .collect()
}

#[tokio::test]
async fn a_bad_body_is_rejected_with_its_problem_and_stores_nothing() {
    let node = Node::start().await;
    for (body, named) in invalid_patches() {
        let detail = node
            .set(body.clone())
            .await
            .expect_problem(422, "not-a-patch");
        assert!(detail.contains(named), "{detail} for {:.60}", body);
        assert!(detail.len() < 400, "{detail}");
    }
    for (body, cause) in invalid_json() {
        node.set(body).await.expect_problem(400, cause);
    }
    node.get("a").await.expect_problem(404, "user-unknown");
    assert_eq!(node.status().await["position"], 0);
}

#[tokio::test]
async fn user_ids_of_any_script_up_to_256_bytes_are_kept_unchanged() {
    let node = Node::start().await;
    let longest = "é".repeat(128);
    for user_id in [
        "a+b c&d=e%f#g?/",
        "\"quoted\\\"",
        "日本語",
        "😀",
        " ",
        "\u{a0}",
        &longest,
    ] {
        let patch = serde_json::json!({ "user_id": user_id, "spp": 1 });
        node.set(patch.to_string()).await.position();
        assert_eq!(node.get(user_id).await.json()["user_id"], user_id);
    }
    assert_eq!(node.status().await["records"], 7);
}

#[tokio::test]
async fn credentials_must_be_correct_and_well_formed() {
    let node = Node::start().await;
    let send = async |authorization: &str| {
        let body = r#"{"user_id":"a","spp":1}"#;
        let request = set_request(body);
        let ours = format!("authorization: {AUTHORIZATION}\r\n");
        let mut connection = RawConnection::connect(node.write).await;
        connection.send(request.replace(&ours, authorization)).await;
        connection.response().await
    };
    let long = format!("authorization: Basic {}\r\n", "YWFh".repeat(6000));
    for wrong in [
        "",
        // admin:wrong, admin:correct hors, nobody:correct horse, admin: and :correct horse
        "authorization: Basic YWRtaW46d3Jvbmc=\r\n",
        "authorization: Basic YWRtaW46Y29ycmVjdCBob3Jz\r\n",
        "authorization: Basic bm9ib2R5OmNvcnJlY3QgaG9yc2U=\r\n",
        "authorization: Basic YWRtaW46\r\n",
        "authorization: Basic OmNvcnJlY3QgaG9yc2U=\r\n",
        // No colon, not UTF-8, not base64.
        "authorization: Basic YWRtaW4=\r\n",
        "authorization: Basic //8=\r\n",
        "authorization: Basic !!!\r\n",
        "authorization: Basic\r\n",
        "authorization: Bearer YWRtaW46Y29ycmVjdCBob3JzZQ==\r\n",
        &long,
    ] {
        let response = send(wrong).await;
        response.expect_problem(401, "unauthorized");
        let challenge = response.header("www-authenticate");
        assert!(challenge.starts_with("Basic realm="), "{challenge}");
    }
    node.get("a").await.expect_problem(404, "user-unknown");
    send(&format!(
        "Authorization: {}\r\n",
        AUTHORIZATION.replace("Basic", "bASIC")
    ))
    .await
    .position();
}

#[tokio::test]
async fn the_media_type_must_be_json() {
    let node = Node::start().await;
    let body = r#"{"user_id":"a","spp":1}"#;
    let send = async |content_type: &str| {
        let request = set_request(body);
        let mut connection = RawConnection::connect(node.write).await;
        connection
            .send(request.replace("content-type: application/json\r\n", content_type))
            .await;
        connection.response().await
    };
    for wrong in [
        "",
        "content-type:\r\n",
        "content-type: text/plain\r\n",
        "content-type: application/x-www-form-urlencoded\r\n",
        "content-type: application/jsonp\r\n",
        "content-type: application/merge-patch+json\r\n",
    ] {
        let response = send(wrong).await;
        let detail = response.expect_problem(415, "unsupported-media-type");
        let accepted = ["application/json", "application/x-ndjson"];
        assert!(accepted.iter().all(|accepted| detail.contains(accepted)));
        assert_eq!(response.header("accept"), accepted.join(", "));
    }
    node.get("a").await.expect_problem(404, "user-unknown");
    for right in [
        "content-type: application/json\r\n",
        "Content-Type: Application/JSON\r\n",
        "content-type: application/json; charset=utf-8\r\n",
        "content-type: application/json;charset=UTF-8\r\n",
    ] {
        send(right).await.position();
    }
}

#[tokio::test]
async fn a_compressed_body_is_rejected() {
    let node = Node::start().await;
    let send = async |content_type: &str, encoding: &str| {
        let request = set_request(r#"{"user_id":"a","spp":1}"#);
        let request = request.replace("application/json", content_type);
        let request = request.replace("content-type:", &format!("{encoding}\r\ncontent-type:"));
        RawConnection::connect(node.write)
            .await
            .request(request)
            .await
    };
    for encoding in [
        "gzip",
        "br",
        "identity, gzip",
        "gzip\r\ncontent-encoding: identity",
    ] {
        let encoding = format!("Content-Encoding: {encoding}");
        for content_type in ["application/json", "application/x-ndjson"] {
            let response = send(content_type, &encoding).await;
            response.expect_problem(415, "content-encoding");
            assert_eq!(response.header("accept-encoding"), "identity");
        }
    }
    send("application/json", "content-encoding: Identity")
        .await
        .position();
}

#[tokio::test]
async fn a_byte_order_mark_is_named() {
    let node = Node::start().await;
    let patch = "\u{feff}{\"user_id\":\"a\"}";
    let detail = node.set(patch).await.expect_problem(400, "not-json");
    assert!(detail.contains("byte order mark (EF BB BF)"), "{detail}");
    let response = node.set_lines(patch).await;
    let detail = response.expect_problem(422, "bad-line");
    assert!(
        detail.contains("line 1: it is not JSON: it begins with a byte"),
        "{detail}"
    );
    let utf16: Vec<u8> = patch.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let detail = node.set(utf16).await.expect_problem(400, "body-not-utf8");
    assert!(detail.contains("at byte 0"), "{detail}");
}

#[tokio::test]
async fn the_largest_body_has_64_kib() {
    let node = Node::start().await;
    let patch = r#"{"user_id":"a","spp":1}"#;
    let padded = |bytes: usize| format!("{patch}{}", " ".repeat(bytes - patch.len()));
    node.set(padded(64 * 1024)).await.position();
    let detail = node
        .set(padded(64 * 1024 + 1))
        .await
        .expect_problem(413, "body-too-large");
    assert!(detail.contains("65536"), "{detail}");

    let chunked = async |bytes: usize| -> Response {
        let (first, second) = (padded(bytes), " ".repeat(1024));
        let body = format!(
            "{:x}\r\n{first}\r\n{:x}\r\n{second}\r\n0\r\n\r\n",
            first.len(),
            second.len()
        );
        let mut connection = RawConnection::connect(node.write).await;
        connection
            .send(set_request_framed("transfer-encoding: chunked", &body))
            .await;
        connection.response().await
    };
    chunked(63 * 1024).await.position();
    chunked(63 * 1024 + 1)
        .await
        .expect_problem(413, "body-too-large");
    assert_eq!(node.status().await["position"], 2);
}

#[tokio::test]
async fn slow_and_broken_bodies_are_answered_with_their_problem() {
    let node =
        InProcessNode::start(|config| config.http.body_wait_max = Duration::from_millis(50)).await;
    let mut connection = RawConnection::connect(node.write).await;
    connection
        .send(set_request_framed("content-length: 20", r#"{"user_id":"#))
        .await;
    connection.response().await.expect_problem(408, "body-slow");
    connection.expect_closed().await;

    let mut connection = RawConnection::connect(node.write).await;
    connection
        .send(set_request_framed("transfer-encoding: chunked", "xyz\r\n"))
        .await;
    connection
        .response()
        .await
        .expect_problem(400, "body-broken");
    connection.expect_closed().await;
    assert_eq!(node.status().await["position"], 0);
}

#[tokio::test]
async fn other_methods_and_paths_are_rejected_with_the_allowed_ones() {
    let node = Node::start().await;
    for method in ["GET", "PUT", "PATCH", "OPTIONS"] {
        let request = node.client.request(
            method.parse().unwrap(),
            format!("http://{}/set", node.write),
        );
        let response = Response::of(request.send().await.unwrap()).await;
        response.expect_problem(405, "method-not-allowed");
        assert_eq!(response.header("allow"), "POST, DELETE");
    }
    for path in ["/", "/get?user_id=a", "/set/", "/SET", "/backups"] {
        let request = node.client.post(format!("http://{}{path}", node.write));
        let detail = Response::of(request.send().await.unwrap())
            .await
            .expect_problem(404, "route-unknown");
        assert!(detail.contains("POST /set, DELETE /set"), "{detail}");
    }
}
