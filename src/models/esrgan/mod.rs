//! Upscalers of pictures: `RRDBNet` (ESRGAN, Wang et al. 2018; BSRGAN; Real-ESRGAN, Wang et al. 2021) and its small cousin
//! `SRVGGNetCompact`.
//!
//! Pictures are `[1, height, width, 3]` in [0, 1], in the channel order of the weights' training (A1111 feeds BGR). Block count,
//! widths, growth and scale come from keys and shapes. A network with a pixel-unshuffle in front takes any size: the picture is
//! continued by reflection to a multiple and the result cut, as spandrel does it.

mod compact;
mod names;
mod rrdb;

use candle_core::{Result, Tensor};

use crate::nn::Placement;
use crate::weights::{Error, Source};
use compact::Compact;
use names::Names;
use rrdb::Rrdb;

/// Prefixes under which trainers store the network, besides none.
const PREFIXES: [&str; 5] = ["", "params_ema.", "params.", "module.", "netG."];

/// Channels of a picture.
const RGB: usize = 3;

/// A loaded upscaler.
#[derive(Debug)]
pub struct Esrgan {
    network: Network,
    /// How many times larger the network's own output is than its input.
    enlarges: usize,
    /// Side of the square of pixels that becomes one with as many times the channels, before the network.
    unshuffle: usize,
    place: Placement,
}

#[derive(Debug)]
enum Network {
    Rrdb(Box<Rrdb>),
    Compact(Box<Compact>),
}

impl Esrgan {
    /// Recognises and loads a network.
    ///
    /// # Errors
    /// [`Error::Upscaler`] for another one, and what a tensor that is missing or does not fit gives.
    pub fn new(source: &dyn Source, place: &Placement) -> std::result::Result<Self, Error> {
        for prefix in PREFIXES {
            if source
                .shape(&format!("{prefix}body.1.weight"))
                .map(<[usize]>::len)
                == Some(1)
            {
                let (network, enlarges) = Compact::new(source, prefix, place)?;
                return Ok(Self {
                    network: Network::Compact(Box::new(network)),
                    enlarges,
                    unshuffle: 1,
                    place: place.clone(),
                });
            }
            if let Some(names) = Names::recognise(source, prefix) {
                let (network, inputs) = Rrdb::new(source, &names, place)?;
                let unshuffle = match inputs {
                    RGB => 1,
                    12 => 2,
                    48 => 4,
                    other => {
                        let reason = format!("it takes {other} channels, not 3, 12 or 48");
                        return Err(unknown(source, reason));
                    }
                };
                let enlarges = 1 << names.upsamplings;
                if enlarges < unshuffle {
                    return Err(unknown(source, "it makes pictures smaller".into()));
                }
                return Ok(Self {
                    network: Network::Rrdb(Box::new(network)),
                    enlarges,
                    unshuffle,
                    place: place.clone(),
                });
            }
        }
        let first = source.keys().into_iter().min().unwrap_or_default();
        Err(unknown(
            source,
            format!("it holds tensors such as `{first}`"),
        ))
    }

    /// How many times larger a picture becomes.
    #[must_use]
    pub fn scale(&self) -> usize {
        self.enlarges / self.unshuffle
    }

    /// Bytes that a picture of `width` x `height` pixels needs at most while it is worked on.
    #[must_use]
    pub fn work_bytes(&self, width: usize, height: usize) -> u64 {
        let inner = width.div_ceil(self.unshuffle) as u64 * height.div_ceil(self.unshuffle) as u64;
        let values = match &self.network {
            Network::Rrdb(rrdb) => rrdb.work_values(inner),
            Network::Compact(compact) => compact.work_values(inner),
        };
        values * self.place.dtype.size_in_bytes() as u64
    }

