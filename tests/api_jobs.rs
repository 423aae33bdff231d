//! `/v1/jobs` over the socket: jobs that outlive their requests, and a server that is killed.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support {
    pub(crate) mod server;
}

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc;
use std::time::Duration;

use serde_json::{Value, json};
use support::server::{Answer, Server, endless, small, until};

fn submit(server: &Server, request: &Value, more: &Value) -> Answer {
    let mut body = json!({ "type": "txt2img", "request": request });
    for (key, value) in more.as_object().unwrap() {
        body[key] = value.clone();
    }
    server.post("/v1/jobs", &body)
}

fn accepted(answer: &Answer) -> String {
    assert_eq!(answer.status, 202, "{}", answer.text());
    answer.json()["id"].as_str().unwrap().to_string()
}

fn job(server: &Server, id: &str) -> Value {
    let answer = server.get(&format!("/v1/jobs/{id}"));
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()
}

fn wait_for(server: &Server, id: &str, state: &str) -> Value {
    until(&format!("job {id} to be {state}"), || {
        let job = job(server, id);
        (job["state"] == state).then_some(job)
    })
}

/// What is at the path of a job's first picture.
fn picture(job: &Value) -> image::RgbImage {
    let path = job["result"]["images"][0]["path"].as_str().unwrap();
    image::open(path).unwrap().to_rgb8()
}

#[test]
fn a_job_ends_with_the_picture_its_route_would_have_answered() {
    let server = Server::start(&[]);
    let id = accepted(&submit(&server, &small(), &json!({})));
    let done = wait_for(&server, &id, "done");
    assert_eq!(done["attempts"], 1);
    assert!(done["finished"].as_i64() >= done["started"].as_i64());
    let answer = server.post("/sdapi/v1/txt2img", &small());
    let same = image::load_from_memory(&answer.images()[0]).unwrap();
    assert_eq!(picture(&done), same.to_rgb8());
    let infotext = &done["result"]["images"][0]["infotext"];
    assert_eq!(*infotext, answer.info()["infotexts"][0]);

    assert_eq!(job(&server, &id)["result"]["device"], "cpu");
    let image = server.get(&format!("/v1/jobs/{id}/images/0"));
    assert_eq!(image.header("content-type"), Some("image/png"));
    let whole = server.get(&format!("/v1/jobs/{id}/result")).json();
    assert_eq!(whole["images"].as_array().unwrap().len(), 1);
    assert_eq!(server.get(&format!("/v1/jobs/{id}/images/1")).status, 404);
    assert_eq!(server.get("/v1/jobs/unknown").status, 404);

    let list = server.get("/v1/jobs?state=done").json();
    assert_eq!(
        (&list["jobs"][0]["id"], &list["counts"]["done"]),
        (&json!(id), &json!(1))
    );
    let forgotten = server.send("DELETE", &format!("/v1/jobs/{id}"), &[], b"");
    assert_eq!(forgotten.status, 200);
    assert_eq!(server.get(&format!("/v1/jobs/{id}")).status, 404);
    assert!(server.files("outputs/jobs").is_empty(), "its file is gone");
}

#[test]
fn a_name_is_taken_once_and_bad_submissions_are_answered_in_words() {
    let server = Server::start(&[]);
    let named = json!({ "id": "my-job.1" });
    assert_eq!(accepted(&submit(&server, &small(), &named)), "my-job.1");
    let again = submit(&server, &small(), &named);
    assert_eq!(
        (again.status, &again.json()["id"]),
        (200, &json!("my-job.1"))
    );
    for (more, field) in [
        (json!({ "type": "extras" }), "type"),
        (json!({ "id": "../x" }), "id"),
        (json!({ "id": "" }), "id"),
        (json!({ "webhook": "ftp://a" }), "webhook"),
        (json!({ "request": null }), "request"),
        (json!({ "request": { "steps": 0 } }), "steps"),
        (json!({ "request": { "width": "wide" } }), "width"),
    ] {
        let answer = submit(&server, &small(), &more);
        assert_eq!(answer.status, 422, "{more}: {}", answer.text());
        assert_eq!(answer.problems()[0].0, field, "{more}");
    }
    let unknown = submit(&server, &json!({ "sampler_name": "x" }), &json!({}));
    assert_eq!(unknown.status, 400);
    wait_for(&server, "my-job.1", "done");
}

