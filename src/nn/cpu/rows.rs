//! The left operand of [`super::gemm`]: a matrix, or the pixels of pictures under a moving window.
//!
//! Invariant: rows are read in place, group by group of neighbouring factors; only what does not divide into whole groups (an odd
//! number of `bf16` channels) is copied, with zeros between.

use super::element::Element;

/// How a convolution walks its picture `[batch, height, width, channels]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Window {
    pub(crate) batch: usize,
    pub(crate) height: usize,
    pub(crate) width: usize,
    pub(crate) channels: usize,
    pub(crate) out_height: usize,
    pub(crate) out_width: usize,
    pub(crate) kernel: usize,
    pub(crate) stride: usize,
    /// Rows and columns of zeros before the first pixel.
    pub(crate) pad: usize,
    /// 2 reads the picture as if it were enlarged by nearest neighbour.
    pub(crate) upsample: usize,
    /// Wrap around instead of zeros (seamless textures).
    pub(crate) circular: bool,
}

/// Where the rows of `a` come from.
#[derive(Clone, Copy)]
pub(crate) enum Rows<'a, E> {
    /// `[m, k]`, row major.
    Matrix(&'a [E]),
    /// A picture under a window.
    Picture(&'a [E], Window),
    /// Pictures of one size, their channels side by side, read where they lie; the window counts all channels.
    Pictures(&'a [Part<'a, E>], Window),
}

/// Some channels of a picture: pixels and how many channels each has.
pub(crate) type Part<'a, E> = (&'a [E], usize);

impl<E: Element> Rows<'_, E> {
    /// Rows of a product over `k` factors.
    pub(super) fn count(&self, k: usize) -> usize {
        match self {
            Self::Matrix(a) => a.len() / k.max(1),
            Self::Picture(_, w) | Self::Pictures(_, w) => w.batch * w.out_height * w.out_width,
        }
    }

    /// Whether every row is read in whole groups.
    pub(super) fn in_groups(&self, k: usize) -> bool {
        match self {
            Self::Matrix(_) => k.is_multiple_of(E::GROUP),
            Self::Picture(_, w) => w.channels.is_multiple_of(E::GROUP),
            Self::Pictures(parts, _) => parts.iter().all(|(_, c)| c.is_multiple_of(E::GROUP)),
        }
    }

    /// A copy with each run of factors filled up to whole groups, and the window over it.
    pub(super) fn filled_up(&self, k: usize) -> (Vec<E>, Option<Window>) {
        let whole = |x: &[E], c| fill_up(&[(x, c)], x.len() / c);
        match *self {
            Self::Matrix(a) => (whole(a, k), None),
            Self::Picture(x, w) => (whole(x, w.channels), Some(w.filled_up(E::GROUP))),
            Self::Pictures(parts, w) => (
                fill_up(parts, w.batch * w.height * w.width),
                Some(w.filled_up(E::GROUP)),
            ),
        }
    }

    /// Panics unless the rows are those of a weight with `k` factors.
    pub(super) fn check(&self, k: usize) {
        match *self {
            Self::Matrix(_) => {}
            Self::Picture(x, w) => check_window(&[(x, w.channels)], w, k),
            Self::Pictures(parts, w) => check_window(parts, w, k),
        }
    }
}

/// The parts of each of `pixels` side by side, then zeros up to a whole group.
fn fill_up<E: Element>(parts: &[Part<'_, E>], pixels: usize) -> Vec<E> {
    let channels: usize = parts.iter().map(|(_, c)| c).sum();
    let width = channels.next_multiple_of(E::GROUP);
    let mut out = Vec::with_capacity(pixels * width);
    for pixel in 0..pixels {
        for (x, c) in parts {
            out.extend_from_slice(&x[pixel * c..(pixel + 1) * c]);
        }
        out.resize((pixel + 1) * width, E::default());
    }
    out
}

/// The parts are the window's picture, and the window is the weight's.
fn check_window<E>(parts: &[Part<'_, E>], window: Window, k: usize) {
    let pixels = window.batch * window.height * window.width;
    for (values, channels) in parts {
        assert_eq!(values.len(), pixels * channels, "gemm: picture size");
    }
    let channels: usize = parts.iter().map(|(_, channels)| channels).sum();
    assert_eq!(channels, window.channels, "gemm: channels");
    assert_eq!(
        k,
        window.kernel * window.kernel * channels,
        "gemm: window size"
    );
}

/// An output pixel: its batch entry's offset and the corner of its window in (enlarged) input pixels.
#[derive(Clone, Copy)]
pub(super) struct Pixel {
    base: usize,
    y: isize,
    x: isize,
}

impl Window {
    fn filled_up(self, group: usize) -> Self {
        Self {
            channels: self.channels.next_multiple_of(group),
            ..self
        }
    }

    /// The windows of output pixels `m..m + MR`; those past `valid` repeat the first.
    #[inline(always)]
    pub(super) fn pixels<const MR: usize>(&self, m: usize, valid: usize) -> [Pixel; MR] {
        let (row, mut ox) = (m / self.out_width, m % self.out_width);
        let (mut image, mut oy) = (row / self.out_height, row % self.out_height);
        let mut pixels = [Pixel {
            base: 0,
            y: 0,
            x: 0,
        }; MR];
        for i in 0..MR {
            if i >= valid {
                pixels[i] = pixels[0];
                continue;
            }
            pixels[i] = Pixel {
                base: image * self.height * self.width,
                y: (oy * self.stride) as isize - self.pad as isize,
                x: (ox * self.stride) as isize - self.pad as isize,
            };
            ox += 1;
            if ox == self.out_width {
                (ox, oy) = (0, oy + 1);
            }
            if oy == self.out_height {
                (oy, image) = (0, image + 1);
            }
        }
        pixels
    }

    /// Number of the pixel that lies `down` and `right` of a window's corner, or `None` in the padding.
    #[inline(always)]
    pub(super) fn source(&self, pixel: Pixel, [down, right]: [usize; 2]) -> Option<usize> {
        let (height, width) = (
            (self.height * self.upsample) as isize,
            (self.width * self.upsample) as isize,
        );
        let mut y = pixel.y + down as isize;
        let mut x = pixel.x + right as isize;
        if self.circular {
            (y, x) = (y.rem_euclid(height), x.rem_euclid(width));
        } else if y < 0 || x < 0 || y >= height || x >= width {
            return None;
        }
        let (mut y, mut x) = (y as usize, x as usize);
        // A division costs as much as a vector of products.
        if self.upsample > 1 {
            (y, x) = (y / self.upsample, x / self.upsample);
        }
        Some(pixel.base + y * self.width + x)
    }
}
