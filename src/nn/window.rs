//! How a convolution's window moves over a picture, and what size comes out.

use super::cpu::rows::Window;

/// How a convolution's window moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sampling {
    /// Step in pixels.
    pub stride: usize,
    /// Padding above and left.
    pub pad: usize,
    /// Padding below and right.
    pub pad_after: usize,
    /// Nearest-neighbour enlargement before the window, folded into the read.
    pub upsample: usize,
}

impl Sampling {
    /// Same size out as in, for a kernel of 3.
    pub const SAME: Self = Self {
        stride: 1,
        pad: 1,
        pad_after: 1,
        upsample: 1,
    };
    /// Same size out as in, for a kernel of 1.
    pub const POINT: Self = Self {
        pad: 0,
        pad_after: 0,
        ..Self::SAME
    };
    /// Half the size, the UNet's way.
    pub const HALVE: Self = Self {
        stride: 2,
        ..Self::SAME
    };
    /// Half the size, the VAE encoder's way: padding below and right only.
    pub const HALVE_VAE: Self = Self {
        stride: 2,
        pad: 0,
        ..Self::SAME
    };
    /// Twice the size.
    pub const DOUBLE: Self = Self {
        upsample: 2,
        ..Self::SAME
    };

    /// Sizes of a convolution with a square `kernel` over `[batch, height, width, channels]`.
    pub(super) fn window(
        self,
        [batch, height, width, channels]: [usize; 4],
        kernel: usize,
        circular: bool,
    ) -> Window {
        let reach = |len: usize| {
            (len * self.upsample + self.pad + self.pad_after).saturating_sub(kernel) / self.stride
                + 1
        };
        Window {
            batch,
            height,
            width,
            channels,
            out_height: reach(height),
            out_width: reach(width),
            kernel,
            stride: self.stride,
            pad: self.pad,
            upsample: self.upsample,
            circular,
        }
    }
}
