//! Group norm of a picture that is seen strip by strip: first every strip is measured, then each can be normalised by itself.
//!
//! Invariant: the statistics are those of the whole picture, whatever its cutting; sums are kept in `f64` relative to the
//! first pixel, as [`GroupNorm::forward`] keeps them. One picture at a time.

use candle_core::{CpuStorage, CustomOp1, D, DType, Layout, Result, Shape, Tensor, bail};
use half::bf16;

use super::block_cache::buffer;
use super::cpu::Isa;
use super::cpu::norm::{self, Groups};
use super::kernels::{fuses_on, output, values, with_type};
use super::layers::GroupNorm;

/// What has been seen of a picture.
#[derive(Debug, Clone, Default)]
pub struct GroupStatistics {
    /// Channels of the first pixel.
    origin: Vec<f32>,
    /// Per channel: sum of `x - origin`, then of its square.
    sums: Vec<f64>,
    pixels: usize,
}

/// A group norm with the statistics of one picture.
#[derive(Debug, Clone)]
pub struct MeasuredNorm {
    /// Means, then scales, per channel.
    affine: Vec<f32>,
    bias: Vec<f32>,
    silu: bool,
}

impl GroupStatistics {
    /// Adds a strip, `[1, height, width, channels]`.
    ///
    /// # Errors
    /// On another number of channels, or more than one picture.
    pub fn add(&mut self, strip: &Tensor) -> Result<()> {
        let (batch, height, width, channels) = strip.dims4()?;
        if batch != 1 || (self.pixels > 0 && channels != self.origin.len()) {
            bail!("group statistics: a strip of shape {:?}", strip.shape());
        }
        if self.pixels == 0 {
            let first = strip.narrow(1, 0, 1)?.narrow(2, 0, 1)?;
            self.origin = first.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
            self.sums = vec![0.0; 2 * channels];
        }
        let sums = if fuses_on(strip) {
            strip.apply_op1_no_bwd(&Sums(&self.origin))?
        } else {
            let origin = Tensor::new(self.origin.as_slice(), strip.device())?;
            let x = strip
                .reshape((height * width, channels))?
                .to_dtype(DType::F32)?
                .broadcast_sub(&origin)?;
            Tensor::cat(&[x.sum(0)?, x.sqr()?.sum(0)?], 0)?.to_dtype(DType::F64)?
        };
        let sums: Vec<f64> = sums.to_vec1()?;
        self.sums.iter_mut().zip(sums).for_each(|(t, s)| *t += s);
        self.pixels += height * width;
        Ok(())
    }
}

impl GroupNorm {
    /// The norm of the picture that was measured.
    ///
    /// # Errors
    /// When the picture has another number of channels.
    pub fn measured(&self, seen: &GroupStatistics) -> Result<MeasuredNorm> {
        let host = |t: &Tensor| t.to_dtype(DType::F32)?.to_vec1::<f32>();
        let (weight, bias) = (host(&self.weight)?, host(&self.bias)?);
        if seen.origin.len() != weight.len() {
            bail!(
                "group norm: {} channels, weight takes {}",
                seen.origin.len(),
                weight.len()
            );
        }
        let groups = Groups {
            batch: 1,
            pixels: seen.pixels,
            channels: weight.len(),
            count: self.groups,
            eps: self.eps,
            silu: self.silu,
        };
        let mut affine = vec![0.0; 2 * weight.len()];
        norm::affine_of_image(&seen.sums, &seen.origin, &weight, groups, &mut affine);
        Ok(MeasuredNorm {
            affine,
            bias,
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
        if channels != self.bias.len() {
            bail!(
                "group norm: {channels} channels, measured {}",
                self.bias.len()
            );
        }
        if fuses_on(strip) {
            return strip.apply_op1_no_bwd(&Apply(self));
        }
        let device = strip.device();
        let (mean, scale) = self.affine.split_at(channels);
        let y = strip
            .to_dtype(DType::F32)?
            .broadcast_sub(&Tensor::new(mean, device)?)?
            .broadcast_mul(&Tensor::new(scale, device)?)?
            .broadcast_add(&Tensor::new(self.bias.as_slice(), device)?)?;
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

struct Apply<'a>(&'a MeasuredNorm);

impl CustomOp1 for Apply<'_> {
    fn name(&self) -> &'static str {
        "group_norm_measured"
    }
    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let MeasuredNorm { affine, bias, silu } = self.0;
        with_type!(x, E => {
            let x = values::<E>(x, layout)?;
            let mut out = buffer(x.len());
            norm::apply(Isa::chosen(), x, affine, bias, *silu, &mut out);
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
