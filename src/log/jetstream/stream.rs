//! The configuration of the stream that holds the log, for its creation and its checks.

use std::time::Duration;

use async_nats::jetstream::stream::{
    Config, DiscardPolicy, PersistenceMode, RetentionPolicy, StorageType,
};

use super::config::JetStreamConfig;
use super::setup_error::SetupError;
use crate::log::{LogId, RandomId, Seq};

/// How long the broker remembers message ids.
const DUPLICATE_WINDOW: Duration = Duration::from_secs(120);
/// The least value of --log-retention.
const RETENTION_MIN: Duration = Duration::from_secs(60);

/// The largest message that the stream accepts, including headers: twice the largest batch. It is
/// well below the bytes of a pull request, because a larger message would never be delivered.
const MESSAGE_BYTES_MAX: i32 = 2 << 20;

/// The key of the log's id in the stream's metadata.
const LOG_ID_KEY: &str = "gradestore-log-id";

/// The log that the stream holds, if its metadata has a valid id.
pub(super) fn log_id(config: &Config) -> Option<LogId> {
    let id = config.metadata.get(LOG_ID_KEY)?;
    RandomId::parse(id).map(|_| LogId(id.as_str().into()))
}

/// Checks the stream's configuration and returns the log that it holds.
///
/// # Errors
/// A setting differs, or the log has no id.
pub(super) fn check_start(config: &JetStreamConfig, found: &Config) -> Result<LogId, SetupError> {
    check(&wanted(config, None, None), found, |_| true)?;
    log_id(found).ok_or_else(|| SetupError::NoLogId {
        stream: config.stream.clone(),
        key: LOG_ID_KEY,
    })
}

/// Checks the settings that the log's history depends on. Limits may change while replicas run.
///
/// # Errors
/// A setting differs.
pub(super) fn check_running(config: &JetStreamConfig, found: &Config) -> Result<(), SetupError> {
    const LIMITS: [&str; 4] = [
        "max_age",
        "num_replicas",
        "duplicate_window",
        "max_msg_size",
    ];
    let matters = |setting: &str| !LIMITS.contains(&setting);
    check(&wanted(config, None, None), found, matters)
}

/// The configuration for a new stream with a new log. With a `base` its first message will be
/// `base` + 1.
pub(super) fn new_stream(config: &JetStreamConfig, log: RandomId, base: Option<Seq>) -> Config {
    wanted(config, Some(log), base)
}

fn wanted(config: &JetStreamConfig, log: Option<RandomId>, base: Option<Seq>) -> Config {
    Config {
        name: config.stream.clone(),
        subjects: vec![config.subject()],
        storage: StorageType::File,
        retention: RetentionPolicy::Limits,
        discard: DiscardPolicy::Old,
        max_age: config.retention,
        max_messages: -1,
        max_bytes: -1,
        max_messages_per_subject: -1,
        max_message_size: MESSAGE_BYTES_MAX,
        num_replicas: config.replicas,
        // The broker rejects a window that is longer than the retention.
        duplicate_window: DUPLICATE_WINDOW.min(config.retention),
        metadata: log
            .map(|log| (LOG_ID_KEY.to_owned(), log.to_string()))
            .into_iter()
            .collect(),
        deny_delete: true,
        deny_purge: true,
        description: Some("gradestore: batches of grades, in order".to_owned()),
        first_sequence: base.map(|base| base + 1),
        ..Config::default()
    }
}