    /// `[1, height, width, 3]` to `[1, height * scale, width * scale, 3]`, not clamped.
    ///
    /// # Errors
    /// On a shape that does not fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = x
            .to_device(&self.place.device)?
            .to_dtype(self.place.dtype)?;
        let (_, height, width, _) = x.dims4()?;
        let y = match &self.network {
            Network::Compact(compact) => return compact.forward(&x),
            Network::Rrdb(rrdb) if self.unshuffle == 1 => return rrdb.forward(&x),
            Network::Rrdb(rrdb) => rrdb.forward(&pixel_unshuffle(
                &reflected(&x, self.unshuffle)?,
                self.unshuffle,
            )?)?,
        };
        let (height, width) = (height * self.scale(), width * self.scale());
        y.narrow(1, 0, height)?.narrow(2, 0, width)?.contiguous()
    }
}

fn unknown(source: &dyn Source, reason: String) -> Error {
    Error::Upscaler {
        path: source.path().into(),
        reason,
    }
}

/// Continues a picture below and to the right, mirrored at its last pixel, to sides that are multiples of `side`.
fn reflected(x: &Tensor, side: usize) -> Result<Tensor> {
    let mut x = x.clone();
    for axis in [1, 2] {
        let len = x.dim(axis)?;
        let missing = len.next_multiple_of(side) - len;
        if missing > 0 {
            // A picture of one pixel has nothing to mirror.
            let sources = (0..len + missing).map(|i| {
                let beyond = (i + 1).saturating_sub(len);
                let source = if beyond == 0 {
                    i
                } else {
                    (len - 1).saturating_sub(beyond)
                };
                source as u32
            });
            x = x.index_select(&Tensor::from_iter(sources, x.device())?, axis)?;
        }
    }
    Ok(x)
}

/// Each square of `side` pixels becomes one pixel: channel `c`, row `i`, column `j` becomes channel `(c * side + i) * side + j`.
fn pixel_unshuffle(x: &Tensor, side: usize) -> Result<Tensor> {
    let (b, h, w, c) = x.dims4()?;
    x.reshape(&[b, h / side, side, w / side, side, c][..])?
        .permute([0, 1, 3, 5, 2, 4].as_slice())?
        .contiguous()?
        .reshape((b, h / side, w / side, c * side * side))
}

/// The inverse of [`pixel_unshuffle`].
fn pixel_shuffle(x: &Tensor, side: usize) -> Result<Tensor> {
    let (b, h, w, c) = x.dims4()?;
    let c = c / (side * side);
    x.reshape(&[b, h, w, c, side, side][..])?
        .permute([0, 1, 4, 2, 5, 3].as_slice())?
        .contiguous()?
        .reshape((b, h * side, w * side, c))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn shuffling_undoes_unshuffling_and_orders_channels_as_torch() {
        let x = Tensor::arange(0f32, 48.0, &Device::Cpu).unwrap();
        let x = x.reshape((1, 4, 4, 3)).unwrap();
        let y = pixel_unshuffle(&x, 2).unwrap();
        assert_eq!(y.dims(), [1, 2, 2, 12]);
        // Channel 0 of the first square: rows 0 and 1, columns 0 and 1.
        let first: Vec<f32> = y.flatten_all().unwrap().to_vec1().unwrap()[..4].to_vec();
        assert_eq!(first, [0.0, 3.0, 12.0, 15.0]);
        let back = pixel_shuffle(&y, 2).unwrap();
        assert_eq!(
            back.flatten_all().unwrap().to_vec1::<f32>().unwrap(),
            x.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        );
    }

    #[test]
    fn pictures_are_continued_by_reflection() {
        let row = |n: u32| Tensor::arange(0f32, n as f32, &Device::Cpu).unwrap();
        let reflect = |n: u32| {
            let x = row(n).reshape((1, n as usize, 1, 1)).unwrap();
            let y = reflected(&x, 4).unwrap();
            y.narrow(2, 0, 1)
                .unwrap()
                .flatten_all()
                .unwrap()
                .to_vec1::<f32>()
                .unwrap()
        };
        assert_eq!(reflect(5), [0.0, 1.0, 2.0, 3.0, 4.0, 3.0, 2.0, 1.0]);
        assert_eq!(reflect(1), [0.0; 4]);
    }
}
