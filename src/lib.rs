//! sdgen: Stable Diffusion XL in one native binary.
//!
//! Layers, each using only what stands below it (`tests/layers.rs` keeps this true):
//!
//! ```text
//! cli  api           turn text into requests and errors into answers
//! engine             queue, device thread, model manager
//! pipeline           one call = one job, synchronous
//! sampling  models   schedules and solvers | architectures
//! prompt  imaging  rng  weights  nn
//! base = config, telemetry, shutdown
//! ```
//!
//! | feature | adds |
//! | --- | --- |
//! | `cuda` | NVIDIA devices through candle and cudarc |

pub mod api;
pub mod cli;
pub mod config;
pub mod engine;
pub mod imaging;
pub mod models;
pub mod nn;
pub mod pipeline;
pub mod prompt;
pub mod rng;
pub mod sampling;
pub mod shutdown;
pub mod telemetry;
pub mod weights;

#[global_allocator]
static ALLOCATOR: nn::block_cache::BlockCache = nn::block_cache::BlockCache::new();

/// Gives cached tensor memory back to the system; returns the bytes.
pub fn trim_memory() -> usize {
    ALLOCATOR.trim()
}
