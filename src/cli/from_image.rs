//! The options of image to image and hires fix, under their API names, and what they mean.
//!
//! They become the API's own fields, so that both are checked and read by the same code.

use std::path::{Path, PathBuf};

use anyhow::Context;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use clap::Args;
use serde_json::{Value, json};

use super::Stop;
use crate::api;
use crate::api::options::Options;
use crate::api::pictures::{self, Reader, Sources};
use crate::api::types::{HiresFields, ImageFields};
use crate::config::Limits;
use crate::engine::limits::{Violation, check_hires, check_image};
use crate::pipeline::{GenerateRequest, Hires};

/// What both kinds of job need, and what a job from pictures needs.
#[derive(Debug, Args)]
#[command(next_help_heading = "Image to image")]
pub struct ImageArgs {
    /// Start from this picture; several times for one picture of the batch each
    #[arg(long, value_name = "FILE")]
    pub init_image: Vec<PathBuf>,
    /// Paint where this picture is white
    #[arg(long, value_name = "FILE")]
    pub mask: Option<PathBuf>,
    /// Share of the noise, 0 to 1 [default: 0.75]; also of hires fix
    #[arg(long, value_name = "F", allow_negative_numbers = true)]
    pub denoising_strength: Option<f64>,
    /// 0 stretch, 1 crop, 2 fill, 3 stretch latents
    #[arg(
        long,
        value_name = "N",
        default_value_t = 0,
        allow_negative_numbers = true
    )]
    pub resize_mode: i64,
    /// Blur of the mask's edge in pixels
    #[arg(
        long,
        value_name = "PX",
        default_value_t = 4,
        allow_negative_numbers = true
    )]
    pub mask_blur: i64,
    /// Blur along the rows [default: --mask-blur]
    #[arg(long, value_name = "PX", allow_negative_numbers = true)]
    pub mask_blur_x: Option<i64>,
    /// Blur along the columns [default: --mask-blur]
    #[arg(long, value_name = "PX", allow_negative_numbers = true)]
    pub mask_blur_y: Option<i64>,
    /// Whether the mask is all or nothing, true or false
    #[arg(long, value_name = "BOOL", default_value = "true", value_parser = switch)]
    pub mask_round: Switch,
    /// What the painted part starts from: 0 fill, 1 original, 2 latent noise, 3 latent nothing
    #[arg(
        long,
        value_name = "N",
        default_value_t = 0,
        allow_negative_numbers = true
    )]
    pub inpainting_fill: i64,
    /// Whether only the surroundings of the mask are worked on, enlarged, true or false
    #[arg(long, value_name = "BOOL", default_value = "true", value_parser = switch)]
    pub inpaint_full_res: Switch,
    /// Pixels around the mask that are worked on with it
    #[arg(
        long,
        value_name = "PX",
        default_value_t = 0,
        allow_negative_numbers = true
    )]
    pub inpaint_full_res_padding: i64,
    /// Whether to paint where the mask is black instead, true or false
    #[arg(long, value_name = "BOOL", default_value = "false", value_parser = switch)]
    pub inpainting_mask_invert: Switch,
    /// Factor on the initial noise [default: 1]
    #[arg(long, value_name = "F", allow_negative_numbers = true)]
    pub initial_noise_multiplier: Option<f64>,
}

