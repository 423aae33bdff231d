//! The pictures that follow the results of an inpainting job: masks and painted parts (`return_mask`, `return_mask_composite`), and
//! their files (`save_mask`, `save_mask_composite`).
//!
//! The painted part is cut out of the result before the unpainted part of the source is put back over it, so such a job leaves that
//! last step to this file. Follows `process_images_inner` of A1111 1.10.

use image::{RgbImage, RgbaImage};

use super::options::Options;
use crate::imaging::inpaint::{
    PreparedMask, apply_overlay, mask_composite, prepare_image, prepare_mask,
};
use crate::imaging::{self, ResizeMode, fit};
use crate::pipeline::{InitImage, InpaintMask};

/// What is made besides the results.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MaskOutputs {
    mask: bool,
    composite: bool,
    /// The overlay is still to be put over the results.
    overlay: bool,
}

/// The pictures of one result.
#[derive(Debug, Clone)]
pub struct Masked {
    /// The result, complete.
    pub result: RgbImage,
    /// The mask, white = painted.
    pub mask: Option<RgbImage>,
    /// The painted part.
    pub composite: Option<RgbaImage>,
}

impl MaskOutputs {
    /// What the options ask of a job; takes the overlay away from the job where it would be in the way.
    pub fn claim(init: &mut InitImage, options: &Options) -> Option<Self> {
        let mask = init.mask.as_mut()?;
        let composite =
            options.flag("return_mask_composite") || options.flag("save_mask_composite");
        let wanted = Self {
            mask: options.flag("return_mask") || options.flag("save_mask"),
            composite,
            overlay: composite && mask.overlay,
        };
        if wanted.overlay {
            mask.overlay = false;
        }
        (wanted.mask || wanted.composite).then_some(wanted)
    }

    /// Completes result number `index` of a batch and makes what belongs to it.
    ///
    /// # Errors
    /// Those of the operations on pictures.
    pub fn complete(
        self,
        init: &InitImage,
        index: usize,
        result: &RgbImage,
    ) -> Result<Option<Masked>, imaging::Error> {
        let Some(mask) = &init.mask else {
            return Ok(None);
        };
        let Some(prepared) = prepare_mask(&mask.mask, &mask.options)? else {
            return Ok(None);
        };
        let source = &init.pictures[index % init.pictures.len().max(1)];
        let (mut finished, mut composite) = (result.clone(), None);
        if self.composite {
            let (complete, painted) = self.cut_out(source, mask, prepared.clone(), result)?;
            finished = complete;
            composite = Some(painted);
        }
        let mask = self
            .mask
            .then(|| image::DynamicImage::from(prepared.overlay).into_rgb8());
        Ok(Some(Masked {
            result: finished,
            mask,
            composite,
        }))
    }

    fn cut_out(
        self,
        source: &RgbImage,
        mask: &InpaintMask,
        mut prepared: PreparedMask,
        result: &RgbImage,
    ) -> Result<(RgbImage, RgbaImage), imaging::Error> {
        let overlay = prepare_image(source, &prepared, &mask.options)?.overlay;
        if self.overlay {
            let finished = apply_overlay(result, &overlay, prepared.region)?;
            return Ok((finished, mask_composite(result, &overlay, &prepared)?));
        }
        // Without overlay the result is not put back into its source.
        prepared.region = None;
        prepared.overlay = fit(&prepared.overlay, ResizeMode::Fill, result.dimensions())?;
        let painted = mask_composite(result, &overlay, &prepared)?;
        Ok((result.clone(), painted))
    }
}
