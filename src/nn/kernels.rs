//! The bridge from candle tensors to the fused bodies: each operation is a `CustomOp` whose `cpu_fwd` hands plain slices
//! to [`super::cpu`]. Inputs are contiguous, all of one type: `f32` or `bf16`. Weights and biases of norms are `f32`.

use std::ops::Deref;

use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, DType, Device, Layout, Result, Shape, Storage,
    Tensor, WithDType, bail,
};
use half::bf16;

use super::block_cache::buffer;
use super::cpu::Isa;
use super::cpu::attention::{self, Heads};
use super::cpu::element::Element;
use super::cpu::gemm::{Epilogue, Scales, gemm};
use super::cpu::math::Activation;
use super::cpu::norm::{self, Groups};
use super::cpu::packed::Packed;
use super::cpu::rows::{Part, Rows, Window};
use super::e4m3;

/// A type of activations that has fused bodies.
pub(super) trait Fused: Element + WithDType {}
impl Fused for f32 {}
impl Fused for bf16 {}

/// Whether operations on this device in this type have fused bodies.
pub(super) fn fuses(device: &Device, dtype: DType) -> bool {
    device.is_cpu() && matches!(dtype, DType::F32 | DType::BF16)
}

/// Whether operations on `x` have fused bodies.
pub(super) fn fuses_on(x: &Tensor) -> bool {
    fuses(x.device(), x.dtype())
}

/// `$body` with `$type` standing for the type of the values in a storage.
macro_rules! with_type {
    ($storage:expr, $type:ident => $body:expr) => {
        match $storage {
            CpuStorage::BF16(_) => {
                type $type = bf16;
                $body
            }
            _ => {
                type $type = f32;
                $body
            }
        }
    };
}
pub(super) use with_type;

/// The values of a contiguous tensor of this type.
pub(super) fn values<'a, E: Fused>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [E]> {
    match layout.contiguous_offsets() {
        Some((from, to)) => Ok(&E::cpu_storage_as_slice(storage)?[from..to]),
        None => bail!("fused operation on a tensor that is not contiguous: {layout:?}"),
    }
}

fn on_host(storage: &Storage) -> Result<&CpuStorage> {
    match storage {
        Storage::Cpu(storage) => Ok(storage),
        _ => bail!("fused operation on a tensor that is not on the CPU"),
    }
}

/// Values and channels of each of some tensors.
fn slices<'a, E: Fused, G: Deref<Target = Storage>>(
    tensors: &'a [(G, &Layout)],
) -> Result<Vec<Part<'a, E>>> {
    let part = |(storage, layout): &'a (G, &Layout)| {
        let channels = layout.dims().last().copied().unwrap_or(0);
        Ok((values(on_host(storage)?, layout)?, channels))
    };
    tensors.iter().map(part).collect()
}

pub(super) fn output<E: Fused>(data: Vec<E>, shape: impl Into<Shape>) -> (CpuStorage, Shape) {
    (E::to_cpu_storage_owned(data), shape.into())
}

/// The same shape with another last dimension.
fn with_last(layout: &Layout, last: usize) -> Shape {
    let mut dims = layout.dims().to_vec();
    if let Some(d) = dims.last_mut() {
        *d = last;
    }
    Shape::from(dims)
}

/// What the second tensor of a product's operation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Second {
    /// Added to the result.
    Residual,
    /// `[batch, outputs]`, added to every pixel before the activation.
    PerImage,
}

/// `activation(x · wᵀ + b) [+ residual]` over the last axis.
pub(super) struct Linear<'a> {
    pub(super) weight: &'a Packed,
    /// Scales of the outputs of a weight in e4m3, with which the input's rows are rounded to e4m3 too.
    pub(super) scales: Option<&'a [f32]>,
    pub(super) bias: Option<&'a [f32]>,
    pub(super) activation: Activation,
}

impl Linear<'_> {
    fn run<E: Fused>(
        &self,
        x: &CpuStorage,
        layout: &Layout,
        residual: Option<&[E]>,
    ) -> Result<(CpuStorage, Shape)> {
        let x = values::<E>(x, layout)?;
        let Some(&inputs) = layout.dims().last() else {
            bail!("linear: scalar input")
        };
        if inputs == 0 || inputs != self.weight.inputs() {
            bail!(
                "linear: {} inputs, weight takes {}",
                inputs,
                self.weight.inputs()
            );
        }
        let outputs = self.weight.outputs();
        let mut out = buffer(x.len() / inputs * outputs);
        let quantised = self
            .scales
            .map(|columns| (columns, e4m3::quantised(x, inputs)));
        let (x, scales) = match &quantised {
            Some((columns, (x, rows))) => (x.as_slice(), Some(Scales { rows, columns })),
            None => (x, None),
        };
        let epilogue = Epilogue {
            scales,
            bias: self.bias,
            activation: self.activation,
            residual,
            ..Epilogue::default()
        };
        gemm(Rows::Matrix(x), self.weight, epilogue, &mut out);
        Ok(output(out, with_last(layout, outputs)))
    }
}

