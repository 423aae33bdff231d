//! One matrix product for linear layers and convolutions: `out[m, n] = epilogue(Σ_k a[m, k] w[n, k])`.
//!
//! A convolution is the same product over `taps * channels`: each output pixel's row of `a` is read in place, tap by
//! tap, from the channels-last picture (no im2col, no padded copy; a tap outside reads a row of zeros). Weights are
//! packed once ([`super::packed`]), so that the micro-kernel streams them.
//!
//! Blocking: a task is (chunk of rows, panel); within it `k` is cut so that a panel's part stays in a near cache, and
//! partial sums wait as `f32`, whatever the type of the operands. The epilogue runs on the registers of the last part.
#![allow(
    unsafe_code,
    reason = "micro-kernel on raw pointers; bounds are asserted on entry"
)]

use super::element::Element;
use super::math::{Activation, activate, gelu};
use super::packed::{Columns, Packed};
use super::rows::{Part, Pixel, Rows, Window};
use super::scratch::with_scratch;
use super::simd::Simd;
use super::{Kernel, Shared, count_multiply_adds, for_each_task};

/// Vectors a row of the micro-kernel's tile.
pub(crate) const NV: usize = 2;
/// Groups of factors of one panel multiplied at a time (128 bytes each with AVX-512: 256 KiB).
const K_BLOCK: usize = 2048;
/// Rows a task takes at most, so that its part of `a` is still in a shared cache for the next panel.
const ROWS_PER_TASK: usize = 2048;

/// Bytes of a panel that are asked for ahead of their use. Left to itself the processor falls behind, a few percent, where a panel comes
/// from the second cache.
const AHEAD: usize = 2048;
/// Bytes of a cache line.
const LINE: usize = 64;

/// What happens to a finished sum before it is stored.
#[derive(Clone, Copy, Default)]
pub(crate) struct Epilogue<'a, E> {
    /// Factors on the sum, before anything else.
    pub(crate) scales: Option<Scales<'a>>,
    /// `[n]`.
    pub(crate) bias: Option<&'a [f32]>,
    /// `[batch, outputs]`, rows as far apart as the number says: added to every row of its batch entry.
    pub(crate) row_bias: Option<(&'a [E], usize)>,
    /// Rows of one batch entry (for `row_bias`).
    pub(crate) rows_per_batch: usize,
    pub(crate) activation: Activation,
    /// `[n]`: factors on what is negative (`PReLU`), after the activation.
    pub(crate) slopes: Option<&'a [f32]>,
    /// `[m, outputs]`: added last.
    pub(crate) residual: Option<&'a [E]>,
}

/// What the operands were divided by before they were rounded.
#[derive(Clone, Copy)]
pub(crate) struct Scales<'a> {
    /// `[m]`.
    pub(crate) rows: &'a [f32],
    /// `[n]`.
    pub(crate) columns: &'a [f32],
}

