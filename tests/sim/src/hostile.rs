//! Another publisher, which sends arbitrary messages to the log.

use bytes::Bytes;

use crate::broker::Message;
use crate::world::State;

#[derive(Debug, Clone, Copy)]
pub enum HostileMessage {
    /// A header block that the client library can't parse.
    BrokenHeaders(u8),
    /// A header block with a status line, as the server's own messages have.
    Status(u8),
    /// A payload that is not an array of writes.
    NoBatch(u8),
    /// A batch without headers.
    NoHeaders,
    /// A batch under the message id that a replica is about to use, with or without its batch id.
    NextId { as_batch: bool },
    /// A vote: an invented one, or a replay of a replica's.
    Vote { replay: bool },
    /// A batch with this `Grade-Time`, in nanoseconds from now.
    Time(i64),
}

impl HostileMessage {
    pub fn random(rng: &mut fastrand::Rng) -> Self {
        match rng.u8(..10) {
            0 | 1 => Self::BrokenHeaders(rng.u8(..)),
            2 => Self::Status(rng.u8(..)),
            3 => Self::NoBatch(rng.u8(..)),
            4 => Self::NoHeaders,
            5 | 6 => Self::NextId {
                as_batch: rng.bool(),
            },
            7 | 8 => Self::Vote { replay: rng.bool() },
            _ => Self::Time(rng.i64(-10_000_000_000..1_000_000_000)),
        }
    }

    /// Whether the client library delivers it.
    pub fn is_readable(self) -> bool {
        !matches!(self, Self::BrokenHeaders(_) | Self::Status(_))
    }

    /// Publishes it, if the stream accepts messages.
    pub fn publish(self, state: &mut State) {
        let faults = &state.broker.faults;
        let rejecting = faults.no_leader > 0
            || faults.no_quorum > 0
            || faults.full > 0
            || faults.gone > 0
            || faults.short.is_some();
        if !rejecting && state.broker.up {
            let message = self.message(state);
            let _ = state.publish(message, false);
        }
    }

    fn message(self, state: &mut State) -> Message {
        let value = 900_000_000 + (state.next_id() >> 64);
        let mut payload = format!(r#"[{{"user_id":"user-1","spp":{value}}}]"#);
        let mut id = None;
        let block = match self {
            Self::BrokenHeaders(which) => {
                let blocks: [&[u8]; 4] = [
                    b"NATS/1.0\r\nTrace Id: 1\r\n\r\n",
                    b"NATS/1.0\r\nbad header line\r\n\r\n",
                    b"NATS/1.0\r\nA: \xe9\r\n\r\n",
                    b"\r\n",
                ];
                Some(blocks[usize::from(which) % blocks.len()].to_vec())
            }
            Self::Status(which) => {
                let lines = ["100 Idle Heartbeat", "503", "404 No Messages"];
                let line = lines[usize::from(which) % lines.len()];
                Some(format!("NATS/1.0 {line}\r\nGrade-Format: 1\r\n\r\n").into_bytes())
            }
            Self::NoBatch(which) => {
                let payloads = ["", "{}", "[1]", r#"[{"spp":1}]"#];
                payload = payloads[usize::from(which) % payloads.len()].to_owned();
                Some(b"NATS/1.0\r\nGrade-Format: 1\r\n\r\n".to_vec())
            }
            Self::NoHeaders => None,
            Self::NextId { as_batch } => {
                let last = state.broker.last_id.clone();
                let next = last.as_deref().and_then(next_id);
                let next = next.unwrap_or_else(|| "guess-1".to_owned());
                let batch = match as_batch {
                    true => format!("Grade-Batch: {next}\r\n"),
                    false => String::new(),
                };
                id = Some(Box::from(next.as_str()));
                Some(format!("NATS/1.0\r\n{batch}Nats-Msg-Id: {next}\r\n\r\n").into_bytes())
            }
            Self::Vote { replay } => {
                let replayed = state.broker.last_vote().filter(|_| replay);
                let vote = replayed.unwrap_or_else(|| {
                    let (replica, digest) = (state.next_id(), state.next_id());
                    let last = state.broker.last();
                    let (seq, chain) = last.map(|last| (last.seq, last.chain)).unwrap_or_default();
                    format!("{replica:032x} {seq} {chain} {digest:032x} 5 {:032x}", 0)
                });
                Some(format!("NATS/1.0\r\nGrade-Checkpoint: {vote}\r\n\r\n").into_bytes())
            }
            Self::Time(from_now) => {
                let time_ns = state.broker.now_ns().saturating_add_signed(from_now);
                Some(format!("NATS/1.0\r\nGrade-Time: {time_ns}\r\n\r\n").into_bytes())
            }
        };
        Message {
            header_block: block.map(Bytes::from),
            payload: payload.into(),
            id,
            expected_last: None,
            sender: None,
        }
    }
}

/// The id after `id`.
fn next_id(id: &str) -> Option<String> {
    let (writer, seq) = id.split_once('-')?;
    let seq: u64 = seq.parse().ok()?;
    Some(format!("{writer}-{}", seq + 1))
}
