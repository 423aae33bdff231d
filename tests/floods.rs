//! Floods: more connections and more bytes than a server should hold. Memory is bounded, nobody is kept out, the next job works.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::print_stdout, reason = "the figures are for the reader")]

#[path = "support/server.rs"]
mod server;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::json;
use server::{DEADLINE, Server, small, with};

/// MiB of the server's memory: resident now (`VmRSS`) or at most so far (`VmHWM`).
fn memory(server: &Server, key: &str) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.pid())).unwrap();
    let line = status.lines().find(|line| line.starts_with(key)).unwrap();
    let kib: usize = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kib / 1024
}

/// As many open files as this process may have.
fn all_files() -> usize {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    setrlimit(Resource::Nofile, raised).unwrap();
    limit.maximum.map_or(usize::MAX, |files| files as usize)
}

#[test]
fn ten_thousand_open_sockets_keep_nobody_out() {
    // This process holds the other ends, and some files of its own.
    let count = 10_000.min(all_files() - 200);
    let server = Server::start(&[]);
    server.assert_works();
    let before = memory(&server, "VmRSS:");
    let sockets: Vec<TcpStream> = (0..count)
        .map(|index| {
            let mut stream = TcpStream::connect(("127.0.0.1", server.port)).unwrap();
            // Nothing at all, half a head, or a whole request and then nothing more.
            let sent: &[u8] = match index % 3 {
                0 => b"",
                1 => b"POST /sdapi/v1/txt2img HTTP/1.1\r\nhost: a",
                _ => b"GET /internal/ping HTTP/1.1\r\nhost: a\r\n\r\n",
            };
            // A connection that idles may have been ended for another.
            let _ = stream.write_all(sent);
            stream
        })
        .collect();
    let asked = Instant::now();
    assert_eq!(server.get("/internal/ping").status, 200);
    let light = asked.elapsed();
    server.assert_works();
    let grown = memory(&server, "VmHWM:").saturating_sub(before);
    let files = std::fs::read_dir(format!("/proc/{}/fd", server.pid()));
    let files = files.unwrap().count();
    println!(
        "{count} sockets: {files} files in the server, {grown} MiB more, next request {light:.0?}"
    );
    // Idle connections are not waited for: they would go by themselves after 30 s.
    assert!(light < Duration::from_secs(10), "{light:?}");
    // A connection's buffers are 8 KiB each way and its task some more.
    assert!(grown < 400, "{grown} MiB");
    assert!(files < 8192 + 128, "{files} files");
    drop(sockets);
    server.assert_works();
}

#[test]
fn large_bodies_wait_for_memory_and_are_all_answered() {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let settings = "[server]\nbody_limit_mib = 32\nbody_memory_mib = 64\n";
    std::fs::write(dir.path().join("sdgen.toml"), settings).unwrap();
    let server = Arc::new(Server::spawn(dir, &[], &[]));
    server.wait_ready();
    server.assert_works();
    let before = memory(&server, "VmHWM:");
    // If nothing held them back they would take 32 * 24 MiB, and as much again when parsed.
    let ballast = "x".repeat(24 << 20);
    let body = with(small(), json!({ "no_such_field": ballast }));
    let clients: Vec<_> = (0..32)
        .map(|_| server.post_later("/sdapi/v1/txt2img", body.clone()))
        .collect();
    for client in clients {
        assert_eq!(client.join().unwrap().status, 200);
    }
    let grown = memory(&server, "VmHWM:").saturating_sub(before);
    println!("32 bodies of 24 MiB: {grown} MiB more");
    // Two bodies, each held as bytes and as JSON, and what the allocator keeps of those before.
    assert!(grown < 400, "{grown} MiB");
    server.assert_works();
}

#[test]
fn a_connection_idles_as_long_as_the_flag_says() {
    let server = Server::start(&["--timeout-keep-alive", "1"]);
    let mut stream = TcpStream::connect(("127.0.0.1", server.port)).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    let began = Instant::now();
    stream
        .write_all(b"GET /internal/ping HTTP/1.1\r\nhost: a\r\n\r\n")
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    // The default would be 30 s.
    assert!(began.elapsed() < Duration::from_secs(20));
}
