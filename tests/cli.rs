//! The command line as a user meets it: files, standard output, standard error, exit code.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "support/server.rs"]
mod server;

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use serde_json::Value;
use server::{Server, files_below, sdgen};
use sha2::{Digest, Sha256};

/// What a command said.
struct Said {
    code: Option<i32>,
    out: String,
    err: String,
}

fn run(command: &mut Command) -> Said {
    let output = command.stdin(Stdio::null()).output().unwrap();
    Said {
        code: output.status.code(),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

/// `sdgen` in a directory, which is its data directory too.
fn within(dir: &Path, args: &[&str]) -> Command {
    let mut command = sdgen();
    command
        .current_dir(dir)
        .args(["--data-dir", "data"])
        .args(args);
    command
}

/// A quick `prompt` command line.
fn prompt<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [
        &[
            "prompt",
            "a red apple",
            "--seed",
            "7",
            "--steps",
            "2",
            "-W",
            "64",
            "-H",
            "64",
        ],
        more,
    ]
    .concat()
}

#[test]
fn prompt_writes_a_picture_and_names_it() {
    let dir = tempfile::tempdir().unwrap();
    let said = run(&mut within(dir.path(), &prompt(&[])));
    assert_eq!((said.code, said.err.as_str()), (Some(0), ""));
    let file = said.out.trim_end();
    assert!(
        file.contains("outputs/txt2img-images/") && file.ends_with("/00000-7.png"),
        "{file}"
    );
    let shown = run(&mut within(dir.path(), &["png-info", file]));
    assert!(
        shown
            .out
            .starts_with("a red apple\nSteps: 2, Sampler: DPM++ 2M, "),
        "{}",
        shown.out
    );
    assert!(
        shown.out.contains("CFG scale: 5, Seed: 7, Size: 64x64"),
        "{}",
        shown.out
    );
}

#[test]
fn json_is_one_object_with_the_promised_keys() {
    let dir = tempfile::tempdir().unwrap();
    let said = run(&mut within(
        dir.path(),
        &prompt(&[
            "--json",
            "--batch-size",
            "2",
            "--batch-count",
            "2",
            "-o",
            "a.jpeg",
            "--save-latents",
            "l.safetensors",
            "--quiet",
        ]),
    ));
    assert_eq!((said.code, said.err.as_str()), (Some(0), ""));
    assert_eq!(said.out.lines().count(), 1);
    let report: Value = serde_json::from_str(&said.out).unwrap();
    let keys: Vec<&str> = report
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    assert_eq!(
        keys,
        [
            "files",
            "seeds",
            "infotexts",
            "timings",
            "device",
            "dtype",
            "checkpoint"
        ]
    );
    let timings: Vec<&str> = report["timings"]
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    assert_eq!(
        timings,
        [
            "load_s",
            "text_s",
            "sample_s",
            "decode_s",
            "save_s",
            "total_s",
            "steps_per_s"
        ]
    );
    assert!(
        report["timings"]
            .as_object()
            .unwrap()
            .values()
            .all(Value::is_number),
        "{report}"
    );
    assert_eq!(
        report["files"],
        serde_json::json!(["./a-1.jpeg", "./a-2.jpeg", "./a-3.jpeg", "./a-4.jpeg"])
    );
    assert_eq!(
        (&report["seeds"], &report["device"], &report["dtype"]),
        (
            &serde_json::json!([7, 8, 9, 10]),
            &"cpu".into(),
            &"f32".into()
        )
    );
    let jpeg = std::fs::read(dir.path().join("a-4.jpeg")).unwrap();
    assert_eq!(
        sdgen::imaging::read_metadata(&jpeg)
            .unwrap()
            .infotext
            .as_deref(),
        report["infotexts"][3].as_str()
    );
    let latents = std::fs::read(dir.path().join("l.safetensors")).unwrap();
    let latents = safetensors::SafeTensors::deserialize(&latents).unwrap();
    assert_eq!(latents.tensor("latents").unwrap().shape(), [4, 4, 8, 8]);
    assert_eq!(
        latents.tensor("latents").unwrap().dtype(),
        safetensors::Dtype::F32
    );
}

#[test]
fn without_a_size_the_checkpoint_decides() {
    let dir = tempfile::tempdir().unwrap();
    let said = run(&mut within(
        dir.path(),
        &[
            "prompt", "a cat", "--steps", "1", "-o", "out/", "--format", "webp",
        ],
    ));
    assert_eq!(said.code, Some(0), "{}", said.err);
    let files = files_below(&dir.path().join("out"));
    assert_eq!(files.len(), 1);
    assert_eq!(
        image::open(&files[0]).unwrap().into_rgb8().dimensions(),
        (128, 128)
    );
}

#[test]
#[allow(clippy::too_many_lines, reason = "one table of refusals")]
fn what_cannot_be_used_is_refused_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("file"), b"").unwrap();
    let long = "x".repeat(100_000);
    let refuse = |args: &[&str], code: i32, message: &str| {
        let said = run(&mut within(dir.path(), args));
        assert_eq!(
            (said.code, said.out.as_str()),
            (Some(code), ""),
            "{args:?}: {}",
            said.err
        );
        assert_eq!(said.err.lines().count(), 1, "{}", said.err);
        assert!(
            said.err.starts_with(&format!("sdgen: {message}")),
            "{args:?}: {}",
            said.err
        );
    };
    refuse(
        &["prompt", "x", "-W", "0"],
        2,
        "`--width` must be between 8 and 4096 pixels (setting `limits.max_side`): `0`",
    );
    refuse(
        &["prompt", "x", "-H", "7"],
        2,
        "`--height` must be between 8 and 4096 pixels (setting `limits.max_side`): `7`",
    );
    refuse(
        &["prompt", "x", "-W", "100000"],
        2,
        "`--width` must be between 8 and 4096 pixels (setting `limits.max_side`): `100000`",
    );
    refuse(
        &["prompt", "x", "--steps", "0"],
        2,
        "`--steps` must be between 1 and 1000 (setting `limits.max_steps`): `0`",
    );
    refuse(
        &["prompt", "x", "--steps", "100000"],
        2,
        "`--steps` must be between 1 and 1000 (setting `limits.max_steps`): `100000`",
    );
    refuse(
        &["prompt", "x", "--cfg-scale", "nan"],
        2,
        "`--cfg-scale` must be a finite number of at most 10000: `NaN`",
    );
    refuse(
        &["prompt", "x", "--cfg-scale", "high"],
        2,
        "`--cfg-scale`: not a number: `high`",
    );
    refuse(
        &["prompt", "x", "--batch-count", "0"],
        2,
        "`--batch-count` must be between 1 and 1000",
    );
    refuse(
        &["prompt", &long],
        2,
        "`PROMPT` has 100000 bytes, more than 65536 (setting `limits.max_prompt_kib`)",
    );
    refuse(
        &["prompt", "x", "--sampler", "Eulerr"],
        2,
        "unknown sampler: `Eulerr`; valid: `DPM++ 2M`, ",
    );
    refuse(
        &["prompt", "x", "--scheduler", "fast"],
        2,
        "unknown scheduler: `fast`; valid: `Automatic`, ",
    );
    refuse(
        &["prompt", "x", "--noise-source", "dice"],
        2,
        "unknown noise source: `dice`; valid: `GPU`, `CPU`, `NV`",
    );
    refuse(
        &["prompt", "x", "--device", "gpu"],
        2,
        "flag --device: unknown device: `gpu`; use `auto`, `cpu`, `cuda`, `cuda:N`, several as `cuda:0,cuda:1`, or `all`",
    );
    refuse(
        &["prompt", "x", "--device", "cpu", "--dtype", "f16"],
        2,
        "device not available: `cpu with f16`; the CPU computes in f32, bf16 and fp8; use",
    );
    refuse(
        &["prompt", "x", "-m", "nope.safetensors"],
        2,
        "checkpoint not found: `nope.safetensors`; known: `sdgen-demo",
    );
    refuse(
        &["prompt", "x", "--vae", "nope"],
        2,
        "VAE not found: `nope`; none is installed",
    );
    refuse(&["prompt", "x", "-m", "file"], 1, "");
    refuse(
        &["prompt", "x", "-o", "a.png", "--format", "webp"],
        2,
        "`--output a.png` and `--format webp` contradict each other; leave one out",
    );
    refuse(
        &["prompt", "x", "-o", "a.gif"],
        2,
        "unknown picture format: `gif`; use `png`, `jpg` or `webp`",
    );
    refuse(
        &["prompt", "x", "-o", "file/below/a.png"],
        1,
        "output directory is not writable: `file/below`: Not a directory (os error 20)",
    );
    refuse(
        &["prompt", "x", "-o", "/proc/sdgen/"],
        1,
        "output directory is not writable: `/proc/sdgen/`: No such file or directory",
    );
    refuse(
        &["prompt", "x", "--mask", "file"],
        2,
        "`--mask` needs `--init-image`",
    );
    refuse(
        &["prompt", "x", "--denoising-strength", "0.5"],
        2,
        "`--denoising-strength` needs `--init-image` or hires fix (`--hr-scale`)",
    );
    refuse(
        &["prompt", "x", "--init-image", "none.png"],
        1,
        "cannot read `none.png`: No such file or directory (os error 2)",
    );
    refuse(
        &["prompt", "x", "--init-image", "file"],
        1,
        "`file`: unknown picture format; use PNG, JPEG or WebP",
    );
    image::RgbImage::new(64, 64)
        .save(dir.path().join("black.png"))
        .unwrap();
    let from = ["prompt", "x", "--init-image", "black.png"];
    refuse(
        &[&from[..], &["--hr-scale", "2"]].concat(),
        2,
        "hires fix starts from a prompt: leave `--init-image` or `--hr-…` out",
    );
    refuse(
        &[&from[..], &["--denoising-strength", "1.5"]].concat(),
        2,
        "`--denoising-strength` must be between 0 and 1: `1.5`",
    );
    refuse(
        &[&from[..], &["--init-image", "black.png"]].concat(),
        2,
        "2 init images for a batch of 1; give one, or as many as `--batch-size` says",
    );
    refuse(
        &["prompt", "x", "--hr-upscaler", "4x"],
        2,
        "could not find upscaler named 4x; valid: `Latent`, ",
    );
    refuse(
        &prompt(&["--hr-scale", "100"]),
        2,
        "`--hr-scale` of `100` makes a side of 6400 pixels; a side must be between 8 and 4096 pixels (setting `limits.max_side`)",
    );
    refuse(
        &prompt(&["--hr-steps", "-1"]),
        2,
        "`--hr-steps` must be between 0 and 1000 (setting `limits.max_steps`): `-1`",
    );
    refuse(
        &[
            "prompt",
            "x",
            "--server",
            "http://127.0.0.1:1",
            "--save-latents",
            "l",
        ],
        2,
        "`--save-latents` cannot be used with `--server`",
    );
    refuse(
        &["prompt", "x", "--server", "http://127.0.0.1:1"],
        1,
        "cannot reach the server: `http://127.0.0.1:1`: ",
    );
    refuse(
        &["prompt", "x", "--server", "ftp://a"],
        2,
        "`--server`: not an http or https address: `ftp://a`",
    );
    refuse(
        &["png-info", "none.png"],
        1,
        "cannot read `none.png`: No such file or directory (os error 2)",
    );
    refuse(
        &["png-info", "file"],
        1,
        "`file`: unknown picture format; use PNG, JPEG or WebP",
    );
    refuse(
        &["models", "hash", "sdgen-demo"],
        2,
        "`sdgen-demo` is part of the program and has no file to hash",
    );
    refuse(
        &["models", "info", "nope"],
        2,
        "checkpoint not found: `nope`; known: `sdgen-demo",
    );
    refuse(
        &["serve", "--tls-certfile", "c.pem"],
        2,
        "TLS is not served by `sdgen serve`; put a TLS proxy before it and remove the flag",
    );
    refuse(
        &["serve", "--port", "high"],
        2,
        "flag --port: not a whole number: `high`",
    );
    refuse(&["serve", "--port", "70000"], 2, "flag --port: ");
    refuse(
        &[
            "serve",
            "--checkpoint",
            "nope",
            "--port",
            "0",
            "--log",
            "error",
        ],
        2,
        "checkpoint not found: `nope`",
    );
    refuse(
        &["--config", "none.toml", "config"],
        2,
        "settings file cannot be read: `none.toml`: No such file or directory (os error 2)",
    );
    assert!(files_below(&dir.path().join("data")).is_empty());

    let invalid = OsStr::from_bytes(b"a \xff apple");
    let said = run(within(dir.path(), &["prompt"]).arg(invalid));
    assert_eq!(
        (said.code, said.err.as_str()),
        (
            Some(2),
            "sdgen: argument is not valid UTF-8: `a \u{fffd} apple`\n"
        )
    );
    let usage = run(&mut within(dir.path(), &["prompt", "x", "--stepps", "3"]));
    assert_eq!(usage.code, Some(2));
    assert!(
        usage.err.contains("unexpected argument '--stepps'") && usage.err.contains("--steps"),
        "{}",
        usage.err
    );
}

