//! `NumPy`'s `SeedSequence` with a pool of 24 words, as torchsde uses it to seed the nodes of a Brownian tree.
//!
//! Source: O'Neill's `seed_seq_fe` (2015) in `NumPy`'s variant, `numpy/random/bit_generator.pyx`.

/// Words of entropy pool; `NumPy`'s default is 4, torchsde asks for 24.
const POOL: usize = 24;

/// A mixed entropy pool from which seeds are generated.
#[derive(Debug, Clone)]
pub struct SeedSequence {
    pool: [u32; POOL],
}

impl SeedSequence {
    /// Mixes the entropy. An empty `spawn_key` means the root sequence.
    #[must_use]
    pub fn new(entropy: u64, spawn_key: &[u64]) -> Self {
        let mut words = to_words(entropy);
        if !spawn_key.is_empty() {
            words.resize(POOL.max(words.len()), 0);
            words.extend(spawn_key.iter().flat_map(|&key| to_words(key)));
        }
        Self {
            pool: mix_entropy(&words),
        }
    }

    /// The first `n` words of the generated state.
    #[must_use]
    pub fn generate_state(&self, n: usize) -> Vec<u32> {
        let mut hash = 0x8b51f9ddu32;
        let next = |&word: &u32| {
            let mut value = word ^ hash;
            hash = hash.wrapping_mul(0x58f38ded);
            value = value.wrapping_mul(hash);
            value ^ (value >> 16)
        };
        self.pool.iter().cycle().take(n).map(next).collect()
    }
}

/// Little-endian 32-bit words without leading zeros; 0 is one word.
fn to_words(value: u64) -> Vec<u32> {
    let (low, high) = (value as u32, (value >> 32) as u32);
    if high == 0 {
        vec![low]
    } else {
        vec![low, high]
    }
}

fn mix_entropy(words: &[u32]) -> [u32; POOL] {
    let mut hash = 0x43b0d7e5u32;
    let mut hashmix = |word: u32| {
        let mut value = word ^ hash;
        hash = hash.wrapping_mul(0x931e8875);
        value = value.wrapping_mul(hash);
        value ^ (value >> 16)
    };
    let mut pool = [0; POOL];
    for (i, slot) in pool.iter_mut().enumerate() {
        *slot = hashmix(words.get(i).copied().unwrap_or(0));
    }
    for source in 0..POOL {
        for target in (0..POOL).filter(|&target| target != source) {
            pool[target] = mix(pool[target], hashmix(pool[source]));
        }
    }
    for &word in words.iter().skip(POOL) {
        for slot in &mut pool {
            *slot = mix(*slot, hashmix(word));
        }
    }
    pool
}

fn mix(x: u32, y: u32) -> u32 {
    let value = x
        .wrapping_mul(0xca01f9dd)
        .wrapping_sub(y.wrapping_mul(0x4973f715));
    value ^ (value >> 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_equal_numpys() {
        // numpy.random.SeedSequence(entropy, spawn_key=key, pool_size=24).generate_state(n)
        assert_eq!(
            SeedSequence::new(0, &[]).generate_state(3),
            [0xeff41bd6, 0xa030bacb, 0x8ab2f371]
        );
        assert_eq!(
            SeedSequence::new(42, &[]).generate_state(3),
            [387750627, 2536650517, 4078839648]
        );
        let node = SeedSequence::new(42, &[0, 0]).generate_state(4);
        assert_eq!(node, [2102017995, 2891809698, 2144110403, 379559146]);
        let node = SeedSequence::new(42, &[1, 1]).generate_state(4);
        assert_eq!(node, [1058881542, 1039740124, 2218853409, 2234354429]);
        let wide = SeedSequence::new((1 << 32) + 5, &[]).generate_state(3);
        assert_eq!(wide, [3001752692, 252864033, 810806329]);
    }
}
