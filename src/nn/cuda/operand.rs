//! Device addresses of candle's tensors, and tensors for results.
//!
//! An address is valid as long as its tensor lives. Frees go to the same stream as launches, so a tensor may be dropped as soon as
//! the launch that reads it is queued.
#![allow(unsafe_code, reason = "results are allocated without being written")]

use candle_core::backend::BackendDevice;
use candle_core::cuda_backend::CudaStorageSlice;
use candle_core::cuda_backend::cudarc::driver::DevicePtr;
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, D, Device, Result, Storage, Tensor, bail};

use super::geometry::Kind;

/// Boundary that kernels of ours expect a tensor to begin on, bytes.
const ALIGNMENT: u64 = 16;

/// A contiguous tensor and its address.
pub(super) struct Operand {
    tensor: Tensor,
    address: u64,
}

impl Operand {
    /// Copies what is not contiguous or does not begin on a boundary.
    pub(super) fn new(tensor: &Tensor) -> Result<Self> {
        let contiguous = tensor.contiguous()?;
        let address = address(&contiguous)?;
        if address.is_multiple_of(ALIGNMENT) {
            return Ok(Self {
                tensor: contiguous,
                address,
            });
        }
        let tensor = contiguous.force_contiguous()?;
        let address = self::address(&tensor)?;
        Ok(Self { tensor, address })
    }

    /// `[rows, columns]` of the type of another operand, as it lies and how far apart its rows are: columns of a wider tensor are not
    /// copied, if each row begins on a boundary.
    pub(super) fn rows_like(tensor: &Tensor, other: &Tensor) -> Result<(Self, usize)> {
        let columns = tensor.dim(D::Minus1)?;
        if let (&[stride, 1], true) = (tensor.stride(), tensor.dtype() == other.dtype()) {
            let address = address(tensor)?;
            let apart = (stride * tensor.dtype().size_in_bytes()) as u64;
            if address.is_multiple_of(ALIGNMENT) && apart.is_multiple_of(ALIGNMENT) {
                let tensor = tensor.clone();
                return Ok((Self { tensor, address }, stride));
            }
        }
        Ok((Self::like(tensor, other)?, columns))
    }

    /// [`Self::new`] of a tensor that must have type and device of another operand.
    pub(super) fn like(tensor: &Tensor, other: &Tensor) -> Result<Self> {
        if tensor.dtype() != other.dtype() {
            bail!("{:?} beside {:?}", tensor.dtype(), other.dtype());
        }
        Self::new(tensor)
    }

    pub(super) fn address(&self) -> u64 {
        self.address
    }

    pub(super) fn tensor(&self) -> &Tensor {
        &self.tensor
    }
}

/// Tensors of one shape but for their channels, which stand side by side: as many as kernels of ours take.
pub(super) struct Parts {
    pub(super) x: Operand,
    pub(super) x2: Option<Operand>,
    /// Of each.
    pub(super) channels: [usize; 2],
    /// The shape without the channels.
    pub(super) lead: Vec<usize>,
}

impl Parts {
    /// More than two are joined first.
    pub(super) fn new(parts: &[&Tensor]) -> Result<Self> {
        let joined;
        let (x, x2) = match parts {
            [x] => (*x, None),
            [x, x2] => (*x, Some(*x2)),
            many => {
                joined = Tensor::cat(many, D::Minus1)?;
                (&joined, None)
            }
        };
        let mut lead = x.dims().to_vec();
        let Some(channels) = lead.pop() else {
            bail!("a scalar has no channels")
        };
        let beside = match x2 {
            Some(x2) if x2.rank() != x.rank() || !x2.dims().starts_with(&lead) => {
                bail!("{:?} beside {:?}", x2.shape(), x.shape())
            }
            Some(x2) => x2.dim(D::Minus1)?,
            None => 0,
        };
        Ok(Self {
            x: Operand::new(x)?,
            x2: x2.map(|x2| Operand::like(x2, x)).transpose()?,
            channels: [channels, beside],
            lead,
        })
    }
}

/// The address of an optional operand; 0 = none.
pub(super) fn nullable(operand: Option<&Operand>) -> u64 {
    operand.map_or(0, Operand::address)
}

/// Device and type of a tensor that kernels of ours take.
pub(super) fn taken(x: &Tensor) -> Option<(&CudaDevice, Kind)> {
    match (x.device(), Kind::of(x.dtype())) {
        (Device::Cuda(device), Some(kind)) if x.elem_count() > 0 => Some((device, kind)),
        _ => None,
    }
}

/// Where a tensor's first value lies.
pub(super) fn address(tensor: &Tensor) -> Result<u64> {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else {
        bail!("a tensor that is not on a CUDA device")
    };
    let stream = storage.device.cuda_stream();
    let (begin, size) = match &storage.slice {
        CudaStorageSlice::U8(s) => (s.device_ptr(&stream).0, 1),
        CudaStorageSlice::U32(s) => (s.device_ptr(&stream).0, 4),
        CudaStorageSlice::F16(s) => (s.device_ptr(&stream).0, 2),
        CudaStorageSlice::BF16(s) => (s.device_ptr(&stream).0, 2),
        CudaStorageSlice::F32(s) => (s.device_ptr(&stream).0, 4),
        CudaStorageSlice::F64(s) => (s.device_ptr(&stream).0, 8),
        _ => bail!("no kernel takes {:?}", tensor.dtype()),
    };
    Ok(begin + (layout.start_offset() * size) as u64)
}

/// A result whose values are yet to be written.
pub(super) fn result(device: &CudaDevice, kind: Kind, shape: &[usize]) -> Result<Operand> {
    uninitialised(device, kind.dtype(), shape)
}

/// [`result`] of any type.
pub(super) fn uninitialised(
    device: &CudaDevice,
    dtype: candle_core::DType,
    shape: &[usize],
) -> Result<Operand> {
    // SAFETY: every kernel writes the whole of its result before anything that is queued later reads it.
    let storage: CudaStorage = unsafe { device.alloc_uninit(&shape.into(), dtype) }?;
    let tensor = Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false);
    let address = address(&tensor)?;
    Ok(Operand { tensor, address })
}

impl From<Operand> for Tensor {
    fn from(operand: Operand) -> Self {
        operand.tensor
    }
}
