//! Pictures to latents and back for a pipeline: the checkpoint's VAE, a VAE of its own file, or TAESD in its place.
//!
//! Invariants: a VAE whose values overflow is replaced by the same one in a wider type if the request allows it, and stays wide; a
//! VAE that cannot be loaded leaves the one before; TAESD never has circular padding, as in A1111. Latents here are the
//! sampler's (scaled). Follows A1111's `sd_vae.py`, `sd_vae_taesd.py` and `decode_latent_batch`.

use std::cell::{Cell, RefCell};
use std::path::{Path, PathBuf};

use candle_core::{DType, Tensor};
use image::RgbImage;

use super::decode::to_image;
use super::network::{channels_first, channels_last};
use super::request::VaeIdentity;
use super::{CheckpointSource, Control, Error, LATENT_PIXEL, Observer};
use crate::models::taesd::Side;
use crate::models::vae::strips::Bounds;
use crate::models::{Taesd, Vae, VaeApprox, vae};
use crate::nn::Placement;
use crate::sampling::Latents;
use crate::weights::detect::prefix;
use crate::weights::vae_keys::LdmVae;
use crate::weights::{self, Source, WeightFile};

/// Bytes of activations that a block of the VAE may hold in one piece: 8 GiB, pictures up to 3 megapixels in f32.
const DEFAULT_MEMORY: usize = 8 << 30;

/// How a request wants pictures encoded and decoded.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VaeOptions {
    /// Latents to pictures (`sd_vae_decode_method`).
    pub decoder: Codec,
    /// Pictures to latents (`sd_vae_encode_method`).
    pub encoder: Codec,
    /// What happens when the VAE overflows.
    pub precision: AutoPrecision,
}

/// What stands between pictures and latents.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Codec {
    /// The VAE.
    #[default]
    Full,
    /// TAESD from this file.
    Taesd(PathBuf),
}

/// Which wider types an overflowing VAE may be converted to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AutoPrecision {
    /// f32 (`auto_vae_precision`).
    pub f32: bool,
    /// bf16 first (`auto_vae_precision_bfloat16`).
    pub bf16: bool,
}

impl Default for AutoPrecision {
    fn default() -> Self {
        Self {
            f32: true,
            bf16: false,
        }
    }
}

impl AutoPrecision {
    /// The type in which a VAE of type `dtype` is tried again after NaN; `None` if there is none, or none is allowed.
    ///
    /// A1111 gives up when the type it would convert to is the present one. Here bf16 may be followed by f32.
    #[must_use]
    pub fn wider(self, dtype: DType) -> Option<DType> {
        match dtype {
            DType::F16 if self.bf16 => Some(DType::BF16),
            DType::F16 | DType::BF16 if self.f32 => Some(DType::F32),
            _ => None,
        }
    }
}

/// The autoencoder of a loaded checkpoint.
#[derive(Debug)]
pub(super) struct Autoencoder {
    checkpoint: CheckpointSource,
    state: RefCell<State>,
    options: RefCell<VaeOptions>,
    /// Bytes that a block may hold.
    memory: Cell<usize>,
}

#[derive(Debug)]
struct State {
    vae: Vae,
    identity: Option<VaeIdentity>,
    place: Placement,
    small: Small,
}

/// Small stand-ins, loaded when first asked for.
#[derive(Debug)]
struct Small {
    place: Placement,
    taesd: Vec<(PathBuf, Taesd)>,
    approx: Option<(PathBuf, VaeApprox)>,
}

impl Autoencoder {
    pub(super) fn load(
        source: &CheckpointSource,
        checkpoint: &WeightFile,
        identity: Option<VaeIdentity>,
        model: &Placement,
    ) -> Result<Self, Error> {
        // A VAE never starts in plain f16: SDXL's own overflows there.
        let dtype = match model.dtype {
            DType::F16 => DType::F32,
            other => other,
        };
        let place = Placement {
            dtype,
            ..model.clone()
        };
        let small = Placement {
            circular: std::sync::Arc::default(),
            ..model.clone()
        };
        Ok(Self {
            checkpoint: source.clone(),
            state: RefCell::new(State {
                vae: load_vae(checkpoint, identity.as_ref(), &place)?,
                identity,
                place,
                small: Small {
                    place: small,
                    taesd: Vec::new(),
                    approx: None,
                },
            }),
            options: RefCell::default(),
            memory: Cell::new(DEFAULT_MEMORY),
        })
    }

