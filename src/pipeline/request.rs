//! What a job is asked for, what it reports on the way, and what it returns. Plain data: no tensor, no HTTP.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::hires::Hires;
use super::image_to_image::InitImage;
use super::networks::KnownLora;
use super::refiner::Refiner;
use super::scripts::Script;
use super::settings::Settings;
use super::{PreviewOptions, VaeOptions};
use crate::imaging::infotext::Params;
use crate::prompt::Emphasis;
use crate::rng::NoiseSource;
use crate::sampling::{Sampler, SamplerOptions, Scheduler};
use crate::weights::embedding::Embedding;

/// One job: `batch_count` batches of `batch_size` pictures from consecutive seeds.
///
/// Every choice is resolved: random seeds are drawn, sampler names looked up and defaults filled in by the caller.
#[derive(Debug, Clone)]
pub struct GenerateRequest {
    /// Positive prompt after styles, with its `<lora:…>` tags.
    pub prompt: String,
    /// Negative prompt after styles. Exactly empty means zero conditioning.
    pub negative_prompt: String,
    /// Seed of the first picture; picture `i` uses `seed + i` while `subseed_strength` is 0.
    pub seed: u64,
    /// Variation seed of the first picture; picture `i` uses `subseed + i`.
    pub subseed: u64,
    /// 0 = off, 1 = only the variation seed.
    pub subseed_strength: f32,
    /// Size in pixels whose noise is pasted into the middle, `(width, height)`.
    pub seed_resize_from: Option<(usize, usize)>,
    /// Sampling algorithm.
    pub sampler: Sampler,
    /// Sigma schedule; `Automatic` takes the sampler's own.
    pub scheduler: Scheduler,
    /// Eta, churn and the other numbers of the solver.
    pub sampler_options: SamplerOptions,
    /// Number of sampler steps.
    pub steps: usize,
    /// Classifier-free guidance scale.
    pub cfg_scale: f32,
    /// Width in pixels; rounded down to a multiple of 8.
    pub width: usize,
    /// Height in pixels; rounded down to a multiple of 8.
    pub height: usize,
    /// Pictures per batch.
    pub batch_size: usize,
    /// Number of batches.
    pub batch_count: usize,
    /// A1111's `CLIP_stop_at_last_layers`; without effect on SDXL unless [`Settings::clip_l_skip`] says so.
    pub clip_skip: usize,
    /// How initial and step noise is made.
    pub noise_source: NoiseSource,
    /// How attention weights act on the text encoders' output.
    pub emphasis: Emphasis,
    /// Circular padding in every convolution.
    pub tiling: bool,
    /// Keep the final latents in the result.
    pub keep_latents: bool,
    /// Pictures the job starts from (img2img); `None` starts from noise.
    pub init_image: Option<InitImage>,
    /// A second pass at a larger size (hires fix); not together with `init_image`.
    pub hires: Option<Hires>,
    /// A checkpoint that takes over in mid-run.
    pub refiner: Option<Refiner>,
    /// Files of the names in `<lora:…>` tags (see [`Self::lora_names`]); a name without one is reported as missing. `None`
    /// ignores the tags.
    pub loras: Option<BTreeMap<String, KnownLora>>,
    /// Textual inversions that prompts may name.
    pub embeddings: Vec<Arc<Embedding>>,
    /// Settings that change how the job is carried out.
    pub settings: Settings,
    /// How pictures are encoded and decoded.
    pub vae: VaeOptions,
    /// What the observer is shown.
    pub preview: PreviewOptions,
    /// What the infotext says beyond what this request implies.
    pub infotext: InfotextOptions,
    /// More than one run.
    pub script: Option<Script>,
}

/// A1111's defaults for a request that names nothing, with seed 0.
impl Default for GenerateRequest {
    fn default() -> Self {
        Self {
            prompt: String::new(),
            negative_prompt: String::new(),
            seed: 0,
            subseed: 0,
            subseed_strength: 0.0,
            seed_resize_from: None,
            sampler: Sampler::Euler,
            scheduler: Scheduler::Automatic,
            sampler_options: SamplerOptions::default(),
            steps: 50,
            cfg_scale: 7.0,
            width: 512,
            height: 512,
            batch_size: 1,
            batch_count: 1,
            clip_skip: 1,
            noise_source: NoiseSource::Gpu,
            emphasis: Emphasis::Original,
            tiling: false,
            keep_latents: false,
            init_image: None,
            hires: None,
            refiner: None,
            loras: None,
            embeddings: Vec::new(),
            settings: Settings::default(),
            vae: VaeOptions::default(),
            preview: PreviewOptions::default(),
            infotext: InfotextOptions::default(),
            script: None,
        }
    }
}

