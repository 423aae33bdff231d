//! Checkpoints: what is in a file, what kind of model it is, and its tensors as `f32`.
//!
//! Nothing is allocated on the word of a header: lengths are checked against the file first. A [`Source`] is where
//! tensors come from (a file, the embedded demo model, seeded noise); [`Tensors`] is a view of one below a key prefix.

mod convert;
pub mod demo;
pub mod detect;
pub mod embedding;
pub mod file;
mod held;
pub mod lora;
pub mod open;
pub mod pickle;
pub mod synthetic;
pub mod vae_keys;

use std::path::{Path, PathBuf};

pub use detect::Kind;
pub use file::SafetensorsFile;
pub use held::Held;
pub use open::WeightFile;
pub use pickle::PickleFile;

/// Why a checkpoint cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be opened or read.
    #[error("cannot read checkpoint: `{}`; check the path and its permissions", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// The operating system's reason.
        #[source]
        source: std::io::Error,
    },
    /// The file cannot be written.
    #[error("cannot write `{}`", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The file ends before its header says.
    #[error("checkpoint is truncated: `{}` has {found} bytes, its header needs {expected}; download it again", path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Bytes the header promises.
        expected: u64,
        /// Bytes there are.
        found: u64,
    },
    /// The header's length is impossible.
    #[error("not a safetensors file: `{}` declares a header of {length} bytes; the limit is {limit} and the file has {found}", path.display())]
    HeaderLength {
        /// The file.
        path: PathBuf,
        /// Declared length.
        length: u64,
        /// Largest length accepted.
        limit: u64,
        /// Size of the file.
        found: u64,
    },
    /// The header contradicts itself.
    #[error("damaged safetensors header: `{}`: {reason}; download it again", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A kind of file that is not a single-file safetensors checkpoint.
    #[error("`{}` is {what}; sdgen loads SDXL checkpoints as a single `.safetensors` or `.ckpt` file: {remedy}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What it is.
        what: &'static str,
        /// What to do.
        remedy: &'static str,
    },
    /// A PyTorch file that is damaged, or more than weights.
    #[error("cannot load `{}`: {reason}; sdgen reads PyTorch files of weights alone and runs nothing in them: use a `.safetensors` file of the model, or one saved anew by a recent PyTorch", path.display())]
    Pickle {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A picture that carries something else than an embedding.
    #[error("`{}` carries no embedding that can be used: {reason}", path.display())]
    Embedding {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A file of weights that is no upscaler.
    #[error("`{}` is no upscaler that sdgen knows: {reason}; RRDBNet (ESRGAN, Real-ESRGAN, BSRGAN) and SRVGGNetCompact are", path.display())]
    Upscaler {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A safetensors file of another kind of model.
    #[error("`{}` is {kind}, not an SDXL checkpoint; {}", path.display(), kind.remedy())]
    Kind {
        /// The file.
        path: PathBuf,
        /// What it is.
        kind: Kind,
    },
    /// A tensor of a type that cannot be computed with.
    #[error("tensor `{key}` in `{}` has type {dtype}; supported are F32, F16, BF16 and F8_E4M3", path.display())]
    Dtype {
        /// The file.
        path: PathBuf,
        /// The tensor.
        key: String,
        /// Its type.
        dtype: String,
    },
    /// A tensor that the model needs is not there.
    #[error("tensor `{key}` is missing from `{}`; the file is incomplete or of another model", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// The tensor.
        key: String,
    },
    /// No VAE in the checkpoint and none given.
    #[error("`{}` has no VAE (`first_stage_model.*`); give one with `--vae FILE`", path.display())]
    NoVae {
        /// The file.
        path: PathBuf,
    },
    /// A tensor of the wrong shape.
    #[error("tensor `{key}` in `{}` has shape {found:?}, the model needs {expected:?}", path.display())]
    Shape {
        /// The file.
        path: PathBuf,
        /// The tensor.
        key: String,
        /// Shape needed.
        expected: Vec<usize>,
        /// Shape found.
        found: Vec<usize>,
    },
    /// A size that the architecture does not allow.
    #[error("tensor `{key}` in `{}` does not fit the architecture: {reason}", path.display())]
    Architecture {
        /// The file.
        path: PathBuf,
        /// The tensor.
        key: String,
        /// Why not.
        reason: String,
    },
    /// The device has no room for a tensor, or refuses it.
    #[error(
        "the device refused a tensor of the checkpoint; a smaller `--dtype` or another `--device` needs less memory"
    )]
    Device(#[from] candle_core::Error),
    /// NaN or infinity among the weights.
    #[error("tensor `{key}` in `{}` contains NaN or infinite values; the checkpoint is damaged (a failed merge or conversion)", path.display())]
    NotFinite {
        /// The file.
        path: PathBuf,
        /// The tensor.
        key: String,
    },
}

