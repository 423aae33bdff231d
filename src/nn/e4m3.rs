//! The 8-bit float e4m3 (1 sign, 4 exponent, 3 mantissa bits, largest value 448, no infinity), and rows of it with a scale each.
//!
//! Invariant: the same numbers as `kernels/e4m3.cuh`, bit by bit: a row's scale is its largest magnitude over 448, a code the
//! nearest to value / scale, of two the even one; what is too large becomes 448, NaN stays NaN.
//! Source: OCP 8-bit Floating Point Specification, revision 1.0, section 5.

use rayon::prelude::*;

use super::block_cache::buffer;
use super::cpu::element::Element;

/// The largest value.
const LARGEST: f32 = 448.0;
/// Added to a magnitude below 2^-6 it rounds it to steps of 2^-9, which are the last bit of values from 2^14 on.
const TO_STEPS: f32 = 16_384.0;
/// Bits of an f32's mantissa that do not fit.
const LOST: u32 = 23 - 3;

/// The nearest value that e4m3 has.
fn rounded(x: f32) -> f32 {
    let magnitude = x.abs();
    let rounded = if magnitude < 1.0 / 64.0 {
        (magnitude + TO_STEPS) - TO_STEPS
    } else {
        let bits = magnitude.to_bits();
        let even = bits >> LOST & 1;
        let bits = bits.wrapping_add((1 << (LOST - 1)) - 1 + even) & !((1 << LOST) - 1);
        // `clamp` keeps NaN, which adding and cutting bits may have turned into anything.
        if magnitude.is_nan() {
            magnitude
        } else {
            f32::from_bits(bits).clamp(0.0, LARGEST)
        }
    };
    rounded.copysign(x)
}

/// The code of a value that e4m3 has.
fn code(value: f32) -> u8 {
    let sign = u8::from(value.is_sign_negative()) << 7;
    let magnitude = value.abs();
    if magnitude.is_nan() {
        return 0x7f;
    }
    let code = if magnitude < 1.0 / 64.0 {
        (magnitude * 512.0) as u8
    } else {
        // The exponent's bias goes from 127 to 7.
        ((magnitude.to_bits() >> LOST) - (120 << 3)) as u8
    };
    sign | code
}

/// What a row is divided by so that its largest magnitude becomes 448; a row of zeros keeps 1.
fn scale<E: Element>(row: &[E]) -> f32 {
    let largest = row.iter().fold(0f32, |most, x| most.max(x.to_f32().abs()));
    let scale = largest / LARGEST;
    if scale > 0.0 { scale } else { 1.0 }
}

/// Each row of `inputs` values over its scale, rounded, and the scales. Values of e4m3 are exact in every wider type.
pub(super) fn quantised<E: Element>(rows: &[E], inputs: usize) -> (Vec<E>, Vec<f32>) {
    let inputs = inputs.max(1);
    let (mut values, mut scales) = (buffer(rows.len()), vec![1f32; rows.len() / inputs]);
    values
        .par_chunks_exact_mut(inputs)
        .zip(rows.par_chunks_exact(inputs))
        .zip(&mut scales)
        .for_each(|((values, row), scale)| {
            *scale = self::scale(row);
            for (value, x) in values.iter_mut().zip(row) {
                *value = E::from_f32(rounded(x.to_f32() / *scale));
            }
        });
    (values, scales)
}

/// The codes of [`quantised`] values.
pub(super) fn codes(values: &[f32]) -> Vec<u8> {
    values.par_iter().map(|value| code(*value)).collect()
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Tensor};

    use super::*;

    /// The value of a code, from the format's definition.
    fn value(code: u8) -> f32 {
        let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
        let magnitude = match (exponent, code & 0x7f) {
            (_, 0x7f) => f32::NAN,
            (0, _) => mantissa / 512.0,
            _ => (8.0 + mantissa) * (exponent as f32 - 10.0).exp2(),
        };
        magnitude.copysign(if code < 0x80 { 1.0 } else { -1.0 })
    }

    #[test]
    fn every_code_is_a_value_that_stays_itself() {
        for expected in 0..=u8::MAX {
            let value = value(expected);
            if value.is_nan() {
                assert!(rounded(value).is_nan());
                assert_eq!(code(value), 0x7f, "one NaN of the two");
            } else {
                assert_eq!(rounded(value).to_bits(), value.to_bits(), "{expected:#x}");
                assert_eq!(code(value), expected, "{value}");
            }
        }
    }

    /// candle's conversion is another implementation, table-driven and in `f64`.
    #[test]
    fn rounding_is_that_of_another_implementation() {
        let values: Vec<f32> = (0..0x7f).map(value).collect();
        let ties = values.windows(2).map(|w| f32::midpoint(w[0], w[1]));
        let mut x: Vec<f32> = ties
            .flat_map(|tie| [tie.next_down(), tie, tie.next_up()])
            .chain([464.0, 465.0, 1e9, f32::MAX, f32::MIN_POSITIVE, 1e-45])
            .collect();
        // Logarithmically through all magnitudes that matter.
        x.extend((0..20_000).map(|i| (i as f32 / 1000.0 - 10.5).exp2()));
        x.extend(x.clone().iter().map(|x| -x));
        let other = Tensor::from_slice(&x, x.len(), &Device::Cpu).unwrap();
        let other = other.to_dtype(DType::F8E4M3).unwrap();
        let other: Vec<f32> = other.to_dtype(DType::F32).unwrap().to_vec1().unwrap();
        for (x, want) in x.iter().zip(other) {
            let got = rounded(*x);
            assert!(got.to_bits() == want.to_bits(), "{x:e}: {got} for {want}");
            assert_eq!(value(code(got)).to_bits(), got.to_bits());
        }
        assert_eq!(
            rounded(f32::INFINITY).to_bits(),
            448f32.to_bits(),
            "saturates"
        );
        assert_eq!(rounded(-f32::INFINITY).to_bits(), (-448f32).to_bits());
    }

    #[test]
    fn a_row_has_the_scale_of_its_largest_value() {
        let rows = [0.0, 0.0, 0.0, 1.0, -896.0, 3.0, 1e-44, 0.0, 0.0];
        let (values, scales) = quantised(&rows, 3);
        assert_eq!(scales, [1.0, 2.0, 1.0], "no scale of 0");
        assert_eq!(values, [0.0, 0.0, 0.0, 0.5, -448.0, 1.5, 0.0, 0.0, 0.0]);
        let (values, _) = quantised(&[1.0, f32::NAN], 2);
        assert!(values[0].is_finite() && values[1].is_nan());
    }
}
