//! Hires fix: the first pass's result enlarged, then denoised again from part of its schedule.
//!
//! Follows `StableDiffusionProcessingTxt2Img.sample_hr_pass` of A1111 (pipeline specification, chapter 6).

use super::resample::{LatentMode, resample};
use super::upscale::{PictureUpscaler, Upscaling};
use super::{Error, LATENT_PIXEL, Observer, OtherCheckpoint, Pipeline};
use crate::imaging::infotext::Params;
use crate::sampling::{Latents, Sampler, Scheduler};

/// The second pass.
#[derive(Debug, Clone)]
pub struct Hires {
    /// How the target size was asked for.
    pub size: HiresSize,
    /// How the first result is enlarged.
    pub upscaler: HiresUpscaler,
    /// Steps of the second pass; 0 = as the first.
    pub steps: usize,
    /// Share of the schedule that is run, 0 to 1; 0 only enlarges.
    pub strength: f32,
    /// Sampler of the second pass; `None` = the same.
    pub sampler: Option<Sampler>,
    /// Scheduler of the second pass; `None` = the same.
    pub scheduler: Option<Scheduler>,
    /// Prompt of the second pass; empty = the same.
    pub prompt: String,
    /// Negative prompt of the second pass; empty = the same.
    pub negative_prompt: String,
    /// Guidance scale of the second pass; `None` = the same.
    pub cfg_scale: Option<f32>,
    /// Checkpoint of the second pass; `None` = the same.
    pub checkpoint: Option<OtherCheckpoint>,
}

/// Twice the size by latents, as A1111 begins.
impl Default for Hires {
    fn default() -> Self {
        Self {
            size: HiresSize::Scale(2.0),
            upscaler: HiresUpscaler::Latent(LatentMode::Bilinear),
            steps: 0,
            strength: 0.75,
            sampler: None,
            scheduler: None,
            prompt: String::new(),
            negative_prompt: String::new(),
            cfg_scale: None,
            checkpoint: None,
        }
    }
}

/// Which of the two passes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum HiresPass {
    /// At the asked-for size.
    First,
    /// At the enlarged size.
    Second,
}

/// How the target size was asked for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum HiresSize {
    /// A factor on both sides.
    Scale(f64),
    /// Width and height in pixels; a 0 follows the other side.
    Resize(usize, usize),
}

/// How the first result is enlarged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HiresUpscaler {
    /// Its latents are.
    Latent(LatentMode),
    /// The decoded picture is.
    Picture(PictureUpscaler),
}

impl HiresUpscaler {
    /// A1111's name.
    #[must_use]
    pub fn label(&self) -> &str {
        match self {
            Self::Latent(mode) => mode.label(),
            Self::Picture(upscaler) => upscaler.label(),
        }
    }

    /// Reads A1111's name of one that needs no model.
    #[must_use]
    pub fn find(label: &str) -> Option<Self> {
        let latents = LatentMode::ALL.map(Self::Latent);
        latents
            .into_iter()
            .chain(PictureUpscaler::BUILT_IN.map(Self::Picture))
            .find(|upscaler| upscaler.label().eq_ignore_ascii_case(label))
    }
}

/// The size enlarged to, and what is then cut off to meet the asked-for shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HiresTarget {
    /// Width in pixels.
    pub width: usize,
    /// Height in pixels.
    pub height: usize,
    /// Columns and rows of latent pixels cut off, half on each side.
    pub truncate: (usize, usize),
}

impl HiresSize {
    /// The target for a first pass of `width` x `height` pixels.
    #[must_use]
    pub fn target(self, width: usize, height: usize) -> HiresTarget {
        let plain = |width, height| HiresTarget {
            width,
            height,
            truncate: (0, 0),
        };
        match self {
            Self::Scale(scale) => plain(
                (width as f64 * scale) as usize,
                (height as f64 * scale) as usize,
            ),
            Self::Resize(x, 0) => plain(x, x * height / width),
            Self::Resize(0, y) => plain(y * width / height, y),
            Self::Resize(x, y) => {
                let wider = (width as f64 / height as f64) < (x as f64 / y as f64);
                let (to_width, to_height) = if wider {
                    (x, x * height / width)
                } else {
                    (y * width / height, y)
                };
                let cut = |to: usize, want: usize| (to - want.min(to)) / LATENT_PIXEL;
                HiresTarget {
                    width: to_width,
                    height: to_height,
                    truncate: (cut(to_width, x), cut(to_height, y)),
                }
            }
        }
    }
}

