//! What a card keeps between operations: our kernels, the libraries' handles, one workspace, and the plan of every shape seen.
//!
//! Invariants: one engine per device, entered by one thread at a time; everything it queues goes to candle's stream of that device;
//! plans are made outside graph captures, since making them waits for the card. The list of engines is the one thing here that
//! outlives its owners: candle's device has no place to attach anything to.
#![allow(unsafe_code, reason = "launches kernels")]

use std::collections::HashMap;
use std::ffi::c_void;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::cuda_backend::{DeviceId, WrapErr};
use candle_core::{CudaDevice, DType, Result, Tensor, bail};
use cudarc::driver::sys::{
    CUdevice_attribute, CUevent_flags, CUfunction_attribute, CUstreamCaptureStatus,
};
use cudarc::driver::{CudaFunction, CudaModule, CudaStream, result};
use cudarc::nvrtc::Ptx;

use super::choice::KernelChoice;
use super::cudnn::Dnn;
use super::geometry::{AttentionShape, Grid, Kind};
use super::lt::Lt;
use super::operand::{Operand, uninitialised};
use super::select::{self, Contest, Trial};
use super::staging::Staging;
use super::{attention, convolution, fp8, linear};

/// Our kernels, file by file: name and fat binary.
const KERNELS: &[(&str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// Bytes of scratch memory that the libraries may use; what NVIDIA advises for cublasLt on Hopper, twice.
pub(super) const WORKSPACE: usize = 64 << 20;

/// Runs that are timed; the median counts. One more goes before them.
const RUNS: usize = 5;

/// Shared memory that needs no permission, bytes.
const FREE_SHARED: usize = 48 << 10;

/// A parameter of a kernel, as the kernel's signature has it.
#[derive(Clone, Copy)]
pub(super) enum Arg {
    Address(u64),
    Int(usize),
    Flag(bool),
    Long(usize),
    Float(f32),
    Shape([i32; 18]),
}

/// A parameter in memory of its own size.
#[repr(C)]
union Cell {
    long: u64,
    int: i32,
    float: f32,
    shape: [i32; 18],
}

impl From<Arg> for Cell {
    fn from(arg: Arg) -> Self {
        match arg {
            Arg::Address(long) => Self { long },
            Arg::Long(long) => Self { long: long as u64 },
            Arg::Int(int) => Self { int: int as i32 },
            Arg::Flag(flag) => Self {
                int: i32::from(flag),
            },
            Arg::Float(float) => Self { float },
            Arg::Shape(shape) => Self { shape },
        }
    }
}

/// The plan of each shape seen; `None` = our kernel.
pub(super) type Plans<K, P> = HashMap<K, Option<P>>;

/// See the module's text.
pub(super) struct Engine {
    device: CudaDevice,
    stream: Arc<CudaStream>,
    modules: Vec<Arc<CudaModule>>,
    functions: HashMap<String, CudaFunction>,
    pub(super) multiprocessors: usize,
    choice: KernelChoice,
    workspace: Operand,
    /// Made when the first weights are loaded.
    pub(super) staging: Option<Staging>,
    pub(super) lt: Option<Lt>,
    pub(super) dnn: Option<Dnn>,
    pub(super) linear: Plans<linear::Key, linear::Plan>,
    pub(super) fp8: Plans<fp8::Key, fp8::Plan>,
    pub(super) convolutions: Plans<convolution::Key, convolution::Plan>,
    pub(super) attentions: Plans<(Kind, AttentionShape), attention::Plan>,
}

type Shared = Arc<Mutex<Engine>>;

static ENGINES: Mutex<Vec<(DeviceId, Shared)>> = Mutex::new(Vec::new());

/// Enters the engine of a device, which is made on first use.
pub(super) fn with<R>(
    device: &CudaDevice,
    run: impl FnOnce(&mut Engine) -> Result<R>,
) -> Result<R> {
    let engine = register(device, KernelChoice::default())?;
    let mut engine = engine.lock().unwrap_or_else(PoisonError::into_inner);
    run(&mut engine)
}

/// The engine of a device; `choice` counts if it is made here.
pub(super) fn register(device: &CudaDevice, choice: KernelChoice) -> Result<Shared> {
    let mut engines = ENGINES.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, engine)) = engines.iter().find(|(id, _)| *id == device.id()) {
        return Ok(engine.clone());
    }
    let engine = Arc::new(Mutex::new(Engine::new(device, choice)?));
    engines.push((device.id(), engine.clone()));
    Ok(engine)
}

