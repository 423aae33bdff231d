//! [`Pipeline::generate`] as numbered steps: a job is one pass of the sampler or two, then pictures.
//!
//! Invariant: picture `i` depends on seed `i` alone, whatever batch it is made in.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use candle_core::Tensor;
use image::RgbImage;

use super::describe::Description;
use super::image_to_image::ImageStart;
use super::network::{GuidedUnet, Part};
use super::networks::Remarks;
use super::passes::Pass;
use super::preview::{self, PreviewOptions};
use super::refiner::Model;
use super::seeds::{image_rng, latent_size, seeds, singles, subseeds};
use super::texts::Texts;
use super::{
    Control, Error, GenerateRequest, Generated, GeneratedImage, LATENT_PIXEL, Observer, Pipeline,
    Progress, Timings,
};
use crate::rng::ImageRng;
use crate::sampling::{
    CfgDenoiser, Guidance, InfotextParams, Latents, Mask, NoiseStreams, Plan, sample,
};

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
    /// The model at work at its end.
    model: Model,
}

impl Outcome {
    /// With what an earlier pass has to say as well.
    fn after(mut self, mut said: InfotextParams) -> Self {
        self.infotext
            .retain(|(key, _)| said.iter().all(|(known, _)| known != key));
        said.append(&mut self.infotext);
        Self {
            infotext: said,
            ..self
        }
    }
}

impl Pipeline {
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

        // 2. Read the prompts as they are shown, and what they ask for besides text.
        let texts = Texts::new(request);

        let networks = texts.networks(request)?;

        // 3. Work out each pass; merge its LoRAs and encode its prompts.
        self.load_others(request)?;
        let mut remarks = Remarks::default();
        let passes = timed(&mut timings.text, || {
            self.passes(request, &texts, networks, &mut remarks)
        })?;
        let memory = self.autoencoder.memory();
        for model in self.others.iter().map(|(_, model)| model).chain([&*self]) {
            model.autoencoder.begin(&request.vae, memory);
            model
                .place
                .circular
                .store(request.tiling, Ordering::Relaxed);
        }
        let total_steps = passes.iter().map(|pass| pass.plan.steps).sum();

        // 4. Seeds of every picture.
        let total = request.batch_size * request.batch_count;
        let (seeds, subseeds) = (seeds(request, total), subseeds(request, total));

