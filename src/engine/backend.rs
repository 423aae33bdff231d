//! What the device thread runs: the contract, and its fulfilment by [`Pipeline`] on a device of its own.
//!
//! A back end is built on the device thread and never leaves it. Tests put another one in its place.

use super::Error;
use super::checkpoint::Selection;
use crate::config::{DeviceChoice, DeviceSettings, DtypeChoice};
use crate::pipeline::{self, GenerateRequest, Generated, LoadOptions, Observer, Pipeline};

/// What the device thread needs of the layer below. [`PipelineBackend`] is the real one.
pub trait Backend {
    /// A loaded checkpoint.
    type Model;

    /// Device and dtype, as shown to users.
    fn device(&self) -> DeviceInfo;

    /// Loads a checkpoint and its VAE.
    ///
    /// # Errors
    /// Names the file and the remedy.
    fn load(&mut self, model: &Selection) -> Result<Self::Model, pipeline::Error>;

    /// Puts the VAE of `model`'s selection into a loaded checkpoint, which stays as it is otherwise.
    ///
    /// # Errors
    /// Names the file and the remedy; the VAE before stays.
    fn set_vae(
        &mut self,
        loaded: &mut Self::Model,
        model: &Selection,
    ) -> Result<(), pipeline::Error>;

    /// Width and height in pixels of a request without a size.
    fn native_size(&self, model: &Self::Model) -> (usize, usize);

    /// Runs one job.
    ///
    /// # Errors
    /// Whatever stage failed.
    fn generate(
        &mut self,
        model: &mut Self::Model,
        request: &GenerateRequest,
        observer: &dyn Observer,
    ) -> Result<Generated, pipeline::Error>;
}

/// Device and dtype in use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// `cpu` or `cuda:N`.
    pub device: String,
    /// `f32`, `bf16` or `f16`.
    pub dtype: &'static str,
}

/// [`Pipeline`] on a device of its own.
pub struct PipelineBackend {
    device: candle_core::Device,
    dtype: candle_core::DType,
    info: DeviceInfo,
    /// Bytes.
    vae_memory: usize,
}

impl PipelineBackend {
    /// Opens the device.
    ///
    /// # Errors
    /// [`Error::Device`] says what to choose instead.
    pub fn open(settings: &DeviceSettings) -> Result<Self, Error> {
        let device = open_device(settings.device)?;
        let (dtype, name) = match (settings.dtype, device.is_cuda()) {
            (DtypeChoice::Auto | DtypeChoice::F32, false) | (DtypeChoice::F32, true) => {
                (candle_core::DType::F32, "f32")
            }
            (DtypeChoice::Auto | DtypeChoice::F16, true) => (candle_core::DType::F16, "f16"),
            (DtypeChoice::Bf16, true) => (candle_core::DType::BF16, "bf16"),
            (other, false) => {
                let reason =
                    "the CPU computes in f32; use `--dtype f32` or `--dtype auto`".to_string();
                return Err(Error::Device {
                    device: format!("cpu with {other:?}").to_lowercase(),
                    reason,
                });
            }
        };
        let device_name = match &device {
            candle_core::Device::Cuda(cuda) => {
                format!(
                    "cuda:{}",
                    candle_core::backend::BackendDevice::location(cuda).ordinal()
                )
            }
            _ => "cpu".to_string(),
        };
        Ok(Self {
            device,
            dtype,
            info: DeviceInfo {
                device: device_name,
                dtype: name,
            },
            vae_memory: settings.vae_memory_mib.saturating_mul(1 << 20),
        })
    }
}

/// The ordinal of a CUDA location.
trait Ordinal {
    fn ordinal(&self) -> usize;
}

impl Ordinal for candle_core::DeviceLocation {
    fn ordinal(&self) -> usize {
        match self {
            Self::Cuda { gpu_id } | Self::Metal { gpu_id } => *gpu_id,
            Self::Cpu => 0,
        }
    }
}

fn open_device(choice: DeviceChoice) -> Result<candle_core::Device, Error> {
    let open = |ordinal: usize| {
        candle_core::Device::new_cuda(ordinal).map_err(|error| Error::Device {
            device: format!("cuda:{ordinal}"),
            reason: if cfg!(feature = "cuda") {
                format!("{error}; use `--device cpu`")
            } else {
                "this build has no CUDA support; build with `--features cuda` or use `--device cpu`"
                    .to_string()
            },
        })
    };
    match choice {
        DeviceChoice::Cuda(ordinal) => open(ordinal),
        DeviceChoice::Auto if candle_core::utils::cuda_is_available() => open(0),
        DeviceChoice::Auto | DeviceChoice::Cpu => Ok(candle_core::Device::Cpu),
    }
}

impl Backend for PipelineBackend {
    type Model = Pipeline;

    fn device(&self) -> DeviceInfo {
        self.info.clone()
    }

    fn load(&mut self, model: &Selection) -> Result<Pipeline, pipeline::Error> {
        let options = LoadOptions {
            device: self.device.clone(),
            dtype: self.dtype,
            vae: model.vae.clone(),
        };
        let pipeline = Pipeline::load(&model.source, model.identity.clone(), &options)?;
        pipeline.set_vae_memory(self.vae_memory);
        Ok(pipeline)
    }

    fn set_vae(&mut self, loaded: &mut Pipeline, model: &Selection) -> Result<(), pipeline::Error> {
        loaded.set_vae(model.vae.clone())
    }

    fn native_size(&self, model: &Pipeline) -> (usize, usize) {
        model.native_size()
    }

    fn generate(
        &mut self,
        model: &mut Pipeline,
        request: &GenerateRequest,
        observer: &dyn Observer,
    ) -> Result<Generated, pipeline::Error> {
        model.generate(request, observer)
    }
}
