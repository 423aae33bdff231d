//! What a device thread runs: the contract, and its fulfilment by [`Pipeline`] on a device of its own.
//!
//! A back end is built on the device thread and never leaves it. Tests put another one in its place.

use super::Error;
use super::checkpoint::Selection;
use crate::config::{CudaKernels, DeviceChoice, DeviceSettings, DtypeChoice};
use crate::pipeline::{
    self, Extras, ExtrasRequest, GenerateRequest, Generated, KernelChoice, LoadOptions, Observer,
    Pipeline, UpscalerSlot, cuda,
};

/// What a device thread needs of the layer below. [`PipelineBackend`] is the real one.
pub trait Backend {
    /// A loaded checkpoint.
    type Model;

    /// Device and dtype, as shown to users.
    fn device(&self) -> DeviceInfo;

    /// Bytes that the weights of a checkpoint will take, from its file's header.
    ///
    /// # Errors
    /// The file cannot be read or is no checkpoint.
    fn estimate(&self, model: &Selection) -> Result<u64, pipeline::Error>;

    /// Bytes that may still be allocated; `None` = unknown.
    fn free_memory(&self) -> Option<u64>;

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

    /// Enlarges pictures; needs no checkpoint.
    ///
    /// # Errors
    /// An upscaler cannot be loaded or run.
    fn upscale(
        &mut self,
        request: &ExtrasRequest,
        observer: &dyn Observer,
    ) -> Result<Extras, pipeline::Error>;

    /// Drops the upscaler that is kept loaded.
    fn unload_upscaler(&mut self);
}

/// Device and dtype in use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// `cpu` or `cuda:N`.
    pub device: String,
    /// `f32`, `bf16`, `f16` or `fp8`.
    pub dtype: &'static str,
    /// Bytes that a card has; `None` for the CPU, whose memory is the machine's.
    pub memory: Option<u64>,
}

/// [`Pipeline`] on a device of its own.
pub struct PipelineBackend {
    device: candle_core::Device,
    dtype: candle_core::DType,
    info: DeviceInfo,
    upscalers: UpscalerSlot,
    /// Bytes.
    vae_memory: usize,
}

impl PipelineBackend {
    /// What opens each device of the settings, to be run on its thread.
    ///
    /// # Errors
    /// [`Error::Device`] says what to choose instead.
    pub fn on_each(
        settings: &DeviceSettings,
    ) -> Result<Vec<impl FnOnce() -> Result<Self, Error> + Send + use<>>, Error> {
        let places = places(&settings.device)?.into_iter();
        let maker = |place| {
            let settings = settings.clone();
            move || Self::open(&settings, place)
        };
        Ok(places.map(maker).collect())
    }

    fn open(settings: &DeviceSettings, place: Place) -> Result<Self, Error> {
        let device = open_device(settings, place)?;
        prepare_cpu(settings)?;
        let (dtype, name) = compute_type(settings.dtype, &device)?;
        let device_name = match &device {
            candle_core::Device::Cuda(cuda) => {
                format!(
                    "cuda:{}",
                    candle_core::backend::BackendDevice::location(cuda).ordinal()
                )
            }
            _ => "cpu".to_string(),
        };
        let memory = cuda::total_memory(&device);
        let upscalers = UpscalerSlot::new(device.clone(), dtype, memory_of);
        Ok(Self {
            device,
            dtype,
            upscalers,
            info: DeviceInfo {
                device: device_name,
                dtype: name,
                memory,
            },
            vae_memory: settings.vae_memory_mib.saturating_mul(1 << 20),
        })
    }
}

/// What a choice comes to on a device: the type, and its name.
fn compute_type(
    choice: DtypeChoice,
    device: &candle_core::Device,
) -> Result<(candle_core::DType, &'static str), Error> {
    use candle_core::DType;
    let refused = |device: &str, reason: String| {
        let device = device.to_string();
        Err(Error::Device { device, reason })
    };
    match (choice, device.is_cuda()) {
        (DtypeChoice::Auto, false) | (DtypeChoice::F32, _) => Ok((DType::F32, "f32")),
        (DtypeChoice::Auto | DtypeChoice::F16, true) => Ok((DType::F16, "f16")),
        (DtypeChoice::Bf16, _) => Ok((DType::BF16, "bf16")),
        (DtypeChoice::F16, false) => refused(
            "cpu with f16",
            "the CPU computes in f32, bf16 and fp8; use `--dtype bf16`, `--dtype f32` or `--dtype auto`"
                .to_string(),
        ),
        (DtypeChoice::Fp8, _) => match cuda::no_e4m3(device) {
            None => Ok((DType::F8E4M3, "fp8")),
            Some(why) => refused("cuda with fp8", format!("{why}; use `--dtype bf16`")),
        },
    }
}

/// Fixes threads and instruction set, which the host's share of the work on any device uses.
///
/// # Errors
/// [`Error::Device`] names what the processor has.
fn prepare_cpu(settings: &DeviceSettings) -> Result<(), Error> {
    pipeline::prepare_cpu(&settings.cpu_isa, settings.threads).map_err(|reason| Error::Device {
        device: "cpu".to_string(),
        reason,
    })
}

impl PipelineBackend {
    /// Where and in which type models compute.
    #[must_use]
    pub fn device_and_dtype(&self) -> (candle_core::Device, candle_core::DType) {
        (self.device.clone(), self.dtype)
    }

