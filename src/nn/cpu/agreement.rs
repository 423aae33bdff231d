//! Every instruction set in every type against the portable body in `f32`, on random shapes with ragged edges.
//!
//! Both compute on the same (rounded) values. Allowed is what another order of summation costs, 4e-6 of the largest output per
//! sqrt(k / 64), and in `bf16` a step of the output (2^-8 of it, at least of a 16th of the largest). Attention rounds its weights
//! too: two steps of the largest output.

use half::bf16;
use proptest::prelude::*;

use super::Isa;
use super::attention::{Heads, Shape, attention};
use super::element::Element;
use super::gemm::{Epilogue, Scales, gemm};
use super::math::Activation;
use super::norm::{Groups, apply, channel_sums, group_norm, layer_norm};
use super::packed::{Columns, Layout, Packed, Precision};
use super::rows::{Part, Rows, Window};

trait Tested: Element {
    const PRECISION: Precision;
    /// Share of an output that rounding may take.
    const STEP: f32;
}
impl Tested for f32 {
    const PRECISION: Precision = Precision::F32;
    const STEP: f32 = 0.0;
}
impl Tested for bf16 {
    const PRECISION: Precision = Precision::Bf16;
    const STEP: f32 = 1.0 / 256.0;
}

/// Uniform in -1..1, each a value of `bf16` and so of both types.
fn random<E: Element>(len: usize, seed: u64) -> Vec<E> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let x = (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
        E::from_f32(bf16::from_f32(x).to_f32())
    };
    std::iter::repeat_with(next).take(len).collect()
}

fn compare<E: Tested>(what: &str, got: &[E], want: &[f32], k: usize) {
    compare_with(what, got, want, (k, 1.0 / 16.0));
}

/// `least`: of the largest output, what counts at least when steps are taken.
fn compare_with<E: Tested>(what: &str, got: &[E], want: &[f32], (k, least): (usize, f32)) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    let largest = want.iter().fold(1e-3f32, |m, x| m.max(x.abs()));
    let order = 4e-6 * largest * (k as f32 / 64.0).sqrt().max(1.0);
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let off = (got.to_f32() - want).abs();
        let allowed = order + E::STEP * want.abs().max(largest * least);
        assert!(
            off <= allowed,
            "{what}: {} for {want} at {i}, off by {off:e}, allowed {allowed:e}",
            got.to_f32()
        );
    }
}

/// Runs `check` for each set the machine has, in both types.
fn everywhere(check32: impl Fn(Isa), check16: impl Fn(Isa)) {
    for isa in Isa::available() {
        check32(isa);
        check16(isa);
    }
}

#[derive(Debug, Clone, Copy)]
struct Product {
    m: usize,
    k: usize,
    n: usize,
    gated: bool,
    /// Which parts of the epilogue there are.
    parts: u8,
    activation: Activation,
}

fn linear<E: Tested>(isa: Isa, p: Product) -> Vec<E> {
    let columns = if p.gated {
        Columns::Geglu
    } else {
        Columns::Plain
    };
    let outputs = if p.gated { p.n / 2 } else { p.n };
    let weight: Vec<f32> = random(p.n * p.k, 2);
    let layout = Layout {
        precision: E::PRECISION,
        columns,
        run: p.k,
    };
    let packed = Packed::new(isa, &weight, p.n, layout);
    let (x, bias, slopes) = (
        random::<E>(p.m * p.k, 1),
        random::<f32>(p.n, 3),
        random::<f32>(outputs, 6),
    );
    let (residual, shift) = (
        random::<E>(p.m * outputs, 4),
        random::<E>(p.m.div_ceil(2) * outputs, 5),
    );
    let (row_scales, column_scales) = (random::<f32>(p.m, 7), random::<f32>(p.n, 8));
    let part = |bit: u8| p.parts & bit != 0;
    let epilogue = Epilogue {
        scales: part(16).then_some(Scales {
            rows: &row_scales,
            columns: &column_scales,
        }),
        bias: part(1).then_some(bias.as_slice()),
        residual: part(2).then_some(residual.as_slice()),
        row_bias: (part(4) && p.m.is_multiple_of(2)).then_some((shift.as_slice(), outputs)),
        rows_per_batch: 2,
        activation: p.activation,
        slopes: part(8).then_some(slopes.as_slice()),
    };
    let mut out = vec![E::from_f32(f32::NAN); p.m * outputs];
    gemm(Rows::Matrix(&x), &packed, epilogue, &mut out);
    out
}

