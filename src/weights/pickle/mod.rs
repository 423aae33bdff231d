//! A PyTorch file (`.pth`, `.pt`, `.ckpt`, `.bin`): a zip of one pickle and the bytes of its tensors, memory-mapped.
//!
//! A pickle is a program. This one is never run: `guard` walks its opcodes first and admits only what `torch.save` writes for
//! a state dict, within limits of size, depth and copies; then candle's reader builds the values. (candle alone runs nothing
//! either, but it panics on tuples that are too short and copies without bound.) Tensors may lie under `params_ema`, `params`,
//! `state_dict` or `string_to_param`. Nothing is allocated on the word of the file: every tensor lies within its zip entry, checked at opening.

mod guard;
mod table;
mod zip;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use safetensors::Dtype;

use super::file::Bytes;
use super::{Error, Source, convert};
use table::Storage;

/// An opened PyTorch file.
#[derive(Debug)]
pub struct PickleFile {
    path: PathBuf,
    bytes: Bytes,
    tensors: BTreeMap<String, Tensor>,
}

/// Where a tensor lies in the file.
#[derive(Debug)]
struct Tensor {
    /// What `torch` calls the type, and ours if it can be computed with.
    storage: Storage,
    shape: Vec<usize>,
    stride: Vec<usize>,
    /// First byte of the storage in the file, and bytes of it.
    start: usize,
    len: usize,
    /// First value of the tensor in the storage.
    offset: usize,
}

/// What is wrong with a file; the path is added by the caller.
type Reason = String;

impl PickleFile {
    /// Maps a file, reads its pickle and checks where its tensors lie.
    ///
    /// # Errors
    /// [`Error::Open`], or [`Error::Pickle`] with what is wrong.
    pub fn open(path: &Path) -> Result<Self, Error> {
        Self::read(path, Bytes::map(path)?)
    }

    /// The same from memory; `path` is only used in messages.
    ///
    /// # Errors
    /// As for [`Self::open`].
    pub fn from_vec(path: &Path, bytes: Vec<u8>) -> Result<Self, Error> {
        Self::read(path, Bytes::Owned(bytes))
    }

    /// What `torch` calls the type that a tensor is stored in.
    #[must_use]
    pub fn dtype(&self, key: &str) -> Option<&'static str> {
        let tensor = self.tensors.get(key)?;
        let float = tensor.storage.dtype;
        Some(match float {
            Some(Dtype::F32) => "F32",
            Some(Dtype::F16) => "F16",
            Some(Dtype::BF16) => "BF16",
            _ => tensor.storage.name,
        })
    }

    /// Bytes of all tensors.
    #[must_use]
    pub fn data_len(&self) -> usize {
        let bytes = |tensor: &Tensor| tensor.elements().unwrap_or(0) * tensor.storage.width;
        self.tensors.values().map(bytes).sum()
    }

    fn read(path: &Path, bytes: Bytes) -> Result<Self, Error> {
        let refuse = |reason| Error::Pickle {
            path: path.into(),
            reason,
        };
        let tensors = tensors(bytes.as_slice()).map_err(refuse)?;
        Ok(Self {
            path: path.into(),
            bytes,
            tensors,
        })
    }
}

fn tensors(bytes: &[u8]) -> Result<BTreeMap<String, Tensor>, Reason> {
    if let [0x80, 2..=5, ..] = bytes {
        return Err("it is in PyTorch's format from before version 1.6".into());
    }
    let entries = zip::entries(bytes)?;
    let mut pickles = entries.keys().filter_map(|name| {
        let root = name.strip_suffix("data.pkl")?;
        (root.is_empty() || root.ends_with('/')).then_some((name, root))
    });
    let (name, root) = pickles.next().ok_or("it holds no `data.pkl`")?;
    if pickles.next().is_some() {
        return Err("it holds several `data.pkl`".into());
    }
    let program = &bytes[entries[name].clone()];
    guard::check(program)?;
    let mut stack = candle_core::pickle::Stack::empty();
    let mut reader = program;
    let value = stack
        .read_loop(&mut reader)
        .and_then(|()| stack.finalize())
        .map_err(|error| format!("its pickle is damaged: {error}"))?;
    let mut tensors = BTreeMap::new();
    for (key, info) in table::tensors(&value)? {
        let entry = format!("{root}data/{}", info.entry);
        let range = entries
            .get(&entry)
            .ok_or_else(|| format!("entry `{entry}` of tensor `{key}` is missing"))?;
        let tensor = Tensor {
            storage: info.storage,
            start: range.start,
            len: range.len(),
            shape: info.shape,
            stride: info.stride,
            offset: info.offset,
        };
        tensor
            .check()
            .map_err(|why| format!("tensor `{key}` {why}"))?;
        if tensors.insert(key.clone(), tensor).is_some() {
            return Err(format!("it holds tensor `{key}` twice"));
        }
    }
    if tensors.is_empty() {
        return Err("it holds no tensors".into());
    }
    Ok(tensors)
}

