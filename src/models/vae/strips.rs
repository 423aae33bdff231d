//! The VAE on pictures too big for memory: the residual blocks at high resolution run strip by strip of whole rows.
//!
//! Unlike tiles with blended overlap, strips change nothing: a convolution gets the rows it needs from beyond the strip's edge, and
//! group norms use the statistics of the whole picture, measured in a pass of their own ([`GroupStatistics`]). Attention and all
//! levels whose blocks fit the budget run in one piece. The price is time: what does not fit is computed again when it is
//! needed, so a block costs up to twice as much, and one behind an upsampling up to two and a half times.
//! Circular padding wraps from the last row to the first.

use std::ops::Range;

use candle_core::{Result, Tensor, bail};

use super::{Conv2d, D, GroupNorm, ResnetBlock, Vae};
use crate::nn::GroupStatistics;

/// Rows of a strip at least: fewer would mostly compute their neighbours' rows.
const LEAST_ROWS: usize = 16;
/// Bytes of a strip's widest tensor at most: 128 MiB, where the cost of two rows more is small.
const STRIP_BYTES: usize = 128 << 20;

/// How much memory a picture may take, and whether it is still wanted.
#[derive(Clone, Copy)]
pub struct Bounds<'a> {
    /// Bytes of activations that one block may hold at a time.
    pub bytes: usize,
    /// Asked between strips; `true` ends the work.
    pub stop: &'a dyn Fn() -> bool,
}

impl std::fmt::Debug for Bounds<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Bounds({} bytes)", self.bytes)
    }
}

impl Bounds<'_> {
    /// Everything in one piece.
    pub const NONE: Self = Self {
        bytes: usize::MAX,
        stop: &|| false,
    };
}

/// Bytes that the largest block of a decoder or encoder in one piece holds at a time, for a picture of `width` x `height` pixels.
///
/// The block at the picture's own size decides; in the decoder its input is twice as wide as its output. Input and its norm
/// with the first convolution's output, later input, norm, shortcut and output.
#[must_use]
pub fn whole_bytes(vae: &Vae, width: usize, height: usize) -> usize {
    let blocks = |levels: &[super::Level]| -> usize {
        let sizes = levels.iter().flat_map(|level| &level.blocks);
        let size = vae.place.dtype.size_in_bytes();
        sizes
            .map(|block| bytes(block, width * height * size))
            .max()
            .unwrap_or(0)
    };
    let last = |levels: &[super::Level], i: usize| {
        levels.get(i).map_or(0, |l| blocks(std::slice::from_ref(l)))
    };
    let decoder = &vae.decoder.levels;
    last(decoder, decoder.len().wrapping_sub(1)).max(last(&vae.encoder.levels, 0))
}

/// Bytes that a block in one piece holds at a time, `unit` bytes per channel.
fn bytes(block: &ResnetBlock, unit: usize) -> usize {
    let (inputs, outputs) = (block.inputs, block.channels);
    let shortcut = if block.shortcut.is_some() { outputs } else { 0 };
    (2 * inputs + outputs)
        .max(inputs + 2 * outputs + shortcut)
        .saturating_mul(unit)
}

impl Vae {
    /// [`Vae::decode`] of one picture within `bounds`; `None` if it was stopped.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn decode_within(&self, latents: &Tensor, bounds: Bounds<'_>) -> Result<Option<Tensor>> {
        let run = Run::new(self, bounds);
        let decoder = &self.decoder;
        let z = self
            .post_quant
            .forward(&latents.to_dtype(self.place.dtype)?)?;
        let h = decoder.mid.forward(&decoder.conv_in.forward(&z)?)?;
        let mut picture = Picture::stored(h)?;
        for level in &decoder.levels {
            for block in &level.blocks {
                let Some(next) = run.block(block, picture)? else {
                    return Ok(None);
                };
                picture = next;
            }
            if let Some(conv) = &level.resample {
                picture = picture.behind(conv, 2);
            }
        }
        run.tail(&decoder.norm_out, &decoder.conv_out, picture)
    }

    /// [`Vae::encode`] of one picture within `bounds`; `None` if it was stopped.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn encode_within(
        &self,
        picture: &Tensor,
        bounds: Bounds<'_>,
    ) -> Result<Option<(Tensor, Tensor)>> {
        let run = Run::new(self, bounds);
        let encoder = &self.encoder;
        let picture = picture.to_dtype(self.place.dtype)?;
        let mut h = Picture::stored(picture)?.behind(&encoder.conv_in, 1);
        for level in &encoder.levels {
            for block in &level.blocks {
                let Some(next) = run.block(block, h)? else {
                    return Ok(None);
                };
                h = next;
            }
            if let Some(conv) = &level.resample {
                h = Picture::stored(conv.forward(&h.whole()?)?)?;
            }
        }
        let h = encoder.mid.forward(&h.whole()?)?;
        let h = encoder.conv_out.forward(&encoder.norm_out.forward(&h)?)?;
        let halves = self.quant.forward(&h)?.chunk(2, D::Minus1)?;
        Ok(Some((
            halves[0].contiguous()?,
            halves[1].contiguous()?.clamp(-30f32, 20f32)?,
        )))
    }
}