fn convolution<E: Tested>(isa: Isa, widths: &[usize], n: usize, window: Window) -> Vec<E> {
    let pixels = window.batch * window.height * window.width;
    let parts: Vec<Vec<E>> = widths
        .iter()
        .map(|c| random(pixels * c, *c as u64))
        .collect();
    let slices: Vec<Part<'_, E>> = parts
        .iter()
        .map(Vec::as_slice)
        .zip(widths.iter().copied())
        .collect();
    let (c, taps) = (window.channels, window.kernel * window.kernel);
    let weight: Vec<f32> = random(n * c * taps, 9);
    let layout = Layout {
        precision: E::PRECISION,
        columns: Columns::Plain,
        run: c,
    };
    let packed = Packed::new(isa, &weight, n, layout);
    let rows = match slices[..] {
        [(x, _)] => Rows::Picture(x, window),
        _ => Rows::Pictures(&slices, window),
    };
    let len = window.batch * window.out_height * window.out_width * n;
    let mut out = vec![E::from_f32(f32::NAN); len];
    gemm(rows, &packed, Epilogue::default(), &mut out);
    out
}

#[derive(Debug, Clone, Copy)]
struct Attending {
    tokens: usize,
    keys: usize,
    shape: Shape,
}

fn attend<E: Tested>(isa: Isa, a: Attending) -> Vec<E> {
    let c = a.shape.heads * a.shape.head_dim;
    let [q, k, v] = [(a.tokens, 15), (a.keys, 16), (a.keys, 17)]
        .map(|(tokens, seed)| (random::<E>(a.shape.batch * tokens * c, seed), tokens));
    let view = |x: &'static [E], tokens| Heads {
        data: x,
        tokens,
        stride: c,
        offset: 0,
    };
    let mut out = vec![E::from_f32(f32::NAN); a.shape.batch * a.tokens * c];
    let [q, k, v] = [q, k, v].map(|(x, tokens)| view(x.leak(), tokens));
    attention(isa, q, k, v, a.shape, &mut out);
    out
}

fn norms<E: Tested>(isa: Isa, g: Groups) -> Vec<E> {
    let x: Vec<E> = random::<E>(g.batch * g.pixels * g.channels, 12)
        .iter()
        .map(|x| E::from_f32(bf16::from_f32(x.to_f32() + 2.0).to_f32()))
        .collect();
    let (weight, bias) = (random::<f32>(g.channels, 13), random::<f32>(g.channels, 14));
    let mut out = vec![E::from_f32(f32::NAN); 3 * x.len()];
    let (groups, rest) = out.split_at_mut(x.len());
    let (layers, strips) = rest.split_at_mut(x.len());
    group_norm(isa, &[(&x, g.channels)], &weight, &bias, g, groups);
    layer_norm(isa, &x, &weight, &bias, 1e-5, layers);
    let sums = channel_sums(isa, &x, &vec![2.0; g.channels]);
    let mean = sums[..g.channels]
        .iter()
        .map(|s| (s / (g.batch * g.pixels) as f64) as f32 + 2.0);
    let affine: Vec<f32> = mean.chain(weight.iter().copied()).collect();
    apply(isa, &x, &affine, &bias, g.silu, strips);
    out
}

