//! A product of two plain matrices on the host, by the CPU kernels: for weights, not for activations.

use rayon::prelude::*;

use super::block_cache::buffer;
use super::cpu::Isa;
use super::cpu::gemm::{Epilogue, gemm};
use super::cpu::packed::{Columns, Layout, Packed, Precision};
use super::cpu::rows::Rows;

/// `a b + sum`: `a` is `[m, k]`, `b` `[k, n]`, `sum` and the result `[m, n]`, all row major.
///
/// # Panics
/// When the lengths do not belong together, or one of the factors is empty.
#[must_use]
pub fn product(a: &[f32], b: &[f32], k: usize, sum: Option<&[f32]>) -> Vec<f32> {
    assert!(
        k > 0
            && a.len() >= k
            && b.len() >= k
            && a.len().is_multiple_of(k)
            && b.len().is_multiple_of(k),
        "product: {} values by {} over {k}",
        a.len(),
        b.len()
    );
    let n = b.len() / k;
    let layout = Layout {
        precision: Precision::F32,
        columns: Columns::Plain,
        run: k,
    };
    let packed = Packed::new(Isa::chosen(), &transpose(b, k, n), n, layout);
    let mut out = buffer(a.len() / k * n);
    let epilogue = Epilogue {
        residual: sum,
        ..Epilogue::default()
    };
    gemm(Rows::Matrix(a), &packed, epilogue, &mut out);
    out
}

/// `values` `[rows, columns]` as `[columns, rows]`.
#[must_use]
pub fn transpose(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    let mut out = buffer(rows * columns);
    out.par_chunks_mut(rows.max(1))
        .enumerate()
        .for_each(|(c, out)| {
            for (r, x) in out.iter_mut().enumerate() {
                *x = values[r * columns + c];
            }
        });
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_of_small_integers_are_exact() {
        let ramp = |len: usize| {
            (0..len)
                .map(|i| (i * 7 % 11) as f32 - 4.0)
                .collect::<Vec<f32>>()
        };
        let (a, b) = (ramp(3 * 5), ramp(5 * 4));
        let got = product(&a, &b, 5, Some(&[1.0; 12]));
        let entry = |i: usize| {
            (0..5)
                .map(|k| a[i / 4 * 5 + k] * b[k * 4 + i % 4])
                .sum::<f32>()
                + 1.0
        };
        assert_eq!(got, (0..12).map(entry).collect::<Vec<f32>>());
        assert_eq!(
            transpose(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 2, 3),
            [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]
        );
    }
}
