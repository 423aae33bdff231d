//! What one module makes of one weight: the delta of each type, its scale, weight decomposition and multiplier.
//!
//! Types and rules are A1111's (`extensions-builtin/Lora/network_*.py`): LoRA (Hu et al. 2021) with its convolution forms,
//! LoHa and LoKr (Yeh et al. 2023), (IA)³ (Liu et al. 2022), full differences, norms, GLoRA (Chavan et al. 2023), OFT and
//! BOFT, and DoRA (Liu et al. 2024) on top of any. The result is `W + multiplier * scale * delta`, in `f32`.

use super::algebra::{Values, kronecker, product, product_plus, tucker, zip};
use super::rotation::{Blocks, rotate};
use super::{Error, Module, Tensors};

/// How strongly a module acts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Strength {
    /// Factor of the delta.
    pub multiplier: f32,
    /// Ranks of a LoRA that count; all if `None` or 0. The scale stays that of the full rank.
    pub dyn_dim: Option<usize>,
}

/// A weight as the checkpoint has it, or rows of one, with what earlier networks added.
#[derive(Debug, Clone, Copy)]
pub(super) struct Weight<'a> {
    pub(super) values: &'a [f32],
    /// `[outputs, inputs, kernel, kernel]`, `[outputs, inputs]` or `[channels]`.
    pub(super) shape: &'a [usize],
}

impl Weight<'_> {
    fn outputs(&self) -> usize {
        self.shape.first().copied().unwrap_or(1)
    }

    fn inputs(&self) -> usize {
        self.shape.get(1).copied().unwrap_or(1)
    }

    fn taps(&self) -> usize {
        self.shape.iter().skip(2).product()
    }

    fn matrix(&self) -> Values {
        Values {
            shape: vec![self.outputs(), self.values.len() / self.outputs().max(1)],
            data: self.values.to_vec(),
        }
    }
}

/// A weight after one module.
#[derive(Debug)]
pub(super) struct Changed {
    pub(super) weight: Vec<f32>,
    /// What is added to the bias.
    pub(super) bias: Option<Vec<f32>>,
}

/// A delta before its scale; `dim` is the rank that `alpha` is divided by.
struct Delta {
    values: Values,
    dim: Option<usize>,
}

impl Delta {
    fn new(values: Values) -> Self {
        Self { values, dim: None }
    }
}

/// Applies `module` to `weight`.
pub(super) fn apply(
    tensors: Tensors<'_>,
    module: &Module,
    weight: Weight<'_>,
    strength: Strength,
) -> Result<Changed, Error> {
    let parts = Parts { tensors, module };
    let decomposed = parts.any(&["dora_scale", "lora_magnitude_vector"]);
    let changed = if parts.all(&["lora_up.weight", "lora_down.weight"])
        && !parts.any(&["lora_mid.weight", "bias"])
        && !decomposed
    {
        parts.low_rank(weight, strength)?
    } else {
        let delta = parts.delta(weight, strength)?;
        let scale = parts.scale(delta.dim)?;
        let mut values = fit(delta.values.data, weight)?;
        if let Some(bias) = parts.read("bias")? {
            let bias = fit(bias.data, weight)?;
            values.iter_mut().zip(bias).for_each(|(x, b)| *x += b);
        }
        if decomposed {
            values = parts.decompose(weight, &values, scale)?;
        } else {
            for x in &mut values {
                *x *= scale;
            }
        }
        zip(weight.values, &values, |w, d| w + strength.multiplier * d)
    };
    if changed.iter().any(|x| !x.is_finite()) {
        return Err(Error::NotFinite);
    }
    let bias = match parts.read("diff_b")? {
        Some(bias) => Some(bias),
        None => parts.read("b_norm")?,
    };
    let outputs = weight.outputs();
    if let Some(bias) = bias.as_ref().filter(|bias| bias.data.len() != outputs) {
        return Err(Error::Mismatch {
            delta: bias.shape.clone(),
            weight: outputs,
        });
    }
    let bias = bias.map(|b| b.data.iter().map(|x| x * strength.multiplier).collect());
    Ok(Changed {
        weight: changed,
        bias,
    })
}