#[test]
fn help_and_version_are_answers() {
    let dir = tempfile::tempdir().unwrap();
    for args in [
        &["--help"][..],
        &["serve", "--help"],
        &["prompt", "-h"],
        &["--version"],
    ] {
        let said = run(&mut within(dir.path(), args));
        assert_eq!((said.code, said.err.as_str()), (Some(0), ""), "{args:?}");
        assert!(said.out.contains("sdgen"), "{}", said.out);
    }
}

#[test]
fn config_prints_values_with_their_origin() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("data")).unwrap();
    std::fs::write(
        dir.path().join("data/sdgen.toml"),
        "[limits]\nmax_steps = 50\n[server]\napi_auth = [\"u:hunter2\"]\n",
    )
    .unwrap();
    let said = run(within(dir.path(), &["config"])
        .env("SDGEN_PORT", "81")
        .env("A1111_ARGS", "--no-half"));
    assert_eq!(said.code, Some(0), "{}", said.err);
    for line in [
        "max_steps = 50  # file data/sdgen.toml",
        "port = 81  # environment SDGEN_PORT",
        "dtype = \"f32\"  # environment A1111_ARGS",
        "api_auth = [\"***\"]  # file data/sdgen.toml",
        "queue_limit = 256  # default",
    ] {
        assert!(said.out.contains(line), "{line}:\n{}", said.out);
    }
    assert!(
        said.out.starts_with("# data directory: ") && said.out.contains("(flag --data-dir)"),
        "{}",
        said.out
    );
    let limited = run(&mut within(dir.path(), &["prompt", "x", "--steps", "51"]));
    assert!(
        limited.err.contains("must be between 1 and 50"),
        "{}",
        limited.err
    );
    std::fs::write(
        dir.path().join("data/sdgen.toml"),
        "[limits]\nmax_steps = 0\n[log]\nlevel = \"sdgen=loud\"\n",
    )
    .unwrap();
    let said = run(&mut within(dir.path(), &["config"]));
    assert_eq!(said.code, Some(2));
    let expected = "sdgen: `limits.max_steps`: must be at least 1: `0`; `log.level`: not a level or filter: `sdgen=loud`\n";
    assert_eq!(said.err, expected);
}

