//! The process's allocator: the system's, with a cache of big blocks in front.
//!
//! A denoising step frees and asks for the same few sizes hundreds of times. The system allocator gives blocks of that
//! size back to the kernel and gets them again zeroed, page fault by page fault; for the memory-bound operations that
//! costs more than the work. Blocks of `SMALLEST` bytes and more are therefore kept by size class, up to `LIMIT`
//! bytes idle in all; a step after the first allocates nothing from the kernel. [`BlockCache::trim`] gives everything back.
//!
//! Invariant: a block's capacity is a function of the requested size alone (`class`), so `dealloc` knows it too.
#![allow(unsafe_code, reason = "implements GlobalAlloc")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Mutex;

use super::cpu::element::Element;

/// Smallest block worth keeping: 256 KiB, about where the system allocator starts to map pages per block.
const SMALLEST: usize = 256 << 10;
/// Bytes kept idle at most: 1 GiB, about the working set of a 1024x1024 decode in f32.
const LIMIT: usize = 1 << 30;
/// Idle blocks kept at most.
const SLOTS: usize = 256;
/// Alignment of every kept block.
const ALIGN: usize = 64;

/// The allocator; see the module's text.
#[derive(Debug)]
pub struct BlockCache {
    idle: Mutex<Idle>,
}

#[derive(Debug)]
struct Idle {
    /// Address and capacity; address 0 = free slot.
    slots: [(usize, usize); SLOTS],
    bytes: usize,
}

/// Capacity of the block that serves `size` bytes: the step is 1/64 of a power of two, so at most 1/64 is unused. Weights live in
/// such blocks too, so the waste is a share of the whole model.
fn class(size: usize) -> usize {
    let step = (1usize << (usize::BITS - 1 - size.leading_zeros())) / 64;
    size.next_multiple_of(step)
}

impl BlockCache {
    /// An empty cache.
    #[must_use]
    #[allow(clippy::new_without_default, reason = "only ever a static")]
    pub const fn new() -> Self {
        Self {
            idle: Mutex::new(Idle {
                slots: [(0, 0); SLOTS],
                bytes: 0,
            }),
        }
    }

    /// Takes an idle block of exactly this class.
    fn take(&self, capacity: usize) -> Option<*mut u8> {
        let mut idle = self.idle.lock().ok()?;
        let slot = idle
            .slots
            .iter_mut()
            .find(|(address, size)| *address != 0 && *size == capacity)?;
        let address = std::mem::take(&mut slot.0);
        idle.bytes -= capacity;
        Some(address as *mut u8)
    }

    /// Keeps a block, or says that there is no room.
    fn keep(&self, block: *mut u8, capacity: usize) -> bool {
        let Ok(mut idle) = self.idle.lock() else {
            return false;
        };
        if idle.bytes + capacity > LIMIT {
            return false;
        }
        let Some(slot) = idle.slots.iter_mut().find(|(address, _)| *address == 0) else {
            return false;
        };
        *slot = (block as usize, capacity);
        idle.bytes += capacity;
        true
    }

    /// Gives all idle blocks back to the system; returns their bytes.
    pub fn trim(&self) -> usize {
        let Ok(mut idle) = self.idle.lock() else {
            return 0;
        };
        for (address, capacity) in &mut idle.slots {
            if *address != 0 {
                // SAFETY: allocated by `alloc` below with this very layout.
                unsafe { System.dealloc(*address as *mut u8, block_layout(*capacity)) };
                *address = 0;
            }
        }
        std::mem::take(&mut idle.bytes)
    }
}

fn block_layout(capacity: usize) -> Layout {
    // SAFETY: ALIGN is a power of two and `capacity` came from a valid layout rounded up by at most 1/64.
    unsafe { Layout::from_size_align_unchecked(capacity, ALIGN) }
}

fn cached(layout: &Layout) -> bool {
    layout.size() >= SMALLEST && layout.size() < isize::MAX as usize / 2 && layout.align() <= ALIGN
}

