//! LoRA files and their relatives: what is in one, and what a set of them makes of a checkpoint's weights.
//!
//! [`LoraFile`] is one opened file, [`names`] says which tensor each of its modules changes, [`Plan`] is a set of files on
//! one checkpoint: for each touched key it gives the merged weight, computed from the checkpoint's own values every time, so
//! nothing ever drifts. [`library`] finds files by the names used in prompts.

mod algebra;
mod delta;
mod keys;
pub mod library;
pub mod names;
mod plan;
mod rotation;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

pub use delta::Strength;
pub use names::{Target, Targets};
pub use plan::{Merged, Plan, Use};

use super::embedding::Embedding;
use super::file::SafetensorsFile;
use super::{Source, embedding};
use algebra::Values;

/// Why a module of a LoRA cannot be applied. The rest of the file still is.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A tensor cannot be read.
    #[error(transparent)]
    Weights(#[from] super::Error),
    /// Delta and weight differ in size: trained for another model.
    #[error(
        "a delta of shape {delta:?} does not fit a weight of {weight} values; the file was trained for another model"
    )]
    Mismatch {
        /// Shape of the delta.
        delta: Vec<usize>,
        /// Values of what it should change.
        weight: usize,
    },
    /// Two tensors of the module do not belong together.
    #[error("tensors of shapes {left:?} and {right:?} cannot be multiplied; the file is damaged")]
    Factors {
        /// The left factor.
        left: Vec<usize>,
        /// The right factor.
        right: Vec<usize>,
    },
    /// A part of the module's type is not there.
    #[error("part `{part}` is missing; the file is incomplete")]
    Incomplete {
        /// The part.
        part: &'static str,
    },
    /// Parts of no type that is known.
    #[error("no known type of network has the parts {parts:?}")]
    UnknownType {
        /// The parts there are.
        parts: Vec<String>,
    },
    /// The merged weight has NaN or infinite values.
    #[error("the merged weight is not finite; the file is damaged or its multiplier far too large")]
    NotFinite,
}

/// Where a module's values are read from.
type Tensors<'a> = &'a SafetensorsFile;

/// The tensors that change one layer: key of each part.
#[derive(Debug, Clone, Default)]
pub(crate) struct Module {
    keys: BTreeMap<String, String>,
}

impl Module {
    fn has(&self, part: &str) -> bool {
        self.keys.contains_key(part)
    }

    fn parts(&self) -> Vec<String> {
        self.keys.keys().cloned().collect()
    }

    fn read(&self, tensors: Tensors<'_>, part: &str) -> Result<Option<Values>, Error> {
        let Some(key) = self.keys.get(part) else {
            return Ok(None);
        };
        Ok(Some(Values {
            shape: tensors.shape(key).unwrap_or_default().to_vec(),
            data: tensors.read(key)?,
        }))
    }

    fn scalar(&self, tensors: Tensors<'_>, part: &str) -> Result<Option<f32>, Error> {
        Ok(match self.keys.get(part) {
            Some(key) => Some(tensors.read_number(key)?),
            None => None,
        })
    }
}

/// An opened LoRA file.
#[derive(Debug)]
pub struct LoraFile {
    file: SafetensorsFile,
    modules: BTreeMap<String, Module>,
}

impl LoraFile {
    /// Opens a file and sorts its keys into modules. No tensor is read.
    ///
    /// # Errors
    /// As for [`SafetensorsFile::open`].
    pub fn open(path: &Path) -> Result<Self, super::Error> {
        Ok(Self::new(SafetensorsFile::open(path)?))
    }

    /// The same for an opened file.
    #[must_use]
    pub fn new(file: SafetensorsFile) -> Self {
        let mut modules: BTreeMap<String, Module> = BTreeMap::new();
        for key in file.keys() {
            if let Some((module, part)) = keys::split(key)
                && module != BUNDLE
            {
                let keys = &mut modules.entry(module).or_default().keys;
                keys.insert(part, key.to_string());
            }
        }
        Self { file, modules }
    }

    /// The file itself.
    #[must_use]
    pub fn file(&self) -> &SafetensorsFile {
        &self.file
    }

    /// Number of modules, whether a checkpoint has them or not.
    #[must_use]
    pub fn modules(&self) -> usize {
        self.modules.len()
    }

    /// The textual inversions packed into the file (`bundle_emb.NAME.clip_l` and `.clip_g`).
    ///
    /// Those of another form, and those that cannot be read, are left out and logged.
    #[must_use]
    pub fn embeddings(&self) -> Vec<Embedding> {
        let keys = self.file.keys();
        let names: BTreeSet<&str> = keys
            .iter()
            .filter_map(|key| {
                key.strip_prefix(BUNDLE)?
                    .strip_prefix('.')?
                    .rsplit_once('.')
            })
            .map(|(name, _)| name.strip_suffix(".string_to_param").unwrap_or(name))
            .collect();
        let read = |name: &str| {
            let prefix = format!("{BUNDLE}.{name}.");
            embedding::Embedding::read(name, &self.file, &prefix)
                .inspect_err(|error| tracing::warn!(name, %error, "bundled embedding skipped"))
        };
        names
            .into_iter()
            .filter_map(|name| read(name).ok())
            .collect()
    }
}

/// First word of the keys of bundled textual inversions.
const BUNDLE: &str = "bundle_emb";
