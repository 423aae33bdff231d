//! The two Gaussian blurs of A1111's inpainting: Pillow's, made of box blurs, and `OpenCV`'s along one axis.
//!
//! Pillow's follows Gwosdek et al., "Theoretical foundations of Gaussian convolution by extended box filtering" (2011), in its 24-bit
//! integers; `OpenCV`'s its 8-bit fixed-point kernel. Both equal the originals to the bit.

use image::{GrayImage, Pixel};
use rayon::prelude::*;

use super::resize::Picture;

/// Box blurs that make one Gaussian.
const PASSES: usize = 3;

/// Blurs every channel by a Gaussian of standard deviation `radius`, in pixels; 0 changes nothing. Edge pixels repeat outwards.
#[must_use]
pub fn gaussian_blur<P: Pixel<Subpixel = u8>>(picture: &Picture<P>, radius: f32) -> Picture<P> {
    let (width, height) = (picture.width() as usize, picture.height() as usize);
    if radius <= 0.0 || width == 0 || height == 0 {
        return picture.clone();
    }
    let channels = usize::from(P::CHANNEL_COUNT);
    let blur = BoxBlur::for_gaussian(radius);
    let mut data = picture.as_raw().clone();
    blur.rows(&mut data, width, channels);
    let mut turned = transpose(&data, width, height, channels);
    blur.rows(&mut turned, height, channels);
    let mut out = picture.clone();
    out.copy_from_slice(&transpose(&turned, height, width, channels));
    out
}

/// A box of `2 * radius + 1` pixels of one weight, with a pixel of less weight at each end.
struct BoxBlur {
    radius: usize,
    /// Weight of a whole pixel, 24 fractional bits.
    weight: u32,
    /// Weight of the pixel at each end.
    edge_weight: u32,
}

impl BoxBlur {
    /// The box that, applied [`PASSES`] times, has the variance of the Gaussian. f32 as in the original: the bits count.
    fn for_gaussian(radius: f32) -> Self {
        let variance = radius * radius / PASSES as f32;
        let length = (12.0 * f64::from(variance) + 1.0).sqrt() as f32;
        let whole = ((f64::from(length) - 1.0) / 2.0).floor() as f32;
        let fraction = (2.0 * whole + 1.0) * (whole * (whole + 1.0) - 3.0 * variance)
            / (6.0 * (variance - (whole + 1.0) * (whole + 1.0)));
        let box_radius = whole + fraction;
        let radius = box_radius as usize;
        let one = 1u32 << 24;
        let weight = (one as f32 / (box_radius * 2.0 + 1.0)) as u32;
        Self {
            radius,
            weight,
            edge_weight: (one - (radius as u32 * 2 + 1) * weight) / 2,
        }
    }

    fn rows(&self, data: &mut [u8], width: usize, channels: usize) {
        data.par_chunks_exact_mut(width * channels).for_each_init(
            || vec![0; width],
            |line, row| {
                for channel in 0..channels {
                    for _ in 0..PASSES {
                        for (value, pixel) in line.iter_mut().zip(row.chunks_exact(channels)) {
                            *value = pixel[channel];
                        }
                        self.line(line, row, channels, channel);
                    }
                }
            },
        );
    }

    /// Blurs `line` once into one channel of `row`. The window's sum moves along with it.
    fn line(&self, line: &[u8], row: &mut [u8], channels: usize, channel: usize) {
        let last = line.len() - 1;
        let at = |index: isize| u32::from(line[index.clamp(0, last as isize) as usize]);
        let radius = self.radius as isize;
        let mut sum: u32 = (-radius..=radius).map(at).sum();
        for x in 0..line.len() {
            let here = x as isize;
            let edges = at(here - radius - 1) + at(here + radius + 1);
            let value = (sum * self.weight)
                .wrapping_add(edges * self.edge_weight)
                .wrapping_add(1 << 23)
                >> 24;
            row[x * channels + channel] = value as u8;
            sum = sum + at(here + radius + 1) - at(here - radius);
        }
    }
}

