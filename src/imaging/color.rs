//! Colour correction of img2img: the result's colours are matched to the init image's, its luminosity kept.
//!
//! Both pictures are taken to 8-bit CIELAB in `OpenCV`'s scaling (L times 2.55, a and b plus 128), each channel's histogram is
//! matched by interpolating between cumulative counts, and the luminosity of the uncorrected picture is put back with the
//! gamut clip of the W3C compositing specification. Follows A1111's `processing.apply_color_correction`.

use image::RgbImage;
use rayon::prelude::*;

/// Values of an 8-bit channel.
const VALUES: usize = 256;

/// XYZ of linear sRGB, divided by the white point D65, in 1/4096.
const TO_XYZ: [[i32; 3]; 3] = [[1777, 1541, 778], [871, 2929, 296], [73, 448, 3575]];
/// Linear sRGB of XYZ divided by the white point.
const FROM_XYZ: [[f32; 3]; 3] = [
    [3.240479 * 0.950456, -1.53715, -0.498535 * 1.088754],
    [-0.969256 * 0.950456, 1.875991, 0.041556 * 1.088754],
    [0.055648 * 0.950456, -0.204043, 1.057311 * 1.088754],
];

/// The colours to match: three histograms.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ColorReference {
    histograms: [[u64; VALUES]; 3],
}

impl ColorReference {
    /// The colours of the prepared init image.
    #[must_use]
    pub fn new(picture: &RgbImage) -> Self {
        Self {
            histograms: histograms(&lab_pixels(picture)),
        }
    }

    /// Gives `picture` the colours of the reference.
    #[must_use]
    pub fn apply(&self, picture: &RgbImage) -> RgbImage {
        let lab = lab_pixels(picture);
        let own = histograms(&lab);
        let tables: [[u8; VALUES]; 3] =
            std::array::from_fn(|channel| matching_table(&own[channel], &self.histograms[channel]));
        let mut out = picture.clone();
        out.par_chunks_exact_mut(3)
            .zip(lab.par_iter())
            .for_each(|(pixel, lab)| {
                let matched =
                    std::array::from_fn(|channel| tables[channel][usize::from(lab[channel])]);
                let original = [pixel[0], pixel[1], pixel[2]];
                pixel.copy_from_slice(&with_luminosity(to_rgb(matched), original));
            });
        out
    }
}

/// 8-bit CIELAB of every pixel, in the fixed point of `OpenCV`: histograms are made of it, so a step to a neighbour counts.
fn lab_pixels(picture: &RgbImage) -> Vec<[u8; 3]> {
    /// Steps of linear light per 8-bit step.
    const LIGHT: usize = 8;
    const ONE: i32 = 1 << 15;
    let light: Vec<i32> = (0..VALUES)
        .map(|value| {
            (f64::from(linear(value as f32 / 255.0)) * (255 * LIGHT) as f64).round() as i32
        })
        .collect();
    let root = |step: usize| {
        let t = step as f64 / (255 * LIGHT) as f64;
        let root = if t < 0.008_856 {
            t * 7.787 + 16.0 / 116.0
        } else {
            t.cbrt()
        };
        (root * f64::from(ONE)).round() as i32
    };
    let roots: Vec<i32> = (0..VALUES * 3 / 2 * LIGHT).map(root).collect();
    let scaled = |sum: i32| ((sum + ONE / 2) >> 15) as u8;
    let pixel = |rgb: &[u8]| {
        let rgb = [rgb[0], rgb[1], rgb[2]].map(|value| light[usize::from(value)]);
        let [x, y, z] = TO_XYZ.map(|row| {
            let sum: i32 = row
                .iter()
                .zip(rgb)
                .map(|(weight, value)| weight * value)
                .sum();
            roots[((sum + 2048) >> 12) as usize]
        });
        // 116 and 16 of the definition, times 2.55.
        [
            scaled(296 * y - 1_336_934),
            scaled(500 * (x - y) + 128 * ONE),
            scaled(200 * (y - z) + 128 * ONE),
        ]
    };
    picture.par_chunks_exact(3).map(pixel).collect()
}

fn histograms(lab: &[[u8; 3]]) -> [[u64; VALUES]; 3] {
    let mut counts = [[0; VALUES]; 3];
    for pixel in lab {
        for (channel, &value) in counts.iter_mut().zip(pixel) {
            channel[usize::from(value)] += 1;
        }
    }
    counts
}

/// For each value the reference's value of the same rank, rounded down.
fn matching_table(own: &[u64; VALUES], reference: &[u64; VALUES]) -> [u8; VALUES] {
    // Ranks as fractions of all pixels, of the reference only where a value occurs.
    let total: u64 = reference.iter().sum();
    let mut seen = 0;
    let occurring = reference
        .iter()
        .enumerate()
        .filter(|(_, count)| **count > 0);
    let ranks: Vec<(f64, f64)> = occurring
        .map(|(value, count)| {
            seen += count;
            (seen as f64 / total as f64, value as f64)
        })
        .collect();
    let own_total: u64 = own.iter().sum();
    let mut own_seen = 0;
    std::array::from_fn(|value| {
        own_seen += own[value];
        interpolate(&ranks, own_seen as f64 / own_total.max(1) as f64) as u8
    })
}

