//! Torch-exact noise as plain `Vec<f32>`.

/// Which generator A1111 would use (`randn_source`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum NoiseSource {
    /// CUDA's Philox; A1111's default.
    #[default]
    Gpu,
    /// Torch's CPU Mersenne Twister.
    Cpu,
    /// Philox computed on the CPU.
    Nv,
}
