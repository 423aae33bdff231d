//! The LoRA files of some folders, by the names that prompts use.
//!
//! A file is known by its stem and by its alias (`ss_output_name` in its metadata), as in A1111's `networks.py`: an alias that
//! two files share is not used, and `none` never is. Scanning reads headers only; hashes are computed on demand.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::weights::SafetensorsFile;

/// One file.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraEntry {
    /// File stem.
    pub name: String,
    /// `ss_output_name` of the metadata, else the stem.
    pub alias: String,
    /// The file.
    pub path: PathBuf,
    /// The file's metadata as it stands, sorted by key.
    pub metadata: BTreeMap<String, String>,
}

impl LoraEntry {
    fn open(path: &Path) -> Result<Self, crate::weights::Error> {
        let file = SafetensorsFile::open(path)?;
        let name = path
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let metadata: BTreeMap<String, String> = file.all_metadata().clone().into_iter().collect();
        let alias = metadata
            .get("ss_output_name")
            .filter(|alias| !alias.is_empty());
        Ok(Self {
            alias: alias.unwrap_or(&name).clone(),
            name,
            path: path.into(),
            metadata,
        })
    }

    /// The hash the metadata claims (`sshs_model_hash`), which A1111 takes without checking.
    #[must_use]
    pub fn declared_hash(&self) -> Option<&str> {
        let hash = self.metadata.get("sshs_model_hash")?;
        (!hash.is_empty()).then_some(hash.as_str())
    }
}

/// The files found.
#[derive(Debug, Clone, Default)]
pub struct LoraLibrary {
    entries: Vec<LoraEntry>,
    /// Stem to position; of equal stems the last counts.
    names: HashMap<String, usize>,
    /// Stem or alias to position.
    aliases: HashMap<String, usize>,
    /// Lower-case names that are stems only.
    forbidden: HashSet<String>,
}

impl LoraLibrary {
    /// Reads the headers of every `.safetensors` file below `folders`, in order of their paths. Never fails: a file that
    /// cannot be read is logged and left out.
    #[must_use]
    pub fn scan(folders: &[PathBuf]) -> Self {
        let mut library = Self::default();
        for path in folders.iter().flat_map(|folder| files_below(folder)) {
            if path
                .extension()
                .is_some_and(|e| e.eq_ignore_ascii_case("safetensors"))
            {
                match LoraEntry::open(&path) {
                    Ok(entry) => library.add(entry),
                    Err(error) => tracing::warn!(path = %path.display(), %error, "LoRA skipped"),
                }
            }
        }
        library
    }

    fn add(&mut self, entry: LoraEntry) {
        let at = self
            .names
            .get(&entry.name)
            .copied()
            .unwrap_or(self.entries.len());
        if self.aliases.contains_key(&entry.alias) {
            self.forbidden.insert(entry.alias.to_lowercase());
        }
        self.names.insert(entry.name.clone(), at);
        self.aliases.insert(entry.name.clone(), at);
        self.aliases.insert(entry.alias.clone(), at);
        if at < self.entries.len() {
            self.entries[at] = entry;
        } else {
            self.entries.push(entry);
        }
    }

    /// All files, one for each stem.
    #[must_use]
    pub fn entries(&self) -> &[LoraEntry] {
        &self.entries
    }

    /// The file a prompt means by `name`; case matters.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<&LoraEntry> {
        let lower = name.to_lowercase();
        let stems_only = lower == "none" || self.forbidden.contains(&lower);
        let map = if stems_only {
            &self.names
        } else {
            &self.aliases
        };
        map.get(name).and_then(|at| self.entries.get(*at))
    }
}