/// Rows to columns.
fn transpose(data: &[u8], width: usize, height: usize, channels: usize) -> Vec<u8> {
    let mut out = vec![0; data.len()];
    out.par_chunks_exact_mut(height * channels)
        .enumerate()
        .for_each(|(x, column)| {
            for (y, pixel) in column.chunks_exact_mut(channels).enumerate() {
                pixel.copy_from_slice(&data[(y * width + x) * channels..][..channels]);
            }
        });
    out
}

/// Which way a mask is blurred.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Along the rows.
    Across,
    /// Along the columns.
    Down,
}

/// Blurs a mask along one axis by a Gaussian of standard deviation `sigma` pixels, `2.5 * sigma` to each side; 0 changes
/// nothing. The picture is mirrored at its edges, the edge pixel not repeated.
#[must_use]
pub fn blur_mask(mask: &GrayImage, sigma: u32, direction: Direction) -> GrayImage {
    if sigma == 0 || mask.as_raw().is_empty() {
        return mask.clone();
    }
    let kernel = fixed_kernel(sigma);
    let (width, height) = (mask.width() as usize, mask.height() as usize);
    let data = match direction {
        Direction::Across => blur_rows(mask.as_raw(), width, &kernel),
        Direction::Down => transpose(
            &blur_rows(&transpose(mask.as_raw(), width, height, 1), height, &kernel),
            height,
            width,
            1,
        ),
    };
    let mut out = mask.clone();
    out.copy_from_slice(&data);
    out
}

/// The kernel in 1/256, rounded from the ends inwards with the error carried on, so that it sums to 256 exactly.
fn fixed_kernel(sigma: u32) -> Vec<u32> {
    let sigma = f64::from(sigma);
    let radius = (2.5 * sigma + 0.5) as i32;
    let weight = |x: i32| (-0.5 * f64::from(x * x) / (sigma * sigma)).exp();
    let sum = 1.0 + 2.0 * (1..=radius).map(weight).sum::<f64>();
    let mut error = 0.0;
    let half: Vec<u32> = (1..=radius)
        .rev()
        .map(|x| {
            let exact = weight(x) / sum * 256.0 + error;
            let rounded = exact.round_ties_even();
            error = exact - rounded;
            rounded as u32
        })
        .collect();
    let centre = 256 - 2 * half.iter().sum::<u32>();
    half.iter()
        .copied()
        .chain([centre])
        .chain(half.iter().rev().copied())
        .collect()
}

fn blur_rows(data: &[u8], width: usize, kernel: &[u32]) -> Vec<u8> {
    let radius = kernel.len() / 2;
    let mut out = vec![0; data.len()];
    out.par_chunks_exact_mut(width)
        .zip(data.par_chunks_exact(width))
        .for_each(|(target, source)| {
            let padded: Vec<u32> = (0..width + 2 * radius)
                .map(|x| u32::from(source[mirror(x as isize - radius as isize, width)]))
                .collect();
            for (value, window) in target.iter_mut().zip(padded.windows(kernel.len())) {
                let sum: u32 = window
                    .iter()
                    .zip(kernel)
                    .map(|(value, weight)| value * weight)
                    .sum();
                *value = ((sum + 128) >> 8).min(255) as u8;
            }
        });
    out
}

/// The pixel that stands for position `x`: `… 2 1 0 1 2 … n-2 n-1 n-2 …`.
fn mirror(x: isize, length: usize) -> usize {
    if length == 1 {
        return 0;
    }
    let period = 2 * (length as isize - 1);
    let x = x.rem_euclid(period);
    x.min(period - x) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_sum_to_one() {
        for sigma in 1..=64 {
            let kernel = fixed_kernel(sigma);
            assert_eq!(kernel.iter().sum::<u32>(), 256, "{sigma}");
            assert_eq!(
                kernel.len(),
                2 * ((2.5 * f64::from(sigma) + 0.5) as usize) + 1
            );
        }
    }

    #[test]
    fn mirrors_leave_the_edge_out() {
        let got: Vec<_> = (-4..8).map(|x| mirror(x, 4)).collect();
        assert_eq!(got, [2, 3, 2, 1, 0, 1, 2, 3, 2, 1, 0, 1]);
        assert_eq!(mirror(-7, 1), 0);
    }
}