#[test]
fn ctrl_c_ends_between_steps_and_keeps_what_was_finished() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = within(
        dir.path(),
        &[
            "prompt",
            "a cat",
            "--steps",
            "3",
            "--batch-count",
            "1000",
            "-W",
            "64",
            "-H",
            "64",
            "-o",
            "out/",
        ],
    );
    let mut child = command
        .env("SDGEN_LOG", "info")
        .stderr(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let loaded = lines
        .by_ref()
        .map_while(Result::ok)
        .find(|line| line.contains("loaded"));
    assert!(loaded.is_some());
    Command::new("sh")
        .arg("-c")
        .arg(format!("kill -INT {}", child.id()))
        .status()
        .unwrap();
    let rest: Vec<String> = lines.map_while(Result::ok).collect();
    let status = child.wait().unwrap();
    assert_eq!(status.code(), Some(130), "{rest:?}");
    let written = files_below(&dir.path().join("out")).len();
    let last = rest.last().unwrap();
    assert_eq!(
        last,
        &format!("sdgen: interrupted; {written} of 1000 pictures written")
    );
    assert!(written < 1000);
}

#[test]
fn a_server_can_do_the_work() {
    let server = Server::start(&["--api-auth", "user:pass"]);
    let dir = tempfile::tempdir().unwrap();
    let address = format!("http://user:pass@127.0.0.1:{}", server.port);
    let remote = run(&mut within(
        dir.path(),
        &prompt(&[
            "--server",
            &address,
            "-o",
            "r.png",
            "--json",
            "--batch-count",
            "2",
        ]),
    ));
    assert_eq!((remote.code, remote.err.as_str()), (Some(0), ""));
    let report: Value = serde_json::from_str(&remote.out).unwrap();
    assert_eq!(
        report["files"],
        serde_json::json!(["./r-1.png", "./r-2.png"])
    );
    assert_eq!(
        (&report["seeds"], &report["checkpoint"]),
        (&serde_json::json!([7, 8]), &"sdgen-demo".into())
    );
    let local = run(&mut within(dir.path(), &prompt(&["-o", "l.png"])));
    assert_eq!(local.code, Some(0), "{}", local.err);
    let pixels = |name: &str| image::open(dir.path().join(name)).unwrap().into_rgb8();
    assert_eq!(
        pixels("r-1.png"),
        pixels("l.png"),
        "the same picture here and there"
    );
    let closed = run(&mut within(
        dir.path(),
        &prompt(&["--server", &format!("http://127.0.0.1:{}", server.port)]),
    ));
    assert_eq!(
        (closed.code, closed.err.as_str()),
        (
            Some(1),
            "sdgen: the server answered 401: Not authenticated\n"
        )
    );
    let unknown = run(&mut within(
        dir.path(),
        &prompt(&["--server", &address, "-m", "nope", "-o", "x.png"]),
    ));
    assert_eq!(unknown.code, Some(1));
    assert!(
        unknown
            .err
            .starts_with("sdgen: checkpoint not found on the server: `nope`; known: `sdgen-demo ["),
        "{}",
        unknown.err
    );
}

