//! A headless Chromium, controlled through the DevTools protocol on a pipe.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{ChildStdin, Command, Stdio};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::mpsc;

use crate::harness::Process;
use crate::harness::wire::{eventually, with_timeout};

/// Installed by tests/install.sh.
const PROGRAMS: [&str; 3] = ["chromium", "chromium-browser", "google-chrome"];
/// The protocol uses the file descriptors 3 and 4.
const PIPE_SCRIPT: &str = r#"exec "$@" 3<&0 4>&1 </dev/null >/dev/null"#;
/// In CSS pixels.
const PHONE: (u32, u32) = (390, 844);
const DESKTOP: (u32, u32) = (1000, 800);

/// Chromium as a child process with its own profile.
pub(crate) struct Browser {
    to: ChildStdin,
    from: mpsc::UnboundedReceiver<Value>,
    calls: u64,
    /// Exceptions in pages, and violations of their content security policy.
    browser_errors: Vec<Value>,
    /// Dropped before the profile.
    _process: Process,
    _profile: TempDir,
}

/// How a page is rendered.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PageMode {
    pub(crate) script: bool,
    pub(crate) dark: bool,
    pub(crate) phone: bool,
}

impl PageMode {
    pub(crate) const LIGHT: Self = Self {
        script: true,
        dark: false,
        phone: false,
    };
}

/// An open page.
pub(crate) struct Page<'a> {
    browser: &'a mut Browser,
    session: String,
}

impl Browser {
    pub(crate) async fn start() -> Self {
        let program = PROGRAMS.iter().find(|program| {
            let mut there = Command::new("sh");
            there.args(["-c", "command -v \"$0\" >/dev/null", program]);
            there.status().unwrap().success()
        });
        let program =
            program.expect("no Chromium: tests/install.sh gets it, or apt-get install chromium");
        let profile = tempfile::tempdir().unwrap();
        let mut command = Command::new("sh");
        command
            .args(["-c", PIPE_SCRIPT, "sh", program])
            .args(["--headless=new", "--no-sandbox", "--remote-debugging-pipe"])
            .args([
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--no-proxy-server",
            ])
            .args([
                "--disable-background-networking",
                "--disable-component-update",
            ])
            .args(["--no-first-run", "--hide-scrollbars", "--lang=en"])
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .env("HOME", profile.path());
        let command = command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = Process(command.stderr(Stdio::null()).spawn().unwrap());
        let to = process.0.stdin.take().unwrap();
        let messages = BufReader::new(process.0.stdout.take().unwrap()).split(0);
        let (printed, from) = mpsc::unbounded_channel();
        std::thread::spawn(move || {
            for message in messages.map_while(Result::ok) {
                if printed
                    .send(serde_json::from_slice(&message).unwrap())
                    .is_err()
                {
                    break;
                }
            }
        });
        Self {
            to,
            from,
            calls: 0,
            browser_errors: Vec::new(),
            _process: process,
            _profile: profile,
        }
    }