impl CustomOp1 for Linear<'_> {
    fn name(&self) -> &'static str {
        "linear"
    }
    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        with_type!(x, E => self.run::<E>(x, layout, None))
    }
}

impl CustomOp2 for Linear<'_> {
    fn name(&self) -> &'static str {
        "linear_residual"
    }
    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        r: &CpuStorage,
        lr: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        with_type!(x, E => self.run::<E>(x, lx, Some(values(r, lr)?)))
    }
}

/// A convolution of `[batch, height, width, channels]`.
pub(super) struct Conv2d<'a> {
    pub(super) weight: &'a Packed,
    pub(super) bias: Option<&'a [f32]>,
    pub(super) window: Window,
    pub(super) activation: Activation,
    pub(super) slopes: Option<&'a [f32]>,
    pub(super) second: Second,
}

impl Conv2d<'_> {
    /// Over several pictures, their channels side by side. candle's own operations take three tensors at most.
    pub(super) fn run_parts(&self, parts: &[&Tensor], residual: Option<&Tensor>) -> Result<Tensor> {
        match parts[0].dtype() {
            DType::BF16 => self.run_parts_as::<bf16>(parts, residual),
            _ => self.run_parts_as::<f32>(parts, residual),
        }
    }

    fn run_parts_as<E: Fused>(
        &self,
        parts: &[&Tensor],
        residual: Option<&Tensor>,
    ) -> Result<Tensor> {
        let guards: Vec<_> = parts.iter().map(|x| x.storage_and_layout()).collect();
        let slices = slices(&guards)?;
        let second = residual.map(Tensor::storage_and_layout);
        let second = match &second {
            Some((storage, layout)) => Some(self.second::<E>(on_host(storage)?, layout)?),
            None => None,
        };
        let (out, shape) = self.product(Rows::Pictures(&slices, self.window), second);
        Tensor::from_vec(out, shape, parts[0].device())
    }

    /// The second tensor's values, and how far apart its rows are: those of a shift may be columns of a wider tensor.
    fn second<'s, E: Fused>(
        &self,
        storage: &'s CpuStorage,
        layout: &Layout,
    ) -> Result<(&'s [E], usize)> {
        match (self.second, layout.dims(), layout.stride()) {
            (Second::PerImage, &[batch, n], &[stride, 1]) if batch > 0 && stride >= n => {
                let from = layout.start_offset();
                let to = from + (batch - 1) * stride + n;
                Ok((&E::cpu_storage_as_slice(storage)?[from..to], stride))
            }
            (_, dims, _) => Ok((values(storage, layout)?, dims.last().copied().unwrap_or(0))),
        }
    }

    fn product<E: Fused>(
        &self,
        rows: Rows<'_, E>,
        second: Option<(&[E], usize)>,
    ) -> (Vec<E>, Shape) {
        let w = self.window;
        let shape = (w.batch, w.out_height, w.out_width, self.weight.outputs());
        let epilogue = Epilogue {
            bias: self.bias,
            rows_per_batch: w.out_height * w.out_width,
            scales: None,
            activation: self.activation,
            slopes: self.slopes,
            residual: second
                .filter(|_| self.second == Second::Residual)
                .map(|(values, _)| values),
            row_bias: second.filter(|_| self.second == Second::PerImage),
        };
        let mut out = buffer(shape.0 * shape.1 * shape.2 * shape.3);
        gemm(rows, self.weight, epilogue, &mut out);
        (out, shape.into())
    }

    fn run<E: Fused>(
        &self,
        x: &CpuStorage,
        layout: &Layout,
        second: Option<(&[E], usize)>,
    ) -> Result<(CpuStorage, Shape)> {
        let rows = Rows::Picture(values(x, layout)?, self.window);
        let (out, shape) = self.product(rows, second);
        Ok(output(out, shape))
    }
}

impl CustomOp1 for Conv2d<'_> {
    fn name(&self) -> &'static str {
        "conv2d"
    }
    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        with_type!(x, E => self.run::<E>(x, layout, None))
    }
}

impl CustomOp2 for Conv2d<'_> {
    fn name(&self) -> &'static str {
        "conv2d_add"
    }
    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        s: &CpuStorage,
        ls: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        with_type!(x, E => self.run::<E>(x, lx, Some(self.second(s, ls)?)))
    }
}

/// Group norm over `[batch, ..., channels]`.
pub(super) struct GroupNorm {
    pub(super) groups: usize,
    pub(super) eps: f32,
    pub(super) silu: bool,
}

impl GroupNorm {
    /// Over tensors of one shape but for their channels, which stand side by side; the result has them all.
    pub(super) fn run(&self, parts: &[&Tensor], weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
        match parts[0].dtype() {
            DType::BF16 => self.run_as::<bf16>(parts, weight, bias),
            _ => self.run_as::<f32>(parts, weight, bias),
        }
    }

