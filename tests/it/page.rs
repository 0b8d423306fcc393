//! The page at `GET /` of the ops port, in a real browser: what a person reads in each state of a real
//! node, with the script and without.

use std::net::TcpListener;
use std::process::Stdio;

use gradestore::log::{Announcement, ClusterKey};
use serde_json::{Value, json};

use crate::broker::{Broker, Load, STREAM, at, replica_at, status_where};
use crate::browser::{Browser, Look};
use crate::disk::backup_of;
use crate::harness::{Node, PASSWORD, Ports, Process, program};
use crate::seeded::Cluster;
use crate::throttle::Throttle;
use crate::votes::answering;
use crate::wire::{Answer, eventually};

const PHONE_AT_NIGHT: Look = Look {
    dark: true,
    phone: true,
    ..Look::LIGHT
};
const NO_SCRIPT: Look = Look {
    script: false,
    ..Look::LIGHT
};
/// Each look that a picture is kept of.
const LOOKS: [(&str, Look); 3] = [
    ("light", Look::LIGHT),
    ("night", PHONE_AT_NIGHT),
    ("no-script", NO_SCRIPT),
];

fn url(node: &Ports) -> String {
    format!("http://{}/", node.ops)
}

/// Checks that the page says all of `wanted` as it is served, and in each look, each without a
/// complaint of the browser's; keeps pictures.
async fn reads(browser: &mut Browser, name: &str, node: &Ports, wanted: &[&str]) {
    for (look_name, look) in LOOKS {
        let mut page = browser.open(&url(node), look).await;
        page.shows(wanted).await;
        // Nothing is cut off at the side, the text stands out, and no part of it is tiny.
        let wide = "document.documentElement.scrollWidth > document.documentElement.clientWidth";
        assert_eq!(page.evaluate(wide).await, false, "{name} {look_name}");
        let faint = page.evaluate(include_str!("page/faint.js")).await;
        assert_eq!(faint, json!([]), "{name} {look_name}");
        page.picture(&format!("{name}-{look_name}")).await;
        assert_eq!(page.complaints(), [] as [Value; 0]);
    }
}

/// A number as the page writes it.
fn grouped(number: &Value) -> String {
    indicatif::HumanCount(number.as_u64().unwrap()).to_string()
}

