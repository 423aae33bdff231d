//! Numbers as the models are told them: timesteps and picture sizes.

/// Sinusoidal embedding, cosines first: `[values.len(), dim]`, `f32`.
///
/// Frequencies `exp(-ln(10000) k / (dim/2))` (Ho et al. 2020, section 3.3 of the reference code's order).
#[must_use]
pub fn sinusoidal_embedding(values: &[f32], dim: usize) -> Vec<f32> {
    let half = dim / 2;
    let frequency = |k: usize| (-(10_000f32.ln()) * k as f32 / half as f32).exp();
    let mut out = Vec::with_capacity(values.len() * dim);
    for v in values {
        out.extend((0..half).map(|k| (v * frequency(k)).cos()));
        out.extend((0..half).map(|k| (v * frequency(k)).sin()));
    }
    out
}
