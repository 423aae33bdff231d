//! `exp`, `erf` and the activations built on them, over any [`Simd`].
//!
//! Measured against `f64` in the tests below: `exp` 2 ulp relative, `erf` 3e-7 absolute.
#![allow(
    unsafe_code,
    reason = "calls of `Simd` methods; the instruction set is the caller's promise"
)]

use super::element::Element;
use super::simd::Simd;

/// A function applied to each output of a linear layer or convolution.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Activation {
    /// Identity.
    #[default]
    None,
    /// `x * sigmoid(x)`.
    Silu,
    /// `x * Phi(x)`, exact (erf).
    Gelu,
    /// `x * sigmoid(1.702 x)`, CLIP-L's.
    QuickGelu,
    /// `max(x, 0)`.
    Relu,
    /// `max(x, x / 5)`, ESRGAN's.
    LeakyRelu,
}

/// `e^x`; 0 below -87, saturating above 88.
#[inline(always)]
pub(crate) unsafe fn exp<S: Simd>(x: S::V) -> S::V {
    // SAFETY: register arithmetic only.
    unsafe {
        // Cody-Waite reduction to |r| <= ln2/2, then the degree-6 Taylor-like minimax polynomial (Cephes expf).
        let x = S::max(S::min(x, S::splat(88.0)), S::splat(-87.3));
        let n = S::round(S::mul(x, S::splat(std::f32::consts::LOG2_E)));
        let r = S::fma(n, S::splat(-0.693_359_375), x);
        let r = S::fma(n, S::splat(2.121_944_4e-4), r);
        let mut p = S::splat(1.987_569_15e-4);
        for c in [
            1.398_199_95e-3,
            8.333_451_9e-3,
            4.166_579_6e-2,
            1.666_666_55e-1,
            5.000_000_1e-1,
        ] {
            p = S::fma(p, r, S::splat(c));
        }
        let p = S::fma(S::mul(p, r), r, S::add(r, S::splat(1.0)));
        S::scale_by_power(p, n)
    }
}

/// `2^x` for `x <= 0` to the precision of `E`; the least power there is below -126.
///
/// Minimax polynomials of the fraction in -1/2..=1/2 (Lawson's iteration on the relative error): 8e-8 for `f32`, 8e-5 for `bf16`,
/// whose own step is 4e-3.
#[inline(always)]
pub(crate) unsafe fn exp2_of_negative<S: Simd, E: Element>(x: S::V) -> S::V {
    const LONG: [f32; 6] = [
        1.327_647_2e-3,
        9.675_541e-3,
        5.550_713_3e-2,
        2.402_212e-1,
        6.931_469_7e-1,
        1.0,
    ];
    const SHORT: [f32; 4] = [5.517_166_5e-2, 2.426_111_2e-1, 6.932_61e-1, 9.999_280_7e-1];
    // SAFETY: register arithmetic only.
    unsafe {
        let x = S::max(x, S::splat(-126.0));
        let n = S::round(x);
        let fraction = S::sub(x, n);
        let factors: &[f32] = if E::GROUP == 1 { &LONG } else { &SHORT };
        let mut p = S::splat(factors[0]);
        for c in &factors[1..] {
            p = S::fma(p, fraction, S::splat(*c));
        }
        S::scale_by_power(p, n)
    }
}

/// The error function, by the rational approximation `x P(x²)/Q(x²)` on [-4, 4].
#[inline(always)]
pub(crate) unsafe fn erf<S: Simd>(x: S::V) -> S::V {
    // SAFETY: register arithmetic only.
    unsafe {
        let x = S::max(S::min(x, S::splat(4.0)), S::splat(-4.0));
        let z = S::mul(x, x);
        let mut p = S::splat(-2.726_142_3e-10);
        for c in [
            2.770_681_4e-8,
            -2.101_024e-6,
            -5.692_506_4e-5,
            -7.349_906_3e-4,
            -2.954_599_8e-3,
            -1.609_603_3e-2,
        ] {
            p = S::fma(p, z, S::splat(c));
        }
        let mut q = S::splat(-1.456_607_2e-5);
        for c in [
            -2.133_740_5e-4,
            -1.682_827e-3,
            -7.373_329e-3,
            -1.426_473_9e-2,
        ] {
            q = S::fma(q, z, S::splat(c));
        }
        S::div(S::mul(x, p), q)
    }
}

