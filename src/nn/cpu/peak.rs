//! What the machine has to give: the micro-kernel on operands that stay in the nearest cache, nothing read or written besides.
#![allow(
    unsafe_code,
    reason = "micro-kernel on raw pointers into whole buffers"
)]

use std::hint::black_box;
use std::time::Instant;

use half::bf16;

use super::element::Element;
use super::gemm::{NV, micro};
use super::packed::Precision;
use super::simd::Simd;
use super::{Isa, Kernel};

/// Groups of factors of one product.
const GROUPS: usize = 128;
/// Products of one measurement: a millisecond or two.
const ROUNDS: usize = 1000;
const TRIES: usize = 50;
const MOST_ROWS: usize = 12;

/// Floating-point operations a second of all threads together, a multiply-add counting two: the best of several tries, since
/// others may be at work.
#[must_use]
pub fn peak(precision: Precision) -> f64 {
    let once = || match precision {
        Precision::F32 => Isa::chosen().run(Peak(&f32::default())),
        Precision::Bf16 => Isa::chosen().run(Peak(&bf16::default())),
    };
    (0..TRIES)
        .map(|_| rayon::broadcast(|_| once()).into_iter().sum())
        .fold(0.0, f64::max)
}

/// One measurement on this thread, of the type of its value.
struct Peak<'a, E>(&'a E);

impl<E: Element> Kernel for Peak<'_, E> {
    type Out = f64;

    #[inline(always)]
    fn run<S: Simd>(self) -> f64 {
        let a = vec![*self.0; MOST_ROWS * GROUPS * E::GROUP];
        let b = vec![*self.0; GROUPS * E::GROUP * NV * S::LANES];
        // SAFETY: `a` holds as many rows as any set asks for, `b` one panel.
        unsafe {
            match S::MR {
                12 => rate::<S, E, 12>(&a, &b),
                8 => rate::<S, E, 8>(&a, &b),
                6 => rate::<S, E, 6>(&a, &b),
                _ => rate::<S, E, 4>(&a, &b),
            }
        }
    }
}

#[inline(always)]
unsafe fn rate<S: Simd, E: Element, const MR: usize>(a: &[E], b: &[E]) -> f64 {
    let start = Instant::now();
    for _ in 0..ROUNDS {
        // SAFETY: see `run`.
        unsafe {
            let mut acc = [[S::splat(0.0); NV]; MR];
            let a = black_box(a).as_ptr();
            let rows = std::array::from_fn(|i| a.wrapping_add(i * GROUPS * E::GROUP));
            micro::<S, E, MR>(&rows, b.as_ptr(), GROUPS, &mut acc);
            black_box(&acc);
        }
    }
    let operations = 2 * MR * NV * S::LANES * GROUPS * E::GROUP * ROUNDS;
    operations as f64 / start.elapsed().as_secs_f64()
}
