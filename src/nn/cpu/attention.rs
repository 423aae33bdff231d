//! Scaled dot-product attention in tiles with an online softmax (Dao et al. 2022, algorithm 1; Milakov and
//! Gimelshein 2018 for the running maximum): the scores of a tile never leave the cache.
//!
//! Heads are read in place from `[batch, tokens, stride]`; keys and values are packed once per call into the GEMM
//! micro-kernel's panel form, so both products of a tile are calls of it. A task holds the running sums of its queries and walks
//! the keys block by block, so that a block's keys and values stay in the L2 cache for all its queries. Scores, maxima and sums are
//! `f32`; weights are rounded to the type of the values they multiply.
#![allow(
    unsafe_code,
    reason = "micro-kernel on raw pointers; bounds are asserted on entry"
)]

use super::element::Element;
use super::gemm::{NV, micro};
use super::math::exp2_of_negative;
use super::scratch::with_scratch;
use super::simd::Simd;
use super::{Isa, Kernel, Shared, count_multiply_adds, for_each_task};

/// Values of a block of keys, so that it and the block of values take 256 KiB in `f32`.
const BLOCK: usize = 256 * 128;
/// Query rows of one task; a multiple of every MR.
const QUERIES_PER_TASK: usize = 96;

/// One of query, key, value: head `h` of token `t` of batch entry `b` starts at `(b * tokens + t) * stride + offset + h * head_dim`.
#[derive(Clone, Copy)]
pub(crate) struct Heads<'a, E> {
    pub(crate) data: &'a [E],
    pub(crate) tokens: usize,
    pub(crate) stride: usize,
    pub(crate) offset: usize,
}

impl<'a, E> Heads<'a, E> {
    /// The row of one token and head, going on to the end of the data.
    fn at(&self, batch: usize, token: usize, head_offset: usize) -> &'a [E] {
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
pub(crate) fn attention<E: Element>(
    isa: Isa,
    q: Heads<'_, E>,
    k: Heads<'_, E>,
    v: Heads<'_, E>,
    shape: Shape,
    out: &mut [E],
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
    let work = batch * heads * q.tokens * k.tokens * d * 2;
    count_multiply_adds(work);
    let packed = Packed::new(k, v, shape, NV * isa.lanes());
    let chunks = q.tokens.div_ceil(QUERIES_PER_TASK);
    let out = Shared::new(out);
    for_each_task(batch * heads * chunks, work / E::GROUP, |t| {
        let (head, chunk) = (t / chunks, t % chunks);
        let from = chunk * QUERIES_PER_TASK;
        let task = Task {
            q,
            packed: &packed,
            shape,
            head,
            from,
            to: (from + QUERIES_PER_TASK).min(q.tokens),
            block: (BLOCK / d.max(1)).clamp(64, 256) / packed.nr * packed.nr,
            out,
        };
        with_scratch(task.room(), |memory| isa.run(Run { task, memory }));
    });
}

/// Keys and values of all heads in panels of `nr` columns; factors in groups, filled up with zeros.
struct Packed<E> {
    data: Vec<E>,
    nr: usize,
    /// Keys of a head: `[key panels][head_dim / GROUP][NR][GROUP]`.
    key_len: usize,
    /// Values of a head: `[panels of head_dim][tokens / GROUP][NR][GROUP]`.
    value_len: usize,
    tokens: usize,
    /// Tokens and channels of a head, in whole groups.
    padded: [usize; 2],
}

impl<E: Element> Packed<E> {
    fn new(k: Heads<'_, E>, v: Heads<'_, E>, shape: Shape, nr: usize) -> Self {
        let (heads, d) = (shape.heads, shape.head_dim);
        let tasks = shape.batch * heads;
        let padded = [
            k.tokens.next_multiple_of(E::GROUP),
            d.next_multiple_of(E::GROUP),
        ];
        let key_len = k.tokens.next_multiple_of(nr) * padded[1];
        let value_len = d.div_ceil(nr) * padded[0] * nr;
        let mut data = vec![E::default(); tasks * (key_len + value_len)];
        let shared = Shared::new(&mut data);
        for_each_task(tasks, tasks * (key_len + value_len), |t| {
            // SAFETY: one part per task.
            let part = unsafe { shared.part(t * (key_len + value_len), key_len + value_len) };
            let (keys, values) = part.split_at_mut(key_len);
            let group =
                |i: usize, lane: usize| (i / E::GROUP * nr + lane) * E::GROUP + i % E::GROUP;
            for token in 0..k.tokens {
                let key = k.at(t / heads, token, t % heads * d);
                let panel = &mut keys[token / nr * padded[1] * nr..];
                for (i, key) in key.iter().enumerate().take(d) {
                    panel[group(i, token % nr)] = *key;
                }
                let value = v.at(t / heads, token, t % heads * d);
                for (p, value) in value[..d].chunks(nr).enumerate() {
                    let panel = &mut values[p * padded[0] * nr..];
                    for (lane, value) in value.iter().enumerate() {
                        panel[group(token, lane)] = *value;
                    }
                }
            }
        });
        Self {
            data,
            nr,
            key_len,
            value_len,
            tokens: k.tokens,
            padded,
        }
    }