    /// What a job that begins asks for, and the bytes that a block may hold.
    pub(super) fn begin(&self, options: &VaeOptions, memory: usize) {
        self.options.replace(options.clone());
        self.memory.set(memory);
    }

    pub(super) fn memory(&self) -> usize {
        self.memory.get()
    }

    pub(super) fn set_memory(&self, bytes: usize) {
        self.memory.set(bytes);
    }

    /// The VAE's own file, if it has one.
    pub(super) fn identity(&self) -> Option<VaeIdentity> {
        self.state.borrow().identity.clone()
    }

    /// Puts another VAE in place; on an error the one before stays. It begins again in its first type.
    pub(super) fn replace(&self, identity: Option<VaeIdentity>, model: DType) -> Result<(), Error> {
        let mut state = self.state.borrow_mut();
        let dtype = match model {
            DType::F16 => DType::F32,
            other => other,
        };
        let place = Placement {
            dtype,
            ..state.place.clone()
        };
        state.vae = load_vae(&self.checkpoint.open()?, identity.as_ref(), &place)?;
        state.place = place;
        state.identity = identity;
        crate::trim_memory();
        Ok(())
    }

    /// The picture of the first of `latents`; `None` if the job was interrupted meanwhile.
    pub(super) fn decode(
        &self,
        latents: &Latents,
        observer: &dyn Observer,
    ) -> Result<Option<RgbImage>, Error> {
        match &self.options.borrow().decoder {
            Codec::Full => self.decode_full(latents, observer),
            Codec::Taesd(path) => self.decode_small(latents, path).map(Some),
        }
    }

    /// The same through the VAE, whatever the job's decoder.
    pub(super) fn decode_full(
        &self,
        latents: &Latents,
        observer: &dyn Observer,
    ) -> Result<Option<RgbImage>, Error> {
        let state = &mut *self.state.borrow_mut();
        let z = latents.map(|v| v / vae::SCALE);
        loop {
            let z = tensor(&z, &state.place)?;
            let stop = || observer.control() == Control::Interrupt;
            let bounds = Bounds {
                bytes: self.memory.get(),
                stop: &stop,
            };
            let Some(picture) = state.vae.decode_within(&z, bounds)? else {
                return Ok(None);
            };
            if is_number(&picture)? {
                return Ok(Some(Picture::read(&picture)?.to_image(|v| v)));
            }
            self.widen(state)?;
        }
    }

    /// TAESD's picture.
    pub(super) fn decode_small(&self, latents: &Latents, path: &Path) -> Result<RgbImage, Error> {
        let small = &mut self.state.borrow_mut().small;
        let z = tensor(latents, &small.place)?;
        let picture = Picture::read(&small.taesd(path, Side::Decoder)?.forward(&z)?)?;
        Ok(picture.to_image(|v| v * 2.0 - 1.0))
    }

    /// The approximation network's picture, a quarter of the VAE's width and height.
    pub(super) fn approximate(&self, latents: &Latents, path: &Path) -> Result<RgbImage, Error> {
        let small = &mut self.state.borrow_mut().small;
        let z = tensor(latents, &small.place)?;
        let picture = Picture::read(&small.approx(path)?.forward(&z)?)?;
        Ok(picture.to_image(|v| v))
    }

    /// Latents of a picture, `[3, height, width]` in [-1, 1], by the job's encoder; sides are rounded down to whole latent pixels.
    pub(super) fn encode(
        &self,
        picture: &[f32],
        width: usize,
        height: usize,
    ) -> Result<Latents, Error> {
        if picture.len() != 3 * width * height || width.min(height) < LATENT_PIXEL {
            return Err(Error::Invalid(format!(
                "picture of {width}x{height} pixels: both sides must be at least {LATENT_PIXEL}"
            )));
        }
        let picture = Latents::new(picture.to_vec(), [1, 3, height, width]);
        let state = &mut *self.state.borrow_mut();
        let latents = match &self.options.borrow().encoder {
            Codec::Full => self.encode_full(state, &picture)?,
            Codec::Taesd(path) => {
                let picture = picture.map(|v| f32::midpoint(v, 1.0));
                let x = tensor(&picture, &state.small.place)?;
                let z = state.small.taesd(path, Side::Encoder)?.forward(&x)?;
                // TAESD rounds a size up where the VAE rounds it down.
                z.narrow(1, 0, height / LATENT_PIXEL)?
                    .narrow(2, 0, width / LATENT_PIXEL)?
            }
        };
        let Picture { values, shape } = Picture::read(&latents)?;
        let [_, height, width, channels] = shape;
        let shape = [1, channels, height, width];
        Ok(Latents::new(channels_first(&values, shape), shape))
    }

