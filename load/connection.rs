//! Shared by the load tools: a keep-alive connection and its requests.

use axum_extra::headers::Authorization;
use axum_extra::headers::authorization::Credentials as _;
use gradestore::grade::USER_ID;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

pub(crate) type Error = Box<dyn std::error::Error + Send + Sync>;

/// 13 bytes, as in `load/*.lua` and `load/k6/ids.js`.
pub(crate) fn user_id(user: u64) -> u64 {
    1_000_000_000_000 + user
}

/// The value of the authorization header.
pub(crate) fn basic(username: &str, password: &str) -> Result<String, Error> {
    let basic = Authorization::basic(username, password);
    Ok(basic.0.encode().to_str()?.to_owned())
}

/// A keep-alive connection with at most one request in flight.
pub(crate) struct Connection {
    stream: BufReader<TcpStream>,
    host: String,
    /// The header and body of the last response.
    head: String,
    body: Vec<u8>,
}

impl Connection {
    pub(crate) async fn open(url: &str) -> Result<Self, Error> {
        let host = url.strip_prefix("http://").unwrap_or(url);
        let host = host.trim_end_matches('/');
        let stream = TcpStream::connect(host).await;
        let stream = stream.map_err(|error| format!("cannot connect to {url}: {error}"))?;
        stream.set_nodelay(true)?;
        Ok(Self {
            stream: BufReader::new(stream),
            host: host.to_owned(),
            head: String::new(),
            body: Vec::new(),
        })
    }

    pub(crate) fn set_request(&self, basic: &str, body: &str) -> String {
        format!(
            "POST /set HTTP/1.1\r\nhost: {}\r\nauthorization: {basic}\r\n\
             content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            self.host,
            body.len()
        )
    }

    pub(crate) fn get_request(&self, user: u64) -> String {
        let (id, host) = (user_id(user), &self.host);
        format!("GET /get?{USER_ID}={id} HTTP/1.1\r\nhost: {host}\r\n\r\n")
    }

    /// Sends `request` and reads the response: its status and its body.
    pub(crate) async fn ask(&mut self, request: &str) -> Result<(u16, &[u8]), Error> {
        self.stream.write_all(request.as_bytes()).await?;
        self.head.clear();
        self.body.clear();
        while !self.head.ends_with("\r\n\r\n") {
            if self.stream.read_line(&mut self.head).await? == 0 {
                return Err("the node closed the connection".into());
            }
        }
        let mut lines = self.head.lines();
        let status = lines.next().and_then(|line| line.split(' ').nth(1));
        let status: u16 = status.ok_or("no status line")?.parse()?;
        let length = lines
            .filter_map(|line| line.split_once(':'))
            .find(|(name, _)| name.eq_ignore_ascii_case("content-length"));
        match length {
            Some((_, length)) => self.body.resize(length.trim().parse()?, 0),
            None if status == 204 => {}
            None => return Err(format!("no content-length in {}", self.head).into()),
        }
        self.stream.read_exact(&mut self.body).await?;
        Ok((status, &self.body))
    }
}
