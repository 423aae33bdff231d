//! Weights in the order in which the micro-kernel of [`super::gemm`] reads them: `[panel][k / GROUP][NR][GROUP]`,
//! `NR = NV * LANES`. `GROUP` is 1 for `f32` and 2 for `bf16`, whose factors lie in pairs.
//!
//! Factors come in runs that the other operand holds side by side (the channels of a tap, or all of a row); each run is filled up
//! with zeros to whole groups. Invariant: what lies where depends on shape, columns, type and instruction set alone, so rows can
//! be written again in place.

use rayon::prelude::*;

use half::bf16;

use super::Isa;
use super::element::{Element, Values};
use super::gemm::NV;
use crate::nn::stored::{Stored, Value, with_stored};

/// `k` values packed at a time: 128 lines of an `f32` panel are 16 KiB.
const PACK_BLOCK: usize = 128;

/// How output columns are laid over panels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Columns {
    /// Column `c` of panel `p` is output `p * NR + c`.
    Plain,
    /// The first vector of a panel holds values, the second their gates: `[value; gate]` rows become `n / 2` outputs
    /// `value * gelu(gate)`.
    Geglu,
}

/// The type of weights and activations; sums are `f32` in both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// 32-bit float.
    F32,
    /// Brain float.
    Bf16,
}

/// What decides how a matrix is laid out.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Layout {
    pub(crate) precision: Precision,
    pub(crate) columns: Columns,
    /// Factors that lie side by side in the other operand: the channels of a tap. A stored row has them channel by channel, each with
    /// all its taps; a packed one tap by tap.
    pub(crate) run: usize,
}

/// A weight matrix `[n, k]` packed for the micro-kernel of one instruction set.
#[derive(Debug, Clone)]
pub(crate) struct Packed {
    pub(super) data: Values,
    pub(super) n: usize,
    k: usize,
    pub(super) run: usize,
    pub(super) columns: Columns,
    pub(super) isa: Isa,
}

impl Packed {
    /// Packs `rows` (`[n, k]`, row major).
    pub(crate) fn new(isa: Isa, rows: &[f32], n: usize, layout: Layout) -> Self {
        let k = rows.len().checked_div(n).unwrap_or(0);
        let mut packed = Self::zeros(isa, [n, k], layout);
        packed.replace_rows(0, rows.into());
        packed
    }

    /// Rows that are yet to be written.
    pub(crate) fn zeros(isa: Isa, [n, k]: [usize; 2], layout: Layout) -> Self {
        let lanes = isa.lanes();
        let nr = NV * lanes;
        let panels = match layout.columns {
            Columns::Plain => n.div_ceil(nr),
            Columns::Geglu => (n / 2).div_ceil(lanes),
        };
        let run = layout.run.max(1);
        assert!(k.is_multiple_of(run), "packed: runs of {run} in {k}");
        let len = |group: usize| panels * nr * (k / run * run.next_multiple_of(group));
        let data = match layout.precision {
            Precision::F32 => Values::F32(vec![0.0; len(f32::GROUP)]),
            Precision::Bf16 => Values::Bf16(vec![bf16::ZERO; len(bf16::GROUP)]),
        };
        Self {
            data,
            n,
            k,
            run,
            columns: layout.columns,
            isa,
        }
    }

    /// Packs `rows` (`[count, k]`, row major) over the weight's rows from `first`.
    pub(crate) fn replace_rows(&mut self, first: usize, rows: Stored<'_>) {
        let place = Place {
            n: self.n,
            k: self.k,
            run: self.run,
            columns: self.columns,
            lanes: self.isa.lanes(),
        };
        assert!(
            rows.len() <= self.n.saturating_sub(first) * self.k,
            "packed: {} values from row {first} on",
            rows.len()
        );
        match &mut self.data {
            Values::F32(data) => with_stored!(rows, rows => place.write(data, first, rows)),
            Values::Bf16(data) => with_stored!(rows, rows => place.write(data, first, rows)),
        }
    }

    /// The packed values as they lie in memory.
    #[cfg(test)]
    pub(crate) fn stored(&self) -> Vec<f32> {
        match &self.data {
            Values::F32(data) => data.clone(),
            Values::Bf16(data) => data.iter().map(|x| x.to_f32()).collect(),
        }
    }

    /// Columns of the product.
    pub(crate) fn outputs(&self) -> usize {
        match self.columns {
            Columns::Plain => self.n,
            Columns::Geglu => self.n / 2,
        }
    }

    /// Rows of the weight: twice the columns of a gated product.
    pub(crate) fn rows(&self) -> usize {
        self.n
    }

    /// Factors of each sum.
    pub(crate) fn inputs(&self) -> usize {
        self.k
    }

    /// Factors of each sum as they are stored, runs filled up to whole groups of `group`.
    pub(super) fn padded_inputs(&self, group: usize) -> usize {
        self.k / self.run * self.run.next_multiple_of(group)
    }

    /// Bytes held.
    pub(crate) fn bytes(&self) -> usize {
        match &self.data {
            Values::F32(data) => size_of_val(data.as_slice()),
            Values::Bf16(data) => size_of_val(data.as_slice()),
        }
    }
}

/// Where the values of a matrix go.
struct Place {
    n: usize,
    k: usize,
    run: usize,
    columns: Columns,
    lanes: usize,
}

impl Place {
    fn write<E: Element, V: Value>(&self, data: &mut [E], first: usize, rows: &[V]) {
        let Self { n, k, run, .. } = *self;
        let taps = k / run;
        let nr = NV * self.lanes;
        let padded = run.next_multiple_of(E::GROUP);
        let panel_len = (k / run * padded * nr).max(1);
        data.par_chunks_mut(panel_len)
            .enumerate()
            .for_each(|(p, panel)| {
                let row_of = |lane| {
                    let row = source(self.columns, (p, lane), (n, self.lanes))?;
                    let row = row.checked_sub(first)?;
                    rows.get(row * k..(row + 1) * k)
                };
                let rows: Vec<Option<&[V]>> = (0..nr).map(row_of).collect();
                // In blocks of k that fit the L1 cache, so that each row is read and each panel line written once.
                for begin in (0..k).step_by(PACK_BLOCK) {
                    let end = (begin + PACK_BLOCK).min(k);
                    for (lane, row) in rows.iter().enumerate() {
                        let Some(row) = row else { continue };
                        let (mut tap, mut of_run) = (begin / run, begin % run);
                        for _ in begin..end {
                            let at = tap * padded + of_run;
                            let group = at / E::GROUP * nr + lane;
                            let value = row[of_run * taps + tap].widened();
                            panel[group * E::GROUP + at % E::GROUP] = E::from_f32(value);
                            of_run += 1;
                            if of_run == run {
                                (tap, of_run) = (tap + 1, 0);
                            }
                        }
                    }
                }
            });
    }
}

/// The output row that lane `lane` of panel `panel` holds, if it is not padding.
fn source(
    columns: Columns,
    (panel, lane): (usize, usize),
    (n, lanes): (usize, usize),
) -> Option<usize> {
    match columns {
        Columns::Plain => Some(panel * NV * lanes + lane).filter(|&c| c < n),
        Columns::Geglu => {
            let c = panel * lanes + lane % lanes;
            (c < n / 2).then_some(c + if lane < lanes { 0 } else { n / 2 })
        }
    }
}
