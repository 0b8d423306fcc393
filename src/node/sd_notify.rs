//! Reports the state of the node to a service manager: systemd with `Type=notify`, or another one that
//! sets `NOTIFY_SOCKET`.
//!
//! The node counts as started once it serves reads, as in `/readyz`. Until then it extends the start
//! timeout again and again, because a restore may take long.

use std::convert::Infallible;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::time::Instant;

use crate::http::ops::StartupProgress;
use crate::replication::RestoreTracker;
use crate::replication::state::{NodeState, Readiness, Unready};

/// How often the state is checked for changes.
const CHECK_EVERY: Duration = Duration::from_millis(100);
/// How often the start timeout is extended, and by how much.
const EXTEND_EVERY: Duration = Duration::from_secs(5);
const EXTEND_BY_US: u32 = 30_000_000;

/// Extends the start timeout while the log is being opened; never returns.
pub async fn report_opening(progress: &StartupProgress) -> Infallible {
    let mut every = tokio::time::interval(EXTEND_EVERY);
    loop {
        every.tick().await;
        let status = unready_line(&progress.unready());
        notify(&[
            NotifyState::ExtendTimeoutUsec(EXTEND_BY_US),
            NotifyState::Status(&status),
        ]);
    }
}

/// Reports the state of the node while it runs; never returns if there is a service manager.
pub async fn report(readiness: Readiness, restore: RestoreTracker) {
    if !has_service_manager() {
        return;
    }
    let watchdog = sd_notify::watchdog_enabled().map(|within| within / 2);
    let (mut reported, mut ready) = (String::new(), false);
    let mut extended: Option<Instant> = None;
    let mut watchdog_sent: Option<Instant> = None;
    let due = |last: Option<Instant>, every| last.is_none_or(|last| last.elapsed() >= every);
    let check_every = watchdog.map_or(CHECK_EVERY, |every| every.min(CHECK_EVERY));
    let mut every = tokio::time::interval(check_every);
    loop {
        every.tick().await;
        let mut changes = Vec::new();
        if !ready && readiness.check().is_ok() {
            ready = true;
            changes.push(NotifyState::Ready);
        }
        if !ready && due(extended, EXTEND_EVERY) {
            extended = Some(Instant::now());
            changes.push(NotifyState::ExtendTimeoutUsec(EXTEND_BY_US));
        }
        // This task shares its threads with all others, so if it runs, the others can run.
        if let Some(watchdog) = watchdog
            && due(watchdog_sent, watchdog)
        {
            watchdog_sent = Some(Instant::now());
            changes.push(NotifyState::Watchdog);
        }
        let status = status_line(&readiness, &restore);
        if status != reported {
            reported = status;
            changes.push(NotifyState::Status(&reported));
        }
        if !changes.is_empty() {
            notify(&changes);
        }
    }
}

/// Reports that the node stops.
pub fn stopping() {
    let status = NotifyState::Status(NodeState::Stopping.name());
    notify(&[NotifyState::Stopping, status]);
}

/// The state in one line.
fn status_line(readiness: &Readiness, restore: &RestoreTracker) -> String {
    let Err(unready) = readiness.check() else {
        return NodeState::Ready.name().to_owned();
    };
    let mut status = unready_line(&unready);
    if let Some(restore) = restore.current().filter(|restore| restore.took.is_none()) {
        let (rows, expected) = (restore.progress.rows(), restore.progress.rows_expected());
        status.push_str(&format!(", {rows} of about {expected} rows"));
    }
    status
}

/// The state and the reason in one line. A reason may contain text of other nodes, and a line break
/// would start another message.
fn unready_line(unready: &Unready) -> String {
    format!("{}: {}", unready.state, unready.reason).replace(char::is_control, " ")
}

fn has_service_manager() -> bool {
    std::env::var_os("NOTIFY_SOCKET").is_some_and(|path| !path.is_empty())
}

fn notify(changes: &[NotifyState<'_>]) {
    if has_service_manager()
        && let Err(error) = sd_notify::notify(changes)
    {
        tracing::warn!(%error, "sd_notify failed");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_one_line_with_any_reason() {
        let (readiness, restore) = (Readiness::starting(""), RestoreTracker::default());
        readiness.set_ready();
        assert_eq!(status_line(&readiness, &restore), "ready");
        readiness.block(NodeState::NoSource, "answered 500: a\nREADY=1\r\n");
        let line = "no-source: answered 500: a READY=1  ";
        assert_eq!(status_line(&readiness, &restore), line);
    }
}
