//! Linear layers in e4m3: a weight has a scale per output, activations get one per token on the way in, sums are f32.
//!
//! On the CPU the product is of bf16 (or f32) that hold the very values of e4m3, so it is the arithmetic of a card that multiplies
//! e4m3; it saves no memory there. On a card weights are bytes. Invariant: as [`super::weight`]: rows are written where they
//! lie, and a row's own values leave it as it was, bit by bit.

use candle_core::{DType, Result, Tensor, bail};

use super::cpu::Isa;
use super::cpu::math::Activation;
use super::cpu::packed::{Columns, Layout as PackedLayout, Packed};
use super::layers::{LayerNorm, Linear, Placement, Then};
use super::stored::{Stored, widened};
use super::weight::{RowOrder, Weight, check, overwrite};
use super::{cuda, e4m3, kernels};

/// How linear layers over tokens store their weights. All else has the type of the activations.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Storage {
    /// In the type of the activations.
    #[default]
    Wide,
    /// In e4m3 with a scale per output; activations are rounded to e4m3 too, with a scale per token.
    E4m3,
}

impl Placement {
    /// Bytes of a weight's value in linear layers over tokens.
    #[must_use]
    pub fn bytes_over_tokens(&self) -> usize {
        match self.storage {
            // The CPU keeps values of e4m3 in the type it multiplies.
            Storage::E4m3 if !self.device.is_cpu() => 1,
            Storage::E4m3 | Storage::Wide => self.dtype.size_in_bytes(),
        }
    }
}

/// A weight `[outputs, inputs]` in e4m3, its scales, and what is added to the product.
#[derive(Debug, Clone)]
pub(super) enum Scaled {
    /// On the CPU: values that e4m3 has, in the type of the activations.
    Packed {
        weight: Packed,
        scales: Vec<f32>,
        bias: Option<Vec<f32>>,
    },
    /// On a card.
    Tensors(Codes),
}

/// A weight on a card.
#[derive(Debug, Clone)]
pub(super) struct Codes {
    /// `[outputs, inputs]`, a byte a value.
    pub(super) weight: Tensor,
    /// `[outputs]`, f32.
    pub(super) scales: Tensor,
    /// `[outputs]`, of the activations' type; zeros where the layer has none, since a LoRA may bring one and then it must not be a
    /// new tensor.
    pub(super) bias: Option<Tensor>,
    pub(super) order: RowOrder,
}

impl Scaled {
    fn new(
        place: &Placement,
        rows: &[f32],
        outputs: usize,
        bias: Option<&[f32]>,
        columns: Columns,
    ) -> Result<Self> {
        let (inputs, device) = (rows.len() / outputs.max(1), &place.device);
        check(0, rows.len(), outputs, inputs)?;
        if place.is_fused() {
            let (rows, scales) = e4m3::quantised(rows, inputs);
            let layout = PackedLayout {
                precision: place.precision(),
                columns,
                run: inputs,
            };
            return Ok(Self::Packed {
                weight: Packed::new(Isa::chosen(), &rows, outputs, layout),
                scales,
                bias: bias.map(<[f32]>::to_vec),
            });
        }
        let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, device);
        let mut codes = Codes {
            weight: zeros(&[outputs, inputs], DType::U8)?,
            scales: zeros(&[outputs], DType::F32)?,
            bias: Some(zeros(&[outputs], place.dtype)?),
            order: match columns {
                Columns::Geglu => RowOrder::Pairs,
                Columns::Plain => RowOrder::Plain,
            },
        };
        codes.write(0, rows)?;
        let mut made = Self::Tensors(codes);
        if let Some(bias) = bias {
            made.write_bias(0, bias)?;
        }
        Ok(made)
    }

    /// Of weight and scales.
    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Packed { weight, scales, .. } => weight.bytes() + size_of_val(scales.as_slice()),
            Self::Tensors(codes) => {
                codes.weight.elem_count() + codes.scales.elem_count() * size_of::<f32>()
            }
        }
    }

    pub(super) fn write(&mut self, first_row: usize, rows: &[f32]) -> Result<()> {
        match self {
            Self::Packed { weight, scales, .. } => {
                check(first_row, rows.len(), weight.rows(), weight.inputs())?;
                let (rows, of_rows) = e4m3::quantised(rows, weight.inputs());
                weight.replace_rows(first_row, rows.as_slice().into());
                scales[first_row..first_row + of_rows.len()].copy_from_slice(&of_rows);
                Ok(())
            }
            Self::Tensors(codes) => codes.write(first_row, rows),
        }
    }

    pub(super) fn write_bias(&mut self, first_row: usize, values: &[f32]) -> Result<()> {
        match self {
            Self::Packed { weight, bias, .. } => {
                check(first_row, values.len(), weight.rows(), 1)?;
                let bias = bias.get_or_insert_with(|| vec![0.0; weight.rows()]);
                bias[first_row..first_row + values.len()].copy_from_slice(values);
                Ok(())
            }
            Self::Tensors(Codes { bias, order, .. }) => match bias {
                Some(bias) => overwrite(bias, *order, first_row, values),
                None => bail!("the bias was lost when it could not be cleared"),
            },
        }
    }

    pub(super) fn remove_bias(&mut self) {
        match self {
            Self::Packed { bias, .. } => *bias = None,
            Self::Tensors(Codes { bias, .. }) => {
                // Zeros in the same place.
                let clear = |bias: &Tensor| bias.slice_set(&bias.zeros_like()?, 0, 0);
                if bias.as_ref().is_some_and(|bias| clear(bias).is_err()) {
                    *bias = None;
                }
            }
        }
    }

    #[cfg(test)]
    pub(super) fn stored(&self) -> Vec<f32> {
        use super::weight::values;
        match self {
            Self::Packed {
                weight,
                scales,
                bias,
            } => {
                let bias = bias.clone().unwrap_or_default();
                [weight.stored(), scales.clone(), bias].concat()
            }
            Self::Tensors(codes) => {
                let bias = codes.bias.as_ref().map(values).unwrap_or_default();
                [values(&codes.weight), values(&codes.scales), bias].concat()
            }
        }
    }

    /// `norm` (if any) of `x`, the product, what follows it, plus `residual`.
    pub(super) fn forward(
        &self,
        x: &Tensor,
        norm: Option<&LayerNorm>,
        then: Then,
        residual: Option<&Tensor>,
    ) -> Result<Tensor> {
        match self {
            Self::Packed {
                weight,
                scales,
                bias,
            } => {
                let op = kernels::Linear {
                    weight,
                    scales: Some(scales),
                    bias: bias.as_deref(),
                    activation: match then {
                        Then::Activate(activation) => activation,
                        Then::Geglu => Activation::None,
                    },
                };
                let normed = norm.map(|norm| norm.forward(x)).transpose()?;
                let x = normed.as_ref().unwrap_or(x);
                match residual {
                    Some(residual) => x.apply_op2_no_bwd(residual, &op),
                    None => x.apply_op1_no_bwd(&op),
                }
            }
            Self::Tensors(codes) => {
                let Some(y) = cuda::linear_e4m3(x, norm, codes, then, residual) else {
                    bail!(
                        "e4m3 weights on {:?} for activations of {:?}: neither a card nor the CPU's f32 or bf16",
                        x.device().location(),
                        x.dtype()
                    )
                };
                y
            }
        }
    }
}

