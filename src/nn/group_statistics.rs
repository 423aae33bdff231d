//! Group norm of a picture that is seen strip by strip: first every strip is measured, then each can be normalised by itself.
//!
//! Invariant: the statistics are those of the whole picture, whatever its cutting; sums are kept in `f64` relative to the
//! first pixel, as [`GroupNorm::forward`] keeps them. One picture at a time.

use candle_core::{CpuStorage, CustomOp1, D, DType, Layout, Result, Shape, Tensor, bail};
use half::bf16;

use super::block_cache::buffer;
use super::cpu::Isa;
use super::cpu::norm::{self, Groups};
use super::cuda;
use super::kernels::{fuses_on, output, values, with_type};
use super::layers::GroupNorm;

/// What has been seen of a picture.
#[derive(Debug, Clone, Default)]
pub struct GroupStatistics {
    seen: Option<Seen>,
    pixels: usize,
}

/// Channels of the first pixel; per channel the sum of `x - origin`, then of its square.
#[derive(Debug, Clone)]
enum Seen {
    Host { origin: Vec<f32>, sums: Vec<f64> },
    Device(DeviceSums),
}

/// [`Seen`] in a card's memory, where nothing waits for it.
#[derive(Debug, Clone)]
#[cfg_attr(
    not(feature = "cuda"),
    allow(dead_code, reason = "only a card adds to it")
)]
pub(super) struct DeviceSums {
    /// `[channels]`, f32.
    pub(super) origin: Tensor,
    /// `[2, channels]`, f64, added to in place.
    pub(super) sums: Tensor,
}

/// A group norm with the statistics of one picture.
#[derive(Debug, Clone)]
pub struct MeasuredNorm {
    affine: Affine,
    silu: bool,
}

/// Means, then scales, per channel; and the bias.
#[derive(Debug, Clone)]
enum Affine {
    Host {
        affine: Vec<f32>,
        bias: Vec<f32>,
    },
    /// `[2, channels]` in f32, and the layer's bias.
    Device {
        affine: Tensor,
        bias: Tensor,
    },
}

impl Seen {
    /// Before the first strip.
    fn new(strip: &Tensor) -> Result<Self> {
        let channels = strip.dim(D::Minus1)?;
        let first = strip.narrow(1, 0, 1)?.narrow(2, 0, 1)?.flatten_all()?;
        let origin = first.to_dtype(DType::F32)?;
        if cuda::measures(strip) {
            return Ok(Self::Device(DeviceSums {
                origin: origin.force_contiguous()?,
                sums: Tensor::zeros((2, channels), DType::F64, strip.device())?,
            }));
        }
        Ok(Self::Host {
            origin: origin.to_vec1()?,
            sums: vec![0.0; 2 * channels],
        })
    }

    fn channels(&self) -> usize {
        match self {
            Self::Host { origin, .. } => origin.len(),
            Self::Device(seen) => seen.origin.elem_count(),
        }
    }

    fn add(&mut self, strip: &Tensor) -> Result<()> {
        match self {
            Self::Device(seen) => cuda::add_sums(strip, seen),
            Self::Host { origin, sums } => {
                let added: Vec<f64> = host_sums(strip, origin)?.to_vec1()?;
                sums.iter_mut().zip(added).for_each(|(t, s)| *t += s);
                Ok(())
            }
        }
    }
}

fn host_sums(strip: &Tensor, origin: &[f32]) -> Result<Tensor> {
    if fuses_on(strip) {
        return strip.apply_op1_no_bwd(&Sums(origin));
    }
    let origin = Tensor::new(origin, strip.device())?;
    let x = strip
        .reshape(((), origin.elem_count()))?
        .to_dtype(DType::F32)?
        .broadcast_sub(&origin)?;
    Tensor::cat(&[x.sum(0)?, x.sqr()?.sum(0)?], 0)?.to_dtype(DType::F64)
}

impl GroupStatistics {
    /// Adds a strip, `[1, height, width, channels]`.
    ///
    /// # Errors
    /// On another number of channels, or more than one picture.
    pub fn add(&mut self, strip: &Tensor) -> Result<()> {
        let (batch, height, width, channels) = strip.dims4()?;
        let known = self.seen.as_ref().map_or(channels, Seen::channels);
        if batch != 1 || channels != known || height * width == 0 {
            bail!("group statistics: a strip of shape {:?}", strip.shape());
        }
        let mut seen = match self.seen.take() {
            Some(seen) => seen,
            None => Seen::new(strip)?,
        };
        seen.add(strip)?;
        self.seen = Some(seen);
        self.pixels += height * width;
        Ok(())
    }
}

impl GroupNorm {
    /// The norm of the picture that was measured.
    ///
    /// # Errors
    /// When the picture has another number of channels, or nothing was seen of it.
    pub fn measured(&self, seen: &GroupStatistics) -> Result<MeasuredNorm> {
        let channels = self.weight.elem_count();
        let Some(found) = seen.seen.as_ref().filter(|s| s.channels() == channels) else {
            let found = seen.seen.as_ref().map_or(0, Seen::channels);
            bail!("group norm: {found} channels, weight takes {channels}");
        };
        let affine = match found {
            Seen::Device(sums) => Affine::Device {
                affine: cuda::affine(self, sums, seen.pixels)?,
                bias: self.bias.clone(),
            },
            Seen::Host { origin, sums } => {
                let host = |t: &Tensor| t.to_dtype(DType::F32)?.to_vec1::<f32>();
                let (weight, bias) = (host(&self.weight)?, host(&self.bias)?);
                let groups = Groups {
                    batch: 1,
                    pixels: seen.pixels,
                    channels,
                    count: self.groups,
                    eps: self.eps,
                    silu: self.silu,
                };
                let mut affine = vec![0.0; 2 * channels];
                norm::affine_of_image(sums, origin, &weight, groups, &mut affine);
                Affine::Host { affine, bias }
            }
        };
        Ok(MeasuredNorm {
            affine,
            silu: self.silu,
        })
    }
}

