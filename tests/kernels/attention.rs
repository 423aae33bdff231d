//! Attention against `self_attention` and `cross_attention`.

use candle_core::{Device, Tensor};
use sdgen::nn::{Mask, cross_attention, self_attention};

use crate::emulation::{Arg, Grid, Type, compare, launch};
use crate::formulas::inputs;

#[derive(Clone, Copy)]
struct Case {
    batch: usize,
    heads: usize,
    head_dim: usize,
    tokens: usize,
    /// Of a context; `None` is self-attention.
    context: Option<usize>,
    mask: Mask,
}

impl Case {
    const fn of(heads: usize, head_dim: usize, tokens: usize) -> Self {
        Self {
            batch: 1,
            heads,
            head_dim,
            tokens,
            context: None,
            mask: Mask::Full,
        }
    }

    const fn batch(self, batch: usize) -> Self {
        Self { batch, ..self }
    }

    const fn causal(self) -> Self {
        Self {
            mask: Mask::Causal,
            ..self
        }
    }

    const fn to(self, context: usize) -> Self {
        Self {
            context: Some(context),
            ..self
        }
    }
}

/// Width of the kernel for a head size, queries of a block, and the block.
fn kernel(t: Type, head_dim: usize) -> (usize, usize, usize, usize) {
    let width = match head_dim {
        0..=64 => 64,
        65..=128 => 128,
        _ => 512,
    };
    match (t, width) {
        (Type::F32, _) => (width, 16, 256, 4 * (32 * (width + 4) + 272)),
        (_, 64) => (width, 128, 128, 49_152),
        (_, 128) => (width, 64, 128, 81_920),
        _ => (width, 64, 256, 98_304),
    }
}

fn check(t: Type, case: Case) {
    let Case {
        batch,
        heads,
        head_dim,
        tokens,
        context,
        mask,
    } = case;
    let c = heads * head_dim;
    let tensor = |values: &[f32], rows: usize, width: usize| {
        Tensor::from_slice(values, (batch, rows, width), &Device::Cpu).unwrap()
    };
    // Wide enough that some keys count for much more than others.
    let key_tokens = context.unwrap_or(tokens);
    let (pointers, strides, want) = match context {
        None => {
            let qkv = inputs(t, 1, batch * tokens * 3 * c, 3.0);
            let want = self_attention(&tensor(&qkv, tokens, 3 * c), heads, mask);
            let pointers = [
                Arg::values(t, &qkv),
                Arg::Again(0, c * t.size()),
                Arg::Again(0, 2 * c * t.size()),
            ];
            (pointers, [3 * c, 3 * c], want)
        }
        Some(s) => {
            let q = inputs(t, 1, batch * tokens * c, 3.0);
            let kv = inputs(t, 2, batch * s * 2 * c, 3.0);
            let want = cross_attention(&tensor(&q, tokens, c), &tensor(&kv, s, 2 * c), heads);
            let pointers = [
                Arg::values(t, &q),
                Arg::values(t, &kv),
                Arg::Again(1, c * t.size()),
            ];
            (pointers, [c, 2 * c], want)
        }
    };
    let want: Vec<f32> = want.unwrap().flatten_all().unwrap().to_vec1().unwrap();
    let (width, queries, threads, shared) = kernel(t, head_dim);
    let name = format!("attention_{width}_{}", t.suffix());
    let mut args = pointers.to_vec();
    args.push(Arg::room(batch * tokens * c * t.size()));
    args.extend([tokens, key_tokens, head_dim, strides[0], strides[1], c].map(Arg::Int));
    args.push(Arg::Float(1.0 / (head_dim as f32).sqrt()));
    args.push(Arg::Int(usize::from(mask == Mask::Causal)));
    let grid = Grid::new([tokens.div_ceil(queries), heads, batch], threads, shared);
    let out = launch("attention", &name, grid, &args);
    compare(
        &format!("{name} {batch} x {heads} x {head_dim}, {tokens} to {key_tokens} {mask:?}"),
        t,
        &t.decode(&out[3]),
        &want,
    );
}

#[test]
fn heads_of_up_to_64_attend_as_on_the_cpu() {
    for t in Type::ALL {
        check(t, Case::of(2, 64, 200).batch(2));
        check(t, Case::of(1, 64, 300).to(77));
        check(t, Case::of(2, 64, 77).causal());
        check(t, Case::of(1, 64, 140).causal());
        check(t, Case::of(1, 40, 65).to(154));
        check(t, Case::of(1, 64, 1).batch(3));
        // No vector fits.
        check(t, Case::of(3, 5, 20).causal());
        check(t, Case::of(2, 12, 33).to(7));
    }
}

#[test]
fn a_thousand_tokens_attend_as_on_the_cpu() {
    check(Type::Bf16, Case::of(1, 64, 1000));
    check(Type::F16, Case::of(1, 64, 1000));
}

#[test]
fn heads_of_up_to_128_attend_as_on_the_cpu() {
    for t in Type::ALL {
        check(t, Case::of(1, 128, 70).batch(2));
        check(t, Case::of(2, 80, 77).causal());
        check(t, Case::of(1, 96, 40).to(77));
        check(t, Case::of(1, 67, 10));
    }
}

#[test]
fn heads_of_up_to_512_attend_as_on_the_cpu() {
    for t in Type::ALL {
        check(t, Case::of(1, 512, 70).batch(2));
        check(t, Case::of(1, 160, 33).to(77));
        check(t, Case::of(1, 130, 20).causal());
        check(t, Case::of(1, 512, 1));
    }
}
