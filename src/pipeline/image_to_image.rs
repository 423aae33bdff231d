//! Where a run from a picture starts: init image and mask to latents, and what is put back over the result.
//!
//! Follows `StableDiffusionProcessingImg2Img.init` of A1111 (pipeline specification, chapter 7).

use std::sync::Arc;

use candle_core::{DType, Tensor};
use image::{GrayImage, RgbImage, RgbaImage};

use super::resample::{LatentMode, resample};
use super::upscale::{PictureUpscaler, Upscaling};
use super::{Error, LATENT_PIXEL, Observer, Pipeline, SoftInpainting};
use crate::imaging::infotext::Params;
use crate::imaging::inpaint::{
    InpaintArea, MaskEdge, MaskMode, MaskOptions, PreparedMask, Region, apply_overlay, fill_masked,
    latent_mask, prepare_image_with, prepare_mask,
};
use crate::imaging::{ColorReference, ResizeMode, fit_with, soft_overlay};
use crate::rng::ImageRng;
use crate::sampling::{ExactSteps, Latents, Mask};

/// A job that starts from pictures.
#[derive(Debug, Clone)]
pub struct InitImage {
    /// One picture, or one for each of the batch; shared, so that a job can be cloned.
    pub pictures: Arc<Vec<RgbImage>>,
    /// How a picture of another size becomes the job's.
    pub resize: ImageResize,
    /// What enlarges it (`upscaler_for_img2img`).
    pub upscaler: PictureUpscaler,
    /// Share of the schedule that is run, 0 to 1.
    pub strength: f32,
    /// Whether the asked-for steps are all run.
    pub exact_steps: ExactSteps,
    /// Factor on the initial noise (`initial_noise_multiplier`).
    pub noise_multiplier: f32,
    /// Noise added besides (`img2img_extra_noise`).
    pub extra_noise: f32,
    /// Match the result's colours to the picture's.
    pub color_correction: bool,
    /// The picture whose colours are meant; `None` = the one that the run starts from.
    pub color_source: Option<Arc<RgbImage>>,
    /// The part that is painted anew; `None` = all.
    pub mask: Option<InpaintMask>,
}

/// How a picture of another size becomes the job's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageResize {
    /// In pixels.
    Pixels(ResizeMode),
    /// The latents are stretched (`resize_mode` 3).
    Latents,
}

/// Which part is painted anew, and from what.
#[derive(Debug, Clone)]
pub struct InpaintMask {
    /// 255 = painted.
    pub mask: GrayImage,
    /// Inversion, blur, area; its `size` is the job's.
    pub options: MaskOptions,
    /// What the painted part starts from.
    pub content: MaskedContent,
    /// Whether the latent mask is rounded (`mask_round`).
    pub edge: MaskEdge,
    /// Soft inpainting, and with it a mask that is not rounded.
    pub soft: Option<SoftInpainting>,
    /// Put the unpainted part of the picture back over the result.
    pub overlay: bool,
    /// How far an inpainting checkpoint is shown what is under the mask, 0 to 1 (`inpainting_mask_weight`).
    pub condition_weight: f32,
}

/// What the painted part starts from (`inpainting_fill`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MaskedContent {
    /// The colours around it.
    Fill,
    /// What was there.
    Original,
    /// Noise.
    LatentNoise,
    /// Zeros.
    LatentNothing,
}

impl InpaintMask {
    /// Whether the latent mask is rounded: soft inpainting never does.
    fn latent_edge(&self) -> MaskEdge {
        if self.soft.is_some() {
            MaskEdge::Soft
        } else {
            self.edge
        }
    }
}

impl MaskedContent {
    /// A1111's name in the infotext.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Fill => "fill",
            Self::Original => "original",
            Self::LatentNoise => "latent noise",
            Self::LatentNothing => "latent nothing",
        }
    }
}

