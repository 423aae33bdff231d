//! Linear layers and convolutions against `Linear` and `Conv2d`.

use std::sync::Arc;

use candle_core::{Device, Tensor};
use sdgen::nn::{Activation, Conv2d, Linear, Placement, Sampling, Then};

use crate::emulation::{Arg, Grid, Type, compare, launch};
use crate::formulas::inputs;

/// Tiles that a type has, with the threads and shared memory of their blocks.
fn tiles(t: Type) -> &'static [(usize, usize, usize)] {
    match t {
        Type::F32 => &[(64, 256, 32_768)],
        _ => &[(64, 128, 32_768), (128, 256, 65_536)],
    }
}

fn tensor(values: &[f32], shape: &[usize]) -> Tensor {
    Tensor::from_slice(values, shape, &Device::Cpu).unwrap()
}

fn to_host(x: &Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

fn number(activation: Activation) -> i32 {
    match activation {
        Activation::None => 0,
        Activation::Silu => 1,
        Activation::Gelu => 2,
        Activation::QuickGelu => 3,
        Activation::Relu => 4,
        Activation::LeakyRelu => 5,
    }
}

/// The operands of a product and its epilogue, as kernels take them.
#[derive(Default)]
struct Operands {
    parts: [Vec<f32>; 2],
    weight: Vec<f32>,
    bias: Option<Vec<f32>>,
    shift: Option<Vec<f32>>,
    slopes: Option<Vec<f32>>,
    residual: Option<Vec<f32>>,
}

/// `GemmShape` of `gemm.cu`.
#[derive(Clone, Copy, Default)]
struct Shape {
    m: usize,
    n: usize,
    k: usize,
    channels: [usize; 2],
    size: [usize; 2],
    out_size: [usize; 2],
    kernel: usize,
    stride: usize,
    pad: usize,
    upsample: usize,
    circular: bool,
    rows_per_image: usize,
    activation: Activation,
    geglu: bool,
    shift_stride: usize,
}

impl Shape {
    fn ints(self) -> Arg {
        let int = |v: usize| i32::try_from(v).unwrap();
        Arg::Ints(vec![
            int(self.m),
            int(self.n),
            int(self.k),
            int(self.channels[0]),
            int(self.channels[1]),
            int(self.size[0]),
            int(self.size[1]),
            int(self.out_size[0]),
            int(self.out_size[1]),
            int(self.kernel),
            int(self.stride),
            int(self.pad),
            int(self.upsample),
            i32::from(self.circular),
            int(self.rows_per_image),
            number(self.activation),
            i32::from(self.geglu),
            int(self.shift_stride),
        ])
    }

    fn outputs(self) -> usize {
        if self.geglu { self.n / 2 } else { self.n }
    }
}

/// Runs every tile of `linear` or `conv` and compares.
#[track_caller]
fn check(kind: &str, t: Type, operands: &Operands, shape: Shape, want: &[f32]) {
    let second = (shape.channels[1] > 0).then(|| operands.parts[1].clone());
    for &(tile, threads, shared) in tiles(t) {
        let kernel = format!("{kind}_{tile}x{tile}_{}", t.suffix());
        let blocks = shape.m.div_ceil(tile) * shape.n.div_ceil(tile);
        let out = launch(
            "gemm",
            &kernel,
            Grid::new([blocks, 1, 1], threads, shared),
            &[
                Arg::values(t, &operands.parts[0]),
                Arg::optional(t, second.as_ref()),
                Arg::values(t, &operands.weight),
                Arg::optional(t, operands.bias.as_ref()),
                Arg::optional(t, operands.shift.as_ref()),
                Arg::optional(t, operands.slopes.as_ref()),
                Arg::optional(t, operands.residual.as_ref()),
                Arg::room(shape.m * shape.outputs() * t.size()),
                shape.ints(),
            ],
        );
        let name = format!("{kernel} {} x {} x {}", shape.m, shape.n, shape.k);
        compare(&name, t, &t.decode(&out[7]), want);
    }
}

fn linear(t: Type, [m, k, n]: [usize; 3], then: Then, has_residual: bool) {
    let geglu = then == Then::Geglu;
    let outputs = if geglu { n / 2 } else { n };
    let x = inputs(t, 1, m * k, 1.0);
    // Sums of about 1, whatever k.
    let weight = inputs(t, 2, n * k, 3.0 / (k as f32).sqrt());
    let bias = inputs(t, 3, n, 1.0);
    let residual = has_residual.then(|| inputs(t, 4, m * outputs, 1.0));

    let layer = Linear::new(&Placement::cpu(), &weight, n, Some(&bias), then).unwrap();
    let input = tensor(&x, &[m, k]);
    let want = match &residual {
        Some(r) => layer.forward_add(&input, &tensor(r, &[m, outputs])),
        None => layer.forward(&input),
    };
    let interleaved = |rows: &[f32], width: usize| -> Vec<f32> {
        let row = |r: usize| rows[r * width..(r + 1) * width].iter().copied();
        (0..n / 2)
            .flat_map(|j| row(j).chain(row(n / 2 + j)))
            .collect()
    };
    let operands = Operands {
        parts: [x, Vec::new()],
        weight: if geglu {
            interleaved(&weight, k)
        } else {
            weight
        },
        bias: Some(if geglu { interleaved(&bias, 1) } else { bias }),
        residual,
        ..Operands::default()
    };
    let shape = Shape {
        m,
        n,
        k,
        channels: [k, 0],
        activation: match then {
            Then::Activate(activation) => activation,
            Then::Geglu => Activation::None,
        },
        geglu,
        ..Shape::default()
    };
    check("linear", t, &operands, shape, &to_host(&want.unwrap()));
}

#[test]
fn linear_layers_are_those_of_the_cpu() {
    let plain = Then::Activate(Activation::None);
    for t in Type::ALL {
        linear(t, [77, 320, 640], plain, true);
        linear(t, [1, 1280, 320], Then::Activate(Activation::Silu), false);
        linear(t, [200, 64, 72], Then::Activate(Activation::Gelu), false);
        linear(
            t,
            [130, 96, 136],
            Then::Activate(Activation::QuickGelu),
            true,
        );
        // Nothing divides anything.
        linear(t, [65, 5, 3], plain, false);
        linear(t, [33, 321, 67], Then::Activate(Activation::Relu), true);
        linear(t, [3, 4, 320], plain, false);
        // Values and gates.
        linear(t, [70, 320, 256], Then::Geglu, false);
        linear(t, [9, 40, 42], Then::Geglu, true);
    }
}

/// Tiles of rows beyond one band, so that the order of tiles matters.
#[test]
fn every_tile_of_a_tall_product_is_computed_once() {
    linear(
        Type::F16,
        [1100, 32, 130],
        Then::Activate(Activation::None),
        false,
    );
}

#[derive(Clone, Copy, PartialEq)]
enum Second {
    None,
    Residual,
    PerImage,
}

/// A convolution.
#[derive(Clone, Copy)]
struct Case {
    /// Batch, height, width.
    picture: [usize; 3],
    channels: [usize; 2],
    outputs: usize,
    kernel: usize,
    sampling: Sampling,
    circular: bool,
    activation: Activation,
    prelu: bool,
    second: Second,
}

impl Case {
    const fn new(picture: [usize; 3], channels: [usize; 2], outputs: usize) -> Self {
        Self {
            picture,
            channels,
            outputs,
            kernel: 3,
            sampling: Sampling::SAME,
            circular: false,
            activation: Activation::None,
            prelu: false,
            second: Second::None,
        }
    }

    fn shape(self) -> Shape {
        let Self {
            picture: [batch, height, width],
            channels,
            kernel,
            sampling: s,
            ..
        } = self;
        let reach = |len: usize| (len * s.upsample + s.pad + s.pad_after - kernel) / s.stride + 1;
        let out_size = [reach(height), reach(width)];
        Shape {
            m: batch * out_size[0] * out_size[1],
            n: self.outputs,
            k: kernel * kernel * (channels[0] + channels[1]),
            channels,
            size: [height, width],
            out_size,
            kernel,
            stride: s.stride,
            pad: s.pad,
            upsample: s.upsample,
            circular: self.circular,
            rows_per_image: out_size[0] * out_size[1],
            activation: self.activation,
            geglu: false,
            // Columns of a wider matrix, whose rows begin on a boundary or not.
            shift_stride: self.outputs + if kernel == 1 { 12 } else { 16 },
        }
    }
}

/// Operands for the kernel, and what the CPU's layer makes of them.
fn convolution(t: Type, case: Case) -> (Operands, Vec<f32>) {
    let Case {
        picture: [batch, height, width],
        channels,
        outputs,
        kernel,
        ..
    } = case;
    let shape = case.shape();
    let (all, taps) = (channels[0] + channels[1], kernel * kernel);
    let parts = [0, 1].map(|i| inputs(t, i, batch * height * width * channels[i], 1.0));
    let stored = inputs(t, 2, outputs * shape.k, 3.0 / (shape.k as f32).sqrt());
    let bias = inputs(t, 3, outputs, 1.0);
    let slopes = case.prelu.then(|| inputs(t, 4, outputs, 1.0));
    let residual = (case.second == Second::Residual).then(|| inputs(t, 5, shape.m * outputs, 1.0));
    let shift =
        (case.second == Second::PerImage).then(|| inputs(t, 6, batch * shape.shift_stride, 1.0));

    let place = Placement {
        circular: Arc::new(case.circular.into()),
        ..Placement::cpu()
    };
    let size = [outputs, all, kernel];
    let mut layer = Conv2d::new(&place, &stored, size, Some(&bias), case.sampling)
        .unwrap()
        .then(case.activation);
    if let Some(slopes) = &slopes {
        layer = layer.then_prelu(&place, slopes.clone()).unwrap();
    }
    let pictures: Vec<Tensor> = (0..2)
        .filter(|&i| channels[i] > 0)
        .map(|i| tensor(&parts[i], &[batch, height, width, channels[i]]))
        .collect();
    let want = match (&shift, &residual) {
        (Some(shift), _) => {
            let wide = tensor(shift, &[batch, shape.shift_stride]);
            layer.forward_shifted(&pictures[0], &wide.narrow(1, 0, outputs).unwrap())
        }
        (None, residual) => {
            let dims = [batch, shape.out_size[0], shape.out_size[1], outputs];
            let residual = residual.as_ref().map(|r| tensor(r, &dims));
            let pictures: Vec<&Tensor> = pictures.iter().collect();
            layer.forward_parts(&pictures, residual.as_ref())
        }
    };
    // Checkpoints store [out][in][tap].
    let weight = (0..outputs * shape.k)
        .map(|i| {
            let (row, k) = (i / shape.k, i % shape.k);
            stored[row * shape.k + k % all * taps + k / all]
        })
        .collect();
    let operands = Operands {
        parts,
        weight,
        bias: Some(bias),
        shift,
        slopes,
        residual,
    };
    (operands, to_host(&want.unwrap()))
}

fn conv(t: Type, case: Case) {
    let (operands, want) = convolution(t, case);
    check("conv", t, &operands, case.shape(), &want);
}

#[test]
fn convolutions_are_those_of_the_cpu() {
    for t in Type::ALL {
        // A residual block of the UNet, its skip connection beside.
        conv(
            t,
            Case {
                second: Second::PerImage,
                ..Case::new([2, 6, 5], [64, 0], 72)
            },
        );
        conv(
            t,
            Case {
                second: Second::Residual,
                activation: Activation::Silu,
                ..Case::new([1, 9, 7], [32, 16], 64)
            },
        );
        // Into and out of a latent; a width that no vector fits; a single pixel.
        conv(t, Case::new([3, 5, 3], [4, 0], 40));
        conv(t, Case::new([1, 7, 9], [40, 0], 3));
        conv(t, Case::new([1, 4, 5], [5, 4], 13));
        conv(t, Case::new([2, 1, 1], [8, 0], 8));
        // An upscaler's.
        conv(
            t,
            Case {
                prelu: true,
                ..Case::new([1, 6, 6], [24, 0], 24)
            },
        );
        conv(
            t,
            Case {
                activation: Activation::LeakyRelu,
                ..Case::new([1, 6, 6], [64, 32], 32)
            },
        );
    }
}

#[test]
fn windows_move_wrap_and_enlarge_as_on_the_cpu() {
    for t in Type::ALL {
        for sampling in [Sampling::HALVE, Sampling::HALVE_VAE, Sampling::DOUBLE] {
            for circular in [false, true] {
                // The VAE's way of halving pads by itself and does not wrap.
                let circular = circular && sampling != Sampling::HALVE_VAE;
                conv(
                    t,
                    Case {
                        sampling,
                        circular,
                        ..Case::new([2, 6, 8], [16, 0], 24)
                    },
                );
            }
        }
        let wrapped = |picture, kernel, sampling| Case {
            circular: true,
            kernel,
            sampling,
            ..Case::new(picture, [8, 0], 16)
        };
        let wide = Sampling {
            pad: 2,
            pad_after: 2,
            ..Sampling::SAME
        };
        // Narrower than the window, which then wraps more than once.
        conv(t, wrapped([1, 1, 1], 5, wide));
        conv(t, wrapped([1, 5, 3], 3, Sampling::SAME));
        let bare = Sampling {
            pad: 0,
            pad_after: 0,
            ..Sampling::SAME
        };
        for (kernel, stride) in [(1, 1), (1, 2), (4, 4), (2, 1)] {
            conv(
                t,
                Case {
                    kernel,
                    sampling: Sampling { stride, ..bare },
                    ..Case::new([1, 8, 12], [12, 0], 20)
                },
            );
        }
    }
}

/// Two matrices side by side and a shift an image: a 1x1 convolution of a picture and its skip connection.
#[test]
fn rows_in_two_parts_are_a_convolution_of_one_tap() {
    let bare = Sampling {
        pad: 0,
        pad_after: 0,
        ..Sampling::SAME
    };
    for t in Type::ALL {
        for (channels, second) in [
            ([64, 0], Second::PerImage),
            ([24, 40], Second::Residual),
            ([7, 6], Second::None),
        ] {
            let case = Case {
                kernel: 1,
                sampling: bare,
                second,
                ..Case::new([2, 9, 5], channels, 48)
            };
            let (operands, want) = convolution(t, case);
            check("linear", t, &operands, case.shape(), &want);
        }
    }
}