/// A picture in memory, or what a convolution will make of it row by row.
struct Picture<'a> {
    stored: Tensor,
    /// The convolution, and how many times larger it makes the picture.
    conv: Option<(&'a Conv2d, usize)>,
    height: usize,
    width: usize,
}

impl<'a> Picture<'a> {
    fn stored(stored: Tensor) -> Result<Self> {
        let (batch, height, width, _) = stored.dims4()?;
        if batch != 1 {
            bail!("strips are of one picture, not of {batch}");
        }
        Ok(Self {
            stored,
            conv: None,
            height,
            width,
        })
    }

    /// The same behind a convolution that enlarges by `scale`. The picture is in memory.
    fn behind(self, conv: &'a Conv2d, scale: usize) -> Self {
        Self {
            conv: Some((conv, scale)),
            height: self.height * scale,
            width: self.width * scale,
            ..self
        }
    }

    fn whole(self) -> Result<Tensor> {
        match self.conv {
            Some((conv, _)) => conv.forward(&self.stored),
            None => Ok(self.stored),
        }
    }
}

/// Rows of a picture; in circular ones also rows before the first and after the last.
type Rows = Range<isize>;

struct Run<'a> {
    bounds: Bounds<'a>,
    circular: bool,
    /// Bytes of a value.
    size: usize,
}

impl<'a> Run<'a> {
    fn new(vae: &Vae, bounds: Bounds<'a>) -> Self {
        let circular = &vae.place.circular;
        Self {
            bounds,
            circular: circular.load(std::sync::atomic::Ordering::Relaxed),
            size: vae.place.dtype.size_in_bytes(),
        }
    }