// SAFETY: blocks come from the system allocator with `block_layout` and are handed to one owner at a time.
unsafe impl GlobalAlloc for BlockCache {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if !cached(&layout) {
            // SAFETY: passed through.
            return unsafe { System.alloc(layout) };
        }
        let capacity = class(layout.size());
        // SAFETY: a non-zero size.
        self.take(capacity)
            .unwrap_or_else(|| unsafe { System.alloc(block_layout(capacity)) })
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if !cached(&layout) {
            // SAFETY: passed through.
            return unsafe { System.alloc_zeroed(layout) };
        }
        let capacity = class(layout.size());
        match self.take(capacity) {
            Some(block) => {
                // SAFETY: the block holds `capacity >= size` bytes.
                unsafe { block.write_bytes(0, layout.size()) };
                block
            }
            // SAFETY: a non-zero size.
            None => unsafe { System.alloc_zeroed(block_layout(capacity)) },
        }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        if !cached(&layout) {
            // SAFETY: passed through.
            return unsafe { System.dealloc(block, layout) };
        }
        let capacity = class(layout.size());
        if !self.keep(block, capacity) {
            // SAFETY: allocated with this layout.
            unsafe { System.dealloc(block, block_layout(capacity)) };
        }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        let Ok(wanted) = Layout::from_size_align(size, layout.align()) else {
            return std::ptr::null_mut();
        };
        match (cached(&layout), cached(&wanted)) {
            // SAFETY: passed through.
            (false, false) => unsafe { System.realloc(block, layout, size) },
            (true, true) if class(layout.size()) == class(size) => block,
            // SAFETY: a fresh block, the smaller of both sizes copied, the old one given up.
            _ => unsafe {
                let fresh = self.alloc(wanted);
                if !fresh.is_null() {
                    fresh.copy_from_nonoverlapping(block, layout.size().min(size));
                    self.dealloc(block, layout);
                }
                fresh
            },
        }
    }
}

/// A vector of `len` values whose content is yet to be written.
///
/// The values are whatever the block held before (any bit pattern is a value of an [`Element`]); zeroing them first would be
/// one more pass over memory.
pub(crate) fn buffer<E: Element>(len: usize) -> Vec<E> {
    let mut buffer: Vec<std::mem::MaybeUninit<E>> = Vec::with_capacity(len);
    // SAFETY: `MaybeUninit` needs no initialisation; capacity is `len`.
    unsafe { buffer.set_len(len) };
    let mut buffer = std::mem::ManuallyDrop::new(buffer);
    // SAFETY: same layout; every kernel of this crate writes its whole output before anybody reads it.
    unsafe { Vec::from_raw_parts(buffer.as_mut_ptr().cast(), len, buffer.capacity()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_waste_at_most_a_64th_and_are_stable() {
        for size in [SMALLEST, SMALLEST + 1, 1_000_003, 5_242_880, (1 << 30) + 7] {
            let capacity = class(size);
            assert!(
                capacity >= size && capacity - size <= size / 64,
                "{size} -> {capacity}"
            );
            assert_eq!(class(capacity), capacity);
        }
    }

    #[test]
    fn a_freed_block_serves_the_next_request_of_its_class_zeroed_if_asked() {
        let cache = BlockCache::new();
        let layout = Layout::from_size_align(SMALLEST + 100, 8).expect("valid");
        // SAFETY: each block is used within its size and freed once.
        unsafe {
            let first = cache.alloc(layout);
            first.write_bytes(7, layout.size());
            cache.dealloc(first, layout);
            let second = cache.alloc_zeroed(layout);
            assert_eq!(first, second, "the idle block is used again");
            assert!(
                std::slice::from_raw_parts(second, layout.size())
                    .iter()
                    .all(|&b| b == 0)
            );
            let grown = cache.realloc(second, layout, 3 * SMALLEST);
            assert!(
                std::slice::from_raw_parts(grown, layout.size())
                    .iter()
                    .all(|&b| b == 0)
            );
            cache.dealloc(
                grown,
                Layout::from_size_align(3 * SMALLEST, 8).expect("valid"),
            );
        }
        assert_eq!(cache.trim(), class(layout.size()) + class(3 * SMALLEST));
    }
}