/// Which lines the infotext carries.
#[derive(Debug, Clone)]
#[allow(
    clippy::struct_excessive_bools,
    reason = "each is a setting of A1111's"
)]
pub struct InfotextOptions {
    /// Write `Model hash`.
    pub model_hash: bool,
    /// Write `Model`.
    pub model_name: bool,
    /// Write `VAE hash`.
    pub vae_hash: bool,
    /// Write `VAE`.
    pub vae_name: bool,
    /// Write `Lora hashes`.
    pub lora_hashes: bool,
    /// Write `TI hashes`.
    pub embedding_hashes: bool,
    /// Value of `Init image hash`, if init images are kept.
    pub init_image_hash: Option<String>,
    /// Text of `Version`; `None` leaves the key out.
    pub version: Option<String>,
    /// Whether `CFG scale` was typed as an integer (`7`) or arrived as a float (`7.0`): A1111 prints Python numbers.
    pub cfg_scale_as_int: bool,
    /// Keys of a script, before all others that are not fixed.
    pub script: Params,
}

impl Default for InfotextOptions {
    fn default() -> Self {
        Self {
            model_hash: true,
            model_name: true,
            vae_hash: true,
            vae_name: true,
            lora_hashes: true,
            embedding_hashes: true,
            init_image_hash: None,
            version: Some(crate::config::VERSION_TEXT.to_string()),
            cfg_scale_as_int: false,
            script: Params::new(),
        }
    }
}

/// How a checkpoint is loaded.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// Where tensors live.
    pub device: candle_core::Device,
    /// Compute type of the UNet and text encoders; the VAE never runs in plain f16. `F8E4M3`: the UNet's linear layers over tokens in
    /// e4m3 ([`Storage::E4m3`](crate::nn::Storage)), all else in bf16.
    pub dtype: candle_core::DType,
    /// A VAE file used in place of the checkpoint's own.
    pub vae: Option<VaeIdentity>,
    /// Whether latents stay where the UNet is between the steps of a run; on CUDA they always do.
    pub latents_on_device: bool,
}

/// Names by which a checkpoint is known.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CheckpointIdentity {
    /// File stem, the infotext's `Model`.
    pub name: String,
    /// First 10 hex digits of the file's SHA-256; empty while unknown.
    pub shorthash: String,
}

/// A VAE kept in a file of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VaeIdentity {
    /// The file.
    pub path: std::path::PathBuf,
    /// First 10 hex digits of the file's SHA-256; empty while unknown.
    pub shorthash: String,
}

/// What a running job should do next; asked between steps and between decoded pictures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Control {
    /// Go on.
    Continue,
    /// End this batch with what it has, go on with the next.
    Skip,
    /// End the job with what it has.
    Interrupt,
}

/// Where a job stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// Sampler step within the batch, 0-based count of finished steps.
    pub step: usize,
    /// Steps of one batch.
    pub steps: usize,
    /// Batch under way, 0-based.
    pub batch: usize,
    /// Batches of the job.
    pub batches: usize,
}

/// The job's view of whoever waits for it. Called on the device thread; must return at once.
pub trait Observer {
    /// What to do next.
    fn control(&self) -> Control {
        Control::Continue
    }
    /// A step has ended.
    fn progress(&self, _progress: Progress) {}
    /// Whether a preview of the current step would be looked at.
    fn wants_preview(&self) -> bool {
        false
    }
    /// Whether the finished pictures of each batch would be looked at as a preview.
    fn wants_finished(&self) -> bool {
        false
    }
    /// A small picture of the current state.
    fn preview(&self, _image: image::RgbImage) {}
}

/// An observer that never interferes.
impl Observer for () {}

/// A finished (or interrupted) job.
#[derive(Debug, Clone)]
pub struct Generated {
    /// Pictures in order of their seeds; fewer than planned after an interrupt.
    pub images: Vec<GeneratedImage>,
    /// Planned seeds, one per planned picture.
    pub seeds: Vec<u64>,
    /// Planned variation seeds.
    pub subseeds: Vec<u64>,
    /// Keys beyond the fixed ones (`extra_generation_params` of the API).
    pub extra_params: Params,
    /// Where the time went.
    pub timings: Timings,
    /// Whether the UNet was told about a mask (`is_using_inpainting_conditioning` of the API).
    pub inpainting_conditioning: bool,
    /// Whether the job ended early on request.
    pub interrupted: bool,
    /// Remarks for the user (a missing LoRA, for example).
    pub comments: Vec<String>,
}

/// One picture.
#[derive(Debug, Clone)]
pub struct GeneratedImage {
    /// Pixels.
    pub image: image::RgbImage,
    /// Seed of this picture.
    pub seed: u64,
    /// Variation seed of this picture.
    pub subseed: u64,
    /// The `parameters` text.
    pub infotext: String,
    /// The sampler's final output `[4, height/8, width/8]`, if asked for.
    pub latents: Option<Vec<f32>>,
}

/// Seconds spent per stage.
#[derive(Debug, Clone, Copy, Default)]
pub struct Timings {
    /// Text encoders.
    pub text: Duration,
    /// Denoising loop.
    pub sample: Duration,
    /// VAE decode.
    pub decode: Duration,
    /// Denoising steps done, all batches.
    pub steps: usize,
}
