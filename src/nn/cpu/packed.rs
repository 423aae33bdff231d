//! Weights in the order in which the micro-kernel of [`super::gemm`] reads them: `[panel][k][NR]`, `NR = NV * LANES`.
//!
//! Invariant: what lies where depends on shape, columns and instruction set alone, so rows can be written again in place.

use rayon::prelude::*;

use super::Isa;
use super::gemm::NV;

/// `k` values packed at a time: 128 lines of a panel are 16 KiB.
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

/// A weight matrix `[n, k]` packed for the micro-kernel of one instruction set.
#[derive(Debug, Clone)]
pub(crate) struct Packed {
    pub(super) data: Vec<f32>,
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) columns: Columns,
    pub(super) isa: Isa,
}

impl Packed {
    /// Packs `rows` (`[n, k]`, row major); `index(k)` says where in a row the `k`-th factor lies.
    pub(crate) fn new(
        isa: Isa,
        rows: &[f32],
        n: usize,
        columns: Columns,
        index: impl Fn(usize) -> usize + Sync,
    ) -> Self {
        let k = rows.len().checked_div(n).unwrap_or(0);
        let lanes = isa.lanes();
        let nr = NV * lanes;
        let panels = match columns {
            Columns::Plain => n.div_ceil(nr),
            Columns::Geglu => (n / 2).div_ceil(lanes),
        };
        let mut packed = Self {
            data: vec![0f32; panels * k * nr],
            n,
            k,
            columns,
            isa,
        };
        packed.replace_rows(0, rows, index);
        packed
    }

    /// Packs `rows` (`[count, k]`, row major) over the weight's rows from `first`; `index` as for [`Self::new`].
    pub(crate) fn replace_rows(
        &mut self,
        first: usize,
        rows: &[f32],
        index: impl Fn(usize) -> usize + Sync,
    ) {
        let Self { n, k, columns, .. } = *self;
        assert!(
            rows.len() <= n.saturating_sub(first) * k,
            "gemm: {} values from row {first} on",
            rows.len()
        );
        let lanes = self.isa.lanes();
        let nr = NV * lanes;
        self.data
            .par_chunks_mut((k * nr).max(1))
            .enumerate()
            .for_each(|(p, panel)| {
                let row_of = |lane| {
                    let row = source(columns, (p, lane), (n, lanes))?.checked_sub(first)?;
                    rows.get(row * k..(row + 1) * k)
                };
                let rows: Vec<Option<&[f32]>> = (0..nr).map(row_of).collect();
                // In blocks of k that fit the L1 cache, so that each row is read and each panel line written once.
                for begin in (0..k).step_by(PACK_BLOCK) {
                    let end = (begin + PACK_BLOCK).min(k);
                    for (lane, row) in rows.iter().enumerate() {
                        let Some(row) = row else { continue };
                        for i in begin..end {
                            panel[i * nr + lane] = row[index(i)];
                        }
                    }
                }
            });
    }

    /// The packed values as they lie in memory.
    #[cfg(test)]
    pub(crate) fn stored(&self) -> &[f32] {
        &self.data
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

    /// Bytes held.
    pub(crate) fn bytes(&self) -> usize {
        self.data.len() * size_of::<f32>()
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