    /// A block's output; `None` if it was stopped.
    fn block<'p>(&self, block: &ResnetBlock, x: Picture<'_>) -> Result<Option<Picture<'p>>> {
        let (height, width) = (x.height, x.width);
        let unit = height * width * self.size;
        if bytes(block, unit) <= self.bounds.bytes {
            return Ok(Some(Picture::stored(block.forward(&x.whole()?)?)?));
        }
        let rows = self.step(width, block.inputs.max(block.channels));
        let mut seen = GroupStatistics::default();
        for at in strips(height, rows) {
            if (self.bounds.stop)() {
                return Ok(None);
            }
            seen.add(&self.rows(&x, at)?)?;
        }
        let norm1 = block.norm1.measured(&seen)?;
        let hidden = |at: Rows| {
            self.convolve(&block.conv1, 1, height, at, |at| {
                norm1.forward(&self.rows(&x, at)?)
            })
        };
        // Kept if there is room beside input and output.
        let room = x.stored.elem_count() * self.size + 2 * block.channels * unit;
        let kept = (room <= self.bounds.bytes)
            .then(|| Canvas::new(&x.stored, [height, width, block.channels]))
            .transpose()?;
        let mut seen = GroupStatistics::default();
        for at in strips(height, rows) {
            if (self.bounds.stop)() {
                return Ok(None);
            }
            let strip = hidden(at.clone())?;
            seen.add(&strip)?;
            if let Some(kept) = &kept {
                kept.set(&strip, &at)?;
            }
        }
        let norm2 = block.norm2.measured(&seen)?;
        let out = Canvas::new(&x.stored, [height, width, block.channels])?;
        for at in strips(height, rows) {
            if (self.bounds.stop)() {
                return Ok(None);
            }
            let y = self.convolve(&block.conv2, 1, height, at.clone(), |at| {
                norm2.forward(&match &kept {
                    Some(kept) => wrapped(&kept.0, at)?,
                    None => hidden(at)?,
                })
            })?;
            let x = self.rows(&x, at.clone())?;
            let y = match &block.shortcut {
                Some(shortcut) => (y + shortcut.forward(&x)?)?,
                None => (y + x)?,
            };
            out.set(&y, &at)?;
        }
        Ok(Some(Picture::stored(out.0)?))
    }

    /// The last norm and convolution.
    fn tail(&self, norm: &GroupNorm, conv: &Conv2d, x: Picture<'_>) -> Result<Option<Tensor>> {
        let (height, width) = (x.height, x.width);
        let channels = x.stored.dim(D::Minus1)?;
        if 2 * channels * height * width * self.size <= self.bounds.bytes {
            return conv.forward(&norm.forward(&x.whole()?)?).map(Some);
        }
        let rows = self.step(width, channels);
        let mut seen = GroupStatistics::default();
        for at in strips(height, rows) {
            seen.add(&self.rows(&x, at)?)?;
        }
        let norm = norm.measured(&seen)?;
        let mut parts = Vec::new();
        for at in strips(height, rows) {
            if (self.bounds.stop)() {
                return Ok(None);
            }
            parts.push(self.convolve(conv, 1, height, at, |at| norm.forward(&self.rows(&x, at)?))?);
        }
        Tensor::cat(&parts, 1).map(Some)
    }

    fn step(&self, width: usize, channels: usize) -> usize {
        let strip = STRIP_BYTES.min(self.bounds.bytes / 32);
        (strip / (width * channels * self.size).max(1)).max(LEAST_ROWS)
    }

    fn rows(&self, x: &Picture<'_>, at: Rows) -> Result<Tensor> {
        match x.conv {
            None => wrapped(&x.stored, at),
            Some((conv, scale)) => {
                self.convolve(conv, scale, x.height, at, |at| wrapped(&x.stored, at))
            }
        }
    }

    /// Rows of a convolution's output, of `height` rows in all, from the rows of its input that they need.
    fn convolve(
        &self,
        conv: &Conv2d,
        scale: usize,
        height: usize,
        at: Rows,
        input: impl Fn(Rows) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let n = scale as isize;
        let (mut from, mut to) = ((at.start - 1).div_euclid(n), (at.end + n).div_euclid(n));
        if !self.circular {
            (from, to) = (from.max(0), to.min((height / scale) as isize));
        }
        // The convolution pads the strip's own edges, which spoils the rows there: only true edges are kept.
        let y = conv.forward(&input(from..to)?)?;
        let skip = (at.start - n * from) as usize;
        y.narrow(1, skip, at.len())?.contiguous()
    }
}

/// Rows of a picture in memory. Rows outside it are those of the other end.
fn wrapped(x: &Tensor, at: Rows) -> Result<Tensor> {
    let height = x.dim(1)? as isize;
    let mut parts = Vec::new();
    let mut row = at.start;
    while row < at.end {
        let from = row.rem_euclid(height);
        let len = (height - from).min(at.end - row);
        parts.push(x.narrow(1, from as usize, len as usize)?);
        row += len;
    }
    match parts.as_slice() {
        [one] => one.contiguous(),
        several => Tensor::cat(several, 1)?.contiguous(),
    }
}

/// Ranges of `rows` rows that cover a picture.
fn strips(height: usize, rows: usize) -> impl Iterator<Item = Rows> {
    (0..height)
        .step_by(rows)
        .map(move |from| from as isize..(from + rows).min(height) as isize)
}

/// A picture that is written strip by strip.
struct Canvas(Tensor);

impl Canvas {
    fn new(like: &Tensor, [height, width, channels]: [usize; 3]) -> Result<Self> {
        Tensor::zeros((1, height, width, channels), like.dtype(), like.device()).map(Self)
    }

    fn set(&self, strip: &Tensor, at: &Rows) -> Result<()> {
        self.0.slice_set(strip, 1, at.start as usize)
    }
}