#[test]
fn pictures_and_second_passes_are_the_same_here_and_on_a_server() {
    let server = Server::start(&[]);
    let dir = tempfile::tempdir().unwrap();
    let gradient = |x: u32, y: u32| image::Rgb([(x * 2) as u8, (y * 2) as u8, 90]);
    let mask = |x: u32, _| image::Luma([if x < 48 { 255 } else { 0u8 }]);
    image::RgbImage::from_fn(96, 72, gradient)
        .save(dir.path().join("init.png"))
        .unwrap();
    image::GrayImage::from_fn(96, 72, mask)
        .save(dir.path().join("mask.png"))
        .unwrap();
    let inpaint = "--init-image init.png --mask mask.png --denoising-strength 0.6 --mask-blur 2 --inpainting-fill 1 \
        --inpaint-full-res-padding 4";
    let whole = "--init-image init.png --resize-mode 1 --mask mask.png --mask-blur-x 0 --mask-blur-y 1 --mask-round false \
        --inpaint-full-res false --inpainting-mask-invert 1 --initial-noise-multiplier 1.1";
    let hires = "--hr-scale 1.5 --hr-upscaler Lanczos --hr-steps 3 --hr-sampler-name Euler --denoising-strength 0.5 --hr-cfg 3";
    let address = format!("http://127.0.0.1:{}", server.port);
    for (options, size, key) in [
        (inpaint, (96, 72), "Masked area padding: 4"),
        (whole, (64, 64), "Mask mode: Inpaint not masked"),
        (hires, (96, 96), "Hires upscale: 1.5"),
    ] {
        let options: Vec<&str> = options.split_whitespace().collect();
        let make = |more: &[&str], name: &str| {
            let all = [&options[..], &["--json", "-o", name], more].concat();
            let said = run(&mut within(dir.path(), &prompt(&all)));
            assert_eq!((said.code, said.err.as_str()), (Some(0), ""), "{key}");
            let report: Value = serde_json::from_str(&said.out).unwrap();
            let infotext = report["infotexts"][0].as_str().unwrap().to_string();
            assert!(infotext.contains(key), "{infotext}");
            let picture = image::open(dir.path().join(name)).unwrap().into_rgb8();
            (picture, infotext)
        };
        let (here, text_here) = make(&["--cfg-scale", "5.0", "--save-latents", "l"], "here.png");
        let (there, text_there) = make(&["--cfg-scale", "5.0", "--server", &address], "there.png");
        assert_eq!(here.dimensions(), size, "{key}");
        assert_eq!((here, text_here), (there, text_there));
    }
    let said = run(&mut within(
        dir.path(),
        &prompt(&["--init-image", "init.png"]),
    ));
    assert_eq!((said.code, said.err.as_str()), (Some(0), ""));
    assert_eq!(
        files_below(&dir.path().join("data/outputs/img2img-images")).len(),
        1
    );
}