#[tokio::test]
async fn a_ready_node_shows_what_it_holds_and_goes_on_showing_it() {
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
    status_where(&a, "traffic and peers", busy).await;
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
        "None yet",
        "jetstream",
        &urls[0],
        &urls[1],
    ];
    reads(&mut browser, "ready", &a, &all).await;

    // What it says is what /status says, and it follows without being loaded again.
    load.stop().await;
    let mut page = browser.open(&url(&a), Look::LIGHT).await;
    page.evaluate("window.loaded = 'once'").await;
    a.set(r#"{"user_id":"somebody new","spp":1}"#)
        .await
        .position();
    for node in [&b, &c] {
        node.set(r#"{"user_id":"x","spp":1}"#).await.position();
    }
    let end = c.ops("/status").await.json()["log_end"].as_u64().unwrap();
    let status = at(&a, end).await;
    let (position, records) = (grouped(&status["position"]), grouped(&status["records"]));
    let text = page.shows(&[&position, &records]).await;
    for key in ["node", "version", "digest", "log_id"] {
        let said = status[key].as_str().unwrap();
        assert!(text.contains(said), "{key} {said}: {text}");
    }
    assert!(text.contains(&format!("log ends at {position}")), "{text}");
    assert_eq!(page.evaluate("window.loaded").await, "once");
    assert_eq!(page.complaints(), [] as [Value; 0]);

    // Nor does that need the script.
    let mut page = browser.open(&url(&a), NO_SCRIPT).await;
    let before = page.shows(&["Ready", &position]).await;
    let later = a.set(r#"{"user_id":"x","spp":2}"#).await.position();
    let later = grouped(&later.into());
    assert!(!before.contains(&later));
    page.shows(&[&later]).await;
}

#[tokio::test]
async fn the_page_is_small_and_is_all_there_is() {
    let node = Node::start().await;
    let answer = node.ops("/").await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.header("content-type"), "text/html; charset=utf-8");
    assert_eq!(answer.header("cache-control"), "no-store");
    assert_eq!(answer.header("x-content-type-options"), "nosniff");
    assert!(answer.body.len() < 20_000, "{}", answer.body.len());
    let policy = answer.header("content-security-policy");
    let parts: Vec<&str> = policy.split("; ").collect();
    for part in [
        "default-src 'none'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ] {
        assert!(parts.contains(&part), "{part} in {policy}");
    }
    assert!(
        !policy.contains("unsafe") && !policy.contains('*'),
        "{policy}"
    );
    for part in ["script-src 'sha256-", "style-src 'sha256-"] {
        assert!(policy.contains(part), "{part} in {policy}");
    }
    // Nothing is fetched from anywhere but here.
    for outside in ["http://", "https://", "//cdn", "@import", "url("] {
        let namespace = "xmlns='http://www.w3.org/2000/svg'";
        let body = answer.body.replace(namespace, "");
        assert!(!body.contains(outside), "{outside}");
    }
    let request = node.client.post(format!("http://{}/", node.ops));
    let answer = Answer::of(request.send().await.unwrap()).await;
    answer.problem(405, "method-not-allowed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_is_shown_as_it_goes() {
    let mut cluster = Cluster::of(30_000).await;
    let throttle = Throttle::to_nobody(u64::MAX).await;
    let first = cluster.first_behind(&throttle).await;
    let size = backup_of(&first).await.len() as u64;
    throttle.limit(size / 2);
    let late = Node::launch(&mut replica_at(cluster.broker.address)).await;
    throttle.reached(1).await;
    let answered = cluster.write(&first, 3).await;
    status_where(&late, "rows and batches", |status| {
        status["restore"]["rows"].as_u64() > Some(0) && status["restore"]["buffered_batches"] == 3
    })
    .await;

    let mut browser = Browser::start().await;
    let from = throttle.url();
    let all = [
        "Restoring",
        "Rejecting reads",
        "Rejecting writes",
        "Restore",
        &from,
        "of about 30,000",
        "3 batches",
        " %",
        "Remaining\nabout",
    ];
    reads(&mut browser, "restoring", &late, &all).await;
    let mut page = browser.open(&url(&late), Look::LIGHT).await;
    let restore = "document.getElementById('restore').innerText";
    let restore = page.evaluate(restore).await;
    assert!(restore.as_str().unwrap().contains(&from), "{restore}");
    eventually("the rows that /status tells of", async || {
        let rows = grouped(&late.ops("/status").await.json()["restore"]["rows"]);
        let shown = format!("{rows} of about 30,000");
        page.text().await.contains(&shown).then_some(())
    })
    .await;
    let bar = "document.querySelector('progress').value";
    let percent = page.evaluate(bar).await.as_f64().unwrap();
    assert!((1.0..100.0).contains(&percent), "{percent}");

    throttle.open();
    let end = answered.last().unwrap().position;
    at(&late, end + 1).await;
    page.shows(&["Ready", "Serving reads", "Done", "30,000 of about 30,000"])
        .await;
    assert_eq!(
        page.evaluate("document.querySelector('progress')").await,
        Value::Null
    );
}

#[tokio::test]
async fn a_broker_that_is_away_is_named() {
    let mut broker = Broker::start().await;
    let [a] = broker.replicas().await;
    a.set(r#"{"user_id":"x","spp":1}"#).await.position();
    let mut browser = Browser::start().await;
    let mut page = browser.open(&url(&a), Look::LIGHT).await;
    page.shows(&["Ready", "Accepting writes"]).await;
    broker.kill();
    page.shows(&["Read only", "Serving reads", "Rejecting writes"])
        .await;
    let why = a.ops("/status").await.json()["reason"]
        .as_str()
        .unwrap()
        .to_owned();
    reads(
        &mut browser,
        "broker-away",
        &a,
        &["Read only", "Serving reads", "Rejecting writes", &why],
    )
    .await;
}

#[tokio::test]
async fn a_gap_is_told_with_its_reason() {
    let broker = Broker::start().await;
    let [a] = broker.replicas().await;
    a.set(r#"{"user_id":"x","spp":1}"#).await.position();
    broker.client().await.delete_stream(STREAM).await.unwrap();
    status_where(&a, "a gap", |status| status["state"] == "gap").await;
    let mut browser = Browser::start().await;
    let all = [
        "Gap",
        "Rejecting reads",
        "Rejecting writes",
        "does not exist",
    ];
    reads(&mut browser, "gap", &a, &all).await;
}

#[tokio::test]
async fn a_node_that_still_opens_its_log_has_a_page_too() {
    let free = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let mut command = program();
    command
        .env("GRADESTORE_PASSWORD", PASSWORD)
        .args([
            "--nats-url",
            "127.0.0.1:1",
            "--write-addr=127.0.0.1:0",
            "--read-addr=127.0.0.1:0",
        ])
        .args(["--ops-addr", &free.to_string()])
        .stderr(Stdio::null());
    let _process = Process(command.spawn().unwrap());
    let node = Ports::new(free, free, free);
    eventually("a page", async || {
        let asked = node.client.get(format!("http://{free}/livez")).send().await;
        asked.ok().filter(|answer| answer.status() == 200)
    })
    .await;
    let mut browser = Browser::start().await;
    reads(
        &mut browser,
        "starting",
        &node,
        &["Starting", "waiting for NATS", "Rejecting reads"],
    )
    .await;
}

#[tokio::test]
async fn a_node_that_does_not_answer_any_more_is_told_of() {
    let node = Node::start().await;
    let mut browser = Browser::start().await;
    let mut page = browser.open(&url(&node), PHONE_AT_NIGHT).await;
    let text = page.shows(&["Ready"]).await;
    assert!(!text.contains("No response"), "{text}");
    node.kill();
    page.shows(&["No response since", "Showing older data", "Ready"])
        .await;
    assert_eq!(
        page.evaluate("document.title").await,
        "No response · gradestore"
    );
    page.picture("silent-night").await;
}

#[tokio::test]
async fn what_others_say_of_themselves_is_text() {
    let broker = Broker::start().await;
    let [a] = broker.replicas().await;
    let status = a.ops("/status").await.json();
    let attack =
        "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>";
    // Another replica of the cluster, which has the password.
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
    let (key, mut said) = (ClusterKey::derive(PASSWORD), hostile.clone());
    let hostile = serde_json::to_value(hostile).unwrap();
    let _answering = answering(&broker, move |nonce| {
        said.mac = Some(key.sign_announcement(&said, nonce));
        vec![serde_json::to_vec(&said).unwrap().into()]
    })
    .await;
    status_where(&a, "the hostile peer", |status| {
        status["peers"][0]["node"] == hostile["node"]
    })
    .await;

    let [node, version, write_url] =
        ["node", "version", "url"].map(|key| hostile[key].as_str().unwrap());
    // The page capitalizes the name of a state.
    let state = "Ready</td><iframe src=/status></iframe>";
    let words = [node, version, write_url, state];
    let mut browser = Browser::start().await;
    for (name, look) in LOOKS {
        let mut page = browser.open(&url(&a), look).await;
        page.shows(&words).await;
        let elements =
            "document.querySelectorAll('img, iframe, td script, th script, main style').length";
        assert_eq!(page.evaluate(elements).await, 0, "{name}");
        let headings = "document.querySelectorAll('h1').length";
        assert_eq!(page.evaluate(headings).await, 1, "{name}");
        let title = page.evaluate("document.title").await;
        assert!(title.as_str().unwrap().starts_with("Ready"), "{title}");
        page.picture(&format!("hostile-{name}")).await;
        assert_eq!(page.complaints(), [] as [Value; 0]);
    }
    // Taken over by the script, it is text as well.
    let mut page = browser.open(&url(&a), Look::LIGHT).await;
    let position = a.set(r#"{"user_id":"x","spp":1}"#).await.position();
    page.shows(&[&format!("log ends at {position}"), words[0]])
        .await;
    assert_eq!(
        page.evaluate("document.querySelectorAll('img').length")
            .await,
        0
    );
}
