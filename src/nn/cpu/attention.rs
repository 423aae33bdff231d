//! Scaled dot-product attention in tiles with an online softmax (Dao et al. 2022, algorithm 1; Milakov and
//! Gimelshein 2018 for the running maximum): the scores of a tile never leave the cache.
//!
//! Heads are read in place from `[batch, tokens, stride]`; keys and values are packed once per call into the GEMM
//! micro-kernel's panel form, so both products of a tile are calls of it.
#![allow(
    unsafe_code,
    reason = "micro-kernel on raw pointers; bounds are asserted on entry"
)]

use super::gemm::{NV, micro};
use super::math::exp;
use super::simd::Simd;
use super::{Isa, Kernel, Shared, count_multiply_adds, for_each_task};

/// Keys of one tile of scores.
const KEYS: usize = 256;
/// Query rows of one task.
const QUERIES_PER_TASK: usize = 96;

/// One of query, key, value: head `h` of token `t` of batch entry `b` starts at `(b * tokens + t) * stride + offset + h * head_dim`.
#[derive(Clone, Copy)]
pub(crate) struct Heads<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) tokens: usize,
    pub(crate) stride: usize,
    pub(crate) offset: usize,
}

impl<'a> Heads<'a> {
    /// The row of one token and head, going on to the end of the data.
    fn at(&self, batch: usize, token: usize, head_offset: usize) -> &'a [f32] {
        &self.data[(batch * self.tokens + token) * self.stride + self.offset + head_offset..]
    }
}

/// What all heads share.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) batch: usize,
    pub(crate) heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) causal: bool,
}

/// `out[b, t, h] = softmax(q kᵀ / sqrt(head_dim)) v`, `out` being `[batch, tokens, heads * head_dim]`.
pub(crate) fn attention(
    isa: Isa,
    q: Heads<'_>,
    k: Heads<'_>,
    v: Heads<'_>,
    shape: Shape,
    out: &mut [f32],
) {
    let Shape {
        batch,
        heads,
        head_dim: d,
        ..
    } = shape;
    for (name, x) in [("q", q), ("k", k), ("v", v)] {
        assert!(
            x.data.len() == batch * x.tokens * x.stride,
            "attention: {name} size"
        );
        assert!(x.offset + heads * d <= x.stride, "attention: {name} stride");
    }
    assert_eq!(k.tokens, v.tokens, "attention: keys and values");
    assert_eq!(
        out.len(),
        batch * q.tokens * heads * d,
        "attention: output size"
    );
    count_multiply_adds(batch * heads * q.tokens * k.tokens * d * 2);
    let (packed, key_len, value_len) = pack(k, v, shape, NV * isa.lanes());

    let chunks = q.tokens.div_ceil(QUERIES_PER_TASK);
    let out = Shared::new(out);
    for_each_task(
        batch * heads * chunks,
        batch * heads * q.tokens * k.tokens * d * 2,
        |t| {
            let (head, chunk) = (t / chunks, t % chunks);
            let (keys, values) =
                packed[head * (key_len + value_len)..][..key_len + value_len].split_at(key_len);
            let from = chunk * QUERIES_PER_TASK;
            isa.run(Task {
                q,
                keys,
                values,
                key_tokens: k.tokens,
                shape,
                batch: head / heads,
                head: head % heads,
                from,
                to: (from + QUERIES_PER_TASK).min(q.tokens),
                out,
            });
        },
    );
}

