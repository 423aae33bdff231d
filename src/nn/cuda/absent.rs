//! A build without CUDA: no tensor has a body here, so the caller composes the operation from candle's; there is no card; what would be
//! replayed runs.

use candle_core::{CudaDevice, Device, Result, Tensor};

use super::{Epilogue, KernelChoice};
use crate::nn::attention::Mask;
use crate::nn::cpu::rows::Window;
use crate::nn::fp8::Codes;
use crate::nn::layers::{GroupNorm, LayerNorm, Then};

type Answer = Option<Result<Tensor>>;

pub(in crate::nn) fn linear(_: &Tensor, _: &Tensor, _: &Epilogue<'_>) -> Answer {
    None
}

pub(in crate::nn) fn linear_e4m3(
    _: &Tensor,
    _: Option<&LayerNorm>,
    _: &Codes,
    _: Then,
    _: Option<&Tensor>,
) -> Answer {
    None
}

pub(in crate::nn) fn conv2d(
    _: &[&Tensor],
    _: &Tensor,
    _: &Epilogue<'_>,
    _: impl FnOnce([usize; 4]) -> Window,
) -> Answer {
    None
}

pub(in crate::nn) fn group_norm(_: &Tensor, _: &GroupNorm) -> Answer {
    None
}

pub(in crate::nn) fn layer_norm(_: &Tensor, _: &Tensor, _: &Tensor, _: f32) -> Answer {
    None
}

pub(in crate::nn) fn concat_channels(_: &Tensor, _: &Tensor) -> Answer {
    None
}

pub(in crate::nn) fn combine(_: &[(f32, &Tensor)]) -> Answer {
    None
}

pub(in crate::nn) fn self_attention(_: &Tensor, _: usize, _: Mask) -> Answer {
    None
}

pub(in crate::nn) fn cross_attention(_: &Tensor, _: &Tensor, _: usize) -> Answer {
    None
}

pub(super) fn count() -> std::result::Result<usize, String> {
    Err("this build has no CUDA support; build with `--features cuda`".to_string())
}

pub(super) fn open(ordinal: usize, _: KernelChoice) -> Result<Device> {
    Device::new_cuda(ordinal)
}

pub(super) fn free_memory(_: &CudaDevice) -> Option<u64> {
    None
}

pub(super) fn no_e4m3(_: &CudaDevice) -> Option<String> {
    None
}

pub(super) fn release_cached(_: &CudaDevice) {}

/// Recordings of a network's launches, of which there are none here.
#[derive(Debug, Default)]
pub struct Replay {}

impl Replay {
    /// `body` of `inputs`.
    ///
    /// # Errors
    /// Whatever `body` fails with.
    pub fn run(
        &self,
        inputs: &[&Tensor],
        _: u64,
        body: impl Fn(&[Tensor]) -> Result<Tensor>,
    ) -> Result<Tensor> {
        body(&inputs.iter().map(|&x| x.clone()).collect::<Vec<_>>())
    }

    /// Drops every recording.
    pub fn forget(&self) {}
}
