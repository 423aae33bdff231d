//! Values to 8-bit pictures, and the linear approximation for previews.

use image::RgbImage;

use crate::sampling::Latents;

/// Latent channels to RGB for SDXL, each in [-1, 1] (A1111's "Approx cheap").
const LATENT_RGB: [[f32; 3]; 4] = [
    [0.3448, 0.4168, 0.4395],
    [-0.1953, -0.0290, 0.0250],
    [0.1074, 0.0886, -0.0163],
    [-0.3730, -0.2499, -0.2088],
];

/// A small picture of the latents themselves, one pixel per latent pixel.
pub(super) fn approximate(latents: &Latents) -> Vec<RgbImage> {
    let [_, channels, height, width] = latents.shape;
    let area = height * width;
    latents
        .images()
        .map(|image| {
            let values = (0..area).flat_map(|pixel| {
                [0, 1, 2].map(|c| {
                    (0..channels.min(LATENT_RGB.len()))
                        .map(|l| image[l * area + pixel] * LATENT_RGB[l][c])
                        .sum::<f32>()
                })
            });
            to_image(values, width, height)
        })
        .collect()
}

/// [-1, 1] to 0..=255, truncated as A1111 does.
pub(super) fn to_image(values: impl Iterator<Item = f32>, width: usize, height: usize) -> RgbImage {
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
    fn previews_follow_a1111s_matrix() {
        // One latent pixel [1, -1, 0.5, 0.25], then one of zeros: red .3448 + .1953 + .0537 - .09325 = .50055.
        let latents = Latents::new(vec![1.0, 0.0, -1.0, 0.0, 0.5, 0.0, 0.25, 0.0], [1, 4, 1, 2]);
        let preview = &approximate(&latents)[0];
        // (.50055 + 1) / 2 * 255 = 191.3; green .4168 + .029 + .0443 - .062475 = .427625; blue .4395 - .025 - .00815 - .0522 = .35415
        assert_eq!(preview.get_pixel(0, 0).0, [191, 182, 172]);
        assert_eq!(preview.get_pixel(1, 0).0, [127; 3]);
    }

    #[test]
    fn zero_latents_preview_as_mid_grey() {
        let previews = approximate(&Latents::zeros([2, 4, 3, 5]));
        assert_eq!(previews.len(), 2);
        assert_eq!(previews[1].dimensions(), (5, 3));
        assert_eq!(previews[1].get_pixel(4, 2).0, [127, 127, 127]);
    }
}
