//! The cards of this machine: opening one, its memory, and what running out of it looks like.

use candle_core::Device;

#[cfg(not(feature = "cuda"))]
use super::absent as card;
#[cfg(feature = "cuda")]
use super::card;
use super::choice::KernelChoice;

/// The number of cards, at least 1.
///
/// # Errors
/// Why none can be used.
pub fn count() -> Result<usize, String> {
    card::count()
}

/// Opens a card.
///
/// # Errors
/// Says what is missing.
pub fn open(ordinal: usize, choice: KernelChoice) -> Result<Device, String> {
    let count = count()?;
    if ordinal >= count {
        return Err(format!(
            "this machine has {count} CUDA device{}, counted from 0",
            if count == 1 { "" } else { "s" }
        ));
    }
    card::open(ordinal, choice).map_err(|error| error.to_string())
}

/// The card's name; `None` for other devices.
#[must_use]
pub fn name(device: &Device) -> Option<String> {
    match device {
        Device::Cuda(device) => Some(card::name(device)),
        _ => None,
    }
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

/// Bytes that a card has; `None` for other devices and where the driver does not say.
#[must_use]
pub fn total_memory(device: &Device) -> Option<u64> {
    match device {
        Device::Cuda(device) => card::total_memory(device),
        _ => None,
    }
}

/// What lies in a card's memory, bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// Of the whole card, by everything that runs on it, with what this process keeps without using it.
    pub taken: u64,
    /// What tensors and recordings of this process use.
    pub used: u64,
    /// The most they used since [`watch_memory`]. Tensors and recordings peak apart, so this is an upper bound.
    pub peak: u64,
}

/// What lies in a card's memory; `None` for other devices and where the driver does not say.
#[must_use]
pub fn memory(device: &Device) -> Option<Memory> {
    match device {
        Device::Cuda(device) => card::memory(device),
        _ => None,
    }
}

/// From here on [`Memory::peak`] counts. Does nothing on other devices.
pub fn watch_memory(device: &Device) {
    if let Device::Cuda(device) = device {
        card::watch_memory(device);
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
        if let Err(why) = count() {
            assert_eq!(open(0, KernelChoice::Auto).unwrap_err(), why);
            let known = ["no CUDA support", "driver", "lib"];
            assert!(known.iter().any(|word| why.contains(word)), "{why}");
        }
        assert_eq!(free_memory(&Device::Cpu), None);
        assert_eq!(total_memory(&Device::Cpu), None);
        watch_memory(&Device::Cpu);
        assert_eq!(memory(&Device::Cpu), None);
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
