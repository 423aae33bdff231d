//! Latents at another size against `torch.nn.functional.interpolate` (`tests/golden/make/resample.py`).
//!
//! Tolerance 4e-6, eight ulp at 2.5: torch multiplies the same weights, of both signs, in f32 in another order.

mod support {
    pub(crate) mod close;
}

use sdgen::pipeline::resample::{LatentMode, resample};
use sdgen::sampling::Latents;
use serde_json::Value;
use support::close::{Tolerance, assert_close};

fn numbers(value: &Value) -> Vec<f32> {
    let list = value.as_array().expect("a list").iter();
    list.map(|v| v.as_f64().expect("a number") as f32).collect()
}

fn sizes<const N: usize>(value: &Value) -> [usize; N] {
    let list = value.as_array().expect("a list");
    std::array::from_fn(|i| list[i].as_u64().expect("a size") as usize)
}

#[test]
fn every_mode_equals_torch_up_and_down() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/resample.json");
    let golden = std::fs::read(path).expect("golden file");
    let golden: Value = serde_json::from_slice(&golden).expect("JSON");
    let input = Latents::new(numbers(&golden["input"]), sizes(&golden["shape"]));
    let cases = golden["cases"].as_array().expect("a list");
    assert_eq!(cases.len(), 30);
    for case in cases {
        let mode = LatentMode::find(case["mode"].as_str().expect("a name")).expect("known");
        let [height, width] = sizes(&case["size"]);
        let got = resample(&input, height, width, mode);
        let tolerance = Tolerance {
            abs: 4e-6,
            rel_of_max: 0.0,
        };
        let name = format!("{} {height}x{width}", mode.label());
        assert_close(&name, &got.data(), &numbers(&case["values"]), tolerance);
    }
}
