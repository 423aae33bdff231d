//! Golden files: safetensors and JSON from `tests/golden/`.

#![allow(
    dead_code,
    reason = "every test file uses its own part of the shared code"
)]

use safetensors::{Dtype, SafeTensors};

fn path(file: &str) -> std::path::PathBuf {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(file)
}

/// A JSON file of `tests/golden/`.
pub(crate) fn json(file: &str) -> serde_json::Value {
    let text = std::fs::read_to_string(path(file)).expect(file);
    serde_json::from_str(&text).expect(file)
}

/// A safetensors file of `tests/golden/`.
pub(crate) struct Tensors(Vec<u8>);

impl Tensors {
    pub(crate) fn open(file: &str) -> Self {
        Self(std::fs::read(path(file)).expect(file))
    }

    /// Names of all tensors.
    pub(crate) fn names(&self) -> Vec<String> {
        let file = SafeTensors::deserialize(&self.0).expect("a golden file parses");
        file.names().into_iter().map(String::from).collect()
    }

    /// Shape and values of an `f32` tensor.
    pub(crate) fn get(&self, name: &str) -> (Vec<usize>, Vec<f32>) {
        self.try_get(name)
            .unwrap_or_else(|| panic!("golden tensor `{name}` is missing"))
    }

    pub(crate) fn try_get(&self, name: &str) -> Option<(Vec<usize>, Vec<f32>)> {
        let file = SafeTensors::deserialize(&self.0).expect("a golden file parses");
        let tensor = file.tensor(name).ok()?;
        assert_eq!(tensor.dtype(), Dtype::F32, "golden tensor `{name}`");
        let values = tensor
            .data()
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect();
        Some((tensor.shape().to_vec(), values))
    }

    /// Values of an `f32` tensor.
    pub(crate) fn values(&self, name: &str) -> Vec<f32> {
        self.get(name).1
    }
}
