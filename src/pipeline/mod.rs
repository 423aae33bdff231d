//! One call = one job: a [`GenerateRequest`] becomes pictures, synchronously, on the calling thread.
//!
//! Nothing here reads the environment, the clock (except to time its own stages), the disk after loading, or a global.
//! Follows A1111's `processing.py` as written down in the pipeline specification.

mod autoencoder;
pub mod bench;
pub mod conditioning;
mod decode;
mod describe;
mod device_latents;
mod generate;
pub mod hires;
pub mod image_to_image;
pub mod merged;
mod network;
pub mod networks;
mod padding;
mod passes;
pub mod preview;
pub mod refiner;
pub mod request;
pub mod resample;
mod sampling_run;
pub mod scripts;
mod seeds;
pub mod settings;
pub mod sizes;
mod soft_inpainting;
mod texts;
pub mod upscale;
pub mod verify;
mod vocabulary;

pub use crate::nn::cpu::prepare as prepare_cpu;
pub use crate::nn::cuda::{KernelChoice, device as cuda};
pub use autoencoder::{AutoPrecision, Codec, VaeOptions};
pub use hires::{Hires, HiresSize, HiresUpscaler};
pub use image_to_image::{ImageResize, InitImage, InpaintMask, MaskedContent};
pub use padding::PadConds;
pub use preview::{PreviewMethod, PreviewOptions};
pub use refiner::{OtherCheckpoint, Refiner, RefinerPasses, SwitchBy};
pub use request::{
    CheckpointIdentity, Control, GenerateRequest, Generated, GeneratedImage, InfotextOptions,
    LoadOptions, Observer, Progress, Timings, VaeIdentity,
};
pub use resample::LatentMode;
pub use scripts::{Curve, Loopback, Script, SdUpscale};
pub use settings::Settings;
pub use soft_inpainting::SoftInpainting;
pub use upscale::{
    Extras, ExtrasRequest, ExtrasSize, PictureUpscaler, Tiling, UpscalerFile, UpscalerSlot,
};

use std::path::PathBuf;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use crate::models::{Unet, unet};
use crate::nn::Placement;
use crate::prompt::Tokenizer;
use crate::sampling::{Latents, Parameterization, TableOptions};
use crate::weights::detect::{self, Kind, Role};
use crate::weights::{self, Source, WeightFile, demo};
use autoencoder::Autoencoder;
use conditioning::{EncodedText, TextEncoder};
use merged::MergedNetworks;

/// Pixels of a side of one latent pixel.
pub const LATENT_PIXEL: usize = 8;

/// What can go wrong in a job, in words an operator uses.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request cannot be carried out as written.
    #[error("{0}")]
    Invalid(String),
    /// The model produced NaN.
    #[error(
        "a tensor with NaNs was produced in {stage}; the checkpoint is damaged or needs a wider dtype (`--dtype f32`)"
    )]
    NotANumber {
        /// `Unet`, `VAE` or `text encoder`.
        stage: &'static str,
    },
    /// The VAE produced NaN, and no wider type was allowed or left.
    #[error(
        "a tensor with NaNs was produced in VAE; there is not enough precision in `{dtype}` to represent the picture: {remedy}"
    )]
    VaeNotANumber {
        /// The VAE's type.
        dtype: &'static str,
        /// What to do.
        remedy: &'static str,
    },
    /// A checkpoint could not be read.
    #[error(transparent)]
    Weights(#[from] weights::Error),
    /// A tensor operation failed: a programming error or memory exhausted.
    #[error("tensor operation failed")]
    Tensor(#[from] candle_core::Error),
    /// The device has not enough memory, even after everything cached was given back.
    #[error(
        "out of memory on the device, of which {} MiB are free: use a smaller size or batch size, `--dtype f16`, or a smaller \
         `device.vae_memory_mib`", free / (1 << 20)
    )]
    OutOfMemory {
        /// Bytes that are free.
        free: u64,
        /// The allocation that failed.
        #[source]
        source: candle_core::Error,
    },
    /// A picture of the request cannot be prepared.
    #[error(transparent)]
    Picture(#[from] crate::imaging::Error),
    /// The job was interrupted.
    #[error("interrupted")]
    Interrupted,
    /// The batch was skipped.
    #[error("skipped")]
    Skipped,
}

