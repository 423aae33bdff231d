//! A safetensors file, memory-mapped, or the same bytes held in memory.
//!
//! Invariant: every tensor's byte range lies within the data, checked once at opening; so reading cannot run past it.
#![allow(unsafe_code, reason = "memory map of a file")]

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::{Mmap, UncheckedAdvice};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, SafeTensorError, SafeTensors, TensorInfo};

use super::{Error, Held, Source, convert};

/// Largest header accepted: the format's own limit, 100 MB.
const HEADER_LIMIT: u64 = 100_000_000;

/// The bytes of a file.
#[derive(Debug)]
pub(super) enum Bytes {
    Mapped(Mmap),
    Owned(Vec<u8>),
}

/// An opened safetensors file.
#[derive(Debug)]
pub struct SafetensorsFile {
    path: PathBuf,
    bytes: Bytes,
    /// Offset of the first tensor's bytes.
    data_start: usize,
    tensors: BTreeMap<String, TensorInfo>,
    metadata: HashMap<String, String>,
}

impl SafetensorsFile {
    /// Maps a file and checks its header.
    ///
    /// # Errors
    /// [`Error::Open`], [`Error::Format`], [`Error::HeaderLength`], [`Error::Truncated`] or [`Error::Header`].
    pub fn open(path: &Path) -> Result<Self, Error> {
        if path.is_dir() {
            return Err(Error::Format {
                path: path.into(),
                what: "a folder",
                remedy: "a diffusers folder cannot be loaded yet; use the model's single-file release",
            });
        }
        Self::from_bytes(path, Bytes::map(path)?)
    }

    /// The same from memory; `path` is only used in messages.
    ///
    /// # Errors
    /// As for [`Self::open`].
    pub fn from_vec(path: &Path, bytes: Vec<u8>) -> Result<Self, Error> {
        Self::from_bytes(path, Bytes::Owned(bytes))
    }

    fn from_bytes(path: &Path, bytes: Bytes) -> Result<Self, Error> {
        let all = bytes.as_slice();
        refuse_other_formats(path, all)?;
        let found = all.len() as u64;
        let length = match all.first_chunk::<8>() {
            Some(first) => u64::from_le_bytes(*first),
            None => {
                return Err(Error::Truncated {
                    path: path.into(),
                    expected: 8,
                    found,
                });
            }
        };
        if length > HEADER_LIMIT {
            return Err(Error::HeaderLength {
                path: path.into(),
                length,
                limit: HEADER_LIMIT,
                found,
            });
        }
        if 8 + length > found {
            return Err(Error::Truncated {
                path: path.into(),
                expected: 8 + length,
                found,
            });
        }
        let (n, header) =
            SafeTensors::read_metadata(all).map_err(|e| header_error(path, all, length, &e))?;
        let tensors = header
            .tensors()
            .into_iter()
            .map(|(key, info)| (key, info.clone()))
            .collect();
        let metadata = header.metadata().clone().unwrap_or_default();
        Ok(Self {
            path: path.into(),
            data_start: 8 + n,
            tensors,
            metadata,
            bytes,
        })
    }

    /// All metadata of the file.
    #[must_use]
    pub fn all_metadata(&self) -> &HashMap<String, String> {
        &self.metadata
    }

    /// Stored type of a tensor, as the format spells it.
    #[must_use]
    pub fn dtype(&self, key: &str) -> Option<String> {
        self.tensors
            .get(key)
            .map(|info| format!("{:?}", info.dtype))
    }

    /// The value of a tensor of one element of any type: a number or a flag that configures others.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::Shape`] for more or fewer elements, or [`Error::Dtype`].
    pub fn read_number(&self, key: &str) -> Result<f32, Error> {
        let Some(info) = self.tensors.get(key) else {
            return Err(Error::Missing {
                path: self.path.clone(),
                key: key.into(),
            });
        };
        if info.shape.iter().product::<usize>() != 1 {
            return Err(Error::Shape {
                path: self.path.clone(),
                key: key.into(),
                expected: vec![1],
                found: info.shape.clone(),
            });
        }
        let from = self.data_start + info.data_offsets.0;
        let bytes = &self.bytes.as_slice()[from..self.data_start + info.data_offsets.1];
        match convert::number(info.dtype, bytes) {
            Some(value) => Ok(value),
            None => Ok(self.read(key)?[0]),
        }
    }

    /// Type of a tensor, and where its bytes begin and end.
    fn located(&self, key: &str) -> Result<(Dtype, usize, usize), Error> {
        match self.tensors.get(key) {
            Some(info) => {
                let (from, to) = info.data_offsets;
                Ok((info.dtype, self.data_start + from, self.data_start + to))
            }
            None => Err(Error::Missing {
                path: self.path.clone(),
                key: key.into(),
            }),
        }
    }

    /// Values that were found and are finite.
    fn checked<T>(&self, key: &str, dtype: Dtype, found: Option<(T, bool)>) -> Result<T, Error> {
        let (path, key) = (self.path.clone(), key.to_string());
        match found {
            Some((values, true)) => Ok(values),
            Some((_, false)) => Err(Error::NotFinite { path, key }),
            None => Err(Error::Dtype {
                path,
                key,
                dtype: format!("{dtype:?}"),
            }),
        }
    }