impl Engine {
    fn new(device: &CudaDevice, choice: KernelChoice) -> Result<Self> {
        let stream = device.cuda_stream();
        let context = stream.context().clone();
        let attribute = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let multiprocessors = context.attribute(attribute).w()?.unsigned_abs() as usize;
        let load = |(name, image): &(&str, &[u8])| {
            context.load_module(Ptx::from_binary(image.to_vec())).map_err(|error| {
                candle_core::Error::msg(format!(
                    "the kernels in `{name}.cu` do not run on this card ({error}); it must be of compute capability 8.0 or newer"
                ))
            })
        };
        let modules = KERNELS.iter().map(load).collect::<Result<Vec<_>>>()?;
        let workspace = uninitialised(device, DType::U8, &[WORKSPACE])?;
        let (lt, dnn) = match choice {
            KernelChoice::Own => (None, None),
            KernelChoice::Auto | KernelChoice::Library => (Lt::open(), Dnn::open(&stream)),
        };
        tracing::info!(
            card = context.name().unwrap_or_default(),
            multiprocessors,
            kernels = %choice,
            cublaslt = lt.is_some(),
            cudnn = dnn.as_ref().map(|_| Dnn::version()),
            "CUDA engine ready"
        );
        Ok(Self {
            device: device.clone(),
            stream,
            modules,
            functions: HashMap::new(),
            multiprocessors,
            choice,
            workspace,
            staging: None,
            lt,
            dnn,
            linear: HashMap::new(),
            fp8: HashMap::new(),
            convolutions: HashMap::new(),
            attentions: HashMap::new(),
        })
    }

    pub(super) fn device(&self) -> &CudaDevice {
        &self.device
    }

    pub(super) fn stream(&self) -> &CudaStream {
        &self.stream
    }

    /// Address of [`WORKSPACE`] bytes, for what is queued next.
    pub(super) fn workspace(&self) -> u64 {
        self.workspace.address()
    }

    /// Whether launches are being recorded.
    pub(super) fn is_capturing(&self) -> bool {
        let none = CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        self.stream
            .capture_status()
            .is_ok_and(|status| status != none)
    }

    /// Queues a kernel of ours.
    pub(super) fn launch(&mut self, name: &str, grid: Grid, args: &[Arg]) -> Result<()> {
        let function = self.function(name, grid.shared)?;
        let mut cells: Vec<Cell> = args.iter().map(|arg| Cell::from(*arg)).collect();
        let mut pointers: Vec<*mut c_void> = cells
            .iter_mut()
            .map(|cell| std::ptr::from_mut(cell).cast())
            .collect();
        let [x, y, z] = grid.blocks.map(|blocks| blocks as u32);
        // SAFETY: the caller passes what the signature in `kernels/README.md` has, with addresses of tensors that live on this
        // device; each pointer leads to a parameter that outlives the call.
        unsafe {
            result::launch_kernel(
                function.cu_function(),
                (x, y, z),
                (grid.threads as u32, 1, 1),
                grid.shared as u32,
                self.stream.cu_stream(),
                &mut pointers,
            )
        }
        .w()
    }

    fn function(&mut self, name: &str, shared: usize) -> Result<CudaFunction> {
        self.stream.context().bind_to_thread().w()?;
        if let Some(function) = self.functions.get(name) {
            return Ok(function.clone());
        }
        let found = self
            .modules
            .iter()
            .find_map(|module| module.load_function(name).ok());
        let Some(function) = found else {
            bail!("no kernel `{name}` in this build")
        };
        if shared > FREE_SHARED {
            let most = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function.set_attribute(most, shared as i32).w()?;
        }
        self.functions.insert(name.to_string(), function.clone());
        Ok(function)
    }

