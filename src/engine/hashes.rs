//! SHA-256 of model files, computed once and remembered in A1111's `cache.json`.
//!
//! Section `hashes`, key `checkpoint/<name>`, `vae/<name>` or `textual_inversion/<name>`, and section `hashes-addnet`, key
//! `lora/<name>`; value `{mtime, sha256}` as A1111 writes it, plus our `size`.
//! An entry is valid while the file is not newer than `mtime` and, where `size` is known, has that size. Other sections and
//! keys of the file are kept. The file is replaced as a whole, so a crash leaves the old or the new one.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::UNIX_EPOCH;

use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

/// The cache file.
#[derive(Debug)]
pub struct HashCache {
    path: PathBuf,
    sections: Mutex<Map<String, Value>>,
}

/// Section of hashes of whole files.
const WHOLE: &str = "hashes";
/// Section of hashes of what follows a safetensors header.
const DATA: &str = "hashes-addnet";

/// What identifies a version of a file.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Stamp {
    /// Bytes.
    pub size: u64,
    /// Seconds since 1970.
    pub mtime: f64,
}

impl Stamp {
    /// Reads size and time of a file.
    ///
    /// # Errors
    /// The file is not there or not readable.
    pub fn of(path: &Path) -> io::Result<Self> {
        let meta = fs::metadata(path)?;
        let mtime = meta
            .modified()?
            .duration_since(UNIX_EPOCH)
            .map_or(0.0, |age| age.as_secs_f64());
        Ok(Self {
            size: meta.len(),
            mtime,
        })
    }
}

impl HashCache {
    /// Opens the cache; a missing or damaged file is an empty one.
    #[must_use]
    pub fn open(path: PathBuf) -> Self {
        let mut sections = read_sections(&path);
        sections.retain(|name, _| name == WHOLE || name == DATA);
        Self {
            path,
            sections: Mutex::new(sections),
        }
    }

    /// The remembered hash of this version of a file.
    #[must_use]
    pub fn get(&self, key: &str, stamp: Stamp) -> Option<String> {
        self.get_in(WHOLE, key, stamp)
    }

    fn get_in(&self, section: &str, key: &str, stamp: Stamp) -> Option<String> {
        let sections = self.sections.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = sections.get(section)?.get(key)?;
        let fresh = entry.get("mtime")?.as_f64()? + 1e-6 >= stamp.mtime;
        let same_size = entry
            .get("size")
            .and_then(Value::as_u64)
            .is_none_or(|size| size == stamp.size);
        let hash = entry.get("sha256")?.as_str()?;
        (fresh && same_size && hash.len() == 64).then(|| hash.to_string())
    }

    /// Remembers a hash. A cache that cannot be written costs time only, so that is logged.
    fn put_in(&self, section: &str, key: &str, stamp: Stamp, sha256: &str) {
        let entry = json!({ "mtime": stamp.mtime, "sha256": sha256, "size": stamp.size });
        let mut known = self.sections.lock().unwrap_or_else(PoisonError::into_inner);
        let mut stored = read_sections(&self.path);
        for sections in [&mut *known, &mut stored] {
            let entries = sections.entry(section).or_insert_with(|| Map::new().into());
            if let Value::Object(entries) = entries {
                entries.insert(key.to_string(), entry.clone());
            }
        }
        if let Err(error) = replace_file(&self.path, &Value::Object(stored)) {
            tracing::warn!(path = %self.path.display(), %error, "hash cache not written");
        }
    }

    /// The hash of a file, from the cache or by reading it (seconds for a large file).
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn ensure(&self, key: &str, path: &Path) -> io::Result<String> {
        self.ensure_in(WHOLE, key, path, sha256)
    }