/// Where a checkpoint's bytes come from.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum CheckpointSource {
    /// The demo model compiled into the binary.
    Embedded,
    /// A single file: `.safetensors` or `.ckpt`.
    File(PathBuf),
}

impl CheckpointSource {
    fn open(&self) -> Result<WeightFile, weights::Error> {
        match self {
            Self::Embedded => demo::open().map(WeightFile::Safetensors),
            Self::File(path) => WeightFile::open(path),
        }
    }
}

/// A loaded model, ready to make pictures. Owned by one thread.
#[derive(Debug)]
pub struct Pipeline {
    /// Where LoRAs find the checkpoint's own values again.
    source: CheckpointSource,
    /// The mapped file; `None` for the embedded model, which is unpacked again when needed.
    file: Option<WeightFile>,
    networks: MergedNetworks,
    identity: CheckpointIdentity,
    text: TextEncoder,
    unet: Unet,
    autoencoder: Autoencoder,
    place: Placement,
    /// What the checkpoint says about its training schedule.
    own_table: TableOptions,
    /// The encoded empty prompt, once it was needed.
    empty_prompt: Option<EncodedText>,
    parameterization: Parameterization,
    native_size: (usize, usize),
    upscalers: UpscalerSlot,
    kind: Kind,
    /// How the checkpoint was loaded, and others are.
    load_options: LoadOptions,
    /// Checkpoints that the last job needed besides this one.
    others: Vec<(OtherCheckpoint, Self)>,
}

impl Pipeline {
    /// Loads a checkpoint, and the VAE of `options` in place of its own.
    ///
    /// # Errors
    /// [`Error::Weights`] names the file, the key and the remedy.
    pub fn load(
        source: &CheckpointSource,
        identity: CheckpointIdentity,
        options: &LoadOptions,
    ) -> Result<Self, Error> {
        Self::load_as(Role::Main, source, identity, options)
    }

    /// Bytes that the weights of a checkpoint take in `dtype` on `device`, from its header.
    ///
    /// # Errors
    /// [`Error::Weights`] for a file that is no checkpoint.
    pub fn estimate(
        source: &CheckpointSource,
        dtype: DType,
        device: &Device,
    ) -> Result<u64, Error> {
        let place = Placement::new(device.clone(), dtype);
        if *source == CheckpointSource::Embedded {
            return Ok((demo::VALUES * place.dtype.size_in_bytes()) as u64);
        }
        let file = source.open()?;
        detect::require(&file, Role::Main)?;
        let bytes = |key: &&str| {
            let elements = file.shape(key).map_or(0, |s| s.iter().product::<usize>());
            let size = if unet::is_over_tokens(key) {
                place.bytes_over_tokens()
            } else {
                place.dtype.size_in_bytes()
            };
            elements * size
        };
        Ok(file.keys().iter().map(bytes).sum::<usize>() as u64)
    }