/// Brings a delta to the weight's size: equal, or with zeros for the mask channels of an inpainting UNet's first layer.
fn fit(delta: Vec<f32>, weight: Weight<'_>) -> Result<Vec<f32>, Error> {
    if delta.len() == weight.values.len() {
        return Ok(delta);
    }
    let (outputs, taps) = (weight.outputs(), weight.taps());
    let painted = 4 * taps;
    if weight.shape.len() == 4 && weight.inputs() == 9 && delta.len() == outputs * painted {
        let mut padded = vec![0.0; weight.values.len()];
        let rows = padded.chunks_exact_mut(9 * taps);
        for (to, from) in rows.zip(delta.chunks_exact(painted)) {
            to[..painted].copy_from_slice(from);
        }
        return Ok(padded);
    }
    Err(Error::Mismatch {
        delta: vec![delta.len()],
        weight: weight.values.len(),
    })
}

/// The tensors of one module.
#[derive(Clone, Copy)]
struct Parts<'a> {
    tensors: Tensors<'a>,
    module: &'a Module,
}

impl Parts<'_> {
    fn any(&self, parts: &[&str]) -> bool {
        parts.iter().any(|part| self.module.has(part))
    }

    fn all(&self, parts: &[&str]) -> bool {
        parts.iter().all(|part| self.module.has(part))
    }

    fn read(&self, part: &str) -> Result<Option<Values>, Error> {
        self.module.read(self.tensors, part)
    }

    fn need(&self, part: &'static str) -> Result<Values, Error> {
        self.read(part)?.ok_or(Error::Incomplete { part })
    }

    /// Plain LoRA in one pass: `W + (multiplier * scale * up) down`.
    fn low_rank(&self, weight: Weight<'_>, strength: Strength) -> Result<Vec<f32>, Error> {
        let (mut up, down, dim) = self.up_down(strength.dyn_dim)?;
        let factor = strength.multiplier * self.scale(Some(dim))?;
        up.data.iter_mut().for_each(|x| *x *= factor);
        if up.rows() * down.columns() == weight.values.len() {
            return product_plus(&up, &down, Some(weight.values));
        }
        let delta = fit(product(&up, &down)?.data, weight)?;
        Ok(zip(weight.values, &delta, |w, d| w + d))
    }

    /// Both factors, cut to `dyn_dim` ranks, and the full rank.
    fn up_down(&self, dyn_dim: Option<usize>) -> Result<(Values, Values, usize), Error> {
        let (up, down) = (self.need("lora_up.weight")?, self.need("lora_down.weight")?);
        let rank = down.rows();
        Ok(
            match dyn_dim.filter(|&d| d > 0 && d < rank && up.columns() == rank) {
                Some(d) => (up.first_columns(d), down.first_rows(d), rank),
                None => (up, down, rank),
            },
        )
    }

    /// The delta by type, in A1111's order of looking for them.
    fn delta(&self, weight: Weight<'_>, strength: Strength) -> Result<Delta, Error> {
        let size = weight.values.len();
        if self.all(&["lora_up.weight", "lora_down.weight"]) {
            let (up, down, dim) = self.up_down(strength.dyn_dim)?;
            let values = match self.read("lora_mid.weight")? {
                Some(mid) => tucker(
                    &self.need("lora_up.weight")?,
                    &mid,
                    &self.need("lora_down.weight")?,
                )?,
                None => product(&up, &down)?,
            };
            return Ok(Delta {
                values,
                dim: Some(dim),
            });
        }
        if self.any(&["hada_w1_a"]) {
            return self.hadamard();
        }
        if self.any(&["weight"]) {
            return self.rescaled(weight).map(Delta::new);
        }
        if self.any(&["lokr_w1", "lokr_w1_a"]) {
            return self.kronecker(size);
        }
        if self.any(&["diff", "diff_b"]) {
            return Ok(Delta::new(self.read("diff")?.unwrap_or(Values {
                shape: weight.shape.to_vec(),
                data: vec![0.0; size],
            })));
        }
        if self.any(&["w_norm"]) {
            return self.need("w_norm").map(Delta::new);
        }
        if self.any(&["a1.weight"]) {
            return self.generalized(weight).map(Delta::new);
        }
        if self.any(&["oft_blocks", "oft_diag"]) {
            return self.rotated(weight).map(Delta::new);
        }
        Err(Error::UnknownType {
            parts: self.module.parts(),
        })
    }

    /// LoHa: the elementwise product of two low-rank matrices.
    fn hadamard(&self) -> Result<Delta, Error> {
        let half = |a, b, core| {
            let (a, b) = (self.need(a)?, self.need(b)?);
            match self.read(core)? {
                Some(core) => tucker(&a.transposed(), &core, &b),
                None => product(&a, &b),
            }
        };
        let dim = self.need("hada_w1_b")?.rows();
        let first = half("hada_w1_a", "hada_w1_b", "hada_t1")?;
        let second = half("hada_w2_a", "hada_w2_b", "hada_t2")?;
        if first.data.len() != second.data.len() {
            return Err(Error::Factors {
                left: first.shape,
                right: second.shape,
            });
        }
        let data = zip(&first.data, &second.data, |a, b| a * b);
        let values = Values {
            shape: first.shape,
            data,
        };
        Ok(Delta {
            values,
            dim: Some(dim),
        })
    }

    /// LoKr: a Kronecker product whose factors may be low-rank themselves.
    fn kronecker(&self, size: usize) -> Result<Delta, Error> {
        let mut dim = None;
        let first = match self.read("lokr_w1")? {
            Some(whole) => whole,
            None => product(&self.need("lokr_w1_a")?, &self.need("lokr_w1_b")?)?,
        };
        if let Some(b) = self.read("lokr_w1_b")? {
            dim = Some(b.rows());
        }
        let second = if let Some(whole) = self.read("lokr_w2")? {
            whole
        } else {
            let (a, b) = (self.need("lokr_w2_a")?, self.need("lokr_w2_b")?);
            match self.read("lokr_t2")? {
                Some(core) => tucker(&a.transposed(), &core, &b)?,
                None => product(&a, &b)?,
            }
        };
        if let Some(b) = self.read("lokr_w2_b")? {
            dim = Some(b.rows());
        }
        let values = kronecker(&first, &second, size)?;
        Ok(Delta { values, dim })
    }

    /// (IA)³: the weight times a factor for each input or output.
    fn rescaled(&self, weight: Weight<'_>) -> Result<Values, Error> {
        let factors = self.need("weight")?;
        let on_input = self
            .module
            .scalar(self.tensors, "on_input")?
            .is_some_and(|x| x != 0.0);
        let expected = if on_input {
            weight.inputs()
        } else {
            weight.outputs()
        };
        if factors.data.len() != expected || weight.values.is_empty() {
            return Err(Error::Mismatch {
                delta: factors.shape,
                weight: expected,
            });
        }
        let (taps, row) = (weight.taps(), weight.values.len() / weight.outputs());
        let factor = |i: usize| if on_input { i % row / taps } else { i / row };
        let data = weight
            .values
            .iter()
            .enumerate()
            .map(|(i, w)| w * factors.data[factor(i)]);
        Ok(Values {
            shape: weight.shape.to_vec(),
            data: data.collect(),
        })
    }

    /// GLoRA: `b2 b1 + (W a2) a1`.
    fn generalized(&self, weight: Weight<'_>) -> Result<Values, Error> {
        let through = product(&weight.matrix(), &self.need("a2.weight")?)?;
        let through = product(&through, &self.need("a1.weight")?)?;
        let (b2, b1) = (self.need("b2.weight")?, self.need("b1.weight")?);
        let data = product_plus(&b2, &b1, Some(&through.data))?;
        Ok(Values {
            shape: through.shape,
            data,
        })
    }

    /// OFT and BOFT: what the rotation changes.
    fn rotated(&self, weight: Weight<'_>) -> Result<Values, Error> {
        let outputs = weight.outputs();
        let (blocks, kind) = if let Some(blocks) = self.read("oft_blocks")? {
            let alpha = self.module.scalar(self.tensors, "alpha")?.unwrap_or(0.0);
            let constraint = alpha * outputs as f32;
            (blocks, Blocks::Skew { constraint })
        } else {
            (self.need("oft_diag")?, Blocks::Finished)
        };
        let mut turned = rotate(weight.values, outputs, &blocks, kind)?;
        if let Some(rescale) = self.read("rescale")? {
            if rescale.data.len() != outputs {
                return Err(Error::Mismatch {
                    delta: rescale.shape,
                    weight: outputs,
                });
            }
            let row = turned.len() / outputs;
            for (row, factor) in turned.chunks_exact_mut(row).zip(&rescale.data) {
                for x in row {
                    *x *= factor;
                }
            }
        }
        let data = zip(&turned, weight.values, |t, w| t - w);
        Ok(Values {
            shape: weight.shape.to_vec(),
            data,
        })
    }

    /// `scale` if the file has it, else `alpha / dim` if both are known, else 1.
    fn scale(&self, dim: Option<usize>) -> Result<f32, Error> {
        if self.any(&["oft_blocks", "oft_diag"]) {
            return Ok(1.0);
        }
        if let Some(scale) = self.module.scalar(self.tensors, "scale")? {
            return Ok(scale);
        }
        let alpha = self.module.scalar(self.tensors, "alpha")?;
        Ok(match (alpha, dim) {
            (Some(alpha), Some(dim)) => alpha / dim as f32,
            _ => 1.0,
        })
    }

    /// DoRA: `V = W + scale * delta` with its columns (or rows) brought to the learned lengths; returns the change of `W`.
    ///
    /// Lengths belong to inputs, over outputs and kernel, as A1111 has it; a `[outputs, 1, ...]` scale (LyCORIS'
    /// `wd_on_out`) and PEFT's magnitude vector belong to outputs.
    fn decompose(&self, weight: Weight<'_>, delta: &[f32], scale: f32) -> Result<Vec<f32>, Error> {
        let (outputs, inputs, taps) = (weight.outputs(), weight.inputs(), weight.taps());
        let (lengths, by_output) = match self.read("dora_scale")? {
            Some(lengths) => {
                let by_output = lengths.shape.len() > 1 && lengths.rows() == outputs && outputs > 1;
                (lengths, by_output)
            }
            None => (self.need("lora_magnitude_vector")?, true),
        };
        let groups = if by_output { outputs } else { inputs };
        if lengths.data.len() != groups {
            return Err(Error::Mismatch {
                delta: lengths.shape,
                weight: groups,
            });
        }
        let group = |i: usize| {
            if by_output {
                i / (inputs * taps)
            } else {
                i / taps % inputs
            }
        };
        let moved = zip(weight.values, delta, |w, d| w + scale * d);
        let mut squares = vec![0f64; groups];
        for (i, v) in moved.iter().enumerate() {
            squares[group(i)] += f64::from(*v) * f64::from(*v);
        }
        let factors: Vec<f32> = squares
            .iter()
            .zip(&lengths.data)
            .map(|(s, length)| {
                if *s > 0.0 {
                    length / s.sqrt() as f32
                } else {
                    0.0
                }
            })
            .collect();
        let change = moved.iter().enumerate().zip(weight.values);
        Ok(change
            .map(|((i, v), w)| v * factors[group(i)] - w)
            .collect())
    }
}
