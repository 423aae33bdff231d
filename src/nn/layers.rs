//! Layers: weights in the form their device computes with, and `forward` as one fused operation.
//!
//! Activations are channels-last, `[batch, height, width, channels]` or `[batch, tokens, channels]`. On the CPU weights
//! are packed at load, in `f32` or `bf16`; on other devices they stay tensors and `super::reference` composes the operation.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{DType, Device, Result, Tensor};

use super::cpu::Isa;
use super::cpu::math::Activation;
use super::cpu::packed::{Columns, Layout, Packed, Precision};
use super::cpu::rows::Window;
use super::rewrite::{Origin, Weight};
use super::window::Sampling;
use super::{kernels, reference};

/// Where and in which type a model computes; shared by its layers.
#[derive(Debug, Clone)]
pub struct Placement {
    /// Device of weights and activations.
    pub device: Device,
    /// Type of weights and activations.
    pub dtype: DType,
    /// Whether convolutions wrap around the picture's edges (A1111's `tiling`); may change between jobs.
    pub circular: Arc<AtomicBool>,
}

impl Placement {
    /// `f32` on the CPU.
    #[must_use]
    pub fn cpu() -> Self {
        Self {
            device: Device::Cpu,
            dtype: DType::F32,
            circular: Arc::default(),
        }
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

    fn is_fused(&self) -> bool {
        kernels::fuses(&self.device, self.dtype)
    }

    /// How a weight is packed whose factors lie side by side in runs of `run`.
    fn layout(&self, columns: Columns, run: usize) -> Layout {
        let precision = match self.dtype {
            DType::BF16 => Precision::Bf16,
            _ => Precision::F32,
        };
        Layout {
            precision,
            columns,
            run,
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

/// `x wᵀ + b` over the last axis, and what follows it.
#[derive(Debug, Clone)]
pub struct Linear {
    pub(super) weight: Weight,
    then: Then,
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
        let columns = if then == Then::Geglu {
            Columns::Geglu
        } else {
            Columns::Plain
        };
        let weight = if place.is_fused() {
            let layout = place.layout(columns, weight.len() / outputs.max(1));
            Weight::Packed {
                weight: Packed::new(Isa::chosen(), weight, outputs, layout, |k| k),
                bias: bias.map(<[f32]>::to_vec),
            }
        } else {
            Weight::Tensors {
                weight: place.tensor(weight, &[outputs, weight.len() / outputs.max(1)])?,
                bias: bias.map(|b| place.tensor(b, &[outputs])).transpose()?,
            }
        };
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
        match &self.weight {
            Weight::Packed { weight, bias } => {
                x.apply_op1_no_bwd(&self.op(weight, bias.as_deref()))
            }
            Weight::Tensors { weight, bias } => self.composed(x, weight, bias.as_ref()),
        }
    }

    /// [`Self::forward`] plus `residual`.
    ///
    /// # Errors
    /// On a shape that does not fit.
    pub fn forward_add(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        match &self.weight {
            Weight::Packed { weight, bias } => {
                x.apply_op2_no_bwd(residual, &self.op(weight, bias.as_deref()))
            }
            Weight::Tensors { weight, bias } => self.composed(x, weight, bias.as_ref())? + residual,
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
            bias,
            activation,
        }
    }

    fn composed(&self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let y = reference::linear(x, weight, bias)?;
        match self.then {
            Then::Activate(activation) => reference::activate(&y, activation),
            Then::Geglu => reference::geglu(&y),
        }
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
        let taps = kernel * kernel;
        let weight = if place.is_fused() {
            let index = Self::tap_major(inputs, taps);
            let layout = place.layout(Columns::Plain, inputs);
            Weight::Packed {
                weight: Packed::new(Isa::chosen(), weight, outputs, layout, index),
                bias: bias.map(<[f32]>::to_vec),
            }
        } else {
            Weight::Tensors {
                weight: place.tensor(weight, &[outputs, inputs, kernel, kernel])?,
                bias: bias.map(|b| place.tensor(b, &[outputs])).transpose()?,
            }
        };
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

    /// Where the `k`-th packed value lies in a stored row: channel-major there, while the kernel reads tap by tap.
    pub(super) fn tap_major(inputs: usize, taps: usize) -> impl Fn(usize) -> usize + Sync {
        move |k| k % inputs * taps + k / inputs
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
        match &self.weight {
            Weight::Packed { weight, bias } => x.apply_op1_no_bwd(&self.op(
                x.dims4()?,
                weight,
                bias.as_deref(),
                kernels::Second::Residual,
            )?),
            Weight::Tensors { weight, bias } => {
                self.activated(&self.composed(x, weight, bias.as_ref())?)
            }
        }
    }

    /// [`Self::forward`] plus `residual`, of the output's shape.
    ///
    /// # Errors
    /// On a shape that does not fit.
    pub fn forward_add(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        match &self.weight {
            Weight::Packed { weight, bias } => x.apply_op2_no_bwd(
                residual,
                &self.op(
                    x.dims4()?,
                    weight,
                    bias.as_deref(),
                    kernels::Second::Residual,
                )?,
            ),
            Weight::Tensors { weight, bias } => {
                self.activated(&self.composed(x, weight, bias.as_ref())?)? + residual
            }
        }
    }

    /// [`Self::forward`] with `per_image` `[batch, outputs]` added to every pixel before the activation.
    ///
    /// # Errors
    /// On a shape that does not fit.
    pub fn forward_shifted(&self, x: &Tensor, per_image: &Tensor) -> Result<Tensor> {
        match &self.weight {
            Weight::Packed { weight, bias } => x.apply_op2_no_bwd(
                per_image,
                &self.op(
                    x.dims4()?,
                    weight,
                    bias.as_deref(),
                    kernels::Second::PerImage,
                )?,
            ),
            Weight::Tensors { weight, bias } => {
                let shift = per_image.unsqueeze(1)?.unsqueeze(1)?;
                let y = self.composed(x, weight, bias.as_ref())?;
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
        (batch, height, width, channels): (usize, usize, usize, usize),
        weight: &'a Packed,
        bias: Option<&'a [f32]>,
        second: kernels::Second,
    ) -> Result<kernels::Conv2d<'a>> {
        if channels * self.kernel * self.kernel != weight.inputs() {
            candle_core::bail!(
                "conv2d: {channels} channels, weight takes {}",
                weight.inputs() / (self.kernel * self.kernel)
            );
        }
        let s = self.sampling;
        let reach = |len: usize| {
            (len * s.upsample + s.pad + s.pad_after).saturating_sub(self.kernel) / s.stride + 1
        };
        let window = Window {
            batch,
            height,
            width,
            channels,
            out_height: reach(height),
            out_width: reach(width),
            kernel: self.kernel,
            stride: s.stride,
            pad: s.pad,
            upsample: s.upsample,
            circular: self.circular.load(Ordering::Relaxed),
        };
        Ok(kernels::Conv2d {
            weight,
            bias,
            window,
            activation: self.activation,
            slopes: self.slopes.as_ref().map(|(values, _)| values.as_slice()),
            second,
        })
    }

    pub(super) fn composed(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
    ) -> Result<Tensor> {
        reference::conv2d(
            x,
            weight,
            bias,
            self.sampling,
            self.circular.load(Ordering::Relaxed),
        )
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
        if kernels::fuses_on(x) {
            let op = kernels::GroupNorm {
                groups: self.groups,
                eps: self.eps,
                silu: self.silu,
            };
            return x.apply_op3_no_bwd(&self.weight, &self.bias, &op);
        }
        let y = reference::group_norm(
            x,
            &self.weight,
            &self.bias,
            self.groups,
            f64::from(self.eps),
        )?;
        reference::activate(
            &y,
            if self.silu {
                Activation::Silu
            } else {
                Activation::None
            },
        )
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
    const EPS: f32 = 1e-5;

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
    Tensor::cat(&[a, b], candle_core::D::Minus1)?.contiguous()
}
