//! Opening a card, and its memory.
#![allow(unsafe_code, reason = "asks the driver")]

use candle_core::{CudaDevice, Device, Result};
use cudarc::driver::sys::{self, CUgraphMem_attribute, CUmemPool_attribute};
use cudarc::driver::{CudaContext, result};

use super::choice::KernelChoice;
use super::device::Memory;
use super::engine;

/// Libraries without which candle's device would panic: what is missing, and what brings it.
fn missing_library() -> Option<&'static str> {
    // SAFETY: each looks for a library.
    unsafe {
        if !sys::is_culib_present() {
            return Some("this machine has no NVIDIA driver (`libcuda.so.1`)");
        }
        if !cudarc::cublas::sys::is_culib_present() {
            return Some(
                "`libcublas.so.13` is not found: install CUDA 13's libraries or name their directory in `LD_LIBRARY_PATH`",
            );
        }
        if !cudarc::curand::sys::is_culib_present() {
            return Some(
                "`libcurand.so.10` is not found: install CUDA 13's libraries or name their directory in `LD_LIBRARY_PATH`",
            );
        }
    }
    None
}

/// The number of cards, or why there is none.
pub(super) fn count() -> std::result::Result<usize, String> {
    if let Some(missing) = missing_library() {
        return Err(missing.to_string());
    }
    match CudaContext::device_count() {
        Ok(0) => Err("the driver knows no CUDA device".to_string()),
        Ok(count) => Ok(count.unsigned_abs() as usize),
        Err(error) => Err(format!("the NVIDIA driver does not work: {error}")),
    }
}

/// Opens a card that exists.
pub(super) fn open(ordinal: usize, choice: KernelChoice) -> Result<Device> {
    // A stream of its own: candle's default is another one in every thread, and only real streams can be captured.
    let device = CudaDevice::new_with_stream(ordinal)?;
    // SAFETY: everything goes to that one stream, so nothing has to wait for another stream's events.
    unsafe { device.disable_event_tracking() };
    keep_freed_memory(&device);
    engine::register(&device, choice)?;
    Ok(Device::Cuda(device))
}

/// Why a card cannot multiply e4m3 with the speed that is its point; `None` if it can.
pub(super) fn no_e4m3(device: &CudaDevice) -> Option<String> {
    let stream = device.cuda_stream();
    match stream.context().compute_capability() {
        Ok(found) if found >= (8, 9) => {}
        Ok((major, minor)) => {
            return Some(format!(
                "8-bit floats need compute capability 8.9 or newer, this card has {major}.{minor}"
            ));
        }
        Err(error) => return Some(format!("the card does not tell what it can: {error}")),
    }
    // SAFETY: looks for the library.
    let found = unsafe { cudarc::cublaslt::sys::is_culib_present() };
    (!found).then(|| "8-bit floats need `libcublasLt.so.13`, which is not found".to_string())
}

fn pool(device: &CudaDevice) -> Option<sys::CUmemoryPool> {
    let stream = device.cuda_stream();
    stream.context().bind_to_thread().ok()?;
    // SAFETY: a device that is open.
    unsafe { result::device::get_default_mem_pool(stream.context().cu_device()) }.ok()
}

/// Lets the pool keep what is freed: its default gives everything back at each synchronisation and asks for it again.
fn keep_freed_memory(device: &CudaDevice) {
    let Some(pool) = pool(device) else { return };
    let mut most = u64::MAX;
    let threshold = CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: the attribute is a `u64`.
    let status = unsafe { sys::cuMemPoolSetAttribute(pool, threshold, (&raw mut most).cast()) };
    if let Err(error) = status.result() {
        tracing::warn!(%error, "the CUDA memory pool gives freed memory back at each step");
    }
}

