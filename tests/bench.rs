//! `sdgen bench` through the binary: comparisons that pass and fail, and what is measured of the demo model.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

/// `sdgen bench --json` on the CPU in a directory of its own.
fn bench(args: &[&str]) -> (Output, Vec<Value>) {
    let folder = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_sdgen"))
        .current_dir(folder.path())
        .args(["bench", "--json", "--data-dir", "data"])
        .args(args)
        .output()
        .unwrap();
    let lines = String::from_utf8(output.stdout.clone()).unwrap();
    let rows = lines
        .lines()
        .map(|line| serde_json::from_str(line).unwrap());
    let rows = rows.collect();
    (output, rows)
}

const BF16: [&str; 4] = ["--device", "cpu", "--dtype", "bf16"];

#[test]
fn bf16_on_the_cpu_agrees_with_f32_in_operations_pictures_and_golden_data() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let golden = ["--verify", "--golden", golden.to_str().unwrap()];
    let (output, rows) = bench(&[&golden[..], &BF16].concat());
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{told}");
    assert!(rows.iter().all(|row| row["ok"] == true), "{rows:?}");
    let find = |name: &str| {
        let row = rows.iter().find(|row| row["check"] == name);
        row.unwrap_or_else(|| panic!("no row `{name}`"))["error"]
            .as_f64()
            .unwrap()
    };
    // Two types do not compute the same: what compares equal was not compared.
    for check in ["linear", "convolution 3x3", "group norm", "golden UNet"] {
        assert!(find(check) > 1e-4, "{check}: {}", find(check));
    }
    assert_eq!(rows.len(), 31);
}

#[test]
fn a_comparison_that_fails_is_a_row_and_exit_1() {
    let folder = tempfile::tempdir().unwrap();
    let nowhere = folder.path().to_str().unwrap();
    let (output, rows) = bench(&["--verify", "--golden", nowhere, "--device", "cpu"]);
    assert_eq!(output.status.code(), Some(1));
    let failed: Vec<_> = rows.iter().filter(|row| row["ok"] == false).collect();
    assert_eq!(failed.len(), 3, "text, UNet, VAE: {failed:?}");
    assert!(failed.iter().all(|row| row["error"].is_null()));
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(
        told.contains("3 of 31 comparisons failed: golden"),
        "{told}"
    );
    // `f32` against itself is exact.
    let others = rows.iter().filter(|row| row["ok"] == true);
    assert!(others.clone().all(|row| row["error"] == 0.0), "{rows:?}");
}

#[test]
fn a_job_is_measured_with_its_stages() {
    let size = ["-W", "64", "-H", "64"];
    let (output, rows) = bench(&[&["--job", "2,1"], &size[..], &BF16].concat());
    assert_eq!(output.status.code(), Some(0));
    let seconds = |name: &str| {
        let row = rows.iter().find(|row| row["part"] == name);
        row.unwrap_or_else(|| panic!("no part `{name}` in {rows:?}"))["seconds"]
            .as_f64()
            .unwrap()
    };
    let stages = ["text", "sampling", "decoding", "PNG"];
    let sum: f64 = stages
        .iter()
        .map(|stage| seconds(&format!("  {stage} of 2 steps")))
        .sum();
    assert!(seconds("load") > 0.0 && seconds("job, 1 steps") > 0.0);
    assert!(sum > 0.0 && sum <= seconds("job, 2 steps"));
}
