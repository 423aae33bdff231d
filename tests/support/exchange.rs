//! HTTP for the tests under load: thousands of requests at once, each from an address of its own, and errors as values.

#![allow(
    dead_code,
    reason = "every test file uses its own part of the shared code"
)]

use std::io::{Error, ErrorKind, Result};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};

/// A client that the server can tell from others: every one has an address of 127.0.0.0/8.
#[derive(Clone, Copy)]
pub(crate) struct Peer {
    pub(crate) port: u16,
    pub(crate) number: u16,
}

/// A whole answer.
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or(Value::Null)
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

impl Peer {
    async fn connect(self) -> Result<TcpStream> {
        let [high, low] = self.number.to_be_bytes();
        let socket = TcpSocket::new_v4()?;
        socket.bind(SocketAddrV4::new(Ipv4Addr::new(127, 1, high, low), 0).into())?;
        let server = SocketAddrV4::new(Ipv4Addr::LOCALHOST, self.port);
        socket.connect(server.into()).await
    }

    /// Sends a request and returns the open connection.
    pub(crate) async fn open(self, method: &str, path: &str, body: &Value) -> Result<TcpStream> {
        let body = match body {
            Value::Null => String::new(),
            body => body.to_string(),
        };
        let mut stream = self.connect().await?;
        let length = body.len();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n\
             content-length: {length}\r\n\r\n"
        );
        stream.write_all((head + &body).as_bytes()).await?;
        Ok(stream)
    }

    /// Sends a request and reads the answer to its last byte; anything less is an error.
    pub(crate) async fn ask(self, method: &str, path: &str, body: &Value) -> Result<Answer> {
        let mut stream = self.open(method, path, body).await?;
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).await?;
        parse(&bytes).ok_or_else(|| Error::new(ErrorKind::UnexpectedEof, "no whole answer"))
    }

    pub(crate) async fn get(self, path: &str) -> Result<Answer> {
        self.ask("GET", path, &Value::Null).await
    }

    pub(crate) async fn post(self, path: &str, body: &Value) -> Result<Answer> {
        self.ask("POST", path, body).await
    }
}

/// One answer, neither less nor more.
fn parse(bytes: &[u8]) -> Option<Answer> {
    let end = bytes.windows(4).position(|window| window == b"\r\n\r\n")?;
    let head = String::from_utf8_lossy(&bytes[..end]).to_lowercase();
    let status = head.split(' ').nth(1)?.parse().ok()?;
    let length = head.split("content-length: ").nth(1)?;
    let length: usize = length.lines().next()?.trim().parse().ok()?;
    let body = bytes[end + 4..].to_vec();
    (body.len() == length).then_some(Answer { status, body })
}

/// The value below which `share` of the values lie, in milliseconds.
pub(crate) fn percentile(times: &mut [Duration], share: f64) -> f64 {
    times.sort();
    let index = ((times.len() as f64 - 1.0) * share).round().max(0.0) as usize;
    times.get(index).map_or(f64::NAN, |t| 1e3 * t.as_secs_f64())
}

/// Asks until there is an answer; a deadline ends a test that would wait for ever.
pub(crate) async fn until<T>(what: &str, mut condition: impl AsyncFnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(value) = condition().await {
            return value;
        }
        let waited = started.elapsed();
        assert!(waited < Duration::from_mins(30), "waited too long: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// A number that a caller may set in the environment.
pub(crate) fn setting(name: &str, default: usize) -> usize {
    std::env::var(name)
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(default)
}
