//! Tells a service manager how the node is: systemd with `Type=notify`, or whatever else listens at
//! `NOTIFY_SOCKET`. Without one there is nobody to tell.
//!
//! The node counts as started once it answers reads, as `/readyz` has it. Until then it asks for more
//! time again and again: a restore takes as long as it takes.

use std::convert::Infallible;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::time::Instant;

use crate::replication::RestoreTracker;
use crate::replication::state::Readiness;

/// How often it is looked whether there is something new to tell.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How often more time is asked for, and how much.
const EXTEND_EVERY: Duration = Duration::from_secs(5);
const EXTEND_BY_US: u32 = 30_000_000;

/// Asks for time while the log is being opened, for ever.
pub async fn opening() -> Infallible {
    let mut every = tokio::time::interval(EXTEND_EVERY);
    let status = NotifyState::Status("starting: the log is being opened");
    let news = [NotifyState::ExtendTimeoutUsec(EXTEND_BY_US), status];
    loop {
        every.tick().await;
        tell(&news);
    }
}

/// Tells of the node while it runs, for ever.
pub async fn report(readiness: Readiness, restore: RestoreTracker) {
    if std::env::var_os("NOTIFY_SOCKET").is_none() {
        return;
    }
    let watchdog = sd_notify::watchdog_enabled().map(|within| within / 2);
    let (mut told, mut ready) = (String::new(), false);
    let mut extended: Option<Instant> = None;
    let mut barked: Option<Instant> = None;
    let due = |last: Option<Instant>, every| last.is_none_or(|last| last.elapsed() >= every);
    let look_every = watchdog.map_or(LOOK_EVERY, |every| every.min(LOOK_EVERY));
    let mut every = tokio::time::interval(look_every);
    loop {
        every.tick().await;
        let mut news = Vec::new();
        if !ready && readiness.check().is_ok() {
            ready = true;
            news.push(NotifyState::Ready);
        }
        if !ready && due(extended, EXTEND_EVERY) {
            extended = Some(Instant::now());
            news.push(NotifyState::ExtendTimeoutUsec(EXTEND_BY_US));
        }
        // That this task runs says that the others may: they share their threads.
        if let Some(watchdog) = watchdog
            && due(barked, watchdog)
        {
            barked = Some(Instant::now());
            news.push(NotifyState::Watchdog);
        }
        let now = status(&readiness, &restore);
        if now != told {
            told = now;
            news.push(NotifyState::Status(&told));
        }
        if !news.is_empty() {
            tell(&news);
        }
    }
}

/// Tells that the node ends.
pub fn stopping() {
    tell(&[NotifyState::Stopping, NotifyState::Status("stopping")]);
}

/// The state in a line.
fn status(readiness: &Readiness, restore: &RestoreTracker) -> String {
    let Err(unready) = readiness.check() else {
        return "ready".to_owned();
    };
    let mut status = format!("{}: {}", unready.state, unready.reason);
    if let Some(restore) = restore.current().filter(|restore| restore.took.is_none()) {
        let (rows, expected) = (restore.progress.rows(), restore.progress.rows_expected());
        status.push_str(&format!(", {rows} of about {expected} rows"));
    }
    // Another line would be another message, and some reasons are what others said.
    status.replace(char::is_control, " ")
}

fn tell(news: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(news) {
        tracing::warn!(%error, "service manager not told");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replication::state::NodeState;

    #[test]
    fn a_state_is_one_line_whatever_others_said() {
        let (readiness, restore) = (Readiness::starting(""), RestoreTracker::default());
        readiness.set_ready();
        assert_eq!(status(&readiness, &restore), "ready");
        readiness.block(NodeState::NoSource, "answered 500: a\nREADY=1\r\n");
        let line = "no-source: answered 500: a READY=1  ";
        assert_eq!(status(&readiness, &restore), line);
    }
}
