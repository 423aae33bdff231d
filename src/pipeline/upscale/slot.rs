//! The one upscaler that is kept loaded, shared by all who run on a device.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use candle_core::DType;

use super::UpscalerFile;
use crate::models::Esrgan;
use crate::nn::Placement;
use crate::pipeline::Error;
use crate::weights;

/// Keeps the upscaler used last. Clones share it.
#[derive(Debug, Clone)]
pub struct UpscalerSlot {
    kept: Arc<Mutex<Option<Kept>>>,
    place: Placement,
    memory_left: fn(&candle_core::Device) -> Option<u64>,
}

#[derive(Debug)]
struct Kept {
    path: PathBuf,
    modified: Option<SystemTime>,
    model: Arc<Esrgan>,
}

impl UpscalerSlot {
    /// Nothing loaded yet. `memory_left` says how many bytes may be allocated on the device, `None` if
    /// that is not known. bf16 has too few digits
    /// for pictures, so it becomes f32.
    #[must_use]
    pub fn new(
        device: candle_core::Device,
        dtype: DType,
        memory_left: fn(&candle_core::Device) -> Option<u64>,
    ) -> Self {
        let dtype = if dtype == DType::F16 {
            dtype
        } else {
            DType::F32
        };
        Self {
            kept: Arc::default(),
            place: Placement::new(device, dtype),
            memory_left,
        }
    }

    /// Drops the kept upscaler.
    pub fn unload(&self) {
        *self.kept.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    pub(super) fn memory_left(&self) -> Option<u64> {
        (self.memory_left)(&self.place.device)
    }

    /// The upscaler of a file, loaded unless it is the kept one and its file has not changed.
    pub(super) fn get(&self, file: &UpscalerFile) -> Result<Arc<Esrgan>, Error> {
        let modified = std::fs::metadata(&file.path)
            .and_then(|meta| meta.modified())
            .ok();
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kept) = &*kept
            && kept.path == file.path
            && kept.modified == modified
        {
            return Ok(kept.model.clone());
        }
        // The old one goes first: both need not fit.
        *kept = None;
        let source = weights::WeightFile::open(&file.path)?;
        let model = Arc::new(Esrgan::new(&source, &self.place)?);
        *kept = Some(Kept {
            path: file.path.clone(),
            modified,
            model: model.clone(),
        });
        Ok(model)
    }
}