#[inline(always)]
pub(crate) unsafe fn silu<S: Simd>(x: S::V) -> S::V {
    // SAFETY: register arithmetic only.
    unsafe { S::div(x, S::add(S::splat(1.0), exp::<S>(S::sub(S::splat(0.0), x)))) }
}

#[inline(always)]
pub(crate) unsafe fn gelu<S: Simd>(x: S::V) -> S::V {
    // SAFETY: register arithmetic only.
    unsafe {
        let half = S::mul(x, S::splat(0.5));
        S::fma(
            half,
            erf::<S>(S::mul(x, S::splat(std::f32::consts::FRAC_1_SQRT_2))),
            half,
        )
    }
}

#[inline(always)]
pub(crate) unsafe fn activate<S: Simd>(activation: Activation, x: S::V) -> S::V {
    // SAFETY: register arithmetic only.
    unsafe {
        match activation {
            Activation::None => x,
            Activation::Silu => silu::<S>(x),
            Activation::Gelu => gelu::<S>(x),
            Activation::QuickGelu => {
                let e = exp::<S>(S::mul(x, S::splat(-1.702)));
                S::div(x, S::add(S::splat(1.0), e))
            }
            Activation::Relu => S::max(x, S::splat(0.0)),
            Activation::LeakyRelu => S::max(x, S::mul(x, S::splat(0.2))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Isa, Kernel};
    use super::*;

    struct Map<'a>(&'a [f32], &'a mut [f32], bool);
    impl Kernel for Map<'_> {
        type Out = ();
        #[inline(always)]
        fn run<S: Simd>(self) {
            let chunks = self
                .0
                .chunks_exact(S::LANES)
                .zip(self.1.chunks_exact_mut(S::LANES));
            for (x, y) in chunks {
                // SAFETY: both chunks hold LANES values.
                unsafe {
                    let v = S::load(x.as_ptr());
                    S::store(
                        y.as_mut_ptr(),
                        if self.2 { erf::<S>(v) } else { exp::<S>(v) },
                    );
                }
            }
        }
    }

    /// erf by its Maclaurin series in f64 (converges for |x| <= 4 well below f32's resolution).
    fn erf64(x: f64) -> f64 {
        let (mut term, mut sum) = (x, x);
        for n in 1..200 {
            term *= -x * x / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        sum * 2.0 / std::f64::consts::PI.sqrt()
    }

    #[test]
    fn exp_and_erf_hold_their_stated_error_on_every_isa() {
        let x: Vec<f32> = (0..16_000)
            .map(|i| (i as f32 / 16_000.0 - 0.5) * 8.0)
            .collect();
        let wide: Vec<f32> = x.iter().map(|x| x * 21.0).collect();
        for isa in Isa::available() {
            let mut y = vec![0f32; x.len()];
            isa.run(Map(&wide, &mut y, false));
            let worst = wide
                .iter()
                .zip(&y)
                .map(|(x, y)| ((f64::from(*y) / f64::from(*x).exp()) - 1.0).abs())
                .fold(0.0, f64::max);
            assert!(worst < 3e-7, "{isa:?}: exp off by {worst:e}");
            isa.run(Map(&x, &mut y, true));
            let worst = x
                .iter()
                .zip(&y)
                .map(|(x, y)| (f64::from(*y) - erf64(f64::from(*x))).abs())
                .fold(0.0, f64::max);
            assert!(worst < 4e-7, "{isa:?}: erf off by {worst:e}");
        }
    }
}
