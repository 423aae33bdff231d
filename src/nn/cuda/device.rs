//! The cards of this machine: opening one, its memory, and what running out of it looks like.

use candle_core::Device;

#[cfg(not(feature = "cuda"))]
use super::absent as card;
#[cfg(feature = "cuda")]
use super::card;
use super::choice::KernelChoice;

/// Why no card can be used; `None` if one can.
#[must_use]
pub fn unavailable() -> Option<String> {
    card::count().err()
}

/// Opens a card.
///
/// # Errors
/// Says what is missing.
pub fn open(ordinal: usize, choice: KernelChoice) -> Result<Device, String> {
    let count = card::count()?;
    if ordinal >= count {
        return Err(format!(
            "this machine has {count} CUDA device{}, counted from 0",
            if count == 1 { "" } else { "s" }
        ));
    }
    card::open(ordinal, choice).map_err(|error| error.to_string())
}

/// Why a card cannot multiply e4m3; `None` if it can, and for the CPU.
#[must_use]
pub fn no_e4m3(device: &Device) -> Option<String> {
    match device {
        Device::Cuda(device) => card::no_e4m3(device),
        _ => None,
    }
}

/// Bytes that may be allocated on a card; `None` for other devices and where the driver does not say.
#[must_use]
pub fn free_memory(device: &Device) -> Option<u64> {
    match device {
        Device::Cuda(device) => card::free_memory(device),
        _ => None,
    }
}

/// Gives back what a card keeps for the next operation, after waiting for the last. Does nothing on other devices.
pub fn release_cached(device: &Device) {
    if let Device::Cuda(device) = device {
        card::release_cached(device);
    }
}

/// Whether a card ran out of memory. candle boxes the driver's error, whose name its text begins with.
#[must_use]
pub fn is_out_of_memory(error: &candle_core::Error) -> bool {
    let text = error.to_string();
    [
        "CUDA_ERROR_OUT_OF_MEMORY",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "CUDNN_STATUS_ALLOC_FAILED",
    ]
    .iter()
    .any(|name| text.contains(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_a_driver_says_so_instead_of_panicking() {
        if let Some(why) = unavailable() {
            assert_eq!(open(0, KernelChoice::Auto).unwrap_err(), why);
            let known = ["no CUDA support", "driver", "lib"];
            assert!(known.iter().any(|word| why.contains(word)), "{why}");
        }
        assert_eq!(free_memory(&Device::Cpu), None);
    }

    #[test]
    fn running_out_of_memory_is_told_from_other_errors() {
        let driver = "DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")";
        assert!(is_out_of_memory(&candle_core::Error::msg(driver)));
        let wrapped = candle_core::Error::Cuda(driver.into()).bt();
        assert!(
            is_out_of_memory(&wrapped.context("decoding")),
            "under a context"
        );
        let other = "DriverError(CUDA_ERROR_ILLEGAL_ADDRESS, \"illegal address\")";
        assert!(!is_out_of_memory(&candle_core::Error::msg(other)));
    }
}