impl InitImage {
    /// The infotext keys of image to image, in A1111's order.
    pub(super) fn infotext(&self) -> Params {
        let mut p = Params::new();
        p.insert("Denoising strength", self.strength);
        if let Some(mask) = &self.mask {
            let options = &mask.options;
            p.insert_some(
                "Mask mode",
                (options.mode == MaskMode::NotMasked).then_some("Inpaint not masked"),
            );
            p.insert_some(
                "Mask blur",
                (options.blur.0 == options.blur.1 && options.blur.0 > 0).then_some(options.blur.0),
            );
            if let InpaintArea::OnlyMasked { padding } = options.area {
                p.insert("Inpaint area", "Only masked");
                p.insert("Masked area padding", padding);
            }
            p.insert_some(
                "Masked content",
                (mask.content != MaskedContent::Original).then(|| mask.content.label()),
            );
        }
        if let Some(soft) = self.mask.as_ref().and_then(|mask| mask.soft) {
            for (key, value) in soft.infotext().iter() {
                p.insert(key, value.clone());
            }
        }
        p.insert_some(
            "Noise multiplier",
            (self.noise_multiplier.to_bits() != 1f32.to_bits()).then_some(self.noise_multiplier),
        );
        p.insert_some(
            "Extra noise",
            (self.extra_noise > 0.0).then_some(self.extra_noise),
        );
        p
    }
}

/// A batch's start from pictures.
pub(super) struct ImageStart {
    /// Clean latents, one per picture of the batch.
    pub(super) latents: Latents,
    /// What is kept.
    pub(super) mask: Option<Mask>,
    /// Extra channels for an inpainting checkpoint, `[init pictures, h, w, 5]`.
    pub(super) extra: Option<Tensor>,
    finish: Vec<Finish>,
}

/// What is done to a decoded picture.
#[derive(Default)]
struct Finish {
    colors: Option<ColorReference>,
    overlay: Overlay,
}

/// What is put back over a decoded picture.
#[derive(Default)]
enum Overlay {
    #[default]
    Nothing,
    /// What the mask leaves.
    Fixed(RgbaImage, Option<Region>),
    /// As much of the original as the result resembles.
    Soft(Box<SoftOriginal>),
}

/// What a soft overlay is made of.
struct SoftOriginal {
    settings: SoftInpainting,
    original: RgbImage,
    region: Option<Region>,
}

impl ImageStart {
    /// Colours matched, unpainted part put back. `latents` are what picture `index` was decoded from.
    pub(super) fn finish(
        &self,
        index: usize,
        latents: &Latents,
        picture: RgbImage,
    ) -> Result<RgbImage, Error> {
        let Some(finish) = self.finish.get(index % self.finish.len().max(1)) else {
            return Ok(picture);
        };
        let picture = match &finish.colors {
            Some(colors) => colors.apply(&picture),
            None => picture,
        };
        match (&finish.overlay, &self.mask) {
            (Overlay::Fixed(overlay, region), _) => Ok(apply_overlay(&picture, overlay, *region)?),
            (Overlay::Soft(soft), Some(mask)) => {
                let (before, after) = (&self.latents, &latents.data());
                let painted = soft.settings.opacity(index, &mask.paint, before, after);
                let size = picture.dimensions();
                let overlay = soft_overlay(&soft.original, &painted, size, soft.region)?;
                Ok(apply_overlay(&picture, &overlay, soft.region)?)
            }
            _ => Ok(picture),
        }
    }
}

