//! The CUDA kernels without a GPU: every entry point of `kernels/README.md` run by the emulation of `kernels/emulate/` and compared
//! with the CPU's layers (`sdgen::nn`) or a formula in `f64`, on ragged shapes.
//!
//! What this proves: indexing, tails, barriers, the use of the matrix instructions' layouts, rounding. What it cannot: speed, and
//! the instructions themselves (`common.cuh`, between the EMULATION marks), which the GPU's own run checks.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "support/emulation.rs"]
mod emulation;

#[path = "kernels/attention.rs"]
mod attention;
#[path = "kernels/e4m3.rs"]
mod e4m3;
#[path = "kernels/elementwise.rs"]
mod elementwise;
#[path = "kernels/faults.rs"]
mod faults;
#[path = "kernels/formulas.rs"]
mod formulas;
#[path = "kernels/gemm.rs"]
mod gemm;
#[path = "kernels/norm.rs"]
mod norm;
#[path = "kernels/sampler.rs"]
mod sampler;
