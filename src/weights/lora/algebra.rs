//! The matrix arithmetic behind LoRA deltas, in `f32` on the host, on the CPU kernels' own product.
//!
//! A tensor `[a, b, ...]` is the matrix `[a, b * ...]`; convolution kernels need nothing else. Sizes are checked before
//! anything is allocated, so a file cannot ask for more memory than its tensors and the weight they change explain.

use rayon::prelude::*;

use super::Error;
use crate::nn::transpose;

/// Values of a tensor with its shape.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Values {
    pub(super) shape: Vec<usize>,
    pub(super) data: Vec<f32>,
}

impl Values {
    /// First dimension: rows of the matrix. 1 for a scalar.
    pub(super) fn rows(&self) -> usize {
        self.shape.first().copied().unwrap_or(1)
    }

    /// Columns of the matrix: all other dimensions together.
    pub(super) fn columns(&self) -> usize {
        self.data.len() / self.rows().max(1)
    }

    /// Second dimension, 1 where there is none.
    pub(super) fn second(&self) -> usize {
        self.shape.get(1).copied().unwrap_or(1)
    }

    /// The matrix transposed.
    pub(super) fn transposed(&self) -> Self {
        let (rows, columns) = (self.rows(), self.columns());
        Self {
            shape: vec![columns, rows],
            data: transpose(&self.data, rows, columns),
        }
    }

    /// The first `count` rows.
    pub(super) fn first_rows(mut self, count: usize) -> Self {
        let columns = self.columns();
        self.shape[0] = count;
        self.data.truncate(count * columns);
        self
    }

    /// The first `count` columns of the matrix.
    pub(super) fn first_columns(self, count: usize) -> Self {
        let data = self.data.chunks_exact(self.columns().max(1));
        Self {
            shape: vec![self.rows(), count],
            data: data.flat_map(|row| &row[..count]).copied().collect(),
        }
    }
}

/// `a b`, as matrices.
pub(super) fn product(a: &Values, b: &Values) -> Result<Values, Error> {
    let data = product_plus(a, b, None)?;
    Ok(Values {
        shape: vec![a.rows(), b.columns()],
        data,
    })
}

/// `a b + sum`, where `sum` has the product's size.
pub(super) fn product_plus(a: &Values, b: &Values, sum: Option<&[f32]>) -> Result<Vec<f32>, Error> {
    if a.columns() != b.rows() || a.data.is_empty() || b.data.is_empty() {
        return Err(Error::Factors {
            left: a.shape.clone(),
            right: b.shape.clone(),
        });
    }
    let size = a.rows() * b.columns();
    if let Some(sum) = sum
        && sum.len() != size
    {
        return Err(Error::Mismatch {
            delta: vec![a.rows(), b.columns()],
            weight: sum.len(),
        });
    }
    Ok(crate::nn::product(&a.data, &b.data, b.rows(), sum))
}

/// A Tucker decomposition of a convolution kernel: `out[i, j, x] = Σ up[i, n] core[n, m, x] down[m, j]`.
pub(super) fn tucker(up: &Values, core: &Values, down: &Values) -> Result<Values, Error> {
    let (n, m) = (core.rows(), core.second());
    let taps = core.columns() / m.max(1);
    if up.columns() != n || down.rows() != m || taps == 0 {
        return Err(Error::Factors {
            left: core.shape.clone(),
            right: down.shape.clone(),
        });
    }
    let down = down.transposed();
    let mut inner = Vec::with_capacity(n * down.rows() * taps);
    for slice in core.data.chunks_exact(m * taps) {
        let slice = Values {
            shape: vec![m, taps],
            data: slice.to_vec(),
        };
        inner.extend(product(&down, &slice)?.data);
    }
    let inner = Values {
        shape: vec![n, down.rows() * taps],
        data: inner,
    };
    product(up, &inner)
}

/// The Kronecker product of `a` `[a, b]` and `b` `[c, d * x]`: `[a * c, b * d * x]`.
pub(super) fn kronecker(a: &Values, b: &Values, size: usize) -> Result<Values, Error> {
    let (rows, columns) = (a.rows() * b.rows(), a.columns() * b.columns());
    if a.data.len().checked_mul(b.data.len()) != Some(size) {
        return Err(Error::Mismatch {
            delta: vec![rows, columns],
            weight: size,
        });
    }
    let mut data = Vec::with_capacity(size);
    for a_row in a.data.chunks_exact(a.columns()) {
        for b_row in b.data.chunks_exact(b.columns()) {
            for x in a_row {
                data.extend(b_row.iter().map(|y| x * y));
            }
        }
    }
    Ok(Values {
        shape: vec![rows, columns],
        data,
    })
}

/// `out[i] = f(a[i], b[i])`, in parallel where it pays.
pub(super) fn zip(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32 + Sync) -> Vec<f32> {
    const BLOCK: usize = 1 << 14;
    let mut out = crate::nn::block_cache::buffer(a.len().min(b.len()));
    out.par_chunks_mut(BLOCK)
        .zip(a.par_chunks(BLOCK).zip(b.par_chunks(BLOCK)))
        .for_each(|(out, (a, b))| {
            for ((x, a), b) in out.iter_mut().zip(a).zip(b) {
                *x = f(*a, *b);
            }
        });
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(shape: &[usize]) -> Values {
        let len: usize = shape.iter().product();
        Values {
            shape: shape.to_vec(),
            data: (0..len).map(|i| (i * 7 % 11) as f32 - 4.0).collect(),
        }
    }

    #[test]
    fn factors_that_do_not_fit_are_refused() {
        let (a, b) = (values(&[3, 5]), values(&[5, 2, 2]));
        assert_eq!(product(&a, &b).expect("fits").shape, [3, 4]);
        assert!(product(&a, &values(&[4, 2])).is_err());
        assert!(product_plus(&a, &b, Some(&[0.0; 11])).is_err());
        assert!(product(&values(&[3, 0]), &values(&[0, 2])).is_err());
        assert!(kronecker(&values(&[2, 3]), &values(&[2, 2]), 23).is_err());
        assert!(tucker(&values(&[4, 2]), &values(&[3, 3, 2, 2]), &values(&[3, 5])).is_err());
    }

    #[test]
    fn tucker_and_kronecker_follow_their_sums() {
        let (up, core, down) = (values(&[4, 2]), values(&[2, 3, 2, 2]), values(&[3, 5]));
        let entry = |at: usize| -> f32 {
            let (i, j, x) = (at / 20, at / 4 % 5, at % 4);
            let terms = (0..2).flat_map(|n| (0..3).map(move |m| (n, m)));
            terms
                .map(|(n, m)| {
                    up.data[i * 2 + n] * core.data[(n * 3 + m) * 4 + x] * down.data[m * 5 + j]
                })
                .sum()
        };
        let got = tucker(&up, &core, &down).expect("fits");
        assert_eq!(got.data, (0..80).map(entry).collect::<Vec<f32>>());
        let (a, b) = (values(&[2, 3]), values(&[2, 2, 2, 2]));
        let entry = |at: usize| {
            let (row, column) = (at / 24, at % 24);
            a.data[row / 2 * 3 + column / 8] * b.data[row % 2 * 8 + column % 8]
        };
        let got = kronecker(&a, &b, 6 * 16).expect("fits");
        assert_eq!(got.data, (0..96).map(entry).collect::<Vec<f32>>());
    }
}