impl Codes {
    fn write(&mut self, first_row: usize, rows: &[f32]) -> Result<()> {
        let (outputs, inputs) = self.weight.dims2()?;
        check(first_row, rows.len(), outputs, inputs)?;
        let (values, scales) = e4m3::quantised(rows, inputs);
        overwrite(&self.weight, self.order, first_row, &e4m3::codes(&values))?;
        overwrite(&self.scales, self.order, first_row, &scales)
    }
}

impl Linear {
    /// As [`Self::stacked`] with the weight in e4m3.
    ///
    /// # Errors
    /// When the device refuses the tensors.
    pub fn e4m3(
        place: &Placement,
        pieces: &[Stored<'_>],
        outputs: usize,
        bias: Option<&[f32]>,
        then: Then,
    ) -> Result<Self> {
        let weight = Scaled::new(place, &widened(pieces), outputs, bias, then.columns())?;
        Ok(Self {
            weight: Weight::Scaled(Box::new(weight)),
            then,
            origins: Vec::new(),
        })
    }

    /// [`Self::forward`] of `norm`'s output, which a card rounds to e4m3 in the same pass where the weight is in e4m3.
    ///
    /// # Errors
    /// On a shape that does not fit.
    pub fn forward_normed(&self, x: &Tensor, norm: &LayerNorm) -> Result<Tensor> {
        match &self.weight {
            Weight::Scaled(weight) => weight.forward(x, Some(norm), self.then, None),
            _ => self.forward(&norm.forward(x)?),
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn wave(len: usize, seed: usize, size: f32) -> Vec<f32> {
        let phase = |i: usize| ((i * 7 + seed * 13) as f32 * 0.37).sin();
        (0..len)
            .map(|i| phase(i) * phase(i * i + seed) * size)
            .collect()
    }

    /// `rows` as they come back from e4m3, in `f64`.
    fn through_e4m3(rows: &[f32], inputs: usize) -> Vec<f64> {
        let (values, scales) = e4m3::quantised(rows, inputs);
        let scale = |i: usize| f64::from(scales[i / inputs]);
        let values = values.iter().enumerate();
        values.map(|(i, v)| f64::from(*v) * scale(i)).collect()
    }

    fn gelu(x: f64) -> f64 {
        0.5 * x * (1.0 + candle_core::cpu::erf::erf_f64(x / 2f64.sqrt()))
    }

    /// The largest difference between a layer and its formula in `f64`, relative to the largest value.
    fn worst(dtype: DType, [m, n, k]: [usize; 3], then: Then, residual: bool) -> f64 {
        let place = Placement::new(Device::Cpu, dtype);
        let (x, weight) = (wave(m * k, 1, 3.0), wave(n * k, 2, 0.1));
        let tensor = |values: &[f32], last: usize| {
            let tensor = Tensor::from_slice(values, (m, last), &Device::Cpu).unwrap();
            tensor.to_dtype(dtype).unwrap()
        };
        // What the type keeps is what both sides see.
        let (kept, bias) = (tensor(&x, k), wave(n, 3, 0.5));
        let x: Vec<f32> = super::super::weight::values(&kept);
        let outputs = if then == Then::Geglu { n / 2 } else { n };
        let added = tensor(&wave(m * outputs, 4, 1.0), outputs);
        let layer =
            Linear::e4m3(&place, &[weight.as_slice().into()], n, Some(&bias), then).unwrap();
        let got = if residual {
            layer.forward_add(&kept, &added)
        } else {
            layer.forward(&kept)
        };
        let got = super::super::weight::values(&got.unwrap());
        let added = super::super::weight::values(&added);

        let (x, weight) = (through_e4m3(&x, k), through_e4m3(&weight, k));
        let sum = |row: usize, column: usize| {
            let (x, w) = (&x[row * k..][..k], &weight[column * k..][..k]);
            x.iter().zip(w).map(|(x, w)| x * w).sum::<f64>() + f64::from(bias[column])
        };
        let want = |i: usize| {
            let (row, column) = (i / outputs, i % outputs);
            let y = match then {
                Then::Geglu => sum(row, column) * gelu(sum(row, n / 2 + column)),
                Then::Activate(_) => sum(row, column),
            };
            y + if residual { f64::from(added[i]) } else { 0.0 }
        };
        let want: Vec<f64> = (0..m * outputs).map(want).collect();
        let largest = want.iter().fold(0f64, |most, v| most.max(v.abs()));
        let apart = want
            .iter()
            .zip(&got)
            .map(|(w, g)| (w - f64::from(*g)).abs());
        apart.fold(0f64, f64::max) / largest
    }

    #[test]
    fn a_layer_is_its_formula_over_rounded_operands() {
        let plain = Then::Activate(Activation::None);
        // f32: sums of 300 products in another order, 2^-24 each. bf16: one rounding of the result, 2^-9.
        for (dtype, most) in [(DType::F32, 2e-6), (DType::BF16, 4e-3)] {
            for shape in [[7, 48, 64], [33, 70, 300], [1, 2, 5]] {
                for then in [plain, Then::Geglu] {
                    for residual in [false, true] {
                        let worst = worst(dtype, shape, then, residual);
                        assert!(worst < most, "{dtype:?} {shape:?} {then:?}: {worst}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_normed_product_is_norm_and_product() {
        let place = Placement::new(Device::Cpu, DType::F8E4M3);
        let then = Then::Activate(Activation::None);
        let norm = LayerNorm::new(&place, &wave(64, 1, 2.0), &wave(64, 2, 1.0)).unwrap();
        let layer = Linear::e4m3(
            &place,
            &[wave(24 * 64, 3, 0.1).as_slice().into()],
            24,
            None,
            then,
        )
        .unwrap();
        let x = Tensor::from_vec(wave(5 * 64, 4, 3.0), (1, 5, 64), &Device::Cpu);
        let x = x.unwrap().to_dtype(DType::BF16).unwrap();
        let values = |t: Result<Tensor>| super::super::weight::values(&t.unwrap());
        let want = values(layer.forward(&norm.forward(&x).unwrap()));
        assert_eq!(values(layer.forward_normed(&x, &norm)), want);
        assert!(
            layer
                .forward(&x.narrow(2, 0, 32).unwrap().contiguous().unwrap())
                .is_err()
        );
    }

    /// Bytes and scales as a card keeps them, whose product is elsewhere; here they lie in the host's memory.
    #[test]
    fn a_card_gets_a_byte_a_value_and_pairs_of_rows() {
        let place = Placement {
            dtype: DType::F16,
            ..Placement::cpu()
        };
        let rows = [448.0, 1.0, -896.0, 2.0, 0.0, 0.0, 224.0, 0.25];
        let layer = Linear::e4m3(&place, &[rows.as_slice().into()], 4, None, Then::Geglu).unwrap();
        assert_eq!(layer.bytes(), 8 + 4 * 4);
        let codes = [0x7e, 0x38, 0x00, 0x00, 0xfe, 0x38, 0x7e, 0x30u8].map(f32::from);
        let stored = layer.weight.stored();
        assert_eq!(stored[..8], codes, "value 0, gate 0, value 1, gate 1");
        assert_eq!(stored[8..12], [1.0, 1.0, 2.0, 0.5]);
        let x = Tensor::zeros((1, 2), DType::F16, &Device::Cpu).unwrap();
        assert!(layer.forward(&x).is_err(), "no body for this type");
    }
}
