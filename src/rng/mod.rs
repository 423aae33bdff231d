//! Torch-exact noise as plain `Vec<f32>`: the same seed gives the numbers A1111 would have started from.
//!
//! Invariants: everything is deterministic in its seed, a batch equals its pictures drawn singly, and nothing here knows of
//! models or devices. Follows `PyTorch`'s CPU and CUDA generators, `NumPy`'s `SeedSequence` and torchsde's Brownian interval.

mod brownian;
mod image_rng;
mod latents;
mod mt19937;
mod philox;
mod remote;
mod seed_sequence;

pub use brownian::BrownianTree;
pub use image_rng::{ImageRng, ImageRngConfig, slerp};
pub use latents::{Latents, lincomb};
pub use mt19937::Mt19937;
pub use philox::philox4x32;
pub use remote::{MOST_TERMS, Remote};
pub use seed_sequence::SeedSequence;

/// Which generator A1111 would use (`randn_source`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum NoiseSource {
    /// CUDA's Philox; A1111's default. Equal to [`NoiseSource::Nv`] on every card that holds all elements at once.
    #[default]
    Gpu,
    /// Torch's CPU Mersenne Twister.
    Cpu,
    /// Philox computed on the CPU.
    Nv,
}

impl NoiseSource {
    /// Every source, in A1111's order.
    pub const ALL: [Self; 3] = [Self::Gpu, Self::Cpu, Self::Nv];

    /// The name as A1111 writes it.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Gpu => "GPU",
            Self::Cpu => "CPU",
            Self::Nv => "NV",
        }
    }
}

impl std::fmt::Display for NoiseSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.label())
    }
}

/// A noise source that does not exist was named.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown noise source `{0}`: expected GPU, CPU or NV")]
pub struct UnknownNoiseSource(String);

impl std::str::FromStr for NoiseSource {
    type Err = UnknownNoiseSource;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let found = Self::ALL
            .into_iter()
            .find(|source| source.label().eq_ignore_ascii_case(name));
        found.ok_or_else(|| UnknownNoiseSource(name.to_string()))
    }
}

/// A seeded stream of standard normal numbers.
#[derive(Debug, Clone)]
pub struct Generator(Stream);

#[derive(Debug, Clone)]
enum Stream {
    Mt19937(Box<Mt19937>),
    /// `calls` is the offset of the next call: every call takes one, whatever its size.
    Philox {
        seed: u64,
        calls: u32,
    },
}

impl Generator {
    /// A fresh generator. The CPU source uses the low 32 bits of the seed only, as torch does.
    #[must_use]
    pub fn new(source: NoiseSource, seed: u64) -> Self {
        Self(match source {
            NoiseSource::Cpu => Stream::Mt19937(Box::new(Mt19937::new(seed as u32))),
            NoiseSource::Gpu | NoiseSource::Nv => Stream::Philox { seed, calls: 0 },
        })
    }

    /// The next `n` normal numbers, as one call of `torch.randn` with `n` elements returns them.
    pub fn normals(&mut self, n: usize) -> Vec<f32> {
        match &mut self.0 {
            Stream::Mt19937(mt) => mt.normals(n),
            Stream::Philox { seed, calls } => {
                let values = philox::normals(*seed, *calls, n);
                *calls = calls.wrapping_add(1);
                values
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn source_names_ignore_case_and_print_as_a1111_does() {
        for source in NoiseSource::ALL {
            assert_eq!(source.to_string().to_lowercase().parse(), Ok(source));
        }
        let error = "cuda"
            .parse::<NoiseSource>()
            .map_err(|error| error.to_string());
        assert_eq!(
            error,
            Err("unknown noise source `cuda`: expected GPU, CPU or NV".to_string())
        );
    }

    #[test]
    fn gpu_equals_nv_and_a_second_call_differs_from_the_first() {
        let (mut gpu, mut nv) = (
            Generator::new(NoiseSource::Gpu, 7),
            Generator::new(NoiseSource::Nv, 7),
        );
        let first = gpu.normals(20);
        assert_eq!(first, nv.normals(20));
        assert_ne!(first, gpu.normals(20));
    }
}
