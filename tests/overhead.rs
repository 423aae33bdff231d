//! What the server adds to a picture, and how long a start takes. Run by name, with a release binary, as CONTRIBUTING.md says.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "support/exchange.rs"]
mod exchange;
#[path = "support/server.rs"]
#[allow(
    clippy::duplicate_mod,
    reason = "each test file is a program of its own"
)]
mod server;

use std::net::TcpListener;
use std::process::Stdio;
use std::time::{Duration, Instant};

use exchange::{Peer, percentile, setting};
use serde_json::{Value, json};
use server::{Server, sdgen};

/// A demo picture as the command line makes one by default.
fn picture(task: &str) -> Value {
    json!({
        "prompt": "a red apple", "seed": 7, "steps": 20, "cfg_scale": 5, "width": 128, "height": 128, "force_task_id": task,
    })
}

/// The pipeline's seconds of a job, which the server logs.
fn pipeline_seconds(log: &str, task: &str) -> Option<Duration> {
    let line = log
        .lines()
        .find(|line| line.contains("generated") && line.contains(&format!("job=\"{task}\"")))?;
    let seconds = line.split("seconds=").nth(1)?.split_whitespace().next()?;
    Some(Duration::from_secs_f64(seconds.parse().ok()?))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn overhead() {
    let pictures = setting("SDGEN_PICTURES", 50);
    let server = Server::start(&[]);
    let peer = Peer {
        port: server.port,
        number: 1,
    };
    let (mut walls, mut added) = (Vec::new(), Vec::new());
    // The first picture is made outside the measurement.
    for i in 0..=pictures {
        let task = format!("task({i})");
        let body = picture(&task);
        let began = Instant::now();
        let answer = peer.post("/sdapi/v1/txt2img", &body).await.unwrap();
        let wall = began.elapsed();
        assert_eq!(answer.status, 200, "{}", answer.text());
        let inside = server::until("the log line", || pipeline_seconds(&server.log(), &task));
        if i > 0 {
            walls.push(wall);
            added.push(wall.saturating_sub(inside));
        }
    }
    println!("| what | p50 | p99 | limit |\n| --- | --- | --- | --- |");
    println!(
        "| a demo picture | {:.1} ms | {:.1} ms | |",
        percentile(&mut walls, 0.5),
        percentile(&mut walls, 0.99)
    );
    let (p50, p99) = (percentile(&mut added, 0.5), percentile(&mut added, 0.99));
    println!("| of that outside the pipeline | {p50:.1} ms | {p99:.1} ms | 15 ms |");
    drop(server);
    let (mut accepted, mut first) = (Vec::new(), Vec::new());
    for _ in 0..setting("SDGEN_STARTS", 10) {
        let (until_accepted, until_picture) = start().await;
        accepted.push(until_accepted);
        first.push(until_picture);
    }
    let (accepted50, first50) = (percentile(&mut accepted, 0.5), percentile(&mut first, 0.5));
    println!(
        "| start to first accepted request | {accepted50:.1} ms | {:.1} ms | 150 ms |",
        percentile(&mut accepted, 0.99)
    );
    println!(
        "| start to first demo picture | {first50:.1} ms | {:.1} ms | 3000 ms |",
        percentile(&mut first, 0.99)
    );
    if std::env::var_os("SDGEN_BIN").is_some() {
        assert!(p50 < 15.0 && accepted50 < 150.0 && first50 < 3000.0);
    }
}

/// Starts a server on a port found free, in an empty directory: the times to the first answer and to the first picture.
async fn start() -> (Duration, Duration) {
    let directory = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    drop(listener);
    let began = Instant::now();
    let mut child = sdgen()
        .args(["serve", "--port", &port.to_string(), "--data-dir"])
        .arg(directory.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let peer = Peer { port, number: 1 };
    let accepted = loop {
        if peer
            .get("/healthz")
            .await
            .is_ok_and(|answer| answer.status == 200)
        {
            break began.elapsed();
        }
        assert!(
            began.elapsed() < Duration::from_mins(1),
            "the server does not answer"
        );
        tokio::time::sleep(Duration::from_millis(1)).await;
    };
    let answer = peer
        .post("/sdapi/v1/txt2img", &picture("task(first)"))
        .await
        .unwrap();
    let made = began.elapsed();
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(answer.status, 200, "{}", answer.text());
    (accepted, made)
}
