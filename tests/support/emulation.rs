//! The CUDA kernels of `kernels/` on the CPU: compiled with `kernels/emulate/` by the C++ compiler, one process a launch.
//!
//! Every launch runs with the threads in three orders, and all must leave the same bytes: a missing barrier shows, and so does a
//! sum that depends on who came first. Outputs are NaN before, so a value that is not written shows too.

#![allow(
    dead_code,
    reason = "every module of the test uses its own part of this"
)]

use std::collections::HashMap;
use std::fmt::Write as _;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, OnceLock};
use std::{env, fs};

use half::{bf16, f16};

/// A type that kernels store values in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Type {
    Bf16,
    F16,
    F32,
}

impl Type {
    pub(crate) const ALL: [Self; 3] = [Self::Bf16, Self::F16, Self::F32];
    pub(crate) const NARROW: [Self; 2] = [Self::Bf16, Self::F16];

    /// How kernels spell it.
    pub(crate) fn suffix(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::F32 => "f32",
        }
    }

    /// Bytes of a value.
    pub(crate) fn size(self) -> usize {
        if self == Self::F32 { 4 } else { 2 }
    }

    /// Values a thread moves at once.
    pub(crate) fn lane_values(self) -> usize {
        16 / self.size()
    }

    /// What a result may be off, as a share of its magnitude plus that of a typical result: the unit in the last place is 2^-8 for
    /// bf16 and 2^-11 for f16, and inner rounding (probabilities of attention, gated halves) adds to the last; in f32 it is the
    /// order of sums of some hundred terms.
    pub(crate) fn tolerance(self) -> f64 {
        match self {
            Self::Bf16 => 1e-2,
            Self::F16 => 2e-3,
            Self::F32 => 1e-5,
        }
    }

    pub(crate) fn encode(self, values: &[f32]) -> Vec<u8> {
        match self {
            Self::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Self::F16 => values
                .iter()
                .flat_map(|x| f16::from_f32(*x).to_le_bytes())
                .collect(),
            Self::Bf16 => values
                .iter()
                .flat_map(|x| bf16::from_f32(*x).to_le_bytes())
                .collect(),
        }
    }

    pub(crate) fn decode(self, bytes: &[u8]) -> Vec<f32> {
        let pair = |b: &[u8]| [b[0], b[1]];
        match self {
            Self::F32 => bytes
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                .collect(),
            Self::F16 => bytes
                .chunks_exact(2)
                .map(|b| f16::from_le_bytes(pair(b)).to_f32())
                .collect(),
            Self::Bf16 => bytes
                .chunks_exact(2)
                .map(|b| bf16::from_le_bytes(pair(b)).to_f32())
                .collect(),
        }
    }

    /// The values as this type holds them.
    pub(crate) fn round(self, values: &[f32]) -> Vec<f32> {
        self.decode(&self.encode(values))
    }
}

/// A parameter of a kernel.
#[derive(Debug, Clone)]
pub(crate) enum Arg {
    /// A buffer of its own.
    Bytes(Vec<u8>),
    /// Into the buffer of an earlier argument (its number, a byte offset).
    Again(usize, usize),
    Null,
    Int(usize),
    Long(usize),
    Float(f32),
    /// A struct of `int`s.
    Ints(Vec<i32>),
}

impl Arg {
    /// Values to read.
    pub(crate) fn values(t: Type, values: &[f32]) -> Self {
        Self::Bytes(t.encode(values))
    }

    /// The same, or a null pointer.
    pub(crate) fn optional(t: Type, values: Option<&Vec<f32>>) -> Self {
        values.map_or(Self::Null, |v| Self::values(t, v))
    }

    /// Room for so many bytes of NaN.
    pub(crate) fn room(bytes: usize) -> Self {
        Self::Bytes(vec![0xff; bytes])
    }
}

/// How a kernel is started.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Grid {
    pub(crate) blocks: [usize; 3],
    pub(crate) threads: usize,
    /// Bytes of dynamic shared memory.
    pub(crate) shared: usize,
}

impl Grid {
    pub(crate) fn new(blocks: [usize; 3], threads: usize, shared: usize) -> Self {
        Self {
            blocks,
            threads,
            shared,
        }
    }

    /// A few blocks of 256, for kernels that take any number.
    pub(crate) fn any() -> Self {
        Self::new([3, 1, 1], 256, 0)
    }
}

/// Runs `kernel` of `kernels/{file}.cu` and returns, by number of argument, what its buffers hold afterwards.
#[track_caller]
pub(crate) fn launch(file: &str, kernel: &str, grid: Grid, args: &[Arg]) -> Vec<Vec<u8>> {
    let program = program(file);
    let [forward, reverse, shuffled] =
        ["forward", "reverse", "shuffled"].map(|order| run(&program, kernel, grid, order, args));
    assert!(
        forward == reverse && forward == shuffled,
        "{kernel}: the result depends on the order of its threads"
    );
    forward
}

