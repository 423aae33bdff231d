//! Enlarging pictures, with or without a model, as A1111 does it.
//!
//! Follows `Upscaler.upscale`, `upscaler_utils.py` and `images.resize_image` of A1111 1.10 (pipeline specification, chapter 10):
//! sizes are cut to multiples of 8, a model runs up to three times until the picture is large enough, Lanczos does the rest.

mod extras;
mod slot;
pub(super) mod tiles;

pub use extras::{Extras, ExtrasRequest, ExtrasSize};
pub use slot::UpscalerSlot;

use std::path::PathBuf;

use candle_core::{DType, Tensor};
use image::RgbImage;

use super::{Control, Error, Observer};
use crate::imaging::{Filter, resize, upscale_to};
use crate::models::Esrgan;
use tiles::{Joined, Tiles};

/// Passes of a model at most.
const PASSES: usize = 3;
/// Sides of results are multiples of it.
const MULTIPLE: u32 = 8;
/// Most pixels of a picture on the way: those that `imaging` resizes.
const MOST_PIXELS: u64 = 1 << 28;

/// An upscaler of pictures.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PictureUpscaler {
    /// `None`: Lanczos without a name.
    None,
    /// `Lanczos`.
    Lanczos,
    /// `Nearest`.
    Nearest,
    /// A network.
    Model(UpscalerFile),
}

/// A network and how it is run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpscalerFile {
    /// A1111's name.
    pub name: String,
    /// `.pth`, `.pt` or `.safetensors`.
    pub path: PathBuf,
    /// The pieces that a picture is worked on in.
    pub tiling: Tiling,
}

/// The pieces that a picture is worked on in (`ESRGAN_tile`, `ESRGAN_tile_overlap`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tiling {
    /// Side of a piece in pixels; 0 = the whole picture.
    pub tile: usize,
    /// Pixels that neighbours share.
    pub overlap: usize,
}

impl Default for Tiling {
    fn default() -> Self {
        Self {
            tile: 192,
            overlap: 8,
        }
    }
}

impl PictureUpscaler {
    /// Those that need no model, in A1111's order.
    pub const BUILT_IN: [Self; 3] = [Self::None, Self::Lanczos, Self::Nearest];

    /// A1111's name.
    #[must_use]
    pub fn label(&self) -> &str {
        match self {
            Self::None => "None",
            Self::Lanczos => "Lanczos",
            Self::Nearest => "Nearest",
            Self::Model(file) => &file.name,
        }
    }
}

/// One job's use of upscalers.
pub(super) struct Upscaling<'a> {
    slot: &'a UpscalerSlot,
    observer: &'a dyn Observer,
    /// Called after each piece, with the pieces done and planned in this picture.
    report: &'a dyn Fn(usize, usize),
}

impl<'a> Upscaling<'a> {
    pub(super) fn new(
        slot: &'a UpscalerSlot,
        observer: &'a dyn Observer,
        report: &'a dyn Fn(usize, usize),
    ) -> Self {
        Self {
            slot,
            observer,
            report,
        }
    }

    /// A picture `factor` times larger, its sides cut to multiples of 8.
    pub(super) fn upscale(
        &self,
        picture: &RgbImage,
        upscaler: &PictureUpscaler,
        factor: f64,
    ) -> Result<RgbImage, Error> {
        let target = target_size(picture.dimensions(), factor);
        if target.0 == 0 || target.1 == 0 {
            return Err(Error::Invalid(format!(
                "picture of {}x{} pixels times {factor} is smaller than 8x8",
                picture.width(),
                picture.height()
            )));
        }
        let scaled = |side: u32| (f64::from(side) * factor) as u32;
        let plain = |filter| {
            let size = (scaled(picture.width()), scaled(picture.height()));
            resize(picture, size.0, size.1, filter)
        };
        let larger = match upscaler {
            PictureUpscaler::None => return lanczos(picture, target),
            PictureUpscaler::Lanczos => plain(Filter::Lanczos)?,
            PictureUpscaler::Nearest => plain(Filter::Nearest)?,
            PictureUpscaler::Model(file) => self.by_model(picture, file, target, factor)?,
        };
        lanczos(&larger, target)
    }

    /// A picture at exactly `size`: what must grow grows by the upscaler, Lanczos does the rest.
    pub(super) fn resize_to(
        &self,
        picture: &RgbImage,
        upscaler: &PictureUpscaler,
        size: (u32, u32),
    ) -> Result<RgbImage, Error> {
        if *upscaler == PictureUpscaler::None {
            return lanczos(picture, size);
        }
        upscale_to(picture, size, |picture, factor| {
            self.upscale(picture, upscaler, factor)
        })
    }

    fn by_model(
        &self,
        picture: &RgbImage,
        file: &UpscalerFile,
        target: (u32, u32),
        factor: f64,
    ) -> Result<RgbImage, Error> {
        let model = self.slot.get(file)?;
        let sizes = passes(picture.dimensions(), target, factor, model.scale());
        let mut planned = 0;
        for (width, height) in &sizes {
            planned += Tiles::new(file.tiling, (*width, *height))?.count();
            self.check_memory(file, &model, (*width, *height))?;
        }
        let mut done = 0;
        let mut larger = picture.clone();
        for _ in &sizes {
            larger = self.one_pass(&larger, file.tiling, &model, &mut || {
                done += 1;
                (self.report)(done, planned);
            })?;
        }
        Ok(larger)
    }

