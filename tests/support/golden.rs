//! Golden tensors: zstd-compressed safetensors under `tests/golden`, and layout changes between them and the models.

#![allow(
    dead_code,
    reason = "every test file uses its own part of the shared code"
)]

use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use sdgen::weights::SafetensorsFile;

/// Path of a file below `tests/golden`.
pub(crate) fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name)
}

/// The bytes of `NAME.zst`, or of `NAME.planes.zst`: all even bytes, then all odd ones.
pub(crate) fn unpack(name: &str) -> Vec<u8> {
    let in_planes = path(&format!("{name}.planes.zst"));
    if in_planes.exists() {
        let planes = decompress(&in_planes);
        let (even, odd) = planes.split_at(planes.len() / 2);
        return even.iter().zip(odd).flat_map(|(e, o)| [*e, *o]).collect();
    }
    decompress(&path(&format!("{name}.zst")))
}

fn decompress(file: &Path) -> Vec<u8> {
    let packed = std::fs::read(file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    zstd::stream::decode_all(packed.as_slice()).expect("valid zstd")
}

/// The safetensors file `NAME.zst`.
pub(crate) fn open(name: &str) -> SafetensorsFile {
    SafetensorsFile::from_vec(Path::new(name), unpack(name)).expect("valid golden file")
}

/// Tensors by name.
pub(crate) struct Golden(std::collections::HashMap<String, Tensor>);

impl Golden {
    /// Loads `NAME.zst`.
    pub(crate) fn load(name: &str) -> Self {
        Self(
            candle_core::safetensors::load_buffer(&unpack(name), &Device::Cpu)
                .expect("valid golden file"),
        )
    }

    /// A tensor.
    pub(crate) fn tensor(&self, key: &str) -> &Tensor {
        self.0
            .get(key)
            .unwrap_or_else(|| panic!("no golden tensor `{key}`"))
    }

    /// Names of all tensors.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// Whether a tensor is there.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.0.contains_key(key)
    }

    /// Values of a tensor, row major.
    pub(crate) fn values(&self, key: &str) -> Vec<f32> {
        values(self.tensor(key))
    }

    /// Token ids `[1, 77]`.
    pub(crate) fn chunk(&self, key: &str) -> [u32; 77] {
        let ids: Vec<i64> = self
            .tensor(key)
            .flatten_all()
            .and_then(|t| t.to_vec1())
            .expect("i64 ids");
        std::array::from_fn(|i| u32::try_from(ids[i]).expect("an id"))
    }

    /// A picture `[batch, channels, height, width]` as the models take it, channels last.
    pub(crate) fn channels_last(&self, key: &str) -> Tensor {
        self.tensor(key)
            .permute((0, 2, 3, 1))
            .and_then(|t| t.contiguous())
            .expect("four dimensions")
    }
}

/// Values of a tensor, row major.
pub(crate) fn values(t: &Tensor) -> Vec<f32> {
    t.flatten_all()
        .and_then(|t| t.to_vec1())
        .expect("f32 tensor")
}

/// Values of a channels-last picture in `[batch, channels, height, width]` order.
pub(crate) fn channels_first(t: &Tensor) -> Vec<f32> {
    values(&t.permute((0, 3, 1, 2)).expect("four dimensions"))
}