/// An attribute of the pool, bytes.
fn pool_bytes(pool: sys::CUmemoryPool, attribute: CUmemPool_attribute) -> u64 {
    let mut bytes = 0u64;
    // SAFETY: the attribute is a `u64`.
    let status = unsafe { sys::cuMemPoolGetAttribute(pool, attribute, (&raw mut bytes).cast()) };
    status.result().map_or(0, |()| bytes)
}

/// Bytes that the card has.
pub(super) fn total_memory(device: &CudaDevice) -> Option<u64> {
    let (_, total) = device.cuda_stream().context().mem_get_info().ok()?;
    Some(total as u64)
}

/// An attribute of the memory of recordings, bytes.
fn graph_bytes(device: &CudaDevice, attribute: CUgraphMem_attribute) -> u64 {
    let mut bytes = 0u64;
    let card = device.cuda_stream().context().cu_device();
    // SAFETY: a device that is open; the attribute is a `u64`.
    let status =
        unsafe { sys::cuDeviceGetGraphMemAttribute(card, attribute, (&raw mut bytes).cast()) };
    status.result().map_or(0, |()| bytes)
}

pub(super) fn name(device: &CudaDevice) -> String {
    device.cuda_stream().context().name().unwrap_or_default()
}

/// See [`Memory`].
pub(super) fn memory(device: &CudaDevice) -> Option<Memory> {
    let (free, total) = device.cuda_stream().context().mem_get_info().ok()?;
    let pool = pool(device)?;
    let now = CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT;
    let high = CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
    let graphs_now = CUgraphMem_attribute::CU_GRAPH_MEM_ATTR_USED_MEM_CURRENT;
    let graphs_high = CUgraphMem_attribute::CU_GRAPH_MEM_ATTR_USED_MEM_HIGH;
    Some(Memory {
        taken: total.saturating_sub(free) as u64,
        used: pool_bytes(pool, now) + graph_bytes(device, graphs_now),
        peak: pool_bytes(pool, high) + graph_bytes(device, graphs_high),
    })
}

/// Resets what [`memory`] calls the peak.
pub(super) fn watch_memory(device: &CudaDevice) {
    let Some(pool) = pool(device) else { return };
    let card = device.cuda_stream().context().cu_device();
    let mut zero = 0u64;
    let high = CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
    let graphs_high = CUgraphMem_attribute::CU_GRAPH_MEM_ATTR_USED_MEM_HIGH;
    // SAFETY: an open device and its pool; both attributes are `u64` and can be set to 0 only.
    let (of_pool, of_graphs) = unsafe {
        (
            sys::cuMemPoolSetAttribute(pool, high, (&raw mut zero).cast()),
            sys::cuDeviceSetGraphMemAttribute(card, graphs_high, (&raw mut zero).cast()),
        )
    };
    if let Err(error) = of_pool.result().and(of_graphs.result()) {
        tracing::warn!(%error, "the CUDA driver does not reset the peak of memory");
    }
}

/// Bytes that may be allocated: what the card has left and what the pool keeps for us.
pub(super) fn free_memory(device: &CudaDevice) -> Option<u64> {
    let (free, _) = device.cuda_stream().context().mem_get_info().ok()?;
    let idle = pool(device).map_or(0, |pool| {
        let reserved = pool_bytes(
            pool,
            CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT,
        );
        let used = pool_bytes(pool, CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT);
        reserved.saturating_sub(used)
    });
    Some(free as u64 + idle)
}

/// Gives kept memory back to the card, once everything queued is done.
pub(super) fn release_cached(device: &CudaDevice) {
    let stream = device.cuda_stream();
    // An error that a failed launch left behind must not meet the next job.
    let _ = stream.context().check_err();
    if let Err(error) = stream.synchronize() {
        tracing::warn!(%error, "the CUDA device does not come to rest");
        return;
    }
    if let Some(pool) = pool(device) {
        // SAFETY: the pool of an open device, at rest.
        unsafe {
            let _ = sys::cuMemPoolTrimTo(pool, 0);
            let _ = sys::cuDeviceGraphMemTrim(stream.context().cu_device());
        }
    }
}