/// Options of hires fix; any of them turns it on.
#[derive(Debug, Args)]
#[command(next_help_heading = "Hires fix")]
pub struct HiresArgs {
    /// Enlarge the picture and refine it
    #[arg(long)]
    pub enable_hr: bool,
    /// How many times larger [default: 2]
    #[arg(long, value_name = "F", allow_negative_numbers = true)]
    pub hr_scale: Option<f64>,
    /// What enlarges [default: Latent]
    #[arg(long, value_name = "NAME")]
    pub hr_upscaler: Option<String>,
    /// Steps of the second pass [default: --steps]
    #[arg(
        long,
        visible_alias = "hr-second-pass-steps",
        value_name = "N",
        allow_negative_numbers = true
    )]
    pub hr_steps: Option<i64>,
    /// Width to enlarge to [default: as --hr-scale says]
    #[arg(long, value_name = "PX", allow_negative_numbers = true)]
    pub hr_resize_x: Option<i64>,
    /// Height to enlarge to [default: as --hr-scale says]
    #[arg(long, value_name = "PX", allow_negative_numbers = true)]
    pub hr_resize_y: Option<i64>,
    /// Checkpoint of the second pass, by path or name [default: --checkpoint]
    #[arg(long, visible_alias = "hr-checkpoint", value_name = "PATH|NAME")]
    pub hr_checkpoint_name: Option<String>,
    /// Sampler of the second pass [default: --sampler]
    #[arg(long, visible_alias = "hr-sampler", value_name = "NAME")]
    pub hr_sampler_name: Option<String>,
    /// Sigma schedule of the second pass [default: --scheduler]
    #[arg(long, value_name = "NAME")]
    pub hr_scheduler: Option<String>,
    /// Prompt of the second pass [default: PROMPT]
    #[arg(long, value_name = "TEXT")]
    pub hr_prompt: Option<String>,
    /// Negative prompt of the second pass [default: --negative]
    #[arg(long, value_name = "TEXT")]
    pub hr_negative_prompt: Option<String>,
    /// Guidance scale of the second pass [default: --cfg-scale]
    #[arg(long, value_name = "F", allow_negative_numbers = true)]
    pub hr_cfg: Option<f64>,
}

/// A switch that is typed as a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Switch {
    /// `true`, `1`, ….
    On,
    /// `false`, `0`, ….
    Off,
}

fn switch(text: &str) -> Result<Switch, String> {
    match text.to_lowercase().as_str() {
        "true" | "1" | "on" | "yes" => Ok(Switch::On),
        "false" | "0" | "off" | "no" => Ok(Switch::Off),
        _ => Err("use `true` or `false`".into()),
    }
}

/// What a job starts from, and what follows it.
#[derive(Debug)]
pub struct Start {
    image: Option<Image>,
    hires: Option<(HiresFields, Hires)>,
    options: Options,
}

/// Pictures as they lie on the disk and decoded.
#[derive(Debug)]
struct Image {
    fields: ImageFields,
    files: Vec<Vec<u8>>,
    mask: Option<Vec<u8>>,
    sources: Sources,
}

impl Start {
    /// Reads the files and looks the names up. The settings of A1111 that img2img follows have their defaults.
    ///
    /// # Errors
    /// Exit 2 for options that do not go together and unknown names, 1 for a file that cannot be used.
    pub fn choose(args: &ImageArgs, hires: &HiresArgs, limits: &Limits) -> Result<Self, Stop> {
        let options = Options::defaults();
        let strength = args.denoising_strength.unwrap_or(0.75);
        let second = match hires.fields(strength) {
            Some(fields) => {
                let built = api::hires::build(&fields).map_err(Stop::usage_text)?;
                Some((fields, built))
            }
            None => None,
        };
        let has_image = !args.init_image.is_empty();
        let problem = match (has_image, &second) {
            (true, Some(_)) => {
                "hires fix starts from a prompt: leave `--init-image` or `--hr-…` out"
            }
            (false, _) if args.mask.is_some() => "`--mask` needs `--init-image`",
            (false, None) if args.denoising_strength.is_some() => {
                "`--denoising-strength` needs `--init-image` or hires fix (`--hr-scale`)"
            }
            _ => "",
        };
        if !problem.is_empty() {
            return Err(Stop::usage_text(problem));
        }
        let image = if has_image {
            Some(Image::read(args, strength, &options, limits)?)
        } else {
            None
        };
        Ok(Self {
            image,
            hires: second,
            options,
        })
    }

