//! A1111's "extras": pictures enlarged by one upscaler, or by two and mixed.
//!
//! Follows `scripts/postprocessing_upscale.py` of A1111 1.10.

use std::sync::Arc;

use image::RgbImage;

use super::{PictureUpscaler, UpscalerSlot, Upscaling};
use crate::imaging::infotext::Params;
use crate::imaging::{blend, paste};
use crate::pipeline::{Control, Error, Observer, Progress};

/// What is done to every picture.
#[derive(Debug, Clone)]
pub struct ExtrasRequest {
    /// Shared, so that a job can be cloned.
    pub pictures: Arc<Vec<RgbImage>>,
    /// How large they become.
    pub size: ExtrasSize,
    /// `None` in A1111's sense leaves pictures as they are.
    pub upscaler: PictureUpscaler,
    /// A second upscaler, and its share of the result from 0 to 1.
    pub second: Option<(PictureUpscaler, f32)>,
}

/// How large pictures become.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ExtrasSize {
    /// A factor on both sides.
    By {
        /// The factor.
        factor: f64,
        /// Longest side of the result; 0 = any.
        longest: u32,
    },
    /// So large that a size is covered.
    To {
        /// Pixels.
        width: u32,
        /// Pixels.
        height: u32,
        /// Cut what stands out.
        crop: bool,
    },
}

/// Finished pictures.
#[derive(Debug, Clone, Default)]
pub struct Extras {
    /// In the request's order, each with its number there; pictures that were skipped are missing.
    pub pictures: Vec<(usize, RgbImage)>,
    /// A1111's text of what was done; empty for nothing.
    pub infotext: String,
    /// Ended before all pictures were made.
    pub interrupted: bool,
}

/// What one picture becomes, worked out from its size.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Plan {
    factor: f64,
    crop: Option<(u32, u32)>,
    capped: bool,
}

impl ExtrasSize {
    fn plan(self, (width, height): (u32, u32)) -> Plan {
        let cover = |to: (u32, u32)| {
            let factors = (
                f64::from(to.0) / f64::from(width),
                f64::from(to.1) / f64::from(height),
            );
            factors.0.max(factors.1)
        };
        match self {
            Self::By { factor, longest } => {
                let (w, h) = (f64::from(width) * factor, f64::from(height) * factor);
                let most = f64::from(longest);
                if longest == 0 || w.max(h) <= most {
                    return Plan {
                        factor,
                        crop: None,
                        capped: false,
                    };
                }
                // `limit_size_by_one_dimention`: the other side follows, cut to whole pixels.
                let to = if h > w {
                    ((most * w / h) as u32, longest)
                } else {
                    (longest, (most * h / w) as u32)
                };
                Plan {
                    factor: cover(to),
                    crop: None,
                    capped: true,
                }
            }
            Self::To {
                width,
                height,
                crop,
            } => Plan {
                factor: cover((width, height)),
                crop: crop.then_some((width, height)),
                capped: false,
            },
        }
    }

    /// Size of the result of a picture of `size` pixels.
    #[must_use]
    pub fn result(self, size: (u32, u32)) -> (u32, u32) {
        let plan = self.plan(size);
        plan.crop
            .unwrap_or_else(|| super::target_size(size, plan.factor))
    }
}

impl ExtrasRequest {
    /// Works on the pictures in order.
    ///
    /// # Errors
    /// An upscaler cannot be loaded or run. An interrupt is not an error: what was finished is returned.
    pub fn run(&self, slot: &UpscalerSlot, observer: &dyn Observer) -> Result<Extras, Error> {
        let mut done = Extras::default();
        for (index, picture) in self.pictures.iter().enumerate() {
            let report = |step: usize, steps: usize| {
                observer.progress(Progress {
                    step,
                    steps,
                    batch: index,
                    batches: self.pictures.len(),
                });
            };
            let control = match self.one(picture, &Upscaling::new(slot, observer, &report)) {
                Ok((picture, infotext)) => {
                    done.pictures.push((index, picture));
                    done.infotext = infotext;
                    if index + 1 < self.pictures.len() {
                        observer.control()
                    } else {
                        Control::Continue
                    }
                }
                Err(Error::Skipped) => Control::Skip,
                Err(Error::Interrupted) => Control::Interrupt,
                Err(error) => return Err(error),
            };
            if control == Control::Interrupt {
                done.interrupted = true;
                break;
            }
        }
        Ok(done)
    }

    fn one(&self, picture: &RgbImage, job: &Upscaling<'_>) -> Result<(RgbImage, String), Error> {
        if self.upscaler == PictureUpscaler::None {
            return Ok((picture.clone(), String::new()));
        }
        let plan = self.size.plan(picture.dimensions());
        let mut result = sized(picture, &self.upscaler, plan, job)?;
        let second = self
            .second
            .as_ref()
            .filter(|(second, share)| *second != PictureUpscaler::None && *share > 0.0);
        if let Some((second, share)) = second {
            let other = sized(picture, second, plan, job)?;
            result = blend(&result, &other, *share);
        }
        Ok((
            result,
            self.infotext(plan, second.map(|(second, _)| second)),
        ))
    }

    fn infotext(&self, plan: Plan, second: Option<&PictureUpscaler>) -> String {
        let mut p = Params::new();
        match self.size {
            ExtrasSize::By { factor, longest } => {
                p.insert("Postprocess upscale by", factor);
                p.insert_some("Max side length", plan.capped.then_some(longest));
            }
            ExtrasSize::To { width, height, .. } => {
                p.insert("Postprocess upscale to", format!("{width}x{height}"));
            }
        }
        p.insert_some(
            "Postprocess crop to",
            plan.crop.map(|(width, height)| format!("{width}x{height}")),
        );
        p.insert("Postprocess upscaler", self.upscaler.label());
        p.insert_some("Postprocess upscaler 2", second.map(PictureUpscaler::label));
        p.to_line()
    }
}

/// Enlarged by one upscaler, and cut or laid on black.
fn sized(
    picture: &RgbImage,
    upscaler: &PictureUpscaler,
    plan: Plan,
    job: &Upscaling<'_>,
) -> Result<RgbImage, Error> {
    let larger = job.upscale(picture, upscaler, plan.factor)?;
    let Some((width, height)) = plan.crop else {
        return Ok(larger);
    };
    let mut canvas = RgbImage::new(width, height);
    let middle = |whole: u32, part: u32| i64::from(whole / 2) - i64::from(part / 2);
    paste(
        &mut canvas,
        &larger,
        middle(width, larger.width()),
        middle(height, larger.height()),
    );
    Ok(canvas)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_follow_a1111s_modes() {
        let by = |factor, longest| ExtrasSize::By { factor, longest };
        assert_eq!(by(2.0, 0).result((100, 57)), (200, 112));
        assert_eq!(by(4.0, 200).result((100, 50)), (200, 96));
        let to = |width, height, crop| ExtrasSize::To {
            width,
            height,
            crop,
        };
        assert_eq!(to(100, 100, true).result((50, 25)), (100, 100));
        assert_eq!(to(100, 100, false).result((50, 25)), (200, 96));
    }
}
