//! How many blocks of how many threads a kernel of ours gets, as `kernels/README.md` lists them; and the shape of a product.
//!
//! Pure numbers: the same on every machine, tested without a device.

use candle_core::DType;

use crate::nn::cpu::math::Activation;
use crate::nn::cpu::rows::Window;

/// The types kernels of ours exist for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    F32,
    F16,
    Bf16,
}

impl Kind {
    pub(super) fn of(dtype: DType) -> Option<Self> {
        match dtype {
            DType::F32 => Some(Self::F32),
            DType::F16 => Some(Self::F16),
            DType::BF16 => Some(Self::Bf16),
            _ => None,
        }
    }

    pub(super) fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::Bf16 => DType::BF16,
        }
    }

    /// The end of a kernel's name.
    pub(super) fn suffix(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }

    pub(super) fn bytes(self) -> usize {
        if self == Self::F32 { 4 } else { 2 }
    }

    /// Values in the 16 bytes that a thread loads at once.
    fn vector(self) -> usize {
        16 / self.bytes()
    }
}

/// A launch without its kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Grid {
    pub(super) blocks: [usize; 3],
    pub(super) threads: usize,
    /// Bytes of dynamic shared memory.
    pub(super) shared: usize,
}

impl Grid {
    fn flat(blocks: usize, threads: usize) -> Self {
        Self {
            blocks: [blocks, 1, 1],
            threads,
            shared: 0,
        }
    }

    /// A grid-stride loop over `work` items.
    pub(super) fn strided(work: usize, multiprocessors: usize) -> Self {
        let most = (8 * multiprocessors).max(1);
        Self::flat(work.div_ceil(256).clamp(1, most), 256)
    }

    /// Four rows a block.
    pub(super) fn rows(rows: usize) -> Self {
        Self::flat(rows.div_ceil(4), 128)
    }
}

/// Sizes of a group norm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct GroupGrid {
    pub(super) batch: usize,
    pub(super) pixels: usize,
    /// Of both pictures, if there are two.
    pub(super) channels: usize,
    pub(super) groups: usize,
}

impl GroupGrid {
    /// Slices of pixels that are summed by a block each.
    pub(super) fn slices(self, multiprocessors: usize) -> usize {
        let most = (2 * multiprocessors)
            .div_ceil(self.batch.max(1))
            .clamp(1, 256);
        self.pixels.div_ceil(128).clamp(1, most)
    }

    pub(super) fn statistics(self, kind: Kind, multiprocessors: usize) -> Grid {
        Grid {
            blocks: [self.slices(multiprocessors), self.batch, 1],
            threads: 256,
            shared: 4 * (2 * self.channels + 512 * kind.vector()),
        }
    }

    pub(super) fn apply(self, multiprocessors: usize) -> Grid {
        let most = (8 * multiprocessors).div_ceil(self.batch.max(1)).max(1);
        let blocks = (self.pixels * self.channels).div_ceil(16_384);
        Grid {
            blocks: [blocks.clamp(1, most), self.batch, 1],
            threads: 256,
            shared: 8 * self.groups,
        }
    }
}

/// Attention of `tokens` to others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct AttentionShape {
    pub(super) batch: usize,
    pub(super) tokens: usize,
    pub(super) key_tokens: usize,
    pub(super) heads: usize,
    pub(super) head_dim: usize,
    /// Values from one token to the next.
    pub(super) q_stride: usize,
    pub(super) kv_stride: usize,
    pub(super) causal: bool,
}

impl AttentionShape {
    /// Kernel's head size and grid; `None` for heads wider than any kernel's.
    pub(super) fn grid(&self, kind: Kind) -> Option<(usize, Grid)> {
        let head = [64, 128, 512].into_iter().find(|&d| self.head_dim <= d)?;
        let (rows, threads, shared) = match (kind, head) {
            (Kind::F32, _) => (16, 256, 4 * (32 * (head + 4) + 272)),
            (_, 64) => (128, 128, 49_152),
            (_, 128) => (64, 128, 81_920),
            _ => (64, 256, 98_304),
        };
        let blocks = [self.tokens.div_ceil(rows), self.heads, self.batch];
        Some((
            head,
            Grid {
                blocks,
                threads,
                shared,
            },
        ))
    }
}