impl Pipeline {
    /// Encodes the init pictures of a batch of `batch` pictures of `width` x `height` pixels. `under_mask` is
    /// what a mask may ask to start from.
    pub(super) fn start_from_image(
        &self,
        init: &InitImage,
        (width, height, batch): (usize, usize, usize),
        under_mask: ImageRng,
        observer: &dyn Observer,
    ) -> Result<ImageStart, Error> {
        let job = Upscaling::new(&self.upscalers, observer, &|_, _| {});
        let enlarge = |picture: &RgbImage, width, height| {
            job.resize_to(picture, &init.upscaler, (width, height))
        };
        let size = (width as u32, height as u32);
        let (h, w) = (height / LATENT_PIXEL, width / LATENT_PIXEL);
        let painted = Painted::new(init)?;
        let (mut encoded, mut finish, mut extra) = (Vec::new(), Vec::new(), Vec::new());
        for source in init.pictures.iter() {
            let (picture, end) = prepare_picture(init, source, painted.as_ref(), size, &enlarge)?;
            let latents = self.encode_image(&picture)?;
            if self.unet.in_channels() > latents.shape[1] {
                extra.push(self.painted(&picture, painted.as_ref(), (h, w))?);
            }
            encoded.push(resample(&latents, h, w, LatentMode::Bilinear));
            finish.push(end);
        }
        let latents = stack(&encoded, batch)?;
        let (latents, mask) = match painted {
            Some(painted) => painted.cover(latents, under_mask)?,
            // Everything is painted.
            None => (latents, None),
        };
        let extra = match &extra[..] {
            [] => None,
            extra => Some(Tensor::cat(extra, 0)?),
        };
        Ok(ImageStart {
            latents,
            mask,
            extra,
            finish,
        })
    }

    /// Latents of an 8-bit picture, as the sampler has them.
    pub(super) fn encode_image(&self, picture: &RgbImage) -> Result<Latents, Error> {
        let area = (picture.width() * picture.height()) as usize;
        let raw = picture.as_raw();
        let planes: Vec<f32> = (0..3 * area)
            .map(|i| f32::from(raw[i % area * 3 + i / area]) / 255.0 * 2.0 - 1.0)
            .collect();
        self.encode_picture(&planes, picture.width() as usize, picture.height() as usize)
    }

    /// What an inpainting checkpoint is told: the mask, and the picture without what is under it.
    fn painted(
        &self,
        picture: &RgbImage,
        painted: Option<&Painted<'_>>,
        (h, w): (usize, usize),
    ) -> Result<Tensor, Error> {
        let covered = |x: u32, y: u32| match painted {
            Some(Painted { asked, prepared }) => {
                let share = f32::from(prepared.mask.get_pixel(x, y)[0]) / 255.0;
                match asked.latent_edge() {
                    MaskEdge::Soft => share,
                    MaskEdge::Hard => share.round(),
                }
            }
            None => 1.0,
        };
        let weight = painted.map_or(1.0, |painted| painted.asked.condition_weight);
        let (width, height) = picture.dimensions();
        let area = (width * height) as usize;
        let raw = picture.as_raw();
        let shown = |i: usize| {
            let (pixel, channel) = (i % area, i / area);
            let value = f32::from(raw[pixel * 3 + channel]) / 255.0 * 2.0 - 1.0;
            let hidden = value * (1.0 - covered(pixel as u32 % width, pixel as u32 / width));
            value + (hidden - value) * weight
        };
        let planes: Vec<f32> = (0..3 * area).map(shown).collect();
        let masked = self.encode_picture(&planes, width as usize, height as usize)?;
        let masked = resample(&masked, h, w, LatentMode::Bilinear);
        let nearest = |i: usize| {
            let (x, y) = (
                (i % w) as u32 * width / w as u32,
                (i / w) as u32 * height / h as u32,
            );
            covered(x, y)
        };
        let mask: Vec<f32> = (0..h * w).map(nearest).collect();
        let device = &self.place.device;
        let mask = Tensor::from_vec(mask, (1, h, w, 1), device)?;
        let masked = Tensor::from_vec(
            super::network::channels_last(&masked.data(), masked.shape),
            (1, h, w, masked.shape[1]),
            device,
        )?;
        Ok(crate::nn::concat_channels(&mask, &masked)?.to_dtype(DType::F32)?)
    }
}

/// The part that is painted anew, at the job's size.
struct Painted<'a> {
    asked: &'a InpaintMask,
    prepared: PreparedMask,
}