    /// Opens `url` and waits until it is loaded.
    pub(crate) async fn open(&mut self, url: &str, mode: PageMode) -> Page<'_> {
        let context = self
            .call(None, "Target.createBrowserContext", json!({}))
            .await;
        let blank = json!({
            "url": "about:blank", "browserContextId": context["browserContextId"],
        });
        let target = self.call(None, "Target.createTarget", blank).await;
        let attach = json!({"targetId": target["targetId"], "flatten": true});
        let attached = self.call(None, "Target.attachToTarget", attach).await;
        let session = attached["sessionId"].as_str().unwrap().to_owned();
        let mut page = Page {
            browser: self,
            session,
        };
        let (width, height) = if mode.phone { PHONE } else { DESKTOP };
        let scheme = if mode.dark { "dark" } else { "light" };
        for (method, params) in [
            ("Page.enable", json!({})),
            ("Runtime.enable", json!({})),
            ("Log.enable", json!({})),
            (
                "Emulation.setDeviceMetricsOverride",
                json!({
                    "width": width, "height": height, "deviceScaleFactor": 1, "mobile": mode.phone,
                }),
            ),
            (
                "Emulation.setEmulatedMedia",
                json!({
                    "features": [{"name": "prefers-color-scheme", "value": scheme}],
                }),
            ),
            (
                "Emulation.setScriptExecutionDisabled",
                json!({"value": !mode.script}),
            ),
            ("Page.navigate", json!({"url": url})),
        ] {
            page.call(method, params).await;
        }
        eventually(url, async || {
            let there = format!("location.href === '{url}'");
            (page.evaluate(&there).await == true).then_some(())
        })
        .await;
        page
    }

    async fn call(&mut self, session: Option<&str>, method: &str, params: Value) -> Value {
        let response = self.try_call(session, method, params).await;
        response.unwrap_or_else(|error| panic!("{method}: {error}"))
    }

    async fn try_call(
        &mut self,
        session: Option<&str>,
        method: &str,
        params: Value,
    ) -> Result<Value, String> {
        self.calls += 1;
        let id = self.calls;
        let mut call = json!({"id": id, "method": method, "params": params});
        if let Some(session) = session {
            call["sessionId"] = session.into();
        }
        self.to.write_all(format!("{call}\0").as_bytes()).unwrap();
        loop {
            let mut printed = with_timeout(method, self.from.recv())
                .await
                .expect("Chromium ended");
            if printed["id"] == id {
                return match printed["error"]["message"].as_str() {
                    Some(error) => Err(error.to_owned()),
                    None => Ok(printed["result"].take()),
                };
            }
            let event = printed["method"].as_str().unwrap_or_default();
            if matches!(event, "Runtime.exceptionThrown" | "Log.entryAdded") {
                self.browser_errors.push(printed["params"].take());
            }
        }
    }
}

impl Page<'_> {
    async fn call(&mut self, method: &str, params: Value) -> Value {
        let session = Some(self.session.as_str());
        self.browser.call(session, method, params).await
    }

    /// The value of a JavaScript expression once the page is complete.
    pub(crate) async fn evaluate(&mut self, expression: &str) -> Value {
        // A page without script reloads itself, perhaps at this moment.
        let when_whole =
            format!("document.readyState === 'complete' ? {{value: {expression}}} : null");
        let params = json!({"expression": when_whole, "returnByValue": true});
        eventually(expression, async || {
            let session = Some(self.session.as_str());
            let evaluated = self
                .browser
                .try_call(session, "Runtime.evaluate", params.clone());
            match evaluated.await {
                Ok(mut response) => {
                    assert!(response["exceptionDetails"].is_null(), "{response}");
                    let found = response["result"]["value"].take();
                    found.is_object().then(|| found["value"].clone())
                }
                Err(error) => {
                    let gone = error.contains("navigated") || error.contains("context");
                    assert!(gone, "{expression}: {error}");
                    None
                }
            }
        })
        .await
    }

    /// The visible text.
    pub(crate) async fn text(&mut self) -> String {
        let text = self.evaluate("document.body.innerText").await;
        text.as_str().unwrap().to_owned()
    }

    /// Waits until the text contains all of `expected`; returns the text.
    pub(crate) async fn wait_for_text(&mut self, expected: &[&str]) -> String {
        eventually(&format!("{expected:?}"), async || {
            let text = self.text().await;
            expected
                .iter()
                .all(|expected| text.contains(expected))
                .then_some(text)
        })
        .await
    }

    /// Saves a screenshot of the whole page as `target/tmp/page/NAME.png`.
    pub(crate) async fn screenshot(&mut self, name: &str) -> PathBuf {
        let params = json!({"format": "png", "captureBeyondViewport": true});
        let picture = self.call("Page.captureScreenshot", params).await;
        let png = STANDARD.decode(picture["data"].as_str().unwrap()).unwrap();
        let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("page");
        fs::create_dir_all(&dir).unwrap();
        let path = dir.join(format!("{name}.png"));
        fs::write(&path, png).unwrap();
        path
    }

    /// Exceptions and policy violations so far.
    pub(crate) fn browser_errors(&self) -> &[Value] {
        &self.browser.browser_errors
    }
}
