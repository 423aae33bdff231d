//! Weights as a file has them, on their way into a layer.
//!
//! Invariants: values are finite (whoever reads a file checks that), so a conversion need not know NaN; rows are the checkpoint's, and
//! [`Arrangement`] alone decides where they come to lie in a tensor.

use candle_core::{DType, Result, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;

use super::cuda;
use super::layers::Placement;
use super::weight::RowOrder;

/// Values in the type they are stored in.
#[derive(Debug, Clone, Copy)]
pub enum Stored<'a> {
    /// 32-bit float.
    F32(&'a [f32]),
    /// 16-bit float.
    F16(&'a [f16]),
    /// Brain float.
    Bf16(&'a [bf16]),
}

/// `$body` with `$slice` standing for the values.
macro_rules! with_stored {
    ($stored:expr, $slice:ident => $body:expr) => {
        match $stored {
            $crate::nn::stored::Stored::F32($slice) => $body,
            $crate::nn::stored::Stored::F16($slice) => $body,
            $crate::nn::stored::Stored::Bf16($slice) => $body,
        }
    };
}
pub(super) use with_stored;

impl Stored<'_> {
    /// Number of values.
    #[must_use]
    pub fn len(&self) -> usize {
        with_stored!(self, values => values.len())
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<'a> From<&'a [f32]> for Stored<'a> {
    fn from(values: &'a [f32]) -> Self {
        Self::F32(values)
    }
}

/// All values of `pieces`, one after the other.
pub(super) fn widened(pieces: &[Stored<'_>]) -> Vec<f32> {
    let mut out = Vec::with_capacity(pieces.iter().map(Stored::len).sum());
    for piece in pieces {
        with_stored!(piece, values => out.extend(values.iter().map(|x| x.widened())));
    }
    out
}

/// A type of stored weights, and of tensors of them.
pub(super) trait Value: Copy + Default + Send + Sync + 'static {
    fn widened(self) -> f32;
    fn nearest(x: f32) -> Self;
    /// The very values, if they are of this type.
    fn same<'a>(stored: &Stored<'a>) -> Option<&'a [Self]>;
}

/// A piece of a tensor that is being written.
#[cfg_attr(
    not(feature = "cuda"),
    allow(dead_code, reason = "only devices take pieces")
)]
pub(super) enum Piece<'a> {
    F32(&'a mut [f32]),
    F16(&'a mut [f16]),
    Bf16(&'a mut [bf16]),
}

impl Value for f32 {
    fn widened(self) -> f32 {
        self
    }
    fn nearest(x: f32) -> Self {
        x
    }
    fn same<'a>(stored: &Stored<'a>) -> Option<&'a [Self]> {
        match stored {
            Stored::F32(values) => Some(values),
            _ => None,
        }
    }
}

impl Value for f16 {
    /// By bits, since asking for the processor's instruction at each value would cost more than the conversion.
    #[inline(always)]
    fn widened(self) -> f32 {
        let bits = u32::from(self.to_bits());
        let magnitude = bits & 0x7fff;
        let size = if magnitude < 0x400 {
            // Below the smallest normal number the bits count steps of 2^-24.
            (magnitude as f32 * f32::from_bits((127 - 24) << 23)).to_bits()
        } else {
            (magnitude << 13) + ((127 - 15) << 23)
        };
        f32::from_bits(size | (bits & 0x8000) << 16)
    }
    fn nearest(x: f32) -> Self {
        Self::from_f32(x)
    }
    fn same<'a>(stored: &Stored<'a>) -> Option<&'a [Self]> {
        match stored {
            Stored::F16(values) => Some(values),
            _ => None,
        }
    }
}

impl Value for bf16 {
    #[inline(always)]
    fn widened(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    fn nearest(x: f32) -> Self {
        Self::from_f32(x)
    }
    fn same<'a>(stored: &Stored<'a>) -> Option<&'a [Self]> {
        match stored {
            Stored::Bf16(values) => Some(values),
            _ => None,
        }
    }
}

/// Rows of a checkpoint as they will lie in a tensor `[rows, inputs]`.
#[derive(Clone, Copy)]
pub(super) struct Arrangement<'a> {
    /// Whole rows each, one below the other.
    pub(super) parts: &'a [Stored<'a>],
    pub(super) rows: usize,
    pub(super) inputs: usize,
    pub(super) order: RowOrder,
    /// Channels of a tap, stored channel by channel and laid tap by tap; all inputs of a linear layer.
    pub(super) run: usize,
}