/// Compares the settings that the log depends on and that `matters` selects. Limits on bytes and
/// messages are left to the operator: a replica notices if it falls behind the stream's first
/// message.
#[expect(clippy::too_many_lines, reason = "a table of settings")]
fn check(
    wanted: &Config,
    found: &Config,
    matters: impl Fn(&str) -> bool,
) -> Result<(), SetupError> {
    let stream = &wanted.name;
    let edit = |flag: &str| format!("nats stream edit {stream} {flag}");
    let replace =
        || format!("choose another --stream, or remove this one: nats stream rm {stream}");
    let window = nats_duration(wanted.duplicate_window);
    let flags = |flag: bool| flag.to_string();
    let count = |limit: i64| match limit {
        ..=0 => "no limit".to_owned(),
        _ => limit.to_string(),
    };
    let async_writes = |config: &Config| config.persist_mode == Some(PersistenceMode::Async);
    let sources = |config: &Config| config.mirror.is_some() || config.sources.is_some();
    let rows = [
        (
            "subjects",
            wanted.subjects.join(", "),
            found.subjects.join(", "),
            replace(),
        ),
        (
            "storage",
            format!("{:?}", wanted.storage),
            format!("{:?}", found.storage),
            replace(),
        ),
        (
            "retention",
            format!("{:?}", wanted.retention),
            format!("{:?}", found.retention),
            replace(),
        ),
        (
            "max_age",
            nats_duration(wanted.max_age),
            nats_duration(found.max_age),
            max_age_fix(
                found.max_age,
                edit(&format!("--max-age {}", nats_duration(wanted.max_age))),
            ),
        ),
        (
            "num_replicas",
            wanted.num_replicas.to_string(),
            found.num_replicas.to_string(),
            format!(
                "start with --replicas {}, or {}",
                found.num_replicas,
                edit(&format!("--replicas {}", wanted.num_replicas))
            ),
        ),
        (
            "duplicate_window",
            window.clone(),
            nats_duration(found.duplicate_window),
            edit(&format!("--dupe-window {window}")),
        ),
        (
            "max_msgs_per_subject",
            count(wanted.max_messages_per_subject),
            count(found.max_messages_per_subject),
            edit("--max-msgs-per-subject -1"),
        ),
        (
            "max_msg_size",
            count(wanted.max_message_size.into()),
            count(found.max_message_size.into()),
            edit(&format!("--max-msg-size {MESSAGE_BYTES_MAX}")),
        ),
        (
            "deny_delete",
            flags(wanted.deny_delete),
            flags(found.deny_delete),
            edit("--deny-delete"),
        ),
        (
            "deny_purge",
            flags(wanted.deny_purge),
            flags(found.deny_purge),
            edit("--deny-purge"),
        ),
        (
            "allow_rollup_hdrs",
            flags(wanted.allow_rollup),
            flags(found.allow_rollup),
            replace(),
        ),
        (
            "allow_msg_ttl",
            flags(wanted.allow_message_ttl),
            flags(found.allow_message_ttl),
            replace(),
        ),
        (
            "no_ack",
            flags(wanted.no_ack),
            flags(found.no_ack),
            edit("--ack"),
        ),
        (
            "sealed",
            flags(wanted.sealed),
            flags(found.sealed),
            replace(),
        ),
        (
            "persist_mode async",
            flags(async_writes(wanted)),
            flags(async_writes(found)),
            replace(),
        ),
        (
            "mirror or sources",
            flags(sources(wanted)),
            flags(sources(found)),
            replace(),
        ),
    ];
    let differing = rows
        .into_iter()
        .find(|(setting, wanted, found, _)| matters(setting) && wanted != found);
    match differing {
        None => Ok(()),
        Some((setting, wanted, found, fix)) => Err(SetupError::WrongSetting {
            stream: stream.clone(),
            setting,
            wanted,
            found,
            fix,
        }),
    }
}

/// The fix for a retention of `found`. A flag can't be set to a shorter one than its least.
fn max_age_fix(found: Duration, edit: String) -> String {
    match found >= RETENTION_MIN {
        true => format!(
            "start with --log-retention {}, or {edit}",
            nats_duration(found)
        ),
        false => edit,
    }
}

/// A duration as the nats command and the flags of this program read it: in hours if they are
/// whole, else in the largest smaller unit of which it is a whole number.
fn nats_duration(duration: Duration) -> String {
    const UNITS: [(&str, u128); 6] = [
        ("h", 3_600_000_000_000),
        ("m", 60_000_000_000),
        ("s", 1_000_000_000),
        ("ms", 1_000_000),
        ("us", 1000),
        ("ns", 1),
    ];
    let ns = duration.as_nanos();
    let whole = UNITS
        .iter()
        .find(|(_, unit)| ns > 0 && ns.is_multiple_of(*unit));
    whole.map_or_else(
        || "0s".to_owned(),
        |(name, unit)| format!("{}{name}", ns / unit),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Changes one setting.
    type SettingChange = fn(&mut Config);

    #[test]
    fn a_setting_that_differs_is_named_with_a_fix() {
        let config = JetStreamConfig {
            servers: "nats://127.0.0.1".parse().unwrap(),
            creds: None,
            stream: "GRADES".to_owned(),
            replicas: 1,
            retention: Duration::from_secs(24 * 3600),
            expect_peers: 1,
            peers: Vec::new(),
            write_silence_max: Duration::from_secs(12),
            wal: None,
        };
        let wanted = wanted(&config, None, None);
        assert!(check(&wanted, &wanted, |_| true).is_ok());
        let changes: [(&str, SettingChange); 6] = [
            ("storage", |found| found.storage = StorageType::Memory),
            ("max_age", |found| found.max_age = Duration::from_secs(3600)),
            ("deny_purge", |found| found.deny_purge = false),
            ("subjects", |found| found.subjects.push("x".to_owned())),
            ("num_replicas", |found| found.num_replicas = 3),
            ("max_msgs_per_subject", |found| {
                found.max_messages_per_subject = 1
            }),
        ];
        for (name, change) in changes {
            let mut found = wanted.clone();
            change(&mut found);
            let error = check(&wanted, &found, |_| true).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains("GRADES"), "{error}");
        }
        let with_age = |seconds| {
            let mut found = wanted.clone();
            found.max_age = Duration::from_secs(seconds);
            check(&wanted, &found, |_| true).unwrap_err().to_string()
        };
        let fix = "; start with --log-retention 48h, or nats stream edit GRADES --max-age 24h";
        assert!(
            with_age(48 * 3600).ends_with(fix),
            "{}",
            with_age(48 * 3600)
        );
        // The flag takes no time without limit.
        let fix = "max_age 0s, expected 24h; nats stream edit GRADES --max-age 24h";
        assert!(with_age(0).ends_with(fix), "{}", with_age(0));
        let mut bounded = wanted.clone();
        (bounded.max_bytes, bounded.max_messages) = (1 << 30, 1 << 20);
        assert!(check(&wanted, &bounded, |_| true).is_ok());
    }
}
