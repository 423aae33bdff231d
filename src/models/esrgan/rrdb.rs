//! `RRDBNet`: residual-in-residual dense blocks, then doublings (Wang et al. 2018, figure 4; ESRGAN+ with its 1x1 shortcuts).
//!
//! The factor of 0.2 on every residual is folded into the last convolution of its dense block; the third of a block carries the
//! block's own factor besides. Dense layers read the layers before them where they lie.

use candle_core::{Result, Tensor};

use super::names::Names;
use crate::models::build::{Bias, Build};
use crate::nn::{Activation, Conv2d, Linear, Placement, Sampling, Then};
use crate::weights::{Error, Source};

/// Weight of a residual.
const RESIDUAL: f32 = 0.2;
/// Layers of a dense block.
const LAYERS: usize = 5;

/// The network.
#[derive(Debug)]
pub(super) struct Rrdb {
    first: Conv2d,
    blocks: Vec<[Dense; 3]>,
    after_blocks: Conv2d,
    upsamplings: Vec<Conv2d>,
    high_resolution: Conv2d,
    last: Conv2d,
    features: u64,
    growth: u64,
}

/// A dense block, scaled.
#[derive(Debug)]
struct Dense {
    layers: Vec<Conv2d>,
    last: Conv2d,
    /// ESRGAN+: what the input adds to the second layer, which then adds to the fourth.
    shortcut: Option<Linear>,
}

impl Rrdb {
    /// The network, and the channels that it takes.
    pub(super) fn new(
        source: &dyn Source,
        names: &Names,
        place: &Placement,
    ) -> std::result::Result<(Self, usize), Error> {
        let b = Build::new(source, names.prefix(), place);
        let weight = |name: String| format!("{name}.weight");
        let features = b.width(&weight(names.first()))?;
        let growth = b.width(&weight(names.dense(0, 1, 1)))?;
        let first_shape = b.tensors.shape(&weight(names.first()))?;
        let inputs = first_shape.get(1).copied().unwrap_or(0);
        let same = |name: &str, outputs| b.conv(name, [outputs, features], Sampling::SAME);
        let blocks = (0..names.blocks)
            .map(|block| {
                let dense = |i: usize, scale: f32| {
                    Dense::new(&b, names, (block, i), (features, growth), scale)
                };
                let third = RESIDUAL * RESIDUAL;
                Ok([dense(1, RESIDUAL)?, dense(2, RESIDUAL)?, dense(3, third)?])
            })
            .collect::<std::result::Result<Vec<_>, Error>>()?;
        let upsamplings = (1..=names.upsamplings)
            .map(|i| {
                let conv = b.conv(&names.upsampling(i), [features; 2], Sampling::DOUBLE)?;
                Ok(conv.then(Activation::LeakyRelu))
            })
            .collect::<std::result::Result<Vec<_>, Error>>()?;
        let network = Self {
            first: b.conv(&names.first(), [features, inputs], Sampling::SAME)?,
            blocks,
            after_blocks: same(&names.after_blocks(), features)?,
            upsamplings,
            high_resolution: same(&names.high_resolution(), features)?.then(Activation::LeakyRelu),
            last: same(&names.last(), super::RGB)?,
            features: features as u64,
            growth: growth as u64,
        };
        Ok((network, inputs))
    }

    /// Values alive at a time for a picture of `pixels` inner pixels.
    pub(super) fn work_values(&self, pixels: u64) -> u64 {
        let inside = pixels * (6 * self.features + 4 * self.growth);
        let outside = pixels << (2 * self.upsamplings.len());
        inside.max(outside * 2 * self.features) + outside * 2 * super::RGB as u64
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let first = self.first.forward(x)?;
        let mut x = first.clone();
        for [a, b, c] in &self.blocks {
            let y = a.forward(&x, &x)?;
            let y = b.forward(&y, &y)?;
            // x + 0.2 (y + 0.2 dense(y)), both factors of the dense part being folded into `c`.
            x = c.forward(&y, &(&x + (&y * f64::from(RESIDUAL))?)?)?;
        }
        let mut x = self.after_blocks.forward_add(&x, &first)?;
        for upsampling in &self.upsamplings {
            x = upsampling.forward(&x)?;
        }
        self.last.forward(&self.high_resolution.forward(&x)?)
    }
}

impl Dense {
    fn new(
        b: &Build<'_>,
        names: &Names,
        (block, dense): (usize, usize),
        (features, growth): (usize, usize),
        scale: f32,
    ) -> std::result::Result<Self, Error> {
        let name = |layer| names.dense(block, dense, layer);
        let inputs = |layer: usize| features + (layer - 1) * growth;
        let layers = (1..LAYERS).map(|layer| {
            let conv = b.conv(&name(layer), [growth, inputs(layer)], Sampling::SAME)?;
            Ok(conv.then(Activation::LeakyRelu))
        });
        let shortcut = names.shortcut(block, dense);
        let then = Then::Activate(Activation::None);
        let shortcut = if b.has(&format!("{shortcut}.weight")) {
            Some(b.linear(&shortcut, [growth, features], Bias::Without, then)?)
        } else {
            None
        };
        Ok(Self {
            layers: layers.collect::<std::result::Result<_, Error>>()?,
            last: scaled(b, &name(LAYERS), [features, inputs(LAYERS)], scale)?,
            shortcut,
        })
    }
}

impl Dense {
    /// The scaled block of `x` plus `residual`.
    fn forward(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        let shortcut = match &self.shortcut {
            Some(shortcut) => Some(shortcut.forward(x)?),
            None => None,
        };
        let mut parts = vec![x.clone()];
        for (i, layer) in self.layers.iter().enumerate() {
            let second = match (&shortcut, i) {
                (Some(shortcut), 1) => Some(shortcut),
                (Some(_), 3) => parts.get(2),
                _ => None,
            };
            let inputs: Vec<&Tensor> = parts.iter().collect();
            let y = layer.forward_parts(&inputs, second)?;
            parts.push(y);
        }
        let inputs: Vec<&Tensor> = parts.iter().collect();
        self.last.forward_parts(&inputs, Some(residual))
    }
}

/// A convolution whose output is multiplied by `scale`.
fn scaled(
    b: &Build<'_>,
    name: &str,
    [outputs, inputs]: [usize; 2],
    scale: f32,
) -> std::result::Result<Conv2d, Error> {
    let times = |values: Vec<f32>| values.into_iter().map(|x| x * scale).collect::<Vec<f32>>();
    let weight = b
        .tensors
        .read(&format!("{name}.weight"), &[outputs, inputs, 3, 3])?;
    let bias = b.tensors.read(&format!("{name}.bias"), &[outputs])?;
    Ok(Conv2d::new(
        b.place,
        &times(weight),
        [outputs, inputs, 3],
        Some(&times(bias)),
        Sampling::SAME,
    )?)
}
