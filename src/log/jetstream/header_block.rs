//! The rule for header blocks: whether a block can be read, and which headers it contains.
//!
//! JetStream stores header blocks unparsed, so any client can store one that other clients cannot
//! parse. All replicas must agree whether to apply such a message. This rule decides that, so that
//! it does not depend on the version of a client library.
//!
//! The rule results in the same headers as async-nats 0.51 for every block that this version
//! delivers as an ordinary message. `docs/internals/protocol.md` states the rule for other readers.

use async_nats::{HeaderMap, HeaderName, HeaderValue};

const VERSION: &str = "NATS/1.0";
/// A message with this status is an ordinary one.
const STATUS_OK: &str = "200";

/// Parses a stored header block. Values of the same name keep their order.
///
/// # Errors
/// How the block breaks the rule.
pub fn parse(block: &[u8]) -> Result<HeaderMap, &'static str> {
    let text = str::from_utf8(block).map_err(|_| "the header block is not UTF-8")?;
    let mut lines = text.lines().peekable();
    let version_line = lines.next().unwrap_or_default();
    check_version(version_line)?;
    let mut headers = HeaderMap::new();
    while let Some(line) = lines.next() {
        // An empty line does not end the block.
        if line.is_empty() {
            continue;
        }
        let (name, value) = line.split_once(':').ok_or("a header line has no colon")?;
        let name = header_name(name)?;
        let mut value = value.trim_start().to_owned();
        while let Some(continuation) = lines.next_if(|line| line.starts_with(char::is_whitespace)) {
            value.push_str(continuation);
        }
        headers.append(name, header_value(value.trim_end())?);
    }
    Ok(headers)
}

/// Parses the header block of a message that may have none.
///
/// # Errors
/// How the block breaks the rule.
pub fn parse_optional(block: Option<&[u8]>) -> Result<Option<HeaderMap>, &'static str> {
    block.map(parse).transpose()
}

/// Checks the first line. Servers mark their own messages (heartbeats, timeouts, no responders)
/// with a status there, and pull consumers mistake a stored message with a status for one of these.
fn check_version(line: &str) -> Result<(), &'static str> {
    let status = line
        .strip_prefix(VERSION)
        .ok_or("the header block does not begin with NATS/1.0")?
        .trim();
    let (code, _description) = status.split_once(' ').unwrap_or((status, ""));
    match code.trim() {
        "" | STATUS_OK => Ok(()),
        _ => Err("the header block begins with a status other than 200"),
    }
}

/// A name is visible ASCII without a colon; it may be empty.
fn header_name(name: &str) -> Result<HeaderName, &'static str> {
    let invalid = "a header name has a byte other than visible ASCII";
    match name.bytes().all(|byte| byte.is_ascii_graphic()) {
        true => name.parse().map_err(|_| invalid),
        false => Err(invalid),
    }
}