#[test]
fn queued_jobs_are_taken_back_and_running_ones_interrupted() {
    let server = Server::start(&[]);
    let running = accepted(&submit(&server, &endless(), &json!({})));
    wait_for(&server, &running, "running");
    until("the job's device", || {
        (job(&server, &running)["device"] == "cpu").then_some(())
    });
    let queued = accepted(&submit(&server, &small(), &json!({})));
    let waiting = until("the job to have its place", || {
        let job = job(&server, &queued);
        (!job["position"].is_null()).then_some(job)
    });
    assert_eq!(
        (&waiting["state"], &waiting["position"]),
        (&json!("queued"), &json!(1))
    );
    let cancel = |id: &str| server.post(&format!("/v1/jobs/{id}/cancel"), &json!({}));
    assert_eq!(cancel(&queued).json()["state"], "cancelled");
    assert_eq!(
        server
            .send("DELETE", &format!("/v1/jobs/{running}"), &[], b"")
            .status,
        409
    );
    assert_eq!(cancel(&running).status, 200);
    wait_for(&server, &running, "cancelled");
    assert_eq!(
        cancel(&running).json()["state"],
        "cancelled",
        "and stays so"
    );
    assert_eq!(
        server.get(&format!("/v1/jobs/{running}/result")).status,
        409
    );
    server.assert_works();
}

#[test]
fn too_many_jobs_are_answered_429_with_a_time() {
    let dir = std::sync::Arc::new(tempfile::tempdir().unwrap());
    std::fs::write(dir.path().join("sdgen.toml"), "[server]\njobs_limit = 2\n").unwrap();
    let server = Server::spawn(dir, &[], &[]);
    server.wait_ready();
    let running = accepted(&submit(&server, &endless(), &json!({})));
    wait_for(&server, &running, "running");
    let waiting: Vec<String> = (0..2)
        .map(|_| accepted(&submit(&server, &small(), &json!({}))))
        .collect();
    let refused = submit(&server, &small(), &json!({ "id": "third" }));
    assert_eq!(refused.status, 429);
    let seconds: u64 = refused.header("retry-after").unwrap().parse().unwrap();
    assert!(seconds >= 1);
    assert!(
        refused.text().contains("server.jobs_limit"),
        "{}",
        refused.text()
    );
    server.post(&format!("/v1/jobs/{running}/cancel"), &json!({}));
    for id in waiting {
        wait_for(&server, &id, "done");
    }
}

/// Events of a stream until it closes.
fn events(server: &Server, path: &str) -> Vec<(String, Value)> {
    let address = server
        .url("")
        .trim_start_matches("http://")
        .trim_end_matches('/')
        .to_string();
    let mut stream = TcpStream::connect(&address).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_mins(1)))
        .unwrap();
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    )
    .unwrap();
    let mut seen = Vec::new();
    let mut name = String::new();
    for line in BufReader::new(stream).lines() {
        let line = line.unwrap();
        if let Some(event) = line.strip_prefix("event: ") {
            name = event.to_string();
        } else if let Some(data) = line.strip_prefix("data: ") {
            seen.push((name.clone(), serde_json::from_str(data).unwrap()));
        }
    }
    seen
}

#[test]
fn a_job_is_followed_from_the_line_to_its_end() {
    let server = Server::start(&[]);
    let request =
        json!({ "prompt": "a red apple", "steps": 60, "width": 128, "height": 128, "seed": 1 });
    let id = accepted(&submit(&server, &request, &json!({})));
    let seen = events(&server, &format!("/v1/jobs/{id}/events?previews=1"));
    let (last, end) = seen.last().unwrap();
    assert_eq!((last.as_str(), &end["state"]), ("end", &json!("done")));
    let steps: Vec<u64> = seen
        .iter()
        .filter_map(|(_, job)| job["progress"]["step"].as_u64())
        .collect();
    assert!(steps.len() > 1 && steps.is_sorted(), "{steps:?}");
    let preview = seen.iter().find(|(name, _)| name == "preview");
    let image = preview.unwrap().1["image"].as_str().unwrap();
    assert!(image.starts_with("data:image/jpeg;base64,"));
    // Of a job that has ended there is one event.
    let after = events(&server, &format!("/v1/jobs/{id}/events"));
    assert_eq!((after.len(), after[0].0.as_str()), (1, "end"));
    assert_eq!(server.get("/v1/jobs/unknown/events").status, 404);
}

