//! Sums of a few tensors, as samplers take them between two calls of a network.

use candle_core::{DType, Result, Tensor, bail};

use super::cuda;

/// Terms that one pass sums.
pub const MOST_TERMS: usize = 8;

/// `sum of c * x` over 1 to 8 tensors of `f32` of one shape and device.
///
/// # Errors
/// On another number of terms, and on tensors that do not belong together.
pub fn combine(terms: &[(f32, &Tensor)]) -> Result<Tensor> {
    let [(c, first), rest @ ..] = terms else {
        bail!("a sum without terms")
    };
    let is_like = |x: &Tensor| x.dtype() == DType::F32 && x.shape() == first.shape();
    if terms.len() > MOST_TERMS || !terms.iter().all(|(_, x)| is_like(x)) {
        let shapes: Vec<_> = terms.iter().map(|(_, x)| (x.shape(), x.dtype())).collect();
        bail!("no sum of {shapes:?}")
    }
    if let Some(sum) = cuda::combine(terms) {
        return sum;
    }
    let begin = first.affine(f64::from(*c), 0.0)?;
    rest.iter()
        .try_fold(begin, |sum, (c, x)| sum + x.affine(f64::from(*c), 0.0)?)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn tensors_are_summed_with_their_factors() {
        let x = |value: f32| Tensor::full(value, (2, 3), &Device::Cpu).unwrap();
        let (a, b) = (x(1.0), x(10.0));
        let sum = combine(&[(2.0, &a), (-0.5, &b)]).unwrap();
        assert_eq!(sum.to_vec2::<f32>().unwrap(), [[-3.0; 3]; 2]);
        assert!(combine(&[]).is_err());
        assert!(combine(&[(1.0, &a); 9]).is_err());
        assert!(combine(&[(1.0, &a), (1.0, &a.flatten_all().unwrap())]).is_err());
    }
}
