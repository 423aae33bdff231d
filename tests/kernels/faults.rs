//! The emulation itself: what a GPU leaves undefined has to fail here, or the other tests prove nothing.

use std::panic::catch_unwind;

use crate::emulation::{Arg, Grid, Type, launch, noise};

/// What a launch of 64 threads over `[64]` and `[64]` says when it fails, or its output.
fn run(kernel: &'static str) -> Result<Vec<f32>, String> {
    catch_unwind(|| {
        let args = [Arg::values(Type::F32, &noise(1, 64)), Arg::room(64 * 4)];
        let out = launch("faults", kernel, Grid::new([1, 1, 1], 64, 1024), &args);
        Type::F32.decode(&out[1])
    })
    .map_err(|panic| panic.downcast_ref::<String>().cloned().unwrap_or_default())
}

#[test]
fn what_a_gpu_leaves_undefined_fails() {
    for (kernel, says) in [
        ("no_barrier", "depends on the order of its threads"),
        ("half_a_barrier", "waits for ever"),
        ("half_a_warp", "waits for ever"),
        ("one_too_far", "outside every buffer"),
        ("written_too_far", "outside every buffer"),
        ("not_aligned", "not aligned"),
    ] {
        let said = run(kernel).expect_err(kernel);
        assert!(said.contains(says), "{kernel}: {said}");
    }
}

#[test]
fn a_copy_that_is_not_waited_for_is_not_a_number() {
    assert!(run("no_wait").unwrap().iter().all(|v| v.is_nan()));
}
