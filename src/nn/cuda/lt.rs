//! cublasLt: products with bias and residual in one launch, by the algorithms its heuristics suggest for a shape.
//!
//! A row major `y [m, n] = x [m, k] wᵀ` is, in the library's column major terms, `yᵀ [n, m] = w [n, k] xᵀ`: the weight comes first,
//! transposed, and its rows are the rows of the result, which is why a bias per output is the library's bias.
#![allow(unsafe_code, reason = "calls cublasLt")]

use std::ffi::c_void;

use candle_core::{Error, Result};
use cudarc::cublaslt::result as lt;
use cudarc::cublaslt::sys;
use sys::cublasLtMatmulDescAttributes_t as Attribute;

use super::engine::{Engine, WORKSPACE};
use super::geometry::Kind;

/// Suggestions that are tried.
const CANDIDATES: usize = 6;

/// The library's handle.
pub(super) struct Lt {
    handle: sys::cublasLtHandle_t,
}

// SAFETY: the library's documentation allows a handle in any thread; the engine lets in one at a time.
unsafe impl Send for Lt {}

impl Lt {
    /// `None` where the library is not installed.
    pub(super) fn open() -> Option<Self> {
        // SAFETY: looks for the library.
        if !unsafe { sys::is_culib_present() } {
            return None;
        }
        let handle = lt::create_handle().ok()?;
        Some(Self { handle })
    }
}

impl Drop for Lt {
    fn drop(&mut self) {
        // SAFETY: made by `open`, destroyed once. Nothing can be done about a failure.
        let _ = unsafe { lt::destroy_handle(self.handle) };
    }
}

/// The type of what is multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Factors {
    /// That of the result.
    OfKind,
    /// e4m3, whose sums are stored in f32.
    E4m3,
    /// e4m3, whose sums are multiplied by a scale per row and one per column.
    E4m3Scaled,
}

/// `y = x wᵀ [+ bias] [+ residual]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Matmul {
    pub(super) kind: Kind,
    pub(super) factors: Factors,
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) k: usize,
    /// Values from one row of the weight to the next.
    pub(super) weight_stride: usize,
    pub(super) bias: bool,
    pub(super) residual: bool,
}

/// Addresses of a product's operands; 0 = none.
#[derive(Clone, Copy)]
pub(super) struct Addresses {
    pub(super) x: u64,
    pub(super) weight: u64,
    /// Of the weight's rows, then of x's; f32.
    pub(super) scales: [u64; 2],
    pub(super) bias: u64,
    pub(super) residual: u64,
    pub(super) out: u64,
}

/// A product as the library describes it, with one algorithm.
pub(super) struct Algorithm {
    description: Description,
    suggestion: sys::cublasLtMatmulAlgo_t,
    matmul: Matmul,
}

/// The library's descriptors, destroyed with this.
struct Description {
    matmul: sys::cublasLtMatmulDesc_t,
    weight: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    out: sys::cublasLtMatrixLayout_t,
}

// SAFETY: plain memory of the library, used by one thread at a time.
unsafe impl Send for Description {}

impl Drop for Description {
    fn drop(&mut self) {
        // SAFETY: made by `Description::new`, destroyed once. Nothing can be done about a failure.
        unsafe {
            let _ = lt::destroy_matmul_desc(self.matmul);
            for layout in [self.weight, self.x, self.out] {
                let _ = lt::destroy_matrix_layout(layout);
            }
        }
    }
}

fn data_type(kind: Kind) -> sys::cudaDataType {
    match kind {
        Kind::F32 => sys::cudaDataType::CUDA_R_32F,
        Kind::F16 => sys::cudaDataType::CUDA_R_16F,
        Kind::Bf16 => sys::cudaDataType::CUDA_R_16BF,
    }
}

impl Description {
    fn new(matmul: Matmul) -> Result<Self> {
        let kind = data_type(matmul.kind);
        let e4m3 = sys::cudaDataType::CUDA_R_8F_E4M3;
        let (input, output) = match matmul.factors {
            Factors::OfKind => (kind, kind),
            Factors::E4m3 => (e4m3, sys::cudaDataType::CUDA_R_32F),
            Factors::E4m3Scaled => (e4m3, kind),
        };
        // f32 stays f32: TF32 keeps 10 bits, too few for pictures to equal the CPU's.
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let wrap = |error: lt::CublasError| Error::wrap(error);
        let apart = |kind, rows: usize, columns: usize, stride: usize| {
            lt::create_matrix_layout(kind, rows as u64, columns as u64, stride as i64).map_err(wrap)
        };
        let layout = |kind, rows, columns| apart(kind, rows, columns, rows);
        let description = Self {
            matmul: lt::create_matmul_desc(compute, sys::cudaDataType::CUDA_R_32F).map_err(wrap)?,
            weight: apart(input, matmul.k, matmul.n, matmul.weight_stride)?,
            x: layout(input, matmul.k, matmul.m)?,
            out: layout(output, matmul.n, matmul.m)?,
        };
        let transposed = cudarc::cublas::sys::cublasOperation_t::CUBLAS_OP_T;
        description.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &transposed)?;
        if matmul.factors == Factors::E4m3Scaled {
            let vectors =
                sys::cublasLtMatmulMatrixScale_t::CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
            description.set(Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_MODE, &vectors)?;
            description.set(Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_MODE, &vectors)?;
        }
        if matmul.bias {
            let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS;
            description.set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
            description.set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &kind)?;
        }
        Ok(description)
    }

    /// Scales of the weight's rows and of x's.
    fn scale(&self, [weight, x]: [u64; 2]) -> Result<()> {
        self.set(Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &weight)?;
        self.set(Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &x)
    }

    fn set<T>(&self, name: Attribute, value: &T) -> Result<()> {
        let (value, size) = (std::ptr::from_ref(value).cast::<c_void>(), size_of::<T>());
        // SAFETY: the library copies `size` bytes, which is the size of that attribute.
        unsafe { lt::set_matmul_desc_attribute(self.matmul, name, value, size) }
            .map_err(Error::wrap)
    }
}