    /// Sum of all tensors' bytes.
    #[must_use]
    pub fn data_len(&self) -> usize {
        self.bytes.as_slice().len() - self.data_start
    }
}

impl Bytes {
    /// Maps a file.
    pub(super) fn map(path: &Path) -> Result<Self, Error> {
        let open_error = |source| Error::Open {
            path: path.into(),
            source,
        };
        let file = File::open(path).map_err(open_error)?;
        if file.metadata().map_err(open_error)?.len() == 0 {
            return Err(Error::Truncated {
                path: path.into(),
                expected: 8,
                found: 0,
            });
        }
        // SAFETY: the map is read-only; a process that truncates the file while it is mapped would raise SIGBUS, which
        // the documentation of `--data-dir` forbids (replace files by renaming, as every downloader does).
        let map = unsafe { Mmap::map(&file) }.map_err(open_error)?;
        Ok(Self::Mapped(map))
    }

    pub(super) fn as_slice(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Owned(bytes) => bytes,
        }
    }

    /// Tells the kernel that a range will not be read again, so that it does not count as our memory.
    pub(super) fn done_with(&self, from: usize, len: usize) {
        const WORTH_IT: usize = 1 << 20;
        if let Self::Mapped(map) = self
            && len >= WORTH_IT
        {
            // SAFETY: the map is shared and read-only: dropped pages are read from the file again if ever touched.
            // Advice only: failure changes nothing.
            let _ = unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, from, len) };
        }
    }
}

/// Whether a file begins as safetensors do: a length, then an object in JSON.
pub(super) fn is_safetensors(path: &Path) -> Result<bool, Error> {
    let bytes = Bytes::map(path)?;
    Ok(matches!(
        bytes.as_slice(),
        [_, _, _, _, _, _, 0, 0, b'{', ..]
    ))
}

/// Names the formats people mistake for safetensors.
fn refuse_other_formats(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let convert = "convert it with a tool you trust, or use the model's `.safetensors` release";
    let what = match bytes {
        [b'P', b'K', 3, 4, ..] => "a pickled PyTorch file (zip)",
        [0x80, 2..=5, b'}' | b']' | b'(' | b'c' | 0x8a, ..] => "a pickled PyTorch file",
        [b'G', b'G', b'U', b'F', ..] => "a GGUF file",
        [b'<', b'!' | b'h', ..] => "an HTML page (a failed download)",
        _ if bytes.starts_with(b"version https://git-lfs") => {
            "a Git LFS pointer (the file itself was not fetched)"
        }
        _ => return Ok(()),
    };
    Err(Error::Format {
        path: path.into(),
        what,
        remedy: convert,
    })
}

fn header_error(path: &Path, bytes: &[u8], length: u64, error: &SafeTensorError) -> Error {
    let found = bytes.len() as u64;
    let header = bytes.get(8..8 + length as usize).unwrap_or_default();
    let reason = match error {
        SafeTensorError::MetadataIncompleteBuffer => {
            match serde_json::from_slice::<Metadata>(header)
                .map(|m| 8 + length + m.data_len() as u64)
            {
                Ok(expected) if expected > found => {
                    return Error::Truncated {
                        path: path.into(),
                        expected,
                        found,
                    };
                }
                Ok(expected) => format!("{} bytes follow the last tensor", found - expected),
                Err(_) => "its tensors do not fill the file".into(),
            }
        }
        SafeTensorError::InvalidOffset(key) => {
            format!("the bytes of tensor `{key}` overlap another's or leave a gap")
        }
        SafeTensorError::TensorInvalidInfo => {
            "a tensor's byte count is not its shape times its type".into()
        }
        SafeTensorError::ValidationOverflow => "a shape overflows".into(),
        SafeTensorError::InvalidHeader(_) => "it is not UTF-8".into(),
        SafeTensorError::InvalidHeaderDeserialization(e) | SafeTensorError::JsonError(e) => {
            format!("it is not the format's JSON ({e})")
        }
        other => other.to_string(),
    };
    Error::Header {
        path: path.into(),
        reason,
    }
}

impl Source for SafetensorsFile {
    fn path(&self) -> &Path {
        &self.path
    }

    fn keys(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    fn shape(&self, key: &str) -> Option<&[usize]> {
        self.tensors.get(key).map(|info| info.shape.as_slice())
    }

    fn metadata(&self, key: &str) -> Option<&str> {
        self.metadata.get(key).map(String::as_str)
    }

    fn read(&self, key: &str) -> Result<Vec<f32>, Error> {
        let (dtype, from, to) = self.located(key)?;
        let found = convert::to_f32(dtype, &self.bytes.as_slice()[from..to]);
        self.bytes.done_with(from, to - from);
        self.checked(key, dtype, found)
    }

    fn hold(&self, key: &str) -> Result<Held<'_>, Error> {
        let (dtype, from, to) = self.located(key)?;
        match Held::lying(dtype, &self.bytes, from..to) {
            Some(found) => self.checked(key, dtype, Some(found)),
            None => self.read(key).map(Held::from),
        }
    }
}
