//! The architectures of SDXL, written once against the channels-last operations of [`crate::nn`].
//!
//! Every size comes from the shapes in the file; the head size alone cannot be seen there (64, or metadata
//! `sdgen.head_dim`). Module and field names follow the checkpoint's keys.

pub mod approx;
mod build;
pub mod clip;
pub mod esrgan;
pub mod taesd;
pub mod unet;
mod unet_blocks;
mod unet_conditioning;
pub mod vae;

pub use approx::VaeApprox;
pub use clip::{TextTower, TowerOutput};
pub use esrgan::Esrgan;
pub use taesd::Taesd;
pub use unet::Unet;
pub use unet_conditioning::Conditioning;
pub use vae::Vae;