    /// The posterior's mean, scaled.
    fn encode_full(&self, state: &mut State, picture: &Latents) -> Result<Tensor, Error> {
        loop {
            let x = tensor(picture, &state.place)?;
            let bounds = Bounds {
                bytes: self.memory.get(),
                ..Bounds::NONE
            };
            let encoded = state.vae.encode_within(&x, bounds)?;
            let (mean, _) = encoded.ok_or(Error::Interrupted)?;
            let mean = (mean.to_dtype(DType::F32)? * f64::from(vae::SCALE))?;
            if is_number(&mean)? {
                return Ok(mean);
            }
            self.widen(state)?;
        }
    }

    /// Converts the VAE to a wider type, or says why it stays as it is.
    fn widen(&self, state: &mut State) -> Result<(), Error> {
        let dtype = state.place.dtype;
        let Some(wider) = self.options.borrow().precision.wider(dtype) else {
            return Err(Error::VaeNotANumber {
                dtype: dtype.as_str(),
                remedy: remedy(dtype),
            });
        };
        tracing::warn!(
            from = dtype.as_str(),
            to = wider.as_str(),
            "a tensor with NaNs was produced in VAE; the VAE is converted and the picture tried again"
        );
        let place = Placement {
            dtype: wider,
            ..state.place.clone()
        };
        state.vae = load_vae(&self.checkpoint.open()?, state.identity.as_ref(), &place)?;
        state.place = place;
        Ok(())
    }
}

fn remedy(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "the VAE is damaged: choose another one (`sd_vae`)",
        _ => "turn on the option `auto_vae_precision`, or use `--dtype f32`",
    }
}

impl Small {
    fn taesd(&mut self, path: &Path, side: Side) -> Result<&Taesd, Error> {
        if !self.taesd.iter().any(|(known, _)| known == path) {
            let file = WeightFile::open(path)?;
            let taesd = Taesd::new(&file, side, &self.place)?;
            self.taesd.push((path.into(), taesd));
        }
        let found = self.taesd.iter().find(|(known, _)| known == path);
        Ok(&found.expect("pushed above if it was not there").1)
    }

    fn approx(&mut self, path: &Path) -> Result<&VaeApprox, Error> {
        if self.approx.as_ref().is_none_or(|(known, _)| known != path) {
            let file = WeightFile::open(path)?;
            let approx = VaeApprox::new(&file, &self.place)?;
            self.approx = Some((path.into(), approx));
        }
        let found = self.approx.as_ref();
        Ok(&found.expect("set above if it was not there").1)
    }
}

/// A channels-last picture, or latents, on the host.
struct Picture {
    values: Vec<f32>,
    shape: [usize; 4],
}

impl Picture {
    fn read(tensor: &Tensor) -> Result<Self, Error> {
        let (batch, height, width, channels) = tensor.dims4()?;
        let values = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
        Ok(Self {
            values,
            shape: [batch, height, width, channels],
        })
    }

    /// The first picture, `map` bringing its values to [-1, 1].
    fn to_image(&self, map: impl Fn(f32) -> f32) -> RgbImage {
        let [_, height, width, _] = self.shape;
        let values = self.values.iter().take(3 * height * width);
        to_image(values.map(|v| map(*v)), width, height)
    }
}

/// Whether no value is NaN: counted where the tensor lies, so that a card sends one number.
fn is_number(tensor: &Tensor) -> Result<bool, Error> {
    let unequal_to_itself = tensor.ne(tensor)?.to_dtype(DType::F32)?;
    Ok(unequal_to_itself.sum_all()?.to_scalar::<f32>()? == 0.0)
}

fn tensor(latents: &Latents, place: &Placement) -> Result<Tensor, Error> {
    let [batch, channels, height, width] = latents.shape;
    let values = channels_last(&latents.data(), latents.shape);
    let shape = (batch, height, width, channels);
    Ok(Tensor::from_vec(values, shape, &place.device)?)
}