#[test]
fn models_are_listed_described_and_hashed() {
    let dir = tempfile::tempdir().unwrap();
    let models = dir.path().join("data/models/Stable-diffusion/sub");
    std::fs::create_dir_all(&models).unwrap();
    let header = r#"{"__metadata__":{"modelspec.title":"Tiny"},"a":{"dtype":"F16","shape":[2],"data_offsets":[0,4]}}"#;
    let bytes = [
        &(header.len() as u64).to_le_bytes()[..],
        header.as_bytes(),
        &[0; 4],
    ]
    .concat();
    std::fs::write(models.join("tiny.safetensors"), &bytes).unwrap();
    let hash = sdgen::engine::hashes::hex(&Sha256::digest(&bytes));
    let list = run(&mut within(dir.path(), &["models", "list"])).out;
    assert_eq!(list.lines().next(), Some("sub/tiny.safetensors"));
    assert!(
        list.lines().nth(1).unwrap().starts_with("sdgen-demo ["),
        "{list}"
    );
    let hashed = run(&mut within(dir.path(), &["models", "hash", "tiny"])).out;
    assert_eq!(
        hashed,
        format!("sha256 {hash}\nshort  {}\nlegacy e3b0c442\n", &hash[..10])
    );
    let cache: Value =
        serde_json::from_slice(&std::fs::read(dir.path().join("data/cache.json")).unwrap())
            .unwrap();
    assert_eq!(
        cache["hashes"]["checkpoint/sub/tiny.safetensors"]["sha256"],
        hash
    );
    let info = run(&mut within(dir.path(), &["models", "info", &hash[..10]])).out;
    assert!(
        info.starts_with(&format!("title: sub/tiny.safetensors [{}]\n", &hash[..10])),
        "{info}"
    );
    assert!(
        info.contains("tensors: 1 in 4 bytes\ndtypes: F16\nmodelspec.title: Tiny\n"),
        "{info}"
    );
    let load = run(&mut within(dir.path(), &["prompt", "x", "-m", "tiny"]));
    assert_eq!(load.code, Some(1));
    assert!(
        load.err.contains("tiny.safetensors") && load.err.lines().count() == 1,
        "{}",
        load.err
    );
}

