//! One call = one job: a [`GenerateRequest`] becomes pictures, synchronously, on the calling thread.
//!
//! Nothing here reads the environment, the clock (except to time its own stages), the disk after loading, or a global.
//! Follows A1111's `processing.py` as written down in the pipeline specification.

pub mod bench;
pub mod conditioning;
mod decode;
mod describe;
mod network;
pub mod networks;
pub mod request;
mod vocabulary;

pub use request::{
    CheckpointIdentity, Control, GenerateRequest, Generated, GeneratedImage, InfotextOptions,
    LoadOptions, Observer, Progress, Timings, VaeIdentity,
};

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use candle_core::{DType, Tensor};

use crate::imaging::grid;
use crate::models::{Unet, Vae, vae};
use crate::nn::Placement;
use crate::prompt::{Tokenizer, strip_comments};
use crate::rng::{ImageRng, ImageRngConfig};
use crate::sampling::{
    CfgDenoiser, Guidance, Latents, NoiseStreams, Parameterization, Plan, SigmaTable, TableOptions,
    plan, sample,
};
use crate::weights::detect::{self, prefix};
use crate::weights::{self, SafetensorsFile, Source, demo};
use conditioning::{Prompts, Sizes, TextEncoder};
use describe::Description;
use network::{GuidedUnet, channels_first};
use networks::MergedNetworks;

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
    /// A checkpoint could not be read.
    #[error(transparent)]
    Weights(#[from] weights::Error),
    /// A tensor operation failed: a programming error or memory exhausted.
    #[error("tensor operation failed")]
    Tensor(#[from] candle_core::Error),
    /// The job was interrupted.
    #[error("interrupted")]
    Interrupted,
}

/// Where a checkpoint's bytes come from.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum CheckpointSource {
    /// The demo model compiled into the binary.
    Embedded,
    /// A single-file `.safetensors`.
    File(PathBuf),
}

impl CheckpointSource {
    fn open(&self) -> Result<SafetensorsFile, weights::Error> {
        match self {
            Self::Embedded => demo::open(),
            Self::File(path) => SafetensorsFile::open(path),
        }
    }
}

/// A loaded model, ready to make pictures. Owned by one thread.
#[derive(Debug)]
pub struct Pipeline {
    /// Where LoRAs find the checkpoint's own values again.
    source: CheckpointSource,
    /// The mapped file; `None` for the embedded model, which is unpacked again when needed.
    file: Option<SafetensorsFile>,
    networks: MergedNetworks,
    identity: CheckpointIdentity,
    vae_identity: Option<VaeIdentity>,
    text: TextEncoder,
    unet: Unet,
    vae: Vae,
    place: Placement,
    /// The VAE's own: it never computes in plain f16.
    vae_place: Placement,
    table: SigmaTable,
    parameterization: Parameterization,
    native_size: (usize, usize),
}

