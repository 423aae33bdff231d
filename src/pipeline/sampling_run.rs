//! One batch through the sampler: the first pass from noise or pictures, the second from the enlarged result.

use std::rc::Rc;

use candle_core::Tensor;
use image::RgbImage;

use super::device_latents::DeviceLatents;
use super::image_to_image::ImageStart;
use super::network::{GuidedUnet, Part};
use super::passes::Pass;
use super::preview::PreviewOptions;
use super::refiner::Model;
use super::seeds::{image_rng, latent_size, seeds};
use super::{Control, Error, GenerateRequest, Observer, Pipeline};
use crate::rng::ImageRng;
use crate::sampling::{
    CfgDenoiser, Guidance, InfotextParams, Latents, Mask, NoiseStreams, Plan, Sampler, sample,
};

/// Where a pass begins.
struct Start {
    latents: Latents,
    streams: NoiseStreams,
    mask: Option<Mask>,
    extra: Option<Tensor>,
}

/// A finished pass, or what an interrupt left of it.
pub(super) struct Outcome {
    pub(super) latents: Option<Latents>,
    pub(super) stopped: Option<Control>,
    pub(super) infotext: InfotextParams,
    /// The model at work at its end.
    pub(super) model: Model,
}

impl Outcome {
    /// A batch that was skipped before it had any latents.
    pub(super) fn nothing(model: Model) -> Self {
        Self {
            latents: None,
            stopped: Some(Control::Skip),
            infotext: InfotextParams::new(),
            model,
        }
    }

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
    /// All passes of one batch. `begun` is what all batches of the job begin with, from its pictures, once it is there.
    pub(super) fn denoise_batch(
        &mut self,
        request: &GenerateRequest,
        passes: &[Pass],
        seeds: (&[u64], &[u64]),
        begun: &mut Option<Rc<ImageStart>>,
        observer: &dyn Observer,
        report: &dyn Fn(usize),
    ) -> Result<Outcome, Error> {
        let size = (request.width, request.height);
        let noise = image_rng(request, seeds, size);
        if begun.is_none() {
            *begun = self.image_start(request, observer)?.map(Rc::new);
        }
        self.merge_for(&passes[0])?;
        let start = self.first_start(request, &passes[0].plan, noise, begun.as_deref())?;
        let first = self.denoise(&passes[0], start, &request.preview, observer, report)?;
        let (Some(hires), Some(latents), None) = (&request.hires, &first.latents, first.stopped)
        else {
            return Ok(first);
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
        Ok(second)
    }

    /// What every batch of a job begins with: the latents of its pictures, and what stands under a mask.
    fn image_start(
        &self,
        request: &GenerateRequest,
        observer: &dyn Observer,
    ) -> Result<Option<ImageStart>, Error> {
        let Some(init) = &request.init_image else {
            return Ok(None);
        };
        // A1111 draws it once for all batches, without variation.
        let plain = GenerateRequest {
            subseed_strength: 0.0,
            seed_resize_from: None,
            ..request.clone()
        };
        let first = seeds(request, request.batch_size);
        let (width, height) = (request.width, request.height);
        let under_mask = image_rng(&plain, (&first, &[]), (width, height));
        let shape = (width, height, request.batch_size);
        let start = self.start_from_image(init, shape, under_mask, observer)?;
        Ok(Some(start))
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
        let latents = self.model(pass.model).placed(start.latents, plan.sampler);
        let result = sample(
            plan,
            &mut denoiser,
            latents,
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
        let latents = latents.map(on_host).transpose()?;
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

    /// Latents where the steps of a run leave them: with the UNet, or on the host.
    fn placed(&self, latents: Latents, sampler: Sampler) -> Latents {
        // Its step size depends on the values: it would fetch them every step, and must hear at once of values that are no numbers.
        let looks_at_values = sampler == Sampler::DpmAdaptive;
        let device = &self.place.device;
        if (self.load_options.latents_on_device || device.is_cuda()) && !looks_at_values {
            DeviceLatents::send(&latents, device)
        } else {
            latents
        }
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

/// What a run ends with, on the host. On a device nobody has looked at the values before.
fn on_host(latents: Latents) -> Result<Latents, Error> {
    let latents = latents.into_host();
    if latents.data().iter().all(|v| v.is_finite()) {
        Ok(latents)
    } else {
        Err(Error::NotANumber { stage: "Unet" })
    }
}