    /// Says what would have helped, if that is what went wrong, and leaves the device ready for the next job.
    fn out_of_memory(&self, model: &Pipeline, error: pipeline::Error) -> pipeline::Error {
        match error {
            pipeline::Error::Tensor(source) if cuda::is_out_of_memory(&source) => {
                model.release_cached();
                let free = memory_of(&self.device).unwrap_or(0);
                pipeline::Error::OutOfMemory { free, source }
            }
            other => other,
        }
    }
}

/// Bytes that may be allocated on a device.
fn memory_of(device: &candle_core::Device) -> Option<u64> {
    if device.is_cpu() {
        free_memory()
    } else {
        cuda::free_memory(device)
    }
}

/// Bytes that the machine, or the container around this process, has left.
fn free_memory() -> Option<u64> {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let number = |path: &str| read(path)?.trim().parse::<u64>().ok();
    let machine = read("/proc/meminfo")?
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?
        .split_whitespace()
        .next()?
        .parse::<u64>()
        .ok()?
        * 1024;
    let container = number("/sys/fs/cgroup/memory.max")
        .zip(number("/sys/fs/cgroup/memory.current"))
        .map(|(most, used)| most.saturating_sub(used));
    Some(container.map_or(machine, |left| left.min(machine)))
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

/// Where one worker computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Cpu,
    /// A card by its ordinal.
    Cuda(usize),
}

/// What a choice comes to on this machine.
fn places(choice: &DeviceChoice) -> Result<Vec<Place>, Error> {
    match choice {
        DeviceChoice::Cpu => Ok(vec![Place::Cpu]),
        DeviceChoice::Cuda(ordinals) => Ok(ordinals.iter().copied().map(Place::Cuda).collect()),
        DeviceChoice::All => match cuda::count() {
            Ok(count) => Ok((0..count).map(Place::Cuda).collect()),
            Err(reason) => Err(Error::Device {
                device: "all".to_string(),
                reason: format!("{reason}; or use `--device cpu`"),
            }),
        },
        DeviceChoice::Auto => match cuda::count() {
            Ok(_) => Ok(vec![Place::Cuda(0)]),
            Err(reason) => {
                // Who built without CUDA knows it. A target of its own: `sdgen prompt` silences the engine's.
                if cfg!(feature = "cuda") {
                    tracing::warn!(target: "sdgen::device", %reason, "no CUDA: the CPU computes");
                }
                Ok(vec![Place::Cpu])
            }
        },
    }
}

fn open_device(settings: &DeviceSettings, place: Place) -> Result<candle_core::Device, Error> {
    let kernels = match settings.cuda_kernels {
        CudaKernels::Auto => KernelChoice::Auto,
        CudaKernels::Own => KernelChoice::Own,
        CudaKernels::Library => KernelChoice::Library,
    };
    match place {
        Place::Cpu => Ok(candle_core::Device::Cpu),
        Place::Cuda(ordinal) => cuda::open(ordinal, kernels).map_err(|reason| Error::Device {
            device: format!("cuda:{ordinal}"),
            reason: format!("{reason}; or use `--device cpu`"),
        }),
    }
}

impl Backend for PipelineBackend {
    type Model = Pipeline;

    fn device(&self) -> DeviceInfo {
        self.info.clone()
    }

    fn estimate(&self, model: &Selection) -> Result<u64, pipeline::Error> {
        Pipeline::estimate(&model.source, self.dtype, &self.device)
    }

    fn free_memory(&self) -> Option<u64> {
        memory_of(&self.device)
    }

    fn load(&mut self, model: &Selection) -> Result<Pipeline, pipeline::Error> {
        let options = LoadOptions {
            latents_on_device: false,
            device: self.device.clone(),
            dtype: self.dtype,
            vae: model.vae.clone(),
        };
        let pipeline = Pipeline::load(&model.source, model.identity.clone(), &options)?;
        pipeline.set_vae_memory(self.vae_memory);
        Ok(pipeline.with_upscalers(&self.upscalers))
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
        match model.generate(request, observer) {
            Err(pipeline::Error::Tensor(error)) if cuda::is_out_of_memory(&error) => {
                tracing::warn!(%error, "out of memory: caches are given back and the job tried again in smaller pieces");
                model.release_cached();
                model.set_vae_memory(self.vae_memory / 8);
                let again = model.generate(request, observer);
                model.set_vae_memory(self.vae_memory);
                again.map_err(|error| self.out_of_memory(model, error))
            }
            result => result,
        }
    }

    fn upscale(
        &mut self,
        request: &ExtrasRequest,
        observer: &dyn Observer,
    ) -> Result<Extras, pipeline::Error> {
        request.run(&self.upscalers, observer)
    }

    fn unload_upscaler(&mut self) {
        self.upscalers.unload();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_named_device_is_a_place_and_the_cpu_is_one() {
        assert_eq!(places(&DeviceChoice::Cpu).unwrap(), [Place::Cpu]);
        let two = places(&DeviceChoice::Cuda(vec![3, 0])).unwrap();
        assert_eq!(two, [Place::Cuda(3), Place::Cuda(0)]);
        assert_eq!(places(&DeviceChoice::Auto).unwrap().len(), 1);
        match cuda::count() {
            Ok(count) => assert_eq!(places(&DeviceChoice::All).unwrap().len(), count),
            Err(reason) => {
                let error = places(&DeviceChoice::All).unwrap_err().to_string();
                let expected =
                    format!("device not available: `all`; {reason}; or use `--device cpu`");
                assert_eq!(error, expected);
            }
        }
    }
}
