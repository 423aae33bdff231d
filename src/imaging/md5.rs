//! MD5 (RFC 1321), for `Init image hash`: a name for a picture, not a protection.

use std::fmt::Write as _;

/// Left rotations of the four rounds.
const SHIFTS: [[u32; 4]; 4] = [
    [7, 12, 17, 22],
    [5, 9, 14, 20],
    [4, 11, 16, 23],
    [6, 10, 15, 21],
];

/// The digest in 32 hex digits.
///
/// ```
/// assert_eq!(sdgen::imaging::md5::hex(b"abc"), "900150983cd24fb0d6963f7d28e17f72");
/// ```
#[must_use]
pub fn hex(data: &[u8]) -> String {
    let mut state = [0x6745_2301_u32, 0xefcd_ab89, 0x98ba_dcfe, 0x1032_5476];
    let blocks = data.chunks_exact(64);
    let mut tail = blocks.remainder().to_vec();
    tail.push(0x80);
    while tail.len() % 64 != 56 {
        tail.push(0);
    }
    tail.extend_from_slice(&(data.len() as u64).wrapping_mul(8).to_le_bytes());
    let constants = constants();
    for block in blocks.chain(tail.chunks_exact(64)) {
        add_block(&mut state, block, &constants);
    }
    let bytes = state.iter().flat_map(|word| word.to_le_bytes());
    bytes.fold(String::with_capacity(32), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to a String cannot fail");
        text
    })
}

/// `floor(2^32 * |sin(i + 1)|)`.
fn constants() -> [u32; 64] {
    std::array::from_fn(|i| ((i as f64 + 1.0).sin().abs() * 4_294_967_296.0) as u32)
}

fn add_block(state: &mut [u32; 4], block: &[u8], constants: &[u32; 64]) {
    let word = |i: usize| {
        let at = 4 * i;
        u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
    };
    let [mut a, mut b, mut c, mut d] = *state;
    for (i, constant) in constants.iter().enumerate() {
        let (mix, index) = match i / 16 {
            0 => ((b & c) | (!b & d), i),
            1 => ((d & b) | (!d & c), (5 * i + 1) % 16),
            2 => (b ^ c ^ d, (3 * i + 5) % 16),
            _ => (c ^ (b | !d), 7 * i % 16),
        };
        let sum = a
            .wrapping_add(mix)
            .wrapping_add(*constant)
            .wrapping_add(word(index));
        let rotated = b.wrapping_add(sum.rotate_left(SHIFTS[i / 16][i % 4]));
        (a, b, c, d) = (d, rotated, b, c);
    }
    for (sum, value) in state.iter_mut().zip([a, b, c, d]) {
        *sum = sum.wrapping_add(value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_the_published_ones() {
        for (text, digest) in [
            ("", "d41d8cd98f00b204e9800998ecf8427e"),
            ("message digest", "f96b697d7cb7938d525a2f31aaf161d0"),
            (
                "12345678901234567890123456789012345678901234567890123456789012345678901234567890",
                "57edf4a22be3c955ac49da2e2107b67a",
            ),
        ] {
            assert_eq!(hex(text.as_bytes()), digest, "{text}");
        }
    }
}