/// The VAE file if one is given, else the checkpoint's own.
fn load_vae(
    checkpoint: &WeightFile,
    file: Option<&VaeIdentity>,
    place: &Placement,
) -> Result<Vae, weights::Error> {
    const DECODER: &str = "decoder.conv_in.weight";
    let inside = |source: &dyn Source| source.shape(&format!("{}{DECODER}", prefix::VAE)).is_some();
    if let Some(vae) = file {
        let file = WeightFile::open(&vae.path)?;
        if let Some(renamed) = LdmVae::of(&file) {
            return Vae::new(&renamed, "", place);
        }
        return Vae::new(&file, if inside(&file) { prefix::VAE } else { "" }, place);
    }
    if !inside(checkpoint) {
        return Err(weights::Error::NoVae {
            path: checkpoint.path().into(),
        });
    }
    Vae::new(checkpoint, prefix::VAE, place)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use candle_core::Device;

    use super::*;
    use crate::weights::demo;

    #[test]
    fn the_wider_type_is_the_one_the_options_allow() {
        let choice = |f32, bf16| AutoPrecision { f32, bf16 };
        for (from, options, to) in [
            (DType::F16, choice(true, false), Some(DType::F32)),
            (DType::F16, choice(true, true), Some(DType::BF16)),
            (DType::F16, choice(false, true), Some(DType::BF16)),
            (DType::F16, choice(false, false), None),
            (DType::BF16, choice(true, true), Some(DType::F32)),
            (DType::BF16, choice(false, true), None),
            (DType::F32, choice(true, true), None),
        ] {
            assert_eq!(options.wider(from), to, "{from:?} {options:?}");
        }
    }

    /// The demo model's VAE with a first convolution whose values only f32 can hold, as a checkpoint; it begins in f16.
    fn overflowing(dir: &Path) -> Autoencoder {
        let file = demo::open().unwrap();
        let tensors: HashMap<String, Tensor> = file
            .keys()
            .into_iter()
            .filter(|key| key.starts_with(prefix::VAE))
            .map(|key| {
                let mut values = file.read(key).unwrap();
                if key.ends_with("decoder.conv_in.weight") {
                    values = values.into_iter().map(|v| v * 1e7).collect();
                }
                let shape = file.shape(key).unwrap().to_vec();
                let tensor = Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
                (key.to_string(), tensor)
            })
            .collect();
        let path = dir.join("overflowing.safetensors");
        std::fs::write(&path, safetensors::serialize(&tensors, None).unwrap()).unwrap();
        let (source, file) = (
            CheckpointSource::File(path.clone()),
            WeightFile::open(&path).unwrap(),
        );
        let half = Placement {
            dtype: DType::F16,
            ..Placement::cpu()
        };
        let mut autoencoder = Autoencoder::load(&source, &file, None, &half).unwrap();
        let state = autoencoder.state.get_mut();
        assert_eq!(state.place.dtype, DType::F32, "never plain f16 by itself");
        state.vae = load_vae(&file, None, &half).unwrap();
        state.place = half;
        autoencoder
    }

    #[test]
    fn an_overflowing_vae_is_tried_again_in_f32_and_stays_there() {
        let dir = tempfile::tempdir().unwrap();
        let mut autoencoder = overflowing(dir.path());
        let latents = Latents::new((0..64).map(|i| (i as f32).sin()).collect(), [1, 4, 4, 4]);
        let options = VaeOptions {
            precision: AutoPrecision {
                f32: false,
                bf16: false,
            },
            ..VaeOptions::default()
        };
        autoencoder.begin(&options, DEFAULT_MEMORY);
        let error = autoencoder.decode(&latents, &()).unwrap_err().to_string();
        assert_eq!(
            error,
            "a tensor with NaNs was produced in VAE; there is not enough precision in `f16` to represent the picture: turn on the \
             option `auto_vae_precision`, or use `--dtype f32`"
        );
        autoencoder.begin(&VaeOptions::default(), DEFAULT_MEMORY);
        let picture = autoencoder.decode(&latents, &()).unwrap().unwrap();
        assert_eq!(picture.dimensions(), (32, 32));
        let state = autoencoder.state.get_mut();
        assert_eq!(state.place.dtype, DType::F32);
        let again = autoencoder.decode(&latents, &()).unwrap().unwrap();
        assert_eq!(picture, again);
    }

    #[test]
    fn a_vae_that_is_nan_in_f32_is_reported_as_damaged() {
        let dir = tempfile::tempdir().unwrap();
        let autoencoder = overflowing(dir.path());
        let nan = Latents::new(vec![f32::NAN; 64], [1, 4, 4, 4]);
        let error = autoencoder.decode(&nan, &()).unwrap_err().to_string();
        assert!(error.ends_with("choose another one (`sd_vae`)"), "{error}");
    }
}