/// SHA-256 of what follows the header (A1111's "`AutoV3`"), hex; in infotexts its first 12 digits.
///
/// # Errors
/// The file cannot be read, or is shorter than its header says.
pub fn data_sha256(path: &Path) -> io::Result<String> {
    use std::fmt::Write;
    let mut file = fs::File::open(path)?;
    let mut length = [0; 8];
    file.read_exact(&mut length)?;
    let start = u64::from_le_bytes(length).saturating_add(8);
    if start > file.metadata()?.len() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    file.seek(SeekFrom::Start(start))?;
    let (mut hasher, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            break;
        }
        hasher.update(&buffer[..read]);
    }
    let mut hex = String::with_capacity(64);
    for byte in hasher.finalize() {
        write!(hex, "{byte:02x}").expect("writing to a String cannot fail");
    }
    Ok(hex)
}

/// All files below a folder in order of their paths; hidden folders are left out, links are followed.
pub(crate) fn files_below(folder: &Path) -> Vec<PathBuf> {
    const DEEPEST: usize = 32;
    let mut files = Vec::new();
    let mut folders = vec![(folder.to_path_buf(), 0)];
    while let Some((folder, depth)) = folders.pop() {
        let Ok(entries) = fs::read_dir(&folder) else {
            continue;
        };
        for path in entries.flatten().map(|entry| entry.path()) {
            let hidden = path
                .file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with('.'));
            if path.is_file() {
                files.push(path);
            } else if path.is_dir() && !hidden && depth < DEEPEST {
                folders.push((path, depth + 1));
            }
        }
    }
    files.sort_by_cached_key(|path| {
        let text = |p: &Path| p.to_string_lossy().to_lowercase();
        (path.parent().map(text), text(path))
    });
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(path: &Path, metadata: &[(&str, &str)]) {
        let metadata = metadata
            .iter()
            .map(|(k, v)| (k.to_string(), v.to_string()))
            .collect();
        let data = [0u8; 4];
        let view =
            safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![1], &data).unwrap();
        let bytes =
            safetensors::serialize([("lora_unet_out_2.alpha", view)], Some(metadata)).unwrap();
        fs::write(path, bytes).unwrap();
    }

    #[test]
    fn files_are_found_by_stem_and_by_an_alias_of_their_own() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::create_dir_all(at("sub/deeper")).unwrap();
        fs::create_dir(at(".hidden")).unwrap();
        write(&at("a.safetensors"), &[("ss_output_name", "Ink")]);
        write(&at("sub/b.safetensors"), &[("ss_output_name", "shared")]);
        write(
            &at("sub/deeper/c.safetensors"),
            &[("ss_output_name", "shared")],
        );
        write(&at("none.safetensors"), &[]);
        write(&at(".hidden/d.safetensors"), &[]);
        write(&at("e.SAFETENSORS"), &[("ss_output_name", "None")]);
        fs::write(at("broken.safetensors"), b"<html>").unwrap();
        let library = LoraLibrary::scan(&[folder.path().to_path_buf(), at("missing")]);
        let stem = |name: &str| library.find(name).map(|e| e.name.clone());
        assert_eq!(library.entries().len(), 5);
        for (name, found) in [
            ("a", Some("a")),
            ("Ink", Some("a")),
            ("ink", None),
            ("b", Some("b")),
            ("c", Some("c")),
            ("shared", None),
            ("none", Some("none")),
            ("None", None),
            ("e", Some("e")),
            ("d", None),
            ("broken", None),
        ] {
            assert_eq!(stem(name).as_deref(), found, "{name}");
        }
    }

    #[test]
    fn the_hash_covers_the_data_or_is_what_the_metadata_says() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        write(&path, &[("x", "y")]);
        // sha256 of four zero bytes.
        let zeros = "df3f619804a92fdb4057192dc43dd748ea778adc52bc498ce80524c014b81119";
        assert_eq!(data_sha256(&path).unwrap(), zeros);
        let library = LoraLibrary::scan(&[folder.path().to_path_buf()]);
        assert_eq!(library.entries()[0].declared_hash(), None);
        write(&path, &[("sshs_model_hash", "abc")]);
        let library = LoraLibrary::scan(&[folder.path().to_path_buf()]);
        assert_eq!(library.entries()[0].declared_hash(), Some("abc"));
        fs::write(&path, u64::MAX.to_le_bytes()).unwrap();
        assert!(data_sha256(&path).is_err());
    }
}
