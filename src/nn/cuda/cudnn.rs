//! cuDNN's backend API: an operation graph of tensors becomes plans, of which each runs on a set of addresses.
//!
//! A descriptor is made, given attributes and finalised, after which it does not change (NVIDIA, cuDNN backend API). The library is
//! optional: where it is missing, or too old for an operation, there are no plans and ours runs.
#![allow(unsafe_code, reason = "calls cuDNN")]

use std::ffi::c_void;
use std::sync::Arc;

use candle_core::{Error, Result};
use cudarc::cudnn::result as dnn;
use cudarc::cudnn::sys;
use cudarc::driver::CudaStream;
pub(super) use sys::cudnnBackendAttributeName_t as Attribute;
use sys::cudnnBackendAttributeType_t as Type;
pub(super) use sys::cudnnBackendDescriptorType_t as Kind;

use super::engine::{Engine, WORKSPACE};
use super::geometry;

/// Plans that are tried.
const CANDIDATES: usize = 5;

/// The library's handle.
pub(super) struct Dnn {
    handle: sys::cudnnHandle_t,
}

// SAFETY: a handle may move between threads; the engine lets in one at a time.
unsafe impl Send for Dnn {}

impl Dnn {
    /// `None` where version 9 of the library is not installed.
    pub(super) fn open(stream: &CudaStream) -> Option<Self> {
        // SAFETY: looks for the library.
        if !unsafe { sys::is_culib_present() } || dnn::get_version() < 90_000 {
            return None;
        }
        let library = Self {
            handle: dnn::create_handle().ok()?,
        };
        // SAFETY: the handle is valid, the stream lives as long as the engine.
        unsafe { dnn::set_stream(library.handle, stream.cu_stream().cast()) }.ok()?;
        Some(library)
    }

    /// As the library counts: 91900 is 9.19.
    pub(super) fn version() -> usize {
        dnn::get_version()
    }
}

impl Drop for Dnn {
    fn drop(&mut self) {
        // SAFETY: made by `open`, destroyed once. Nothing can be done about a failure.
        let _ = unsafe { dnn::destroy_handle(self.handle) };
    }
}

/// An object of the library.
pub(super) struct Descriptor(sys::cudnnBackendDescriptor_t);

// SAFETY: used by one thread at a time.
unsafe impl Send for Descriptor {}
// SAFETY: not changed after it is finalised.
unsafe impl Sync for Descriptor {}

impl Drop for Descriptor {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once. Nothing can be done about a failure.
        let _ = unsafe { sys::cudnnBackendDestroyDescriptor(self.0) };
    }
}

fn check(status: sys::cudnnStatus_t) -> Result<()> {
    status.result().map_err(Error::wrap)
}

impl Descriptor {
    pub(super) fn new(kind: Kind) -> Result<Self> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: the library writes one pointer.
        check(unsafe { sys::cudnnBackendCreateDescriptor(kind, &raw mut raw) })?;
        Ok(Self(raw))
    }

    fn set<T>(self, name: Attribute, kind: Type, values: &[T]) -> Result<Self> {
        let (count, values) = (values.len() as i64, values.as_ptr().cast::<c_void>());
        // SAFETY: the library copies `count` values of the type that `kind` names.
        check(unsafe { sys::cudnnBackendSetAttribute(self.0, name, kind, count, values) })?;
        Ok(self)
    }

    pub(super) fn integers(self, name: Attribute, values: &[i64]) -> Result<Self> {
        self.set(name, Type::CUDNN_TYPE_INT64, values)
    }

    pub(super) fn float(self, name: Attribute, value: f32) -> Result<Self> {
        self.set(name, Type::CUDNN_TYPE_FLOAT, &[value])
    }

    pub(super) fn data_type(self, name: Attribute, value: sys::cudnnDataType_t) -> Result<Self> {
        self.set(name, Type::CUDNN_TYPE_DATA_TYPE, &[value])
    }

    pub(super) fn flag(self, name: Attribute, value: bool) -> Result<Self> {
        self.set(name, Type::CUDNN_TYPE_BOOLEAN, &[value])
    }

    pub(super) fn descriptors(self, name: Attribute, others: &[&Self]) -> Result<Self> {
        let raw: Vec<_> = others.iter().map(|other| other.0).collect();
        self.set(name, Type::CUDNN_TYPE_BACKEND_DESCRIPTOR, &raw)
    }

    pub(super) fn cross_correlation(self, name: Attribute) -> Result<Self> {
        let mode = sys::cudnnConvolutionMode_t::CUDNN_CROSS_CORRELATION;
        self.set(name, Type::CUDNN_TYPE_CONVOLUTION_MODE, &[mode])
    }

    pub(super) fn addition(self, name: Attribute) -> Result<Self> {
        let mode = sys::cudnnPointwiseMode_t::CUDNN_POINTWISE_ADD;
        self.set(name, Type::CUDNN_TYPE_POINTWISE_MODE, &[mode])
    }

    fn handle(self, name: Attribute, library: &Dnn) -> Result<Self> {
        self.set(name, Type::CUDNN_TYPE_HANDLE, &[library.handle])
    }

    pub(super) fn finalise(self) -> Result<Self> {
        // SAFETY: a valid descriptor.
        check(unsafe { sys::cudnnBackendFinalize(self.0) })?;
        Ok(self)
    }

    /// One integer attribute.
    fn integer(&self, name: Attribute) -> Result<i64> {
        let (mut value, mut count) = (0i64, 0i64);
        let into = (&raw mut value).cast();
        // SAFETY: the library writes at most the one value asked for.
        check(unsafe {
            sys::cudnnBackendGetAttribute(
                self.0,
                name,
                Type::CUDNN_TYPE_INT64,
                1,
                &raw mut count,
                into,
            )
        })?;
        Ok(value)
    }
}

