//! [`Pipeline::generate`] as numbered steps: a job is one pass of the sampler or two, then pictures.
//!
//! Invariant: picture `i` depends on seed `i` alone, whatever batch it is made in.

use std::ops::Range;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::describe::Description;
use super::image_to_image::ImageStart;
use super::networks::Remarks;
use super::passes::Pass;
use super::preview;
use super::sampling_run::Outcome;
use super::seeds::{seeds, singles, subseeds};
use super::texts::Texts;
use super::{
    Control, Error, GenerateRequest, Generated, GeneratedImage, LATENT_PIXEL, Observer, Pipeline,
    Progress, Timings,
};
use crate::imaging::infotext::Params;

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
        match &request.script {
            Some(script) => self.run_script(script, request, observer),
            None => self.generate_once(request, observer),
        }
    }

    /// Runs one job whose script, if any, is not looked at.
    pub(super) fn generate_once(
        &mut self,
        request: &GenerateRequest,
        observer: &dyn Observer,
    ) -> Result<Generated, Error> {
        // 1. Check what would otherwise fail deep inside.
        check(request)?;

        // 2. Read the prompts as they are shown, and what they ask for besides text.
        let texts = Texts::new(request);
        let networks = texts.networks(request)?;

        // 3. Work out each pass; merge its LoRAs and encode its prompts.
        self.load_others(request)?;
        let mut done = nothing_yet(request);
        let mut remarks = Remarks::default();
        let passes = timed(&mut done.timings.text, || {
            self.passes(request, &texts, networks, &mut remarks)
        })?;
        done.comments = std::mem::take(&mut remarks.comments);
        done.inpainting_conditioning = self.is_inpainting();
        self.prepare_models(request);

        // 4. Know how to describe what is made.
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
            inpainting: done.inpainting_conditioning,
        };
        done.extra_params = description.extra_params(&Vec::new());

        let mut begun = None;
        for batch in 0..request.batch_count {
            // 5. Denoise: from noise or from pictures, and once more after enlarging.
            let sampled =
                self.sample_batch(request, &passes, batch, &mut begun, &mut done, observer)?;
            let Some(batch) = sampled else {
                break;
            };
            done.extra_params = description.extra_params(&batch.outcome.infotext);

            // 6. Decode picture by picture, finish it, and say how it was made. The UNet's idle memory is of no use to the VAE.
            crate::trim_memory();
            self.finish_batch(batch, &description, &mut done, observer)?;
            if done.interrupted {
                break;
            }
        }
        Ok(done)
    }

    /// Tells every model of a job what all of it has in common.
    fn prepare_models(&self, request: &GenerateRequest) {
        let memory = self.autoencoder.memory();
        for model in self.others.iter().map(|(_, model)| model).chain([self]) {
            model.autoencoder.begin(&request.vae, memory);
            model
                .place
                .circular
                .store(request.tiling, Ordering::Relaxed);
        }
    }

    /// Samples batch `number`; `None` if the job is to end without it.
    fn sample_batch(
        &mut self,
        request: &GenerateRequest,
        passes: &[Pass],
        number: usize,
        begun: &mut Option<Rc<ImageStart>>,
        done: &mut Generated,
        observer: &dyn Observer,
    ) -> Result<Option<Batch>, Error> {
        if number > 0 && observer.control() == Control::Interrupt {
            done.interrupted = true;
            return Ok(None);
        }
        let steps = passes.iter().map(|pass| pass.plan.steps).sum();
        let report = |step: usize| {
            observer.progress(Progress {
                step: step.min(steps),
                steps,
                batch: number,
                batches: request.batch_count,
            });
        };
        let range = number * request.batch_size..(number + 1) * request.batch_size;
        let seeds = (&done.seeds[range.clone()], &done.subseeds[range.clone()]);
        let clock = Instant::now();
        let sampled = self.denoise_batch(request, passes, seeds, begun, observer, &report);
        done.timings.sample += clock.elapsed();
        let outcome = match sampled {
            // An upscaler was stopped: the batch has no picture, those before it stay.
            Err(Error::Skipped) => Outcome::nothing(passes[0].model),
            Err(Error::Interrupted) => {
                done.interrupted = true;
                return Ok(None);
            }
            other => other?,
        };
        done.timings.steps += steps;
        done.interrupted = outcome.stopped == Some(Control::Interrupt);
        Ok(Some(Batch {
            range,
            outcome,
            from_image: begun.clone(),
        }))
    }

    /// Decodes and describes the pictures of a batch.
    fn finish_batch(
        &self,
        batch: Batch,
        description: &Description<'_>,
        done: &mut Generated,
        observer: &dyn Observer,
    ) -> Result<(), Error> {
        let Batch {
            range,
            outcome,
            from_image,
        } = batch;
        let clock = Instant::now();
        let first = done.images.len();
        let decoder = &self.model(outcome.model).autoencoder;
        for (index, (i, latents)) in range.zip(singles(outcome.latents)).enumerate() {
            // What an interrupt left of the sampling is decoded to the end.
            let watched: &dyn Observer = if done.interrupted { &() } else { observer };
            let Some(mut image) = decoder.decode(&latents, watched)? else {
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
                latents: description
                    .request
                    .keep_latents
                    .then(|| latents.into_data()),
            });
        }
        done.timings.decode += clock.elapsed();
        if observer.wants_finished() {
            let finished = done.images[first..].iter().map(|made| made.image.clone());
            if let Some(sheet) = preview::sheet(&finished.collect::<Vec<_>>()) {
                observer.preview(sheet);
            }
        }
        Ok(())
    }
}

/// A sampled batch.
struct Batch {
    /// Numbers of its pictures in the job.
    range: Range<usize>,
    outcome: Outcome,
    from_image: Option<Rc<ImageStart>>,
}

/// The plan of a job, without pictures.
fn nothing_yet(request: &GenerateRequest) -> Generated {
    let total = request.batch_size * request.batch_count;
    Generated {
        images: Vec::new(),
        extra_params: Params::new(),
        seeds: seeds(request, total),
        subseeds: subseeds(request, total),
        timings: Timings::default(),
        inpainting_conditioning: false,
        interrupted: false,
        comments: Vec::new(),
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