        let (checkpoint, vae) = (self.identity.clone(), self.autoencoder.identity());
        let description = Description {
            request,
            texts: &texts,
            checkpoint: &checkpoint,
            vae: vae.as_ref(),
            passes: passes.iter().map(|pass| &pass.plan).collect(),
            lora_hashes: remarks.lora_hashes,
            embedding_hashes: remarks.embedding_hashes,
            old_timelines: remarks.old_timelines,
            inpainting: self.is_inpainting(),
        };
        let mut done = Generated {
            images: Vec::new(),
            extra_params: description.extra_params(&Vec::new()),
            seeds,
            subseeds,
            timings,
            inpainting_conditioning: description.inpainting,
            interrupted: false,
            comments: remarks.comments,
        };
        for batch in 0..request.batch_count {
            let range = batch * request.batch_size..(batch + 1) * request.batch_size;
            let seeds = (&done.seeds[range.clone()], &done.subseeds[range.clone()]);
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
            let (outcome, from_image) =
                match self.denoise_batch(request, &passes, seeds, observer, &report) {
                    // An upscaler was stopped: the batch has no picture, those before it stay.
                    Err(Error::Skipped) => continue,
                    Err(Error::Interrupted) => {
                        done.interrupted = true;
                        break;
                    }
                    other => other?,
                };
            done.timings.sample += clock.elapsed();
            done.timings.steps += total_steps;
            done.extra_params = description.extra_params(&outcome.infotext);
            done.interrupted = outcome.stopped == Some(Control::Interrupt);

            // 6. Decode picture by picture, finish it, and say how it was made. The UNet's idle memory is of no use to the VAE.
            crate::trim_memory();
            let clock = Instant::now();
            let first_of_batch = done.images.len();
            for (index, (i, latents)) in range.zip(singles(outcome.latents)).enumerate() {
                // What an interrupt left of the sampling is decoded to the end.
                let watched: &dyn Observer = if done.interrupted { &() } else { observer };
                let Some(mut image) = self
                    .model(outcome.model)
                    .autoencoder
                    .decode(&latents, watched)?
                else {
                    done.interrupted = true;
                    break;
                };
                if let Some(start) = &from_image {
                    image = start.finish(index, &latents, image)?;
                }
                let (seed, subseed) = (done.seeds[i], done.subseeds[i]);
                done.images.push(GeneratedImage {
                    image,
                    seed,
                    subseed,
                    infotext: description.infotext(seed, subseed, &done.extra_params),
                    latents: request.keep_latents.then_some(latents.data),
                });
            }
            done.timings.decode += clock.elapsed();
            if observer.wants_finished() {
                let finished: Vec<RgbImage> = done.images[first_of_batch..]
                    .iter()
                    .map(|made| made.image.clone())
                    .collect();
                if let Some(sheet) = preview::sheet(&finished) {
                    observer.preview(sheet);
                }
            }
            if batch + 1 < request.batch_count {
                done.interrupted |= observer.control() == Control::Interrupt;
            }
            if done.interrupted {
                break;
            }
        }
        Ok(done)
    }

    /// All passes of one batch, and what its pictures are finished with.
    fn denoise_batch(
        &mut self,
        request: &GenerateRequest,
        passes: &[Pass],
        seeds: (&[u64], &[u64]),
        observer: &dyn Observer,
        report: &dyn Fn(usize),
    ) -> Result<(Outcome, Option<ImageStart>), Error> {
        let size = (request.width, request.height);
        let noise = image_rng(request, seeds, size);
        let from_image = match &request.init_image {
            Some(init) => {
                // A1111 draws it once for all batches, without variation.
                let plain = GenerateRequest {
                    subseed_strength: 0.0,
                    seed_resize_from: None,
                    ..request.clone()
                };
                let first = self::seeds(request, request.batch_size);
                let under_mask = image_rng(&plain, (&first, &[]), size);
                let shape = (size.0, size.1, seeds.0.len());
                Some(self.start_from_image(init, shape, under_mask, observer)?)
            }
            None => None,
        };
        self.merge_for(&passes[0])?;
        let start = self.first_start(request, &passes[0].plan, noise, from_image.as_ref())?;
        let first = self.denoise(&passes[0], start, &request.preview, observer, report)?;
        let (Some(hires), Some(latents), None) = (&request.hires, &first.latents, first.stopped)
        else {
            return Ok((first, from_image));
        };
        let encoder = self.model(passes.get(1).map_or(first.model, |pass| pass.model));
        let decoder = self.model(first.model);
        let target = hires.size.target(size.0, size.1);
        let larger = encoder.enlarge(decoder, latents, &hires.upscaler, target, observer)?;
        let second = match passes.get(1) {
            Some(pass) => {
                let noise = image_rng(request, seeds, latent_size(&larger));
                self.merge_for(pass)?;
                let start = self
                    .model(pass.model)
                    .second_start(request, &pass.plan, noise, &larger)?;
                let before = passes[0].plan.steps;
                let second = self.denoise(pass, start, &request.preview, observer, &|step| {
                    report(before + step);
                })?;
                second.after(first.infotext)
            }
            // A strength of 0 only enlarges.
            None => Outcome {
                latents: Some(larger),
                ..first
            },
        };
        Ok((second, from_image))
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
        request: &GenerateRequest,
        plan: &Plan,
        mut noise: ImageRng,
        larger: &Latents,
    ) -> Result<Start, Error> {
        let extra_noise = request.settings.hires_extra_noise;
        let latents = plan.noised_image(larger, &noise.first(), extra_noise);
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
        shown: &PreviewOptions,
        observer: &dyn Observer,
        report: &dyn Fn(usize),
    ) -> Result<Outcome, Error> {
        let plan = &pass.plan;
        let mut streams = start.streams;
        let mut network = self.network(pass, observer, start.extra);
        let keep = start.mask.clone();
        let guidance = Guidance {
            scale: pass.cfg_scale,
            parameterization: self.model(pass.model).parameterization,
            mask: start.mask,
            preview: shown.content,
        };
        let mut denoiser = CfgDenoiser::new(&mut network, guidance, plan, |_, denoised| {
            if observer.wants_preview()
                && let Some(sheet) = self.model(pass.model).preview(denoised, shown)
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
        let (mut infotext, last) = (denoiser.infotext(), denoiser.last_denoised().cloned());
        drop(denoiser);
        infotext.extend(network.infotext());
        let latents = match result {
            Ok(latents) => {
                report(plan.steps);
                Some(latents)
            }
            // What an interrupted run leaves is the last clean picture it saw.
            Err(Error::Interrupted) if network.stopped.is_some() => last,
            Err(error) => return Err(error),
        };
        let latents = match (latents, keep) {
            (Some(latents), Some(mask)) => Some(mask.restore(latents)),
            (latents, _) => latents,
        };
        let mut outcome = Outcome {
            latents,
            stopped: network.stopped,
            infotext,
            model: pass.model,
        };
        if let Some(refiner) = pass.refiner.as_ref().filter(|_| network.has_switched()) {
            outcome.model = refiner.model;
            outcome.infotext.extend(refiner.infotext.clone());
        }
        Ok(outcome)
    }

    /// The models of a pass, with its prompts.
    fn network<'a>(
        &'a self,
        pass: &'a Pass,
        observer: &'a dyn Observer,
        extra: Option<Tensor>,
    ) -> GuidedUnet<'a> {
        let part = Part::new(self.model(pass.model), &pass.prompts);
        let network = GuidedUnet::new(part, pass.sizes, observer, extra).padded(pass.padding);
        match &pass.refiner {
            None => network,
            Some(refiner) => {
                let part = Part::new(self.model(refiner.model), &refiner.prompts);
                network.then(&refiner.switch, part.scored(refiner.aesthetic_scores))
            }
        }
    }

    /// Decodes one picture's latents, interrupted or not.
    pub(super) fn decode_image(&self, latents: &Latents) -> Result<RgbImage, Error> {
        let image = self.autoencoder.decode(latents, &())?;
        image.ok_or(Error::Interrupted)
    }
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

fn timed<T>(total: &mut Duration, work: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let value = work();
    *total += start.elapsed();
    value
}
