//! Philox4x32-10 with Box-Muller, one counter per element: the normals of `torch.randn` on CUDA.
//!
//! Element `j` of call `c` uses counter `(c, 0, j, 0)`; two of the four output words make one number and two are dropped.
//! Sources: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011); cuRAND's `curand_normal4`.

const MULTIPLIERS: (u32, u32) = (0xD2511F53, 0xCD9E8D57);
const WEYL: (u32, u32) = (0x9E3779B9, 0xBB67AE85);
const ROUNDS: usize = 10;

/// cuRAND's single-precision constants: 2^-32 and 2 pi 2^-32.
const TO_UNIT: f32 = 2.3283064e-10;
const TO_ANGLE: f32 = 2.3283064e-10 * 6.2831855;

/// Ten rounds of Philox4x32.
#[must_use]
pub fn philox4x32(mut counter: [u32; 4], mut key: (u32, u32)) -> [u32; 4] {
    for round in 0..ROUNDS {
        if round > 0 {
            key = (key.0.wrapping_add(WEYL.0), key.1.wrapping_add(WEYL.1));
        }
        let p0 = u64::from(MULTIPLIERS.0) * u64::from(counter[0]);
        let p1 = u64::from(MULTIPLIERS.1) * u64::from(counter[2]);
        counter = [
            (p1 >> 32) as u32 ^ counter[1] ^ key.0,
            p1 as u32,
            (p0 >> 32) as u32 ^ counter[3] ^ key.1,
            p0 as u32,
        ];
    }
    counter
}

/// The `n` normals of call number `call` on a generator seeded with `seed`.
pub(super) fn normals(seed: u64, call: u32, n: usize) -> Vec<f32> {
    let key = (seed as u32, (seed >> 32) as u32);
    let (unit, angle) = (f64::from(TO_UNIT), f64::from(TO_ANGLE));
    let element = |j: usize| {
        let [g0, g1, ..] = philox4x32([call, 0, j as u32, 0], key);
        let u = f64::from(g0) * unit + unit / 2.0;
        let v = f64::from(g1) * angle + angle / 2.0;
        ((-2.0 * u.ln()).sqrt() * v.sin()) as f32
    };
    (0..n).map(element).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answers_of_random123() {
        assert_eq!(
            philox4x32([0; 4], (0, 0)),
            [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]
        );
        let ones = u32::MAX;
        assert_eq!(
            philox4x32([ones; 4], (ones, ones)),
            [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]
        );
    }
}