    /// The same for the hash of a safetensors file's data, which `compute` reads.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn ensure_data(
        &self,
        key: &str,
        path: &Path,
        compute: fn(&Path) -> io::Result<String>,
    ) -> io::Result<String> {
        self.ensure_in(DATA, key, path, compute)
    }

    /// The remembered hash of a safetensors file's data; nothing is read.
    #[must_use]
    pub fn known_data(&self, key: &str, path: &Path) -> Option<String> {
        self.get_in(DATA, key, Stamp::of(path).ok()?)
    }

    fn ensure_in(
        &self,
        section: &str,
        key: &str,
        path: &Path,
        compute: fn(&Path) -> io::Result<String>,
    ) -> io::Result<String> {
        let stamp = Stamp::of(path)?;
        if let Some(hash) = self.get_in(section, key, stamp) {
            return Ok(hash);
        }
        let hash = compute(path)?;
        self.put_in(section, key, stamp, &hash);
        Ok(hash)
    }
}

/// SHA-256 of a whole file, hex.
///
/// # Errors
/// The file cannot be read.
pub fn sha256(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            return Ok(hex(&hasher.finalize()));
        }
        hasher.update(&buffer[..read]);
    }
}

/// A1111's oldest hash: 8 hex digits of the SHA-256 of the 64 KiB at 1 MiB.
///
/// # Errors
/// The file cannot be read.
pub fn legacy(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(0x10_0000))?;
    let mut bytes = Vec::new();
    file.take(0x1_0000).read_to_end(&mut bytes)?;
    Ok(hex(&Sha256::digest(&bytes))[..8].to_string())
}

/// Lower-case hex digits.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes
        .iter()
        .fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
            write!(text, "{byte:02x}").expect("writing to a String cannot fail");
            text
        })
}

/// Writes JSON to a file in one step, as A1111 formats it.
///
/// # Errors
/// The directory or file cannot be written.
pub fn replace_file(path: &Path, value: &Value) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    let mut text = Vec::new();
    let formatter = serde_json::ser::PrettyFormatter::with_indent(b"    ");
    serde::Serialize::serialize(
        value,
        &mut serde_json::Serializer::with_formatter(&mut text, formatter),
    )?;
    let mut partial = path.as_os_str().to_owned();
    partial.push(".part");
    fs::write(&partial, text)?;
    fs::rename(&partial, path)
}

fn read_sections(path: &Path) -> Map<String, Value> {
    let text = fs::read(path).unwrap_or_default();
    serde_json::from_slice(&text).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_are_remembered_until_the_file_changes() {
        let dir = tempfile::tempdir().unwrap();
        let (file, cache) = (
            dir.path().join("a.safetensors"),
            dir.path().join("cache.json"),
        );
        fs::write(&cache, r#"{"safetensors-metadata": {"x": 1}, "hashes": {"lora/y": {"mtime": 1.0, "sha256": "z"}}}"#).unwrap();
        fs::write(&file, b"abc").unwrap();
        let first = HashCache::open(cache.clone())
            .ensure("checkpoint/a.safetensors", &file)
            .unwrap();
        assert_eq!(
            first,
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        let reopened = HashCache::open(cache.clone());
        let stamp = Stamp::of(&file).unwrap();
        assert_eq!(reopened.get("checkpoint/a.safetensors", stamp), Some(first));
        assert_eq!(
            reopened.get(
                "checkpoint/a.safetensors",
                Stamp {
                    mtime: stamp.mtime + 5.0,
                    ..stamp
                }
            ),
            None
        );
        assert_eq!(
            reopened.get("checkpoint/a.safetensors", Stamp { size: 4, ..stamp }),
            None
        );
        let kept = read_sections(&cache);
        assert_eq!(kept["safetensors-metadata"]["x"], 1);
        assert_eq!(kept["hashes"]["lora/y"]["sha256"], "z");
    }

    #[test]
    fn a_damaged_cache_is_an_empty_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cache.json");
        fs::write(&path, b"{\"hashes\": {").unwrap();
        let cache = HashCache::open(path);
        assert_eq!(
            cache.get(
                "checkpoint/a",
                Stamp {
                    size: 0,
                    mtime: 0.0
                }
            ),
            None
        );
    }

    #[test]
    fn the_legacy_hash_of_a_short_file_is_that_of_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a");
        fs::write(&file, b"abc").unwrap();
        assert_eq!(legacy(&file).unwrap(), "e3b0c442");
    }
}
