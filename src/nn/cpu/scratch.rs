//! Working memory of a task, kept from one task of a thread to the next.

use std::cell::Cell;

thread_local! {
    static KEPT: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Runs `work` on `len` values whose content is whatever the task before left.
pub(super) fn with_scratch<T>(len: usize, work: impl FnOnce(&mut [f32]) -> T) -> T {
    let mut kept = KEPT.take();
    if kept.len() < len {
        kept.resize(len, 0.0);
    }
    let out = work(&mut kept[..len]);
    KEPT.set(kept);
    out
}
