//! Compiles `kernels/*.cu` when the feature `cuda` is on; otherwise does nothing and needs nothing.
//!
//! Each file becomes one fat binary with machine code for every target and PTX for what comes after them, and
//! `kernels.rs` lists them for `include!`. `resources.tsv` keeps what the assembler says of registers, shared memory and spills.

use std::collections::BTreeMap;
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
    for name in ["NVCC", "CUDA_HOME", "SDGEN_NVCC"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let sources = sources();
    let results: Vec<Result<String, String>> = thread::scope(|scope| {
        let running: Vec<_> = sources
            .iter()
            .map(|source| scope.spawn(|| compile(source, &out)))
            .collect();
        let join = |thread: thread::ScopedJoinHandle<'_, Result<String, String>>| {
            thread.join().unwrap_or_else(|_| Err("the compiler's thread panicked".into()))
        };
        running.into_iter().map(join).collect()
    });
    let (mut list, mut report) = (String::from("&[\n"), String::from(HEADINGS));
    for (source, result) in sources.iter().zip(results) {
        let text = result.unwrap_or_else(|error| panic!("{}: {error}", source.display()));
        let name = stem(source);
        let _ = writeln!(list, "    (\"{name}\", include_bytes!(concat!(env!(\"OUT_DIR\"), \"/{name}.fatbin\")) as &[u8]),");
        report.push_str(&resources(name, &text));
    }
    list.push_str("]\n");
    fs::write(out.join("kernels.rs"), list).expect("cargo's output directory can be written");
    fs::write(out.join("resources.tsv"), report).expect("cargo's output directory can be written");
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
    source.file_stem().and_then(|name| name.to_str()).expect("names of kernels are ASCII")
}

/// `NVCC`, else the one of `CUDA_HOME`, else whatever the path has.
fn nvcc() -> PathBuf {
    if let Some(path) = env::var_os("NVCC") {
        return path.into();
    }
    env::var_os("CUDA_HOME").map_or("nvcc".into(), |home| PathBuf::from(home).join("bin/nvcc"))
}

/// Compiles one file; returns what the assembler said.
fn compile(source: &Path, out: &Path) -> Result<String, String> {
    let mut command = Command::new(nvcc());
    command.args(["-fatbin", "-std=c++17", "-O3", "--use_fast_math", "--expt-relaxed-constexpr"]);
    command.args(["-Xptxas", "-v", "--threads", "0"]);
    for target in TARGETS {
        command.arg("-gencode").arg(format!("arch=compute_{target},code=sm_{target}"));
    }
    command.args(["-gencode", "arch=compute_120,code=compute_120"]);
    command.arg("-o").arg(out.join(format!("{}.fatbin", stem(source)))).arg(source);
    let output = command.output().map_err(|error| {
        format!("{}: {error}; run `kernels/toolkit.sh` and build with `--config kernels/cuda.toml`", nvcc().display())
    })?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() {
        Ok(text)
    } else {
        Err(format!("{}\n{text}", String::from_utf8_lossy(&output.stdout)))
    }
}

const HEADINGS: &str = "file\tkernel\ttarget\tregisters\tshared\tspills\n";

/// The assembler's report as rows: `Compiling entry function 'f' for 'sm_80'`, then spills, then registers.
fn resources(file: &str, text: &str) -> String {
    let mut rows: BTreeMap<(String, String), [u64; 3]> = BTreeMap::new();
    let mut current = None;
    for line in text.lines() {
        if line.contains("Compiling entry function") {
            let mut quoted = line.split('\'').skip(1).step_by(2);
            current = quoted.next().zip(quoted.next()).map(|(f, t)| (f.to_string(), t.to_string()));
        }
        let Some(key) = current.clone() else { continue };
        let row = rows.entry(key).or_default();
        if line.contains("bytes spill stores") {
            row[2] = before(line, "bytes spill stores") + before(line, "bytes spill loads");
        }
        if line.contains("Used ") {
            row[0] = before(line, "registers");
            row[1] = before(line, "bytes smem");
        }
    }
    let mut table = String::new();
    for ((kernel, target), [registers, shared, spills]) in rows {
        let _ = writeln!(table, "{file}\t{kernel}\t{target}\t{registers}\t{shared}\t{spills}");
    }
    table
}

/// The number before `word`; 0 if the line does not have it.
fn before(line: &str, word: &str) -> u64 {
    let number = line.split(word).next().filter(|head| head.len() < line.len());
    number.and_then(|head| head.split_whitespace().last()?.parse().ok()).unwrap_or(0)
}
