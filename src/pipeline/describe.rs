//! The infotext of a picture, key by key in A1111's order (`create_infotext`).

use super::request::{CheckpointIdentity, GenerateRequest, VaeIdentity};
use super::texts::Texts;
use super::{Codec, Hires};
use crate::imaging::infotext::{Params, build};
use crate::prompt::Emphasis;
use crate::rng::NoiseSource;
use crate::sampling::{InfotextParams, Plan, Scheduler};

/// What the pictures of a job share.
pub(super) struct Description<'a> {
    pub(super) request: &'a GenerateRequest,
    pub(super) texts: &'a Texts,
    pub(super) checkpoint: &'a CheckpointIdentity,
    pub(super) vae: Option<&'a VaeIdentity>,
    /// The first pass, and the hires pass if it samples.
    pub(super) passes: Vec<&'a Plan>,
    /// `NAME: HASH` of every LoRA used.
    pub(super) lora_hashes: Vec<String>,
    /// `NAME: HASH` of every textual inversion used.
    pub(super) embedding_hashes: Vec<String>,
    /// Whether reading prompt editing by its old rule made a difference.
    pub(super) old_timelines: bool,
    /// Whether the UNet is told about a mask.
    pub(super) inpainting: bool,
}

impl Description<'_> {
    /// Keys beyond the fixed ones, in the order they were added (`extra_generation_params`).
    pub(super) fn extra_params(&self, denoiser: &InfotextParams) -> Params {
        let plan = self.passes[0];
        let mut extra = self.request.infotext.script.clone();
        if let Some(hires) = &self.request.hires {
            let second = self.passes.last().map_or("", |plan| plan.schedule_type);
            let prompts = (self.texts.prompt.as_str(), self.texts.negative.as_str());
            for (key, value) in hires.infotext(prompts, (plan.schedule_type, second)).iter() {
                extra.insert(key, value.clone());
            }
        }
        if let Some(init) = &self.request.init_image {
            for (key, value) in init.infotext().iter() {
                extra.insert(key, value.clone());
            }
        }
        let encodes = self.request.init_image.is_some()
            || self.request.hires.as_ref().is_some_and(Hires::encodes);
        if encodes && self.request.vae.encoder != Codec::Full {
            extra.insert("VAE Encoder", "TAESD");
        }
        if plan.schedule_type != Scheduler::Automatic.label() && !plan.sigmas().is_empty() {
            extra.insert("Schedule type", plan.schedule_type);
        }
        let options = &self.request.infotext;
        let listed = |hashes: &[String], wanted: bool| {
            (wanted && !hashes.is_empty()).then(|| hashes.join(", "))
        };
        extra.insert_some(
            "Lora hashes",
            listed(&self.lora_hashes, options.lora_hashes),
        );
        extra.insert_some(
            "Old prompt editing timelines",
            self.old_timelines.then_some(true),
        );
        extra.insert_some(
            "TI hashes",
            listed(&self.embedding_hashes, options.embedding_hashes),
        );
        let texts = [&self.texts.prompt, &self.texts.negative];
        let emphasised = texts.iter().any(|text| text.contains(['(', '[']));
        if self.request.emphasis != Emphasis::Original && emphasised {
            extra.insert("Emphasis", self.request.emphasis.label());
        }
        for (key, value) in self.request.settings.schedule_infotext().iter() {
            extra.insert(key, value.clone());
        }
        for (key, value) in plan.infotext.iter().chain(denoiser) {
            extra.insert(key.clone(), value.clone());
        }
        let hires = self.request.hires.as_ref().filter(|h| h.strength > 0.0);
        let extra_noise = hires.map(|_| self.request.settings.hires_extra_noise);
        extra.insert_some("Extra noise", extra_noise.filter(|noise| *noise > 0.0));
        if self.request.vae.decoder != Codec::Full {
            extra.insert("VAE Decoder", "TAESD");
        }
        extra
    }

    /// The whole text of one picture.
    pub(super) fn infotext(&self, seed: u64, subseed: u64, extra: &Params) -> String {
        build(
            &self.texts.prompt,
            &self.texts.negative,
            &self.params(seed, subseed, extra),
        )
    }

    fn params(&self, seed: u64, subseed: u64, extra: &Params) -> Params {
        let r = self.request;
        let mut p = Params::new();
        p.insert("Steps", r.steps);
        p.insert("Sampler", r.sampler.label());
        p.insert("Schedule type", self.passes[0].schedule_type);
        if r.infotext.cfg_scale_as_int && r.cfg_scale.fract() == 0.0 {
            p.insert("CFG scale", r.cfg_scale as i64);
        } else {
            p.insert("CFG scale", r.cfg_scale);
        }
        p.insert("Seed", seed);
        p.insert("Size", format!("{}x{}", r.width, r.height));
        self.insert_models(&mut p);
        if r.subseed_strength != 0.0 {
            p.insert("Variation seed", subseed);
            p.insert("Variation seed strength", r.subseed_strength);
        }
        p.insert_some(
            "Seed resize from",
            r.seed_resize_from.map(|(w, h)| format!("{w}x{h}")),
        );
        // A fixed place, whichever mode sets it: the extra keys change the value, not the slot.
        p.insert_some(
            "Denoising strength",
            extra.get("Denoising strength").cloned(),
        );
        p.insert_some(
            "Conditional mask weight",
            self.inpainting.then_some(r.settings.mask_weight),
        );
        p.insert_some("Clip skip", (r.clip_skip > 1).then_some(r.clip_skip));
        let delta = r.sampler_options.eta_noise_seed_delta;
        p.insert_some(
            "ENSD",
            r.sampler.writes_ensd(&r.sampler_options).then_some(delta),
        );
        p.insert_some("Init image hash", r.infotext.init_image_hash.clone());
        p.insert_some(
            "RNG",
            (r.noise_source != NoiseSource::Gpu).then(|| r.noise_source.to_string()),
        );
        p.insert_some("Tiling", r.tiling.then_some(true));
        for (key, value) in extra.iter() {
            p.insert(key, value.clone());
        }
        p.insert_some("Version", r.infotext.version.clone());
        p
    }

    /// Checkpoint and VAE, by hash and name.
    fn insert_models(&self, p: &mut Params) {
        let r = self.request;
        let hash = &self.checkpoint.shorthash;
        p.insert_some(
            "Model hash",
            (r.infotext.model_hash && !hash.is_empty()).then(|| hash.clone()),
        );
        p.insert_some(
            "Model",
            r.infotext.model_name.then(|| self.checkpoint.name.clone()),
        );
        if let Some(vae) = self.vae {
            p.insert_some(
                "VAE hash",
                (r.infotext.vae_hash && !vae.shorthash.is_empty()).then(|| vae.shorthash.clone()),
            );
            p.insert_some(
                "VAE",
                vae.path
                    .file_name()
                    .filter(|_| r.infotext.vae_name)
                    .map(|name| name.to_string_lossy().into_owned()),
            );
        }
    }
}