/// `out = epilogue(rows · wᵀ)`.
pub(crate) fn gemm<E: Element>(
    rows: Rows<'_, E>,
    w: &Packed,
    epilogue: Epilogue<'_, E>,
    out: &mut [E],
) {
    let m = rows.count(w.inputs());
    check(m, w, &epilogue, out);
    rows.check(w.inputs());
    let (k, nr) = (w.padded_inputs(E::GROUP), NV * w.isa.lanes());
    let Some(weights) = E::packed(&w.data).filter(|_| m > 0 && k > 0) else {
        assert!(m == 0 || k == 0, "gemm: a weight of another type");
        return;
    };
    let filled_up;
    let rows = if rows.in_groups(w.run) {
        rows
    } else {
        filled_up = rows.filled_up(w.run);
        match filled_up.1 {
            Some(window) => Rows::Picture(&filled_up.0, window),
            None => Rows::Matrix(&filled_up.0),
        }
    };
    count_multiply_adds(m * w.inputs() * w.rows());
    let panels = weights.len() / (k * nr);
    let wanted = (8 * rayon::current_num_threads()).div_ceil(panels);
    let chunk = m.div_ceil(wanted).next_multiple_of(24).min(ROWS_PER_TASK);
    let chunks = m.div_ceil(chunk);
    let zeros = match rows {
        Rows::Picture(_, p) | Rows::Pictures(_, p) => vec![E::default(); p.channels],
        Rows::Matrix(_) => Vec::new(),
    };
    let waiting = if k > K_BLOCK * E::GROUP {
        chunk.next_multiple_of(24) * nr
    } else {
        0
    };
    let out = Shared::new(out);
    for_each_task(chunks * panels, m * k * w.rows() / E::GROUP, |task| {
        let (from, panel) = (task / panels * chunk, task % panels);
        with_scratch(waiting, |sums| {
            w.isa.run(Task {
                rows,
                w,
                weights: &weights[panel * k * nr..(panel + 1) * k * nr],
                k,
                epilogue,
                zeros: &zeros,
                out,
                sums: sums.as_mut_ptr(),
                from,
                to: (from + chunk).min(m),
                panel,
            });
        });
    });
}

/// Panics unless all sizes belong together.
fn check<E>(m: usize, w: &Packed, epilogue: &Epilogue<'_, E>, out: &[E]) {
    let outputs = w.outputs();
    assert_eq!(out.len(), m * outputs, "gemm: output size");
    assert!(
        epilogue
            .scales
            .is_none_or(|s| s.rows.len() == m && s.columns.len() == w.rows()),
        "gemm: scales"
    );
    assert!(
        epilogue.bias.is_none_or(|b| b.len() == w.rows()),
        "gemm: bias size"
    );
    assert!(
        epilogue.residual.is_none_or(|r| r.len() == out.len()),
        "gemm: residual size"
    );
    assert!(
        epilogue.row_bias.is_none_or(|(rows, stride)| {
            let batch = m.checked_div(epilogue.rows_per_batch);
            batch.is_some_and(|n| n == 0 || rows.len() >= (n - 1) * stride + outputs)
        }),
        "gemm: row bias size"
    );
    assert!(
        epilogue.slopes.is_none_or(|s| s.len() == outputs),
        "gemm: slopes"
    );
}

struct Task<'a, E> {
    rows: Rows<'a, E>,
    w: &'a Packed,
    /// This panel's.
    weights: &'a [E],
    /// Factors of each sum as they are stored.
    k: usize,
    epilogue: Epilogue<'a, E>,
    zeros: &'a [E],
    out: Shared<E>,
    /// `[rows of the task, NR]`, if `k` is cut.
    sums: *mut f32,
    from: usize,
    to: usize,
    panel: usize,
}

impl<E: Element> Kernel for Task<'_, E> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self) {
        // SAFETY: sizes were asserted by `gemm`, the instruction set by `Isa::run`; tasks write disjoint tiles.
        unsafe {
            match S::MR {
                12 => self.tiles::<S, 12>(),
                8 => self.tiles::<S, 8>(),
                6 => self.tiles::<S, 6>(),
                _ => self.tiles::<S, 4>(),
            }
        }
    }
}

