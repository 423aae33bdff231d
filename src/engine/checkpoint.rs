//! Checkpoints and VAEs by the names A1111 knows them under, and the choice of one of each for a job.
//!
//! A checkpoint at `<dir>/xl/foo.safetensors` is named `xl/foo.safetensors`, titled `xl/foo.safetensors [31e35c80fc]` once its
//! hash is known, and answers to a dozen aliases. Rules of the pipeline specification, 1.8 (A1111's `sd_models.py`).

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use super::Error;
use super::hashes;
use super::status::LoadedModel;
pub use super::vaes::VaeChoice;
use crate::pipeline::{CheckpointIdentity, CheckpointSource, OtherCheckpoint, VaeIdentity};
use crate::weights::{self, Source, WeightFile, demo};

/// A checkpoint that can be asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// Where its bytes are.
    pub source: CheckpointSource,
    /// Path relative to the model directory, with extension: `xl/foo.safetensors`.
    pub name: String,
    /// SHA-256 of the file, hex, once known.
    pub sha256: Option<String>,
    /// A YAML file of the same stem beside it.
    pub config: Option<PathBuf>,
}

impl Checkpoint {
    /// The model compiled into the binary.
    #[must_use]
    pub fn demo() -> Self {
        let sha256 = Some(demo::SHA256.trim().to_string());
        Self {
            source: CheckpointSource::Embedded,
            name: demo::NAME.into(),
            sha256,
            config: None,
        }
    }

    /// `xl/foo.safetensors [31e35c80fc]`, without bracket while the hash is unknown.
    #[must_use]
    pub fn title(&self) -> String {
        self.shorthash().map_or_else(
            || self.name.clone(),
            |hash| format!("{} [{hash}]", self.name),
        )
    }

    /// `xl_foo`.
    #[must_use]
    pub fn model_name(&self) -> String {
        let name = self.name.replace(['/', '\\'], "_");
        strip_extension(&name).to_string()
    }

    /// `foo`, the infotext's `Model`.
    #[must_use]
    pub fn stem(&self) -> &str {
        strip_extension(self.name.rsplit('/').next().unwrap_or(&self.name))
    }

    /// First 10 hex digits of the SHA-256, once known.
    #[must_use]
    pub fn shorthash(&self) -> Option<&str> {
        self.sha256.as_deref().and_then(|hash| hash.get(..10))
    }

    /// Absolute path, or a note that there is none.
    #[must_use]
    pub fn filename(&self) -> String {
        match &self.source {
            CheckpointSource::Embedded => "(embedded)".into(),
            CheckpointSource::File(path) => path.display().to_string(),
        }
    }

    /// Whether `wanted` (slashes already forward) is one of its names.
    pub(super) fn answers_to(&self, wanted: &str) -> bool {
        let short = self.shorthash().unwrap_or("-");
        wanted == self.name
            || wanted == self.stem()
            || wanted == self.model_name()
            || wanted == short
            || Some(wanted) == self.sha256.as_deref()
            || wanted
                .strip_suffix(']')
                .and_then(|text| text.split_once(" ["))
                .is_some_and(|(name, hash)| {
                    (name == self.name || name == self.stem())
                        && (hash == short || self.has_legacy_hash(hash))
                })
    }

    pub(super) fn has_legacy_hash(&self, wanted: &str) -> bool {
        let CheckpointSource::File(path) = &self.source else {
            return false;
        };
        wanted.len() == 8
            && wanted.bytes().all(|byte| byte.is_ascii_hexdigit())
            && hashes::legacy(path).is_ok_and(|hash| hash == wanted)
    }
}

/// What a checkpoint's header says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inspection {
    /// `sdxl`, `sd1`, `lora`, ….
    pub kind: &'static str,
    /// Number of tensors.
    pub tensors: usize,
    /// Bytes of all tensors.
    pub bytes: usize,
    /// Types of tensors, sorted.
    pub dtypes: Vec<String>,
    /// The file's metadata, sorted by key.
    pub metadata: BTreeMap<String, String>,
}

impl Checkpoint {
    /// Reads the header.
    ///
    /// # Errors
    /// The file is no file of weights.
    pub fn inspect(&self) -> Result<Inspection, Error> {
        let file = match &self.source {
            CheckpointSource::Embedded => WeightFile::Safetensors(demo::open()?),
            CheckpointSource::File(path) => WeightFile::open(path)?,
        };
        let dtypes: BTreeSet<String> = file
            .keys()
            .into_iter()
            .filter_map(|key| file.dtype(key))
            .collect();
        Ok(Inspection {
            kind: weights::detect::kind(&file).name(),
            tensors: file.keys().len(),
            bytes: file.data_len(),
            dtypes: dtypes.into_iter().collect(),
            metadata: file.all_metadata(),
        })
    }
}

/// A VAE file that can be asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vae {
    /// File name with extension.
    pub name: String,
    /// The file.
    pub path: PathBuf,
}

/// A checkpoint and VAE chosen for a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selection {
    /// Where the bytes are.
    pub source: CheckpointSource,
    /// Title at the time of choosing.
    pub title: String,
    /// Stem and short hash, for the infotext.
    pub identity: CheckpointIdentity,
    /// SHA-256 of the file, hex; empty while unknown.
    pub sha256: String,
    /// A VAE in place of the checkpoint's own.
    pub vae: Option<VaeIdentity>,
}

impl Selection {
    /// Whether a loaded model serves this selection: same file in the same version, same VAE.
    #[must_use]
    pub fn is_same_model(&self, other: &Self) -> bool {
        self.is_same_checkpoint(other) && self.vae == other.vae
    }

    /// The same but for the VAE.
    #[must_use]
    pub fn is_same_checkpoint(&self, other: &Self) -> bool {
        self.source == other.source && self.sha256 == other.sha256
    }

    /// As a checkpoint that a job needs besides its own.
    #[must_use]
    pub fn as_other(&self) -> OtherCheckpoint {
        OtherCheckpoint {
            source: self.source.clone(),
            identity: self.identity.clone(),
            vae: self.vae.clone(),
        }
    }

    /// The loaded model's description.
    #[must_use]
    pub fn describe(&self, native_size: (usize, usize)) -> LoadedModel {
        let file_name = |vae: &VaeIdentity| {
            vae.path
                .file_name()
                .map(|name| name.to_string_lossy().into_owned())
        };
        LoadedModel {
            title: self.title.clone(),
            name: self.identity.name.clone(),
            sha256: self.sha256.clone(),
            vae_name: self.vae.as_ref().and_then(file_name),
            vae_hash: self
                .vae
                .as_ref()
                .map(|vae| vae.shorthash.clone())
                .filter(|hash| !hash.is_empty()),
            native_size,
        }
    }
}

/// A file name without the extension of a model file.
pub(super) fn strip_extension(name: &str) -> &str {
    let known = [".safetensors", ".ckpt", ".pt"];
    known
        .iter()
        .find_map(|extension| name.strip_suffix(extension))
        .unwrap_or(name)
}

/// `known: `a`, `b` and 3 more`, for messages.
pub(super) fn known(names: &[String]) -> String {
    const SHOWN: usize = 8;
    if names.is_empty() {
        return "none is installed".into();
    }
    let shown: Vec<String> = names
        .iter()
        .take(SHOWN)
        .map(|name| format!("`{name}`"))
        .collect();
    let more = names.len().saturating_sub(SHOWN);
    let tail = if more > 0 {
        format!(" and {more} more")
    } else {
        String::new()
    };
    format!("known: {}{tail}", shown.join(", "))
}
