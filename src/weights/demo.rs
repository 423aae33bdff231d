//! The demo model compiled into the binary: a small, truly trained SDXL checkpoint (see `models/demo/README.md`).

use std::path::Path;

use super::{Error, SafetensorsFile};

/// Name under which the demo model is listed.
pub const NAME: &str = "sdgen-demo";

/// zstd of a f16 safetensors; most of its token rows are zeros.
static COMPRESSED: &[u8] = include_bytes!("../../models/demo/sdgen-demo.safetensors.zst");
/// Bytes after decompression, checked by a test.
const SIZE: usize = 40_023_856;
/// Values of all tensors, from above: they are f16.
pub const VALUES: usize = SIZE / 2;

/// Decompresses the demo model.
///
/// # Errors
/// None in practice: the bytes are part of the binary and tested.
pub fn open() -> Result<SafetensorsFile, Error> {
    let path = Path::new("sdgen-demo.safetensors");
    let bytes = zstd::bulk::decompress(COMPRESSED, SIZE).map_err(|e| Error::Header {
        path: path.into(),
        reason: format!("the embedded copy does not decompress ({e})"),
    })?;
    SafetensorsFile::from_vec(path, bytes)
}

/// SHA-256 of the decompressed file, hex; its first ten digits are what A1111 would write as `Model hash`.
pub const SHA256: &str = include_str!("../../models/demo/sha256");

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::{Kind, Source, detect};

    #[test]
    fn the_embedded_model_is_whole_and_what_it_claims_to_be() {
        let file = open().expect("decompresses");
        assert_eq!(detect::kind(&file), Kind::Sdxl);
        assert_eq!(file.metadata("modelspec.resolution"), Some("128x128"));
        assert_eq!(SHA256.trim().len(), 64);
    }
}
