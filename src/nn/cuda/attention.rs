//! Attention: the one place that decides between cuDNN's fused graph and our flash kernel.
//!
//! Heads are read where they lie, side by side in a token's channels; nothing is transposed. The library's node wants heads of at most
//! 128 channels in multiples of 8, in 16 bits, and version 9.13; ours takes the rest.

use candle_core::{Result, Tensor, bail};

use super::cudnn::{self, Attribute, Descriptor, Place, TensorOf};
use super::engine::{Arg, Engine};
use super::geometry::{AttentionShape, Kind};
use super::operand::{Operand, result};
use crate::nn::attention::Mask;

/// The library's way; without a plan ours runs.
pub(super) struct Plan(cudnn::Plan);

/// Queries, keys and values of a layer.
pub(super) struct Call {
    kind: Kind,
    shape: AttentionShape,
    /// The tensors that the addresses lie in.
    operands: Vec<Operand>,
    q: u64,
    k: u64,
    v: u64,
}

/// First version of the library with the node.
const SDPA_VERSION: usize = 91_300;

/// Names of the tensors in the library's graph.
const Q: i64 = 1;
const K: i64 = 2;
const V: i64 = 3;
const OUT: i64 = 4;
const SCALE: i64 = 5;

impl Call {
    /// `qkv` `[batch, tokens, 3 * channels]`.
    pub(super) fn to_itself(kind: Kind, qkv: &Tensor, heads: usize, mask: Mask) -> Result<Self> {
        let (batch, tokens, stride) = qkv.dims3()?;
        let channels = stride / 3;
        let operand = Operand::new(qkv)?;
        let part = |i: usize| operand.address() + (i * channels * kind.bytes()) as u64;
        Ok(Self {
            kind,
            shape: AttentionShape {
                batch,
                tokens,
                key_tokens: tokens,
                heads,
                head_dim: channels / heads.max(1),
                q_stride: stride,
                kv_stride: stride,
                causal: mask == Mask::Causal,
            },
            q: part(0),
            k: part(1),
            v: part(2),
            operands: vec![operand],
        })
    }

    /// `q` `[batch, tokens, channels]`, `kv` `[batch, key tokens, 2 * channels]`.
    pub(super) fn to_context(kind: Kind, q: &Tensor, kv: &Tensor, heads: usize) -> Result<Self> {
        let (batch, tokens, channels) = q.dims3()?;
        let (others, key_tokens, stride) = kv.dims3()?;
        if others != batch || stride != 2 * channels {
            bail!("attention: {:?} to {:?}", q.shape(), kv.shape());
        }
        let (q, kv) = (Operand::new(q)?, Operand::like(kv, q)?);
        Ok(Self {
            kind,
            shape: AttentionShape {
                batch,
                tokens,
                key_tokens,
                heads,
                head_dim: channels / heads.max(1),
                q_stride: channels,
                kv_stride: stride,
                causal: false,
            },
            q: q.address(),
            k: kv.address(),
            v: kv.address() + (channels * kind.bytes()) as u64,
            operands: vec![q, kv],
        })
    }

    /// Queues the layer by the fastest way known for its shape.
    pub(super) fn run(&self, engine: &mut Engine) -> Result<Tensor> {
        engine.run_planned(
            (self.kind, (self.kind, self.shape)),
            |engine| &mut engine.attentions,
            |engine| {
                let library = engine.dnn.as_ref().filter(|_| self.is_for_library());
                Ok(cudnn::or_none(library, |library| self.plans(library)))
            },
            |engine, plan| self.queue(engine, plan),
        )
    }

    fn scale(&self) -> f32 {
        1.0 / (self.shape.head_dim as f32).sqrt()
    }

    fn queue(&self, engine: &mut Engine, plan: Option<&Plan>) -> Result<Operand> {
        let s = self.shape;
        let channels = s.heads * s.head_dim;
        let out = result(engine.device(), self.kind, &[s.batch, s.tokens, channels])?;
        if let Some(Plan(plan)) = plan {
            let scale = self.scale();
            let scale_at = std::ptr::from_ref(&scale).addr() as u64;
            let at = [
                (Q, self.q),
                (K, self.k),
                (V, self.v),
                (OUT, out.address()),
                (SCALE, scale_at),
            ];
            plan.run(engine, &at)?;
            return Ok(out);
        }
        let Some((head, grid)) = s.grid(self.kind) else {
            bail!(
                "attention: heads of {} channels; 512 is the most",
                s.head_dim
            )
        };
        let args = [
            Arg::Address(self.q),
            Arg::Address(self.k),
            Arg::Address(self.v),
            Arg::Address(out.address()),
            Arg::Int(s.tokens),
            Arg::Int(s.key_tokens),
            Arg::Int(s.head_dim),
            Arg::Int(s.q_stride),
            Arg::Int(s.kv_stride),
            Arg::Int(channels),
            Arg::Float(self.scale()),
            Arg::Flag(s.causal),
        ];
        engine.launch(
            &format!("attention_{head}_{}", self.kind.suffix()),
            grid,
            &args,
        )?;
        Ok(out)
    }

    fn is_for_library(&self) -> bool {
        let aligned = [self.q, self.k, self.v]
            .iter()
            .all(|at| at.is_multiple_of(16));
        self.kind != Kind::F32
            && !self.shape.causal
            && self.shape.head_dim <= 128
            && self.shape.head_dim.is_multiple_of(8)
            && aligned
            && !self.operands.is_empty()
            && cudnn::Dnn::version() >= SDPA_VERSION
    }

    /// The library's graph: one node.
    fn plans(&self, library: &cudnn::Dnn) -> Result<Vec<Plan>> {
        let s = self.shape;
        let tokens = |id, tokens: usize, stride: usize| {
            let dims = [s.batch, s.heads, tokens, s.head_dim].map(|n| n as i64);
            TensorOf {
                id,
                kind: self.kind,
                dims: &dims,
                strides: &[tokens * stride, s.head_dim, stride, 1].map(|n| n as i64),
                place: Place::Device,
            }
            .build()
        };
        let q = tokens(Q, s.tokens, s.q_stride)?;
        let k = tokens(K, s.key_tokens, s.kv_stride)?;
        let v = tokens(V, s.key_tokens, s.kv_stride)?;
        let out = tokens(OUT, s.tokens, s.heads * s.head_dim)?;
        let scale = TensorOf {
            id: SCALE,
            kind: Kind::F32,
            dims: &[1, 1, 1, 1],
            strides: &[1, 1, 1, 1],
            place: Place::Host,
        }
        .build()?;
        let node = Descriptor::new(cudnn::Kind::CUDNN_BACKEND_OPERATION_SDPA_FWD_DESCRIPTOR)?
            .descriptors(Attribute::CUDNN_ATTR_OPERATION_SDPA_FWD_QDESC, &[&q])?
            .descriptors(Attribute::CUDNN_ATTR_OPERATION_SDPA_FWD_KDESC, &[&k])?
            .descriptors(Attribute::CUDNN_ATTR_OPERATION_SDPA_FWD_VDESC, &[&v])?
            .descriptors(Attribute::CUDNN_ATTR_OPERATION_SDPA_FWD_ODESC, &[&out])?
            .descriptors(
                Attribute::CUDNN_ATTR_OPERATION_SDPA_FWD_SCALEDESC,
                &[&scale],
            )?
            .finalise()?;
        let plans = library.plans(vec![node], vec![q, k, v, out, scale])?;
        Ok(plans.into_iter().map(Plan).collect())
    }
}