/// A finished batch, or what an interrupt left of it.
struct Batch {
    latents: Option<Latents>,
    stopped: Option<Control>,
    infotext: crate::sampling::InfotextParams,
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
        let file = source.open()?;
        detect::require_sdxl(&file)?;
        let place = Placement {
            device: options.device.clone(),
            dtype: options.dtype,
            circular: Arc::default(),
        };
        let wide = if options.dtype == DType::F16 {
            DType::F32
        } else {
            options.dtype
        };
        let vae_place = Placement {
            dtype: wide,
            ..place.clone()
        };
        let vae = load_vae(&file, options.vae.as_ref(), &vae_place)?;
        let text = TextEncoder::load(&file, Arc::new(Tokenizer::new()), &place)?;
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
            vae_identity: options.vae.clone(),
            text,
            unet,
            vae,
            place,
            vae_place,
            table: SigmaTable::new(TableOptions {
                zero_terminal_snr: training.zero_terminal_snr,
                ..TableOptions::default()
            }),
            parameterization: if training.v_prediction {
                Parameterization::V
            } else {
                Parameterization::Epsilon
            },
            native_size,
        })
    }

    /// Width and height in pixels that a request without a size gets.
    #[must_use]
    pub fn native_size(&self) -> (usize, usize) {
        self.native_size
    }

    /// Runs one job.
    ///
    /// # Errors
    /// [`Error::Invalid`] before any work; [`Error::NotANumber`] and [`Error::Tensor`] from the stages. An interrupt is not an
    /// error: the result holds what was finished.
    pub fn generate(
        &mut self,
        request: &GenerateRequest,
        observer: &dyn Observer,
    ) -> Result<Generated, Error> {
        // 1. Check what would otherwise fail deep inside.
        check(request)?;
        let mut timings = Timings::default();
        self.place.circular.store(request.tiling, Ordering::Relaxed);

        // 2. Work out the run, which decides how often prompts can change.
        let plan = plan(
            request.sampler,
            request.scheduler,
            request.steps,
            &request.sampler_options,
            &self.table,
        );

        // 3. Merge the LoRAs and encode the prompts.
        let (prompt, negative) = (
            strip_comments(&request.prompt),
            strip_comments(&request.negative_prompt),
        );
        let (plain, _) = crate::prompt::extract_extra_networks(&prompt);
        self.merge_networks(request)?;
        let prompts = timed(&mut timings.text, || {
            self.text
                .prompts(&plain, &negative, plan.expected_calls(), request.emphasis)
        })?;

        // 4. Seeds of every picture.
        let total = request.batch_size * request.batch_count;
        let (seeds, subseeds) = (seeds(request, total), subseeds(request, total));

        let description = Description {
            request,
            prompt: &prompt,
            negative_prompt: &negative,
            checkpoint: &self.identity,
            vae: self.vae_identity.as_ref(),
            plan: &plan,
            lora_hashes: self.networks.hashes(),
            embedding_hashes: prompts.embedding_hashes(),
        };
        let mut extra_params = description.extra_params(&Vec::new());
        let (mut images, mut interrupted) = (Vec::new(), false);
        for batch in 0..request.batch_count {
            let range = batch * request.batch_size..(batch + 1) * request.batch_size;
            let noise = image_rng(request, &seeds[range.clone()], &subseeds[range.clone()]);

            // 5. Denoise.
            let done = timed(&mut timings.sample, || {
                self.denoise(request, &plan, &prompts, noise, batch, observer)
            })?;
            timings.steps += plan.steps;
            extra_params = description.extra_params(&done.infotext);
            interrupted = done.stopped == Some(Control::Interrupt);

            // 6. Decode picture by picture, and say how each was made.
            let Some(latents) = done.latents else { break };
            for (image, i) in latents.images().zip(range) {
                let latents = Latents::new(
                    image.to_vec(),
                    [1, latents.shape[1], latents.shape[2], latents.shape[3]],
                );
                let image = timed(&mut timings.decode, || {
                    decode::decode(&self.vae, &self.vae_place, &latents)
                })?;
                let infotext = description.infotext(seeds[i], subseeds[i], &extra_params);
                let latents = request.keep_latents.then_some(latents.data);
                images.push(GeneratedImage {
                    image,
                    seed: seeds[i],
                    subseed: subseeds[i],
                    infotext,
                    latents,
                });
            }
            if interrupted || observer.control() == Control::Interrupt {
                interrupted = batch + 1 < request.batch_count || interrupted;
                break;
            }
        }
        let mut comments = request.networks.comments();
        comments.extend(self.networks.comments());
        Ok(Generated {
            images,
            seeds,
            subseeds,
            extra_params,
            timings,
            interrupted,
            comments,
        })
    }

    /// Brings the weights and the textual inversions to what the request names.
    fn merge_networks(&mut self, request: &GenerateRequest) -> Result<(), Error> {
        let wanted = &request.networks.files;
        if !self.networks.holds(wanted) {
            let start = Instant::now();
            let reopened;
            let file = if let Some(file) = &self.file {
                file
            } else {
                reopened = self.source.open()?;
                &reopened
            };
            let mut layers = self.text.layers_mut();
            layers.extend(self.unet.layers_mut());
            self.networks.switch(wanted, file, layers)?;
            crate::trim_memory();
            let seconds = start.elapsed().as_secs_f64();
            tracing::info!(networks = wanted.len(), seconds, "LoRAs merged");
        }
        let bundled = self.networks.embeddings().iter();
        let embeddings = request.embeddings.iter().chain(bundled).cloned().collect();
        self.text.set_embeddings(embeddings);
        Ok(())
    }

    /// Runs the sampler over one batch.
    fn denoise(
        &self,
        request: &GenerateRequest,
        plan: &Plan,
        prompts: &Prompts,
        mut noise: ImageRng,
        batch: usize,
        observer: &dyn Observer,
    ) -> Result<Batch, Error> {
        let x = plan.initial_latents(&noise.first());
        let sizes = Sizes::of_picture(request.width, request.height);
        let extra = self.unpainted(x.shape)?;
        let mut network =
            GuidedUnet::new((&self.unet, &self.place), prompts, sizes, observer, extra);
        let guidance = Guidance {
            scale: request.cfg_scale,
            parameterization: self.parameterization,
            ..Guidance::default()
        };
        let mut denoiser = CfgDenoiser::new(&mut network, guidance, plan, |_, denoised| {
            if observer.wants_preview()
                && let Ok(sheet) = grid(
                    &decode::approximate(denoised),
                    crate::imaging::GridShape::Square,
                    image::Rgb([255; 3]),
                )
            {
                observer.preview(sheet);
            }
        });
        let mut streams = NoiseStreams::new(noise, plan);
        let report = |step: usize| {
            let step = step.min(plan.steps);
            observer.progress(Progress {
                step,
                steps: plan.steps,
                batch,
                batches: request.batch_count,
            });
        };
        let result = sample(plan, &mut denoiser, x, &mut streams, &mut |finished, _| {
            report(finished)
        });
        let (infotext, last) = (denoiser.infotext(), denoiser.last_denoised().cloned());
        drop(denoiser);
        let latents = match result {
            Ok(latents) => {
                report(plan.steps);
                Some(latents)
            }
            // What an interrupted run leaves is the last clean picture it saw.
            Err(Error::Interrupted) if network.stopped.is_some() => last,
            Err(error) => return Err(error),
        };
        Ok(Batch {
            latents,
            stopped: network.stopped,
            infotext,
        })
    }

    /// What an inpainting checkpoint is told when there is nothing to inpaint: paint everything, over grey.
    fn unpainted(&self, [_, channels, height, width]: [usize; 4]) -> Result<Option<Tensor>, Error> {
        if self.unet.in_channels() == channels {
            return Ok(None);
        }
        let device = &self.vae_place.device;
        let grey = Tensor::zeros(
            (1, height * LATENT_PIXEL, width * LATENT_PIXEL, 3),
            self.vae_place.dtype,
            device,
        )?;
        let masked = (self.vae.encode(&grey)?.0 * f64::from(vae::SCALE))?.to_dtype(DType::F32)?;
        let mask = Tensor::ones((1, height, width, 1), DType::F32, device)?;
        Ok(Some(crate::nn::concat_channels(&mask, &masked)?))
    }

    /// Encodes a picture, `[3, height, width]` in [-1, 1], to latents as the sampler has them.
    ///
    /// # Errors
    /// When the size is not a multiple of 8 or a tensor operation fails.
    pub fn encode_picture(
        &self,
        picture: &[f32],
        width: usize,
        height: usize,
    ) -> Result<Latents, Error> {
        if picture.len() != 3 * width * height
            || !width.is_multiple_of(LATENT_PIXEL)
            || !height.is_multiple_of(LATENT_PIXEL)
        {
            return Err(Error::Invalid(format!(
                "picture of {width}x{height} pixels: both sides must be multiples of {LATENT_PIXEL}"
            )));
        }
        let picture = Latents::new(picture.to_vec(), [1, 3, height, width]);
        let picture = Tensor::from_vec(
            network::channels_last(&picture),
            (1, height, width, 3),
            &self.vae_place.device,
        )?;
        let mean = (self.vae.encode(&picture)?.0.to_dtype(DType::F32)? * f64::from(vae::SCALE))?;
        let (_, h, w, c) = mean.dims4()?;
        Ok(channels_first(
            &mean.flatten_all()?.to_vec1::<f32>()?,
            [1, c, h, w],
        ))
    }
}

