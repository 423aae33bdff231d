//! Compiles `kernels/*.cu` when the feature `cuda` is on; otherwise does nothing and needs nothing.
//!
//! Each file becomes one fat binary with machine code for every target and PTX for what comes after them, and
//! `kernels.rs` lists them for `include!`.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs, thread};

/// A100, A10 and RTX 30, RTX 40 and L40, H100 and H200 (`a`: with their matrix instructions), B200, RTX 50.
const TARGETS: &[&str] = &["80", "86", "89", "90a", "100", "120"];

fn main() {
    println!("cargo::rerun-if-changed=kernels");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    for name in ["NVCC", "CUDA_HOME"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let sources = sources();
    let results: Vec<Result<(), String>> = thread::scope(|scope| {
        let running: Vec<_> = sources
            .iter()
            .map(|source| scope.spawn(|| compile(source, &out)))
            .collect();
        let join = |thread: thread::ScopedJoinHandle<'_, Result<(), String>>| {
            thread
                .join()
                .unwrap_or_else(|_| Err("the compiler's thread panicked".into()))
        };
        running.into_iter().map(join).collect()
    });
    let mut list = String::from("&[\n");
    for (source, result) in sources.iter().zip(results) {
        if let Err(error) = result {
            panic!("{}: {error}", source.display());
        }
        let name = stem(source);
        let _ = writeln!(
            list,
            "    (\"{name}\", include_bytes!(concat!(env!(\"OUT_DIR\"), \"/{name}.fatbin\")) as &[u8]),"
        );
    }
    list.push_str("]\n");
    fs::write(out.join("kernels.rs"), list).expect("cargo's output directory can be written");
}

fn sources() -> Vec<PathBuf> {
    let entries = fs::read_dir("kernels").expect("the package has a folder `kernels`");
    let mut sources: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|end| end == "cu"))
        .collect();
    sources.sort();
    sources
}

fn stem(source: &Path) -> &str {
    source
        .file_stem()
        .and_then(|name| name.to_str())
        .expect("names of kernels are ASCII")
}

/// `NVCC`, else the one of `CUDA_HOME`, else whatever the path has.
fn nvcc() -> PathBuf {
    if let Some(path) = env::var_os("NVCC") {
        return path.into();
    }
    env::var_os("CUDA_HOME").map_or("nvcc".into(), |home| PathBuf::from(home).join("bin/nvcc"))
}

/// Compiles one file, as `kernels/check.sh` does.
fn compile(source: &Path, out: &Path) -> Result<(), String> {
    let mut command = Command::new(nvcc());
    // Compressed as far as nvcc can: an eighth of the bytes, unpacked by the driver when the module is loaded.
    command.args([
        "-fatbin",
        "-std=c++17",
        "-O3",
        "--threads",
        "0",
        "--compress-mode=size",
    ]);
    for target in TARGETS {
        command
            .arg("-gencode")
            .arg(format!("arch=compute_{target},code=sm_{target}"));
    }
    command.args(["-gencode", "arch=compute_120,code=compute_120"]);
    command
        .arg("-o")
        .arg(out.join(format!("{}.fatbin", stem(source))))
        .arg(source);
    let output = command.output().map_err(|error| {
        format!(
            "{}: {error}; run `kernels/toolkit.sh` and build with `--config kernels/cuda.toml`",
            nvcc().display()
        )
    })?;
    if output.status.success() {
        return Ok(());
    }
    let [said, failed] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
    Err(format!("{said}\n{failed}"))
}