    fn load_as(
        role: Role,
        source: &CheckpointSource,
        identity: CheckpointIdentity,
        options: &LoadOptions,
    ) -> Result<Self, Error> {
        let file = source.open()?;
        let kind = detect::require(&file, role)?;
        let place = Placement::new(options.device.clone(), options.dtype);
        let autoencoder = Autoencoder::load(source, &file, options.vae.clone(), &place)?;
        let text = TextEncoder::load(&file, kind, Arc::new(Tokenizer::new()), &place)?;
        let unet = Unet::new(&file, &place)?;
        let training = detect::parameterization(&file);
        let native_size = file
            .metadata("modelspec.resolution")
            .and_then(parse_size)
            .unwrap_or((1024, 1024));
        crate::trim_memory();
        Ok(Self {
            source: source.clone(),
            file: matches!(source, CheckpointSource::File(_)).then_some(file),
            networks: MergedNetworks::default(),
            identity,
            text,
            unet,
            autoencoder,
            place,
            own_table: TableOptions {
                zero_terminal_snr: training.zero_terminal_snr,
                ..TableOptions::default()
            },
            empty_prompt: None,
            parameterization: if training.v_prediction {
                Parameterization::V
            } else {
                Parameterization::Epsilon
            },
            native_size,
            upscalers: UpscalerSlot::new(options.device.clone(), options.dtype, |_| None),
            kind,
            load_options: options.clone(),
            others: Vec::new(),
        })
    }

    /// Uses the upscalers of `slot` from now on, in place of a slot of its own.
    #[must_use]
    pub fn with_upscalers(mut self, slot: &UpscalerSlot) -> Self {
        self.upscalers = slot.clone();
        self
    }

    /// Width and height in pixels that a request without a size gets.
    #[must_use]
    pub fn native_size(&self) -> (usize, usize) {
        self.native_size
    }

    /// Whether the UNet is told about a mask, besides the latents.
    fn is_inpainting(&self) -> bool {
        self.unet.in_channels() > seeds::LATENT_CHANNELS
    }

    /// What an inpainting checkpoint is told when there is nothing to inpaint: paint everything, over grey.
    fn unpainted(&self, [_, channels, height, width]: [usize; 4]) -> Result<Option<Tensor>, Error> {
        if self.unet.in_channels() == channels {
            return Ok(None);
        }
        let (width_px, height_px) = (width * LATENT_PIXEL, height * LATENT_PIXEL);
        let grey = vec![0.0; 3 * width_px * height_px];
        let masked = self.autoencoder.encode(&grey, width_px, height_px)?;
        let device = &self.place.device;
        let masked = Tensor::from_vec(
            network::channels_last(&masked.data(), masked.shape),
            (1, height, width, masked.shape[1]),
            device,
        )?;
        let mask = Tensor::ones((1, height, width, 1), DType::F32, device)?;
        Ok(Some(crate::nn::concat_channels(&mask, &masked)?))
    }

    /// Encodes a picture, `[3, height, width]` in [-1, 1], to latents as the sampler has them: a side of `n` pixels to `n / 8`.
    ///
    /// # Errors
    /// When a side is shorter than 8 or a tensor operation fails.
    pub fn encode_picture(
        &self,
        picture: &[f32],
        width: usize,
        height: usize,
    ) -> Result<Latents, Error> {
        self.autoencoder.encode(picture, width, height)
    }

    /// Puts another VAE in place of the present one, `None` = the checkpoint's own; the rest of the model stays.
    ///
    /// # Errors
    /// The file cannot be read, or the checkpoint has no VAE; the one before stays.
    pub fn set_vae(&self, vae: Option<VaeIdentity>) -> Result<(), Error> {
        self.autoencoder.replace(vae, self.place.dtype)
    }

    /// Bytes of activations that a block of the VAE may hold; beyond it the VAE runs in strips.
    pub fn set_vae_memory(&self, bytes: usize) {
        self.autoencoder.set_memory(bytes);
    }

    /// Gives back what the device keeps for the next step: recordings, and memory that is free but not returned.
    pub fn release_cached(&self) {
        self.unet.release_cached();
        cuda::release_cached(&self.place.device);
    }
}

/// `1024x768` to width and height.
fn parse_size(text: &str) -> Option<(usize, usize)> {
    let (width, height) = text.trim().split_once(['x', 'X'])?;
    let side = |s: &str| {
        s.trim()
            .parse()
            .ok()
            .filter(|n| (LATENT_PIXEL..=16_384).contains(n))
    };
    Some((side(width)?, side(height)?))
}