/// A receiver that answers its n-th request with the n-th status, then 200; bodies come through the channel.
fn receiver(statuses: &'static [u16]) -> (String, mpsc::Receiver<Value>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}/done", listener.local_addr().unwrap());
    let (send, bodies) = mpsc::channel();
    std::thread::spawn(move || {
        for (number, stream) in listener.incoming().enumerate() {
            let mut reader = BufReader::new(stream.unwrap());
            let mut length = 0;
            loop {
                let mut line = String::new();
                reader.read_line(&mut line).unwrap();
                if let Some(value) = line.to_lowercase().strip_prefix("content-length:") {
                    length = value.trim().parse().unwrap();
                }
                if line.trim().is_empty() {
                    break;
                }
            }
            let mut body = vec![0; length];
            reader.read_exact(&mut body).unwrap();
            let status = statuses.get(number).copied().unwrap_or(200);
            let answer =
                format!("HTTP/1.1 {status} x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
            reader.get_mut().write_all(answer.as_bytes()).unwrap();
            if send.send(serde_json::from_slice(&body).unwrap()).is_err() {
                return;
            }
        }
    });
    (address, bodies)
}

/// A server that may call local addresses.
fn with_local_webhooks() -> Server {
    let dir = std::sync::Arc::new(tempfile::tempdir().unwrap());
    let options = r#"{"api_forbid_local_requests": false}"#;
    std::fs::write(dir.path().join("config.json"), options).unwrap();
    let server = Server::spawn(dir, &[], &[]);
    server.wait_ready();
    server
}

#[test]
fn the_end_is_announced_until_the_receiver_takes_it() {
    let server = with_local_webhooks();
    let (address, bodies) = receiver(&[500]);
    let id = accepted(&submit(&server, &small(), &json!({ "webhook": address })));
    let patience = Duration::from_mins(1);
    let first = bodies.recv_timeout(patience).unwrap();
    assert_eq!(
        (&first["id"], &first["state"]),
        (&json!(id), &json!("done"))
    );
    assert_eq!(
        bodies.recv_timeout(patience).unwrap(),
        first,
        "asked again after a 500"
    );
}

#[test]
fn what_a_kill_interrupts_is_done_by_the_next_process_and_announced_once() {
    let server = with_local_webhooks();
    let (address, bodies) = receiver(&[]);
    let hook = json!({ "webhook": address });
    let running = accepted(&submit(
        &server,
        &json!({ "steps": 150, "width": 128, "height": 128, "prompt": "a", "seed": 3 }),
        &hook,
    ));
    wait_for(&server, &running, "running");
    let queued = accepted(&submit(&server, &small(), &json!({})));
    server.signal("KILL");
    let dir = server.dir.clone();
    drop(server);
    let server = Server::spawn(dir, &[], &[]);
    let done = wait_for(&server, &running, "done");
    assert_eq!(done["attempts"], 2, "it was begun once more");
    wait_for(&server, &queued, "done");
    assert_eq!(server.files("outputs/jobs").len(), 2, "each picture once");
    let told = bodies.recv_timeout(Duration::from_mins(1)).unwrap();
    assert_eq!(told["id"], json!(running));
    assert!(bodies.try_recv().is_err());
}

#[test]
fn a_server_that_is_told_to_end_puts_its_job_back_in_line() {
    let mut server = Server::start(&["--shutdown-grace", "0"]);
    let id = accepted(&submit(
        &server,
        &json!({ "steps": 150, "width": 128, "height": 128, "prompt": "a", "seed": 3 }),
        &json!({}),
    ));
    wait_for(&server, &id, "running");
    server.signal("TERM");
    assert!(server.wait_exit().success());
    let dir = server.dir.clone();
    drop(server);
    let server = Server::spawn(dir, &[], &[]);
    let done = wait_for(&server, &id, "done");
    assert_eq!(done["attempts"], 1, "its own fault it was not");
}