/// A value has no carriage return: async-nats panics on one.
fn header_value(value: &str) -> Result<HeaderValue, &'static str> {
    let invalid = "a header value has a carriage return";
    match value.contains('\r') {
        true => Err(invalid),
        false => value.parse().map_err(|_| invalid),
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use async_nats::{ConnectOptions, Event, StatusCode, Subscriber};
    use futures_util::{FutureExt, StreamExt};
    use proptest::prelude::*;
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
    use tokio::net::TcpListener;
    use tokio_util::sync::CancellationToken;

    use super::*;

    type Headers = &'static [(&'static str, &'static str)];

    /// Readable blocks, and the headers in them, in order.
    const READABLE: [(&[u8], Headers); 30] = [
        (b"NATS/1.0\r\n\r\n", &[]),
        (b"NATS/1.0", &[]),
        (b"NATS/1.0\r", &[]),
        (b"NATS/1.0\n", &[]),
        (b"NATS/1.0 \t\r\n\r\n", &[]),
        (b"NATS/1.0\r\n\r\n\r\n", &[]),
        // Status 200.
        (b"NATS/1.0 200\r\nA: b\r\n\r\n", &[("A", "b")]),
        (b"NATS/1.0200  OK\r\nA: b\r\n\r\n", &[("A", "b")]),
        // What this program sends, and what others may.
        (
            b"NATS/1.0\r\nGrade-Format: 1\r\nNats-Msg-Id: a-1\r\n\r\n",
            &[("Grade-Format", "1"), ("Nats-Msg-Id", "a-1")],
        ),
        (b"NATS/1.0\r\nTrace-Id: abc\r\n\r\n", &[("Trace-Id", "abc")]),
        // Names are compared byte for byte.
        (
            b"NATS/1.0\r\nGrade-Format: 2\r\ngrade-format: 1\r\n\r\n",
            &[("Grade-Format", "2"), ("grade-format", "1")],
        ),
        // All values of a name are kept.
        (
            b"NATS/1.0\r\nA: 1\r\nB: 2\r\nA: 3\r\n\r\n",
            &[("A", "1"), ("B", "2"), ("A", "3")],
        ),
        // Line ends.
        (b"NATS/1.0\nA: b\nC: d\n\n", &[("A", "b"), ("C", "d")]),
        (b"NATS/1.0\r\nA: b", &[("A", "b")]),
        (b"NATS/1.0\r\nA: b\r", &[("A", "b")]),
        (b"NATS/1.0\r\nA: b\r\r\n\r\r\n", &[("A", "b")]),
        (b"NATS/1.0\r\n\r\nA: b\r\n\r\n", &[("A", "b")]),
        // Space around a value.
        (b"NATS/1.0\r\nA:b\r\n\r\n", &[("A", "b")]),
        (b"NATS/1.0\r\nA: \t b  c \t\r\n\r\n", &[("A", "b  c")]),
        (
            b"NATS/1.0\r\nA:\xc2\xa0b\xe3\x80\x80\r\n\r\n",
            &[("A", "b")],
        ),
        (b"NATS/1.0\r\nA:\r\nB: \r\n\r\n", &[("A", ""), ("B", "")]),
        // Continuation lines are appended as they are.
        (b"NATS/1.0\r\nA: b\r\n c\r\n\td\r\n\r\n", &[("A", "b c\td")]),
        (b"NATS/1.0\r\nA: b \r\n  c\r\n\r\n", &[("A", "b   c")]),
        (b"NATS/1.0\r\nA:\r\n 1\r\n\r\n", &[("A", " 1")]),
        (b"NATS/1.0\r\nA: b\r\n C: d\r\n\r\n", &[("A", "b C: d")]),
        (
            b"NATS/1.0\r\nA: b\r\n\xc2\xa0c\r\n\r\n",
            &[("A", "b\u{a0}c")],
        ),
        // Any character in a value but a carriage return, any visible one in a name but a colon.
        (
            b"NATS/1.0\r\nA: \0\x7f\xc3\xa9:\r\n\r\n",
            &[("A", "\0\x7fé:")],
        ),
        (b"NATS/1.0\r\nA: \x1cb\x1f\r\n\r\n", &[("A", "\x1cb\x1f")]),
        (b"NATS/1.0\r\n!~\"(/@: b\r\n\r\n", &[("!~\"(/@", "b")]),
        (b"NATS/1.0\r\n: b\r\n\r\n", &[("", "b")]),
    ];

    const NOT_UTF8: &str = "not UTF-8";
    const NO_VERSION: &str = "not begin with NATS/1.0";
    const STATUS: &str = "status";
    const NO_COLON: &str = "colon";
    const NAME: &str = "name";
    const RETURN: &str = "carriage return";

    /// Blocks that are not readable, and a word of the reason.
    const UNREADABLE: [(&[u8], &str); 37] = [
        (b"", NO_VERSION),
        (b"\r\n", NO_VERSION),
        (b"\r\nNATS/1.0\r\n\r\n", NO_VERSION),
        (b"A: b\r\n\r\n", NO_VERSION),
        (b" NATS/1.0\r\n\r\n", NO_VERSION),
        (b"nats/1.0\r\n\r\n", NO_VERSION),
        (b"NATS/2.0\r\n\r\n", NO_VERSION),
        (b"NATS/1\r\n\r\n", NO_VERSION),
        (b"\0NATS/1.0\r\n\r\n", NO_VERSION),
        (b"NATS/1.01\r\n\r\n", STATUS),
        (b"NATS/1.0\0\r\n\r\n", STATUS),
        (b"NATS/1.0 100 Idle Heartbeat\r\n\r\n", STATUS),
        (b"NATS/1.0 100 FlowControl Request\r\n\r\n", STATUS),
        (b"NATS/1.0 404 No Messages\r\n\r\n", STATUS),
        (b"NATS/1.0 408 Request Timeout\r\n\r\n", STATUS),
        (b"NATS/1.0 409 Consumer Deleted\r\n\r\n", STATUS),
        (b"NATS/1.0 423 Nats-Pin-Id mismatch\r\n\r\n", STATUS),
        (b"NATS/1.0 503\r\n\r\n", STATUS),
        (b"NATS/1.0503\r\n\r\n", STATUS),
        (b"NATS/1.0 201\r\n\r\n", STATUS),
        (b"NATS/1.0 200\tOK\r\n\r\n", STATUS),
        (b"NATS/1.0 OK\r\n\r\n", STATUS),
        (b"NATS/1.0 0200\r\n\r\n", STATUS),
        (b"NATS/1.0\rA: b\r\n\r\n", STATUS),
        (b"NATS/1.0\r\nA: b\xe9\r\n\r\n", NOT_UTF8),
        (b"NATS/1.0\r\nA: \xed\xa0\x80\r\n\r\n", NOT_UTF8),
        (b"NATS/1.0\r\nbad header line\r\n\r\n", NO_COLON),
        (b"NATS/1.0\r\n\r", NO_COLON),
        (b"NATS/1.0\r\n\r\n b\r\n\r\n", NO_COLON),
        (b"NATS/1.0\r\nTrace Id: 1\r\n\r\n", NAME),
        (b"NATS/1.0\r\nA : b\r\n\r\n", NAME),
        (b"NATS/1.0\r\n A: b\r\n\r\n", NAME),
        (b"NATS/1.0\r\n\xc3\x89: b\r\n\r\n", NAME),
        (b"NATS/1.0\r\nA\0: b\r\n\r\n", NAME),
        (b"NATS/1.0\r\nA\x7f: b\r\n\r\n", NAME),
        (b"NATS/1.0\r\nA: b\rC: d\r\n\r\n", RETURN),
        (b"NATS/1.0\r\nA: b\r\r\n c\r\n\r\n", RETURN),
    ];

    #[test]
    fn golden_blocks_are_read() {
        for (block, wanted) in READABLE {
            let mut headers = HeaderMap::new();
            for (name, value) in wanted {
                headers.append(*name, *value);
            }
            assert_eq!(parse(block), Ok(headers), "{}", block.escape_ascii());
        }
    }

    #[test]
    fn golden_blocks_are_rejected() {
        for (block, wanted) in UNREADABLE {
            let why = parse(block).expect_err(&block.escape_ascii().to_string());
            assert!(why.contains(wanted), "{}: {why}", block.escape_ascii());
        }
    }

    #[test]
    fn the_first_of_several_values_counts() {
        let headers = parse(b"NATS/1.0\r\nGrade-Format: 2\r\nGrade-Format: x\r\n\r\n").unwrap();
        assert_eq!(headers.get("Grade-Format").unwrap().as_str(), "2");
    }

    #[test]
    fn whitespace_is_what_unicode_has_as_white_space() {
        let white_space = "\t\n\u{b}\u{c}\r \u{85}\u{a0}\u{1680}\u{2000}\u{2001}\u{2002}\u{2003}\
                           \u{2004}\u{2005}\u{2006}\u{2007}\u{2008}\u{2009}\u{200a}\u{2028}\
                           \u{2029}\u{202f}\u{205f}\u{3000}";
        for char in ('\0'..='\u{ffff}').filter(|char| *char != '\n') {
            let block = format!("NATS/1.0\r\nA:{char}b{char}\r\n\r\n");
            let value = match white_space.contains(char) {
                true => "b".to_owned(),
                false => format!("{char}b{char}"),
            };
            let headers = parse(block.as_bytes()).unwrap();
            assert_eq!(headers.get("A").unwrap().as_str(), value, "{char:?}");
        }
    }

    #[test]
    fn the_largest_block_is_read() {
        // A server stores no larger one.
        let block = format!("NATS/1.0\r\nA: {}\r\n\r\n", "b".repeat(0xffff - 17));
        assert_eq!(block.len(), 0xffff);
        let headers = parse(block.as_bytes()).unwrap();
        assert_eq!(headers.get("A").unwrap().as_str().len(), 0xffff - 17);
        let lines = format!("NATS/1.0\r\n{}", "A:\r\n".repeat(16_000));
        assert_eq!(
            parse(lines.as_bytes()).unwrap().get_all("A").count(),
            16_000
        );
    }

    #[tokio::test]
    async fn the_client_reads_golden_blocks_alike() {
        let blocks: Vec<_> = READABLE.iter().map(|(block, _)| block.to_vec()).collect();
        compare(&blocks).await;
        let blocks: Vec<_> = UNREADABLE.iter().map(|(block, _)| block.to_vec()).collect();
        compare(&blocks).await;
    }

    /// What a block is put together from.
    const PIECES: &[&[u8]] = &[
        b"NATS/1.0",
        b"Grade-Format",
        b"Nats-Msg-Id",
        b"\n",
        b"\r",
        b":",
        b" ",
        b"\t",
        b"\0",
        b"\x0b",
        b"\x1c",
        b"\x7f",
        b"1",
        b"200",
        b"503",
        b"100 Idle Heartbeat",
        b"-",
        b"\xe9",
        b"\xc2\x85",
        b"\xc2\xa0",
        b"\xc3\xa9",
        b"\xe2\x80\xa8",
    ];

    fn any_block() -> impl Strategy<Value = Vec<u8>> {
        let piece = prop_oneof![
            4 => Just(&b"\r\n"[..]),
            2 => Just(&b": "[..]),
            2 => Just(&b"A"[..]),
            2 => proptest::sample::select(PIECES),
        ];
        let rest = proptest::collection::vec(piece, 0..16);
        let begin = prop_oneof![
            8 => Just(&b"NATS/1.0\r\n"[..]),
            2 => Just(&b"NATS/1.0"[..]),
            1 => Just(&b""[..]),
        ];
        (begin, rest).prop_map(|(begin, rest)| [begin, &rest.concat()].concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            cases: 24,
            failure_persistence: None,
            ..ProptestConfig::default()
        })]

        #[test]
        fn the_client_reads_any_block_alike(
            blocks in proptest::collection::vec(any_block(), 1..64)
        ) {
            let mut runtime = tokio::runtime::Builder::new_current_thread();
            runtime.enable_all().build().unwrap().block_on(compare(&blocks));
        }
    }

    /// Checks that the rule reads `blocks` as the client does.
    async fn compare(blocks: &[Vec<u8>]) {
        for (block, by_client) in blocks.iter().zip(read_by_client(blocks).await) {
            // If this fails after an update of the client, relax the check and keep the rule.
            assert_eq!(parse(block).ok(), by_client, "{}", block.escape_ascii());
        }
    }

    /// The headers that the client finds in each block of an ordinary message.
    async fn read_by_client(blocks: &[Vec<u8>]) -> Vec<Option<HeaderMap>> {
        let mut read = Vec::new();
        while read.len() < blocks.len() {
            read_until_rejected(&blocks[read.len()..], &mut read).await;
        }
        read
    }

    /// Hands `blocks` to one connection of the client, which ends at a block that it cannot parse.
    async fn read_until_rejected(blocks: &[Vec<u8>], read: &mut Vec<Option<HeaderMap>>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let client = async {
            let ended = CancellationToken::new();
            let disconnected = ended.clone();
            let options = ConnectOptions::new().max_reconnects(1);
            let options = options.event_callback(move |event| {
                if matches!(event, Event::Disconnected) {
                    disconnected.cancel();
                }
                async {}
            });
            let client = options.connect(address.to_string()).await.unwrap();
            let mut messages = client.subscribe("blocks").await.unwrap();
            client.flush().await.unwrap();
            let wanted = read.len() + blocks.len();
            while read.len() < wanted {
                let Some(message) = next(&mut messages, &ended).await else {
                    read.push(None);
                    break;
                };
                // As the pull consumer tells ordinary messages from those about its requests.
                let ordinary = message.status.is_none_or(|status| status == StatusCode::OK);
                read.push(ordinary.then(|| message.headers.unwrap()));
            }
        };
        tokio::select! {
            () = client => {}
            () = serve(listener, blocks) => {}
        }
    }

    /// The next message; `None` if the connection ends, or the client's task with a panic.
    async fn next(
        messages: &mut Subscriber,
        ended: &CancellationToken,
    ) -> Option<async_nats::Message> {
        tokio::select! {
            biased;
            message = messages.next() => message,
            // It may have come since it was looked for.
            () = ended.cancelled() => messages.next().now_or_never().flatten(),
        }
    }

    /// A server for one connection, which sends messages with `blocks` to the first subscription.
    async fn serve(listener: TcpListener, blocks: &[Vec<u8>]) {
        let (mut connection, _) = listener.accept().await.unwrap();
        drop(listener);
        let (incoming, mut outgoing) = connection.split();
        let info =
            br#"INFO {"server_id":"x","version":"2.12.0","headers":true,"max_payload":1048576}"#;
        outgoing
            .write_all(&[info, &b"\r\n"[..]].concat())
            .await
            .unwrap();
        let mut lines = BufReader::new(incoming).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            if line == "PING" {
                outgoing.write_all(b"PONG\r\n").await.unwrap();
            }
            if let Some(sid) = line.strip_prefix("SUB blocks ") {
                let frames = blocks.iter().map(|block| {
                    let head = format!("HMSG blocks {sid} {0} {0}\r\n", block.len());
                    [head.as_bytes(), block, b"\r\n"].concat()
                });
                let frames: Vec<u8> = frames.flatten().collect();
                // The client hangs up in the middle of them if it cannot parse one.
                let _ = outgoing.write_all(&frames).await;
            }
        }
        pending().await
    }
}
