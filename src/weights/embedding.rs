//! Textual inversion (Gal et al. 2022): vectors that stand in a prompt's place for a word, for both text encoders of SDXL.
//!
//! A file with `clip_l` `[n, width]` and `clip_g` `[n, width]`, or with both side by side in one table; the word is the file's
//! stem. Files are safetensors, PyTorch's (`.pt`, `.bin`: read without running anything in them), or pictures that `carrier`
//! reads, whose word is the one they were trained with. Embeddings for other models have one table, and are named as such.

mod carrier;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Error, Source, WeightFile};

/// Most vectors an embedding may have: the room of one chunk of a prompt.
pub const MAX_VECTORS: usize = 75;

/// Widths of the two tables side by side in one: those of SDXL's text encoders.
const WIDTHS: [usize; 2] = [768, 1280];

/// The tables' names, A1111's and those of diffusers' training script.
const TABLES: [[&str; 2]; 2] = [["clip_l", "text_encoders_0"], ["clip_g", "text_encoders_1"]];

/// A textual inversion for SDXL.
#[derive(Debug, Clone, PartialEq)]
pub struct Embedding {
    /// The word, as the file spells it; prompts are compared without case.
    pub name: String,
    /// First 12 hex digits of the file's SHA-256; empty while unknown, and for one packed into a LoRA.
    pub shorthash: String,
    /// Number of vectors.
    pub vectors: usize,
    /// CLIP ViT-L's, `[vectors, width]`.
    pub clip_l: Vec<f32>,
    /// OpenCLIP bigG's, `[vectors, width]`.
    pub clip_g: Vec<f32>,
}

impl Embedding {
    /// Reads a file; `shorthash` is left empty. Nothing for a picture that carries none.
    ///
    /// # Errors
    /// As for [`WeightFile::open`] and [`Self::read`]; [`Error::Embedding`] for a picture that carries something damaged.
    pub fn open(path: &Path) -> Result<Option<Self>, Error> {
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        if !carrier::is_picture(path) {
            return Self::read(&name, &WeightFile::open(path)?, "").map(Some);
        }
        let Some(carried) = carrier::read(path)? else {
            return Ok(None);
        };
        let name = carried.name.as_deref().unwrap_or(&name);
        Self::read(name, &carried, "").map(Some)
    }

    /// Reads the tables below `prefix`.
    ///
    /// # Errors
    /// [`Error::Missing`] without one of the tables, [`Error::Architecture`] for one of another shape, [`Error::Dtype`] and
    /// [`Error::NotFinite`].
    pub fn read(name: &str, source: &dyn Source, prefix: &str) -> Result<Self, Error> {
        if let Some(key) = single(source, prefix) {
            return Self::side_by_side(name, source, &key);
        }
        let (l, rows) = table(source, prefix, TABLES[0])?;
        let (g, rows_g) = table(source, prefix, TABLES[1])?;
        if rows != rows_g {
            return Err(Error::Architecture {
                path: source.path().into(),
                key: g,
                reason: format!("it has {rows_g} vectors, `{l}` has {rows}"),
            });
        }
        Ok(Self {
            name: name.to_string(),
            shorthash: String::new(),
            vectors: rows,
            clip_l: source.read(&l)?,
            clip_g: source.read(&g)?,
        })
    }

    /// Both tables in one.
    fn side_by_side(name: &str, source: &dyn Source, key: &str) -> Result<Self, Error> {
        let both: usize = WIDTHS.iter().sum();
        let wrong = |reason: String| Error::Architecture {
            path: source.path().into(),
            key: key.to_string(),
            reason,
        };
        let vectors = match source.shape(key) {
            Some(&[rows, width]) if width == both && (1..=MAX_VECTORS).contains(&rows) => rows,
            Some(&[width]) if width == both => 1,
            Some(&[768 | 1024] | &[_, 768 | 1024]) => {
                return Err(wrong(
                    "it is an embedding for a model with one text encoder (SD 1 or 2)".into(),
                ));
            }
            shape => {
                return Err(wrong(format!(
                    "its shape is {:?}; an embedding for SDXL has 1 to {MAX_VECTORS} vectors of {both}",
                    shape.unwrap_or_default()
                )));
            }
        };
        let values = source.read(key)?;
        let rows = || values.chunks_exact(both).map(|row| row.split_at(WIDTHS[0]));
        Ok(Self {
            name: name.to_string(),
            shorthash: String::new(),
            vectors,
            clip_l: rows().flat_map(|(l, _)| l).copied().collect(),
            clip_g: rows().flat_map(|(_, g)| g).copied().collect(),
        })
    }

    /// Width of a CLIP ViT-L vector.
    #[must_use]
    pub fn width_l(&self) -> usize {
        self.clip_l.len() / self.vectors
    }

    /// Width of a bigG vector.
    #[must_use]
    pub fn width_g(&self) -> usize {
        self.clip_g.len() / self.vectors
    }
}

/// The table of a file that has one: `emb_params`, or the only tensor there is under whatever word it was trained for.
fn single(source: &dyn Source, prefix: &str) -> Option<String> {
    let has = |name: &str| source.shape(&format!("{prefix}{name}")).is_some();
    if TABLES.iter().flatten().any(|name| has(name)) {
        return None;
    }
    match &source.keys()[..] {
        _ if has("emb_params") => Some(format!("{prefix}emb_params")),
        [only] if prefix.is_empty() => Some(only.to_string()),
        _ => None,
    }
}