/// Values that a thread arranges at a time.
const TASK: usize = 1 << 16;

impl Arrangement<'_> {
    pub(super) fn tensor(self, place: &Placement) -> Result<Tensor> {
        let shape = [self.rows, self.inputs];
        let fill = |first, piece: Piece<'_>| match piece {
            Piece::F32(out) => self.write(first, out),
            Piece::F16(out) => self.write(first, out),
            Piece::Bf16(out) => self.write(first, out),
        };
        if let Some(tensor) = cuda::upload(place, shape, &fill) {
            return tensor;
        }
        let len = self.rows * self.inputs;
        match place.dtype {
            DType::F16 => Tensor::from_vec(self.whole::<f16>(len), &shape, &place.device),
            DType::BF16 => Tensor::from_vec(self.whole::<bf16>(len), &shape, &place.device),
            dtype => {
                Tensor::from_vec(self.whole::<f32>(len), &shape, &place.device)?.to_dtype(dtype)
            }
        }
    }

    fn whole<T: Value>(self, len: usize) -> Vec<T> {
        let mut out = vec![T::default(); len];
        self.write(0, &mut out);
        out
    }

    /// The tensor's rows from `first` on, as many as `out` holds.
    fn write<T: Value>(self, first: usize, out: &mut [T]) {
        let inputs = self.inputs.max(1);
        let rows = (TASK / inputs).max(1);
        out.par_chunks_mut(rows * inputs)
            .enumerate()
            .for_each(|(task, out)| {
                for (i, out) in out.chunks_exact_mut(inputs).enumerate() {
                    self.row(first + task * rows + i, out);
                }
            });
    }

    /// One row of the tensor.
    fn row<T: Value>(self, row: usize, out: &mut [T]) {
        let mut from = self.inputs
            * match self.order {
                RowOrder::Plain => row,
                RowOrder::Pairs => row / 2 + row % 2 * (self.rows / 2),
            };
        for part in self.parts {
            if from < part.len() {
                let to = from + self.inputs;
                if let (Some(same), true) = (T::same(part), self.run == self.inputs) {
                    out.copy_from_slice(&same[from..to]);
                } else {
                    with_stored!(part, values => lay(&values[from..to], self.run, out));
                }
                return;
            }
            from -= part.len();
        }
    }
}

/// A stored row, channel by channel, tap by tap.
pub(super) fn lay<V: Value, T: Value>(row: &[V], run: usize, out: &mut [T]) {
    let taps = row.len() / run.max(1);
    for (tap, out) in out.chunks_exact_mut(run.max(1)).enumerate() {
        for (out, value) in out.iter_mut().zip(row[tap..].iter().step_by(taps)) {
            *out = T::nearest(value.widened());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_finite_half_widens_to_its_value() {
        for bits in 0..=u16::MAX {
            let half = f16::from_bits(bits);
            if half.is_finite() {
                assert_eq!(
                    half.widened().to_bits(),
                    half.to_f32().to_bits(),
                    "{bits:#x}"
                );
            }
        }
    }

    #[test]
    fn rows_of_several_types_are_paired_and_their_taps_ordered() {
        // Four rows of two channels by three taps, row r holding r * 10 + 0..6; values first, gates behind.
        let rows = [0, 1, 2, 3].map(|r| (0..6).map(|i| (r * 10 + i) as f32).collect::<Vec<_>>());
        let half: Vec<f16> = [&rows[1][..], &rows[2]]
            .concat()
            .iter()
            .map(|x| f16::from_f32(*x))
            .collect();
        let brain: Vec<bf16> = rows[3].iter().map(|x| bf16::from_f32(*x)).collect();
        let parts = [
            Stored::F32(&rows[0]),
            Stored::F16(&half),
            Stored::Bf16(&brain),
        ];
        let arranged = |order, run| {
            let arrangement = Arrangement {
                parts: &parts,
                rows: 4,
                inputs: 6,
                order,
                run,
            };
            arrangement
                .whole::<bf16>(24)
                .iter()
                .map(|x| x.to_f32())
                .collect::<Vec<f32>>()
        };
        let plain = rows.concat();
        assert_eq!(arranged(RowOrder::Plain, 6), plain);
        let paired = arranged(RowOrder::Pairs, 6);
        assert_eq!(
            paired,
            [&plain[..6], &plain[12..18], &plain[6..12], &plain[18..]].concat()
        );
        let taps = arranged(RowOrder::Plain, 2);
        assert_eq!(taps[6..12], [10.0, 13.0, 11.0, 14.0, 12.0, 15.0]);
    }
}
