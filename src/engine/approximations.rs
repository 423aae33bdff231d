//! Small stand-ins of the VAE on disk, and TAESD fetched from the hub when it is first used.
//!
//! Files lie in `<models>/VAE-approx` (A1111's directory for them; `VAE-taesd` is searched as well). A download is checked against
//! the size and SHA-256 that the hub announces and gets its name only when complete. For previews it is tried once a process.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use sha2::{Digest, Sha256};

use super::hub::{self, HubFile};
use super::{Error, hashes, with_causes};
use crate::config::Config;

/// Where TAESD for SDXL is published.
const REPO: &str = "madebyollin/taesdxl";
/// A1111's approximation network, converted.
const APPROX_NN: &str = "vaeapprox-sdxl.safetensors";
/// The same as A1111 downloads it.
const APPROX_NN_PICKLED: &str = "vaeapprox-sdxl.pt";
/// Larger than any file of this kind.
const LARGEST: u64 = 64 << 20;
/// A connection that takes longer than this is none.
const PATIENCE: Duration = Duration::from_secs(30);

/// Which half of TAESD.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TaesdHalf {
    /// Latents to pictures.
    Decoder,
    /// Pictures to latents.
    Encoder,
}

impl TaesdHalf {
    /// As A1111 and the first releases have it.
    fn pickled(self) -> &'static str {
        match self {
            Self::Decoder => "taesdxl_decoder.pth",
            Self::Encoder => "taesdxl_encoder.pth",
        }
    }

    fn file(self) -> &'static str {
        match self {
            Self::Decoder => "taesdxl_decoder.safetensors",
            Self::Encoder => "taesdxl_encoder.safetensors",
        }
    }
}

/// The directories of stand-ins.
#[derive(Debug)]
pub struct Approximations {
    /// Searched in order; downloads go to the first.
    dirs: [PathBuf; 2],
    /// One download at a time.
    downloading: Mutex<()>,
    /// A preview's download has failed and is not tried again.
    gave_up: AtomicBool,
}

impl Approximations {
    pub(super) fn open(config: &Config) -> Self {
        let models = config.models_dir();
        Self {
            dirs: [models.join("VAE-approx"), models.join("VAE-taesd")],
            downloading: Mutex::new(()),
            gave_up: AtomicBool::new(false),
        }
    }

    /// The approximation network's file, if it is there.
    #[must_use]
    pub fn approx_nn(&self) -> Option<PathBuf> {
        self.find(APPROX_NN)
            .or_else(|| self.find(APPROX_NN_PICKLED))
    }

    /// TAESD's file, downloaded if it is not there. Blocks for seconds.
    ///
    /// # Errors
    /// [`Error::NotDownloaded`] with what to do.
    pub fn taesd(&self, half: TaesdHalf) -> Result<PathBuf, Error> {
        let file = half.file();
        let _alone = self
            .downloading
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(path) = self.find_half(half) {
            return Ok(path);
        }
        let target = self.dirs[0].join(file);
        tracing::info!(file, repo = REPO, "downloading");
        download(file, &target).map_err(|reason| Error::NotDownloaded {
            file,
            dir: self.dirs[0].clone(),
            repo: REPO,
            reason,
        })?;
        Ok(target)
    }

    /// TAESD's decoder for previews, which can do without: after a failed download it is not tried again.
    #[must_use]
    pub fn taesd_for_previews(&self) -> Option<PathBuf> {
        if let Some(path) = self.find_half(TaesdHalf::Decoder) {
            return Some(path);
        }
        if self.gave_up.load(Ordering::Relaxed) {
            return None;
        }
        match self.taesd(TaesdHalf::Decoder) {
            Ok(path) => Some(path),
            Err(error) => {
                self.gave_up.store(true, Ordering::Relaxed);
                tracing::warn!(%error, "previews are approximated without TAESD");
                None
            }
        }
    }

    fn find_half(&self, half: TaesdHalf) -> Option<PathBuf> {
        self.find(half.file()).or_else(|| self.find(half.pickled()))
    }

    fn find(&self, file: &str) -> Option<PathBuf> {
        let mut paths = self.dirs.iter().map(|dir| dir.join(file));
        paths.find(|path| path.is_file())
    }
}

/// Fetches a file of the hub to `target`; the error is the reason in words.
fn download(file: &str, target: &Path) -> Result<(), String> {
    let found = hub::locate(REPO, file).map_err(|error| with_causes(&error))?;
    if found.size > LARGEST {
        return Err(format!("the hub announces {} bytes", found.size));
    }
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .timeout_global(Some(PATIENCE))
        .build()
        .into();
    let mut request = agent.get(&found.url);
    if let Some(token) = &found.token {
        request = request.header("authorization", format!("Bearer {token}"));
    }
    let mut response = request.call().map_err(|error| with_causes(&error))?;
    let mut bytes = Vec::new();
    let reader = response.body_mut().as_reader();
    let read = reader.take(LARGEST).read_to_end(&mut bytes);
    read.map_err(|error| with_causes(&error))?;
    check(&bytes, &found)?;
    write(&bytes, target).map_err(|error| with_causes(&error))
}

fn check(bytes: &[u8], found: &HubFile) -> Result<(), String> {
    if bytes.len() as u64 != found.size {
        return Err(format!("{} of {} bytes arrived", bytes.len(), found.size));
    }
    let hash = hashes::hex(&Sha256::digest(bytes));
    match &found.sha256 {
        Some(wanted) if *wanted != hash => Err(format!("SHA-256 `{hash}` arrived, not `{wanted}`")),
        _ => Ok(()),
    }
}

fn write(bytes: &[u8], target: &Path) -> std::io::Result<()> {
    if let Some(dir) = target.parent() {
        fs::create_dir_all(dir)?;
    }
    let partial = target.with_extension("part");
    fs::write(&partial, bytes)?;
    fs::rename(&partial, target)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hub_file(size: u64, sha256: Option<&str>) -> HubFile {
        HubFile {
            url: String::new(),
            token: None,
            size,
            sha256: sha256.map(str::to_string),
        }
    }

    #[test]
    fn what_arrives_is_checked() {
        let hash = hashes::hex(&Sha256::digest(b"tiny"));
        assert_eq!(check(b"tiny", &hub_file(4, Some(&hash))), Ok(()));
        assert_eq!(check(b"tiny", &hub_file(4, None)), Ok(()));
        let short = check(b"tin", &hub_file(4, Some(&hash))).unwrap_err();
        assert_eq!(short, "3 of 4 bytes arrived");
        let wrong = check(b"tyni", &hub_file(4, Some(&hash))).unwrap_err();
        assert!(wrong.starts_with("SHA-256 `"), "{wrong}");
    }

    #[test]
    fn files_are_found_where_they_belong() {
        let dir = tempfile::tempdir().unwrap();
        let config = Config {
            data_dir: dir.path().to_path_buf(),
            ..Config::default()
        };
        let small = Approximations::open(&config);
        assert_eq!(small.approx_nn(), None);
        let old = dir
            .path()
            .join("models/VAE-taesd/taesdxl_encoder.safetensors");
        write(b"x", &old).unwrap();
        assert_eq!(small.taesd(TaesdHalf::Encoder).unwrap(), old);
        let network = dir.path().join("models/VAE-approx").join(APPROX_NN);
        write(b"x", &network).unwrap();
        assert_eq!(small.approx_nn(), Some(network));
    }
}
