//! Which VAE a job gets: the rules of the pipeline specification, 8.3 (A1111's `sd_vae.py`, `resolve_vae`).
//!
//! In this order: the command line; the option `sd_vae`, while it overrides preferences and is not `Automatic`; the entry `vae` of
//! the checkpoint's user metadata (`<stem>.json` beside it); a VAE file named like the checkpoint; the option; the checkpoint's
//! own. A name that no file has leads to the checkpoint's own, with a warning.

use std::path::{Path, PathBuf};
use std::sync::PoisonError;

use super::Error;
use super::checkpoint::{Checkpoint, Selection, Vae, strip_extension};
use super::models::Catalog;
use super::scan::has_extension;
use crate::pipeline::{CheckpointSource, VaeIdentity};

/// Which VAE to use with a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VaeChoice {
    /// The checkpoint's preference: its user metadata, else a file named like it, else its own.
    Automatic,
    /// The checkpoint's own.
    Own,
    /// A file by name.
    Named(String),
    /// The checkpoint's preference if it has one, else this file.
    Unless(String),
}

impl VaeChoice {
    /// The option `sd_vae`, which overrides what a checkpoint prefers.
    #[must_use]
    pub fn from_option(text: &str) -> Self {
        match text {
            "" | "Automatic" => Self::Automatic,
            "None" => Self::Own,
            name => Self::Named(name.to_string()),
        }
    }

    /// The option `sd_vae` under `sd_vae_overrides_per_model_preferences`.
    #[must_use]
    pub fn from_options(text: &str, overrides: bool) -> Self {
        match Self::from_option(text) {
            Self::Own if !overrides => Self::Automatic,
            Self::Named(name) if !overrides => Self::Unless(name),
            choice => choice,
        }
    }
}

/// What a checkpoint prefers.
#[derive(Debug, PartialEq, Eq)]
enum Preference {
    /// Nothing.
    None,
    /// Its own VAE, although there may be others.
    Own,
    File(Vae),
}

impl Catalog {
    /// [`Catalog::select`], but a VAE that is not there leads to the checkpoint's own: as A1111 does, since a stale setting must
    /// not make every request fail.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn select_or_own(
        &self,
        checkpoint: Checkpoint,
        vae: &VaeChoice,
    ) -> Result<Selection, Error> {
        match self.select(checkpoint.clone(), vae) {
            Err(Error::VaeNotFound { name, .. }) => {
                tracing::warn!(vae = name, "VAE not found, the checkpoint's own is used");
                self.select(checkpoint, &VaeChoice::Own)
            }
            other => other,
        }
    }

    pub(super) fn find_vae(
        &self,
        checkpoint: &Checkpoint,
        choice: &VaeChoice,
    ) -> Result<Option<Vae>, Error> {
        match choice {
            VaeChoice::Own => Ok(None),
            VaeChoice::Named(name) => self.vae_named(name).map(Some),
            VaeChoice::Automatic => match self.preference(checkpoint) {
                Preference::None | Preference::Own => Ok(None),
                Preference::File(vae) => Ok(Some(vae)),
            },
            VaeChoice::Unless(name) => match self.preference(checkpoint) {
                Preference::None => self.vae_named(name).map(Some),
                Preference::Own => Ok(None),
                Preference::File(vae) => Ok(Some(vae)),
            },
        }
    }

    fn preference(&self, checkpoint: &Checkpoint) -> Preference {
        let CheckpointSource::File(path) = &checkpoint.source else {
            return Preference::None;
        };
        match user_metadata_vae(path).as_deref() {
            None | Some("Automatic") => {}
            Some("None") => return Preference::Own,
            Some(name) => {
                if let Ok(vae) = self.vae_named(name) {
                    return Preference::File(vae);
                }
            }
        }
        let stem = checkpoint.stem();
        let mut vaes = self.vaes().into_iter();
        vaes.find(|vae| vae.name.starts_with(stem))
            .map_or(Preference::None, Preference::File)
    }

    fn vae_named(&self, name: &str) -> Result<Vae, Error> {
        let vaes = self.vaes();
        let listed = vaes
            .iter()
            .find(|vae| vae.name == name)
            .or_else(|| vaes.iter().find(|vae| strip_extension(&vae.name) == name));
        listed.cloned().ok_or_else(|| Error::VaeNotFound {
            name: name.into(),
            known: vaes.into_iter().map(|vae| vae.name).collect(),
        })
    }

    /// A VAE by name, or by the path of an existing file. For the command line, not for the API.
    ///
    /// # Errors
    /// [`Error::VaeNotFound`].
    pub fn find_or_open_vae(&self, name: &str) -> Result<VaeChoice, Error> {
        let path = Path::new(name);
        if path.is_file() {
            let path = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
            let file_name = file_name(&path);
            let mut found = self.found.write().unwrap_or_else(PoisonError::into_inner);
            found.vaes.retain(|vae| vae.name != file_name);
            found.vaes.push(Vae {
                name: file_name.clone(),
                path,
            });
            return Ok(VaeChoice::Named(file_name));
        }
        let choice = VaeChoice::from_option(name);
        self.find_vae(&Checkpoint::demo(), &choice)?;
        Ok(choice)
    }

    pub(super) fn identify_vae(&self, vae: Vae) -> Result<VaeIdentity, Error> {
        let shorthash = if self.hashing {
            let hash = self.cache.ensure(&format!("vae/{}", vae.name), &vae.path);
            hash.map_err(|source| Error::Io {
                path: vae.path.clone(),
                source,
            })?[..10]
                .to_string()
        } else {
            String::new()
        };
        Ok(VaeIdentity {
            path: vae.path,
            shorthash,
        })
    }
}

