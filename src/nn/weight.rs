//! A weight matrix with its bias, in the form its device computes with.
//!
//! Invariant: its place in memory is chosen once. Rows are written where they lie, so that whoever recorded the addresses (a
//! captured CUDA graph) sees the new values.

use std::borrow::Cow;

use candle_core::{Result, Tensor, WithDType};

use super::cpu::Isa;
use super::cpu::packed::{Columns, Layout, Packed};
use super::fp8::Scaled;
use super::layers::Placement;
use super::stored::{Arrangement, Stored, lay};

/// A weight `[outputs, inputs]` and what is added to the product.
#[derive(Debug, Clone)]
pub(super) enum Weight {
    /// On the CPU, in f32 or bf16; the bias in f32.
    Packed {
        weight: Packed,
        bias: Option<Vec<f32>>,
    },
    /// Elsewhere: `[outputs, inputs]`, rows in `order`. A convolution's inputs go tap by tap, `[outputs, kernel, kernel, channels]`.
    Tensors {
        weight: Tensor,
        bias: Option<Tensor>,
        order: RowOrder,
        /// Channels of a tap; all inputs of a linear layer.
        run: usize,
    },
    /// In e4m3.
    Scaled(Box<Scaled>),
}

/// Where a checkpoint's rows lie in a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RowOrder {
    /// As they are stored.
    Plain,
    /// Value 0, gate 0, value 1, gate 1, …, of a checkpoint that stores all values, then all gates: one thread of a kernel then has
    /// both factors of a gated output.
    Pairs,
}

impl Weight {
    /// From the rows of `parts`, `[outputs, inputs]` together, as a checkpoint stores them; `run` of the inputs lie side by side in
    /// the other operand.
    pub(super) fn new(
        place: &Placement,
        parts: &[Stored<'_>],
        outputs: usize,
        bias: Option<&[f32]>,
        (columns, run): (Columns, usize),
    ) -> Result<Self> {
        let inputs = parts.iter().map(Stored::len).sum::<usize>() / outputs.max(1);
        let whole = |part: &Stored<'_>| inputs > 0 && part.len().is_multiple_of(inputs);
        if !parts.iter().all(whole) || !inputs.is_multiple_of(run.max(1)) {
            candle_core::bail!("a weight of {outputs} rows: a row is not whole");
        }
        if place.is_fused() {
            let layout = Layout {
                precision: place.precision(),
                columns,
                run,
            };
            return Ok(Self::Packed {
                weight: packed(parts, [outputs, inputs], layout),
                bias: bias.map(<[f32]>::to_vec),
            });
        }
        let order = match columns {
            Columns::Geglu => RowOrder::Pairs,
            Columns::Plain => RowOrder::Plain,
        };
        let weight = Arrangement {
            parts,
            rows: outputs,
            inputs,
            order,
            run,
        };
        let bias = match bias {
            Some(bias) => {
                let bias = Arrangement {
                    parts: &[bias.into()],
                    inputs: 1,
                    run: 1,
                    ..weight
                };
                Some(bias.tensor(place)?.flatten_all()?)
            }
            // A LoRA may bring one, and then it must not be a new tensor; see the invariant.
            None if place.device.is_cuda() => {
                Some(Tensor::zeros(outputs, place.dtype, &place.device)?)
            }
            None => None,
        };
        Ok(Self::Tensors {
            weight: weight.tensor(place)?,
            bias,
            order,
            run,
        })
    }

    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Packed { weight, .. } => weight.bytes(),
            Self::Tensors { weight, .. } => weight.elem_count() * weight.dtype().size_in_bytes(),
            Self::Scaled(weight) => weight.bytes(),
        }
    }

    /// Rows as for [`Self::new`].
    pub(super) fn write(&mut self, first_row: usize, values: &[f32]) -> Result<()> {
        match self {
            Self::Packed { weight, .. } => {
                check(first_row, values.len(), weight.rows(), weight.inputs())?;
                weight.replace_rows(first_row, values.into());
                Ok(())
            }
            Self::Tensors {
                weight, order, run, ..
            } => {
                let (rows, inputs) = weight.dims2()?;
                check(first_row, values.len(), rows, inputs)?;
                let values = arranged(values, inputs, *run);
                overwrite(weight, *order, first_row, &values)
            }
            Self::Scaled(weight) => weight.write(first_row, values),
        }
    }

    pub(super) fn write_bias(&mut self, first_row: usize, values: &[f32]) -> Result<()> {
        match self {
            Self::Packed { weight, bias } => {
                check(first_row, values.len(), weight.rows(), 1)?;
                let bias = bias.get_or_insert_with(|| vec![0.0; weight.rows()]);
                bias[first_row..first_row + values.len()].copy_from_slice(values);
                Ok(())
            }
            Self::Tensors {
                weight,
                bias,
                order,
                ..
            } => {
                if bias.is_none() {
                    let rows = weight.dim(0)?;
                    *bias = Some(Tensor::zeros(rows, weight.dtype(), weight.device())?);
                }
                match bias {
                    Some(bias) => overwrite(bias, *order, first_row, values),
                    None => Ok(()),
                }
            }
            Self::Scaled(weight) => weight.write_bias(first_row, values),
        }
    }

    pub(super) fn remove_bias(&mut self) {
        match self {
            Self::Packed { bias, .. } => *bias = None,
            Self::Tensors { bias, .. } => match bias {
                Some(kept) if kept.device().is_cuda() => {
                    // Zeros in the same place; see the invariant.
                    if kept
                        .zeros_like()
                        .and_then(|zeros| kept.slice_set(&zeros, 0, 0))
                        .is_err()
                    {
                        *bias = None;
                    }
                }
                _ => *bias = None,
            },
            Self::Scaled(weight) => weight.remove_bias(),
        }
    }

    #[cfg(test)]
    pub(super) fn stored(&self) -> Vec<f32> {
        match self {
            Self::Packed { weight, bias } => {
                let bias = bias.as_deref().unwrap_or_default();
                [weight.stored(), bias.to_vec()].concat()
            }
            Self::Tensors { weight, bias, .. } => [Some(weight), bias.as_ref()]
                .into_iter()
                .flatten()
                .flat_map(values)
                .collect(),
            Self::Scaled(weight) => weight.stored(),
        }
    }
}

