//! A server's hard moments: clients that leave, signals, a kill, a taken port, a full or closed disk. After each the next job
//! works, or the process has ended as promised.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "support/server.rs"]
mod server;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use serde_json::json;
use server::{Answer, Server, endless, sdgen, small, until, with};

const JSON: &[(&str, &str)] = &[("content-type", "application/json")];

#[test]
fn a_client_that_leaves_takes_a_queued_job_along_and_leaves_a_running_one() {
    let server = Server::start(&[]);
    let running = with(
        endless(),
        json!({ "steps": 300, "n_iter": 1, "save_images": true }),
    );
    let client = server.open(
        "POST",
        "/sdapi/v1/txt2img",
        JSON,
        running.to_string().as_bytes(),
    );
    server.wait_for_step();
    let queued = with(
        small(),
        json!({ "force_task_id": "task(gone)", "save_images": true }),
    );
    let waiting = server.open(
        "POST",
        "/sdapi/v1/txt2img",
        JSON,
        queued.to_string().as_bytes(),
    );
    let pending = || server.get("/internal/pending-tasks").json()["tasks"].clone();
    until("the second job to wait", || {
        (pending() == json!(["task(gone)"])).then_some(())
    });
    drop(waiting);
    until("the second job to leave the line", || {
        (pending() == json!([])).then_some(())
    });
    drop(client);
    until("the first job's file", || {
        (server.files("outputs/txt2img-images").len() == 1).then_some(())
    });
    server.wait_idle();
    assert_eq!(
        server.files("outputs/txt2img-images").len(),
        1,
        "the job that left made nothing"
    );
    server.assert_works();
}