impl<'a> Painted<'a> {
    /// Nothing without a mask. An empty mask with "only masked" means plain image to image, as in A1111.
    fn new(init: &'a InitImage) -> Result<Option<Self>, Error> {
        let Some(asked) = &init.mask else {
            return Ok(None);
        };
        let prepared = prepare_mask(&asked.mask, &asked.options)?;
        Ok(prepared.map(|prepared| Self { asked, prepared }))
    }

    /// What is put back over the result of `source`, `fixed` being made of its kept part.
    fn overlay(
        &self,
        fixed: RgbaImage,
        original: impl FnOnce() -> Result<RgbImage, Error>,
    ) -> Result<Overlay, Error> {
        let region = self.prepared.region;
        Ok(match self.asked.soft {
            Some(settings) => Overlay::Soft(Box::new(SoftOriginal {
                settings,
                original: original()?,
                region,
            })),
            None if self.asked.overlay => Overlay::Fixed(fixed, region),
            None => Overlay::Nothing,
        })
    }

    /// The latents to start from with what stands under the mask, and the mask in latent pixels.
    fn cover(
        &self,
        latents: Latents,
        mut under_mask: ImageRng,
    ) -> Result<(Latents, Option<Mask>), Error> {
        let [_, _, h, w] = latents.shape;
        let edge = self.asked.latent_edge();
        let plane = latent_mask(&self.prepared.mask, (w as u32, h as u32), edge)?;
        let paint = Latents::new(
            plane.repeat(latents.data().len() / plane.len()),
            latents.shape,
        );
        let latents = match self.asked.content {
            MaskedContent::Fill | MaskedContent::Original => latents,
            MaskedContent::LatentNothing => latents.zip(&paint, |z, p| z * (1.0 - p)),
            MaskedContent::LatentNoise => {
                let noise = under_mask.first().zip(&paint, |n, p| n * p);
                &latents.zip(&paint, |z, p| z * (1.0 - p)) + &noise
            }
        };
        let mask = Mask {
            paint,
            init: latents.clone(),
            soft: self.asked.soft.map(|soft| soft.blend),
        };
        Ok((latents, Some(mask)))
    }
}

/// What enlarges a picture to a width and height.
type Enlarge<'a> = &'a dyn Fn(&RgbImage, u32, u32) -> Result<RgbImage, Error>;

/// The picture the model sees, and what is done to its result: resized, under a mask filled, its colours remembered.
fn prepare_picture(
    init: &InitImage,
    source: &RgbImage,
    painted: Option<&Painted<'_>>,
    size: (u32, u32),
    enlarge: Enlarge<'_>,
) -> Result<(RgbImage, Finish), Error> {
    let fitted = || match init.resize {
        ImageResize::Pixels(mode) => fit_with(source, mode, size, enlarge),
        ImageResize::Latents => Ok(source.clone()),
    };
    let mut end = Finish::default();
    let picture = match painted {
        Some(painted) => {
            let Painted { asked, prepared } = painted;
            let ready = prepare_image_with(source, prepared, &asked.options, enlarge)?;
            end.overlay = painted.overlay(ready.overlay, || match prepared.region {
                None => fitted(),
                Some(_) => Ok(source.clone()),
            })?;
            match asked.content {
                MaskedContent::Original => ready.image,
                _ => fill_masked(&ready.image, &prepared.mask),
            }
        }
        None => fitted()?,
    };
    if init.color_correction {
        end.colors = Some(ColorReference::new(
            init.color_source.as_deref().unwrap_or(&picture),
        ));
    }
    Ok((picture, end))
}

/// One batch of latents: a single picture repeated, or each its own.
fn stack(encoded: &[Latents], batch: usize) -> Result<Latents, Error> {
    match encoded {
        [one] => Ok(one.repeat(batch)),
        several if several.len() == batch => {
            let [_, c, h, w] = several[0].shape;
            let data = several
                .iter()
                .flat_map(|latents| latents.data().into_owned())
                .collect();
            Ok(Latents::new(data, [batch, c, h, w]))
        }
        other => Err(Error::Invalid(format!(
            "{} init images for a batch of {batch}; give one, or one for each picture",
            other.len()
        ))),
    }
}