    /// `txt2img` or `img2img`.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        if self.image.is_some() {
            "img2img"
        } else {
            "txt2img"
        }
    }

    /// Every number outside its limits; the second pass is left out while the first one's size is not known.
    #[must_use]
    pub fn check(
        &self,
        size: Option<(i64, i64)>,
        batch_size: i64,
        steps: i64,
        limits: &Limits,
    ) -> Vec<Violation> {
        let mut found = Vec::new();
        if let Some(image) = &self.image {
            let numbers = pictures::numbers(&image.fields, &self.options, steps);
            found.extend(check_image(&numbers));
        }
        if let (Some((fields, _)), Some(size)) = (&self.hires, size) {
            let numbers = api::hires::numbers(fields, size, batch_size, steps);
            found.extend(check_hires(&numbers, limits));
        }
        found
    }

    /// Whether the batch is as large as there are pictures.
    ///
    /// # Errors
    /// Exit 2 if there are more pictures.
    pub fn check_batch(&self, batch_size: i64) -> Result<(), Stop> {
        let count = self.image.as_ref().map_or(1, |image| image.files.len());
        if count > 1 && count as i64 > batch_size {
            return Err(Stop::usage_text(format!(
                "{count} init images for a batch of {batch_size}; give one, or as many as `--batch-size` says"
            )));
        }
        Ok(())
    }

    /// Puts pictures and second pass into a request whose numbers were checked. Returns a remark for the user.
    ///
    /// # Errors
    /// Exit 2 for pictures that do not fit the request.
    pub fn apply(
        self,
        request: &mut GenerateRequest,
        limits: &Limits,
    ) -> Result<Option<&'static str>, Stop> {
        request.hires = self.hires.map(|(_, hires)| hires);
        let Some(image) = self.image else {
            return Ok(None);
        };
        if image.files.len() > 1 {
            request.batch_size = image.files.len();
        }
        let size = (request.width as u32, request.height as u32);
        let shape = (size, request.batch_size);
        let (init, remark) =
            pictures::build(&image.fields, image.sources, shape, &self.options, limits)
                .map_err(Stop::usage)?;
        request.init_image = Some(init);
        Ok(remark)
    }

    /// Adds the API's fields to the body of a request.
    pub fn add_to(&self, body: &mut Value) {
        if let Some(image) = &self.image {
            image.add_to(body);
        }
        if let Some((fields, _)) = &self.hires {
            add_hires(body, fields);
        }
    }
}

impl Image {
    fn read(
        args: &ImageArgs,
        strength: f64,
        options: &Options,
        limits: &Limits,
    ) -> Result<Self, Stop> {
        let fields = args.fields(strength);
        let mut reader = Reader::new(&fields, options, limits).map_err(Stop::usage)?;
        let (mut files, mut pictures) = (Vec::new(), Vec::new());
        for path in &args.init_image {
            let file = read(path)?;
            pictures.push(reader.picture(&file).map_err(unusable(path))?);
            files.push(file);
        }
        let (mut mask, mut grey) = (None, None);
        if let Some(path) = &args.mask {
            let file = read(path)?;
            grey = Some(reader.mask(&file).map_err(unusable(path))?);
            mask = Some(file);
        }
        Ok(Self {
            fields,
            files,
            mask,
            sources: Sources {
                pictures,
                mask: grey,
            },
        })
    }

    fn add_to(&self, body: &mut Value) {
        let fields = &self.fields;
        let images: Vec<String> = self
            .files
            .iter()
            .map(|file| STANDARD.encode(file))
            .collect();
        body["init_images"] = json!(images);
        if let Some(file) = &self.mask {
            body["mask"] = json!(STANDARD.encode(file));
        }
        body["denoising_strength"] = json!(fields.denoising_strength);
        body["resize_mode"] = json!(fields.resize_mode);
        body["mask_blur_x"] = json!(fields.mask_blur_x);
        body["mask_blur_y"] = json!(fields.mask_blur_y);
        body["mask_round"] = json!(fields.mask_round);
        body["inpainting_fill"] = json!(fields.inpainting_fill);
        body["inpaint_full_res"] = json!(fields.inpaint_full_res);
        body["inpaint_full_res_padding"] = json!(fields.inpaint_full_res_padding);
        body["inpainting_mask_invert"] = json!(fields.inpainting_mask_invert);
        body["initial_noise_multiplier"] = json!(fields.initial_noise_multiplier);
    }
}

