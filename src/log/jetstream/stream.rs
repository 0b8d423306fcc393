//! The stream that holds the log: made if it is not there, checked if it is.

use std::time::Duration;

use async_nats::jetstream::context::{CreateStreamErrorKind, GetStreamErrorKind};
use async_nats::jetstream::stream::{
    Config, DiscardPolicy, Info, PersistenceMode, RetentionPolicy, StorageType,
};
use async_nats::jetstream::{Context, ErrorCode};

use super::{JetStreamConfig, SUBJECT, SetupError};
use crate::log::{LogId, Seq};

/// How long the broker knows a batch's id again. Nothing is sent twice later than a quarter of it.
const DUPLICATE_WINDOW: Duration = Duration::from_secs(120);

/// The largest message that the stream takes, headers and all: twice the largest batch, and well
/// below what a reader asks for at once, as one that is larger would never be sent to it.
const MESSAGE_BYTES_MAX: i32 = 2 << 20;

/// What matters about a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Facts {
    /// Its name and when it was made: one made anew is another log.
    pub(super) id: LogId,
    /// Its oldest message; one past the last when there is none.
    pub(super) first: Seq,
    /// Its last message.
    pub(super) last: Seq,
}

impl Facts {
    pub(super) fn of(info: &Info) -> Self {
        let created_ns = info.created.unix_timestamp_nanos();
        let (state, name) = (&info.state, &info.config.name);
        Self {
            id: LogId(format!("jetstream-{name}-{created_ns}").into()),
            first: match state.messages {
                0 => state.last_sequence + 1,
                _ => state.first_sequence,
            },
            last: state.last_sequence,
        }
    }
}

/// The stream's duplicate window: the broker refuses one longer than the retention.
pub(super) fn duplicate_window(config: &JetStreamConfig) -> Duration {
    DUPLICATE_WINDOW.min(config.retention)
}

/// Makes the stream, or checks the one that is there. With a `base` its first message is to be
/// `base` + 1.
pub(super) async fn set_up(
    context: &Context,
    config: &JetStreamConfig,
    base: Option<Seq>,
) -> Result<Facts, SetupError> {
    let refused = |why: String| SetupError::Refused {
        stream: config.stream.clone(),
        why: why.into(),
    };
    let wanted = wanted(config, base);
    let info = match context.get_stream(&config.stream).await {
        Ok(stream) => stream.cached_info().clone(),
        Err(error) => match error.kind() {
            GetStreamErrorKind::JetStream(error)
                if error.error_code() == ErrorCode::STREAM_NOT_FOUND =>
            {
                // Another replica may be first; asking for the same stream again is no error.
                let made = context.create_stream(wanted.clone()).await;
                let made = made.map_err(|error| match error.kind() {
                    CreateStreamErrorKind::TimedOut => SetupError::away(config, &error),
                    _ => refused(error.to_string()),
                })?;
                tracing::info!(stream = config.stream, "stream made");
                made.cached_info().clone()
            }
            GetStreamErrorKind::Request => return Err(SetupError::away(config, &error)),
            _ => return Err(refused(error.to_string())),
        },
    };
    check(&wanted, &info.config)?;
    let facts = Facts::of(&info);
    match base {
        Some(base) if facts.first <= facts.last || facts.last != base => {
            Err(SetupError::NotEmpty {
                stream: config.stream.clone(),
                end: facts.last,
            })
        }
        _ => Ok(facts),
    }
}

fn wanted(config: &JetStreamConfig, base: Option<Seq>) -> Config {
    Config {
        name: config.stream.clone(),
        subjects: vec![SUBJECT.to_owned()],
        storage: StorageType::File,
        retention: RetentionPolicy::Limits,
        discard: DiscardPolicy::Old,
        max_age: config.retention,
        max_messages: -1,
        max_bytes: -1,
        max_messages_per_subject: -1,
        max_message_size: MESSAGE_BYTES_MAX,
        num_replicas: config.replicas,
        duplicate_window: duplicate_window(config),
        deny_delete: true,
        deny_purge: true,
        description: Some("gradestore: batches of grades, in order".to_owned()),
        first_sequence: base.map(|base| base + 1),
        ..Config::default()
    }
}

/// Compares what the log depends on. What only limits how much is held (bytes, messages) may be an
/// operator's choice: falling behind it is noticed when it happens.
fn check(wanted: &Config, found: &Config) -> Result<(), SetupError> {
    let stream = &wanted.name;
    let edit = |flag: &str| format!("nats stream edit {stream} {flag}");
    let anew = || format!("choose another --stream, or remove this one: nats stream rm {stream}");
    let age = |age: Duration| humantime::format_duration(age).to_string();
    let window = age(wanted.duplicate_window);
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
            anew(),
        ),
        (
            "storage",
            format!("{:?}", wanted.storage),
            format!("{:?}", found.storage),
            anew(),
        ),
        (
            "retention",
            format!("{:?}", wanted.retention),
            format!("{:?}", found.retention),
            anew(),
        ),
        (
            "max_age",
            age(wanted.max_age),
            age(found.max_age),
            format!(
                "start with --log-retention {}, or {}",
                age(found.max_age).replace(' ', ""),
                edit(&format!(
                    "--max-age {}",
                    age(wanted.max_age).replace(' ', "")
                ))
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
            age(found.duplicate_window),
            edit(&format!("--dupe-window {}", window.replace(' ', ""))),
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
            anew(),
        ),
        (
            "allow_msg_ttl",
            flags(wanted.allow_message_ttl),
            flags(found.allow_message_ttl),
            anew(),
        ),
        (
            "no_ack",
            flags(wanted.no_ack),
            flags(found.no_ack),
            edit("--ack"),
        ),
        ("sealed", flags(wanted.sealed), flags(found.sealed), anew()),
        (
            "persist_mode async",
            flags(async_writes(wanted)),
            flags(async_writes(found)),
            anew(),
        ),
        (
            "mirror or sources",
            flags(sources(wanted)),
            flags(sources(found)),
            anew(),
        ),
    ];
    let differing = rows
        .into_iter()
        .find(|(_, wanted, found, _)| wanted != found);
    match differing {
        None => Ok(()),
        Some((setting, wanted, found, fix)) => Err(SetupError::Shape {
            stream: stream.clone(),
            setting,
            wanted,
            found,
            fix,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Changes one setting.
    type Change = fn(&mut Config);

    #[test]
    fn a_setting_that_differs_is_named_with_a_fix() {
        let config = JetStreamConfig {
            servers: "nats://127.0.0.1".parse().unwrap(),
            creds: None,
            stream: "GRADES".to_owned(),
            replicas: 1,
            retention: Duration::from_secs(24 * 3600),
        };
        let wanted = wanted(&config, None);
        assert!(check(&wanted, &wanted).is_ok());
        let changes: [(&str, Change); 6] = [
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
            let error = check(&wanted, &found).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains("GRADES"), "{error}");
        }
        let mut bounded = wanted.clone();
        (bounded.max_bytes, bounded.max_messages) = (1 << 30, 1 << 20);
        assert!(check(&wanted, &bounded).is_ok());
    }
}
