//! Orthogonal fine-tuning: blocks of a weight's output rows are rotated instead of something being added.
//!
//! OFT (Qiu et al. 2023) with the Cayley transform `R = (I + Q)(I - Q)⁻¹`, and its butterfly form BOFT (Liu et al. 2024), in
//! the variants that A1111 reads: kohya's skew blocks, LyCORIS' finished rotations (`oft_diag`), and 4-D butterfly blocks.

use rayon::prelude::*;

use super::Error;
use super::algebra::Values;

/// How the blocks of a file are to be read.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Blocks {
    /// Blocks `Q` with `Q - Qᵀ` of at most this norm; 0 = any.
    Skew { constraint: f32 },
    /// Rotations as they stand.
    Finished,
}

/// `weight` `[outputs, columns]` with its rows rotated by `blocks` `[..., n, size, size]`.
pub(super) fn rotate(
    weight: &[f32],
    outputs: usize,
    blocks: &Values,
    kind: Blocks,
) -> Result<Vec<f32>, Error> {
    let mismatch = || Error::Mismatch {
        delta: blocks.shape.clone(),
        weight: weight.len(),
    };
    let (factors, count, size) = match *blocks.shape.as_slice() {
        [n, b, c] if b == c => (1, n, b),
        [m, n, b, c] if b == c && b % 2 == 0 => (m, n, b),
        _ => return Err(mismatch()),
    };
    if size == 0 || factors == 0 || count.checked_mul(size) != Some(outputs) || weight.is_empty() {
        return Err(mismatch());
    }
    let rotations = match kind {
        Blocks::Finished => blocks.data.clone(),
        Blocks::Skew { constraint } => cayley(&blocks.data, size, constraint),
    };
    let columns = weight.len() / outputs;
    if blocks.shape.len() == 3 {
        // A1111 multiplies by the transpose here, and not in the butterfly.
        let transposed = |r: &[f32], i: usize, j: usize| r[j * size + i];
        return Ok(apply(weight, columns, &rotations, size, transposed));
    }
    let mut rows = weight.to_vec();
    for (i, factor) in rotations.chunks_exact(count * size * size).enumerate() {
        let half = (size / 2)
            .checked_shl(u32::try_from(i).unwrap_or(u32::MAX))
            .filter(|half| outputs.is_multiple_of(2 * half))
            .ok_or_else(mismatch)?;
        let order = butterfly(outputs, half);
        let shuffled = gather(&rows, columns, |row| order[row]);
        let turned = apply(&shuffled, columns, factor, size, |r, i, j| r[i * size + j]);
        let mut back = vec![0; outputs];
        order
            .iter()
            .enumerate()
            .for_each(|(to, from)| back[*from] = to);
        rows = gather(&turned, columns, |row| back[row]);
    }
    Ok(rows)
}

/// Source row of each row for the reordering `(c g k) -> (c k g)` with `g = 2`.
fn butterfly(rows: usize, k: usize) -> Vec<usize> {
    (0..rows)
        .map(|row| {
            let (c, within) = (row / (2 * k), row % (2 * k));
            c * 2 * k + within % 2 * k + within / 2
        })
        .collect()
}

fn gather(values: &[f32], columns: usize, source: impl Fn(usize) -> usize) -> Vec<f32> {
    (0..values.len() / columns)
        .flat_map(|row| &values[source(row) * columns..][..columns])
        .copied()
        .collect()
}

/// Multiplies each block of `size` rows by its rotation, whose entry `(i, j)` is `entry(block, i, j)`.
fn apply(
    weight: &[f32],
    columns: usize,
    rotations: &[f32],
    size: usize,
    entry: impl Fn(&[f32], usize, usize) -> f32 + Sync,
) -> Vec<f32> {
    let mut out = vec![0f32; weight.len()];
    out.par_chunks_mut(size * columns)
        .zip(weight.par_chunks(size * columns))
        .zip(rotations.par_chunks(size * size))
        .for_each(|((out, rows), rotation)| {
            for (i, out) in out.chunks_exact_mut(columns).enumerate() {
                for (j, row) in rows.chunks_exact(columns).enumerate() {
                    let r = entry(rotation, i, j);
                    out.iter_mut().zip(row).for_each(|(x, w)| *x += r * w);
                }
            }
        });
    out
}

/// `(I + Q)(I - Q)⁻¹` of each block, `Q = B - Bᵀ` scaled so that all blocks together have at most norm `constraint`.
fn cayley(blocks: &[f32], size: usize, constraint: f32) -> Vec<f32> {
    let skew: Vec<f64> = blocks
        .chunks_exact(size * size)
        .flat_map(|b| {
            (0..size * size)
                .map(move |i| f64::from(b[i]) - f64::from(b[i % size * size + i / size]))
        })
        .collect();
    let norm = skew.iter().map(|q| q * q).sum::<f64>().sqrt();
    let scale = if constraint == 0.0 {
        1.0
    } else {
        (norm.min(f64::from(constraint)) + 1e-8) / (norm + 1e-8)
    };
    let mut out = vec![0f32; blocks.len()];
    out.par_chunks_mut(size * size)
        .zip(skew.par_chunks(size * size))
        .for_each(|(out, q)| {
            let q: Vec<f64> = q.iter().map(|q| q * scale).collect();
            out.iter_mut()
                .zip(rotation(&q, size))
                .for_each(|(to, r)| *to = r as f32);
        });
    out
}