    fn head(&self, head: usize) -> (&[E], &[E]) {
        let len = self.key_len + self.value_len;
        self.data[head * len..][..len].split_at(self.key_len)
    }
}

struct Task<'a, E> {
    q: Heads<'a, E>,
    packed: &'a Packed<E>,
    shape: Shape,
    /// Counted over the batch.
    head: usize,
    from: usize,
    to: usize,
    /// Keys of one tile of scores.
    block: usize,
    out: Shared<E>,
}

/// A task and the memory it works in.
struct Run<'a, E> {
    task: Task<'a, E>,
    memory: &'a mut [f32],
}

/// The memory of a task, cut up.
struct Buffers<'a> {
    /// Queries `[rows][head_dim]` as the type of the keys.
    queries: &'a mut [f32],
    /// `[MR][block]`; a row of scores becomes a row of weights in place, as the type of the values.
    scores: &'a mut [f32],
    /// `[tiles][value panels][MR][NR]`.
    sums: &'a mut [f32],
    /// Of the scores by row, times `log2(e) / sqrt(head_dim)`.
    maxima: &'a mut [f32],
    totals: &'a mut [f32],
}

/// Most rows of a tile, whatever the instruction set.
const MOST_ROWS: usize = 12;

impl<E: Element> Task<'_, E> {
    fn sums_per_row(&self) -> usize {
        self.shape.head_dim.next_multiple_of(self.packed.nr)
    }

    /// Values of working memory.
    fn room(&self) -> usize {
        let per_row = self.packed.padded[1] / E::GROUP + self.sums_per_row() + 2;
        MOST_ROWS * self.block + QUERIES_PER_TASK * per_row
    }

    fn cut<'m>(&self, memory: &'m mut [f32]) -> Buffers<'m> {
        let (scores, rest) = memory.split_at_mut(MOST_ROWS * self.block);
        let (sums, rest) = rest.split_at_mut(QUERIES_PER_TASK * self.sums_per_row());
        let (maxima, rest) = rest.split_at_mut(QUERIES_PER_TASK);
        let (totals, queries) = rest.split_at_mut(QUERIES_PER_TASK);
        Buffers {
            queries,
            scores,
            sums,
            maxima,
            totals,
        }
    }
}

impl<E: Element> Kernel for Run<'_, E> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self) {
        let mut buffers = self.task.cut(self.memory);
        // SAFETY: sizes were asserted by `attention`, the instruction set by `Isa::run`; tasks write disjoint rows.
        unsafe {
            match S::MR {
                12 => self.task.tiles::<S, 12>(&mut buffers),
                8 => self.task.tiles::<S, 8>(&mut buffers),
                6 => self.task.tiles::<S, 6>(&mut buffers),
                _ => self.task.tiles::<S, 4>(&mut buffers),
            }
        }
    }
}

