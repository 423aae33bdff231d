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
    fn products_of_small_integers_are_exact() {
        let (a, b) = (values(&[3, 5]), values(&[5, 2, 2]));
        let got = product(&a, &b).expect("fits");
        assert_eq!(got.shape, [3, 4]);
        for i in 0..3 {
            for j in 0..4 {
                let sum: f32 = (0..5).map(|k| a.data[i * 5 + k] * b.data[k * 4 + j]).sum();
                assert_eq!(got.data[i * 4 + j], sum);
            }
        }
        let plus = product_plus(&a, &b, Some(&[1.0; 12])).expect("fits");
        assert!(plus.iter().zip(&got.data).all(|(p, g)| *p == g + 1.0));
        assert!(product(&a, &values(&[4, 2])).is_err());
        assert!(product_plus(&a, &b, Some(&[0.0; 11])).is_err());
        assert!(product(&values(&[3, 0]), &values(&[0, 2])).is_err());
    }

    #[test]
    fn tucker_and_kronecker_follow_their_sums() {
        let (up, core, down) = (values(&[4, 2]), values(&[2, 3, 2, 2]), values(&[3, 5]));
        let got = tucker(&up, &core, &down).expect("fits");
        for (i, j, x) in
            (0..4).flat_map(|i| (0..5).flat_map(move |j| (0..4).map(move |x| (i, j, x))))
        {
            let mut sum = 0.0;
            for n in 0..2 {
                for m in 0..3 {
                    sum +=
                        up.data[i * 2 + n] * core.data[(n * 3 + m) * 4 + x] * down.data[m * 5 + j];
                }
            }
            assert_eq!(got.data[(i * 5 + j) * 4 + x], sum);
        }
        let (a, b) = (values(&[2, 3]), values(&[2, 2, 2, 2]));
        let got = kronecker(&a, &b, 6 * 16).expect("fits");
        // Row 3 = (1, 1), column (2, 1), tap 3.
        assert_eq!(
            got.data[3 * 24 + (2 * 2 + 1) * 4 + 3],
            a.data[5] * b.data[8 + 7]
        );
        assert!(kronecker(&a, &b, 95).is_err());
    }
}