/// `(I + Q)(I - Q)⁻¹` of one skew block. Both factors commute, so it solves `(I - Q) R = I + Q`.
fn rotation(q: &[f64], size: usize) -> Vec<f64> {
    let unit = |i: usize| f64::from(u8::from(i / size == i % size));
    let mut a: Vec<f64> = (0..size * size).map(|i| unit(i) - q[i]).collect();
    let mut r: Vec<f64> = (0..size * size).map(|i| unit(i) + q[i]).collect();
    for column in 0..size {
        let pivot = (column..size)
            .max_by(|&i, &j| {
                a[i * size + column]
                    .abs()
                    .total_cmp(&a[j * size + column].abs())
            })
            .unwrap_or(column);
        for k in 0..size {
            a.swap(column * size + k, pivot * size + k);
            r.swap(column * size + k, pivot * size + k);
        }
        // `I - Q` of a skew Q has no eigenvalue smaller than 1 in magnitude, so the pivot is not 0.
        let inverse = 1.0 / a[column * size + column];
        let (a_row, r_row): (Vec<f64>, Vec<f64>) = (0..size)
            .map(|k| {
                (
                    a[column * size + k] * inverse,
                    r[column * size + k] * inverse,
                )
            })
            .unzip();
        for row in 0..size {
            let factor = a[row * size + column];
            for k in 0..size {
                if row == column {
                    (a[row * size + k], r[row * size + k]) = (a_row[k], r_row[k]);
                } else {
                    a[row * size + k] -= factor * a_row[k];
                    r[row * size + k] -= factor * r_row[k];
                }
            }
        }
    }
    r
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_2x2_skew_block_is_the_rotation_by_twice_its_arc_tangent() {
        // Q = [[0, t], [-t, 0]]: (I + Q)(I - Q)⁻¹ rotates by 2 atan(t).
        let blocks = Values {
            shape: vec![1, 2, 2],
            data: vec![0.0, 0.5, 0.0, 0.0],
        };
        let weight = [1.0, 10.0, 2.0, 20.0];
        let got = rotate(&weight, 2, &blocks, Blocks::Skew { constraint: 0.0 }).expect("fits");
        let (sin, cos) = (2.0 * 0.5f32.atan()).sin_cos();
        // R = [[cos, sin], [-sin, cos]], and A1111 multiplies by its transpose.
        let want = [
            cos - 2.0 * sin,
            10.0 * cos - 20.0 * sin,
            sin + 2.0 * cos,
            10.0 * sin + 20.0 * cos,
        ];
        for (g, w) in got.iter().zip(want) {
            assert!((g - w).abs() < 2e-6, "{got:?} {want:?}");
        }
    }

    #[test]
    fn a_constraint_limits_the_norm_of_all_blocks_together() {
        let strong = cayley(&[0.0, 3.0, 0.0, 0.0, 0.0, 4.0, 0.0, 0.0], 2, 1.0);
        // Norms 3√2 and 4√2, together 5√2, are brought to 1.
        let weak = |t: f32| 2.0 * (t / (5.0 * 2f32.sqrt())).atan();
        assert!((strong[1] - weak(3.0).sin()).abs() < 1e-6);
        assert!((strong[5] - weak(4.0).sin()).abs() < 1e-6);
    }

    #[test]
    fn the_butterfly_pairs_rows_at_growing_distance() {
        assert_eq!(butterfly(8, 1), [0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(butterfly(8, 2), [0, 2, 1, 3, 4, 6, 5, 7]);
        assert_eq!(butterfly(8, 4), [0, 4, 1, 5, 2, 6, 3, 7]);
    }

    #[test]
    fn blocks_that_do_not_fill_the_rows_are_refused() {
        for shape in [
            vec![1, 2, 3],
            vec![3, 2, 2],
            vec![0, 0, 0],
            vec![2, 2],
            vec![3, 2, 2, 2],
        ] {
            let data = vec![0.0; shape.iter().product()];
            let blocks = Values { shape, data };
            assert!(
                rotate(&[1.0; 8], 4, &blocks, Blocks::Finished).is_err(),
                "{blocks:?}"
            );
        }
        let deep = Values {
            shape: vec![3, 2, 2, 2],
            data: vec![0.0; 24],
        };
        assert!(
            rotate(&[1.0; 4], 4, &deep, Blocks::Finished).is_err(),
            "a third factor needs 8 rows"
        );
    }
}