impl<E: Element> Task<'_, E> {
    #[inline(always)]
    unsafe fn tiles<S: Simd, const MR: usize>(&self, m: &mut Buffers<'_>) {
        let (d, width) = (self.shape.head_dim, self.packed.padded[1]);
        let head_offset = self.head % self.shape.heads * d;
        let queries = m.queries.as_mut_ptr().cast::<E>();
        for (i, token) in (self.from..self.to).enumerate() {
            let row = self.q.at(self.head / self.shape.heads, token, head_offset);
            // SAFETY: `queries` holds QUERIES_PER_TASK rows of `width >= d` values of type E; an f32 is aligned for any.
            unsafe {
                std::ptr::copy_nonoverlapping(row.as_ptr(), queries.add(i * width), d);
                queries.add(i * width + d).write_bytes(0, width - d);
            }
        }
        m.sums.fill(0.0);
        m.maxima.fill(f32::NEG_INFINITY);
        m.totals.fill(0.0);
        let visible = if self.shape.causal {
            self.to.min(self.packed.tokens)
        } else {
            self.packed.tokens
        };
        for begin in (0..visible).step_by(self.block) {
            for first in (self.from..self.to).step_by(MR) {
                let seen = if self.shape.causal {
                    visible.min(first + MR)
                } else {
                    visible
                };
                if begin < seen {
                    let count = self.block.min(seen - begin);
                    // SAFETY: see `run`.
                    unsafe {
                        self.scores::<S, MR>(first, begin, count, m);
                        self.weigh::<S, MR>(first, begin, count, m);
                        self.accumulate::<S, MR>(first, begin, count, m);
                    }
                }
            }
        }
        // SAFETY: see `run`.
        unsafe { self.store::<S, MR>(m) };
    }

    /// `scores = q kᵀ` for keys `begin..begin + count`, columns past `count` undefined.
    #[inline(always)]
    unsafe fn scores<S: Simd, const MR: usize>(
        &self,
        first: usize,
        begin: usize,
        count: usize,
        m: &mut Buffers<'_>,
    ) {
        let nr = NV * S::LANES;
        let width = self.packed.padded[1];
        let (keys, _) = self.packed.head(self.head);
        let valid = MR.min(self.to - first);
        let queries = m.queries.as_ptr().cast::<E>();
        let rows: [*const E; MR] = std::array::from_fn(|i| {
            queries.wrapping_add((first - self.from + if i < valid { i } else { 0 }) * width)
        });
        for at in (0..count).step_by(nr) {
            // SAFETY: key panels are whole; a row of scores holds `block`, a multiple of NR.
            unsafe {
                let mut acc = [[S::splat(0.0); NV]; MR];
                let panel = keys.as_ptr().add((begin + at) * width);
                micro::<S, E, MR>(&rows, panel, width / E::GROUP, &mut acc);
                for (i, row) in acc.iter().enumerate() {
                    let p = m.scores.as_mut_ptr().add(i * self.block + at);
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
        m: &mut Buffers<'_>,
    ) {
        // Powers of two are cheaper than those of e.
        let scale = std::f32::consts::LOG2_E / (self.shape.head_dim as f32).sqrt();
        let padded = count.next_multiple_of(S::LANES);
        let of_task = first - self.from;
        let per_tile = MR * self.sums_per_row();
        let sums = &mut m.sums[of_task / MR * per_tile..][..per_tile];
        for i in 0..MR.min(self.to - first) {
            let row = &mut m.scores[i * self.block..][..padded];
            let seen = if self.shape.causal {
                (first + i + 1).saturating_sub(begin).min(count)
            } else {
                count
            };
            row[seen..].fill(f32::NEG_INFINITY);
            let before = m.maxima[of_task + i];
            // SAFETY: `padded` is a multiple of LANES. A weight is no wider than a score, so that writing weights from the
            // row's beginning never overtakes the reading of scores.
            unsafe {
                let mut maximum = S::splat(f32::NEG_INFINITY);
                for at in (0..padded).step_by(S::LANES) {
                    maximum = S::max(maximum, S::load(row.as_ptr().add(at)));
                }
                let maximum = before.max(S::maximum(maximum) * scale);
                if maximum == f32::NEG_INFINITY {
                    row.fill(0.0);
                    continue;
                }
                let weights = row.as_mut_ptr().cast::<E>();
                let (factor, shift) = (S::splat(scale), S::splat(-maximum));
                let mut total = S::splat(0.0);
                for at in (0..padded).step_by(S::LANES) {
                    let score = S::fma(S::load(row.as_ptr().add(at)), factor, shift);
                    let weight = exp2_of_negative::<S, E>(score);
                    E::store::<S>(weights.add(at), weight);
                    total = S::add(total, weight);
                }
                // What is hidden got the least power there is; it must weigh exactly nothing.
                for at in seen..padded {
                    *weights.add(at) = E::default();
                }
                let mut faded = m.totals[of_task + i];
                if maximum > before {
                    let fade = (before - maximum).exp2();
                    faded *= fade;
                    scale_row::<S, MR>(sums, i, fade);
                }
                m.totals[of_task + i] = faded + S::sum(total);
                m.maxima[of_task + i] = maximum;
            }
        }
    }

    /// `sums += weights · v`.
    #[inline(always)]
    unsafe fn accumulate<S: Simd, const MR: usize>(
        &self,
        first: usize,
        begin: usize,
        count: usize,
        m: &mut Buffers<'_>,
    ) {
        let nr = NV * S::LANES;
        let tokens = self.packed.padded[0];
        let (_, values) = self.packed.head(self.head);
        let valid = MR.min(self.to - first);
        let scores = m.scores.as_ptr();
        // Rows past the end were not weighed: they repeat the first.
        let rows: [*const E; MR] = std::array::from_fn(|i| {
            let row = if i < valid { i } else { 0 };
            scores.wrapping_add(row * self.block).cast::<E>()
        });
        let per_tile = MR * self.sums_per_row();
        let sums = &mut m.sums[(first - self.from) / MR * per_tile..][..per_tile];
        for (panel, sums) in sums.chunks_exact_mut(MR * nr).enumerate() {
            // SAFETY: a value panel holds `tokens` rows of NR, the last one of an odd number being zeros; `sums` holds MR
            // rows of NR.
            unsafe {
                let p = sums.as_mut_ptr();
                let mut acc: [[S::V; NV]; MR] = std::array::from_fn(|i| {
                    [S::load(p.add(i * nr)), S::load(p.add(i * nr + S::LANES))]
                });
                let values = values.as_ptr().add((panel * tokens + begin) * nr);
                micro::<S, E, MR>(&rows, values, count.div_ceil(E::GROUP), &mut acc);
                for (i, row) in acc.iter().enumerate() {
                    S::store(p.add(i * nr), row[0]);
                    S::store(p.add(i * nr + S::LANES), row[1]);
                }
            }
        }
    }

    /// Divides by the totals.
    #[inline(always)]
    unsafe fn store<S: Simd, const MR: usize>(&self, m: &Buffers<'_>) {
        let nr = NV * S::LANES;
        let Shape {
            heads, head_dim: d, ..
        } = self.shape;
        let per_tile = MR * self.sums_per_row();
        for token in self.from..self.to {
            let of_task = token - self.from;
            let sums = &m.sums[of_task / MR * per_tile..];
            let row = ((self.head / heads * self.q.tokens + token) * heads + self.head % heads) * d;
            // SAFETY: rows of this task only, of `d` values each.
            unsafe {
                let out = self.out.part(row, d);
                let inverse = S::splat(1.0 / m.totals[of_task]);
                for at in (0..d).step_by(S::LANES) {
                    let lies = (at / nr * MR + of_task % MR) * nr + at % nr;
                    let v = S::mul(S::load(sums.as_ptr().add(lies)), inverse);
                    E::store_up_to::<S>(out.as_mut_ptr().add(at), v, S::LANES.min(d - at));
                }
            }
        }
    }
}

/// Multiplies row `i` of all panels of a tile's sums.
#[inline(always)]
unsafe fn scale_row<S: Simd, const MR: usize>(sums: &mut [f32], i: usize, factor: f32) {
    let nr = NV * S::LANES;
    for panel in sums.chunks_exact_mut(MR * nr) {
        for at in (i * nr..(i + 1) * nr).step_by(S::LANES) {
            // SAFETY: `i < MR`, so the vector lies in the panel; the instruction set is the caller's promise.
            unsafe {
                let p = panel.as_mut_ptr().add(at);
                S::store(p, S::mul(S::load(p), S::splat(factor)));
            }
        }
    }
}
