//! Writing a picture file under a name that is free, whole or not at all.
//!
//! The bytes go to a hidden file beside the target, which then takes the target's name: no reader ever sees half a picture, and a full
//! disk leaves no ruin. Names and numbers follow A1111's `images.save_image`.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::{Error, naming};

/// Names tried from the first free number on.
const TRIES: usize = 500;
/// Longest file name in bytes on the usual file systems, less the affixes of the hidden file.
const LONGEST_NAME: usize = 255 - ".part".len() - 1;

/// What to write and how to call it.
#[derive(Debug, Clone, Copy)]
pub struct SaveRequest<'a> {
    /// Directory that exists or can be made.
    pub root: &'a Path,
    /// Subdirectory, patterns replaced; `/` and `\` separate levels, `.` and `..` are dropped. Empty for none.
    pub subdirectory: &'a str,
    /// Put before the number: `grid` gives `grid-0000.png`; empty gives `00000-….png`.
    pub basename: &'a str,
    /// The rest of the name, patterns replaced and suffixes appended; may be empty.
    pub stem: &'a str,
    /// Whether names are numbered (`save_images_add_number`). A name without number replaces an older file of that name.
    pub numbered: bool,
    /// Extension without the dot.
    pub extension: &'a str,
    /// The file's bytes.
    pub bytes: &'a [u8],
    /// Text for a `.txt` file of the same name (`save_txt`).
    pub sidecar: Option<&'a str>,
}

/// Writes the file and returns its path.
///
/// # Errors
/// [`Error::Write`] names the file or directory and the cause; [`Error::NoFreeName`] if 500 numbers were taken.
pub fn save(request: &SaveRequest<'_>) -> Result<PathBuf, Error> {
    let directory = subdirectory(request.root, request.subdirectory);
    fs::create_dir_all(&directory).map_err(|source| Error::Write {
        path: directory.clone(),
        source,
    })?;
    let stem = naming_part(request.stem);
    let path = if request.numbered || stem.is_empty() {
        save_numbered(&directory, request, &stem)?
    } else {
        let path = directory.join(file_name(&stem, request.extension));
        write_whole(&path, request.bytes, Existing::Replace)?;
        path
    };
    if let Some(text) = request.sidecar {
        write_whole(
            &path.with_extension("txt"),
            text.as_bytes(),
            Existing::Replace,
        )?;
    }
    Ok(path)
}

/// Writes another file of the same name with its own extension, in place of one that is there.
///
/// # Errors
/// [`Error::Write`] names the file and the cause.
pub fn save_beside(path: &Path, extension: &str, bytes: &[u8]) -> Result<(), Error> {
    write_whole(&path.with_extension(extension), bytes, Existing::Replace).map(drop)
}

fn save_numbered(
    directory: &Path,
    request: &SaveRequest<'_>,
    stem: &str,
) -> Result<PathBuf, Error> {
    let prefix = naming_part(request.basename);
    let prefix = if prefix.is_empty() {
        prefix
    } else {
        format!("{prefix}-")
    };
    let first = next_number(directory, &prefix)?;
    let decoration = if stem.is_empty() {
        String::new()
    } else {
        format!("-{stem}")
    };
    let digits = if prefix.is_empty() { 5 } else { 4 };
    for number in first..first + TRIES as u64 {
        let path = directory.join(file_name(
            &format!("{prefix}{number:0digits$}{decoration}"),
            request.extension,
        ));
        if write_whole(&path, request.bytes, Existing::Keep)? {
            return Ok(path);
        }
    }
    Err(Error::NoFreeName {
        directory: directory.to_path_buf(),
        tried: TRIES,
    })
}

/// One more than the highest number that files in `directory` begin with, after `prefix`.
fn next_number(directory: &Path, prefix: &str) -> Result<u64, Error> {
    let failed = |source| Error::Write {
        path: directory.to_path_buf(),
        source,
    };
    let mut next = 0;
    for entry in fs::read_dir(directory).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        let number = name.to_str().and_then(|name| {
            let numbered = name.strip_prefix(prefix)?;
            let stem = numbered.rsplit_once('.').map_or(numbered, |(stem, _)| stem);
            stem.split('-').next()?.parse::<u64>().ok()
        });
        // A name of twenty digits is nobody's counter.
        next = next.max(
            number
                .filter(|&number| number < u64::MAX / 2)
                .map_or(0, |number| number + 1),
        );
    }
    Ok(next)
}

/// `root` with the levels of `name` that are ordinary names.
fn subdirectory(root: &Path, name: &str) -> PathBuf {
    let levels = name
        .split(['/', '\\'])
        .map(naming_part)
        .filter(|level| !level.is_empty());
    levels.fold(root.to_path_buf(), |path, level| path.join(level))
}