impl<E: Element> Task<'_, E> {
    #[inline(always)]
    unsafe fn tiles<S: Simd, const MR: usize>(&self) {
        for begin in (0..self.k).step_by(K_BLOCK * E::GROUP) {
            let end = (begin + K_BLOCK * E::GROUP).min(self.k);
            for m in (self.from..self.to).step_by(MR) {
                // SAFETY: see `run`.
                unsafe { self.tile::<S, MR>(m, begin, end) };
            }
        }
    }

    /// Adds the products `begin..end` of rows `m..m + MR`.
    #[inline(always)]
    unsafe fn tile<S: Simd, const MR: usize>(&self, m: usize, begin: usize, end: usize) {
        let valid = MR.min(self.to - m);
        let nr = NV * S::LANES;
        // SAFETY: see `run`; pointers of rows past the end repeat the first row and are not stored. `sums` has room for
        // whole tiles: the chunk is a multiple of every MR.
        unsafe {
            let waiting = self.sums.wrapping_add((m - self.from) * nr);
            let mut acc = [[S::splat(0.0); NV]; MR];
            if begin > 0 {
                for (i, row) in acc.iter_mut().enumerate() {
                    for (j, v) in row.iter_mut().enumerate() {
                        *v = S::load(waiting.add(i * nr + j * S::LANES));
                    }
                }
            }
            let b = self.weights.as_ptr().add(begin * nr);
            match self.rows {
                Rows::Matrix(a) => {
                    let mut p = [a.as_ptr().add(m * self.k + begin); MR];
                    for (i, p) in p.iter_mut().enumerate().take(valid) {
                        *p = p.add(i * self.k);
                    }
                    micro::<S, E, MR>(&p, b, (end - begin) / E::GROUP, &mut acc);
                }
                Rows::Picture(x, window) => {
                    let part = [(x, window.channels)];
                    self.taps::<S, MR>(&part, window, (m, valid), (begin, end), b, &mut acc);
                }
                Rows::Pictures(parts, window) => {
                    self.taps::<S, MR>(parts, window, (m, valid), (begin, end), b, &mut acc);
                }
            }
            if end < self.k {
                for (i, row) in acc.iter().enumerate() {
                    for (j, v) in row.iter().enumerate() {
                        S::store(waiting.add(i * nr + j * S::LANES), *v);
                    }
                }
            } else {
                self.finish::<S, MR>(m, valid, &acc);
            }
        }
    }

    /// Adds the products `begin..end` of a window's taps, part by part.
    #[inline(always)]
    unsafe fn taps<S: Simd, const MR: usize>(
        &self,
        parts: &[Part<'_, E>],
        window: Window,
        (m, valid): (usize, usize),
        (begin, end): (usize, usize),
        mut b: *const E,
        acc: &mut [[S::V; NV]; MR],
    ) {
        let pixels: [Pixel; MR] = window.pixels(m, valid);
        let c = window.channels;
        let mut at = begin;
        while at < end {
            let (tap, first) = (at / c, at % c);
            let stop = c.min(first + end - at);
            let offset = [tap / window.kernel, tap % window.kernel];
            let sources: [Option<usize>; MR] =
                std::array::from_fn(|i| window.source(pixels[i], offset));
            let mut before = 0;
            for &(x, channels) in parts {
                let (from, to) = (first.max(before), stop.min(before + channels));
                let skipped = from.wrapping_sub(before);
                before += channels;
                if from >= to {
                    continue;
                }
                // SAFETY: see `run`; `source` names a pixel of the picture, `skipped + to - from <= channels`.
                unsafe {
                    let p: [*const E; MR] = std::array::from_fn(|i| match sources[i] {
                        Some(pixel) => x.as_ptr().add(pixel * channels + skipped),
                        None => self.zeros.as_ptr(),
                    });
                    micro::<S, E, MR>(&p, b, (to - from) / E::GROUP, acc);
                    b = b.add((to - from) * NV * S::LANES);
                }
            }
            at += stop - first;
        }
    }

    #[inline(always)]
    unsafe fn finish<S: Simd, const MR: usize>(
        &self,
        m: usize,
        valid: usize,
        acc: &[[S::V; NV]; MR],
    ) {
        let n = self.w.rows();
        for i in 0..MR {
            if i >= valid {
                continue;
            }
            // SAFETY: see `run`.
            unsafe {
                match self.w.columns {
                    Columns::Plain => {
                        for j in 0..NV {
                            let column = (self.panel * NV + j) * S::LANES;
                            if column < n {
                                let width = S::LANES.min(n - column);
                                let biased = self.biased::<S>(acc[i][j], m + i, column, width);
                                self.store::<S>(m + i, column, width, biased, n);
                            }
                        }
                    }
                    Columns::Geglu => {
                        let (half, column) = (n / 2, self.panel * S::LANES);
                        let width = S::LANES.min(half - column);
                        let value = self.biased::<S>(acc[i][0], m + i, column, width);
                        let gate = self.biased::<S>(acc[i][1], m + i, half + column, width);
                        let gated = S::mul(value, gelu::<S>(gate));
                        self.store::<S>(m + i, column, width, gated, half);
                    }
                }
            }
        }
    }

    /// The sum with its scales and bias.
    #[inline(always)]
    unsafe fn biased<S: Simd>(&self, v: S::V, row: usize, column: usize, width: usize) -> S::V {
        // SAFETY: `row < m`, `column + width <= n`, the lengths of scales and bias.
        unsafe {
            let v = match self.epilogue.scales {
                Some(scales) => {
                    let columns = scales.columns.as_ptr().add(column);
                    let columns = f32::load_up_to::<S>(columns, width);
                    S::mul(v, S::mul(S::splat(*scales.rows.as_ptr().add(row)), columns))
                }
                None => v,
            };
            match self.epilogue.bias {
                Some(bias) => S::add(v, f32::load_up_to::<S>(bias.as_ptr().add(column), width)),
                None => v,
            }
        }
    }

    #[inline(always)]
    unsafe fn store<S: Simd>(
        &self,
        row: usize,
        column: usize,
        width: usize,
        v: S::V,
        outputs: usize,
    ) {
        // SAFETY: `row < m`, `column + width <= outputs`, and the slices have the sizes `gemm` asserted.
        unsafe {
            let read = |p: *const E| E::load_up_to::<S>(p, width);
            let mut v = v;
            if let Some((row_bias, stride)) = self.epilogue.row_bias {
                let batch = row / self.epilogue.rows_per_batch;
                v = S::add(v, read(row_bias.as_ptr().add(batch * stride + column)));
            }
            v = activate::<S>(self.epilogue.activation, v);
            if let Some(slopes) = self.epilogue.slopes {
                let zero = S::splat(0.0);
                let slopes = f32::load_up_to::<S>(slopes.as_ptr().add(column), width);
                v = S::fma(S::min(v, zero), slopes, S::max(v, zero));
            }
            let at = row * outputs + column;
            if let Some(residual) = self.epilogue.residual {
                v = S::add(v, read(residual.as_ptr().add(at)));
            }
            E::store_up_to::<S>(self.out.as_ptr().add(at), v, width);
        }
    }
}

