//! LoRA files and textual inversions on disk, and what of them a request gets.
//!
//! LoRAs are scanned at start, on demand, and once more when a prompt names one that is not known. Embeddings are small and kept
//! in memory; their folder is read again when it has changed. Hashes are A1111's: of a LoRA's data, of a whole embedding.

use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};
use std::time::SystemTime;

use super::hashes::HashCache;
use super::models::Catalog;
use crate::config::Config;
use crate::pipeline::GenerateRequest;
use crate::pipeline::networks::KnownLora;
use crate::weights::embedding::EmbeddingLibrary;
pub use crate::weights::lora::library::LoraEntry;
use crate::weights::lora::library::{LoraLibrary, data_sha256};

/// Hex digits of a hash in an infotext.
const SHORT: usize = 12;

/// Everything there is for prompts to name.
#[derive(Debug)]
pub struct NetworkCatalog {
    lora_dirs: Vec<PathBuf>,
    embeddings_dir: PathBuf,
    hashing: bool,
    loras: RwLock<LoraLibrary>,
    embeddings: RwLock<(Option<SystemTime>, EmbeddingLibrary)>,
}

impl NetworkCatalog {
    /// Scans the configured directories for LoRAs; embeddings are read when first needed.
    #[must_use]
    pub fn open(config: &Config) -> Self {
        let lora_dirs = config.lora_dirs();
        Self {
            loras: RwLock::new(LoraLibrary::scan(&lora_dirs)),
            embeddings: RwLock::default(),
            embeddings_dir: config.embeddings_dir(),
            hashing: config.model.hashing,
            lora_dirs,
        }
    }

    /// Looks at the LoRA directories again.
    pub fn rescan_loras(&self) {
        let library = LoraLibrary::scan(&self.lora_dirs);
        *self.loras.write().unwrap_or_else(PoisonError::into_inner) = library;
    }

    /// All LoRAs.
    #[must_use]
    pub fn loras(&self) -> Vec<LoraEntry> {
        let loras = self.loras.read().unwrap_or_else(PoisonError::into_inner);
        loras.entries().to_vec()
    }

    /// All embeddings, read again if their folder has changed. Blocks while files are hashed.
    #[must_use]
    fn embeddings(&self, cache: &HashCache) -> EmbeddingLibrary {
        let stamp = EmbeddingLibrary::stamp(&self.embeddings_dir);
        {
            let known = self
                .embeddings
                .read()
                .unwrap_or_else(PoisonError::into_inner);
            if known.0 == stamp {
                return known.1.clone();
            }
        }
        let library = EmbeddingLibrary::scan(&self.embeddings_dir, |path| {
            let key = format!("textual_inversion/{}", stem(path));
            let hash = self
                .hashing
                .then(|| cache.ensure(&key, path).ok())
                .flatten()?;
            Some(hash[..SHORT].to_string())
        });
        *self
            .embeddings
            .write()
            .unwrap_or_else(PoisonError::into_inner) = (stamp, library.clone());
        library
    }

    /// Forgets the embeddings that were read.
    pub fn forget_embeddings(&self) {
        *self
            .embeddings
            .write()
            .unwrap_or_else(PoisonError::into_inner) = Default::default();
    }

    /// Gives a request the files its prompts name and all embeddings. Blocks while files are hashed.
    fn prepare(&self, request: &mut GenerateRequest, cache: &HashCache) {
        let names = request.lora_names();
        let known = |name: &str| {
            let loras = self.loras.read().unwrap_or_else(PoisonError::into_inner);
            loras.find(name).cloned()
        };
        if names.iter().any(|name| known(name).is_none()) {
            self.rescan_loras();
        }
        let found = names.into_iter().filter_map(|name| {
            let lora = self.identify(&known(&name)?, cache)?;
            Some((name, lora))
        });
        request.loras = Some(found.collect());
        request.embeddings = self.embeddings(cache).loaded;
    }

    /// Path, hash and version of a file, or nothing if it is gone.
    fn identify(&self, entry: &LoraEntry, cache: &HashCache) -> Option<KnownLora> {
        let modified = std::fs::metadata(&entry.path)
            .and_then(|meta| meta.modified())
            .ok()?;
        Some(KnownLora {
            path: entry.path.clone(),
            hash: self.short_hash(entry, cache),
            modified: Some(modified),
        })
    }

    /// The hash that infotexts have; empty if the file may not or cannot be hashed.
    fn short_hash(&self, entry: &LoraEntry, cache: &HashCache) -> String {
        let hash = match entry.declared_hash() {
            Some(hash) => hash.to_string(),
            None if self.hashing => {
                let key = format!("lora/{}", entry.name);
                let hash = cache.ensure_data(&key, &entry.path, data_sha256);
                hash.inspect_err(
                    |error| tracing::warn!(name = entry.name, %error, "LoRA not hashed"),
                )
                .unwrap_or_default()
            }
            None => String::new(),
        };
        hash.chars().take(SHORT).collect()
    }
}

impl Catalog {
    /// LoRAs and embeddings.
    #[must_use]
    pub fn networks(&self) -> &NetworkCatalog {
        &self.networks
    }

    /// The hash of a LoRA as infotexts have it, if it is known without reading the file.
    #[must_use]
    pub fn known_lora_hash(&self, lora: &LoraEntry) -> Option<String> {
        let known = || {
            let key = format!("lora/{}", lora.name);
            self.cache.known_data(&key, &lora.path)
        };
        let hash = lora.declared_hash().map(str::to_string).or_else(known)?;
        Some(hash.chars().take(SHORT).collect())
    }

    /// Textual inversions. Blocks while files are hashed.
    #[must_use]
    pub fn embeddings(&self) -> EmbeddingLibrary {
        self.networks.embeddings(&self.cache)
    }

    /// Gives a request the LoRAs and embeddings its prompts may name. Blocks while files are hashed.
    pub fn add_networks(&self, request: &mut GenerateRequest) {
        self.networks.prepare(request, &self.cache);
    }
}

fn stem(path: &Path) -> String {
    path.file_stem()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}
