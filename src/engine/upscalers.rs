//! Upscalers on disk, under A1111's names.
//!
//! The folders are read at each question, for they hold a handful of files. Names and order are those of A1111 1.10's
//! `esrgan_model.py`, `realesrgan_model.py` and `modelloader.load_upscalers`: a file's stem, except for Real-ESRGAN's own.

use std::path::{Path, PathBuf};

use super::models::Catalog;
use super::scan::{has_extension, walk};
use crate::config::Config;
use crate::pipeline::{PictureUpscaler, Tiling, UpscalerFile};

/// Endings of files that can be upscalers.
const EXTENSIONS: &[&str] = &["pth", "pt", "safetensors"];
/// A1111's scale of every upscaler that it does not know better.
const SCALE: u32 = 4;

/// Stem of Real-ESRGAN's files, A1111's name, scale.
const REAL_ESRGAN: [(&str, &str, u32); 6] = [
    ("realesr-general-x4v3", "R-ESRGAN General 4xV3", 4),
    ("realesr-general-wdn-x4v3", "R-ESRGAN General WDN 4xV3", 4),
    ("realesr-animevideov3", "R-ESRGAN AnimeVideo", 4),
    ("RealESRGAN_x4plus", "R-ESRGAN 4x+", 4),
    ("RealESRGAN_x4plus_anime_6B", "R-ESRGAN 4x+ Anime6B", 4),
    ("RealESRGAN_x2plus", "R-ESRGAN 2x+", 2),
];

/// A file that may be an upscaler; it is opened when it is used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpscalerEntry {
    /// A1111's name.
    pub name: String,
    /// The file.
    pub path: PathBuf,
    /// A1111's scale, which is 4 for all but one.
    pub scale: u32,
    /// From the folder of Real-ESRGAN.
    pub real_esrgan: bool,
}

/// Where upscalers lie.
#[derive(Debug, Clone, Default)]
pub struct UpscalerCatalog {
    /// Folder, and whether it is Real-ESRGAN's.
    dirs: Vec<(PathBuf, bool)>,
}

impl UpscalerCatalog {
    /// The configured folders.
    #[must_use]
    pub fn open(config: &Config) -> Self {
        let real_esrgan = |dir: &Path| dir.file_name().is_some_and(|name| name == "RealESRGAN");
        let mut dirs = Vec::new();
        for dir in config.upscaler_dirs() {
            let real = real_esrgan(&dir);
            dirs.push((dir, real));
        }
        Self { dirs }
    }

    /// Every file, by lower-case name; of two with one name the first folder's.
    #[must_use]
    pub fn list(&self) -> Vec<UpscalerEntry> {
        let mut found = Vec::new();
        for (dir, real_esrgan) in &self.dirs {
            let mut files = Vec::new();
            walk(dir, dir, 0, &mut |_, path| {
                if has_extension(path, EXTENSIONS) {
                    files.push(path.to_path_buf());
                }
            });
            files.sort();
            found.extend(files.into_iter().map(|path| entry(path, *real_esrgan)));
        }
        found.sort_by_key(|entry| entry.name.to_lowercase());
        found.dedup_by(|later, earlier| later.name == earlier.name);
        found
    }

    /// The upscaler of a name or a file's stem; letter case counts only between names that differ by nothing else.
    #[must_use]
    pub fn find(&self, name: &str, tiling: Tiling) -> Option<PictureUpscaler> {
        let name = name.trim();
        let built_in = PictureUpscaler::BUILT_IN
            .into_iter()
            .find(|upscaler| upscaler.label().eq_ignore_ascii_case(name));
        if built_in.is_some() {
            return built_in;
        }
        let entries = self.list();
        let lower = name.to_lowercase();
        let entry = entries
            .iter()
            .find(|entry| entry.name == name)
            .or_else(|| {
                let same = |entry: &&UpscalerEntry| entry.name.to_lowercase() == lower;
                entries.iter().find(same)
            })
            .or_else(|| {
                let same = |entry: &&UpscalerEntry| stem(&entry.path).to_lowercase() == lower;
                entries.iter().find(same)
            })?;
        Some(PictureUpscaler::Model(UpscalerFile {
            name: entry.name.clone(),
            path: entry.path.clone(),
            tiling,
        }))
    }

    /// Like [`Self::find`], but a path of an existing file is taken as well. For the command line, not for the API.
    #[must_use]
    pub fn find_or_open(&self, name: &str, tiling: Tiling) -> Option<PictureUpscaler> {
        let path = Path::new(name);
        if !path.is_file() {
            return self.find(name, tiling);
        }
        Some(PictureUpscaler::Model(UpscalerFile {
            name: stem(path),
            path: path.to_path_buf(),
            tiling,
        }))
    }

    /// All names, those that need no model first.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        let built_in = PictureUpscaler::BUILT_IN.map(|upscaler| upscaler.label().to_string());
        let files = self.list().into_iter().map(|entry| entry.name);
        built_in.into_iter().chain(files).collect()
    }
}

impl Catalog {
    /// Upscalers.
    #[must_use]
    pub fn upscalers(&self) -> &UpscalerCatalog {
        &self.upscalers
    }
}

fn entry(path: PathBuf, real_esrgan: bool) -> UpscalerEntry {
    let stem = stem(&path);
    let known = REAL_ESRGAN
        .iter()
        .find(|(known, ..)| real_esrgan && *known == stem);
    let (name, scale) = known.map_or((stem, SCALE), |(_, name, scale)| {
        ((*name).to_string(), *scale)
    });
    UpscalerEntry {
        name,
        path,
        scale,
        real_esrgan,
    }
}

fn stem(path: &Path) -> String {
    path.file_stem()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn files_get_a1111s_names_and_order() {
        let dir = tempfile::tempdir().unwrap();
        for file in [
            "ESRGAN/4x-UltraSharp.pth",
            "ESRGAN/RealESRGAN_x4plus.pth",
            "ESRGAN/readme.txt",
            "RealESRGAN/RealESRGAN_x2plus.pth",
            "RealESRGAN/other.safetensors",
        ] {
            let path = dir.path().join("models").join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, b"").unwrap();
        }
        let config = Config {
            data_dir: dir.path().to_path_buf(),
            ..Config::default()
        };
        let catalog = UpscalerCatalog::open(&config);
        let rows: Vec<_> = catalog
            .list()
            .into_iter()
            .map(|entry| (entry.name, entry.scale))
            .collect();
        let expected = [
            ("4x-UltraSharp", 4),
            ("other", 4),
            ("R-ESRGAN 2x+", 2),
            ("RealESRGAN_x4plus", 4),
        ];
        assert_eq!(
            rows,
            expected.map(|(name, scale)| (name.to_string(), scale))
        );
        let label = |name: &str| {
            let found = catalog.find(name, Tiling::default());
            found.map(|upscaler| upscaler.label().to_string())
        };
        for (asked, found) in [
            ("4X-ultrasharp", Some("4x-UltraSharp")),
            ("RealESRGAN_x2plus", Some("R-ESRGAN 2x+")),
            ("lanczos", Some("Lanczos")),
            ("nothing", None),
            ("../models/ESRGAN/4x-UltraSharp", None),
        ] {
            assert_eq!(label(asked).as_deref(), found, "{asked}");
        }
    }
}