/// A web server with one file, which it cuts short at first. Remembers the `Range` of each request.
struct FileServer {
    port: u16,
    ranges: Arc<Mutex<Vec<Option<String>>>>,
}

impl FileServer {
    fn start(file: Vec<u8>, etag: String, cut_first_at: usize) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let ranges: Arc<Mutex<Vec<Option<String>>>> = Arc::default();
        let seen = ranges.clone();
        std::thread::spawn(move || {
            let mut cut = Some(cut_first_at);
            for stream in listener.incoming().map_while(Result::ok) {
                let mut reader = BufReader::new(stream);
                let head: Vec<String> = reader
                    .by_ref()
                    .lines()
                    .map_while(Result::ok)
                    .take_while(|line| !line.is_empty())
                    .collect();
                let range = head.iter().find_map(|line| {
                    line.to_lowercase()
                        .strip_prefix("range: bytes=")
                        .map(str::to_string)
                });
                seen.lock().unwrap().push(range.clone());
                let mut stream = reader.into_inner();
                if !head[0].contains("/tiny.safetensors") {
                    let _ = stream.write_all(
                        b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
                    );
                    continue;
                }
                let (from, to) = range
                    .as_deref()
                    .and_then(|range| range.split_once('-'))
                    .unwrap_or(("0", ""));
                let from: usize = from.parse().unwrap();
                let to = to.parse().map_or(file.len(), |to: usize| to + 1);
                let status = if range.is_some() {
                    "206 Partial Content"
                } else {
                    "200 OK"
                };
                let head = format!(
                    "HTTP/1.1 {status}\r\ncontent-length: {}\r\ncontent-range: bytes {from}-{}/{}\r\netag: \"{etag}\"\r\nx-repo-commit: abc\r\nconnection: close\r\n\r\n",
                    to - from,
                    to - 1,
                    file.len()
                );
                let body = &file[from..to];
                // Only a real transfer is cut, not the question for the size.
                let end = if body.len() > 1 {
                    cut.take().unwrap_or(body.len()).min(body.len())
                } else {
                    body.len()
                };
                let _ = stream
                    .write_all(head.as_bytes())
                    .and_then(|()| stream.write_all(&body[..end]));
            }
        });
        Self { port, ranges }
    }
}