/// Keys and values of each head in panels of `nr` columns, and the lengths of a head's keys and values.
fn pack(k: Heads<'_>, v: Heads<'_>, shape: Shape, nr: usize) -> (Vec<f32>, usize, usize) {
    let (heads, d) = (shape.heads, shape.head_dim);
    let tasks = shape.batch * heads;
    let key_len = k.tokens.next_multiple_of(nr) * d;
    let value_panels = d.div_ceil(nr);
    let value_len = value_panels * v.tokens * nr;
    let mut packed = vec![0f32; tasks * (key_len + value_len)];
    let shared = Shared::new(&mut packed);
    for_each_task(tasks, tasks * (key_len + value_len), |t| {
        // SAFETY: one part per task.
        let part = unsafe { shared.part(t * (key_len + value_len), key_len + value_len) };
        let (keys, values) = part.split_at_mut(key_len);
        let head = t % heads * d;
        for token in 0..k.tokens {
            let key = k.at(t / heads, token, head);
            for i in 0..d {
                keys[(token / nr * d + i) * nr + token % nr] = key[i];
            }
            let value = v.at(t / heads, token, head);
            for panel in 0..value_panels {
                let width = nr.min(d - panel * nr);
                values[(panel * v.tokens + token) * nr..][..width]
                    .copy_from_slice(&value[panel * nr..][..width]);
            }
        }
    });
    (packed, key_len, value_len)
}

struct Task<'a> {
    q: Heads<'a>,
    keys: &'a [f32],
    values: &'a [f32],
    key_tokens: usize,
    shape: Shape,
    batch: usize,
    head: usize,
    from: usize,
    to: usize,
    out: Shared<f32>,
}

/// Buffers of one tile of `MR` query rows.
struct Tile<const MR: usize> {
    scores: Vec<f32>,
    /// `[value panels][MR][NR]`.
    sums: Vec<f32>,
    maxima: [f32; MR],
    totals: [f32; MR],
}

impl Kernel for Task<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self) {
        // SAFETY: sizes were asserted by `attention`, the instruction set by `Isa::run`; tasks write disjoint rows.
        unsafe {
            match S::MR {
                8 => self.tiles::<S, 8>(),
                6 => self.tiles::<S, 6>(),
                _ => self.tiles::<S, 4>(),
            }
        }
    }
}