fn activation() -> impl Strategy<Value = Activation> {
    prop::sample::select(vec![
        Activation::None,
        Activation::Silu,
        Activation::Gelu,
        Activation::QuickGelu,
        Activation::Relu,
        Activation::LeakyRelu,
    ])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 2 } else { 48 }))]

    #[test]
    fn products_agree(
        (m, k, half_n) in (1usize..60, 1usize..200, 1usize..50),
        long in prop::bool::weighted(0.1),
        gated: bool,
        parts in 0u8..32,
        activation in activation(),
    ) {
        // A long sum is cut into blocks whose parts wait in between.
        let (m, k) = if long && !cfg!(miri) { (m.min(26), k + 4000) } else { (m, k) };
        let p = Product { m, k, n: half_n * 2, gated, parts, activation };
        let want: Vec<f32> = linear(Isa::Portable, p);
        everywhere(
            |isa| compare(&format!("{isa:?} {p:?}"), &linear::<f32>(isa, p), &want, k),
            |isa| compare(&format!("{isa:?} {p:?}"), &linear::<bf16>(isa, p), &want, k),
        );
    }

    #[test]
    fn convolutions_agree(
        widths in prop::collection::vec(1usize..40, 1..4),
        (batch, height, width, n) in (1usize..3, 2usize..8, 2usize..8, 1usize..70),
        kernel in prop::sample::select(vec![1usize, 3]),
        (stride, upsample) in (1usize..3, 1usize..3),
        circular: bool,
    ) {
        let pad = kernel / 2;
        let reach = |len: usize| (len * upsample + 2 * pad - kernel) / stride + 1;
        let channels: usize = widths.iter().sum();
        let window = Window {
            batch, height, width, channels, kernel, stride, pad, upsample, circular,
            out_height: reach(height),
            out_width: reach(width),
        };
        let want: Vec<f32> = convolution(Isa::Portable, &widths, n, window);
        let k = channels * kernel * kernel;
        let what = |isa| format!("{isa:?} {widths:?} to {n} {window:?}");
        everywhere(
            |isa| compare(&what(isa), &convolution::<f32>(isa, &widths, n, window), &want, k),
            |isa| compare(&what(isa), &convolution::<bf16>(isa, &widths, n, window), &want, k),
        );
    }

    #[test]
    fn attention_agrees(
        (tokens, keys) in (1usize..200, 1usize..330),
        (batch, heads, head_dim) in (1usize..3, 1usize..3, 1usize..90),
        causal: bool,
    ) {
        let (tokens, keys) = if cfg!(miri) { (tokens % 9 + 1, keys % 9 + 1) } else { (tokens, keys) };
        let keys = if causal { tokens } else { keys };
        let a = Attending { tokens, keys, shape: Shape { batch, heads, head_dim, causal } };
        let want: Vec<f32> = attend(Isa::Portable, a);
        everywhere(
            |isa| compare(&format!("{isa:?} {a:?}"), &attend::<f32>(isa, a), &want, keys),
            |isa| compare_with(&format!("{isa:?} {a:?}"), &attend::<bf16>(isa, a), &want, (keys, 2.0)),
        );
    }

    #[test]
    fn norms_agree(
        (batch, pixels) in (1usize..3, 1usize..150),
        (count, per_group) in (1usize..9, 1usize..14),
        silu: bool,
    ) {
        let channels = count * per_group;
        let g = Groups { batch, pixels, channels, count, eps: 1e-5, silu };
        // A variance of nearly nothing is divided by: what is left is noise.
        prop_assume!(channels >= 8 && per_group * pixels >= 16);
        let want: Vec<f32> = norms(Isa::Portable, g);
        everywhere(
            |isa| compare(&format!("{isa:?} {g:?}"), &norms::<f32>(isa, g), &want, pixels * 64),
            |isa| compare(&format!("{isa:?} {g:?}"), &norms::<bf16>(isa, g), &want, pixels * 64),
        );
    }

    #[test]
    fn values_are_narrowed_to_the_nearest_ties_to_even(bits in prop::array::uniform16(any::<u32>()), n in 1usize..16) {
        let x = bits.map(f32::from_bits);
        for isa in Isa::available() {
            let n = n.min(isa.lanes());
            let mut got = [bf16::ZERO; 16];
            isa.run(Narrow { x: &x, out: &mut got, n });
            for (x, got) in x.iter().zip(got).take(n) {
                let want = bf16::from_f32(*x);
                // The instruction takes what is below the least normal number for zero.
                let tiny = x.is_subnormal() && got.to_f32() == 0.0;
                prop_assert!(
                    got == want || tiny || (got.is_nan() && want.is_nan()),
                    "{isa:?}: {got} for {x:e}, wanted {want}"
                );
            }
            prop_assert!(got[n..].iter().all(|x| *x == bf16::ZERO), "{isa:?}: lanes past {n} were written");
        }
    }
}

struct Narrow<'a> {
    x: &'a [f32; 16],
    out: &'a mut [bf16; 16],
    n: usize,
}

impl super::Kernel for Narrow<'_> {
    type Out = ();

    #[inline(always)]
    #[allow(unsafe_code, reason = "calls the methods under test")]
    fn run<S: super::simd::Simd>(self) {
        // SAFETY: both arrays hold 16 values, no vector has more lanes.
        unsafe { bf16::store_up_to::<S>(self.out.as_mut_ptr(), S::load(self.x.as_ptr()), self.n) };
    }
}