    /// Refuses what does not fit before any of it is allocated.
    fn check_memory(
        &self,
        file: &UpscalerFile,
        model: &Esrgan,
        (width, height): (u32, u32),
    ) -> Result<(), Error> {
        let scale = model.scale() as u64;
        let pixels = u64::from(width) * u64::from(height) * scale * scale;
        if pixels > MOST_PIXELS {
            return Err(Error::Invalid(format!(
                "`{}` makes {}x{} pixels of {width}x{height}, more than {MOST_PIXELS} in all; ask for a smaller size",
                file.name,
                u64::from(width) * scale,
                u64::from(height) * scale
            )));
        }
        let side = |length: u32| match file.tiling.tile {
            0 => length as usize,
            tile => tile,
        };
        // Input, result and row of pieces, three bytes a pixel.
        let needed = model.work_bytes(side(width), side(height)) + 3 * 3 * pixels;
        match self.slot.memory_left() {
            Some(left) if needed > left => Err(Error::Invalid(format!(
                "upscaling {width}x{height} pixels by `{}` in pieces of {}x{} needs {} MiB, {} MiB are free; {}",
                file.name,
                side(width),
                side(height),
                needed >> 20,
                left >> 20,
                "a smaller size, or the option `ESRGAN_tile` at 192 or less, needs less"
            ))),
            _ => Ok(()),
        }
    }

    fn one_pass(
        &self,
        picture: &RgbImage,
        tiling: Tiling,
        model: &Esrgan,
        finished: &mut dyn FnMut(),
    ) -> Result<RgbImage, Error> {
        let tiles = Tiles::new(tiling, picture.dimensions())?;
        let mut joined = Joined::new(&tiles, model.scale() as u32);
        for row in tiles.rows() {
            for column in tiles.columns() {
                match self.observer.control() {
                    Control::Continue => {}
                    Control::Skip => return Err(Error::Skipped),
                    Control::Interrupt => return Err(Error::Interrupted),
                }
                joined.add(&run(model, &tiles.cut(picture, column, row))?, column);
                finished();
            }
            joined.end_row(row);
        }
        Ok(joined.finish())
    }
}

/// `Upscaler.upscale`'s sides, as Python cuts them.
pub(super) fn target_size((width, height): (u32, u32), factor: f64) -> (u32, u32) {
    let side = |side: u32| (f64::from(side) * factor) as u32 / MULTIPLE * MULTIPLE;
    (side(width), side(height))
}

/// Sizes that a model is given, pass by pass. At a factor of 1 the first pass is made although nothing has to grow.
fn passes(mut size: (u32, u32), target: (u32, u32), factor: f64, scale: usize) -> Vec<(u32, u32)> {
    let mut passes = Vec::new();
    for pass in 0..PASSES {
        let large_enough = size.0 >= target.0 && size.1 >= target.1;
        if large_enough && (pass > 0 || factor.to_bits() != 1f64.to_bits()) {
            break;
        }
        passes.push(size);
        if scale == 1 {
            break;
        }
        let grown = |side: u32| side.saturating_mul(scale as u32);
        size = (grown(size.0), grown(size.1));
    }
    passes
}

fn lanczos(picture: &RgbImage, (width, height): (u32, u32)) -> Result<RgbImage, Error> {
    Ok(resize(picture, width, height, Filter::Lanczos)?)
}

/// A picture through a model. The model sees blue, green, red; results are clamped and rounded half to even.
fn run(model: &Esrgan, picture: &RgbImage) -> Result<RgbImage, Error> {
    let (width, height) = (picture.width() as usize, picture.height() as usize);
    let bgr = picture.pixels().flat_map(|pixel| {
        let [r, g, b] = pixel.0;
        [b, g, r].map(|value| f32::from(value) / 255.0)
    });
    let x = Tensor::from_iter(bgr, &candle_core::Device::Cpu)?.reshape((1, height, width, 3))?;
    let y = model.forward(&x)?.to_dtype(DType::F32)?;
    let values = y.flatten_all()?.to_vec1::<f32>()?;
    if values.iter().any(|value| value.is_nan()) {
        return Err(Error::NotANumber { stage: "upscaler" });
    }
    let byte = |value: f32| (255.0 * value.clamp(0.0, 1.0)).round_ties_even() as u8;
    let rgb = values
        .chunks_exact(3)
        .flat_map(|bgr| [bgr[2], bgr[1], bgr[0]].map(byte));
    let size = (width * model.scale(), height * model.scale());
    Ok(
        RgbImage::from_raw(size.0 as u32, size.1 as u32, rgb.collect())
            .expect("the model's output has three channels at its scale"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_cut_to_multiples_of_8() {
        assert_eq!(target_size((100, 57), 2.0), (200, 112));
        assert_eq!(target_size((512, 512), 1.5), (768, 768));
        assert_eq!(target_size((15, 3), 1.0), (8, 0));
    }

    #[test]
    fn passes_stop_as_soon_as_the_picture_is_large_enough() {
        let sizes = |size, factor, scale| passes(size, target_size(size, factor), factor, scale);
        assert_eq!(sizes((64, 64), 2.0, 4), [(64, 64)]);
        assert_eq!(sizes((64, 64), 8.0, 4), [(64, 64), (256, 256)]);
        assert_eq!(sizes((64, 64), 16.0, 2).len(), 3);
        assert_eq!(sizes((64, 64), 1.0, 4), [(64, 64)]);
        assert_eq!(sizes((64, 64), 0.5, 4), []);
        assert_eq!(sizes((64, 64), 2.0, 1), [(64, 64)]);
    }
}