impl Task<'_> {
    #[inline(always)]
    unsafe fn tiles<S: Simd, const MR: usize>(&self) {
        let nr = NV * S::LANES;
        let d = self.shape.head_dim;
        let mut tile = Tile::<MR> {
            scores: vec![0.0; MR * KEYS],
            sums: vec![0.0; d.div_ceil(nr) * MR * nr],
            maxima: [0.0; MR],
            totals: [0.0; MR],
        };
        for first in (self.from..self.to).step_by(MR) {
            let valid = MR.min(self.to - first);
            let rows: [*const f32; MR] = std::array::from_fn(|i| {
                self.q
                    .at(
                        self.batch,
                        first + if i < valid { i } else { 0 },
                        self.head * d,
                    )
                    .as_ptr()
            });
            tile.sums.fill(0.0);
            tile.maxima = [f32::NEG_INFINITY; MR];
            tile.totals = [0.0; MR];
            let visible = if self.shape.causal {
                (first + valid).min(self.key_tokens)
            } else {
                self.key_tokens
            };
            for begin in (0..visible).step_by(KEYS) {
                let count = KEYS.min(visible - begin);
                // SAFETY: see `run`.
                unsafe {
                    self.scores::<S, MR>(&rows, begin, count, &mut tile);
                    self.weigh::<S, MR>(first, begin, count, &mut tile);
                    self.accumulate::<S, MR>(begin, count, &mut tile);
                }
            }
            for i in 0..valid {
                let row =
                    ((self.batch * self.q.tokens + first + i) * self.shape.heads + self.head) * d;
                // SAFETY: rows of this task only.
                let out = unsafe { self.out.part(row, d) };
                let inverse = 1.0 / tile.totals[i];
                for (c, out) in out.iter_mut().enumerate() {
                    *out = tile.sums[(c / nr * MR + i) * nr + c % nr] * inverse;
                }
            }
        }
    }

    /// `scores = q kᵀ` for keys `begin..begin + count`, columns past `count` undefined.
    #[inline(always)]
    unsafe fn scores<S: Simd, const MR: usize>(
        &self,
        rows: &[*const f32; MR],
        begin: usize,
        count: usize,
        tile: &mut Tile<MR>,
    ) {
        let nr = NV * S::LANES;
        let d = self.shape.head_dim;
        for at in (0..count).step_by(nr) {
            // SAFETY: key panels are whole; a row of scores holds KEYS, a multiple of NR.
            unsafe {
                let mut acc = [[S::splat(0.0); NV]; MR];
                micro::<S, MR>(rows, self.keys.as_ptr().add((begin + at) * d), d, &mut acc);
                for (i, row) in acc.iter().enumerate() {
                    let p = tile.scores.as_mut_ptr().add(i * KEYS + at);
                    S::store(p, row[0]);
                    S::store(p.add(S::LANES), row[1]);
                }
            }
        }
    }

    /// Turns scores into weights `exp(s - max)`, rescaling what was summed before.
    #[inline(always)]
    unsafe fn weigh<S: Simd, const MR: usize>(
        &self,
        first: usize,
        begin: usize,
        count: usize,
        tile: &mut Tile<MR>,
    ) {
        let scale = 1.0 / (self.shape.head_dim as f32).sqrt();
        let nr = NV * S::LANES;
        let padded = count.next_multiple_of(S::LANES);
        for i in 0..MR {
            let row = &mut tile.scores[i * KEYS..][..padded];
            let seen = if self.shape.causal {
                (first + i + 1).saturating_sub(begin).min(count)
            } else {
                count
            };
            row[seen..].fill(f32::NEG_INFINITY);
            // SAFETY: `padded` is a multiple of LANES.
            unsafe {
                let mut maximum = S::splat(f32::NEG_INFINITY);
                for at in (0..padded).step_by(S::LANES) {
                    maximum = S::max(maximum, S::load(row.as_ptr().add(at)));
                }
                let maximum = tile.maxima[i].max(S::maximum(maximum) * scale);
                if maximum == f32::NEG_INFINITY {
                    row.fill(0.0);
                    continue;
                }
                let mut total = S::splat(0.0);
                for at in (0..padded).step_by(S::LANES) {
                    let p = row.as_mut_ptr().add(at);
                    let weight = exp::<S>(S::fma(S::load(p), S::splat(scale), S::splat(-maximum)));
                    S::store(p, weight);
                    total = S::add(total, weight);
                }
                // `exp` saturates above 0: hidden keys must weigh exactly nothing.
                let mut hidden = 0.0;
                for weight in &mut row[seen..] {
                    hidden += *weight;
                    *weight = 0.0;
                }
                let fade = if tile.maxima[i] == f32::NEG_INFINITY {
                    0.0
                } else {
                    (tile.maxima[i] - maximum).exp()
                };
                tile.totals[i] = tile.totals[i] * fade + (S::sum(total) - hidden);
                tile.maxima[i] = maximum;
                if fade.to_bits() != 1f32.to_bits() {
                    for panel in tile.sums.chunks_exact_mut(MR * nr) {
                        panel[i * nr..][..nr].iter_mut().for_each(|x| *x *= fade);
                    }
                }
            }
        }
    }

    /// `sums += weights · v`.
    #[inline(always)]
    unsafe fn accumulate<S: Simd, const MR: usize>(
        &self,
        begin: usize,
        count: usize,
        tile: &mut Tile<MR>,
    ) {
        let nr = NV * S::LANES;
        let rows: [*const f32; MR] = std::array::from_fn(|i| tile.scores[i * KEYS..].as_ptr());
        for (panel, sums) in tile.sums.chunks_exact_mut(MR * nr).enumerate() {
            // SAFETY: a value panel holds `key_tokens` rows of NR; `sums` holds MR rows of NR.
            unsafe {
                let p = sums.as_mut_ptr();
                let mut acc: [[S::V; NV]; MR] = std::array::from_fn(|i| {
                    [S::load(p.add(i * nr)), S::load(p.add(i * nr + S::LANES))]
                });
                micro::<S, MR>(
                    &rows,
                    self.values
                        .as_ptr()
                        .add((panel * self.key_tokens + begin) * nr),
                    count,
                    &mut acc,
                );
                for (i, row) in acc.iter().enumerate() {
                    S::store(p.add(i * nr), row[0]);
                    S::store(p.add(i * nr + S::LANES), row[1]);
                }
            }
        }
    }
}