#[track_caller]
fn run(program: &Path, kernel: &str, grid: Grid, order: &str, args: &[Arg]) -> Vec<Vec<u8>> {
    let Grid {
        blocks: [x, y, z],
        threads,
        shared,
    } = grid;
    let mut head = format!(
        "kernel {kernel}\ngrid {x} {y} {z}\nblock {threads}\nshared {shared}\norder {order}\n"
    );
    let (mut data, mut buffers) = (Vec::new(), HashMap::new());
    for (i, arg) in args.iter().enumerate() {
        let line = match arg {
            Arg::Bytes(bytes) => {
                buffers.insert(i, (buffers.len(), bytes.len()));
                data.extend_from_slice(bytes);
                writeln!(head, "buffer {}", bytes.len()).unwrap();
                format!("pointer {} 0", buffers.len() - 1)
            }
            Arg::Again(arg, offset) => format!("pointer {} {offset}", buffers[arg].0),
            Arg::Null => "null".to_owned(),
            Arg::Int(v) => format!("int {v}"),
            Arg::Long(v) => format!("long {v}"),
            Arg::Float(v) => format!("float {}", v.to_bits()),
            Arg::Ints(values) => values
                .iter()
                .fold("ints".to_owned(), |line, v| format!("{line} {v}")),
        };
        writeln!(head, "arg {line}").unwrap();
    }
    head.push_str("data\n");
    let mut child = Command::new(program)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    // A launch that is refused closes its end early; its message says more than the broken pipe.
    let _ = input
        .write_all(head.as_bytes())
        .and_then(|()| input.write_all(&data));
    drop(input);
    let output = child.wait_with_output().unwrap();
    assert!(
        output.status.success(),
        "{kernel} {grid:?} in {order} order: {}{}",
        String::from_utf8_lossy(&output.stderr),
        output.status
    );
    let mut rest = output.stdout.as_slice();
    (0..args.len())
        .map(|i| match buffers.get(&i) {
            Some(&(_, bytes)) => {
                let (mine, others) = rest.split_at(bytes);
                rest = others;
                mine.to_vec()
            }
            None => Vec::new(),
        })
        .collect()
}

/// The program that holds a file's kernels, compiled where its sources have changed.
fn program(file: &str) -> PathBuf {
    static PROGRAMS: OnceLock<Mutex<HashMap<String, Arc<OnceLock<PathBuf>>>>> = OnceLock::new();
    let cell = PROGRAMS
        .get_or_init(Mutex::default)
        .lock()
        .unwrap()
        .entry(file.to_owned())
        .or_default()
        .clone();
    cell.get_or_init(|| compile(file)).clone()
}

fn compile(file: &str) -> PathBuf {
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    let emulate = kernels.join("emulate");
    let compiler = env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
    let flags = [
        "-std=c++17",
        "-O2",
        "-march=native",
        "-fno-strict-aliasing",
        "-Wall",
        "-Werror",
        "-Wno-unknown-pragmas",
        // What a GPU would fault on, or compute differently: an unaligned access, an offset beyond 32 bits.
        "-fsanitize=alignment,signed-integer-overflow,shift",
        "-fsanitize-undefined-trap-on-error",
    ];
    let sources = [
        emulate.join(format!("{file}.cpp")),
        emulate.join("emulate.cpp"),
        emulate.join("launch.cpp"),
    ];

    let mut hasher = DefaultHasher::new();
    (&compiler, flags).hash(&mut hasher);
    let read = [
        kernels.join(format!("{file}.cu")),
        kernels.join("common.cuh"),
        kernels.join("e4m3.cuh"),
        emulate.join("emulate.h"),
        emulate.join("launch.h"),
    ];
    // The faults of `faults.cpp` have no kernels to read.
    for path in sources.iter().chain(&read).filter(|path| path.exists()) {
        fs::read(path).unwrap().hash(&mut hasher);
    }
    let room = Path::new(env!("CARGO_TARGET_TMPDIR")).join("kernels");
    fs::create_dir_all(&room).unwrap();
    let program = room.join(format!("{file}-{:016x}", hasher.finish()));
    if program.exists() {
        return program;
    }
    // Under another name first: a run beside this one must not start half a program.
    let unfinished = room.join(format!("{file}-{}", std::process::id()));
    let output = Command::new(&compiler)
        .args(flags)
        .arg("-I")
        .arg(&emulate)
        .args(&sources)
        .arg("-o")
        .arg(&unfinished)
        .output()
        .unwrap_or_else(|e| {
            panic!("`{compiler}` does not start ({e}): install a C++17 compiler (Debian: g++)")
        });
    assert!(
        output.status.success(),
        "{file}.cu for the CPU: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    fs::rename(unfinished, &program).unwrap();
    program
}

/// Values between -1 and 1 that look random and are the same everywhere.
pub(crate) fn noise(seed: usize, count: usize) -> Vec<f32> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(seed as u64 + 1);
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..8).for_each(|_| _ = next());
    (0..count).map(|_| next()).collect()
}

/// Compares with the type's tolerance and prints the worst error.
#[track_caller]
pub(crate) fn compare(name: &str, t: Type, got: &[f32], want: &[f32]) {
    compare_within(name, t.tolerance(), got, want);
}

/// Compares: each result may be off by `tolerance` times its own magnitude plus the root mean square of all.
#[track_caller]
pub(crate) fn compare_within(name: &str, tolerance: f64, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len(), "{name}: number of values");
    let squares: f64 = want.iter().map(|v| f64::from(*v).powi(2)).sum();
    let typical = (squares / want.len().max(1) as f64).sqrt().max(1e-30);
    let error = |i: usize| {
        let error =
            (f64::from(got[i]) - f64::from(want[i])).abs() / (f64::from(want[i].abs()) + typical);
        if error.is_nan() { f64::INFINITY } else { error }
    };
    let worst = (0..got.len())
        .max_by(|&a, &b| error(a).total_cmp(&error(b)))
        .unwrap_or_else(|| panic!("{name}: nothing to compare"));
    let report = format!(
        "{name}: worst error {:.1e} of {tolerance:.0e} allowed, at [{worst}] of {}: got {:?}, want {:?}",
        error(worst),
        got.len(),
        got[worst],
        want[worst]
    );
    eprintln!("{report}");
    assert!(error(worst) <= tolerance, "{report}");
}
