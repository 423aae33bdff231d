//! Torch's CPU generator: MT19937 words turned into normal numbers by two different Box-Muller paths.
//!
//! Fewer than 16 numbers come from doubles, one at a time, with the second of each pair kept for the next call; 16 or more
//! come in blocks of 16 single-precision uniforms, and a partial last block is redrawn whole over the last 16 places.
//! Source: Matsumoto and Nishimura (1998) for the words, `ATen`'s `DistributionTemplates.h` (`normal_fill`) for the rest.

use std::f64::consts::TAU;

const STATE: usize = 624;
const SHIFT: usize = 397;
/// Elements from which torch fills in blocks; also the block's length.
const BLOCK: usize = 16;

/// The Mersenne Twister with torch's way of drawing normals.
#[derive(Debug, Clone)]
pub struct Mt19937 {
    state: [u32; STATE],
    position: usize,
    /// The sine branch of the last pair drawn by the short path.
    spare: Option<f32>,
}

impl Mt19937 {
    /// Seeds by `init_genrand`.
    #[must_use]
    pub fn new(seed: u32) -> Self {
        let mut state = [seed; STATE];
        for i in 1..STATE {
            let previous = state[i - 1];
            state[i] = 1812433253u32
                .wrapping_mul(previous ^ (previous >> 30))
                .wrapping_add(i as u32);
        }
        Self {
            state,
            position: STATE,
            spare: None,
        }
    }

    /// The next tempered 32-bit word.
    pub fn next_word(&mut self) -> u32 {
        if self.position == STATE {
            self.twist();
        }
        let mut y = self.state[self.position];
        self.position += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9D2C5680;
        y ^= (y << 15) & 0xEFC60000;
        y ^ (y >> 18)
    }

    fn twist(&mut self) {
        for i in 0..STATE {
            let y = (self.state[i] & 0x80000000) | (self.state[(i + 1) % STATE] & 0x7FFFFFFF);
            let odd = if y & 1 == 1 { 0x9908B0DF } else { 0 };
            self.state[i] = self.state[(i + SHIFT) % STATE] ^ (y >> 1) ^ odd;
        }
        self.position = 0;
    }

    /// One `torch.randn` call of `n` elements.
    pub fn normals(&mut self, n: usize) -> Vec<f32> {
        if n < BLOCK {
            (0..n).map(|_| self.normal()).collect()
        } else {
            self.fill(n)
        }
    }

    /// The path of 16 or more elements.
    fn fill(&mut self, n: usize) -> Vec<f32> {
        let mut values: Vec<f32> = (0..n).map(|_| self.uniform24()).collect();
        let full_blocks = values.chunks_exact_mut(BLOCK);
        full_blocks.for_each(box_muller);
        if !n.is_multiple_of(BLOCK) {
            let tail = &mut values[n - BLOCK..];
            tail.fill_with(|| self.uniform24());
            box_muller(tail);
        }
        values
    }

    /// The path of fewer than 16 elements, one number.
    fn normal(&mut self) -> f32 {
        if let Some(spare) = self.spare.take() {
            return spare;
        }
        let angle = TAU * self.uniform53();
        let radius = (-2.0 * (-self.uniform53()).ln_1p()).sqrt();
        self.spare = Some((radius * angle.sin()) as f32);
        (radius * angle.cos()) as f32
    }

    /// Uniform in [0, 1) with 24 bits.
    fn uniform24(&mut self) -> f32 {
        (self.next_word() & 0xFFFFFF) as f32 * (1.0 / 16777216.0)
    }

    /// Uniform in [0, 1) with 53 bits; the first word is the high one.
    fn uniform53(&mut self) -> f64 {
        let word = (u64::from(self.next_word()) << 32) | u64::from(self.next_word());
        (word & ((1 << 53) - 1)) as f64 * (0.5f64).powi(53)
    }
}

/// Turns 8 radii and 8 angles, all uniform, into 16 normals in place.
fn box_muller(block: &mut [f32]) {
    let (radii, angles) = block.split_at_mut(BLOCK / 2);
    for (u1, u2) in radii.iter_mut().zip(angles) {
        let radius = (-2.0 * f64::from(1.0 - *u1).ln()).sqrt();
        let angle = TAU * f64::from(*u2);
        *u1 = (radius * angle.cos()) as f32;
        *u2 = (radius * angle.sin()) as f32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_seed_5489_are_the_published_ones() {
        // The reference implementation's default seed; 10 000th output 4123659995 (C++ standard, [rand.predef]).
        let mut mt = Mt19937::new(5489);
        assert_eq!(mt.next_word(), 3499211612);
        assert_eq!(
            (2..=10_000).map(|_| mt.next_word()).last(),
            Some(4123659995)
        );
    }

    #[test]
    fn a_partial_block_overwrites_the_last_sixteen() {
        let mut mt = Mt19937::new(0);
        let whole = Mt19937::new(0).normals(16);
        let values = mt.normals(20);
        assert_eq!(values[..4], whole[..4]);
        assert_ne!(values[4..16], whole[4..]);
    }
}