#[test]
fn half_a_request_harms_nobody() {
    let server = Server::start(&[]);
    let mut half = TcpStream::connect(("127.0.0.1", server.port)).unwrap();
    half.write_all(
        b"POST /sdapi/v1/txt2img HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{\"prompt\":",
    )
    .unwrap();
    let mut silent = TcpStream::connect(("127.0.0.1", server.port)).unwrap();
    silent.write_all(b"POST /sdapi").unwrap();
    server.assert_works();
    drop((half, silent));
    let mut junk = TcpStream::connect(("127.0.0.1", server.port)).unwrap();
    junk.write_all(b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n")
        .unwrap();
    let mut answer = Vec::new();
    junk.read_to_end(&mut answer).unwrap();
    assert!(
        answer.is_empty() || answer.starts_with(b"HTTP/1.1 400"),
        "{:?}",
        String::from_utf8_lossy(&answer)
    );
    server.assert_works();
}

#[test]
fn sigterm_lets_the_running_job_finish_and_answers_the_queued_one() {
    let mut server = Arc::new(Server::start(&[]));
    let job = server.post_later(
        "/sdapi/v1/txt2img",
        with(endless(), json!({ "steps": 200, "n_iter": 1 })),
    );
    server.wait_for_step();
    let queued = server.post_later(
        "/sdapi/v1/txt2img",
        with(small(), json!({ "force_task_id": "task(q)" })),
    );
    until("the second job to wait", || {
        (server.get("/internal/pending-tasks").json()["size"] == 1).then_some(())
    });
    server.signal("TERM");
    let refused = queued.join().unwrap();
    assert_eq!(
        (refused.status, refused.header("retry-after")),
        (503, Some("10"))
    );
    assert_eq!(
        refused.json()["detail"],
        "the server is shutting down; send the request again after its restart"
    );
    until("the listener to close", || {
        TcpStream::connect(("127.0.0.1", server.port))
            .is_err()
            .then_some(())
    });
    let answer = job.join().unwrap();
    assert_eq!(answer.images().len(), 1);
    assert!(
        Arc::get_mut(&mut server)
            .expect("all requests have ended")
            .wait_exit()
            .success(),
        "{}",
        server.log()
    );
}

#[test]
fn sigterm_interrupts_a_job_that_takes_longer_than_the_grace_time() {
    let mut server = Arc::new(Server::start(&["--shutdown-grace", "1"]));
    let job = server.post_later(
        "/sdapi/v1/txt2img",
        with(endless(), json!({ "save_images": true })),
    );
    server.wait_for_step();
    server.signal("TERM");
    let answer = job.join().unwrap();
    assert_eq!(
        answer.images().len(),
        1,
        "the batch under way, as far as it came"
    );
    assert_eq!(answer.info()["all_seeds"].as_array().unwrap().len(), 100);
    assert!(
        Arc::get_mut(&mut server)
            .expect("all requests have ended")
            .wait_exit()
            .success(),
        "{}",
        server.log()
    );
    assert!(
        server.files("outputs/txt2img-images").is_empty(),
        "an unfinished picture is not kept"
    );
}

#[test]
fn a_second_signal_ends_the_process_at_once() {
    let mut server = Arc::new(Server::start(&["--shutdown-grace", "600"]));
    let mut client = server.open(
        "POST",
        "/sdapi/v1/txt2img",
        JSON,
        endless().to_string().as_bytes(),
    );
    server.wait_for_step();
    server.signal("TERM");
    until("the first signal", || {
        server.log().contains("shutting down").then_some(())
    });
    server.signal("TERM");
    let status = Arc::get_mut(&mut server).unwrap().wait_exit();
    assert_eq!(status.code(), Some(143), "{status}");
    let mut rest = Vec::new();
    // Reset or closed: in either case without an answer.
    let _ = client.read_to_end(&mut rest);
    assert!(rest.is_empty());
}

#[test]
fn a_killed_server_starts_again_in_the_same_directory() {
    let mut server = Server::start(&[]);
    server.post("/sdapi/v1/options", &json!({ "jpeg_quality": 61 }));
    let _client = server.open(
        "POST",
        "/sdapi/v1/txt2img",
        JSON,
        with(endless(), json!({ "save_images": true }))
            .to_string()
            .as_bytes(),
    );
    server.wait_for_step();
    server.signal("KILL");
    assert_eq!(server.wait_exit().signal(), Some(9));
    let again = Server::spawn(server.dir.clone(), &[], &[]);
    again.wait_ready();
    assert_eq!(again.get("/sdapi/v1/options").json()["jpeg_quality"], 61);
    assert_eq!(again.progress()["state"]["job_count"], 0);
    again.assert_works();
}

#[test]
fn a_port_in_use_is_named() {
    let server = Server::start(&[]);
    let dir = tempfile::tempdir().unwrap();
    let output = sdgen()
        .args(["serve", "--port", &server.port.to_string(), "--data-dir"])
        .arg(dir.path())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let expected = format!(
        "sdgen: port in use: `127.0.0.1:{}`; stop the other program or choose another port with `--port`\n",
        server.port
    );
    assert_eq!(String::from_utf8(output.stderr).unwrap(), expected);
    server.assert_works();
}

#[test]
fn an_output_directory_that_cannot_be_written_fails_the_job_and_not_the_server() {
    let server = Server::start(&[]);
    std::fs::write(server.data().join("file"), b"").unwrap();
    let save = |directory: &str| {
        let overrides = json!({ "outdir_txt2img_samples": directory });
        server.post(
            "/sdapi/v1/txt2img",
            &with(
                small(),
                json!({ "save_images": true, "override_settings": overrides }),
            ),
        )
    };
    for directory in ["file/below", "/proc/sdgen"] {
        let refused = save(directory);
        assert_eq!(
            (refused.status, refused.json()["error"].as_str()),
            (500, Some("OSError")),
            "{}",
            refused.text()
        );
        let detail = refused.json()["detail"].as_str().unwrap().to_string();
        assert!(
            detail.starts_with("cannot write `") && detail.contains(directory),
            "{detail}"
        );
    }
    assert_eq!(save("elsewhere").status, 200);
    assert_eq!(server.files("elsewhere").len(), 1);
}

/// A mounted file system of 64 KiB; unmounted when dropped.
struct SmallDisk(PathBuf);

impl SmallDisk {
    /// `None` where mounting is not permitted.
    fn mount(at: &Path) -> Option<Self> {
        std::fs::create_dir_all(at).unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=64k", "tmpfs"])
            .arg(at)
            .output();
        mounted
            .is_ok_and(|output| output.status.success())
            .then(|| Self(at.to_path_buf()))
    }

    /// Leaves no free byte.
    fn fill(&self) -> PathBuf {
        let path = self.0.join("ballast");
        let mut file = std::fs::File::create(&path).unwrap();
        while file.write_all(&[0; 1024]).is_ok() {}
        path
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk_fails_the_job_and_leaves_no_torn_file() {
    // `/dev/full` is a full disk that everybody has.
    let dir = tempfile::tempdir().unwrap();
    let output = sdgen()
        .args([
            "prompt",
            "a red apple",
            "--steps",
            "1",
            "--save-latents",
            "/dev/full",
            "-o",
        ])
        .arg(dir.path().join("a.png"))
        .arg("--data-dir")
        .arg(dir.path())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(
        stderr,
        "sdgen: cannot write latents to `/dev/full`: No space left on device (os error 28)\n"
    );

    let server = Server::start(&[]);
    let Some(disk) = SmallDisk::mount(&server.data().join("disk")) else {
        eprintln!(
            "mounting is not permitted here: the half of this test with a file system of its own is left out"
        );
        return;
    };
    let ballast = disk.fill();
    let request = with(
        small(),
        json!({ "save_images": true, "override_settings": {
        "outdir_txt2img_samples": "disk", "save_to_dirs": false, "samples_filename_pattern": "[seed]" } }),
    );
    let full = server.post("/sdapi/v1/txt2img", &request);
    assert_eq!(full.status, 500);
    let detail = full.json()["detail"].as_str().unwrap().to_string();
    assert!(
        detail.starts_with("cannot write `")
            && detail.ends_with("No space left on device (os error 28)"),
        "{detail}"
    );
    assert_eq!(server.files("disk"), std::slice::from_ref(&ballast));
    server.assert_works();
    std::fs::remove_file(ballast).unwrap();
    assert_eq!(server.post("/sdapi/v1/txt2img", &request).status, 200);
    assert_eq!(server.files("disk"), [disk.0.join("00000-7.png")]);
}

#[test]
fn every_answer_of_a_busy_server_stays_quick() {
    let server = Arc::new(Server::start(&[]));
    let job = server.post_later("/sdapi/v1/txt2img", endless());
    server.wait_for_step();
    let mut slowest = std::time::Duration::ZERO;
    for _ in 0..50 {
        for path in [
            "/sdapi/v1/progress",
            "/sdapi/v1/options",
            "/sdapi/v1/sd-models",
            "/healthz",
        ] {
            let started = std::time::Instant::now();
            assert_eq!(server.get(path).status, 200);
            slowest = slowest.max(started.elapsed());
        }
    }
    eprintln!("slowest of 200 light requests during a job: {slowest:?}");
    assert!(slowest < std::time::Duration::from_secs(2), "{slowest:?}");
    server.post("/sdapi/v1/interrupt", &json!({}));
    let answer: Answer = job.join().unwrap();
    assert_eq!(answer.status, 200);
}

#[test]
fn a_server_whose_log_nobody_reads_any_more_works_and_ends() {
    let dir = tempfile::tempdir().unwrap();
    let mut child = sdgen()
        .args(["serve", "--port", "0", "--data-dir"])
        .arg(dir.path())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let port: u16 = lines
        .find_map(|line| {
            let line = line.unwrap();
            line.rsplit_once("http://127.0.0.1:")?.1.parse().ok()
        })
        .unwrap();
    drop(lines);
    let body = small().to_string();
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let head = "POST /sdapi/v1/txt2img HTTP/1.1\r\nhost: x\r\nconnection: close\r\n";
    write!(stream, "{head}content-length: {}\r\n\r\n{body}", body.len()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer:.100}");
    let kill = Command::new("sh")
        .args(["-c", &format!("kill -TERM {}", child.id())])
        .status();
    assert!(kill.unwrap().success());
    let code = until("the server to end", || child.try_wait().unwrap());
    assert!(code.success(), "{code}");
}
