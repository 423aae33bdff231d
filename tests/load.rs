//! Many clients, random cancels and disconnects, and switches among three checkpoints: nothing lost, nothing doubled, turns fair,
//! memory flat, light routes quick. Run by name, best with a release binary, as CONTRIBUTING.md says; prints a Markdown table.
//!
//! `SDGEN_CLIENTS` (200), `SDGEN_JOBS` (2000) and `SDGEN_SWITCHES` (20) set the size; a round of half as many jobs and one switch to
//! each checkpoint goes before and is not counted, so that memory is measured of a server at work and not of one that starts. Times
//! and memory are held to their limits only where `SDGEN_BIN` names the program, since a debug build says nothing about them.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "support/exchange.rs"]
mod exchange;
#[path = "support/server.rs"]
#[allow(
    clippy::duplicate_mod,
    reason = "each test file is a program of its own"
)]
mod server;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use exchange::{Peer, percentile, setting};
use serde_json::{Map, Value, json};
use server::Server;

/// One client in this many sends all its jobs at once; the others wait for each answer.
const GREEDY: usize = 10;
/// One request in this many is left before its answer.
const LEFT: usize = 20;
/// Seeds of different jobs differ; each says whose job it is. Those of the round before are below.
const FIRST_SEED: usize = 1_000_000;
/// Jobs of one other client whose pictures may be written while a patient client waits for its own: the running one, the next
/// turn's, and one that was still being encoded.
const FAIR: usize = 3;

/// What came of one job.
struct Job {
    client: usize,
    seed: usize,
    sent: SystemTime,
    result: Result,
}

#[derive(Debug, PartialEq)]
enum Result {
    /// The picture that was asked for.
    Made,
    /// The client hung up.
    Left,
    /// Anything else, in words.
    Wrong(String),
}

struct Shared {
    peer: Peer,
    first_seed: usize,
    ended: AtomicUsize,
    jobs: Mutex<Vec<Job>>,
}

async fn work(shared: &Shared, client: usize, seed: usize) {
    let body = json!({
        "prompt": "a red apple", "seed": seed, "steps": 2, "width": 64, "height": 64, "sampler_name": "Euler", "cfg_scale": 1,
        "save_images": true,
    });
    let number = client as u16 + 1;
    let peer = Peer {
        number,
        ..shared.peer
    };
    let sent = SystemTime::now();
    let result = if seed % LEFT == 7 {
        let patience = Duration::from_millis(rand::random_range(1..400));
        let stream = peer.open("POST", "/sdapi/v1/txt2img", &body).await;
        tokio::time::sleep(patience).await;
        drop(stream);
        Result::Left
    } else {
        match peer.post("/sdapi/v1/txt2img", &body).await {
            Ok(answer) => judge(&answer, seed),
            Err(error) => Result::Wrong(error.to_string()),
        }
    };
    shared.ended.fetch_add(1, Ordering::Relaxed);
    let job = Job {
        client,
        seed,
        sent,
        result,
    };
    shared.jobs.lock().unwrap().push(job);
}

fn judge(answer: &exchange::Answer, seed: usize) -> Result {
    let whole = answer.json();
    let info: Value =
        serde_json::from_str(whole["info"].as_str().unwrap_or("null")).unwrap_or_default();
    let images = whole["images"].as_array().map_or(0, Vec::len);
    if answer.status == 200 && images <= 1 && info["all_seeds"] == json!([seed]) {
        Result::Made
    } else {
        Result::Wrong(format!(
            "{}: {images} pictures, {}",
            answer.status, info["all_seeds"]
        ))
    }
}

/// One client's jobs.
async fn client(shared: Arc<Shared>, number: usize, jobs: usize) {
    let seeds = (0..jobs).map(|i| shared.first_seed + number * 1000 + i);
    if number.is_multiple_of(GREEDY) {
        futures_util::future::join_all(seeds.map(|seed| work(&shared, number, seed))).await;
    } else {
        for seed in seeds {
            work(&shared, number, seed).await;
        }
    }
}

/// Interrupts whatever runs, at random moments.
async fn interrupts(shared: Arc<Shared>, total: usize) -> usize {
    let mut sent = 0;
    while shared.ended.load(Ordering::Relaxed) < total {
        tokio::time::sleep(Duration::from_millis(rand::random_range(50..1500))).await;
        let answer = shared.peer.post("/sdapi/v1/interrupt", &Value::Null).await;
        assert_eq!(answer.unwrap().status, 200, "interrupt");
        sent += 1;
    }
    sent
}