/// The VAE file if one is given, else the checkpoint's own.
fn load_vae(
    checkpoint: &SafetensorsFile,
    file: Option<&VaeIdentity>,
    place: &Placement,
) -> Result<Vae, weights::Error> {
    const DECODER: &str = "decoder.conv_in.weight";
    let inside =
        |source: &SafetensorsFile| source.shape(&format!("{}{DECODER}", prefix::VAE)).is_some();
    if let Some(vae) = file {
        let file = SafetensorsFile::open(&vae.path)?;
        return Vae::new(&file, if inside(&file) { prefix::VAE } else { "" }, place);
    }
    if !inside(checkpoint) {
        return Err(weights::Error::NoVae {
            path: checkpoint.path().into(),
        });
    }
    Vae::new(checkpoint, prefix::VAE, place)
}

fn check(request: &GenerateRequest) -> Result<(), Error> {
    let GenerateRequest { width, height, .. } = *request;
    if width < LATENT_PIXEL || height < LATENT_PIXEL {
        return Err(Error::Invalid(format!(
            "size {width}x{height} is below the smallest picture, 8x8"
        )));
    }
    if request.steps == 0 || request.batch_size == 0 || request.batch_count == 0 {
        return Err(Error::Invalid(
            "steps, batch size and batch count must be at least 1".into(),
        ));
    }
    if !request.cfg_scale.is_finite() {
        return Err(Error::Invalid(format!(
            "cfg scale must be a finite number, not `{}`",
            request.cfg_scale
        )));
    }
    Ok(())
}

fn image_rng(request: &GenerateRequest, seeds: &[u64], subseeds: &[u64]) -> ImageRng {
    ImageRng::new(ImageRngConfig {
        source: request.noise_source,
        shape: [
            4,
            request.height / LATENT_PIXEL,
            request.width / LATENT_PIXEL,
        ],
        seeds: seeds.to_vec(),
        subseeds: subseeds.to_vec(),
        subseed_strength: request.subseed_strength,
        seed_resize_from: request.seed_resize_from,
        eta_noise_seed_delta: request.sampler_options.eta_noise_seed_delta,
    })
}

/// Consecutive seeds, or one for all while a variation seed makes the difference.
fn seeds(request: &GenerateRequest, total: usize) -> Vec<u64> {
    let step = u64::from(request.subseed_strength == 0.0);
    (0..total as u64)
        .map(|i| request.seed.wrapping_add(i * step))
        .collect()
}

fn subseeds(request: &GenerateRequest, total: usize) -> Vec<u64> {
    (0..total as u64)
        .map(|i| request.subseed.wrapping_add(i))
        .collect()
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

fn timed<T>(total: &mut Duration, work: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let value = work();
    *total += start.elapsed();
    value
}