/// Linear between points, constant outside.
fn interpolate(points: &[(f64, f64)], x: f64) -> f64 {
    let above = points.partition_point(|&(rank, _)| rank <= x);
    match (
        above.checked_sub(1).and_then(|below| points.get(below)),
        points.get(above),
    ) {
        (Some(&(x0, y0)), Some(&(x1, y1))) => y0 + (y1 - y0) / (x1 - x0) * (x - x0),
        (Some(&(_, y)), None) | (None, Some(&(_, y))) => y,
        (None, None) => 0.0,
    }
}

fn linear(value: f32) -> f32 {
    if value <= 0.04045 {
        value / 12.92
    } else {
        ((value + 0.055) / 1.055).powf(2.4)
    }
}

fn gamma(value: f32) -> f32 {
    if value <= 0.003_130_8 {
        value * 12.92
    } else {
        1.055 * value.powf(1.0 / 2.4) - 0.055
    }
}

fn multiply(matrix: &[[f32; 3]; 3], v: [f32; 3]) -> [f32; 3] {
    matrix.map(|row| row[0] * v[0] + row[1] * v[1] + row[2] * v[2])
}

/// sRGB of an 8-bit CIELAB colour.
fn to_rgb(lab: [u8; 3]) -> [u8; 3] {
    let lightness = f32::from(lab[0]) / 2.55;
    let (a, b) = (f32::from(lab[1]) - 128.0, f32::from(lab[2]) - 128.0);
    // Below L = 8 both lightness and the cube root are straight lines.
    let (y, fy) = if lightness <= 7.999_625 {
        let y = lightness / 903.3;
        (y, 7.787 * y + 16.0 / 116.0)
    } else {
        let fy = (lightness + 16.0) / 116.0;
        (fy * fy * fy, fy)
    };
    let back = |t: f32| {
        if t <= 0.206_893 {
            (t - 16.0 / 116.0) / 7.787
        } else {
            t * t * t
        }
    };
    let rgb = multiply(&FROM_XYZ, [back(a / 500.0 + fy), y, back(fy - b / 200.0)]);
    rgb.map(|value| (gamma(value.clamp(0.0, 1.0)) * 255.0).round() as u8)
}

/// `color` with the luminosity of `original`.
fn with_luminosity(color: [u8; 3], original: [u8; 3]) -> [u8; 3] {
    let luminosity = |c: [f32; 3]| 0.3 * c[0] + 0.59 * c[1] + 0.11 * c[2];
    let (color, original) = (
        color.map(|value| f32::from(value) / 255.0),
        original.map(|value| f32::from(value) / 255.0),
    );
    let shift = luminosity(original) - luminosity(color);
    let shifted = color.map(|value| value + shift);
    // Out of range: towards grey until it fits.
    let level = luminosity(shifted);
    let lowest = shifted.into_iter().fold(f32::INFINITY, f32::min);
    let highest = shifted.into_iter().fold(f32::NEG_INFINITY, f32::max);
    let fitted = shifted.map(|value| {
        if lowest < 0.0 {
            level + (value - level) * level / (level - lowest)
        } else {
            value
        }
    });
    let fitted = fitted.map(|value| {
        if highest > 1.0 {
            level + (value - level) * (1.0 - level) / (highest - level)
        } else {
            value
        }
    });
    fitted.map(|value| (value.clamp(0.0, 1.0) * 255.0).round() as u8)
}

#[cfg(test)]
mod tests {
    use image::Rgb;

    use super::*;

    #[test]
    fn a_picture_matched_to_itself_keeps_its_colours() {
        let picture = RgbImage::from_fn(32, 32, |x, y| {
            Rgb([(x * 8) as u8, (y * 8) as u8, (x + y) as u8])
        });
        let same = ColorReference::new(&picture).apply(&picture);
        let worst = picture
            .iter()
            .zip(same.iter())
            .map(|(a, b)| a.abs_diff(*b))
            .max();
        // 8-bit CIELAB cannot name every RGB colour: the way there and back costs up to 24 in a dark blue.
        assert!(worst <= Some(24), "{worst:?}");
    }

    #[test]
    fn luminosity_stays() {
        assert_eq!(with_luminosity([200, 50, 50], [128, 128, 128])[0], 233);
        assert_eq!(
            with_luminosity([255, 0, 0], [255, 255, 255]),
            [255, 255, 255]
        );
        assert_eq!(with_luminosity([10, 200, 30], [0, 0, 0]), [0, 0, 0]);
    }

    #[test]
    fn ranks_are_interpolated() {
        let points = [(0.25, 10.0), (0.75, 20.0), (1.0, 30.0)];
        assert_eq!(
            [0.0, 0.25, 0.5, 0.75, 0.875, 1.0].map(|x| interpolate(&points, x) as u8),
            [10, 10, 15, 20, 25, 30]
        );
    }
}
