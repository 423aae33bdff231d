//! The CPU bodies of the fused operations, on channels-last slices of `f32` or `bf16`.
//!
//! Each kernel is written once over `simd::Simd` (the instruction set) and `element::Element` (the type in memory); [`Isa`] is
//! chosen once per process and runs it under the matching `target_feature`. Outputs do not depend on the number of threads: work is split over outputs, never over sums.

#[cfg(test)]
mod agreement;
pub(crate) mod attention;
pub(crate) mod element;
pub(crate) mod gemm;
pub(crate) mod math;
pub(crate) mod norm;
pub(crate) mod packed;
pub mod peak;
pub(crate) mod rows;
mod scratch;
pub(crate) mod simd;
mod team;

use std::str::FromStr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

pub use packed::Precision;
use simd::{Portable, Simd};

/// An instruction set with kernels of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    /// Plain Rust.
    Portable,
    /// AVX2 and FMA.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// The same with `bf16` products (`vdpbf16ps`).
    Avx512Bf16,
    /// ARM NEON.
    Neon,
}

/// A computation that any instruction set can run.
pub(crate) trait Kernel {
    /// What it returns.
    type Out;
    /// The body; mark it `inline(always)`.
    fn run<S: Simd>(self) -> Self::Out;
}

static CHOSEN: OnceLock<Isa> = OnceLock::new();

impl Isa {
    /// The sets this processor has, slowest first.
    #[must_use]
    pub fn available() -> Vec<Self> {
        #[allow(
            unused_mut,
            reason = "stays as it is on processors without special kernels"
        )]
        let mut sets = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                sets.push(Self::Avx2);
            }
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
            {
                sets.push(Self::Avx512);
                if is_x86_feature_detected!("avx512bf16") {
                    sets.push(Self::Avx512Bf16);
                }
            }
        }
        #[cfg(target_arch = "aarch64")]
        sets.push(Self::Neon);
        sets
    }

    /// The set every packed weight of this process is laid out for.
    #[must_use]
    pub fn chosen() -> Self {
        *CHOSEN.get_or_init(|| Self::available().last().copied().unwrap_or(Self::Portable))
    }

    /// Fixes the set before the first weight is packed.
    ///
    /// # Errors
    /// Names the sets there are when the processor lacks this one, or says that the choice was made already.
    pub fn choose(self) -> Result<(), String> {
        let sets = Self::available();
        if !sets.contains(&self) {
            return Err(format!(
                "this processor has no `{self:?}` instructions; it has: {sets:?}"
            ));
        }
        match CHOSEN.set(self) {
            Err(_) if Self::chosen() != self => Err(format!(
                "the instruction set is already `{:?}`",
                Self::chosen()
            )),
            _ => Ok(()),
        }
    }

    /// Lanes of this set's vectors.
    #[must_use]
    pub(crate) fn lanes(self) -> usize {
        match self {
            Self::Portable | Self::Avx2 => 8,
            Self::Avx512 | Self::Avx512Bf16 => 16,
            Self::Neon => 4,
        }
    }

    /// Runs a kernel with this set's instructions.
    #[inline]
    #[allow(unsafe_code, reason = "enters a target_feature function")]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Out {
        match self {
            // SAFETY: a value other than `Portable` comes from `available`, which asked the processor.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => unsafe { run_avx512_bf16(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => unsafe { run_avx512(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => unsafe { run_avx2(kernel) },
            #[cfg(target_arch = "aarch64")]
            Self::Neon => kernel.run::<simd::Neon>(),
            _ => kernel.run::<Portable>(),
        }
    }
}

impl FromStr for Isa {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s.to_ascii_lowercase().as_str() {
            "portable" => Ok(Self::Portable),
            "avx2" => Ok(Self::Avx2),
            "avx512" => Ok(Self::Avx512),
            "avx512bf16" => Ok(Self::Avx512Bf16),
            "neon" => Ok(Self::Neon),
            _ => Err(format!(
                "unknown instruction set: `{s}`; one of portable, avx2, avx512, avx512bf16, neon"
            )),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code, reason = "target_feature functions")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
unsafe fn run_avx512<K: Kernel>(kernel: K) -> K::Out {
    kernel.run::<simd::Avx512>()
}

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code, reason = "target_feature functions")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")]
unsafe fn run_avx512_bf16<K: Kernel>(kernel: K) -> K::Out {
    kernel.run::<simd::Avx512Bf16>()
}

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code, reason = "target_feature functions")]
#[target_feature(enable = "avx2,fma")]
unsafe fn run_avx2<K: Kernel>(kernel: K) -> K::Out {
    kernel.run::<simd::Avx2>()
}

static OPERATIONS: AtomicU64 = AtomicU64::new(0);

/// Floating-point operations (a multiply-add counts two) of all products since the process began, on a card too; what a recording
/// replays is counted when it is made.
#[must_use]
pub fn operations() -> u64 {
    OPERATIONS.load(Ordering::Relaxed)
}

pub(super) fn count_multiply_adds(n: usize) {
    OPERATIONS.fetch_add(2 * n as u64, Ordering::Relaxed);
}

/// Work below this many multiply-adds (or a like effort) runs on the calling thread: waking another costs more.
const INLINE_WORK: usize = 1 << 19;

/// Runs `task(0..count)` on all threads, or inline when `work` in all is small.
pub(crate) fn for_each_task(count: usize, work: usize, task: impl Fn(usize) + Sync + Send) {
    if count <= 1 || work < INLINE_WORK {
        (0..count).for_each(task);
    } else {
        team::share(count, &task);
    }
}

/// Fixes instruction set (`auto` = the best there is) and number of threads (0 = as many as the process may use: affinity and
/// the container's CPU limit count) before the first operation.
///
/// # Errors
/// Says what the processor lacks, or that another choice was made already.
pub fn prepare(isa: &str, threads: usize) -> Result<(), String> {
    if isa != "auto" {
        isa.parse::<Isa>()?.choose()?;
    }
    if threads > 0 {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        let running = pool
            .build_global()
            .map_or_else(|_| rayon::current_num_threads(), |()| threads);
        if running != threads {
            return Err(format!("{running} threads run already, not {threads}"));
        }
    }
    Ok(())
}

/// A mutable slice whose disjoint parts several threads write.
#[derive(Clone, Copy)]
pub(crate) struct Shared<T>(*mut T, usize);

#[allow(unsafe_code, reason = "disjoint writes from several threads")]
// SAFETY: `Shared` only hands out raw pointers; whoever writes through them keeps the parts disjoint.
unsafe impl<T: Send> Send for Shared<T> {}
#[allow(unsafe_code, reason = "disjoint writes from several threads")]
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    pub(crate) fn new(slice: &mut [T]) -> Self {
        Self(slice.as_mut_ptr(), slice.len())
    }

    /// Elements `at..at + len`.
    ///
    /// # Safety
    /// No other thread touches them while the slice lives.
    #[allow(unsafe_code, reason = "disjoint writes from several threads")]
    #[allow(clippy::mut_from_ref, reason = "the caller keeps the parts disjoint")]
    pub(crate) unsafe fn part(&self, at: usize, len: usize) -> &mut [T] {
        assert!(at + len <= self.1, "part {at}+{len} of {}", self.1);
        // SAFETY: within the slice by the assertion, disjoint by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(at), len) }
    }

    pub(crate) fn as_ptr(&self) -> *mut T {
        self.0
    }
}