/// The entry `vae` of `<stem>.json` beside a checkpoint, where A1111 keeps what a user said about it.
fn user_metadata_vae(checkpoint: &Path) -> Option<String> {
    let text = std::fs::read(checkpoint.with_extension("json")).ok()?;
    let metadata: serde_json::Value = serde_json::from_slice(&text).ok()?;
    metadata.get("vae")?.as_str().map(str::to_string)
}

/// Lists a VAE file, unless one of the same name is listed.
pub(super) fn add_vae(vaes: &mut Vec<Vae>, path: &Path) {
    let name = file_name(path);
    if has_extension(path, &["safetensors", "ckpt", "pt"])
        && vaes.iter().all(|vae| vae.name != name)
    {
        vaes.push(Vae {
            name,
            path: PathBuf::from(path),
        });
    }
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::models::tests::catalog;

    /// The VAE of checkpoint `foo`; `-` = its own.
    fn chosen(catalog: &Catalog, choice: &VaeChoice) -> Result<String, Error> {
        let selection = catalog.select(catalog.find("foo")?, choice)?;
        Ok(selection
            .describe((1, 1))
            .vae_name
            .unwrap_or_else(|| "-".into()))
    }

    #[test]
    fn the_automatic_vae_is_the_one_named_like_the_checkpoint() {
        let (_dir, catalog) = catalog(&[
            "Stable-diffusion/foo.safetensors",
            "VAE/foo.vae.safetensors",
            "VAE/bar.safetensors",
        ]);
        let vae = |choice| chosen(&catalog, &choice);
        assert_eq!(vae(VaeChoice::Automatic).unwrap(), "foo.vae.safetensors");
        assert_eq!(vae(VaeChoice::Own).unwrap(), "-");
        for name in ["bar.safetensors", "bar"] {
            let choice = VaeChoice::from_option(name);
            assert_eq!(vae(choice).unwrap(), "bar.safetensors");
        }
        let error = vae(VaeChoice::Named("x".into())).unwrap_err().to_string();
        assert_eq!(
            error,
            "VAE not found: `x`; known: `bar.safetensors`, `foo.vae.safetensors`"
        );
        let checkpoint = catalog.find("foo").unwrap();
        let own = catalog
            .select_or_own(checkpoint, &VaeChoice::Named("x".into()))
            .unwrap();
        assert_eq!(own.vae, None);
    }

    #[test]
    fn every_combination_follows_a1111s_order() {
        // Setting, whether it overrides, `vae` of the user metadata, a file named like the checkpoint: the answer.
        let table = [
            ("Automatic", true, "", false, "-"),
            ("Automatic", true, "", true, "foo.vae.safetensors"),
            (
                "Automatic",
                true,
                "meta.safetensors",
                true,
                "meta.safetensors",
            ),
            ("Automatic", true, "None", true, "-"),
            ("Automatic", true, "Automatic", true, "foo.vae.safetensors"),
            (
                "Automatic",
                true,
                "gone.safetensors",
                true,
                "foo.vae.safetensors",
            ),
            ("Automatic", true, "gone.safetensors", false, "-"),
            (
                "set.safetensors",
                true,
                "meta.safetensors",
                true,
                "set.safetensors",
            ),
            ("None", true, "meta.safetensors", true, "-"),
            (
                "set.safetensors",
                false,
                "meta.safetensors",
                true,
                "meta.safetensors",
            ),
            ("set.safetensors", false, "None", true, "-"),
            ("set.safetensors", false, "", true, "foo.vae.safetensors"),
            ("set.safetensors", false, "", false, "set.safetensors"),
            ("None", false, "", true, "foo.vae.safetensors"),
            ("None", false, "", false, "-"),
            ("gone.safetensors", false, "", true, "foo.vae.safetensors"),
        ];
        for (setting, overrides, metadata, near, want) in table {
            let mut files = vec![
                "Stable-diffusion/foo.safetensors",
                "VAE/set.safetensors",
                "VAE/meta.safetensors",
            ];
            if near {
                files.push("Stable-diffusion/foo.vae.safetensors");
            }
            let (dir, catalog) = catalog(&files);
            if !metadata.is_empty() {
                let path = dir.path().join("models/Stable-diffusion/foo.json");
                let text = serde_json::json!({ "description": "x", "vae": metadata });
                std::fs::write(path, text.to_string()).unwrap();
            }
            let choice = VaeChoice::from_options(setting, overrides);
            let got = chosen(&catalog, &choice).unwrap();
            assert_eq!(got, want, "{setting} {overrides} {metadata} {near}");
        }
    }

    #[test]
    fn damaged_user_metadata_is_no_preference() {
        let (dir, catalog) = catalog(&["Stable-diffusion/foo.safetensors"]);
        let path = dir.path().join("models/Stable-diffusion/foo.json");
        for text in ["{", "[]", r#"{"vae": 3}"#] {
            std::fs::write(&path, text).unwrap();
            assert_eq!(chosen(&catalog, &VaeChoice::Automatic).unwrap(), "-");
        }
    }
}