/// A product `[m, k]` by `[n, k]`, plain or under a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct ProductShape {
    pub(super) m: usize,
    pub(super) n: usize,
    /// Channels of the first and the second input.
    pub(super) channels: [usize; 2],
    /// `None` for a linear layer.
    pub(super) window: Option<WindowShape>,
    pub(super) rows_per_image: usize,
    pub(super) activation: i32,
    pub(super) geglu: bool,
    /// Values from one image's shift to the next's; 0 without one.
    pub(super) shift_stride: usize,
}

/// [`Window`] as part of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct WindowShape {
    pub(super) batch: usize,
    pub(super) size: [usize; 2],
    pub(super) out: [usize; 2],
    pub(super) kernel: usize,
    pub(super) stride: usize,
    pub(super) pad: usize,
    pub(super) upsample: usize,
    pub(super) circular: bool,
}

impl From<Window> for WindowShape {
    fn from(w: Window) -> Self {
        Self {
            batch: w.batch,
            size: [w.height, w.width],
            out: [w.out_height, w.out_width],
            kernel: w.kernel,
            stride: w.stride,
            pad: w.pad,
            upsample: w.upsample,
            circular: w.circular,
        }
    }
}

impl ProductShape {
    pub(super) fn k(&self) -> usize {
        let taps = self.window.map_or(1, |w| w.kernel * w.kernel);
        taps * (self.channels[0] + self.channels[1])
    }

    /// Columns of the result.
    pub(super) fn outputs(&self) -> usize {
        if self.geglu { self.n / 2 } else { self.n }
    }

    /// Rows of the tile, which is square, and the grid.
    pub(super) fn grid(&self, kind: Kind, multiprocessors: usize) -> (usize, Grid) {
        let blocks = |tile: usize| self.m.div_ceil(tile) * self.n.div_ceil(tile);
        if kind != Kind::F32 && blocks(128) >= multiprocessors {
            let grid = Grid::flat(blocks(128), 256);
            return (
                128,
                Grid {
                    shared: 65_536,
                    ..grid
                },
            );
        }
        let threads = if kind == Kind::F32 { 256 } else { 128 };
        let grid = Grid::flat(blocks(64), threads);
        (
            64,
            Grid {
                shared: 32_768,
                ..grid
            },
        )
    }

    /// The kernels' `GemmShape`.
    pub(super) fn words(&self) -> [i32; 18] {
        let w = self.window.unwrap_or(WindowShape {
            batch: 1,
            size: [1, self.m],
            out: [1, self.m],
            kernel: 1,
            stride: 1,
            pad: 0,
            upsample: 1,
            circular: false,
        });
        [
            self.m,
            self.n,
            self.k(),
            self.channels[0],
            self.channels[1],
            w.size[0],
            w.size[1],
            w.out[0],
            w.out[1],
            w.kernel,
            w.stride,
            w.pad,
            w.upsample,
            usize::from(w.circular),
            self.rows_per_image,
            self.activation as usize,
            usize::from(self.geglu),
            self.shift_stride,
        ]
        .map(|value| value as i32)
    }
}

