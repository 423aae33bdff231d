//! Where the pictures of `sdgen prompt` go: a file, numbered files, or a directory with A1111's names; and the report.
//!
//! What cannot be written is found out before a picture is made.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use serde_json::{Value, json};

use super::{Stop, print};
use crate::imaging::{self, EncodeOptions, Format, SaveRequest};
use crate::pipeline::GeneratedImage;

/// A checked destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Destination {
    /// One file; several pictures become `name-1.png`, `name-2.png`, ….
    File(PathBuf),
    /// A directory; pictures become `00000-<seed>.png`, ….
    Directory(PathBuf),
}

/// Destination and format.
#[derive(Debug, Clone)]
pub struct Output {
    destination: Destination,
    /// Format of the files.
    pub format: Format,
}

impl Output {
    /// Decides from `-o` and `--format`; without `-o` it is a directory of the day below `place`.
    ///
    /// # Errors
    /// Exit 2 if path and format contradict each other or the format is unknown.
    pub fn choose(path: Option<&Path>, format: Option<&str>, place: &Path) -> Result<Self, Stop> {
        let typed = format;
        let format: Option<Format> = format.map(str::parse).transpose().map_err(Stop::usage)?;
        let Some(path) = path else {
            let date = chrono::Local::now().format("%Y-%m-%d").to_string();
            let directory = place.join(date);
            return Ok(Self {
                destination: Destination::Directory(directory),
                format: format.unwrap_or_default(),
            });
        };
        let extension = path
            .extension()
            .and_then(|extension| extension.to_str())
            .unwrap_or_default();
        let is_directory = path.is_dir() || path.as_os_str().to_string_lossy().ends_with('/');
        let named: Option<Format> = extension.parse().ok().filter(|_| !is_directory);
        match (named, format) {
            (Some(named), Some(format)) if named != format => {
                let (path, typed) = (path.display(), typed.unwrap_or_default());
                Err(Stop::usage_text(format!(
                    "`--output {path}` and `--format {typed}` contradict each other; leave one out"
                )))
            }
            (Some(named), _) => Ok(Self {
                destination: Destination::File(path.to_path_buf()),
                format: named,
            }),
            (None, _) if !is_directory && is_other_picture(extension) => Err(Stop::usage(
                imaging::Error::UnknownFormatName(extension.to_string()),
            )),
            (None, format) => Ok(Self {
                destination: Destination::Directory(path.to_path_buf()),
                format: format.unwrap_or_default(),
            }),
        }
    }

    /// The directory, if pictures go into one under names of their own.
    #[must_use]
    pub fn directory(&self) -> Option<&Path> {
        match &self.destination {
            Destination::File(_) => None,
            Destination::Directory(path) => Some(path),
        }
    }

    /// Creates the directory and writes a file of no bytes into it, which is removed again.
    ///
    /// # Errors
    /// Exit 1 with the path and the cause.
    pub fn check_writable(&self) -> Result<(), Stop> {
        let directory = match &self.destination {
            Destination::File(path) => path
                .parent()
                .filter(|parent| !parent.as_os_str().is_empty())
                .unwrap_or(Path::new(".")),
            Destination::Directory(path) => path,
        };
        let probe = directory.join(format!(".sdgen-{}", std::process::id()));
        let written = fs::create_dir_all(directory).and_then(|()| fs::write(&probe, b""));
        // A file left behind is hidden and empty.
        let _ = fs::remove_file(&probe);
        written
            .with_context(|| {
                format!(
                    "output directory is not writable: `{}`",
                    directory.display()
                )
            })
            .map_err(Stop::Failed)
    }

    /// Encodes and writes pictures, in order.
    ///
    /// # Errors
    /// Exit 1 with the path and the cause; no torn file stays.
    pub fn write(&self, images: &[GeneratedImage]) -> Result<Vec<PathBuf>, Stop> {
        let mut files = Vec::with_capacity(images.len());
        for (index, image) in images.iter().enumerate() {
            let options = EncodeOptions {
                format: self.format,
                infotext: Some(&image.infotext),
                ..EncodeOptions::default()
            };
            let encoded = imaging::encode(&image.image, &options).map_err(Stop::failed)?;
            files.push(self.write_bytes(
                &encoded.bytes,
                encoded.format,
                image.seed,
                index,
                images.len(),
            )?);
        }
        Ok(files)
    }

    /// Writes a picture that is encoded already.
    ///
    /// # Errors
    /// As [`Output::write`].
    pub fn write_bytes(
        &self,
        bytes: &[u8],
        format: Format,
        seed: u64,
        index: usize,
        of: usize,
    ) -> Result<PathBuf, Stop> {
        let (root, stem, numbered) = match &self.destination {
            Destination::Directory(path) => (path.clone(), seed.to_string(), true),
            Destination::File(path) => {
                let stem = path
                    .file_stem()
                    .map(|stem| stem.to_string_lossy().into_owned())
                    .unwrap_or_default();
                let stem = if of > 1 {
                    format!("{stem}-{}", index + 1)
                } else {
                    stem
                };
                let parent = path
                    .parent()
                    .filter(|parent| !parent.as_os_str().is_empty())
                    .unwrap_or(Path::new("."));
                (parent.to_path_buf(), stem, false)
            }
        };
        // A file keeps the extension that was typed (`.jpeg`), unless the picture did not fit its format.
        let typed = match &self.destination {
            Destination::File(path) if format == self.format => {
                path.extension().and_then(|extension| extension.to_str())
            }
            _ => None,
        };
        let request = SaveRequest {
            root: &root,
            subdirectory: "",
            basename: "",
            stem: &stem,
            numbered,
            extension: typed.unwrap_or_else(|| format.extension()),
            bytes,
            sidecar: None,
        };
        imaging::save(&request).map_err(Stop::failed)
    }
}