impl Lt {
    /// The library's suggestions for a shape, best first; none if it has none.
    pub(super) fn suggestions(&self, matmul: Matmul) -> Result<Vec<Algorithm>> {
        self.suggested(matmul, &Description::new(matmul)?)
    }

    /// [`Self::suggestions`] of a product with scales, which must be known to be asked for. A library or card that refuses such scales
    /// has none.
    pub(super) fn scaled_suggestions(
        &self,
        matmul: Matmul,
        scales: [u64; 2],
    ) -> Result<Vec<Algorithm>> {
        let described = Description::new(matmul).and_then(|description| {
            description.scale(scales)?;
            Ok(description)
        });
        match described {
            Ok(description) => self.suggested(matmul, &description),
            Err(error) => {
                tracing::debug!(%error, "cublasLt takes no scales of rows and columns");
                Ok(Vec::new())
            }
        }
    }

    fn suggested(&self, matmul: Matmul, description: &Description) -> Result<Vec<Algorithm>> {
        let preference = lt::create_matmul_pref().map_err(Error::wrap)?;
        let mut found: Vec<sys::cublasLtMatmulHeuristicResult_t> = Vec::with_capacity(CANDIDATES);
        let mut count = 0;
        let most =
            sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        // SAFETY: the descriptors live; the library writes at most CANDIDATES results and says how many.
        let status = unsafe {
            let size = WORKSPACE;
            let limited = lt::set_matmul_pref_attribute(
                preference,
                most,
                std::ptr::from_ref(&size).cast(),
                size_of::<usize>(),
            );
            let status = sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                description.matmul,
                description.weight,
                description.x,
                description.out,
                description.out,
                preference,
                CANDIDATES as i32,
                found.as_mut_ptr(),
                &raw mut count,
            );
            found.set_len(count.clamp(0, CANDIDATES as i32) as usize);
            let _ = lt::destroy_matmul_pref(preference);
            limited.and(status.result())
        };
        if let Err(error) = status {
            tracing::debug!(?matmul, %error, "cublasLt has no suggestion");
            return Ok(Vec::new());
        }
        found.retain(|found| found.state.result().is_ok());
        found
            .iter()
            .map(|found| {
                Ok(Algorithm {
                    description: Description::new(matmul)?,
                    suggestion: found.algo,
                    matmul,
                })
            })
            .collect()
    }
}

impl Algorithm {
    /// Queues the product.
    pub(super) fn run(&self, engine: &Engine, at: Addresses) -> Result<()> {
        let Some(library) = &engine.lt else {
            candle_core::bail!("an algorithm of cublasLt without the library")
        };
        if self.matmul.factors == Factors::E4m3Scaled {
            self.description.scale(at.scales)?;
        }
        if self.matmul.bias {
            let pointer = Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER;
            self.description.set(pointer, &at.bias)?;
        }
        let (one, beta) = (1f32, if self.matmul.residual { 1f32 } else { 0.0 });
        let before = if self.matmul.residual {
            at.residual
        } else {
            at.out
        };
        // SAFETY: the addresses are of live tensors of the described shapes on this device; the workspace is the engine's, whose
        // operations follow each other on one stream.
        unsafe {
            lt::matmul(
                library.handle,
                self.description.matmul,
                std::ptr::from_ref(&one).cast(),
                std::ptr::from_ref(&beta).cast(),
                at.weight as *const c_void,
                self.description.weight,
                at.x as *const c_void,
                self.description.x,
                before as *const c_void,
                self.description.out,
                at.out as *mut c_void,
                self.description.out,
                &raw const self.suggestion,
                engine.workspace() as *mut c_void,
                WORKSPACE,
                engine.stream().cu_stream().cast(),
            )
        }
        .map_err(Error::wrap)
    }
}