/// f32 in the library's words: what everything is summed in.
pub(super) const SINGLE: sys::cudnnDataType_t = sys::cudnnDataType_t::CUDNN_DATA_FLOAT;

/// A tensor of a graph.
#[derive(Clone, Copy)]
pub(super) struct TensorOf<'a> {
    /// Its name in the plan.
    pub(super) id: i64,
    pub(super) kind: geometry::Kind,
    pub(super) dims: &'a [i64],
    pub(super) strides: &'a [i64],
    pub(super) place: Place,
}

/// Where a graph's tensor is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    Device,
    /// A number on the host, read when the plan is run.
    Host,
    /// Between two operations, in f32; never in memory.
    Nowhere,
}

impl TensorOf<'_> {
    pub(super) fn build(self) -> Result<Descriptor> {
        let kind = match (self.place, self.kind) {
            (Place::Nowhere | Place::Host, _) | (_, geometry::Kind::F32) => SINGLE,
            (_, geometry::Kind::F16) => sys::cudnnDataType_t::CUDNN_DATA_HALF,
            (_, geometry::Kind::Bf16) => sys::cudnnDataType_t::CUDNN_DATA_BFLOAT16,
        };
        Descriptor::new(Kind::CUDNN_BACKEND_TENSOR_DESCRIPTOR)?
            .integers(Attribute::CUDNN_ATTR_TENSOR_UNIQUE_ID, &[self.id])?
            .data_type(Attribute::CUDNN_ATTR_TENSOR_DATA_TYPE, kind)?
            .integers(Attribute::CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, &[16])?
            .integers(Attribute::CUDNN_ATTR_TENSOR_DIMENSIONS, self.dims)?
            .integers(Attribute::CUDNN_ATTR_TENSOR_STRIDES, self.strides)?
            .flag(
                Attribute::CUDNN_ATTR_TENSOR_IS_VIRTUAL,
                self.place == Place::Nowhere,
            )?
            .flag(
                Attribute::CUDNN_ATTR_TENSOR_IS_BY_VALUE,
                self.place == Place::Host,
            )?
            .finalise()
    }
}

/// A way to run a graph.
pub(super) struct Plan {
    plan: Descriptor,
    /// What the plan was made of.
    _parts: Arc<Vec<Descriptor>>,
}