/// `acc[i] += Σ_k a[i][k] b[k]` over `MR` rows, `NV` vectors of columns and `groups` of factors.
#[inline(always)]
pub(crate) unsafe fn micro<S: Simd, E: Element, const MR: usize>(
    a: &[*const E; MR],
    b: *const E,
    groups: usize,
    acc: &mut [[S::V; NV]; MR],
) {
    // SAFETY: the caller's rows hold `groups * GROUP` values, `b` holds `groups * GROUP * NV * LANES`.
    unsafe {
        let mut c = *acc;
        let a = *a;
        let mut b = b;
        for i in 0..groups {
            for line in 0..NV * S::LANES * size_of::<f32>() / LINE {
                S::fetch(b.cast::<u8>().wrapping_add(AHEAD + line * LINE));
            }
            let columns: [S::V; NV] = [
                E::groups::<S>(b),
                E::groups::<S>(b.add(S::LANES * E::GROUP)),
            ];
            for r in 0..MR {
                let factors = E::spread::<S>(a[r].add(i * E::GROUP));
                for j in 0..NV {
                    c[r][j] = E::multiply_add::<S>(factors, columns[j], c[r][j]);
                }
            }
            b = b.add(NV * S::LANES * E::GROUP);
        }
        *acc = c;
    }
}