/// Key and number of vectors of a table.
fn table(source: &dyn Source, prefix: &str, names: [&str; 2]) -> Result<(String, usize), Error> {
    let keys = names.map(|name| format!("{prefix}{name}"));
    let found = keys.iter().find(|key| source.shape(key).is_some());
    let Some(key) = found else {
        return Err(Error::Missing {
            path: source.path().into(),
            key: keys[0].clone(),
        });
    };
    match source.shape(key) {
        Some(&[rows, width]) if (1..=MAX_VECTORS).contains(&rows) && width > 0 => {
            Ok((key.clone(), rows))
        }
        // A single vector may be stored flat.
        Some(&[width]) if width > 0 => Ok((key.clone(), 1)),
        shape => Err(Error::Architecture {
            path: source.path().into(),
            key: key.clone(),
            reason: format!(
                "its shape is {:?}; an embedding has 1 to {MAX_VECTORS} vectors",
                shape.unwrap_or_default()
            ),
        }),
    }
}

/// The embeddings of a folder and its subfolders, in order of their paths.
#[derive(Debug, Clone, Default)]
pub struct EmbeddingLibrary {
    /// Those that can be used.
    pub loaded: Vec<Arc<Embedding>>,
    /// Files that cannot, with the reason.
    pub skipped: Vec<(PathBuf, String)>,
}

impl EmbeddingLibrary {
    /// Reads a folder. `shorthash` gives the hash of a file, or nothing.
    ///
    /// A folder that is not there has no embeddings; of two files with one name the first counts.
    #[must_use]
    pub fn scan(folder: &Path, shorthash: impl Fn(&Path) -> Option<String>) -> Self {
        let mut library = Self::default();
        for path in super::lora::library::files_below(folder) {
            let extension = path
                .extension()
                .unwrap_or_default()
                .to_string_lossy()
                .to_lowercase();
            if !["safetensors", "pt", "bin", "png", "webp"].contains(&extension.as_str()) {
                continue;
            }
            match Embedding::open(&path) {
                Ok(None) => {}
                Ok(Some(embedding)) if library.find(&embedding.name).is_some() => {
                    library
                        .skipped
                        .push((path, "another file has this name".into()));
                }
                Ok(Some(embedding)) => library.loaded.push(Arc::new(Embedding {
                    shorthash: shorthash(&path).unwrap_or_default(),
                    ..embedding
                })),
                Err(error) => {
                    tracing::debug!(path = %path.display(), %error, "embedding skipped");
                    library.skipped.push((path, error.to_string()));
                }
            }
        }
        library
    }

    /// The embedding of a name, without regard to case.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<&Arc<Embedding>> {
        let same = |e: &&Arc<Embedding>| e.name.to_lowercase() == name.to_lowercase();
        self.loaded.iter().find(same)
    }

    /// When a folder last changed, to know whether to scan it again.
    #[must_use]
    pub fn stamp(folder: &Path) -> Option<std::time::SystemTime> {
        fs::metadata(folder).and_then(|meta| meta.modified()).ok()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use safetensors::Dtype;
    use safetensors::tensor::TensorView;

    use super::*;

    fn write(path: &Path, tensors: &[(&str, &[usize])]) {
        let views: HashMap<String, Vec<u8>> = tensors
            .iter()
            .map(|(key, shape)| {
                let len: usize = shape.iter().product();
                let values = (0..len).flat_map(|i| (i as f32).to_le_bytes());
                (key.to_string(), values.collect())
            })
            .collect();
        let views = tensors.iter().map(|(key, shape)| {
            let view = TensorView::new(Dtype::F32, shape.to_vec(), &views[*key]);
            (*key, view.unwrap())
        });
        fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
    }

    #[test]
    fn a_folder_gives_its_sdxl_embeddings_and_says_why_it_skips_others() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::create_dir(at("sub")).unwrap();
        write(
            &at("sub/Zebra.safetensors"),
            &[("clip_l", &[2, 8]), ("clip_g", &[2, 12])],
        );
        write(
            &at("zebra.safetensors"),
            &[("clip_l", &[8]), ("clip_g", &[1, 12])],
        );
        write(&at("sd1.safetensors"), &[("emb_params", &[2, 768])]);
        write(
            &at("odd.safetensors"),
            &[("clip_l", &[2, 8]), ("clip_g", &[3, 12])],
        );
        write(
            &at("long.safetensors"),
            &[("clip_l", &[76, 8]), ("clip_g", &[76, 12])],
        );
        fs::write(at("old.pt"), b"PK\x03\x04").unwrap();
        fs::write(at("note.txt"), b"").unwrap();
        let library = EmbeddingLibrary::scan(folder.path(), |path| {
            path.ends_with("zebra.safetensors")
                .then(|| "0123456789ab".into())
        });
        let found = library.find("ZEBRA").unwrap();
        assert_eq!(
            (library.loaded.len(), found.vectors, found.width_g()),
            (1, 1, 12)
        );
        assert_eq!(found.shorthash, "0123456789ab");
        let skipped: Vec<_> = library
            .skipped
            .iter()
            .map(|(path, reason)| format!("{}: {reason}", path.file_stem().unwrap().display()))
            .collect();
        for (start, part) in [
            ("sd1", "one text encoder"),
            ("odd", "3 vectors"),
            ("long", "1 to 75"),
            ("old", "truncated"),
            ("Zebra", "another file"),
        ] {
            assert!(
                skipped
                    .iter()
                    .any(|s| s.starts_with(start) && s.contains(part)),
                "{start}: {skipped:?}"
            );
        }
        assert!(
            EmbeddingLibrary::scan(&at("nowhere"), |_| None)
                .loaded
                .is_empty()
        );
    }
}
