//! The status page in a browser, in each state of a real node, with and without script.

mod browser;

use std::net::SocketAddr;
use std::process::Stdio;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::routing::get;
use gradestore::log::{Announcement, ClusterKey};
use http::{StatusCode, Uri};
use hyper::server::conn::http1;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use serde_json::{Value, json};
use tempfile::tempdir;
use tokio::net::TcpListener;

use self::browser::{Browser, Page, PageMode};
use crate::cluster::forged_messages::respond_to_queries;
use crate::harness::backup_files::{fetch_backup, program_with_data_dir};
use crate::harness::cluster::broker::{Broker, Load, STREAM, replica_at};
use crate::harness::cluster::seeded::SeededCluster;
use crate::harness::cluster::throttle::Throttle;
use crate::harness::wire::eventually;
use crate::harness::{Node, PASSWORD, Ports, Process, ReservedPort, program};

const DARK_PHONE: PageMode = PageMode {
    dark: true,
    phone: true,
    ..PageMode::LIGHT
};
const NO_SCRIPT: PageMode = PageMode {
    script: false,
    ..PageMode::LIGHT
};
/// Each mode that has a screenshot.
const MODES: [(&str, PageMode); 3] = [
    ("light", PageMode::LIGHT),
    ("night", DARK_PHONE),
    ("no-script", NO_SCRIPT),
];

fn url(node: &Ports) -> String {
    format!("http://{}/", node.ops)
}

/// Checks the text of the page in each mode, its layout, and that the browser reports no errors;
/// saves screenshots.
async fn assert_page(browser: &mut Browser, name: &str, node: &Ports, expected: &[&str]) {
    for (mode_name, mode) in MODES {
        let mut page = browser.open(&url(node), mode).await;
        page.wait_for_text(expected).await;
        // Nothing overflows, and all text has enough contrast and size.
        let wide = "document.documentElement.scrollWidth > document.documentElement.clientWidth";
        assert_eq!(page.evaluate(wide).await, false, "{name} {mode_name}");
        let low_contrast = page.evaluate(include_str!("low_contrast.js")).await;
        assert_eq!(low_contrast, json!([]), "{name} {mode_name}");
        page.screenshot(&format!("{name}-{mode_name}")).await;
        assert_eq!(page.browser_errors(), [] as [Value; 0]);
    }
}

/// A number in the format of the page.
fn grouped(number: &Value) -> String {
    indicatif::HumanCount(number.as_u64().unwrap()).to_string()
}

