//! One call = one job: a [`GenerateRequest`] becomes pictures, synchronously, on the calling thread.
//!
//! Nothing here reads the environment, the clock (except to time its own stages), the disk after loading, or a global.
//! Follows A1111's `processing.py` as written down in the pipeline specification.

pub mod bench;
pub mod conditioning;
mod decode;
mod describe;
pub mod hires;
pub mod image_to_image;
mod network;
pub mod request;
pub mod resample;
mod texts;

pub use hires::{Hires, HiresSize, HiresUpscaler};
pub use image_to_image::{ImageResize, InitImage, InpaintMask, MaskedContent};
pub use request::{
    CheckpointIdentity, Control, GenerateRequest, Generated, GeneratedImage, InfotextOptions,
    LoadOptions, Observer, Progress, Timings, VaeIdentity,
};
pub use resample::LatentMode;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use candle_core::{DType, Tensor};
use image::RgbImage;

use crate::imaging::{GridShape, grid};
use crate::models::{Unet, Vae, vae};
use crate::nn::Placement;
use crate::prompt::{ScheduleSteps, Tokenizer};
use crate::rng::{ImageRng, ImageRngConfig};
use crate::sampling::{
    CfgDenoiser, ExactSteps, Guidance, InfotextParams, Latents, Mask, NoiseStreams,
    Parameterization, Plan, SigmaTable, TableOptions, image_steps, plan, sample,
};
use crate::weights::detect::{self, prefix};
use crate::weights::{self, SafetensorsFile, Source, demo};
use conditioning::{Prompts, Sizes, TextEncoder};
use describe::Description;
use image_to_image::ImageStart;
use network::{GuidedUnet, channels_first};
use texts::Texts;

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
    /// A picture of the request cannot be prepared.
    #[error(transparent)]
    Picture(#[from] crate::imaging::Error),
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

/// One run of the sampler: what it is told and how far it goes.
struct Pass {
    plan: Plan,
    prompts: Prompts,
    sizes: Sizes,
    cfg_scale: f32,
}

/// Where a pass begins.
struct Start {
    latents: Latents,
    streams: NoiseStreams,
    mask: Option<Mask>,
    extra: Option<Tensor>,
}

/// A finished pass, or what an interrupt left of it.
struct Outcome {
    latents: Option<Latents>,
    stopped: Option<Control>,
    infotext: InfotextParams,
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

        // 2. Read the prompts as they are shown, and what they ask for besides text.
        let texts = Texts::new(request);

        // 3. Work out each pass and encode its prompts.
        let passes = timed(&mut timings.text, || self.passes(request, &texts))?;
        let total_steps = passes.iter().map(|pass| pass.plan.steps).sum();

        // 4. Seeds of every picture.
        let total = request.batch_size * request.batch_count;
        let (seeds, subseeds) = (seeds(request, total), subseeds(request, total));

        let description = Description {
            request,
            texts: &texts,
            checkpoint: &self.identity,
            vae: self.vae_identity.as_ref(),
            passes: passes.iter().map(|pass| &pass.plan).collect(),
        };
        let mut extra_params = description.extra_params(&Vec::new());
        let (mut images, mut interrupted) = (Vec::new(), false);
        for batch in 0..request.batch_count {
            let range = batch * request.batch_size..(batch + 1) * request.batch_size;
            let seeds_of_batch = (&seeds[range.clone()], &subseeds[range.clone()]);
            let report = |step: usize| {
                observer.progress(Progress {
                    step: step.min(total_steps),
                    steps: total_steps,
                    batch,
                    batches: request.batch_count,
                });
            };

            // 5. Denoise: from noise or from pictures, and once more after enlarging.
            let clock = Instant::now();
            let noise = image_rng(request, seeds_of_batch, (request.width, request.height));
            let from_image = match &request.init_image {
                Some(init) => {
                    let size = (request.width, request.height, request.batch_size);
                    Some(self.start_from_image(init, size, &noise)?)
                }
                None => None,
            };
            let start = self.first_start(request, &passes[0].plan, noise, from_image.as_ref())?;
            let mut done = self.denoise(&passes[0], start, observer, &report)?;
            if let (Some(hires), Some(first), None) = (&request.hires, &done.latents, done.stopped)
            {
                let target = hires.size.target(request.width, request.height);
                let larger = self.enlarge(first, hires.upscaler, target)?;
                done = match passes.get(1) {
                    Some(pass) => {
                        let noise = image_rng(request, seeds_of_batch, latent_size(&larger));
                        let start = self.second_start(&pass.plan, noise, &larger)?;
                        let before = passes[0].plan.steps;
                        self.denoise(pass, start, observer, &|step| report(before + step))?
                    }
                    None => Outcome {
                        latents: Some(larger),
                        ..done
                    },
                };
            }
            timings.sample += clock.elapsed();
            timings.steps += total_steps;
            extra_params = description.extra_params(&done.infotext);
            interrupted = done.stopped == Some(Control::Interrupt);

            // 6. Decode picture by picture, finish it, and say how it was made.
            let Some(latents) = done.latents else { break };
            let clock = Instant::now();
            for (index, (i, image)) in range.zip(latents.images()).enumerate() {
                let [_, c, h, w] = latents.shape;
                let mut picture = self.decode_image(&Latents::new(image.to_vec(), [1, c, h, w]))?;
                if let Some(start) = &from_image {
                    picture = start.finish(index, picture)?;
                }
                images.push(GeneratedImage {
                    image: picture,
                    seed: seeds[i],
                    subseed: subseeds[i],
                    infotext: description.infotext(seeds[i], subseeds[i], &extra_params),
                    latents: request.keep_latents.then(|| image.to_vec()),
                });
            }
            timings.decode += clock.elapsed();
            if !interrupted && batch + 1 < request.batch_count {
                interrupted = observer.control() == Control::Interrupt;
            }
            if interrupted {
                break;
            }
        }
        Ok(Generated {
            images,
            seeds,
            subseeds,
            extra_params,
            timings,
            interrupted,
            comments: texts.comments(),
        })
    }

    /// The passes of a job: one, and a second for hires fix unless it only enlarges.
    fn passes(&mut self, request: &GenerateRequest, texts: &Texts) -> Result<Vec<Pass>, Error> {
        let new_plan = |sampler, scheduler, steps| {
            plan(
                sampler,
                scheduler,
                steps,
                &request.sampler_options,
                &self.table,
            )
        };
        let full = new_plan(request.sampler, request.scheduler, request.steps);
        let calls = full.expected_calls();
        let first = match &request.init_image {
            Some(init) => {
                let (steps, t_enc) = image_steps(request.steps, init.strength, init.exact_steps);
                new_plan(request.sampler, request.scheduler, steps).from_image(t_enc)
            }
            None => full,
        };
        let second = match &request.hires {
            Some(hires) if hires.strength > 0.0 => {
                let steps = if hires.steps == 0 {
                    request.steps
                } else {
                    hires.steps
                };
                let (total, t_enc) = image_steps(steps, hires.strength, ExactSteps::Yes);
                let sampler = hires.sampler.unwrap_or(request.sampler);
                let scheduler = hires.scheduler.unwrap_or(request.scheduler);
                let calls = new_plan(sampler, scheduler, steps).expected_calls();
                Some((
                    hires,
                    new_plan(sampler, scheduler, total).from_image(t_enc),
                    calls,
                ))
            }
            _ => None,
        };
        let mut schedule = ScheduleSteps {
            base: calls,
            hires: None,
        };
        let mut passes = vec![Pass {
            plan: first,
            prompts: self.text.prompts(
                &texts.plain,
                &texts.negative,
                schedule,
                request.emphasis,
            )?,
            sizes: Sizes::of_picture(request.width, request.height),
            cfg_scale: request.cfg_scale,
        }];
        if let Some((hires, plan, hires_calls)) = second {
            schedule.hires = Some(hires_calls);
            let target = hires.size.target(request.width, request.height);
            passes.push(Pass {
                plan,
                prompts: self.text.prompts(
                    &texts.hires_plain,
                    &texts.hires_negative,
                    schedule,
                    request.emphasis,
                )?,
                sizes: Sizes::of_picture(target.width, target.height),
                cfg_scale: hires.cfg_scale.unwrap_or(request.cfg_scale),
            });
        }
        Ok(passes)
    }

    /// Where the first pass begins: noise, or noised pictures.
    fn first_start(
        &self,
        request: &GenerateRequest,
        plan: &Plan,
        mut noise: ImageRng,
        from_image: Option<&ImageStart>,
    ) -> Result<Start, Error> {
        let first = noise.first();
        let (latents, mask, extra) = match (from_image, &request.init_image) {
            (Some(image), Some(init)) => {
                let first = &first * init.noise_multiplier;
                let x = plan.noised_image(&image.latents, &first, init.extra_noise);
                (x, image.mask.clone(), image.extra.clone())
            }
            _ => (plan.initial_latents(&first), None, None),
        };
        let extra = match extra {
            Some(extra) => Some(extra),
            None => self.unpainted(latents.shape)?,
        };
        let streams = NoiseStreams::new(noise, plan);
        Ok(Start {
            latents,
            streams,
            mask,
            extra,
        })
    }

    /// Where the hires pass begins: the enlarged latents under fresh noise of the same seeds.
    fn second_start(
        &self,
        plan: &Plan,
        mut noise: ImageRng,
        larger: &Latents,
    ) -> Result<Start, Error> {
        let latents = plan.noised_image(larger, &noise.first(), 0.0);
        let extra = self.unpainted(latents.shape)?;
        let streams = NoiseStreams::new(noise, plan);
        Ok(Start {
            latents,
            streams,
            mask: None,
            extra,
        })
    }

    /// Runs the sampler over one batch.
    fn denoise(
        &self,
        pass: &Pass,
        start: Start,
        observer: &dyn Observer,
        report: &dyn Fn(usize),
    ) -> Result<Outcome, Error> {
        let plan = &pass.plan;
        let mut streams = start.streams;
        let models = (&self.unet, &self.place);
        let mut network = GuidedUnet::new(models, &pass.prompts, pass.sizes, observer, start.extra);
        let keep = start.mask.clone();
        let guidance = Guidance {
            scale: pass.cfg_scale,
            parameterization: self.parameterization,
            mask: start.mask,
            ..Guidance::default()
        };
        let mut denoiser = CfgDenoiser::new(&mut network, guidance, plan, |_, denoised| {
            if observer.wants_preview()
                && let Ok(sheet) = grid(
                    &decode::approximate(denoised),
                    GridShape::Square,
                    image::Rgb([255; 3]),
                )
            {
                observer.preview(sheet);
            }
        });
        let result = sample(
            plan,
            &mut denoiser,
            start.latents,
            &mut streams,
            &mut |finished, _| report(finished),
        );
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
        // A hard mask keeps the unpainted part to the bit; a soft one has blended it already.
        let latents = match (latents, keep) {
            (
                Some(latents),
                Some(Mask {
                    paint,
                    init,
                    soft: None,
                }),
            ) => {
                let kept = init.zip(&paint, |z, p| z * (1.0 - p));
                Some(&latents.zip(&paint, |x, p| x * p) + &kept)
            }
            (latents, _) => latents,
        };
        Ok(Outcome {
            latents,
            stopped: network.stopped,
            infotext,
        })
    }

    /// Decodes one picture's latents.
    fn decode_image(&self, latents: &Latents) -> Result<RgbImage, Error> {
        decode::decode(&self.vae, &self.vae_place, latents)
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

/// Generators for one batch of pictures of `width` x `height` pixels.
fn image_rng(
    request: &GenerateRequest,
    (seeds, subseeds): (&[u64], &[u64]),
    (width, height): (usize, usize),
) -> ImageRng {
    ImageRng::new(ImageRngConfig {
        source: request.noise_source,
        shape: [4, height / LATENT_PIXEL, width / LATENT_PIXEL],
        seeds: seeds.to_vec(),
        subseeds: subseeds.to_vec(),
        subseed_strength: request.subseed_strength,
        seed_resize_from: request.seed_resize_from,
        eta_noise_seed_delta: request.sampler_options.eta_noise_seed_delta,
    })
}

/// Width and height in pixels of the picture that latents stand for.
fn latent_size(latents: &Latents) -> (usize, usize) {
    (
        latents.shape[3] * LATENT_PIXEL,
        latents.shape[2] * LATENT_PIXEL,
    )
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