    fn run_as<E: Fused>(
        &self,
        parts: &[&Tensor],
        weight: &Tensor,
        bias: &Tensor,
    ) -> Result<Tensor> {
        let (w, b) = (weight.storage_and_layout(), bias.storage_and_layout());
        let weight = values(on_host(&w.0)?, w.1)?;
        let bias = values(on_host(&b.0)?, b.1)?;
        let guards: Vec<_> = parts.iter().map(|x| x.storage_and_layout()).collect();
        let slices = slices::<E, _>(&guards)?;
        let (channels, dims) = (weight.len(), parts[0].dims());
        let (batch, lead) = (dims[0], &dims[..dims.len() - 1]);
        let fits = parts
            .iter()
            .all(|x| x.dims().starts_with(lead) && x.rank() == dims.len());
        if !fits || slices.iter().map(|(_, c)| c).sum::<usize>() != channels {
            bail!(
                "group norm: {dims:?} in {} parts, weight takes {channels}",
                parts.len()
            );
        }
        let groups = Groups {
            batch,
            pixels: lead[1..].iter().product(),
            channels,
            count: self.groups,
            eps: self.eps,
            silu: self.silu,
        };
        let mut out = buffer(lead.iter().product::<usize>() * channels);
        norm::group_norm(Isa::chosen(), &slices, weight, bias, groups, &mut out);
        Tensor::from_vec(out, [lead, &[channels]].concat(), parts[0].device())
    }
}

/// Layer norm over the last axis (inputs: `x`, weight, bias).
pub(super) struct LayerNorm {
    pub(super) eps: f32,
}

impl CustomOp3 for LayerNorm {
    fn name(&self) -> &'static str {
        "layer_norm"
    }
    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        w: &CpuStorage,
        lw: &Layout,
        b: &CpuStorage,
        lb: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (weight, bias) = (values(w, lw)?, values(b, lb)?);
        with_type!(x, E => {
            let x = values::<E>(x, lx)?;
            let mut out = buffer(x.len());
            norm::layer_norm(Isa::chosen(), x, weight, bias, self.eps, &mut out);
            Ok(output(out, lx.shape().clone()))
        })
    }
}

/// Attention with heads read in place.
pub(super) struct Attention {
    pub(super) heads: usize,
    pub(super) causal: bool,
}

impl Attention {
    fn run<E: Fused>(
        &self,
        q: Heads<'_, E>,
        k: Heads<'_, E>,
        v: Heads<'_, E>,
        channels: usize,
    ) -> (CpuStorage, Shape) {
        let batch = q.data.len() / (q.tokens * q.stride);
        let shape = attention::Shape {
            batch,
            heads: self.heads,
            head_dim: channels / self.heads,
            causal: self.causal,
        };
        let mut out = buffer(batch * q.tokens * channels);
        attention::attention(Isa::chosen(), q, k, v, shape, &mut out);
        output(out, (batch, q.tokens, channels))
    }
}

impl CustomOp1 for Attention {
    fn name(&self) -> &'static str {
        "self_attention"
    }
    /// `[batch, tokens, 3 * channels]`: queries, keys, values side by side.
    fn cpu_fwd(&self, qkv: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (_, tokens, stride) = layout.shape().dims3()?;
        with_type!(qkv, E => {
            let data = values::<E>(qkv, layout)?;
            let [q, k, v] = [0, 1, 2].map(|part| Heads {
                data,
                tokens,
                stride,
                offset: part * stride / 3,
            });
            Ok(self.run(q, k, v, stride / 3))
        })
    }
}

impl CustomOp2 for Attention {
    fn name(&self) -> &'static str {
        "cross_attention"
    }
    /// Queries `[batch, tokens, channels]`; keys and values side by side `[batch, context tokens, 2 * channels]`.
    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        lq: &Layout,
        kv: &CpuStorage,
        lkv: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (_, tokens, channels) = lq.shape().dims3()?;
        let (_, key_tokens, stride) = lkv.shape().dims3()?;
        with_type!(q, E => {
            let q = Heads {
                data: values::<E>(q, lq)?,
                tokens,
                stride: channels,
                offset: 0,
            };
            let k = Heads {
                data: values(kv, lkv)?,
                tokens: key_tokens,
                stride,
                offset: 0,
            };
            let v = Heads {
                offset: stride / 2,
                ..k
            };
            Ok(self.run(q, k, v, channels))
        })
    }
}

/// Joins two pictures along the channels.
pub(super) struct Concat;

impl CustomOp2 for Concat {
    fn name(&self) -> &'static str {
        "concat_channels"
    }
    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        la: &Layout,
        b: &CpuStorage,
        lb: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (Some(&ca), Some(&cb)) = (la.dims().last(), lb.dims().last()) else {
            bail!("concat: scalar input")
        };
        with_type!(a, E => {
            let (a, b) = (values::<E>(a, la)?, values::<E>(b, lb)?);
            if ca == 0 || cb == 0 || a.len() / ca != b.len() / cb {
                bail!("concat: {:?} and {:?}", la.shape(), lb.shape());
            }
            let mut out = Vec::with_capacity(a.len() + b.len());
            for (a, b) in a.chunks_exact(ca).zip(b.chunks_exact(cb)) {
                out.extend_from_slice(a);
                out.extend_from_slice(b);
            }
            Ok(output(out, with_last(la, ca + cb)))
        })
    }
}
