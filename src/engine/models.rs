//! What is on disk: checkpoints and VAEs, found by any of their names.
//!
//! The embedded demo model is always the last entry. Scanning reads directory entries only; hashes come from the cache, or
//! are computed when a checkpoint is first used. Identity rules follow the pipeline specification, 1.8 (A1111's
//! `sd_models.py`).

use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};

use super::Error;
use super::approximations::Approximations;
use super::checkpoint::{Checkpoint, Selection, Vae, VaeChoice};
use super::hashes::{self, HashCache};
use super::networks::NetworkCatalog;
use super::scan::{has_extension, natural_order, walk};
use super::upscalers::UpscalerCatalog;
use super::vaes::add_vae;
use crate::config::Config;
use crate::pipeline::{CheckpointIdentity, CheckpointSource};
use crate::weights::WeightFile;

/// Everything on disk.
#[derive(Debug)]
pub struct Catalog {
    checkpoint_dirs: Vec<PathBuf>,
    vae_dirs: Vec<PathBuf>,
    pub(super) hashing: bool,
    pub(super) cache: HashCache,
    pub(super) networks: NetworkCatalog,
    pub(super) upscalers: UpscalerCatalog,
    approximations: Approximations,
    /// Files outside the directories that were opened by path.
    added: RwLock<Vec<Checkpoint>>,
    pub(super) found: RwLock<Found>,
}

#[derive(Debug, Default)]
pub(super) struct Found {
    checkpoints: Vec<Checkpoint>,
    pub(super) vaes: Vec<Vae>,
}

impl Catalog {
    /// Scans the configured directories.
    #[must_use]
    pub fn open(config: &Config) -> Self {
        let catalog = Self {
            checkpoint_dirs: config.checkpoint_dirs(),
            vae_dirs: config.vae_dirs(),
            hashing: config.model.hashing,
            cache: HashCache::open(config.hash_cache_file()),
            networks: NetworkCatalog::open(config),
            upscalers: UpscalerCatalog::open(config),
            approximations: Approximations::open(config),
            added: RwLock::default(),
            found: RwLock::default(),
        };
        catalog.rescan();
        catalog
    }

    /// Looks at the directories again.
    pub fn rescan(&self) {
        let mut found = Found::default();
        for dir in &self.checkpoint_dirs {
            walk(dir, dir, 0, &mut |relative, path| {
                self.add_checkpoint_file(&mut found, relative, path);
            });
        }
        for dir in &self.vae_dirs {
            walk(dir, dir, 0, &mut |_, path| add_vae(&mut found.vaes, path));
        }
        found
            .checkpoints
            .sort_by(|a, b| natural_order(&a.name, &b.name));
        found.checkpoints.dedup_by(|a, b| a.name == b.name);
        found.vaes.sort_by(|a, b| natural_order(&a.name, &b.name));
        found.checkpoints.extend(
            self.added
                .read()
                .unwrap_or_else(PoisonError::into_inner)
                .iter()
                .cloned(),
        );
        found.checkpoints.push(Checkpoint::demo());
        *self.found.write().unwrap_or_else(PoisonError::into_inner) = found;
    }

    /// Loadable checkpoints in A1111's order, the demo model last.
    #[must_use]
    pub fn checkpoints(&self) -> Vec<Checkpoint> {
        self.found
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .checkpoints
            .clone()
    }

    /// VAE files.
    #[must_use]
    pub fn vaes(&self) -> Vec<Vae> {
        self.found
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .vaes
            .clone()
    }

    /// Small stand-ins of the VAE.
    #[must_use]
    pub fn approximations(&self) -> &Approximations {
        &self.approximations
    }

    /// The checkpoint used when none is asked for: the first one found, else the demo model.
    #[must_use]
    pub fn default_checkpoint(&self) -> Checkpoint {
        self.checkpoints()
            .into_iter()
            .next()
            .unwrap_or_else(Checkpoint::demo)
    }

