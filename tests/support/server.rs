//! A real `sdgen serve` on a free port in a directory of its own, and a small HTTP client that shows every status.
//!
//! The process is killed when its handle is dropped. Waiting is always for a condition, with a deadline.

#![allow(
    dead_code,
    reason = "every test file uses its own part of the shared code"
)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// Longer than anything here takes on a slow machine.
pub(crate) const DEADLINE: Duration = Duration::from_mins(4);

/// Asks until there is an answer.
#[track_caller]
pub(crate) fn until<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(started.elapsed() < DEADLINE, "waited too long for: {what}");
        std::thread::park_timeout(Duration::from_millis(5));
    }
}

/// The program under test, or the one that `SDGEN_BIN` names, with none of our variables in its environment.
pub(crate) fn sdgen() -> Command {
    let built = || env!("CARGO_BIN_EXE_sdgen").into();
    let mut command = Command::new(std::env::var_os("SDGEN_BIN").unwrap_or_else(built));
    for name in [
        "SDGEN_DATA_DIR",
        "SDGEN_CONFIG",
        "WORKSPACE",
        "A1111_ARGS",
        "COMMANDLINE_ARGS",
        "SDGEN_LOG",
        "RUST_BACKTRACE",
    ] {
        command.env_remove(name);
    }
    command
}

/// A running server.
pub(crate) struct Server {
    child: Child,
    pub(crate) port: u16,
    pub(crate) dir: Arc<tempfile::TempDir>,
    log: Arc<Mutex<String>>,
    authorization: Option<String>,
}

impl Server {
    /// Starts a server and waits until it could make a picture.
    pub(crate) fn start(args: &[&str]) -> Self {
        let server = Self::spawn(Arc::new(tempfile::tempdir().unwrap()), args, &[]);
        server.wait_ready();
        server
    }