/// Where tensors come from.
pub trait Source: Sync {
    /// File name for messages.
    fn path(&self) -> &Path;
    /// All keys, in no particular order.
    fn keys(&self) -> Vec<&str>;
    /// Shape of a tensor, if it is there.
    fn shape(&self, key: &str) -> Option<&[usize]>;
    /// A metadata entry of the file.
    fn metadata(&self, key: &str) -> Option<&str>;
    /// Values of a tensor that is there, row major.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::Dtype`] or [`Error::NotFinite`].
    fn read(&self, key: &str) -> Result<Vec<f32>, Error>;
    /// The same values in the type they are stored in, where they can be used as they lie.
    ///
    /// # Errors
    /// As for [`Self::read`].
    fn hold(&self, key: &str) -> Result<Held<'_>, Error> {
        self.read(key).map(Held::from)
    }
}

/// The tensors of a [`Source`] below a key prefix.
#[derive(Clone)]
pub struct Tensors<'a> {
    source: &'a dyn Source,
    prefix: String,
}

impl std::fmt::Debug for Tensors<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Tensors({}: {}*)",
            self.source.path().display(),
            self.prefix
        )
    }
}

impl<'a> Tensors<'a> {
    /// All tensors whose key begins with `prefix` (which ends in a dot, or is empty).
    #[must_use]
    pub fn new(source: &'a dyn Source, prefix: &str) -> Self {
        Self {
            source,
            prefix: prefix.to_string(),
        }
    }

    /// Those below `name.`.
    #[must_use]
    pub fn sub(&self, name: impl std::fmt::Display) -> Self {
        Self {
            source: self.source,
            prefix: format!("{}{name}.", self.prefix),
        }
    }

    /// The file they come from.
    #[must_use]
    pub fn source(&self) -> &'a dyn Source {
        self.source
    }

    /// The whole key of `name`.
    #[must_use]
    pub fn key(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// Whether the tensor is there.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.source.shape(&self.key(name)).is_some()
    }

    /// Shape of a tensor the model cannot do without.
    ///
    /// # Errors
    /// [`Error::Missing`].
    pub fn shape(&self, name: &str) -> Result<&'a [usize], Error> {
        let key = self.key(name);
        self.source.shape(&key).ok_or_else(|| Error::Missing {
            path: self.source.path().into(),
            key,
        })
    }

    /// Values of a tensor of exactly this shape.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::Shape`], [`Error::Dtype`] or [`Error::NotFinite`].
    pub fn read(&self, name: &str, expected: &[usize]) -> Result<Vec<f32>, Error> {
        let found = self.shape(name)?;
        if found != expected {
            return Err(self.wrong_shape(name, expected));
        }
        self.source.read(&self.key(name))
    }

    /// [`Self::read`] of values as they are stored.
    ///
    /// # Errors
    /// As for [`Self::read`].
    pub fn hold(&self, name: &str, expected: &[usize]) -> Result<Held<'a>, Error> {
        let found = self.shape(name)?;
        if found != expected {
            return Err(self.wrong_shape(name, expected));
        }
        self.source.hold(&self.key(name))
    }

    /// The error for a tensor whose shape is not `expected`.
    #[must_use]
    pub fn wrong_shape(&self, name: &str, expected: &[usize]) -> Error {
        let key = self.key(name);
        let found = self.source.shape(&key).unwrap_or_default().to_vec();
        Error::Shape {
            path: self.source.path().into(),
            key,
            expected: expected.to_vec(),
            found,
        }
    }

    /// The error for a tensor whose size the architecture does not allow.
    #[must_use]
    pub fn unfit(&self, name: &str, reason: impl Into<String>) -> Error {
        Error::Architecture {
            path: self.source.path().into(),
            key: self.key(name),
            reason: reason.into(),
        }
    }
}
