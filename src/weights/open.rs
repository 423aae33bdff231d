//! A file of weights, opened by what it is: safetensors, or what PyTorch writes.

use std::collections::BTreeMap;
use std::path::Path;

use super::{Error, Held, PickleFile, SafetensorsFile, Source, file};

/// Endings of PyTorch's files.
pub const PICKLES: [&str; 4] = ["pth", "pt", "ckpt", "bin"];

/// An opened file of weights.
#[derive(Debug)]
pub enum WeightFile {
    /// A safetensors file.
    Safetensors(SafetensorsFile),
    /// A PyTorch file.
    Pickle(PickleFile),
}

impl WeightFile {
    /// Opens a file. One with the ending of a PyTorch file may be safetensors all the same.
    ///
    /// # Errors
    /// Those of [`SafetensorsFile::open`] and [`PickleFile::open`].
    pub fn open(path: &Path) -> Result<Self, Error> {
        let is_pickle = path.is_file()
            && path
                .extension()
                .is_some_and(|found| PICKLES.iter().any(|e| found.eq_ignore_ascii_case(e)));
        if is_pickle && !file::is_safetensors(path)? {
            PickleFile::open(path).map(Self::Pickle)
        } else {
            SafetensorsFile::open(path).map(Self::Safetensors)
        }
    }

    /// All metadata of the file; PyTorch files have none.
    #[must_use]
    pub fn all_metadata(&self) -> BTreeMap<String, String> {
        match self {
            Self::Safetensors(file) => file.all_metadata().clone().into_iter().collect(),
            Self::Pickle(_) => BTreeMap::new(),
        }
    }

    /// Stored type of a tensor, as its format spells it.
    #[must_use]
    pub fn dtype(&self, key: &str) -> Option<String> {
        match self {
            Self::Safetensors(file) => file.dtype(key),
            Self::Pickle(file) => file.dtype(key).map(str::to_string),
        }
    }

    /// Bytes of all tensors.
    #[must_use]
    pub fn data_len(&self) -> usize {
        match self {
            Self::Safetensors(file) => file.data_len(),
            Self::Pickle(file) => file.data_len(),
        }
    }

    fn source(&self) -> &dyn Source {
        match self {
            Self::Safetensors(file) => file,
            Self::Pickle(file) => file,
        }
    }
}

impl Source for WeightFile {
    fn path(&self) -> &Path {
        self.source().path()
    }

    fn keys(&self) -> Vec<&str> {
        self.source().keys()
    }

    fn shape(&self, key: &str) -> Option<&[usize]> {
        self.source().shape(key)
    }

    fn metadata(&self, key: &str) -> Option<&str> {
        self.source().metadata(key)
    }

    fn read(&self, key: &str) -> Result<Vec<f32>, Error> {
        self.source().read(key)
    }

    fn hold(&self, key: &str) -> Result<Held<'_>, Error> {
        self.source().hold(key)
    }
}
