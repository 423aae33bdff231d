//! Layers: weights in the form their device computes with, and `forward` as one fused operation.
//!
//! Activations are channels-last, `[batch, height, width, channels]` or `[batch, tokens, channels]`. On the CPU weights
//! are packed at load, in `f32` or `bf16`; on other devices they stay tensors and `super::reference` composes the operation.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{DType, Device, Result, Tensor};

use super::cpu::math::Activation;
use super::cpu::packed::{Columns, Packed, Precision};
use super::cuda::{self, Epilogue, Second};
use super::dense::joined;
use super::fp8::Storage;
use super::rewrite::Origin;
use super::stored::Stored;
use super::weight::Weight;
use super::window::Sampling;
use super::{kernels, reference};

/// Where and in which type a model computes; shared by its layers.
#[derive(Debug, Clone)]
pub struct Placement {
    /// Device of weights and activations.
    pub device: Device,
    /// Type of weights and activations.
    pub dtype: DType,
    /// How linear layers over tokens store their weights.
    pub storage: Storage,
    /// Whether convolutions wrap around the picture's edges (A1111's `tiling`); may change between jobs.
    pub circular: Arc<AtomicBool>,
}

impl Placement {
    /// `dtype` on `device`; `F8E4M3` means [`Storage::E4m3`] and `bf16` for all else.
    #[must_use]
    pub fn new(device: Device, dtype: DType) -> Self {
        let (dtype, storage) = match dtype {
            DType::F8E4M3 => (DType::BF16, Storage::E4m3),
            wide => (wide, Storage::Wide),
        };
        Self {
            device,
            dtype,
            storage,
            circular: Arc::default(),
        }
    }

    /// `f32` on the CPU.
    #[must_use]
    pub fn cpu() -> Self {
        Self::new(Device::Cpu, DType::F32)
    }

    pub(super) fn tensor(&self, values: &[f32], shape: &[usize]) -> Result<Tensor> {
        Tensor::from_slice(values, shape, &self.device)?.to_dtype(self.dtype)
    }

    /// A norm's weight: `f32` where the fused bodies read it, whatever the activations are.
    fn norm_tensor(&self, values: &[f32]) -> Result<Tensor> {
        let tensor = Tensor::from_slice(values, values.len(), &self.device)?;
        if self.is_fused() {
            return Ok(tensor);
        }
        tensor.to_dtype(self.dtype)
    }

    /// Whether the fused bodies of the CPU compute here.
    pub(super) fn is_fused(&self) -> bool {
        kernels::fuses(&self.device, self.dtype)
    }

    /// The type in which the CPU packs weights.
    pub(super) fn precision(&self) -> Precision {
        match self.dtype {
            DType::BF16 => Precision::Bf16,
            _ => Precision::F32,
        }
    }
}

/// What follows a linear product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Then {
    /// An activation.
    Activate(Activation),
    /// `value * gelu(gate)`: the layer's rows are `[values; gates]`, the output half as wide.
    Geglu,
}

impl Then {
    /// How a packed weight's columns lie for it.
    pub(super) fn columns(self) -> Columns {
        match self {
            Self::Geglu => Columns::Geglu,
            Self::Activate(_) => Columns::Plain,
        }
    }
}

/// `x wᵀ + b` over the last axis, and what follows it.
#[derive(Debug, Clone)]
pub struct Linear {
    pub(super) weight: Weight,
    pub(super) then: Then,
    pub(super) origins: Vec<Origin>,
}

impl Linear {
    /// From `weight` `[outputs, inputs]` (row major) and `bias` `[outputs]`.
    ///
    /// # Errors
    /// When the device refuses the tensor.
    pub fn new(
        place: &Placement,
        weight: &[f32],
        outputs: usize,
        bias: Option<&[f32]>,
        then: Then,
    ) -> Result<Self> {
        Self::stacked(place, &[weight.into()], outputs, bias, then)
    }

    /// [`Self::new`] from rows in several pieces, as they are stored.
    ///
    /// # Errors
    /// When a piece does not hold whole rows, or the device refuses the tensor.
    pub fn stacked(
        place: &Placement,
        pieces: &[Stored<'_>],
        outputs: usize,
        bias: Option<&[f32]>,
        then: Then,
    ) -> Result<Self> {
        let len: usize = pieces.iter().map(Stored::len).sum();
        let layout = (then.columns(), len / outputs.max(1));
        let weight = Weight::new(place, pieces, outputs, bias, layout)?;
        let origins = Vec::new();
        Ok(Self {
            weight,
            then,
            origins,
        })
    }

    /// `[..., inputs]` to `[..., outputs]`.
    ///
    /// # Errors
    /// On a shape that does not fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.run(x, None)
    }

    /// [`Self::forward`] plus `residual`.
    ///
    /// # Errors
    /// On a shape that does not fit.
    pub fn forward_add(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        self.run(x, Some(residual))
    }