#[tokio::test]
async fn a_ready_node_shows_its_state_and_updates_it() {
    let broker = Broker::start().await;
    let [a, b, c] = broker.replicas().await;
    let load = Load::start(&[&a, &b, &c], 5000, usize::MAX);
    let busy = |status: &Value| {
        let traffic = &status["traffic"];
        status["records"].as_u64() > Some(2000)
            && traffic["writes"]["per_s"].as_f64() > Some(10.0)
            && traffic["writes"]["latency_s_p99"].is_f64()
            && status["peers"].as_array().unwrap().len() == 2
    };
    for _ in 0..100 {
        a.get("user-1").await;
    }
    a.status_where("traffic and peers", busy).await;
    let mut browser = Browser::start().await;
    let urls = [&b, &c].map(|peer| format!("http://{}", peer.write));
    let all = [
        "Ready",
        "Serving reads",
        "Accepting writes",
        "Lag",
        "Position",
        "Records",
        "Memory",
        "MiB",
        "per second",
        "p50",
        "p99",
        "Last snapshot",
        "the node has no data directory",
        "jetstream",
        &urls[0],
        &urls[1],
    ];
    assert_page(&mut browser, "ready", &a, &all).await;

    // The page shows the values of /status and updates without a reload.
    load.stop().await;
    let mut page = browser.open(&url(&a), PageMode::LIGHT).await;
    page.evaluate("window.loaded = 'once'").await;
    a.set(r#"{"user_id":"somebody new","spp":1}"#)
        .await
        .position();
    for node in [&b, &c] {
        node.set(r#"{"user_id":"x","spp":1}"#).await.position();
    }
    let end = c.status().await["log_end"].as_u64().unwrap();
    let status = a.ready_at(end).await;
    let (position, records) = (grouped(&status["position"]), grouped(&status["records"]));
    let text = page.wait_for_text(&[&position, &records]).await;
    for key in ["node", "version", "digest", "log_id"] {
        let printed = status[key].as_str().unwrap();
        assert!(text.contains(printed), "{key} {printed}: {text}");
    }
    assert!(text.contains(&format!("log ends at {position}")), "{text}");
    assert_eq!(page.evaluate("window.loaded").await, "once");
    assert_eq!(page.browser_errors(), [] as [Value; 0]);

    // Without script it updates too.
    let mut page = browser.open(&url(&a), NO_SCRIPT).await;
    let before = page.wait_for_text(&["Ready", &position]).await;
    let later = a.set(r#"{"user_id":"x","spp":2}"#).await.position();
    let later = grouped(&later.into());
    assert!(!before.contains(&later));
    page.wait_for_text(&[&later]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_progress_of_a_restore_is_shown() {
    let mut browser = Browser::start().await;
    let mut cluster = SeededCluster::with_rows(30_000).await;
    let throttle = Throttle::without_target(u64::MAX).await;
    let first = cluster.start_first_behind(&throttle).await;
    let size = fetch_backup(&first).await.len() as u64;
    throttle.set_limit(size / 2);
    let late = Node::launch(&mut replica_at(cluster.broker.address)).await;
    throttle.wait_until_limited(1).await;
    let answered = cluster.write(&first, 3).await;
    late.status_where("rows and batches", |status| {
        status["restore"]["rows"].as_u64() > Some(0) && status["restore"]["buffered_batches"] == 3
    })
    .await;

    // A byte a second, so that the replica does not give up the transfer.
    let drip = async {
        for more in 1.. {
            tokio::time::sleep(Duration::from_secs(1)).await;
            throttle.set_limit(size / 2 + more);
        }
    };
    let from = throttle.url();
    let mut page = tokio::select! {
        page = assert_restore_is_shown(&mut browser, &late, &from) => page,
        () = drip => unreachable!("it never ends"),
    };
    throttle.remove_limit();
    let end = answered.last().unwrap().position;
    late.ready_at(end + 1).await;
    page.wait_for_text(&["Ready", "Serving reads", "Done", "30,000 of about 30,000"])
        .await;
    assert_eq!(
        page.evaluate("document.querySelector('progress')").await,
        Value::Null
    );
}

/// Checks the page of a replica that restores a backup of 30,000 records from `from`. Returns the
/// page.
async fn assert_restore_is_shown<'a>(
    browser: &'a mut Browser,
    late: &Node,
    from: &str,
) -> Page<'a> {
    let all = [
        "Restoring",
        "Rejecting reads",
        "Rejecting writes",
        "Restore",
        from,
        "of about 30,000",
        "3 batches",
        " %",
        "Remaining\nabout",
    ];
    assert_page(browser, "restoring", late, &all).await;
    let mut page = browser.open(&url(late), PageMode::LIGHT).await;
    let restore = "document.getElementById('restore').innerText";
    let restore = page.evaluate(restore).await;
    assert!(restore.as_str().unwrap().contains(from), "{restore}");
    eventually("the rows of /status", async || {
        let rows = grouped(&late.status().await["restore"]["rows"]);
        let shown = format!("{rows} of about 30,000");
        page.text().await.contains(&shown).then_some(())
    })
    .await;
    let bar = "document.querySelector('progress').value";
    let percent = page.evaluate(bar).await.as_f64().unwrap();
    assert!((1.0..100.0).contains(&percent), "{percent}");
    page
}

/// Forwards the requests below `/nodes/a/` to the ops port of `node`, as a reverse proxy does that
/// shows several nodes under one address. Returns its address.
async fn prefix_proxy(node: &Ports) -> SocketAddr {
    let (client, ops) = (node.client.clone(), node.ops);
    let forward = async move |uri: Uri| {
        let path = uri
            .path()
            .strip_prefix("/nodes/a")
            .ok_or(StatusCode::NOT_FOUND)?;
        let response = client.get(format!("http://{ops}{path}")).send().await;
        let response = response.map_err(|_| StatusCode::BAD_GATEWAY)?;
        Ok::<_, StatusCode>(http::Response::from(response).map(Body::new))
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = Router::new().route("/nodes/a/{*path}", get(forward.clone()));
    let service = TowerToHyperService::new(router.route("/nodes/a/", get(forward)));
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let serving = http1::Builder::new();
            tokio::spawn(serving.serve_connection(TokioIo::new(stream), service.clone()));
        }
    });
    address
}

#[tokio::test]
async fn the_page_works_below_a_prefix() {
    let node = Node::start().await;
    let prefix = format!("http://{}/nodes/a/", prefix_proxy(&node).await);
    let mut browser = Browser::start().await;
    let mut page = browser.open(&prefix, PageMode::LIGHT).await;
    page.wait_for_text(&["Ready"]).await;
    // The script updates it.
    let position = node.set(r#"{"user_id":"x","spp":1}"#).await.position();
    let ends = format!("log ends at {position}");
    page.wait_for_text(&[&ends]).await;
    let links = "[...document.querySelectorAll('nav a')].map(link => link.href)";
    let links = page.evaluate(links).await;
    assert_eq!(links.as_array().unwrap().len(), 5);
    for link in links.as_array().unwrap() {
        let link = link.as_str().unwrap();
        assert!(link.starts_with(&prefix), "{link}");
        assert_eq!(
            node.client.get(link).send().await.unwrap().status(),
            200,
            "{link}"
        );
    }
    assert_eq!(page.browser_errors(), [] as [Value; 0]);
}

#[tokio::test]
async fn the_page_says_where_the_node_runs_and_what_it_keeps() {
    let directory = tempdir().unwrap();
    let node = Node::start_with(&mut program_with_data_dir(directory.path())).await;
    let mut browser = Browser::start().await;
    node.set("{").await.expect_problem(400, "not-json");
    let status = node
        .status_where("the rejected request", |status| {
            status["traffic"]["rejected"]["client_errors"] == 1
        })
        .await;
    let host = status["host"].as_str().unwrap();
    let ports = [
        ("write", node.write),
        ("read", node.read),
        ("ops", node.ops),
    ];
    let ports = ports
        .map(|(name, address)| format!("{name} {address}"))
        .join(", ");
    let mut page = browser.open(&url(&node), PageMode::LIGHT).await;
    let text = page
        .wait_for_text(&[
            host,
            &ports,
            directory.path().to_str().unwrap(),
            "per second in the last",
            "1 with 4xx (not 404), 0 with 5xx since the start",
            "closed by the node",
            "free of",
            "resident",
            " UTC",
        ])
        .await;
    assert!(!text.contains("Keeping nothing"), "{text}");
    let title = page.evaluate("document.title").await;
    assert!(title.as_str().unwrap().contains(host), "{title}");

    let ephemeral = Node::start().await;
    let lost = "Keeping nothing: all records are lost when this node stops";
    assert_page(
        &mut browser,
        "ephemeral",
        &ephemeral,
        &[lost, "in memory only", "no data directory"],
    )
    .await;
}

#[tokio::test]
async fn an_unreachable_broker_is_shown() {
    let mut broker = Broker::start().await;
    let [a] = broker.replicas().await;
    a.set(r#"{"user_id":"x","spp":1}"#).await.position();
    let mut browser = Browser::start().await;
    let mut page = browser.open(&url(&a), PageMode::LIGHT).await;
    page.wait_for_text(&["Ready", "Accepting writes"]).await;
    broker.kill();
    page.wait_for_text(&["Read only", "Serving reads", "Rejecting writes"])
        .await;
    let why = a.status().await["reason"].as_str().unwrap().to_owned();
    assert_page(
        &mut browser,
        "broker-away",
        &a,
        &["Read only", "Serving reads", "Rejecting writes", &why],
    )
    .await;
}

#[tokio::test]
async fn a_gap_is_shown_with_its_reason() {
    let broker = Broker::start().await;
    let [a] = broker.replicas().await;
    a.set(r#"{"user_id":"x","spp":1}"#).await.position();
    broker.client().await.delete_stream(STREAM).await.unwrap();
    a.in_state("gap").await;
    let mut browser = Browser::start().await;
    let all = [
        "Gap",
        "Rejecting reads",
        "Rejecting writes",
        "does not exist",
    ];
    assert_page(&mut browser, "gap", &a, &all).await;
}

#[tokio::test]
async fn a_starting_node_has_a_page() {
    let [write, read, ops] = [(); 3].map(|()| ReservedPort::new());
    let mut command = program();
    command
        .env("GRADESTORE_PASSWORD", PASSWORD)
        .args(["--nats-url", "127.0.0.1:1"])
        .args(["--write-addr", &write.address().to_string()])
        .args(["--read-addr", &read.address().to_string()])
        .args(["--ops-addr", &ops.address().to_string()])
        .stderr(Stdio::null());
    let _process = Process(command.spawn().unwrap());
    let node = Ports::new(write.address(), read.address(), ops.address());
    eventually("a page", async || {
        let url = format!("http://{}/livez", node.ops);
        let asked = node.client.get(url).send().await;
        asked.ok().filter(|response| response.status() == 200)
    })
    .await;
    for port in [node.ops, node.read, node.write] {
        let response = node.get_from(port, "/readyz").await;
        let reason = response.expect_problem(503, "not-ready");
        assert!(reason.contains("(starting)"), "{reason}");
    }
    let mut browser = Browser::start().await;
    assert_page(
        &mut browser,
        "starting",
        &node,
        &["Starting", "waiting for NATS", "Rejecting reads"],
    )
    .await;
}

#[tokio::test]
async fn an_unresponsive_node_is_shown_as_such() {
    let node = Node::start().await;
    let mut browser = Browser::start().await;
    let mut page = browser.open(&url(&node), DARK_PHONE).await;
    let text = page.wait_for_text(&["Ready"]).await;
    assert!(!text.contains("No response"), "{text}");
    node.kill();
    page.wait_for_text(&["No response since", " UTC. Showing older data", "Ready"])
        .await;
    assert_eq!(
        page.evaluate("document.title").await,
        "No response · gradestore"
    );
    page.screenshot("silent-night").await;
}

#[tokio::test]
async fn text_from_other_nodes_is_escaped() {
    let broker = Broker::start().await;
    let [a] = broker.replicas().await;
    let status = a.status().await;
    let attack =
        "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>";
    // Another replica of the cluster, with the password.
    let hostile: Announcement = serde_json::from_value(json!({
        "node": format!("{attack}\"'><h1>"),
        "replica": "r",
        "version": "</code><style>*{display:none}</style>",
        "log_id": status["log_id"],
        "url": "javascript:alert(1)//</th></table>&lt;b&gt;",
        "state": "ready</td><iframe src=/status></iframe>",
        "position": 7,
        "chain": status["chain"],
    }))
    .unwrap();
    let (key, mut printed) = (ClusterKey::derive(PASSWORD), hostile.clone());
    let hostile = serde_json::to_value(hostile).unwrap();
    let _answering = respond_to_queries(&broker, move |nonce| {
        printed.mac = Some(key.sign_announcement(&printed, nonce));
        vec![serde_json::to_vec(&printed).unwrap().into()]
    })
    .await;
    a.status_where("the hostile peer", |status| {
        status["peers"][0]["node"] == hostile["node"]
    })
    .await;

    let [node, version, write_url] =
        ["node", "version", "url"].map(|key| hostile[key].as_str().unwrap());
    // The page capitalizes the name of a state.
    let state = "Ready</td><iframe src=/status></iframe>";
    let words = [node, version, write_url, state];
    let mut browser = Browser::start().await;
    for (name, mode) in MODES {
        let mut page = browser.open(&url(&a), mode).await;
        page.wait_for_text(&words).await;
        let elements =
            "document.querySelectorAll('img, iframe, td script, th script, main style').length";
        assert_eq!(page.evaluate(elements).await, 0, "{name}");
        let headings = "document.querySelectorAll('h1').length";
        assert_eq!(page.evaluate(headings).await, 1, "{name}");
        let title = page.evaluate("document.title").await;
        assert!(title.as_str().unwrap().starts_with("Ready"), "{title}");
        page.screenshot(&format!("hostile-{name}")).await;
        assert_eq!(page.browser_errors(), [] as [Value; 0]);
    }
    // Text that the script inserts is escaped too.
    let mut page = browser.open(&url(&a), PageMode::LIGHT).await;
    let position = a.set(r#"{"user_id":"x","spp":1}"#).await.position();
    page.wait_for_text(&[&format!("log ends at {position}"), words[0]])
        .await;
    assert_eq!(
        page.evaluate("document.querySelectorAll('img').length")
            .await,
        0
    );
}