    /// Queues a layer by the fastest way known for its shape. On first use, outside recordings, the library's `candidates` and our
    /// kernel contend; `plans` is where the winner is kept, `queue` runs a plan (`None` = ours).
    pub(super) fn run_planned<K: Eq + Hash + Copy, P>(
        &mut self,
        (kind, key): (Kind, K),
        plans: fn(&mut Self) -> &mut Plans<K, P>,
        candidates: impl FnOnce(&Self) -> Result<Vec<P>>,
        queue: impl Fn(&mut Self, Option<&P>) -> Result<Operand>,
    ) -> Result<Tensor> {
        if !plans(self).contains_key(&key) && !self.is_capturing() {
            let candidates = candidates(self)?;
            let best = self.choose(kind, candidates, &queue)?;
            plans(self).insert(key, best);
        }
        // Taken out for the run, because the run needs the engine too.
        let plan = plans(self).remove(&key);
        let out = queue(self, plan.as_ref().and_then(Option::as_ref));
        if let Some(plan) = plan {
            plans(self).insert(key, plan);
        }
        Ok(out?.into())
    }

    /// Which of the library's `candidates` runs; `None` = ours. `run` queues a candidate (`None` = ours) and returns its result.
    fn choose<C>(
        &mut self,
        kind: Kind,
        mut candidates: Vec<C>,
        mut run: impl FnMut(&mut Self, Option<&C>) -> Result<Operand>,
    ) -> Result<Option<C>> {
        match select::contest(self.choice, candidates.len()) {
            Contest::Own => Ok(None),
            Contest::First => Ok(Some(candidates.swap_remove(0))),
            Contest::Measure => {
                let want = sampled(&run(self, None)?)?;
                let own = self.time(|engine| run(engine, None))?;
                let mut trials = Vec::with_capacity(candidates.len());
                for candidate in &candidates {
                    trials.push(self.trial(&want, |engine| run(engine, Some(candidate))));
                }
                let best = select::fastest(kind, own, &trials);
                let wrong = |trial: &Trial| trial.difference > select::tolerance(kind);
                if trials.iter().all(wrong) {
                    tracing::warn!(
                        ?trials,
                        "no candidate of the library agrees with our kernel, which runs"
                    );
                }
                tracing::debug!(own, ?trials, ?best, "kernels compared");
                Ok(best.map(|index| candidates.swap_remove(index)))
            }
        }
    }

    /// A candidate that fails is infinitely wrong.
    fn trial(&mut self, want: &[f32], mut run: impl FnMut(&mut Self) -> Result<Operand>) -> Trial {
        let mut measured = || -> Result<Trial> {
            let got = sampled(&run(self)?)?;
            Ok(Trial {
                difference: select::difference(want, &got),
                milliseconds: self.time(&mut run)?,
            })
        };
        measured().unwrap_or_else(|error| {
            tracing::debug!(%error, "a candidate does not run");
            Trial {
                difference: f32::INFINITY,
                milliseconds: f32::INFINITY,
            }
        })
    }

    /// Milliseconds that a run takes on the card.
    fn time(&mut self, mut run: impl FnMut(&mut Self) -> Result<Operand>) -> Result<f32> {
        run(self)?;
        let mut times = Vec::with_capacity(RUNS);
        for _ in 0..RUNS {
            let context = self.stream.context().clone();
            let event = || context.new_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
            let (begin, end) = (event().w()?, event().w()?);
            begin.record(&self.stream).w()?;
            run(self)?;
            end.record(&self.stream).w()?;
            times.push(begin.elapsed_ms(&end).w()?);
        }
        Ok(select::median(&mut times))
    }
}

/// Some values of a result, on the host.
fn sampled(result: &Operand) -> Result<Vec<f32>> {
    let flat = result.tensor().flatten_all()?;
    let mut values = Vec::new();
    for (offset, len) in select::samples(flat.elem_count()) {
        let part = flat.narrow(0, offset, len)?.to_dtype(DType::F32)?;
        values.extend(part.to_vec1::<f32>()?);
    }
    Ok(values)
}