impl ImageArgs {
    fn fields(&self, denoising_strength: f64) -> ImageFields {
        ImageFields {
            denoising_strength,
            resize_mode: self.resize_mode,
            mask_blur_x: self.mask_blur_x.unwrap_or(self.mask_blur),
            mask_blur_y: self.mask_blur_y.unwrap_or(self.mask_blur),
            mask_blur: None,
            mask_round: self.mask_round == Switch::On,
            inpainting_fill: self.inpainting_fill,
            inpaint_full_res: self.inpaint_full_res == Switch::On,
            inpaint_full_res_padding: self.inpaint_full_res_padding,
            inpainting_mask_invert: i64::from(self.inpainting_mask_invert == Switch::On),
            initial_noise_multiplier: self.initial_noise_multiplier,
        }
    }
}

impl HiresArgs {
    /// The API's fields; `None` if no option of hires fix was given.
    fn fields(&self, denoising_strength: f64) -> Option<HiresFields> {
        let size =
            self.hr_scale.is_some() || self.hr_resize_x.is_some() || self.hr_resize_y.is_some();
        let names = [
            &self.hr_upscaler,
            &self.hr_checkpoint_name,
            &self.hr_sampler_name,
            &self.hr_scheduler,
            &self.hr_prompt,
            &self.hr_negative_prompt,
        ];
        let given = self.enable_hr
            || size
            || self.hr_steps.is_some()
            || self.hr_cfg.is_some()
            || names.iter().any(|name| name.is_some());
        given.then(|| HiresFields {
            enable_hr: true,
            denoising_strength,
            firstphase_width: 0,
            firstphase_height: 0,
            hr_scale: self.hr_scale.unwrap_or(2.0),
            hr_upscaler: self.hr_upscaler.clone(),
            hr_second_pass_steps: self.hr_steps.unwrap_or(0),
            hr_resize_x: self.hr_resize_x.unwrap_or(0),
            hr_resize_y: self.hr_resize_y.unwrap_or(0),
            hr_checkpoint_name: self.hr_checkpoint_name.clone(),
            hr_sampler_name: self.hr_sampler_name.clone(),
            hr_scheduler: self.hr_scheduler.clone(),
            hr_prompt: self.hr_prompt.clone().unwrap_or_default(),
            hr_negative_prompt: self.hr_negative_prompt.clone().unwrap_or_default(),
            hr_cfg: self.hr_cfg,
        })
    }
}

fn add_hires(body: &mut Value, fields: &HiresFields) {
    body["enable_hr"] = json!(true);
    body["denoising_strength"] = json!(fields.denoising_strength);
    body["hr_scale"] = json!(fields.hr_scale);
    body["hr_upscaler"] = json!(fields.hr_upscaler);
    body["hr_second_pass_steps"] = json!(fields.hr_second_pass_steps);
    body["hr_resize_x"] = json!(fields.hr_resize_x);
    body["hr_resize_y"] = json!(fields.hr_resize_y);
    body["hr_checkpoint_name"] = json!(fields.hr_checkpoint_name);
    body["hr_sampler_name"] = json!(fields.hr_sampler_name);
    body["hr_scheduler"] = json!(fields.hr_scheduler);
    body["hr_prompt"] = json!(fields.hr_prompt);
    body["hr_negative_prompt"] = json!(fields.hr_negative_prompt);
    body["hr_cfg"] = json!(fields.hr_cfg);
}

fn read(path: &Path) -> Result<Vec<u8>, Stop> {
    std::fs::read(path)
        .with_context(|| format!("cannot read `{}`", path.display()))
        .map_err(Stop::Failed)
}

fn unusable(path: &Path) -> impl Fn(pictures::Error) -> Stop {
    move |error| Stop::Failed(anyhow::anyhow!("`{}`: {error}", path.display()))
}