impl Dnn {
    /// The library's plans for a graph that fit the workspace, best first. `operations` are the graph's nodes in order, `parts` what else
    /// they refer to.
    pub(super) fn plans(
        &self,
        operations: Vec<Descriptor>,
        parts: Vec<Descriptor>,
    ) -> Result<Vec<Plan>> {
        let nodes: Vec<&Descriptor> = operations.iter().collect();
        let graph = Descriptor::new(Kind::CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR)?
            .handle(Attribute::CUDNN_ATTR_OPERATIONGRAPH_HANDLE, self)?
            .descriptors(Attribute::CUDNN_ATTR_OPERATIONGRAPH_OPS, &nodes)?
            .finalise()?;
        let heuristics = Descriptor::new(Kind::CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR)?
            .descriptors(Attribute::CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, &[&graph])?
            .set(
                Attribute::CUDNN_ATTR_ENGINEHEUR_MODE,
                Type::CUDNN_TYPE_HEUR_MODE,
                &[sys::cudnnBackendHeurMode_t::CUDNN_HEUR_MODE_A],
            )?
            .finalise()?;
        let configurations = configurations(&heuristics)?;
        let mut parts = parts;
        parts.extend(operations);
        parts.extend([graph, heuristics]);
        let parts = Arc::new(parts);
        Ok(configurations
            .into_iter()
            .filter_map(|configuration| self.plan(&configuration, &parts).ok().flatten())
            .collect())
    }

    fn plan(
        &self,
        configuration: &Descriptor,
        parts: &Arc<Vec<Descriptor>>,
    ) -> Result<Option<Plan>> {
        let plan = Descriptor::new(Kind::CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR)?
            .handle(Attribute::CUDNN_ATTR_EXECUTION_PLAN_HANDLE, self)?
            .descriptors(
                Attribute::CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG,
                &[configuration],
            )?
            .finalise()?;
        let scratch = plan.integer(Attribute::CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE)?;
        Ok((scratch <= WORKSPACE as i64).then(|| Plan {
            plan,
            _parts: parts.clone(),
        }))
    }
}

/// What the heuristics suggest.
fn configurations(heuristics: &Descriptor) -> Result<Vec<Descriptor>> {
    let mut found = (0..CANDIDATES)
        .map(|_| Descriptor::new(Kind::CUDNN_BACKEND_ENGINECFG_DESCRIPTOR))
        .collect::<Result<Vec<_>>>()?;
    let mut raw: Vec<_> = found.iter().map(|descriptor| descriptor.0).collect();
    let mut count = 0i64;
    // SAFETY: the library fills the descriptors handed in, at most as many as there are.
    check(unsafe {
        sys::cudnnBackendGetAttribute(
            heuristics.0,
            Attribute::CUDNN_ATTR_ENGINEHEUR_RESULTS,
            Type::CUDNN_TYPE_BACKEND_DESCRIPTOR,
            CANDIDATES as i64,
            &raw mut count,
            raw.as_mut_ptr().cast(),
        )
    })?;
    found.truncate(count.clamp(0, CANDIDATES as i64) as usize);
    Ok(found)
}

impl Plan {
    /// Queues the plan; `at` names each tensor that is not nowhere, with its address on its side.
    pub(super) fn run(&self, engine: &Engine, at: &[(i64, u64)]) -> Result<()> {
        let Some(library) = &engine.dnn else {
            candle_core::bail!("a plan of cuDNN without the library")
        };
        let ids: Vec<i64> = at.iter().map(|(id, _)| *id).collect();
        let addresses: Vec<u64> = at.iter().map(|(_, address)| *address).collect();
        let pack = Descriptor::new(Kind::CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR)?
            .integers(Attribute::CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, &ids)?
            .set(
                Attribute::CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS,
                Type::CUDNN_TYPE_VOID_PTR,
                &addresses,
            )?
            .set(
                Attribute::CUDNN_ATTR_VARIANT_PACK_WORKSPACE,
                Type::CUDNN_TYPE_VOID_PTR,
                &[engine.workspace()],
            )?
            .finalise()?;
        // SAFETY: plan and pack are finalised; the addresses are of live tensors of the described shapes; the workspace is the engine's,
        // whose operations follow each other on one stream.
        check(unsafe { sys::cudnnBackendExecute(library.handle, self.plan.0, pack.0) })
    }
}

/// The library's plans; none where it is absent or cannot do what is asked, since our kernel can.
pub(super) fn or_none<P>(
    library: Option<&Dnn>,
    plans: impl FnOnce(&Dnn) -> Result<Vec<P>>,
) -> Vec<P> {
    let made = library.map_or(Ok(Vec::new()), plans);
    made.unwrap_or_else(|error| {
        tracing::debug!(%error, "cuDNN has no plan");
        Vec::new()
    })
}