impl Hires {
    /// The infotext keys of the second pass, in A1111's order. `same` are the first pass's prompts.
    pub(super) fn infotext(
        &self,
        (prompt, negative): (&str, &str),
        schedule: (&str, &str),
    ) -> Params {
        let mut p = Params::new();
        p.insert("Denoising strength", self.strength);
        let checkpoint = self.checkpoint.as_ref();
        p.insert_some(
            "Hires checkpoint",
            checkpoint.map(OtherCheckpoint::short_title),
        );
        p.insert_some("Hires sampler", self.sampler.map(Sampler::label));
        let other =
            |text: &str, first: &str| (!text.is_empty() && text != first).then(|| text.to_string());
        p.insert_some("Hires prompt", other(&self.prompt, prompt));
        p.insert_some(
            "Hires negative prompt",
            other(&self.negative_prompt, negative),
        );
        p.insert_some(
            "Hires schedule type",
            (schedule.0 != schedule.1).then(|| schedule.1.to_string()),
        );
        match self.size {
            HiresSize::Scale(scale) => p.insert("Hires upscale", scale),
            HiresSize::Resize(x, y) => p.insert("Hires resize", format!("{x}x{y}")),
        }
        p.insert_some("Hires steps", (self.steps > 0).then_some(self.steps));
        p.insert("Hires upscaler", self.upscaler.label());
        p.insert_some("Hires CFG Scale", self.cfg_scale);
        p
    }
}

impl Hires {
    /// Whether pictures are decoded, enlarged and encoded again.
    pub(super) fn encodes(&self) -> bool {
        matches!(self.upscaler, HiresUpscaler::Picture(_))
    }
}

impl Pipeline {
    /// The first pass's latents at the target's size, encoded by this model where `decoder` has decoded them.
    pub(super) fn enlarge(
        &self,
        decoder: &Self,
        latents: &Latents,
        upscaler: &HiresUpscaler,
        target: HiresTarget,
        observer: &dyn Observer,
    ) -> Result<Latents, Error> {
        let (h, w) = (target.height / LATENT_PIXEL, target.width / LATENT_PIXEL);
        let larger = match upscaler {
            HiresUpscaler::Latent(mode) => resample(latents, h, w, *mode),
            HiresUpscaler::Picture(upscaler) => {
                let job = Upscaling::new(&self.upscalers, observer, &|_, _| {});
                // Not cut to whole latent pixels: the encoder sees all of it, and leaves the rest away.
                let size = (target.width as u32, target.height as u32);
                let mut data = Vec::new();
                for image in latents.images() {
                    let [_, c, fh, fw] = latents.shape;
                    let picture = decoder.decode_image(&Latents::new(image, [1, c, fh, fw]))?;
                    let larger = job.resize_to(&picture, upscaler, size)?;
                    data.extend(self.encode_image(&larger)?.into_data());
                }
                Latents::new(data, [latents.batch(), latents.shape[1], h, w])
            }
        };
        Ok(crop(&larger, target.truncate))
    }
}

/// Latents without `columns` and `rows`, the smaller half of an odd number cut off at the start.
fn crop(latents: &Latents, (columns, rows): (usize, usize)) -> Latents {
    let [batch, channels, height, width] = latents.shape;
    let (to_height, to_width) = (height - rows, width - columns);
    let (top, left) = (rows / 2, columns / 2);
    let values = latents.data();
    let planes = values.chunks_exact(height * width);
    let data = planes
        .flat_map(|plane| {
            plane
                .chunks_exact(width)
                .skip(top)
                .take(to_height)
                .flat_map(|row| row[left..left + to_width].iter().copied())
        })
        .collect();
    Latents::new(data, [batch, channels, to_height, to_width])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn target_sizes_are_a1111s() {
        let t = HiresSize::Scale(1.5).target(832, 1216);
        assert_eq!((t.width, t.height, t.truncate), (1248, 1824, (0, 0)));
        let t = HiresSize::Resize(1000, 1000).target(832, 1216);
        assert_eq!((t.width, t.height, t.truncate), (1000, 1461, (0, 57)));
        let t = HiresSize::Resize(1024, 0).target(512, 768);
        assert_eq!((t.width, t.height), (1024, 1536));
        let t = HiresSize::Resize(0, 1024).target(512, 768);
        assert_eq!((t.width, t.height), (682, 1024));
    }

    #[test]
    fn cutting_an_odd_number_takes_less_from_the_start() {
        let x = Latents::new((0..20).map(|i| i as f32).collect(), [1, 1, 4, 5]);
        let y = crop(&x, (3, 1));
        assert_eq!(
            (y.shape, y.into_data()),
            ([1, 1, 3, 2], vec![1.0, 2.0, 6.0, 7.0, 11.0, 12.0])
        );
    }

    #[test]
    fn names_lead_back_to_their_upscaler() {
        for label in [
            "Latent",
            "Latent (bicubic antialiased)",
            "None",
            "Lanczos",
            "nearest",
        ] {
            assert!(
                HiresUpscaler::find(label).is_some_and(|u| u.label().eq_ignore_ascii_case(label)),
                "{label}"
            );
        }
        assert_eq!(HiresUpscaler::find("4x-UltraSharp"), None);
    }
}
