//! One matrix product for linear layers and convolutions: `out[m, n] = epilogue(Σ_k a[m, k] w[n, k])`.
//!
//! A convolution is the same product over `taps * channels`: each output pixel's row of `a` is read in place, tap by
//! tap, from the channels-last picture (no im2col, no padded copy; a tap outside reads a row of zeros). Weights are
//! packed once, `[panel][k][NR]` with `NR = NV * LANES` output columns a panel, so that the micro-kernel streams them.
//!
//! Blocking: a task is (chunk of rows, panel); within it `k` is cut so that a panel's part stays in the L2 cache, and
//! partial sums wait in `out`. The epilogue runs on the registers of the last part.
#![allow(
    unsafe_code,
    reason = "micro-kernel on raw pointers; bounds are asserted on entry"
)]

use super::math::{Activation, activate, gelu};
use super::packed::{Columns, Packed};
use super::simd::Simd;
use super::{Kernel, Shared, count_multiply_adds, for_each_task};

/// Vectors a row of the micro-kernel's tile.
pub(crate) const NV: usize = 2;
/// `k` values of one panel kept in L2 at a time (128 bytes each with AVX-512: 256 KiB).
const K_BLOCK: usize = 2048;
/// Rows a task takes at most, so that its part of `a` is still in a shared cache for the next panel.
const ROWS_PER_TASK: usize = 2048;

/// How a convolution walks its picture `[batch, height, width, channels]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Window {
    pub(crate) batch: usize,
    pub(crate) height: usize,
    pub(crate) width: usize,
    pub(crate) channels: usize,
    pub(crate) out_height: usize,
    pub(crate) out_width: usize,
    pub(crate) kernel: usize,
    pub(crate) stride: usize,
    /// Rows and columns of zeros before the first pixel.
    pub(crate) pad: usize,
    /// 2 reads the picture as if it were enlarged by nearest neighbour.
    pub(crate) upsample: usize,
    /// Wrap around instead of zeros (seamless textures).
    pub(crate) circular: bool,
}

/// Where the rows of `a` come from.
#[derive(Clone, Copy)]
pub(crate) enum Rows<'a> {
    /// `[m, k]`, row major.
    Matrix(&'a [f32]),
    /// A picture under a window.
    Picture(&'a [f32], Window),
    /// Pictures of one size, their channels side by side, read where they lie; the window counts all channels.
    Pictures(&'a [Part<'a>], Window),
}

/// Some channels of a picture: pixels and how many channels each has.
pub(crate) type Part<'a> = (&'a [f32], usize);

impl Rows<'_> {
    fn count(&self, k: usize) -> usize {
        match self {
            Self::Matrix(a) => a.len() / k.max(1),
            Self::Picture(_, w) | Self::Pictures(_, w) => w.batch * w.out_height * w.out_width,
        }
    }
}

/// What happens to a finished sum before it is stored.
#[derive(Clone, Copy, Default)]
pub(crate) struct Epilogue<'a> {
    /// `[n]`.
    pub(crate) bias: Option<&'a [f32]>,
    /// `[batch, outputs]`: added to every row of its batch entry.
    pub(crate) row_bias: Option<&'a [f32]>,
    /// Rows of one batch entry (for `row_bias`).
    pub(crate) rows_per_batch: usize,
    pub(crate) activation: Activation,
    /// `[n]`: factors on what is negative (`PReLU`), after the activation.
    pub(crate) slopes: Option<&'a [f32]>,
    /// `[m, outputs]`: added last.
    pub(crate) residual: Option<&'a [f32]>,
}

/// `out = epilogue(rows · wᵀ)`.
pub(crate) fn gemm(rows: Rows<'_>, w: &Packed, epilogue: Epilogue<'_>, out: &mut [f32]) {
    let m = rows.count(w.k);
    let outputs = w.outputs();
    assert_eq!(out.len(), m * outputs, "gemm: output size");
    assert!(
        epilogue.bias.is_none_or(|b| b.len() == w.n),
        "gemm: bias size"
    );
    assert!(
        epilogue.residual.is_none_or(|r| r.len() == out.len()),
        "gemm: residual size"
    );
    assert!(
        epilogue.row_bias.is_none_or(
            |r| epilogue.rows_per_batch > 0 && r.len() == m / epilogue.rows_per_batch * outputs
        ),
        "gemm: row bias size"
    );
    assert!(
        epilogue.slopes.is_none_or(|s| s.len() == outputs),
        "gemm: slopes"
    );
    match rows {
        Rows::Matrix(_) => {}
        Rows::Picture(x, p) => check_window(&[(x, p.channels)], p, w.k),
        Rows::Pictures(parts, p) => check_window(parts, p, w.k),
    }
    if m == 0 || w.k == 0 {
        return;
    }
    count_multiply_adds(m * w.k * w.n);
    let nr = NV * w.isa.lanes();
    let panels = w.data.len() / (w.k * nr);
    let wanted = (8 * rayon::current_num_threads()).div_ceil(panels);
    let chunk = m.div_ceil(wanted).next_multiple_of(24).min(ROWS_PER_TASK);
    let chunks = m.div_ceil(chunk);
    let zeros = match rows {
        Rows::Picture(_, p) | Rows::Pictures(_, p) => vec![0f32; p.channels],
        Rows::Matrix(_) => Vec::new(),
    };
    let out = Shared::new(out);
    for_each_task(chunks * panels, m * w.k * w.n, |task| {
        let (from, panel) = (task / panels * chunk, task % panels);
        w.isa.run(Task {
            rows,
            w,
            epilogue,
            zeros: &zeros,
            out,
            from,
            to: (from + chunk).min(m),
            panel,
        });
    });
}