    fn run(&self, x: &Tensor, residual: Option<&Tensor>) -> Result<Tensor> {
        match (&self.weight, residual) {
            (Weight::Packed { weight, bias }, None) => {
                x.apply_op1_no_bwd(&self.op(weight, bias.as_deref()))
            }
            (Weight::Packed { weight, bias }, Some(residual)) => {
                x.apply_op2_no_bwd(residual, &self.op(weight, bias.as_deref()))
            }
            (Weight::Tensors { weight, bias, .. }, _) => {
                let epilogue = Epilogue {
                    bias: bias.as_ref(),
                    then: self.then,
                    slopes: None,
                    second: residual.map_or(Second::None, Second::Residual),
                };
                cuda::linear(&[x], weight, &epilogue)
                    .unwrap_or_else(|| self.composed(x, weight, bias.as_ref(), residual))
            }
            (Weight::Scaled(weight), _) => weight.forward(x, None, self.then, residual),
        }
    }

    /// Bytes of the weight.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.weight.bytes()
    }

    fn op<'a>(&self, weight: &'a Packed, bias: Option<&'a [f32]>) -> kernels::Linear<'a> {
        let activation = match self.then {
            Then::Activate(activation) => activation,
            Then::Geglu => Activation::None,
        };
        kernels::Linear {
            weight,
            scales: None,
            bias,
            activation,
        }
    }

    pub(super) fn composed(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        residual: Option<&Tensor>,
    ) -> Result<Tensor> {
        let y = reference::linear(x, weight, bias)?;
        let y = match self.then {
            Then::Activate(activation) => reference::activate(&y, activation)?,
            Then::Geglu => reference::geglu_pairs(&y)?,
        };
        residual.map_or(Ok(y.clone()), |residual| y + residual)
    }
}

/// A 2-D convolution with a square kernel.
#[derive(Debug, Clone)]
pub struct Conv2d {
    pub(super) weight: Weight,
    pub(super) kernel: usize,
    sampling: Sampling,
    pub(super) activation: Activation,
    /// `PReLU`'s factors, on the host and on the device.
    pub(super) slopes: Option<(Vec<f32>, Tensor)>,
    circular: Arc<AtomicBool>,
    pub(super) origins: Vec<Origin>,
}

impl Conv2d {
    /// From `weight` `[outputs, inputs, kernel, kernel]` as checkpoints store it.
    ///
    /// # Errors
    /// When the device refuses the tensor.
    pub fn new(
        place: &Placement,
        weight: &[f32],
        [outputs, inputs, kernel]: [usize; 3],
        bias: Option<&[f32]>,
        sampling: Sampling,
    ) -> Result<Self> {
        Self::stored(
            place,
            weight.into(),
            [outputs, inputs, kernel],
            bias,
            sampling,
        )
    }

    /// [`Self::new`] from values as they are stored.
    ///
    /// # Errors
    /// When the device refuses the tensor.
    pub fn stored(
        place: &Placement,
        weight: Stored<'_>,
        [outputs, inputs, kernel]: [usize; 3],
        bias: Option<&[f32]>,
        sampling: Sampling,
    ) -> Result<Self> {
        let layout = (Columns::Plain, inputs);
        let weight = Weight::new(place, &[weight], outputs, bias, layout)?;
        Ok(Self {
            weight,
            kernel,
            sampling,
            activation: Activation::None,
            slopes: None,
            // What is padded on two sides only is padded with zeros by its model, not by the convolution.
            circular: if sampling == Sampling::HALVE_VAE {
                Arc::default()
            } else {
                place.circular.clone()
            },
            origins: Vec::new(),
        })
    }

    /// Applies `activation` to the output.
    #[must_use]
    pub fn then(mut self, activation: Activation) -> Self {
        self.activation = activation;
        self
    }

