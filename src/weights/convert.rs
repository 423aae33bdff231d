//! Stored number formats to `f32`, in parallel over big tensors.

use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;
use safetensors::Dtype;

/// Values converted at a time: fits the L1 cache in both forms.
const BLOCK: usize = 4096;

/// Bytes of one value, for the types that can be computed with.
pub(super) fn width(dtype: Dtype) -> Option<usize> {
    match dtype {
        Dtype::F32 => Some(4),
        Dtype::F16 | Dtype::BF16 => Some(2),
        Dtype::F8_E4M3 => Some(1),
        _ => None,
    }
}

/// Converts `bytes` (little endian, any alignment); the flag says whether all values are finite.
pub(super) fn to_f32(dtype: Dtype, bytes: &[u8]) -> Option<(Vec<f32>, bool)> {
    let width = width(dtype)?;
    let mut out = crate::nn::block_cache::buffer(bytes.len() / width);
    let finite = out
        .par_chunks_mut(BLOCK)
        .zip(bytes.par_chunks(BLOCK * width))
        .map(|(out, bytes)| {
            block(dtype, bytes, out);
            out.iter().fold(true, |all, x| all & x.is_finite())
        })
        .reduce(|| true, |a, b| a & b);
    Some((out, finite))
}

/// One value of a type that weights do not have: integers, flags, `f64`.
pub(super) fn number(dtype: Dtype, bytes: &[u8]) -> Option<f32> {
    let mut wide = [0; 8];
    wide.get_mut(..bytes.len())?.copy_from_slice(bytes);
    let bits = u64::from_le_bytes(wide);
    Some(match dtype {
        Dtype::BOOL | Dtype::U8 | Dtype::U16 | Dtype::U32 | Dtype::U64 => bits as f32,
        Dtype::I8 => f32::from(bits as i8),
        Dtype::I16 => f32::from(bits as i16),
        Dtype::I32 => bits as i32 as f32,
        Dtype::I64 => bits as i64 as f32,
        Dtype::F64 => f64::from_bits(bits) as f32,
        _ => return None,
    })
}

fn block(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        Dtype::F16 => {
            let mut halves = [half::f16::ZERO; BLOCK];
            let halves = &mut halves[..out.len()];
            for (h, b) in halves.iter_mut().zip(bytes.chunks_exact(2)) {
                *h = half::f16::from_le_bytes([b[0], b[1]]);
            }
            halves.convert_to_f32_slice(out);
        }
        Dtype::BF16 => {
            for (x, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *x = half::bf16::from_le_bytes([b[0], b[1]]).to_f32();
            }
        }
        Dtype::F8_E4M3 => out
            .iter_mut()
            .zip(bytes)
            .for_each(|(x, b)| *x = e4m3_to_f32(*b)),
        _ => {
            for (x, b) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                *x = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            }
        }
    }
}

/// FP8 E4M3 "FN" (Micikevicius et al. 2022): bias 7, no infinities, `S.1111.111` is NaN, subnormals `m * 2^-9`.
fn e4m3_to_f32(byte: u8) -> f32 {
    let sign = if byte & 0x80 == 0 { 1.0 } else { -1.0 };
    let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f32::from(byte & 7));
    if byte & 0x7f == 0x7f {
        f32::NAN
    } else if exponent == 0 {
        sign * mantissa / 512.0
    } else {
        sign * (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e4m3_extremes_and_subnormals_have_their_published_values() {
        // Table 1 of "FP8 Formats for Deep Learning": max normal 448, min normal 2^-6, min subnormal 2^-9.
        for (byte, value) in [
            (0x7e, 448.0),
            (0x08, 2f32.powi(-6)),
            (0x01, 2f32.powi(-9)),
            (0xb8, -1.0),
            (0x00, 0.0),
        ] {
            assert_eq!(
                e4m3_to_f32(byte).to_bits(),
                f32::to_bits(value),
                "{byte:#x}"
            );
        }
        assert!(e4m3_to_f32(0xff).is_nan() && e4m3_to_f32(0x7f).is_nan());
    }

    #[test]
    fn numbers_of_other_types_are_read() {
        for (dtype, bytes, value) in [
            (Dtype::BOOL, vec![1], 1.0),
            (Dtype::I64, (-16i64).to_le_bytes().to_vec(), -16.0),
            (Dtype::I8, vec![0xff], -1.0),
            (Dtype::F64, 0.5f64.to_le_bytes().to_vec(), 0.5),
        ] {
            assert_eq!(number(dtype, &bytes), Some(value), "{dtype:?}");
        }
        assert_eq!(number(Dtype::F32, &[0; 4]), None);
    }

    #[test]
    fn every_stored_type_gives_its_values_back_at_any_alignment() {
        let values: Vec<f32> = (0..9000).map(|i| (i % 97) as f32 / 8.0 - 6.0).collect();
        let f32s: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let f16s: Vec<u8> = values
            .iter()
            .flat_map(|v| half::f16::from_f32(*v).to_le_bytes())
            .collect();
        let bf16s: Vec<u8> = values
            .iter()
            .flat_map(|v| half::bf16::from_f32(*v).to_le_bytes())
            .collect();
        for (dtype, bytes) in [(Dtype::F32, f32s), (Dtype::F16, f16s), (Dtype::BF16, bf16s)] {
            let mut shifted = vec![0u8];
            shifted.extend(&bytes);
            let (got, finite) = to_f32(dtype, &shifted[1..]).expect("supported");
            assert!(
                finite && got == values,
                "{dtype:?}: eighths up to 6 are exact in every type"
            );
        }
        assert!(to_f32(Dtype::I64, &[0; 8]).is_none());
        let (_, finite) = to_f32(Dtype::F16, &half::f16::NAN.to_le_bytes()).expect("supported");
        assert!(!finite);
    }
}
