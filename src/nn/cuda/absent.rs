//! A build without CUDA: no tensor has a body here, so the caller composes the operation from candle's; there is no card; what would be
//! replayed runs.

use candle_core::{CudaDevice, Device, Result, Tensor, bail};

use super::device::Memory;
use super::{Epilogue, KernelChoice, Recording};
use crate::nn::attention::Mask;
use crate::nn::cpu::rows::Window;
use crate::nn::fp8::Codes;
use crate::nn::group_statistics::DeviceSums;
use crate::nn::layers::{GroupNorm, LayerNorm, Placement, Then};
use crate::nn::stored::Piece;

type Answer = Option<Result<Tensor>>;

pub(in crate::nn) fn linear(_: &[&Tensor], _: &Tensor, _: &Epilogue<'_>) -> Answer {
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

pub(in crate::nn) fn group_norm(_: &[&Tensor], _: &GroupNorm) -> Answer {
    None
}

pub(in crate::nn) fn layer_norm(_: &Tensor, _: &Tensor, _: &Tensor, _: f32) -> Answer {
    None
}

pub(in crate::nn) fn concat_channels(_: &Tensor, _: &Tensor) -> Answer {
    None
}

pub(in crate::nn) fn upload(_: &Placement, _: [usize; 2], _: &dyn Fn(usize, Piece<'_>)) -> Answer {
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

pub(in crate::nn) fn measures(_: &Tensor) -> bool {
    false
}

pub(in crate::nn) fn add_sums(strip: &Tensor, _: &DeviceSums) -> Result<()> {
    elsewhere(strip)
}

pub(in crate::nn) fn affine(norm: &GroupNorm, _: &DeviceSums, _: usize) -> Result<Tensor> {
    elsewhere(&norm.weight)
}

pub(in crate::nn) fn apply_affine(strip: &Tensor, _: [&Tensor; 2], _: bool) -> Result<Tensor> {
    elsewhere(strip)
}

/// The error of what only a card holds.
fn elsewhere<T>(tensor: &Tensor) -> Result<T> {
    bail!(
        "sums of a card beside a tensor on {:?}",
        tensor.device().location()
    )
}

pub(super) fn count() -> std::result::Result<usize, String> {
    Err("this build has no CUDA support; build with `--features cuda`".to_string())
}

pub(super) fn open(ordinal: usize, _: KernelChoice) -> Result<Device> {
    Device::new_cuda(ordinal)
}

pub(super) fn total_memory(_: &CudaDevice) -> Option<u64> {
    None
}

pub(super) fn free_memory(_: &CudaDevice) -> Option<u64> {
    None
}

pub(super) fn name(_: &CudaDevice) -> String {
    String::new()
}

pub(super) fn memory(_: &CudaDevice) -> Option<Memory> {
    None
}

pub(super) fn watch_memory(_: &CudaDevice) {}

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

    /// Nothing is recorded.
    ///
    /// # Errors
    /// None.
    pub fn measure(&self, _: usize) -> Result<Option<Recording>> {
        Ok(None)
    }

    /// Drops every recording.
    pub fn forget(&self) {}
}