#[cfg(test)]
pub(super) fn values(t: &Tensor) -> Vec<f32> {
    let t = t
        .to_dtype(candle_core::DType::F32)
        .and_then(|t| t.flatten_all());
    t.and_then(|t| t.to_vec1()).expect("a tensor on the host")
}

/// Whether `len` values are whole rows of `row`, from `first_row` on, of `rows`.
pub(super) fn check(first_row: usize, len: usize, rows: usize, row: usize) -> Result<()> {
    if row == 0 || !len.is_multiple_of(row) || first_row + len / row > rows {
        candle_core::bail!("{len} values from row {first_row} on do not fit {rows} rows of {row}");
    }
    Ok(())
}

/// The rows of `parts`, one below the other.
fn packed(parts: &[Stored<'_>], [outputs, inputs]: [usize; 2], layout: Layout) -> Packed {
    let mut weight = Packed::zeros(Isa::chosen(), [outputs, inputs], layout);
    let mut row = 0;
    for part in parts {
        weight.replace_rows(row, *part);
        row += part.len() / inputs;
    }
    weight
}

/// Rows of `len` values, channel by channel, as rows tap by tap.
fn arranged(values: &[f32], len: usize, run: usize) -> Cow<'_, [f32]> {
    if run == len {
        return Cow::Borrowed(values);
    }
    let mut out = vec![0.0; values.len()];
    let rows = values.chunks_exact(len.max(1));
    for (out, row) in out.chunks_exact_mut(len.max(1)).zip(rows) {
        lay(row, run, out);
    }
    Cow::Owned(out)
}

/// Writes rows of a tensor in place, `first_row` and `values` counting as a checkpoint does.
pub(super) fn overwrite<T: WithDType>(
    tensor: &Tensor,
    order: RowOrder,
    first_row: usize,
    values: &[T],
) -> Result<()> {
    let rows = tensor.dim(0)?;
    let row = tensor.elem_count() / rows.max(1);
    check(first_row, values.len(), rows, row)?;
    let source = |values: &[T], shape: &[usize]| {
        Tensor::from_slice(values, shape, tensor.device())?.to_dtype(tensor.dtype())
    };
    if order == RowOrder::Plain {
        let shape = [values.len() / row, row];
        return tensor
            .reshape((rows, row))?
            .slice_set(&source(values, &shape)?, 0, first_row);
    }
    let half = rows / 2;
    let pairs = tensor.reshape((half, 2, row))?;
    let last_row = first_row + values.len() / row;
    for (part, begin) in [0, half].into_iter().enumerate() {
        // The rows that fall among the values, then among the gates.
        let (from, to) = (first_row.max(begin), last_row.min(begin + half));
        if from < to {
            let rows = &values[(from - first_row) * row..(to - first_row) * row];
            let source = source(rows, &[to - from, 1, row])?;
            pairs
                .narrow(0, from - begin, to - from)?
                .slice_set(&source, 1, part)?;
        }
    }
    Ok(())
}