    /// Finds a checkpoint by title, relative name, stem, model name, hash, or a title whose bracket is out of date.
    ///
    /// # Errors
    /// [`Error::CheckpointNotFound`] with the titles there are; [`Error::Weights`] for a `.ckpt`, which is not listed.
    pub fn find(&self, name: &str) -> Result<Checkpoint, Error> {
        let wanted = name.trim().replace('\\', "/");
        let bare = wanted
            .strip_suffix(']')
            .and_then(|text| text.rsplit_once(" ["))
            .map(|(name, _)| name);
        let found = self.found.read().unwrap_or_else(PoisonError::into_inner);
        let by_name = |wanted: &str| {
            found
                .checkpoints
                .iter()
                .find(|checkpoint| checkpoint.answers_to(wanted))
        };
        let by_legacy_hash = || {
            found
                .checkpoints
                .iter()
                .find(|checkpoint| checkpoint.has_legacy_hash(&wanted))
        };
        if let Some(checkpoint) = by_name(&wanted)
            .or_else(|| bare.and_then(by_name))
            .or_else(by_legacy_hash)
        {
            return Ok(checkpoint.clone());
        }
        let known = found.checkpoints.iter().map(Checkpoint::title).collect();
        Err(Error::CheckpointNotFound {
            name: name.to_string(),
            known,
        })
    }

    /// Like [`Catalog::find`], but a path of an existing file is taken as well and listed from then on. For the command line,
    /// not for the API.
    ///
    /// # Errors
    /// As [`Catalog::find`].
    pub fn find_or_open(&self, name: &str) -> Result<Checkpoint, Error> {
        let path = Path::new(name);
        if !path.is_file() {
            return self.find(name);
        }
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
        let listed = self
            .checkpoints()
            .into_iter()
            .find(|c| c.source == CheckpointSource::File(path.clone()));
        if let Some(checkpoint) = listed {
            return Ok(checkpoint);
        }
        let name = path
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default();
        Ok(Checkpoint {
            source: CheckpointSource::File(path),
            name,
            sha256: None,
            config: None,
        })
    }

    /// Turns a choice into what the device thread needs, computing hashes where they are missing. Blocks for seconds on a
    /// large file seen for the first time.
    ///
    /// # Errors
    /// A file cannot be read, or the VAE is unknown.
    pub fn select(&self, mut checkpoint: Checkpoint, vae: &VaeChoice) -> Result<Selection, Error> {
        if let CheckpointSource::File(path) = &checkpoint.source
            && self.hashing
        {
            let key = format!("checkpoint/{}", checkpoint.name);
            if checkpoint.sha256.is_none() {
                // What cannot be loaded is refused before seconds are spent on its hash.
                WeightFile::open(path)?;
            }
            let hash = self.cache.ensure(&key, path).map_err(|source| Error::Io {
                path: path.clone(),
                source,
            })?;
            self.remember(&checkpoint.source, &hash);
            checkpoint.sha256 = Some(hash);
        }
        let vae = self
            .find_vae(&checkpoint, vae)?
            .map(|vae| self.identify_vae(vae))
            .transpose()?;
        let shorthash = checkpoint.shorthash().unwrap_or_default().to_string();
        Ok(Selection {
            title: checkpoint.title(),
            identity: CheckpointIdentity {
                name: checkpoint.stem().to_string(),
                shorthash,
            },
            sha256: checkpoint.sha256.unwrap_or_default(),
            source: checkpoint.source,
            vae,
        })
    }

    /// Puts a hash into the list, so that titles show it.
    fn remember(&self, source: &CheckpointSource, hash: &str) {
        let mut found = self.found.write().unwrap_or_else(PoisonError::into_inner);
        for checkpoint in found
            .checkpoints
            .iter_mut()
            .filter(|checkpoint| checkpoint.source == *source)
        {
            checkpoint.sha256 = Some(hash.to_string());
        }
    }

