//! Latents to 8-bit pictures: the VAE, and the linear approximation for previews.

use candle_core::{DType, Tensor};
use image::RgbImage;

use super::Error;
use super::network::channels_last;
use crate::models::{Vae, vae};
use crate::nn::Placement;
use crate::sampling::Latents;

/// Latent channels to RGB for SDXL, each in [-1, 1] (A1111's "Approx cheap").
const LATENT_RGB: [[f32; 3]; 4] = [
    [0.3448, 0.4168, 0.4395],
    [-0.1953, -0.0290, 0.0250],
    [0.1074, 0.0886, -0.0163],
    [-0.3730, -0.2499, -0.2088],
];

/// Decodes the first picture of `latents`, which is all there is in it.
///
/// # Errors
/// [`Error::NotANumber`] when the VAE overflows.
pub(super) fn decode(vae: &Vae, place: &Placement, latents: &Latents) -> Result<RgbImage, Error> {
    let [_, channels, height, width] = latents.shape;
    let z: Vec<f32> = channels_last(latents)
        .iter()
        .map(|v| v / vae::SCALE)
        .collect();
    let z = Tensor::from_vec(z, (1, height, width, channels), &place.device)?;
    let picture = vae.decode(&z)?.to_dtype(DType::F32)?;
    let (_, height, width, _) = picture.dims4()?;
    let values: Vec<f32> = picture.flatten_all()?.to_vec1()?;
    if values.iter().any(|v| v.is_nan()) {
        return Err(Error::NotANumber { stage: "VAE" });
    }
    Ok(to_image(values.into_iter(), width, height))
}

/// A small picture of the latents themselves, one pixel per latent pixel.
pub(super) fn approximate(latents: &Latents) -> Vec<RgbImage> {
    let [_, channels, height, width] = latents.shape;
    let rgb = |pixel: &[f32]| {
        [0, 1, 2].map(|c| {
            pixel
                .iter()
                .zip(LATENT_RGB)
                .map(|(z, m)| z * m[c])
                .sum::<f32>()
        })
    };
    let area = height * width * channels;
    channels_last(latents)
        .chunks_exact(area)
        .map(|image| to_image(image.chunks_exact(channels).flat_map(rgb), width, height))
        .collect()
}

/// [-1, 1] to 0..=255, truncated as A1111 does.
fn to_image(values: impl Iterator<Item = f32>, width: usize, height: usize) -> RgbImage {
    let bytes = values
        .map(|v| (f32::midpoint(v, 1.0).clamp(0.0, 1.0) * 255.0) as u8)
        .collect();
    RgbImage::from_raw(width as u32, height as u32, bytes).expect("three values for each pixel")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_truncated_not_rounded() {
        let image = to_image([0.9999, -1.0, 5.0].into_iter(), 1, 1);
        assert_eq!(image.get_pixel(0, 0).0, [254, 0, 255]);
    }

    #[test]
    fn zero_latents_preview_as_mid_grey() {
        let previews = approximate(&Latents::zeros([2, 4, 3, 5]));
        assert_eq!(previews.len(), 2);
        assert_eq!(previews[1].dimensions(), (5, 3));
        assert_eq!(previews[1].get_pixel(4, 2).0, [127, 127, 127]);
    }
}