/// Chooses a checkpoint whenever another share of the jobs has ended.
async fn switches(shared: Arc<Shared>, total: usize, count: usize) {
    let models = shared.peer.get("/sdapi/v1/sd-models").await.unwrap().json();
    let titles: Vec<Value> = models
        .as_array()
        .unwrap()
        .iter()
        .map(|model| model["title"].clone())
        .collect();
    assert_eq!(titles.len(), 3, "{models}");
    for i in 0..count {
        while shared.ended.load(Ordering::Relaxed) < i * total / count {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let title = &titles[i % 3];
        let body = json!({ "sd_model_checkpoint": title });
        let answer = shared.peer.post("/sdapi/v1/options", &body).await.unwrap();
        assert_eq!(answer.status, 200, "switch: {}", answer.text());
        let options = shared.peer.get("/sdapi/v1/options").await.unwrap().json();
        // A title gains its hash once the file has been loaded.
        let chosen = options["sd_model_checkpoint"].as_str().unwrap();
        assert!(chosen.starts_with(title.as_str().unwrap()), "{chosen}");
    }
}

/// Asks light routes while jobs run; the times of each.
async fn light(shared: Arc<Shared>, total: usize) -> BTreeMap<&'static str, Vec<Duration>> {
    let mut times: BTreeMap<_, Vec<_>> = BTreeMap::new();
    let peer = Peer {
        number: 60_000,
        ..shared.peer
    };
    while shared.ended.load(Ordering::Relaxed) < total {
        for path in [
            "/sdapi/v1/progress",
            "/sdapi/v1/options",
            "/sdapi/v1/samplers",
        ] {
            let began = Instant::now();
            let answer = peer.get(path).await.unwrap();
            assert_eq!(answer.status, 200, "{path}");
            times.entry(path).or_default().push(began.elapsed());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    times
}

/// Resident memory in MiB and how many jobs had ended by then.
async fn memory(shared: Arc<Shared>, total: usize, pid: u32) -> Vec<(usize, f64)> {
    let mut samples = Vec::new();
    loop {
        let ended = shared.ended.load(Ordering::Relaxed);
        if ended >= total {
            return samples;
        }
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = status
            .lines()
            .find(|line| line.starts_with("VmRSS:"))
            .unwrap();
        let kib: f64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
        samples.push((ended, kib / 1024.0));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// The demo model under two more names; other metadata, so other hashes.
fn write_checkpoints(directory: &Path) {
    std::fs::create_dir_all(directory).unwrap();
    let packed = include_bytes!("../models/demo/sdgen-demo.safetensors.zst");
    let bytes = zstd::stream::decode_all(packed.as_slice()).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    for name in ["load-a", "load-b"] {
        let mut header: Map<String, Value> = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
        header["__metadata__"]["comment"] = json!(name);
        let mut text = Value::Object(header).to_string();
        while !text.len().is_multiple_of(8) {
            text.push(' ');
        }
        let mut file = (text.len() as u64).to_le_bytes().to_vec();
        file.extend(text.as_bytes());
        file.extend(&bytes[8 + length..]);
        std::fs::write(directory.join(format!("{name}.safetensors")), file).unwrap();
    }
}

/// The most pictures of one other client that were written while a patient client waited for its own.
fn most_overtaken(jobs: &[Job], written: &BTreeMap<usize, Vec<SystemTime>>) -> usize {
    let made: Vec<(&Job, SystemTime)> = jobs
        .iter()
        .filter_map(|job| Some((job, *written.get(&job.seed)?.first()?)))
        .collect();
    let overtaken = |&(mine, end): &(&Job, SystemTime)| {
        let mut by_client: BTreeMap<usize, usize> = BTreeMap::new();
        for (other, at) in &made {
            if other.client != mine.client && *at > mine.sent && *at < end {
                *by_client.entry(other.client).or_default() += 1;
            }
        }
        by_client.into_values().max().unwrap_or(0)
    };
    made.iter()
        .filter(|(job, _)| !job.client.is_multiple_of(GREEDY) && job.result == Result::Made)
        .map(overtaken)
        .max()
        .unwrap_or(0)
}

/// When the files of each seed were written.
fn files(server: &Server) -> BTreeMap<usize, Vec<SystemTime>> {
    let mut files: BTreeMap<usize, Vec<SystemTime>> = BTreeMap::new();
    for path in server.files("outputs/txt2img-images") {
        let stem = path.file_stem().unwrap().to_string_lossy().into_owned();
        let seed = stem.rsplit('-').next().unwrap().parse().unwrap();
        let written = path.metadata().unwrap().modified().unwrap();
        files.entry(seed).or_default().push(written);
    }
    files
}

fn median(samples: &[(usize, f64)], range: std::ops::Range<usize>) -> f64 {
    let mut values: Vec<f64> = samples
        .iter()
        .filter(|(at, _)| range.contains(at))
        .map(|(_, mib)| *mib)
        .collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Rows of the table and what breaks a limit.
#[derive(Default)]
struct Report {
    broken: Vec<String>,
}

impl Report {
    fn row(&mut self, what: &str, value: &str, limit: &str, is_met: bool) {
        println!(
            "| {what} | {value} | {limit} | {} |",
            if is_met { "met" } else { "NOT MET" }
        );
        if !is_met {
            self.broken.push(format!("{what}: {value}, limit {limit}"));
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn load() {
    let (clients, jobs, count) = (
        setting("SDGEN_CLIENTS", 200),
        setting("SDGEN_JOBS", 2000),
        setting("SDGEN_SWITCHES", 20),
    );
    let directory = Arc::new(tempfile::tempdir().unwrap());
    write_checkpoints(&directory.path().join("models/Stable-diffusion"));
    let server = Server::spawn(directory, &[], &[]);
    server.wait_ready();
    round(&server, 1, [clients, jobs / 2, 3]).await;
    let began = Instant::now();
    let round = round(&server, FIRST_SEED, [clients, jobs, count]).await;
    let seconds = began.elapsed().as_secs_f64();
    println!(
        "{clients} clients, {} jobs, {count} switches, {} interrupts, {seconds:.0} s",
        round.jobs.len(),
        round.interrupts
    );
    report(&server, round);
}

/// What a round of jobs was like.
struct Round {
    jobs: Vec<Job>,
    interrupts: usize,
    light: BTreeMap<&'static str, Vec<Duration>>,
    memory: Vec<(usize, f64)>,
}

async fn round(server: &Server, first_seed: usize, [clients, jobs, count]: [usize; 3]) -> Round {
    let total = jobs / clients * clients;
    let shared = Arc::new(Shared {
        peer: Peer {
            port: server.port,
            number: 0,
        },
        first_seed,
        ended: AtomicUsize::new(0),
        jobs: Mutex::default(),
    });
    let crowd =
        (0..clients).map(|number| tokio::spawn(client(shared.clone(), number, jobs / clients)));
    let crowd = futures_util::future::join_all(crowd);
    let interrupts = tokio::spawn(interrupts(shared.clone(), total));
    let switches = tokio::spawn(switches(shared.clone(), total, count));
    let light = tokio::spawn(light(shared.clone(), total));
    let memory = tokio::spawn(memory(shared.clone(), total, server.pid()));
    for result in crowd.await {
        result.unwrap();
    }
    switches.await.unwrap();
    let (interrupts, light, memory) = (
        interrupts.await.unwrap(),
        light.await.unwrap(),
        memory.await.unwrap(),
    );
    server.wait_idle();
    let jobs = std::mem::take(&mut *shared.jobs.lock().unwrap());
    Round {
        jobs,
        interrupts,
        light,
        memory,
    }
}

fn report(server: &Server, round: Round) {
    let is_strict = std::env::var_os("SDGEN_BIN").is_some();
    let Round {
        jobs,
        interrupts,
        light,
        memory,
    } = round;
    let total = jobs.len();
    let mut report = Report::default();
    println!("\n| what | value | limit | |\n| --- | --- | --- | --- |");
    report_jobs(&mut report, server, &jobs, interrupts);
    let (first, last) = (
        median(&memory, 0..total / 4),
        median(&memory, total * 3 / 4..total),
    );
    let growth = 100.0 * (last / first - 1.0);
    let value = format!("{first:.1} to {last:.1} MiB, {growth:+.1} %");
    report.row(
        "memory, first to last quarter",
        &value,
        "3 %",
        growth.abs() <= 3.0 || !is_strict,
    );
    for (path, mut times) in light {
        let (p50, p99) = (percentile(&mut times, 0.5), percentile(&mut times, 0.99));
        let value = format!("{p50:.1} / {p99:.1} ms of {}", times.len());
        report.row(
            path,
            &value,
            "5 / 25 ms",
            (p50 < 5.0 && p99 < 25.0) || !is_strict,
        );
    }
    assert!(
        report.broken.is_empty(),
        "{:#?}\n{}",
        report.broken,
        last_lines(&server.log())
    );
}

/// What became of each job.
fn report_jobs(report: &mut Report, server: &Server, jobs: &[Job], interrupts: usize) {
    let left = jobs.iter().filter(|job| job.result == Result::Left).count();
    let wrong: Vec<_> = jobs
        .iter()
        .filter(|job| matches!(job.result, Result::Wrong(_)))
        .collect();
    let due = jobs.len() - left;
    report.row(
        "answered once, with their own seed",
        &(due - wrong.len()).to_string(),
        &due.to_string(),
        wrong.is_empty(),
    );
    for job in wrong.iter().take(5) {
        println!("client {} seed {}: {:?}", job.client, job.seed, job.result);
    }
    let files = files(server);
    let doubled = files.values().filter(|written| written.len() > 1).count();
    report.row(
        "seeds with more than one file",
        &doubled.to_string(),
        "0",
        doubled == 0,
    );
    let without = |job: &&Job| job.result == Result::Made && !files.contains_key(&job.seed);
    let without = jobs.iter().filter(without).count();
    report.row(
        "answered jobs without a file",
        &without.to_string(),
        &format!("{interrupts} (interrupts)"),
        without <= interrupts,
    );
    report.row("clients that left", &left.to_string(), "any", true);
    let overtaken = most_overtaken(jobs, &files);
    report.row(
        "pictures of one other client during a wait, at most",
        &overtaken.to_string(),
        &FAIR.to_string(),
        overtaken <= FAIR,
    );
}

fn last_lines(log: &str) -> String {
    let lines: Vec<_> = log
        .lines()
        .filter(|line| !line.contains("generated"))
        .collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}