    fn add_checkpoint_file(&self, found: &mut Found, relative: &Path, path: &Path) {
        let name = relative.to_string_lossy().replace('\\', "/");
        let is_vae = name
            .to_lowercase()
            .rsplit('/')
            .next()
            .is_some_and(|file| file.contains(".vae."));
        if is_vae {
            add_vae(&mut found.vaes, path);
            return;
        }
        let config = Some(path.with_extension("yaml")).filter(|yaml| yaml.is_file());
        let mut checkpoint = Checkpoint {
            source: CheckpointSource::File(path.to_path_buf()),
            name,
            sha256: None,
            config,
        };
        if has_extension(path, &["safetensors", "ckpt"]) {
            let cached = |stamp| {
                self.cache
                    .get(&format!("checkpoint/{}", checkpoint.name), stamp)
            };
            checkpoint.sha256 = hashes::Stamp::of(path)
                .ok()
                .filter(|_| self.hashing)
                .and_then(cached);
            found.checkpoints.push(checkpoint);
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::fs;

    use super::*;
    use crate::weights;

    pub(in crate::engine) fn catalog(files: &[&str]) -> (tempfile::TempDir, Catalog) {
        let dir = tempfile::tempdir().unwrap();
        for file in files {
            let path = dir.path().join("models").join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, b"\x08\0\0\0\0\0\0\0{}      ").unwrap();
        }
        let config = Config {
            data_dir: dir.path().to_path_buf(),
            ..Config::default()
        };
        let catalog = Catalog::open(&config);
        (dir, catalog)
    }

    #[test]
    fn checkpoints_are_listed_naturally_with_the_demo_last() {
        let (_dir, catalog) = catalog(&[
            "Stable-diffusion/m10.safetensors",
            "Stable-diffusion/M2.safetensors",
            "Stable-diffusion/xl/foo.safetensors",
            "Stable-diffusion/foo.vae.safetensors",
            "Stable-diffusion/old.ckpt",
            "VAE/nice.safetensors",
        ]);
        let names: Vec<String> = catalog
            .checkpoints()
            .iter()
            .map(|c| c.name.clone())
            .collect();
        assert_eq!(
            names,
            [
                "M2.safetensors",
                "m10.safetensors",
                "old.ckpt",
                "xl/foo.safetensors",
                "sdgen-demo"
            ]
        );
        let vaes: Vec<String> = catalog.vaes().into_iter().map(|vae| vae.name).collect();
        assert_eq!(vaes, ["foo.vae.safetensors", "nice.safetensors"]);
    }

    #[test]
    fn every_alias_finds_the_checkpoint() {
        let (dir, catalog) = catalog(&["Stable-diffusion/xl/foo.safetensors"]);
        let checkpoint = catalog.find("foo").unwrap();
        let selected = catalog.select(checkpoint, &VaeChoice::Automatic).unwrap();
        let short = &selected.sha256[..10];
        assert_eq!(selected.title, format!("xl/foo.safetensors [{short}]"));
        let legacy = hashes::legacy(
            &dir.path()
                .join("models/Stable-diffusion/xl/foo.safetensors"),
        )
        .unwrap();
        for alias in [
            "xl/foo.safetensors",
            "xl\\foo.safetensors",
            "xl_foo",
            "foo",
            short,
            &selected.sha256,
            &selected.title,
            &format!("foo [{short}]"),
            "foo [0000000000]",
            &format!("foo [{legacy}]"),
            &legacy,
        ] {
            assert_eq!(
                catalog.find(alias).unwrap().name,
                "xl/foo.safetensors",
                "{alias}"
            );
        }
    }

    #[test]
    fn unknown_names_and_damaged_files_are_told_apart() {
        let (dir, catalog) = catalog(&["Stable-diffusion/old.ckpt"]);
        fs::write(
            dir.path().join("models/Stable-diffusion/old.ckpt"),
            b"\x80\x02}q\0.",
        )
        .unwrap();
        let error = catalog.find("nope").unwrap_err().to_string();
        assert_eq!(
            error,
            format!(
                "checkpoint not found: `nope`; known: `old.ckpt`, `{}`",
                Checkpoint::demo().title()
            )
        );
        let old = catalog.find("old.ckpt").unwrap();
        assert!(matches!(
            catalog.select(old, &VaeChoice::Automatic),
            Err(Error::Weights(weights::Error::Pickle { .. }))
        ));
        assert!(matches!(
            catalog.find("../../etc/passwd"),
            Err(Error::CheckpointNotFound { .. })
        ));
    }
}
