//! The small set of fused operations every model is written against, channels-last.
//!
//! [`layers`] and [`attention`] are what models call; [`cpu`] holds the CPU bodies, `kernels` the bridge from candle's
//! storage to them, `reference` the same operations composed from candle's own for other devices and for tests.

pub mod attention;
pub mod block_cache;
mod combine;
pub mod cpu;
pub mod cuda;
mod dense;
mod e4m3;
mod fp8;
mod group_statistics;
mod kernels;
pub mod layers;
mod product;
mod reference;
mod rewrite;
mod sinusoidal;
mod stored;
mod weight;
mod window;

pub use attention::{Mask, cross_attention, self_attention};
pub use combine::{MOST_TERMS, combine};
pub use cpu::math::Activation;
pub use fp8::Storage;
pub use group_statistics::{GroupStatistics, MeasuredNorm};
pub use layers::{Conv2d, GroupNorm, LayerNorm, Linear, Placement, Then, concat_channels};
pub use product::{product, transpose};
pub use rewrite::{Origin, Rewrite};
pub use sinusoidal::sinusoidal_embedding;
pub use stored::Stored;
pub use window::Sampling;

#[cfg(test)]
mod tests;