/// Extensions that say "picture" and that we do not write.
fn is_other_picture(extension: &str) -> bool {
    [
        "bmp", "gif", "tif", "tiff", "avif", "jxl", "heic", "ppm", "tga",
    ]
    .iter()
    .any(|other| extension.eq_ignore_ascii_case(other))
}

/// Writes the latents of all pictures as one tensor `latents`, f32 `[batch, 4, height/8, width/8]`; `size` is width and height in
/// pixels.
///
/// # Errors
/// Exit 1 if there are none or the file cannot be written.
pub fn write_latents(
    path: &Path,
    images: &[GeneratedImage],
    (width, height): (u32, u32),
) -> Result<(), Stop> {
    if images.is_empty() {
        return Err(Stop::failed(anyhow!(
            "no latents to write to `{}`: no picture was finished",
            path.display()
        )));
    }
    let mut bytes = Vec::new();
    for image in images {
        let latents = image.latents.as_deref().unwrap_or_default();
        bytes.extend(latents.iter().flat_map(|value| value.to_le_bytes()));
    }
    let shape = vec![images.len(), 4, (height / 8) as usize, (width / 8) as usize];
    let write = || -> anyhow::Result<()> {
        let tensor = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape, &bytes)?;
        let file = safetensors::serialize([("latents", tensor)], None)?;
        Ok(fs::write(path, file)?)
    };
    write()
        .with_context(|| format!("cannot write latents to `{}`", path.display()))
        .map_err(Stop::Failed)
}

/// Seconds per stage, for `--json`.
#[derive(Debug, Clone, Copy, Default)]
pub struct Seconds {
    /// Checkpoint; absent on a server.
    pub load: Option<f64>,
    /// Text encoders.
    pub text: Option<f64>,
    /// Denoising loop.
    pub sample: Option<f64>,
    /// VAE.
    pub decode: Option<f64>,
    /// Encoding and writing files.
    pub save: f64,
    /// Everything.
    pub total: f64,
    /// Denoising steps per second.
    pub steps_per_s: Option<f64>,
}

/// How a report is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// The files, one a line.
    Files,
    /// One JSON object.
    Json,
}

impl Form {
    /// The flag `--json`.
    #[must_use]
    pub fn from_flag(json: bool) -> Self {
        if json { Self::Json } else { Self::Files }
    }
}

/// What a command made.
#[derive(Debug)]
pub struct Report {
    /// Files in order of their seeds.
    pub files: Vec<PathBuf>,
    /// Seeds of the files.
    pub seeds: Vec<u64>,
    /// Infotexts of the files.
    pub infotexts: Vec<String>,
    /// Where the time went.
    pub seconds: Seconds,
    /// `cpu`, `cuda:0`; none on a server.
    pub device: Option<String>,
    /// `f32`; none on a server.
    pub dtype: Option<String>,
    /// Title.
    pub checkpoint: String,
}

impl Report {
    /// Prints one JSON object, or the files one a line.
    ///
    /// # Errors
    /// Exit 1 if stdout cannot be written.
    pub fn print(&self, form: Form) -> Result<(), Stop> {
        let files: Vec<String> = self
            .files
            .iter()
            .map(|path| path.display().to_string())
            .collect();
        if form == Form::Files {
            return print(
                &files
                    .iter()
                    .fold(String::new(), |text, file| text + file + "\n"),
            );
        }
        let s = &self.seconds;
        let report: Value = json!({
            "files": files,
            "seeds": self.seeds,
            "infotexts": self.infotexts,
            "timings": {
                "load_s": s.load, "text_s": s.text, "sample_s": s.sample, "decode_s": s.decode,
                "save_s": s.save, "total_s": s.total, "steps_per_s": s.steps_per_s,
            },
            "device": self.device,
            "dtype": self.dtype,
            "checkpoint": self.checkpoint,
        });
        print(&format!("{report}\n"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choose(path: &str, format: Option<&str>) -> Result<(Destination, Format), String> {
        match Output::choose(Some(Path::new(path)), format, Path::new("/data")) {
            Ok(output) => Ok((output.destination, output.format)),
            Err(Stop::Usage(error)) => Err(error.to_string()),
            Err(other) => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_extension_tells_files_from_directories() {
        assert_eq!(
            choose("a/b.jpeg", None).unwrap(),
            (Destination::File("a/b.jpeg".into()), Format::Jpeg)
        );
        assert_eq!(
            choose("a/b", Some("webp")).unwrap(),
            (Destination::Directory("a/b".into()), Format::WebP)
        );
        assert_eq!(
            choose("a/b.png/", None).unwrap().0,
            Destination::Directory("a/b.png/".into())
        );
        assert_eq!(
            choose("out.v2", None).unwrap().0,
            Destination::Directory("out.v2".into())
        );
    }

    #[test]
    fn contradictions_and_unknown_formats_are_named() {
        let error = choose("a.png", Some("jpeg")).unwrap_err();
        assert_eq!(
            error,
            "`--output a.png` and `--format jpeg` contradict each other; leave one out"
        );
        assert_eq!(
            choose("a.gif", None).unwrap_err(),
            "unknown picture format: `gif`; use `png`, `jpg` or `webp`"
        );
        assert!(choose("a", Some("tga")).is_err());
    }
}