impl MeasuredNorm {
    /// A strip normalised, same shape.
    ///
    /// # Errors
    /// On another number of channels.
    pub fn forward(&self, strip: &Tensor) -> Result<Tensor> {
        let channels = strip.dim(D::Minus1)?;
        let measured = match &self.affine {
            Affine::Host { bias, .. } => bias.len(),
            Affine::Device { bias, .. } => bias.elem_count(),
        };
        if channels != measured {
            bail!("group norm: {channels} channels, measured {measured}");
        }
        let (affine, bias) = match &self.affine {
            Affine::Device { affine, bias } => {
                return cuda::apply_affine(strip, [affine, bias], self.silu);
            }
            Affine::Host { affine, bias } => (affine, bias),
        };
        if fuses_on(strip) {
            return strip.apply_op1_no_bwd(&Apply(affine, bias, self.silu));
        }
        let device = strip.device();
        let (mean, scale) = affine.split_at(channels);
        let y = strip
            .to_dtype(DType::F32)?
            .broadcast_sub(&Tensor::new(mean, device)?)?
            .broadcast_mul(&Tensor::new(scale, device)?)?
            .broadcast_add(&Tensor::new(bias.as_slice(), device)?)?;
        let y = if self.silu {
            candle_nn::ops::silu(&y)?
        } else {
            y
        };
        y.to_dtype(strip.dtype())
    }
}

struct Sums<'a>(&'a [f32]);

impl CustomOp1 for Sums<'_> {
    fn name(&self) -> &'static str {
        "group_sums"
    }
    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let sums =
            with_type!(x, E => norm::channel_sums(Isa::chosen(), values::<E>(x, layout)?, self.0));
        let shape = Shape::from(sums.len());
        Ok((CpuStorage::F64(sums), shape))
    }
}

/// Means and scales, bias, whether `SiLU` follows.
struct Apply<'a>(&'a [f32], &'a [f32], bool);

impl CustomOp1 for Apply<'_> {
    fn name(&self) -> &'static str {
        "group_norm_measured"
    }
    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let Self(affine, bias, silu) = *self;
        with_type!(x, E => {
            let x = values::<E>(x, layout)?;
            let mut out = buffer(x.len());
            norm::apply(Isa::chosen(), x, affine, bias, silu, &mut out);
            Ok(output(out, layout.shape().clone()))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::Placement;

    /// Largest difference between strips of `rows` rows and the whole picture in f32; values far from zero, as late in a VAE.
    fn worst(place: &Placement, rows: usize) -> f32 {
        let (height, width, channels) = (13, 9, 64);
        let value = |i: usize| 40.0 + ((i * 2_654_435_761) % 1000) as f32 / 250.0;
        let x: Vec<f32> = (0..height * width * channels).map(value).collect();
        let x = Tensor::from_vec(x, (1, height, width, channels), &place.device)
            .and_then(|x| x.to_dtype(place.dtype))
            .unwrap();
        let weight: Vec<f32> = (0..channels).map(|i| 0.5 + i as f32 / 64.0).collect();
        let norm = GroupNorm::new(place, &weight, &weight, 1e-6)
            .unwrap()
            .silu();
        let wide = GroupNorm::new(&Placement::cpu(), &weight, &weight, 1e-6)
            .unwrap()
            .silu();
        let whole = wide.forward(&x.to_dtype(DType::F32).unwrap()).unwrap();
        let mut seen = GroupStatistics::default();
        let strips: Vec<Tensor> = (0..height)
            .step_by(rows)
            .map(|at| x.narrow(1, at, rows.min(height - at)).unwrap())
            .collect();
        for strip in &strips {
            seen.add(strip).unwrap();
        }
        let measured = norm.measured(&seen).unwrap();
        let parts: Vec<Tensor> = strips
            .iter()
            .map(|strip| measured.forward(strip).unwrap())
            .collect();
        let joined = Tensor::cat(&parts, 1).unwrap();
        let joined = joined.to_dtype(DType::F32).unwrap();
        let difference = (joined - whole).unwrap().abs().unwrap();
        difference
            .flatten_all()
            .unwrap()
            .max(0)
            .unwrap()
            .to_scalar()
            .unwrap()
    }

    #[test]
    fn strips_are_normalised_as_the_whole_picture_is() {
        for rows in [1, 4, 13] {
            let worst = worst(&Placement::cpu(), rows);
            assert!(worst < 2e-6, "strips of {rows} rows: {worst:e}");
        }
    }

    #[test]
    fn narrow_types_are_measured_in_f32() {
        // The result is rounded: half a 512th (f16), half a 64th (bf16) of values up to 4.
        for (dtype, most) in [(DType::F16, 2e-3), (DType::BF16, 1e-2)] {
            let narrow = Placement {
                dtype,
                ..Placement::cpu()
            };
            let worst = worst(&narrow, 4);
            assert!(worst < most, "{dtype:?}: {worst}");
        }
    }
}