    /// Starts a server in a directory and waits until it listens.
    pub(crate) fn spawn(dir: Arc<tempfile::TempDir>, args: &[&str], env: &[(&str, &str)]) -> Self {
        let mut command = sdgen();
        command
            .args(["serve", "--port", "0", "--data-dir"])
            .arg(dir.path())
            .args(args)
            .envs(env.iter().copied());
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = Arc::new(Mutex::new(String::new()));
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let sink = log.clone();
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                let mut log = sink.lock().unwrap();
                log.push_str(&line);
                log.push('\n');
            }
        });
        let reader = log.clone();
        let port = until("the server to listen", || {
            let log = reader.lock().unwrap();
            if let Some(status) = child.try_wait().unwrap() {
                panic!("the server ended with {status}:\n{log}");
            }
            let address = log.split("listening on http://").nth(1)?;
            address
                .split_whitespace()
                .next()?
                .rsplit(':')
                .next()?
                .parse()
                .ok()
        });
        Self {
            child,
            port,
            dir,
            log,
            authorization: None,
        }
    }

    /// Sends these credentials with every request.
    pub(crate) fn with_credentials(mut self, pair: &str) -> Self {
        use base64::Engine as _;
        self.authorization = Some(format!(
            "Basic {}",
            base64::engine::general_purpose::STANDARD.encode(pair)
        ));
        self
    }

    pub(crate) fn wait_ready(&self) {
        until("the server to be ready", || {
            (self.get("/readyz").status == 200).then_some(())
        });
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    pub(crate) fn data(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    pub(crate) fn get(&self, path: &str) -> Answer {
        self.send("GET", path, &[], b"")
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Answer {
        self.send(
            "POST",
            path,
            &[("content-type", "application/json")],
            body.to_string().as_bytes(),
        )
    }

    /// One request on a connection of its own.
    pub(crate) fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Answer {
        let mut stream = self.open(method, path, headers, body);
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        Answer::parse(&bytes)
    }

    /// Sends a request and returns the open connection.
    pub(crate) fn open(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> TcpStream {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut lines = vec![
            format!("{method} {path} HTTP/1.1"),
            "host: localhost".into(),
            "connection: close".into(),
        ];
        let credentials = self
            .authorization
            .as_deref()
            .map(|value| ("authorization", value));
        lines.extend(
            headers
                .iter()
                .copied()
                .chain(credentials)
                .map(|(name, value)| format!("{name}: {value}")),
        );
        if method == "POST" {
            lines.push(format!("content-length: {}", body.len()));
        }
        stream
            .write_all(
                (lines.join(
                    "
",
                ) + "

")
                .as_bytes(),
            )
            .unwrap();
        // A server may answer and close before it has read a body that it refuses.
        let _ = stream.write_all(body);
        stream
    }

    /// Starts a request in a thread.
    pub(crate) fn post_later(
        self: &Arc<Self>,
        path: &str,
        body: Value,
    ) -> std::thread::JoinHandle<Answer> {
        let (server, path) = (self.clone(), path.to_string());
        std::thread::spawn(move || server.post(&path, &body))
    }

    pub(crate) fn progress(&self) -> Value {
        self.get("/sdapi/v1/progress?skip_current_image=true")
            .json()
    }

    /// Waits until a job is past its first step.
    pub(crate) fn wait_for_step(&self) -> Value {
        until("a job to take its first step", || {
            let progress = self.progress();
            let running = progress["state"]["job_count"].as_i64() > Some(0);
            (running && progress["state"]["sampling_step"].as_i64() > Some(0)).then_some(progress)
        })
    }

    pub(crate) fn wait_idle(&self) {
        until("the server to be idle", || {
            (self.progress()["state"]["job_count"] == 0).then_some(())
        });
    }

    /// A small job is done: the server is well.
    #[track_caller]
    pub(crate) fn assert_works(&self) {
        let answer = self.post("/sdapi/v1/txt2img", &small());
        assert_eq!(
            answer.status,
            200,
            "the next job: {}\n{}",
            answer.text(),
            self.log()
        );
    }

    pub(crate) fn signal(&self, name: &str) {
        let status = Command::new("sh")
            .arg("-c")
            .arg(format!("kill -{name} {}", self.child.id()))
            .status()
            .unwrap();
        assert!(status.success());
    }

    pub(crate) fn wait_exit(&mut self) -> ExitStatus {
        until("the server to end", || self.child.try_wait().unwrap())
    }

    /// Files below a directory of the data directory, sorted.
    pub(crate) fn files(&self, below: &str) -> Vec<PathBuf> {
        files_below(&self.data().join(below))
    }
}

/// A server that the tests of a file share. It lives while one of them holds it; a static one would outlive the test process.
pub(crate) struct Shared {
    args: &'static [&'static str],
    server: Mutex<Weak<Server>>,
}

impl Shared {
    pub(crate) const fn new(args: &'static [&'static str]) -> Self {
        Self {
            args,
            server: Mutex::new(Weak::new()),
        }
    }

    pub(crate) fn hold(&self) -> Arc<Server> {
        let mut server = self.server.lock().unwrap_or_else(PoisonError::into_inner);
        server.upgrade().unwrap_or_else(|| {
            let started = Arc::new(Server::start(self.args));
            *server = Arc::downgrade(&started);
            started
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn files_below(directory: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            files.extend(files_below(&entry.path()));
        } else {
            files.push(entry.path());
        }
    }
    files.sort();
    files
}

/// A request that takes a moment.
pub(crate) fn small() -> Value {
    json!({ "prompt": "a red apple", "seed": 7, "steps": 2, "width": 64, "height": 64, "sampler_name": "Euler" })
}

/// A request that takes longer than any test waits for it.
pub(crate) fn endless() -> Value {
    json!({ "prompt": "a red apple", "seed": 7, "steps": 1000, "n_iter": 100, "width": 128, "height": 128 })
}

/// `base` with some fields replaced.
pub(crate) fn with(mut base: Value, changes: Value) -> Value {
    let Value::Object(changes) = changes else {
        panic!("not an object: {changes}")
    };
    for (key, value) in changes {
        base[key] = value;
    }
    base
}

/// A whole HTTP answer.
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    pub(crate) fn parse(bytes: &[u8]) -> Self {
        let end = bytes
            .windows(4)
            .position(|window| window == b"\r\n\r\n")
            .unwrap_or_else(|| {
                panic!("no whole answer: {:?}", String::from_utf8_lossy(bytes));
            });
        let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
        let mut lines = head.lines();
        let status = lines
            .next()
            .unwrap()
            .split(' ')
            .nth(1)
            .unwrap()
            .parse()
            .unwrap();
        let pairs = lines.filter_map(|line| line.split_once(':'));
        let headers: Vec<_> = pairs
            .map(|(name, value)| (name.to_lowercase(), value.trim().to_string()))
            .collect();
        let chunked = headers
            .iter()
            .any(|(name, value)| name == "transfer-encoding" && value == "chunked");
        let body = if chunked {
            dechunk(&bytes[end + 4..])
        } else {
            bytes[end + 4..].to_vec()
        };
        Self {
            status,
            headers,
            body,
        }
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(found, _)| found == name)
            .map(|(_, value)| value.as_str())
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error}: {}", self.text()))
    }

    /// The parsed `info` of a generation.
    #[track_caller]
    pub(crate) fn info(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.text());
        serde_json::from_str(self.json()["info"].as_str().expect("info is a string")).unwrap()
    }

    /// The picture files of a generation.
    #[track_caller]
    pub(crate) fn images(&self) -> Vec<Vec<u8>> {
        use base64::Engine as _;
        assert_eq!(self.status, 200, "{}", self.text());
        let answer = self.json();
        let decode = |image: &Value| {
            base64::engine::general_purpose::STANDARD
                .decode(image.as_str().unwrap())
                .unwrap()
        };
        answer["images"]
            .as_array()
            .unwrap()
            .iter()
            .map(decode)
            .collect()
    }

    /// `(last of loc, msg)` of each problem of a 422.
    #[track_caller]
    pub(crate) fn problems(&self) -> Vec<(String, String)> {
        assert_eq!(self.status, 422, "{}", self.text());
        let answer = self.json();
        let entry = |problem: &Value| {
            let field = problem["loc"].as_array().unwrap().last().unwrap();
            let field = field
                .as_str()
                .map_or_else(|| field.to_string(), str::to_string);
            (field, problem["msg"].as_str().unwrap().to_string())
        };
        answer["detail"]
            .as_array()
            .unwrap()
            .iter()
            .map(entry)
            .collect()
    }
}

fn dechunk(mut bytes: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    while let Some(end) = bytes.windows(2).position(|window| window == b"\r\n") {
        let size =
            usize::from_str_radix(std::str::from_utf8(&bytes[..end]).unwrap().trim(), 16).unwrap();
        if size == 0 {
            break;
        }
        body.extend(&bytes[end + 2..end + 2 + size]);
        bytes = &bytes[end + 4 + size..];
    }
    body
}
