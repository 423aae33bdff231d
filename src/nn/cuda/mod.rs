//! The operations on an NVIDIA GPU.
//!
//! `bodies` answers for a tensor on such a device and stays silent for any other; without the feature `cuda` it is `absent`,
//! which is always silent. What can be decided without a device (which grid, which candidates, what is one plan) is in
//! `geometry` and `select` and is tested everywhere. [`device`] opens the card and reports its memory, `engine` holds what a
//! card keeps (kernels, plans, workspace), [`Replay`] runs a recorded graph of launches.
//!
//! Tensors are candle's, contiguous and channels-last, in `f32`, `bf16` or `f16`; sums are `f32`. All work goes to one stream per
//! device, so nothing here waits for another operation.

use candle_core::Tensor;

use super::layers::Then;

#[cfg(not(feature = "cuda"))]
mod absent;
#[cfg(feature = "cuda")]
mod attention;
#[cfg(feature = "cuda")]
mod bodies;
#[cfg(feature = "cuda")]
mod card;
mod choice;
#[cfg(feature = "cuda")]
mod convolution;
#[cfg(feature = "cuda")]
mod cudnn;
pub mod device;
#[cfg(feature = "cuda")]
mod elementwise;
#[cfg(feature = "cuda")]
mod engine;
#[cfg(feature = "cuda")]
mod fp8;
#[cfg(any(feature = "cuda", test))]
mod geometry;
#[cfg(feature = "cuda")]
mod graph;
#[cfg(feature = "cuda")]
mod linear;
#[cfg(feature = "cuda")]
mod lt;
#[cfg(feature = "cuda")]
mod measured;
#[cfg(feature = "cuda")]
mod norm;
#[cfg(feature = "cuda")]
mod operand;
#[cfg(any(feature = "cuda", test))]
mod select;
#[cfg(feature = "cuda")]
mod staging;

#[cfg(not(feature = "cuda"))]
use absent as bodies;
#[cfg(not(feature = "cuda"))]
use absent as measured;
#[cfg(not(feature = "cuda"))]
pub use absent::Replay;
pub(super) use bodies::{
    combine, concat_channels, conv2d, cross_attention, group_norm, layer_norm, linear, linear_e4m3,
    self_attention, upload,
};
pub use choice::KernelChoice;
#[cfg(feature = "cuda")]
pub use graph::Replay;
pub(super) use measured::{add_sums, affine, apply_affine, measures};

/// A recorded row of launches, and what it takes when nothing but the card holds it up.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Recording {
    /// Launches of kernels.
    pub kernels: usize,
    /// All it consists of: kernels, copies, allocations.
    pub nodes: usize,
    /// Seconds of one run on the card, of runs queued one behind another.
    pub seconds: f64,
}

/// What follows a product, in this order: bias, gating or shift, activation, slopes, residual.
#[derive(Clone, Copy)]
#[cfg_attr(
    not(feature = "cuda"),
    allow(dead_code, reason = "only the bodies read it")
)]
pub(super) struct Epilogue<'a> {
    /// `[outputs]`, rows in the weight's order.
    pub(super) bias: Option<&'a Tensor>,
    pub(super) then: Then,
    /// `PReLU`'s factors, `[outputs]`.
    pub(super) slopes: Option<&'a Tensor>,
    pub(super) second: Second<'a>,
}

/// The tensor that is added to a product.
#[derive(Clone, Copy)]
pub(super) enum Second<'a> {
    None,
    /// Of the result's shape, added last.
    Residual(&'a Tensor),
    /// `[batch, outputs]`, added to every pixel before the activation.
    PerImage(&'a Tensor),
}