/// The parts are the window's picture, and the window is the weight's.
fn check_window(parts: &[Part<'_>], window: Window, k: usize) {
    let pixels = window.batch * window.height * window.width;
    for (values, channels) in parts {
        assert_eq!(values.len(), pixels * channels, "gemm: picture size");
    }
    let channels: usize = parts.iter().map(|(_, channels)| channels).sum();
    assert_eq!(channels, window.channels, "gemm: channels");
    assert_eq!(
        k,
        window.kernel * window.kernel * channels,
        "gemm: window size"
    );
}

struct Task<'a> {
    rows: Rows<'a>,
    w: &'a Packed,
    epilogue: Epilogue<'a>,
    zeros: &'a [f32],
    out: Shared<f32>,
    from: usize,
    to: usize,
    panel: usize,
}

impl Kernel for Task<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self) {
        // SAFETY: sizes were asserted by `gemm`, the instruction set by `Isa::run`; tasks write disjoint tiles.
        unsafe {
            match S::MR {
                8 => self.tiles::<S, 8>(),
                6 => self.tiles::<S, 6>(),
                _ => self.tiles::<S, 4>(),
            }
        }
    }
}

impl Task<'_> {
    #[inline(always)]
    unsafe fn tiles<S: Simd, const MR: usize>(&self) {
        let k = self.w.k;
        // Gated outputs need both halves of the sum at once, so their `k` is not cut.
        let block = if self.w.columns == Columns::Geglu {
            k
        } else {
            K_BLOCK
        };
        for begin in (0..k).step_by(block) {
            let end = (begin + block).min(k);
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
        // SAFETY: see `run`; pointers of rows past the end repeat the first row and are not stored.
        unsafe {
            let mut acc = [[S::splat(0.0); NV]; MR];
            if begin > 0 {
                self.each_vector::<S, MR>(valid, |i, j, column, width| {
                    let p = self.out.as_ptr().add((m + i) * self.w.n + column);
                    acc[i][j] = S::load_up_to(p, width);
                });
            }
            let b = self
                .w
                .data
                .as_ptr()
                .add((self.panel * self.w.k + begin) * nr);
            match self.rows {
                Rows::Matrix(a) => {
                    let mut p = [a.as_ptr().add(m * self.w.k + begin); MR];
                    for (i, p) in p.iter_mut().enumerate().take(valid) {
                        *p = p.add(i * self.w.k);
                    }
                    micro::<S, MR>(&p, b, end - begin, &mut acc);
                }
                Rows::Picture(x, window) => {
                    let part = [(x, window.channels)];
                    self.taps::<S, MR>(&part, window, (m, valid), (begin, end), b, &mut acc);
                }
                Rows::Pictures(parts, window) => {
                    self.taps::<S, MR>(parts, window, (m, valid), (begin, end), b, &mut acc);
                }
            }
            if end < self.w.k {
                self.each_vector::<S, MR>(valid, |i, j, column, width| {
                    let p = self.out.as_ptr().add((m + i) * self.w.n + column);
                    S::store_up_to(p, acc[i][j], width);
                });
            } else {
                self.finish::<S, MR>(m, valid, &acc);
            }
        }
    }

    /// Adds the products `begin..end` of a window's taps, part by part.
    #[inline(always)]
    unsafe fn taps<S: Simd, const MR: usize>(
        &self,
        parts: &[Part<'_>],
        window: Window,
        (m, valid): (usize, usize),
        (begin, end): (usize, usize),
        mut b: *const f32,
        acc: &mut [[S::V; NV]; MR],
    ) {
        let pixels: [Pixel; MR] =
            std::array::from_fn(|i| window.pixel(m + if i < valid { i } else { 0 }));
        let c = window.channels;
        let mut at = begin;
        while at < end {
            let (tap, first) = (at / c, at % c);
            let stop = c.min(first + end - at);
            let sources: [Option<usize>; MR] =
                std::array::from_fn(|i| window.source(pixels[i], tap));
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
                    let p: [*const f32; MR] = std::array::from_fn(|i| match sources[i] {
                        Some(pixel) => x.as_ptr().add(pixel * channels + skipped),
                        None => self.zeros.as_ptr(),
                    });
                    micro::<S, MR>(&p, b, to - from, acc);
                    b = b.add((to - from) * NV * S::LANES);
                }
            }
            at += stop - first;
        }
    }

    /// Calls `f(row, vector, column, width)` for the vectors of this panel that hold plain outputs.
    #[inline(always)]
    unsafe fn each_vector<S: Simd, const MR: usize>(
        &self,
        valid: usize,
        mut f: impl FnMut(usize, usize, usize, usize),
    ) {
        for i in 0..MR {
            if i < valid {
                for j in 0..NV {
                    let column = (self.panel * NV + j) * S::LANES;
                    if column < self.w.n {
                        f(i, j, column, S::LANES.min(self.w.n - column));
                    }
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn finish<S: Simd, const MR: usize>(
        &self,
        m: usize,
        valid: usize,
        acc: &[[S::V; NV]; MR],
    ) {
        // SAFETY: see `run`.
        unsafe {
            match self.w.columns {
                Columns::Plain => self.each_vector::<S, MR>(valid, |i, j, column, width| {
                    let biased = self.biased::<S>(acc[i][j], column, width);
                    self.store::<S>(m + i, column, width, biased, self.w.n);
                }),
                Columns::Geglu => {
                    let half = self.w.n / 2;
                    let column = self.panel * S::LANES;
                    let width = S::LANES.min(half - column);
                    for i in 0..MR {
                        if i < valid {
                            let value = self.biased::<S>(acc[i][0], column, width);
                            let gate = self.biased::<S>(acc[i][1], half + column, width);
                            self.store::<S>(
                                m + i,
                                column,
                                width,
                                S::mul(value, gelu::<S>(gate)),
                                half,
                            );
                        }
                    }
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn biased<S: Simd>(&self, v: S::V, column: usize, width: usize) -> S::V {
        // SAFETY: `column + width <= n`, the bias's length.
        unsafe {
            match self.epilogue.bias {
                Some(bias) => S::add(v, S::load_up_to(bias.as_ptr().add(column), width)),
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
            let read = |p: *const f32| S::load_up_to(p, width);
            let mut v = v;
            if let Some(row_bias) = self.epilogue.row_bias {
                v = S::add(
                    v,
                    read(
                        row_bias
                            .as_ptr()
                            .add(row / self.epilogue.rows_per_batch * outputs + column),
                    ),
                );
            }
            v = activate::<S>(self.epilogue.activation, v);
            if let Some(slopes) = self.epilogue.slopes {
                let zero = S::splat(0.0);
                let slopes = read(slopes.as_ptr().add(column));
                v = S::fma(S::min(v, zero), slopes, S::max(v, zero));
            }
            let at = row * outputs + column;
            if let Some(residual) = self.epilogue.residual {
                v = S::add(v, read(residual.as_ptr().add(at)));
            }
            S::store_up_to(self.out.as_ptr().add(at), v, width);
        }
    }
}

/// An output pixel: its batch entry's offset and the corner of its window in (enlarged) input pixels.
#[derive(Clone, Copy)]
struct Pixel {
    base: usize,
    y: isize,
    x: isize,
}

impl Window {
    #[inline(always)]
    fn pixel(&self, m: usize) -> Pixel {
        let (row, ox) = (m / self.out_width, m % self.out_width);
        let (image, oy) = (row / self.out_height, row % self.out_height);
        Pixel {
            base: image * self.height * self.width,
            y: (oy * self.stride) as isize - self.pad as isize,
            x: (ox * self.stride) as isize - self.pad as isize,
        }
    }

    /// Number of the pixel under tap `tap`, or `None` in the padding.
    #[inline(always)]
    fn source(&self, pixel: Pixel, tap: usize) -> Option<usize> {
        let (height, width) = (
            (self.height * self.upsample) as isize,
            (self.width * self.upsample) as isize,
        );
        let mut y = pixel.y + (tap / self.kernel) as isize;
        let mut x = pixel.x + (tap % self.kernel) as isize;
        if self.circular {
            (y, x) = (y.rem_euclid(height), x.rem_euclid(width));
        } else if y < 0 || x < 0 || y >= height || x >= width {
            return None;
        }
        let (y, x) = (y as usize / self.upsample, x as usize / self.upsample);
        Some(pixel.base + y * self.width + x)
    }
}

/// `acc[i] += Σ_k a[i][k] b[k]` over `MR` rows and `NV` vectors of columns.
#[inline(always)]
pub(crate) unsafe fn micro<S: Simd, const MR: usize>(
    a: &[*const f32; MR],
    b: *const f32,
    k: usize,
    acc: &mut [[S::V; NV]; MR],
) {
    // SAFETY: the caller's rows hold `k` values, `b` holds `k * NV * LANES`.
    unsafe {
        let mut c = *acc;
        let a = *a;
        let mut b = b;
        for i in 0..k {
            let columns: [S::V; NV] = [S::load(b), S::load(b.add(S::LANES))];
            for r in 0..MR {
                let value = S::splat(*a[r].add(i));
                for j in 0..NV {
                    c[r][j] = S::fma(value, columns[j], c[r][j]);
                }
            }
            b = b.add(NV * S::LANES);
        }
        *acc = c;
    }
}
