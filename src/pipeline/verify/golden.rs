//! The tiny checkpoint's text towers, UNet and VAE against what `PyTorch` answered (`tests/golden` of a checkout).
//!
//! Allowed, as the root mean square of the difference relative to that of the answer: 1e-4 in `f32` (both sides sum in another order); in 16
//! bits some hundred layers of noise weights each add a rounding: 3e-2 in `bf16`, an eighth of that in `f16`.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};

use super::{Row, host};
use crate::models::{TextTower, Unet, Vae};
use crate::nn::Placement;
use crate::pipeline::Error;
use crate::weights::SafetensorsFile;
use crate::weights::detect::prefix;

/// The tiny checkpoint's file below the folder.
const TINY: &str = "tiny_sdxl.safetensors.planes.zst";

type Tensors = HashMap<String, Tensor>;

/// Pairs of what was computed and what is right.
type Pairs = Vec<(Tensor, Tensor)>;

/// What a model makes of its golden inputs.
type Model = fn(&SafetensorsFile, &Tensors, &Placement) -> Result<Pairs, Error>;

/// A row each for text, UNet and VAE.
pub(super) fn verify(place: &Placement, folder: &Path, report: &mut dyn FnMut(Row)) {
    let tolerance = match place.dtype {
        DType::BF16 => 3e-2,
        DType::F16 => 4e-3,
        _ => 1e-4,
    };
    let models: [(&str, &str, Model); 3] = [
        ("golden text towers", "text.safetensors.zst", text),
        ("golden UNet", "unet.safetensors.zst", unet),
        ("golden VAE", "vae.safetensors.zst", vae),
    ];
    let tiny = checkpoint(folder);
    for (check, file, model) in models {
        let compare = || -> Result<f64, String> {
            let tiny = tiny.as_ref().map_err(Clone::clone)?;
            let bytes = unpack(&folder.join(file))?;
            let want = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu);
            let want = want.map_err(|error| error.to_string())?;
            let pairs = model(tiny, &want, place).map_err(|error| error.to_string())?;
            worst(&pairs).map_err(|error| error.to_string())
        };
        report(match compare() {
            Ok(error) => Row {
                check: check.into(),
                error,
                tolerance,
                note: String::new(),
            },
            Err(note) => Row::failed(check, tolerance, &note),
        });
    }
}

fn unpack(path: &Path) -> Result<Vec<u8>, String> {
    std::fs::File::open(path)
        .and_then(zstd::stream::decode_all)
        .map_err(|error| format!("{}: {error}", path.display()))
}

/// The checkpoint is stored as all even bytes, then all odd ones.
fn checkpoint(folder: &Path) -> Result<SafetensorsFile, String> {
    let path: PathBuf = folder.join(TINY);
    let planes = unpack(&path)?;
    let (even, odd) = planes.split_at(planes.len() / 2);
    let bytes = even.iter().zip(odd).flat_map(|(e, o)| [*e, *o]).collect();
    SafetensorsFile::from_vec(&path, bytes).map_err(|error| error.to_string())
}

/// The largest relative error of the pairs.
fn worst(pairs: &Pairs) -> candle_core::Result<f64> {
    let square = |x: f32| f64::from(x).powi(2);
    let mut worst = 0.0f64;
    for (got, want) in pairs {
        let (got, want) = (host(got)?, host(want)?);
        let off: f64 = got.iter().zip(&want).map(|(g, w)| square(g - w)).sum();
        let all: f64 = want.iter().map(|w| square(*w)).sum();
        let error = (off / all).sqrt();
        let is_comparable = got.len() == want.len() && error.is_finite();
        worst = worst.max(if is_comparable { error } else { f64::INFINITY });
    }
    Ok(worst)
}

fn tensor<'a>(want: &'a Tensors, key: &str) -> candle_core::Result<&'a Tensor> {
    let missing = || candle_core::Error::msg(format!("no golden tensor `{key}`"));
    want.get(key).ok_or_else(missing)
}

/// `[batch, channels, height, width]` as models take it, where they compute.
fn picture(want: &Tensors, key: &str, place: &Placement) -> candle_core::Result<Tensor> {
    let channels_last = tensor(want, key)?.permute((0, 2, 3, 1))?.contiguous()?;
    channels_last
        .to_device(&place.device)?
        .to_dtype(place.dtype)
}

/// What a model made, with channels first and on the host.
fn channels_first(made: &Tensor) -> candle_core::Result<Tensor> {
    made.to_dtype(DType::F32)?
        .to_device(&Device::Cpu)?
        .permute((0, 3, 1, 2))?
        .contiguous()
}

fn text(file: &SafetensorsFile, want: &Tensors, place: &Placement) -> Result<Pairs, Error> {
    let (l, g) = (
        TextTower::clip_l(file, place)?,
        TextTower::big_g(file, place)?,
    );
    let mut pairs = Vec::new();
    for case in 0..8 {
        let key = |name: &str| format!("case{case}.{name}");
        let ids = |name: &str| -> candle_core::Result<[u32; 77]> {
            let ids: Vec<i64> = tensor(want, &key(name))?.flatten_all()?.to_vec1()?;
            let wrong = |_| candle_core::Error::msg("not 77 ids");
            let ids: [i64; 77] = ids.try_into().map_err(wrong)?;
            Ok(ids.map(|id| id as u32))
        };
        let (l, g) = (
            l.encode(&[ids("ids_l")?], &[])?,
            g.encode(&[ids("ids_g")?], &[])?,
        );
        pairs.push((l.hidden, tensor(want, &key("hidden_l"))?.clone()));
        pairs.push((g.hidden, tensor(want, &key("hidden_g"))?.clone()));
        let pooled = g
            .pooled
            .ok_or_else(|| candle_core::Error::msg("no pooled state"))?;
        pairs.push((pooled, tensor(want, &key("pooled"))?.clone()));
    }
    Ok(pairs)
}

/// Three runs of a case: where launches are recorded, the second records and the third replays.
fn unet(file: &SafetensorsFile, want: &Tensors, place: &Placement) -> Result<Pairs, Error> {
    let unet = Unet::new(file, place)?;
    let mut pairs = Vec::new();
    for case in 0..3 {
        let key = |name: &str| format!("case{case}.{name}");
        let there = |name: &str| tensor(want, &key(name))?.to_device(&place.device);
        let conditioning = unet.condition(&there("context")?, &there("y")?)?;
        let (x, t) = (
            picture(want, &key("x"), place)?,
            host(tensor(want, &key("t"))?)?,
        );
        for _ in 0..3 {
            let eps = unet.forward(&x, &t, &conditioning)?;
            pairs.push((channels_first(&eps)?, tensor(want, &key("eps"))?.clone()));
        }
    }
    Ok(pairs)
}

fn vae(file: &SafetensorsFile, want: &Tensors, place: &Placement) -> Result<Pairs, Error> {
    // As in a job, `f16` is not for the VAE.
    let place = Placement {
        dtype: match place.dtype {
            DType::F16 => DType::F32,
            other => other,
        },
        ..place.clone()
    };
    let vae = Vae::new(file, prefix::VAE, &place)?;
    let mut pairs = Vec::new();
    for case in 0..2 {
        let key = |name: &str| format!("case{case}.{name}");
        let (mean, _) = vae.encode(&picture(want, &key("image"), &place)?)?;
        let decoded = vae.decode(&picture(want, &key("z"), &place)?)?;
        for (made, name) in [(mean, "mean"), (decoded, "decoded")] {
            pairs.push((channels_first(&made)?, tensor(want, &key(name))?.clone()));
        }
    }
    Ok(pairs)
}