#[test]
fn downloads_resume_and_are_verified() {
    let file: Vec<u8> = (0..300_000u32).flat_map(u32::to_le_bytes).collect();
    let hash = sdgen::engine::hashes::hex(&Sha256::digest(&file));
    let server = FileServer::start(file.clone(), hash.clone(), 500_000);
    let dir = tempfile::tempdir().unwrap();
    let endpoint = format!("http://127.0.0.1:{}", server.port);
    let pull = |args: &[&str]| {
        run(within(dir.path(), &["models", "pull"])
            .args(args)
            .env("HF_ENDPOINT", &endpoint)
            .env("HF_HOME", dir.path().join("hf")))
    };
    let first = pull(&["owner/repo/sub/tiny.safetensors"]);
    assert_eq!(first.code, Some(1));
    assert!(
        first.err.contains("the download stopped after 500000 ")
            && first.err.contains("start it again to continue"),
        "{}",
        first.err
    );
    let second = pull(&["owner/repo/sub/tiny.safetensors"]);
    assert_eq!(second.code, Some(0), "{}", second.err);
    let path = dir
        .path()
        .join("data/models/Stable-diffusion/tiny.safetensors");
    assert_eq!(
        second.out.trim_end(),
        path.canonicalize().unwrap().to_str().unwrap()
    );
    assert_eq!(std::fs::read(&path).unwrap(), file);
    let ranges = server.ranges.lock().unwrap().clone();
    assert_eq!(
        ranges,
        [
            Some("0-0".into()),
            None,
            Some("0-0".into()),
            Some("500000-".into())
        ]
    );
    assert_eq!(
        pull(&["owner/repo/sub/tiny.safetensors"]).code,
        Some(0),
        "what is there is checked and left alone"
    );

    let address = format!("{endpoint}/files/tiny.safetensors");
    let wrong = pull(&[&address, "--into", "b", "--sha256", &"0".repeat(64)]);
    assert_eq!(wrong.code, Some(1));
    assert!(
        wrong
            .err
            .contains("the download was discarded; start it again")
            && wrong.err.contains(&hash),
        "{}",
        wrong.err
    );
    assert!(files_below(&dir.path().join("b")).is_empty());
    assert_eq!(
        pull(&[&address, "--into", "b", "--sha256", &hash]).code,
        Some(0)
    );
    std::fs::write(dir.path().join("b/tiny.safetensors"), b"other").unwrap();
    let taken = pull(&[&address, "--into", "b", "--sha256", &hash]);
    assert!(
        taken
            .err
            .contains("exists and is not the file of that address; move it away first"),
        "{}",
        taken.err
    );
    let missing = pull(&[&format!("{endpoint}/none.safetensors")]);
    assert_eq!(
        missing.err,
        format!("sdgen: `{endpoint}/none.safetensors` answered 404\n")
    );
    let missing = pull(&["owner/repo/none.safetensors"]);
    assert!(
        missing
            .err
            .starts_with("sdgen: not found on the hub: `owner/repo/none.safetensors`: "),
        "{}",
        missing.err
    );
}