impl Tensor {
    fn elements(&self) -> Option<usize> {
        self.shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d))
    }

    /// Whether all its values lie in the storage, and are no more than it holds.
    fn check(&self) -> Result<(), Reason> {
        let held = self.len / self.storage.width;
        let elements = self.elements().ok_or("is larger than any memory")?;
        if self.shape.len() != self.stride.len() {
            return Err("has not as many strides as dimensions".into());
        }
        let last = self
            .shape
            .iter()
            .zip(&self.stride)
            .filter(|_| elements > 0)
            .try_fold(self.offset, |at, (d, s)| {
                at.checked_add((d - 1).checked_mul(*s)?)
            });
        match last {
            Some(last) if elements <= held && (elements == 0 || last < held) => Ok(()),
            _ => Err(format!(
                "of shape {:?} lies outside its {held} stored values",
                self.shape
            )),
        }
    }

    fn is_contiguous(&self) -> bool {
        let mut expected = 1;
        let row_major = |(d, s): (&usize, &usize)| {
            let fits = *d == 1 || *s == expected;
            expected *= d;
            fits
        };
        self.shape.iter().zip(&self.stride).rev().all(row_major)
    }

    /// The values, row major, as bytes of the stored type.
    fn gather(&self, storage: &[u8]) -> Vec<u8> {
        let width = self.storage.width;
        let count = self.elements().unwrap_or(0);
        let mut out = Vec::with_capacity(count * width);
        let mut index = vec![0usize; self.shape.len()];
        for _ in 0..count {
            let steps = index.iter().zip(&self.stride).map(|(i, s)| i * s);
            let at = (self.offset + steps.sum::<usize>()) * width;
            out.extend_from_slice(&storage[at..at + width]);
            for (i, d) in index.iter_mut().zip(&self.shape).rev() {
                *i += 1;
                if *i < *d {
                    break;
                }
                *i = 0;
            }
        }
        out
    }

    fn values(&self, bytes: &[u8], dtype: Dtype) -> Option<(Vec<f32>, bool)> {
        if self.elements() == Some(0) {
            return Some((Vec::new(), true));
        }
        let storage = &bytes[self.start..self.start + self.len];
        if !self.is_contiguous() {
            return convert::to_f32(dtype, &self.gather(storage));
        }
        let from = self.offset * self.storage.width;
        let to = from + self.elements()? * self.storage.width;
        convert::to_f32(dtype, storage.get(from..to)?)
    }
}

impl Source for PickleFile {
    fn path(&self) -> &Path {
        &self.path
    }

    fn keys(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    fn shape(&self, key: &str) -> Option<&[usize]> {
        self.tensors.get(key).map(|tensor| tensor.shape.as_slice())
    }

    fn metadata(&self, _: &str) -> Option<&str> {
        None
    }

    fn read(&self, key: &str) -> Result<Vec<f32>, Error> {
        let (path, key) = (self.path.clone(), key.to_string());
        let Some(tensor) = self.tensors.get(&key) else {
            return Err(Error::Missing { path, key });
        };
        let values = tensor
            .storage
            .dtype
            .and_then(|dtype| tensor.values(self.bytes.as_slice(), dtype));
        match values {
            Some((values, true)) => Ok(values),
            Some((_, false)) => Err(Error::NotFinite { path, key }),
            None => Err(Error::Dtype {
                path,
                key,
                dtype: tensor.storage.name.into(),
            }),
        }
    }
}

#[cfg(test)]
mod tests;