/// A name without separators and control characters, without blanks and dots at its end. `..` becomes empty.
fn naming_part(name: &str) -> String {
    let clean: String = name
        .chars()
        .map(|c| {
            if c.is_control() || c == '/' || c == '\\' {
                '_'
            } else {
                c
            }
        })
        .collect();
    clean.trim_start().trim_end_matches([' ', '.']).to_string()
}

/// Joins stem and extension, cutting the stem so that the name fits.
fn file_name(stem: &str, extension: &str) -> String {
    let extension = naming::sanitize(extension);
    let mut end = stem
        .len()
        .min(LONGEST_NAME.saturating_sub(extension.len() + 1));
    while !stem.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}.{extension}", &stem[..end])
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Existing {
    Keep,
    Replace,
}

/// Writes a hidden file and renames it to `path`; `false` if the name is taken and to be kept.
fn write_whole(path: &Path, bytes: &[u8], existing: Existing) -> Result<bool, Error> {
    let failed = |source| Error::Write {
        path: path.to_path_buf(),
        source,
    };
    let taken = || existing == Existing::Keep && path.exists();
    if taken() {
        return Ok(false);
    }
    let mut hidden_name = OsStr::new(".").to_os_string();
    hidden_name.extend([path.file_name().unwrap_or_default(), OsStr::new(".part")]);
    let hidden = path.with_file_name(hidden_name);
    let opened = match existing {
        Existing::Keep => File::create_new(&hidden),
        Existing::Replace => File::create(&hidden),
    };
    let file = match opened {
        // Someone else is writing under this name.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(false),
        opened => opened.map_err(failed)?,
    };
    // The name may have been taken between the first look and the hidden file, which now keeps others off.
    let outcome = if taken() {
        Ok(false)
    } else {
        finish(file, bytes, &hidden, path).map(|()| true)
    };
    if !matches!(outcome, Ok(true)) {
        // The first error is the one to report; a hidden file left behind disturbs nobody.
        let _ = fs::remove_file(&hidden);
    }
    outcome.map_err(failed)
}

fn finish(mut file: File, bytes: &[u8], hidden: &Path, path: &Path) -> io::Result<()> {
    file.write_all(bytes)?;
    file.sync_data()?;
    drop(file);
    fs::rename(hidden, path)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    fn request<'a>(root: &'a Path, stem: &'a str) -> SaveRequest<'a> {
        SaveRequest {
            root,
            subdirectory: "2024-03-09",
            basename: "",
            stem,
            numbered: true,
            extension: "png",
            bytes: b"pixels",
            sidecar: None,
        }
    }

    fn names(directory: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn numbers_go_on_from_the_highest() {
        let root = tempfile::tempdir().unwrap();
        let day = root.path().join("2024-03-09");
        assert_eq!(
            save(&request(root.path(), "42")).unwrap(),
            day.join("00000-42.png")
        );
        fs::write(day.join("00007-9.jpg"), "").unwrap();
        fs::write(day.join("notes.txt"), "").unwrap();
        let with_text = SaveRequest {
            sidecar: Some("a cat"),
            ..request(root.path(), "")
        };
        assert_eq!(save(&with_text).unwrap(), day.join("00008.png"));
        let grid = SaveRequest {
            basename: "grid",
            ..request(root.path(), "")
        };
        assert_eq!(save(&grid).unwrap(), day.join("grid-0000.png"));
        assert_eq!(save(&grid).unwrap(), day.join("grid-0001.png"));
        let plain = SaveRequest {
            numbered: false,
            ..request(root.path(), "name")
        };
        assert_eq!(
            (save(&plain).unwrap(), save(&plain).unwrap()),
            (day.join("name.png"), day.join("name.png"))
        );
        assert_eq!(
            names(&day),
            [
                "00000-42.png",
                "00007-9.jpg",
                "00008.png",
                "00008.txt",
                "grid-0000.png",
                "grid-0001.png",
                "name.png",
                "notes.txt"
            ]
        );
        assert_eq!(fs::read(day.join("00000-42.png")).unwrap(), b"pixels");
    }

    #[test]
    fn no_name_leads_out_of_the_root() {
        let root = tempfile::tempdir().unwrap();
        let hostile = SaveRequest {
            subdirectory: "../..\\a/./ ../b ",
            numbered: false,
            ..request(root.path(), "../../x\0/y")
        };
        assert_eq!(
            save(&hostile).unwrap(),
            root.path().join("a/b/.._.._x__y.png")
        );
        let long = "é".repeat(300);
        let path = save(&request(root.path(), &long)).unwrap();
        assert!(path.file_name().unwrap().len() <= 255);
    }

    #[test]
    fn errors_name_the_place() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("file");
        fs::write(&file, "").unwrap();
        let error = save(&request(&file, "1")).unwrap_err();
        assert!(
            matches!(&error, Error::Write { path, .. } if path.starts_with(&file)),
            "{error}"
        );
    }
}
