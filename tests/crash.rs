//! `kill -9` at random moments under a load of `/v1/jobs`: in the end every accepted job has ended once, as done with its files or as
//! failed with a reason. Run by name, as CONTRIBUTING.md says; `SDGEN_KILLS` (20) sets how often. Prints a Markdown table.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "support/exchange.rs"]
mod exchange;
#[path = "support/server.rs"]
#[allow(
    clippy::duplicate_mod,
    reason = "each test file is a program of its own"
)]
mod server;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use exchange::{Peer, setting, until};
use serde_json::{Value, json};
use server::Server;

/// Clients that submit at once.
const CLIENTS: usize = 8;
/// Most jobs of one run, so that a long list never keeps the last start from ending them.
const PER_RUN: usize = 6;

/// Submits until the run ends or enough is submitted; accepted ids go to `accepted`.
async fn submit(
    peer: Peer,
    run: usize,
    ended: Arc<AtomicBool>,
    accepted: Arc<Mutex<BTreeSet<String>>>,
) -> usize {
    let mut unanswered = 0;
    for i in 0..PER_RUN {
        if ended.load(Ordering::Relaxed) {
            break;
        }
        let id = format!("run{run}-client{}-{i}", peer.number);
        let request = json!({
            "prompt": "a red apple", "seed": i, "steps": 3, "width": 64, "height": 64, "sampler_name": "Euler", "batch_size": 2,
        });
        match peer
            .post("/v1/jobs", &json!({ "id": id, "request": request }))
            .await
        {
            Ok(answer) if answer.status == 202 => {
                accepted.lock().unwrap().insert(id);
            }
            Ok(answer) => panic!("{id}: {} {}", answer.status, answer.text()),
            // Cut off by the kill: it may or may not have been accepted.
            Err(_) => unanswered += 1,
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    unanswered
}

/// Every job that the server knows, by id; more than one entry of an id is an error.
async fn all_jobs(peer: Peer) -> BTreeMap<String, Value> {
    let mut jobs = BTreeMap::new();
    let mut before = String::new();
    loop {
        let path = format!("/v1/jobs?limit=100{before}");
        let page = peer.get(&path).await.unwrap().json();
        let page = page["jobs"].as_array().unwrap().clone();
        let Some(last) = page.last() else { return jobs };
        before = format!("&before={}", last["id"].as_str().unwrap());
        for job in page {
            let id = job["id"].as_str().unwrap().to_string();
            assert!(
                jobs.insert(id.clone(), job).is_none(),
                "`{id}` is listed twice"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn crash() {
    let kills = setting("SDGEN_KILLS", 20);
    let directory = Arc::new(tempfile::tempdir().unwrap());
    let accepted = Arc::new(Mutex::new(BTreeSet::new()));
    println!("| kill | after | accepted so far | ended so far |\n| --- | --- | --- | --- |");
    for run in 1..=kills {
        let mut server = Server::spawn(directory.clone(), &[], &[]);
        let ended = Arc::new(AtomicBool::new(false));
        let clients: Vec<_> = (1..=CLIENTS)
            .map(|number| {
                let peer = Peer {
                    port: server.port,
                    number: number as u16,
                };
                tokio::spawn(submit(peer, run, ended.clone(), accepted.clone()))
            })
            .collect();
        // From before the model is loaded to the middle of the jobs.
        let lifetime = Duration::from_millis(rand::random_range(20..2500));
        tokio::time::sleep(lifetime).await;
        let peer = Peer {
            port: server.port,
            number: 0,
        };
        let before = peer.get("/v1/jobs?limit=1").await.unwrap().json();
        let count = |state: &str| before["counts"][state].as_u64().unwrap_or(0);
        let done = count("done") + count("failed") + count("cancelled");
        server.signal("KILL");
        server.wait_exit();
        ended.store(true, Ordering::Relaxed);
        for client in clients {
            client.await.unwrap();
        }
        let so_far = accepted.lock().unwrap().len();
        println!(
            "| {run} | {} ms | {so_far} | {done} |",
            lifetime.as_millis()
        );
    }
    let server = Server::spawn(directory, &[], &[]);
    let peer = Peer {
        port: server.port,
        number: 0,
    };
    let accepted = std::mem::take(&mut *accepted.lock().unwrap());
    let jobs = until("every job to end", async || {
        let jobs = all_jobs(peer).await;
        let is_open = |job: &Value| matches!(job["state"].as_str(), Some("queued" | "running"));
        (!jobs.values().any(is_open)).then_some(jobs)
    })
    .await;
    check(&server, &accepted, &jobs);
}

/// Every accepted job is there, has ended, and its files are there once.
fn check(server: &Server, accepted: &BTreeSet<String>, jobs: &BTreeMap<String, Value>) {
    let mut files: BTreeMap<String, usize> = BTreeMap::new();
    for path in server.files("outputs/jobs") {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        *files.entry(name).or_default() += 1;
    }
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    let mut attempts: BTreeMap<u64, usize> = BTreeMap::new();
    let mut expected = BTreeSet::new();
    for (id, job) in jobs {
        let state = job["state"].as_str().unwrap();
        *counts.entry(state).or_default() += 1;
        *attempts
            .entry(job["attempts"].as_u64().unwrap())
            .or_default() += 1;
        assert!(job["finished"].is_number(), "{job}");
        match state {
            "done" => {
                let images = job["result"]["images"].as_array().unwrap();
                assert_eq!(images.len(), 2, "{job}");
                for image in images {
                    let path = std::path::Path::new(image["path"].as_str().unwrap());
                    assert!(path.is_file(), "{}", path.display());
                    let name = path.file_name().unwrap().to_string_lossy().into_owned();
                    assert_eq!(files.get(&name), Some(&1), "{id}: {name}");
                    expected.insert(name);
                }
            }
            "failed" => assert!(!job["error"].as_str().unwrap_or("").is_empty(), "{job}"),
            other => panic!("`{id}` is {other}"),
        }
    }
    let lost: Vec<_> = accepted
        .iter()
        .filter(|id| !jobs.contains_key(*id))
        .collect();
    let stray: Vec<_> = files
        .keys()
        .filter(|name| !expected.contains(*name))
        .collect();
    println!(
        "\naccepted {}, known {}, lost {}; ends {counts:?}; attempts {attempts:?}; files {}, of no job {}",
        accepted.len(),
        jobs.len(),
        lost.len(),
        files.len(),
        stray.len()
    );
    assert!(lost.is_empty(), "{lost:?}");
    // A job that failed after a crash may have left what its first run wrote.
    assert!(
        stray.is_empty() || counts.contains_key("failed"),
        "{stray:?}"
    );
}