    /// `[batch, height, width, inputs]` to `[batch, height', width', outputs]`.
    ///
    /// # Errors
    /// On a shape that does not fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.run(x, Second::None)
    }

    /// [`Self::forward`] plus `residual`, of the output's shape.
    ///
    /// # Errors
    /// On a shape that does not fit.
    pub fn forward_add(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        self.run(x, Second::Residual(residual))
    }

    /// [`Self::forward`] with `per_image` `[batch, outputs]` (columns of a wider tensor at will) added to every pixel before the
    /// activation.
    ///
    /// # Errors
    /// On a shape that does not fit.
    pub fn forward_shifted(&self, x: &Tensor, per_image: &Tensor) -> Result<Tensor> {
        self.run(x, Second::PerImage(per_image))
    }

    fn run(&self, x: &Tensor, second: Second<'_>) -> Result<Tensor> {
        let Weight::Packed { weight, bias } = &self.weight else {
            return self.run_tensors(&[x], second);
        };
        let (kind, tensor) = match second {
            Second::None => (kernels::Second::Residual, None),
            Second::Residual(tensor) => (kernels::Second::Residual, Some(tensor)),
            Second::PerImage(tensor) => (kernels::Second::PerImage, Some(tensor)),
        };
        let op = self.op(x.dims4()?.into(), weight, bias.as_deref(), kind)?;
        match tensor {
            None => x.apply_op1_no_bwd(&op),
            Some(tensor) => x.apply_op2_no_bwd(tensor, &op),
        }
    }

    /// Over pictures with their channels side by side, by candle's tensors.
    pub(super) fn run_tensors(&self, parts: &[&Tensor], second: Second<'_>) -> Result<Tensor> {
        let Weight::Tensors { weight, bias, .. } = &self.weight else {
            candle_core::bail!("conv2d: a packed weight is not for tensors")
        };
        let epilogue = Epilogue {
            bias: bias.as_ref(),
            then: Then::Activate(self.activation),
            slopes: self.slopes.as_ref().map(|(_, tensor)| tensor),
            second,
        };
        let sampling = self.sampling;
        let circular = self.circular.load(Ordering::Relaxed);
        let window = |shape| sampling.window(shape, self.kernel, circular);
        if let Some(y) = cuda::conv2d(parts, weight, &epilogue, window) {
            return y;
        }
        let x = joined(parts)?;
        // Back to the checkpoint's order, which candle's convolution takes.
        let (outputs, k) = (weight.dim(0)?, self.kernel);
        let weight = weight
            .reshape((outputs, k, k, ()))?
            .permute((0, 3, 1, 2))?
            .contiguous()?;
        let y = reference::conv2d(&x, &weight, bias.as_ref(), sampling, circular)?;
        match second {
            Second::None => self.activated(&y),
            Second::Residual(residual) => self.activated(&y)? + residual,
            Second::PerImage(shift) => {
                let shift = shift.unsqueeze(1)?.unsqueeze(1)?;
                self.activated(&y.broadcast_add(&shift)?)
            }
        }
    }

    /// Bytes of the weight.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.weight.bytes()
    }

    pub(super) fn op<'a>(
        &'a self,
        shape: [usize; 4],
        weight: &'a Packed,
        bias: Option<&'a [f32]>,
        second: kernels::Second,
    ) -> Result<kernels::Conv2d<'a>> {
        let channels = shape[3];
        if channels * self.kernel * self.kernel != weight.inputs() {
            candle_core::bail!(
                "conv2d: {channels} channels, weight takes {}",
                weight.inputs() / (self.kernel * self.kernel)
            );
        }
        let circular = self.circular.load(Ordering::Relaxed);
        let window = self.sampling.window(shape, self.kernel, circular);
        Ok(kernels::Conv2d {
            weight,
            bias,
            window,
            activation: self.activation,
            slopes: self.slopes.as_ref().map(|(values, _)| values.as_slice()),
            second,
        })
    }
}

/// Group norm over `[batch, ..., channels]`, optionally followed by `SiLU`.
#[derive(Debug, Clone)]
pub struct GroupNorm {
    pub(super) weight: Tensor,
    pub(super) bias: Tensor,
    pub(super) groups: usize,
    pub(super) eps: f32,
    pub(super) silu: bool,
    pub(super) origins: Vec<Origin>,
}

impl GroupNorm {
    /// With 32 groups, as every model here has.
    ///
    /// # Errors
    /// When the device refuses the tensor.
    pub fn new(place: &Placement, weight: &[f32], bias: &[f32], eps: f32) -> Result<Self> {
        Ok(Self {
            weight: place.norm_tensor(weight)?,
            bias: place.norm_tensor(bias)?,
            groups: 32,
            eps,
            silu: false,
            origins: Vec::new(),
        })
    }

    /// Adds `SiLU`.
    #[must_use]
    pub fn silu(mut self) -> Self {
        self.silu = true;
        self
    }

    /// Same shape out as in.
    ///
    /// # Errors
    /// On a shape that does not fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_parts(&[x])
    }
}

/// Layer norm over the last axis, eps 1e-5.
#[derive(Debug, Clone)]
pub struct LayerNorm {
    pub(super) weight: Tensor,
    pub(super) bias: Tensor,
    pub(super) origins: Vec<Origin>,
}

impl LayerNorm {
    pub(super) const EPS: f32 = 1e-5;

    /// From weight and bias `[channels]`.
    ///
    /// # Errors
    /// When the device refuses the tensor.
    pub fn new(place: &Placement, weight: &[f32], bias: &[f32]) -> Result<Self> {
        Ok(Self {
            weight: place.norm_tensor(weight)?,
            bias: place.norm_tensor(bias)?,
            origins: Vec::new(),
        })
    }

    /// Same shape out as in.
    ///
    /// # Errors
    /// On a shape that does not fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if kernels::fuses_on(x) {
            return x.apply_op3_no_bwd(
                &self.weight,
                &self.bias,
                &kernels::LayerNorm { eps: Self::EPS },
            );
        }
        if let Some(y) = cuda::layer_norm(x, &self.weight, &self.bias, Self::EPS) {
            return y;
        }
        candle_nn::ops::layer_norm(x, &self.weight, &self.bias, Self::EPS)
    }
}

/// Joins `[..., a]` and `[..., b]` to `[..., a + b]`.
///
/// # Errors
/// On shapes that do not fit.
pub fn concat_channels(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if kernels::fuses_on(a) {
        return a.apply_op2_no_bwd(b, &kernels::Concat);
    }
    if let Some(y) = cuda::concat_channels(a, b) {
        return y;
    }
    Tensor::cat(&[a, b], candle_core::D::Minus1)?.contiguous()
}