/// The kernels' number of an activation.
pub(super) fn activation_number(activation: Activation) -> i32 {
    match activation {
        Activation::None => 0,
        Activation::Silu => 1,
        Activation::Gelu => 2,
        Activation::QuickGelu => 3,
        Activation::Relu => 4,
        Activation::LeakyRelu => 5,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::Sampling;

    /// An H100's.
    const SM: usize = 132;

    fn linear(m: usize, n: usize, k: usize) -> ProductShape {
        ProductShape {
            m,
            n,
            channels: [k, 0],
            window: None,
            rows_per_image: 0,
            activation: 0,
            geglu: false,
            shift_stride: 0,
        }
    }

    #[test]
    fn a_product_takes_the_large_tile_when_it_fills_the_card() {
        let (tile, grid) = linear(8192, 1280, 1280).grid(Kind::Bf16, SM);
        assert_eq!((tile, grid.blocks[0], grid.threads), (128, 64 * 10, 256));
        let (tile, grid) = linear(154, 1280, 2048).grid(Kind::F16, SM);
        assert_eq!((tile, grid.blocks[0], grid.threads), (64, 3 * 20, 128));
        let (tile, grid) = linear(8192, 1280, 1280).grid(Kind::F32, SM);
        assert_eq!((tile, grid.threads, grid.shared), (64, 256, 32_768));
    }

    #[test]
    fn three_types_have_kernels() {
        for (dtype, suffix) in [
            (DType::F32, "f32"),
            (DType::F16, "f16"),
            (DType::BF16, "bf16"),
        ] {
            let kind = Kind::of(dtype).unwrap();
            assert_eq!((kind.dtype(), kind.suffix()), (dtype, suffix));
            assert_eq!(kind.bytes(), dtype.size_in_bytes());
        }
        assert_eq!(Kind::of(DType::U8), None);
    }

    #[test]
    fn loops_get_no_more_blocks_than_run_at_once() {
        assert_eq!(Grid::strided(1, SM).blocks, [1, 1, 1]);
        assert_eq!(Grid::strided(2000, SM).blocks, [8, 1, 1]);
        assert_eq!(Grid::strided(1 << 30, SM).blocks, [8 * SM, 1, 1]);
        assert_eq!(Grid::rows(4097).blocks, [1025, 1, 1]);
    }

    #[test]
    fn a_convolutions_words_follow_its_window() {
        let window = Sampling::DOUBLE.window([2, 32, 24, 640], 3, true);
        let shape = ProductShape {
            m: 2 * 64 * 48,
            n: 640,
            channels: [400, 240],
            window: Some(window.into()),
            rows_per_image: 64 * 48,
            activation: activation_number(Activation::Silu),
            geglu: false,
            shift_stride: 720,
        };
        assert_eq!(
            shape.words(),
            [
                6144, 640, 5760, 400, 240, 32, 24, 64, 48, 3, 1, 1, 2, 1, 3072, 1, 0, 720
            ]
        );
    }

    #[test]
    fn a_gated_product_has_half_the_columns() {
        let shape = ProductShape {
            geglu: true,
            ..linear(4096, 5120, 640)
        };
        assert_eq!(
            (shape.outputs(), shape.words()[1], shape.words()[16]),
            (2560, 5120, 1)
        );
    }

    #[test]
    fn norms_cut_a_picture_into_as_many_slices_as_the_card_can_sum() {
        let grid = |batch, pixels| GroupGrid {
            batch,
            pixels,
            channels: 320,
            groups: 32,
        };
        assert_eq!(grid(2, 16_384).slices(SM), 128);
        assert_eq!(grid(2, 100).slices(SM), 1);
        assert_eq!(grid(1, 1 << 20).slices(SM), 256);
        let statistics = grid(2, 16_384).statistics(Kind::Bf16, SM);
        assert_eq!(statistics.shared, 4 * (640 + 4096));
        assert_eq!(grid(2, 16_384).apply(SM).blocks, [320, 2, 1]);
        assert_eq!(grid(1, 1 << 20).apply(SM).blocks, [8 * SM, 1, 1]);
    }

    #[test]
    fn attention_takes_the_narrowest_kernel_that_holds_a_head() {
        let shape = |head_dim| AttentionShape {
            batch: 2,
            tokens: 4096,
            key_tokens: 77,
            heads: 10,
            head_dim,
            q_stride: 640,
            kv_stride: 1280,
            causal: false,
        };
        let (head, grid) = shape(64).grid(Kind::F16).unwrap();
        assert_eq!((head, grid.blocks, grid.shared), (64, [32, 10, 2], 49_152));
        assert_eq!(shape(80).grid(Kind::Bf16).unwrap().0, 128);
        let (head, grid) = shape(512).grid(Kind::F32).unwrap();
        assert_eq!((head, grid.blocks[0], grid.shared), (512, 256, 67_136));
        assert_eq!(shape(513).grid(Kind::F16), None);
    }
}
